from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._log import settings as log_settings
from scdiffx._slots import Obs, Obsm, Obsp, Slot, Uns, available, categories, check_batch
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.tl._ot_trajectory import representation

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

_METHODS = ("smooth", "gat")
_OF_METHOD = {"smooth": ("hops", "gradient"), "gat": ("prune", "max_steps")}


@public
def spatial_domains(  # noqa: PLR0913  # `public` reads `table_key`
    adata: AnnData | SpatialData | Plan,
    n_domains: int | None = None,
    *,
    method: str = "smooth",
    use_rep: str | None = None,
    spatial_key: str = "spatial",
    batch_key: str | None = None,
    n_neighbors: int | None = None,
    radius: float | None = None,
    hops: float | None = None,
    gradient: float | None = None,
    prune: float | None = None,
    max_steps: int | None = None,
    n_comps: int = 20,
    refine: int = 1,
    resolution: float = 1.0,
    n_init: int = 10,
    random_state: Any = None,
    key_added: str = "spatial_domain",
    copy: bool = False,
    rng: Any = None,
    table_key: str | None = None,
) -> AnnData | SpatialData | None:
    """Divide a tissue into domains of like expression.

    Each cell's representation is averaged over its neighbourhood in space, and a Gaussian mixture with one covariance
    for all domains is fitted to the principal components of the averages. How far to average is chosen without labels:
    the number of hops after which the expression of held-out cells is predicted best from the other cells around them.
    By ``method="gat"`` (experimental) a network learns how much to heed each neighbour. The cost is linear in cells.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with coordinates or a spatial graph, or a plan.
    n_domains
        Number of domains. By default as many as Leiden communities of the averages at `resolution`, from which the
        mixture then starts; at resolution 1 these are many more than a tissue has layers.
    method
        "smooth", as described, or "gat", a graph attention autoencoder after STAGATE, whose embedding takes the place
        of the averages. It is trained in the call to predict cells from those around them, until a held-out tenth of
        the cells is no longer predicted better. *Experimental*: on one of two labelled tissues it is behind "smooth".
    use_rep
        Key of `obsm` with the representation to average; default: the principal components. For several slices with
        technical differences use one without them, such as "X_pca_harmony".
    spatial_key
        Coordinates are ``obsm[spatial_key]``, two or three columns. Neighbours are those of
        ``obsp[f"{spatial_key}_connectivities"]``, as ``squidpy.gr.spatial_neighbors`` writes it, where it exists.
    batch_key
        Column of `obs` with the slice of each cell: cells of different slices are never neighbours, domains are found
        in all slices together.
    n_neighbors
        Instead of the graph in `obsp`, join each cell with its so many nearest, and with those whose nearest it is.
        Default 6, where there is no graph.
    radius
        Instead, join cells within this distance, in the unit of the coordinates.
    hops
        How often each cell is replaced by the mean of itself and its neighbours; between whole numbers results are
        interpolated. By default chosen from 0 to 30 as described, by five-fold cross-validation.
    gradient
        Weight of the sizes of the averages' slopes in space as further features, after BANKSY, where it is about 0.7.
        By default they are not used.
    prune
        For "gat": a second attention, confined to neighbours of the same expression cluster, counts as much as the
        first (STAGATE's cell type-aware module). The number is Leiden's resolution for these clusters, 0.2 there.
    max_steps
        For "gat": the most gradient steps. Default 300.
    n_comps
        Principal components of the averages to keep, or dimensions of the embedding by "gat".
    refine
        How often memberships are averaged over a cell and its neighbours at the end (a vote of the majority).
    resolution
        Of Leiden, where `n_domains` is None.
    n_init
        Starts of the mixture, of which the likeliest result is kept.
    random_state, rng
        Seed: an integer, a numpy generator or a JAX key; give one of the two. Default 0.
    key_added
        Name of the results.
    copy
        Return a copy instead of writing to `adata`: of a SpatialData, one that shares everything but the table.
    table_key
        Name of the table where `adata` is a SpatialData, which needs it if it has several. Coordinates are those of the
        table's `obsm`, not of shapes.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obs["spatial_domain" | key_added]` : categorical of str (cells,)
        Domains "0", "1", ..., largest first (before refinement).
    `adata.obsm["X_spatial_domain" | f"X_{key_added}"]` : float32 (cells, n_comps)
        Principal components of the averages, or the embedding by "gat".
    `adata.obsm["spatial_domain_probabilities" | f"{key_added}_probabilities"]` : float32 (cells, n_domains)
        Memberships, which sum to 1; the largest is that of the cell's domain.
    `adata.uns["spatial_domain" | key_added]` : dict
        `params`, the `hops` used, the `log_likelihood` of the mixture (mean over cells), and where `hops` was chosen
        the `held_out_error` after 0, 1, ... hops, as a share of the variance. By "gat" `held_out_error` is that of the
        network kept, and `history` holds the errors during training (every 10 steps) in place of `hops`.

    Raises
    ------
    KeyError
        If the representation, the coordinates or `batch_key` do not exist.
    ValueError
        If there are fewer cells than domains (or than ten, by "gat"), or a setting is not usable or of another method.
    FloatingPointError
        If training by "gat" diverges.

    Warns
    -----
    UserWarning
        If the mixture did not converge, or averaging does not help to predict held-out cells (`hops` is then 0.001).

    Notes
    -----
    In a plan `hops` and `gradient`, or the network, can be learned, and derivatives pass through memberships and
    components. The axes or the network of the first call stay, and iterations of the mixture start from its first
    parameters, also for new cells. Of more than 8,192 cells "gat" is trained on blocks, see ``ops.SpatialTraining``.

    References
    ----------
    Singhal et al. (2024), BANKSY unifies cell typing and tissue domain segmentation for scalable spatial omics data
    analysis. Scrucca et al. (2016), mclust 5 (the model EEE). Dong and Zhang (2022), Deciphering spatial domains from
    spatially resolved transcriptomics with an adaptive graph attention auto-encoder (STAGATE). Brody et al. (2022), How
    attentive are graph attention networks? (GATv2).

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> adata.obsm["spatial"] = adata.obsm["X_umap"]  # in place of coordinates in a tissue
    >>> sd.tl.spatial_domains(adata, n_domains=3, hops=2)
    >>> list(adata.obs["spatial_domain"].cat.categories)
    ['0', '1', '2']
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    if method not in _METHODS:
        raise ValueError(f"method={method!r} is not available. Available: {list(_METHODS)}")
    if n_domains is not None and not 1 <= n_domains <= data.n_obs:
        raise ValueError(f"n_domains={n_domains!r} must lie between 1 and the number of cells, {data.n_obs}")
    given = {"hops": hops, "gradient": gradient, "prune": prune, "max_steps": max_steps}
    _check_of_method(method, given)
    _check_settings(n_neighbors=n_neighbors, n_comps=n_comps, n_init=n_init, max_steps=max_steps)
    if refine < 0:
        raise ValueError(f"refine={refine!r} must not be negative")
    for name, value in (*given.items(), ("radius", radius), ("resolution", resolution)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r} must be greater than 0")
    if n_neighbors is not None and radius is not None:
        raise ValueError(f"pass either n_neighbors={n_neighbors!r} or radius={radius!r}, not both")
    check_batch(data, batch_key)
    z = representation(adata, use_rep)
    coordinates, graph = _space(adata, spatial_key, given=n_neighbors is None and radius is None)
    if gradient is not None and coordinates is None:
        raise KeyError(f"gradient={gradient!r} needs coordinates: `adata.obsm[{spatial_key!r}]` does not exist")
    if graph is not None and gradient is None:
        coordinates = None
    seed = as_seed(one_rng(rng, random_state))
    settings = ops.SpatialSettings(
        n_neighbors=6 if n_neighbors is None else n_neighbors,
        radius=None if radius is None else float(radius),
        n_comps=n_comps,
        n_refine=refine,
        resolution=float(resolution),
    )
    near = {"radius": radius} if radius is not None else {"n_neighbors": settings.n_neighbors}
    params = {
        "method": method,
        "use_rep": z.key,
        "spatial_key": spatial_key,
        "n_comps": n_comps,
        "refine": refine,
        "n_init": n_init,
        "random_state": seed,
        **({"resolution": resolution} if n_domains is None else {"n_domains": n_domains}),
        **(near if graph is None else {"connectivities_key": graph.key}),
        **({} if batch_key is None else {"batch_key": batch_key}),
        **({} if gradient is None else {"gradient": gradient}),
        **({} if prune is None else {"prune": prune}),
    }

    def notes(op: Any, result: ops.SpatialDomainsResult, args: Any) -> Mapping[Slot, Any]:
        entry = {"params": params, "log_likelihood": float(result.log_likelihood), **_found(op)}
        labels = np.asarray(result.labels)
        # A domain of few cells can be outvoted everywhere; its name stays.
        codes = categories(np.append(labels, result.memberships.shape[1] - 1))[:-1]
        return {Obs(key_added): codes, Uns(key_added): entry}

    step = Step(
        "spatial_domains",
        _operator(method, given, mixture=ops.TiedMixture(n_init=n_init), n_domains=n_domains, settings=settings),
        reads=(z, coordinates, graph, None if batch_key is None else Obs(batch_key, codes=True)),
        writes=(
            Write(Obs(key_added), lambda op, result: result.labels),
            Write(Obsm(f"X_{key_added}"), lambda op, result: result.embedding, np.float32),
            Write(Obsm(f"{key_added}_probabilities"), lambda op, result: result.memberships, np.float32),
        ),
        message="dividing the tissue into domains",
        notes=notes,
        rng=seed,
    )
    return apply(adata, step, copy=copy)


def _operator(method: str, given: Mapping[str, float | None], **shared: Any) -> Any:
    named: dict[str, Any] = {name: float(value) for name, value in given.items() if value is not None}
    if method == "smooth":
        return ops.SpatialDomains(**named, **shared)
    training = ops.SpatialTraining(prune=named.get("prune"), progress=log_settings.verbosity >= 2)
    if "max_steps" in named:
        training = training._replace(max_steps=int(named["max_steps"]))
    return ops.SpatialAutoencoder(**shared, training=training)


def _found(op: ops.SpatialDomains | ops.SpatialAutoencoder) -> dict[str, Any]:
    """What `init` chose, and the errors it went by."""
    if isinstance(op, ops.SpatialDomains):
        assert op.projection is not None
        errors = np.asarray(op.projection.errors, np.float64)
        return {"hops": float(np.asarray(op.hops))} | ({"held_out_error": errors} if len(errors) else {})
    if op.history is None:  # loaded from a file
        return {}
    history = {name: np.asarray(op.history[name], np.float64) for name in ("train", "validation")}
    return {"held_out_error": float(history["validation"].min()), "history": history}


def _check_of_method(method: str, given: Mapping[str, float | None]) -> None:
    for name, value in given.items():
        if value is not None and name not in _OF_METHOD[method]:
            raise ValueError(f"{name}={value!r} has no meaning with method={method!r}")


def _check_settings(**settings: int | None) -> None:
    for name, value in settings.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r} must be at least 1")


def _space(adata: AnnData | Plan, spatial_key: str, *, given: bool) -> tuple[Obsm | None, Obsp | None]:
    """The coordinates, and the graph where one is to be used; at least one of the two."""
    data = adata.adata if isinstance(adata, Plan) else adata
    coordinates, graph = Obsm(spatial_key), Obsp(f"{spatial_key}_connectivities")
    use_graph = given and graph.exists(data)
    if not coordinates.exists(data):
        if not use_graph:
            raise KeyError(
                f"spatial_key={spatial_key!r} is not in `adata.obsm`. Available: {available(data.obsm.keys())}"
            )
        return None, graph
    return coordinates, graph if use_graph else None
