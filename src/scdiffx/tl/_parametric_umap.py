from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import Connectivities, Obsm, Slot, Uns, available, is_anndata
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.ops._umap_start import curve
from scdiffx.tl._ot_trajectory import representation

if TYPE_CHECKING:
    from anndata import AnnData


@public
def parametric_umap(
    adata: AnnData | Plan,
    *,
    use_rep: str | None = None,
    reference: AnnData | None = None,
    min_dist: float = 0.5,
    spread: float = 1.0,
    n_components: int = 2,
    n_hidden: int = 128,
    n_steps: int = 1500,
    learning_rate: float = 3e-3,
    gamma: float = 1.0,
    negative_sample_rate: int = 5,
    random_state: Any = None,
    key_added: str = "parametric_umap",
    neighbors_key: str = "neighbors",
    copy: bool = False,
    rng: Any = None,
    progress: bool = True,
) -> AnnData | None:
    """Lay out cells by a network that is trained on UMAP's objective, and place new cells by it.

    Unlike :func:`umap`, the layout is a function of each cell's coordinates: it has derivatives, takes part in plans,
    and new cells do not move the others.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with a neighbour graph and coordinates of the cells, or a plan.
    use_rep
        Key of `obsm` with the coordinates that the network takes. Default "X_pca"; with a `reference`, the one its
        network was trained on.
    reference
        Cells on which this function was called before, with the same `key_added`: their network places those of `adata`
        and nothing is trained, so no graph is needed. The coordinates must be in the same space, for instance
        components of the same PCA.
    min_dist, spread, n_components
        As in :func:`umap`: distance up to which cells count as at the same place, scale, and number of dimensions.
    n_hidden
        Width of the three hidden layers.
    n_steps
        Gradient steps, of 1,024 edges each.
    learning_rate
        First rate of Adam; it falls to 0 along a cosine.
    gamma
        Weight of the repulsion.
    negative_sample_rate
        Number of random cells that push for each edge that pulls.
    random_state, rng
        Seed: an integer, a numpy generator or a JAX key; give one of the two. Default 0.
    key_added
        Name of the results.
    neighbors_key
        Key of `adata.uns` that describes the graph.
    copy
        Return a copy instead of writing to `adata`.
    progress
        Whether to show a progress bar.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["X_parametric_umap" | f"X_{key_added}"]` : float32 (cells, n_components)
        Coordinates.
    `adata.uns["parametric_umap" | key_added]` : dict
        `params`, with `a` and `b`; the weights `net`, and the `center` and `scale` of the coordinates; and, where it
        was trained, `history`: the mean objective of every fifty steps.

    Raises
    ------
    KeyError
        If the representation does not exist, or the reference has no network.
    ValueError
        If there is no neighbour graph or it has no edges, the coordinates have another number of dimensions than the
        network takes, or a setting is not usable.

    Notes
    -----
    The neighbourhoods in the layout are slightly worse than those of :func:`umap`, which places each cell freely; those
    of new cells depend on how well their kinds are represented (see the documentation's figures).

    References
    ----------
    Sainburg, McInnes and Gentner (2021), Parametric UMAP embeddings for representation and semisupervised learning.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> sd.tl.parametric_umap(adata, n_steps=10, n_hidden=8, progress=False)
    >>> adata.obsm["X_parametric_umap"].shape
    (700, 2)
    """
    _check(min_dist, spread, learning_rate, gamma)
    counts = {"n_components": n_components, "n_hidden": n_hidden, "n_steps": n_steps}
    for name, value in (counts | {"negative_sample_rate": negative_sample_rate}).items():
        if value < 1:
            raise ValueError(f"{name}={value!r} must be at least 1")
    seed = as_seed(one_rng(rng, random_state))
    if reference is None:
        a, b = curve(min_dist, spread)
        rep = representation(adata, use_rep)
        op = ops.ParametricUMAP(
            a=a,
            b=b,
            n_components=n_components,
            training=ops.ParametricUMAPTraining(
                n_hidden=n_hidden,
                n_steps=n_steps,
                learning_rate=float(learning_rate),
                negative_sample_rate=negative_sample_rate,
                gamma=float(gamma),
                progress=progress,
            ),
        )
        params: dict[str, Any] = {"a": a, "b": b, "use_rep": rep.key, "min_dist": min_dist, "spread": spread}
        params |= counts | {"learning_rate": learning_rate, "gamma": gamma, "random_state": seed}
        graph = Connectivities(neighbors_key)
    else:
        op, params = _from(reference, key_added)
        rep = representation(adata, params["use_rep"] if use_rep is None else use_rep)
        params, graph = params | {"use_rep": rep.key}, None

    def notes(op: ops.ParametricUMAP, result: ops.ParametricUMAPResult, args: Any) -> Mapping[Slot, Any]:
        assert op.net is not None
        entry: dict[str, Any] = {
            "params": params,
            "net": {name: np.asarray(value, np.float32) for name, value in op.net.items()},
            "center": np.asarray(op.center, np.float32),
            "scale": float(np.asarray(op.scale)),
        }
        if op.history is not None:
            entry["history"] = np.asarray(op.history, np.float64)
        return {Uns(key_added): entry}

    step = Step(
        "parametric_umap",
        op,
        reads=(rep, graph),
        writes=(Write(Obsm(f"X_{key_added}"), lambda op, result: result.embedding, np.float32),),
        message="computing parametric UMAP",
        notes=notes,
        rng=seed,
    )
    return apply(adata, step, copy=copy)


def _check(min_dist: float, spread: float, learning_rate: float, gamma: float) -> None:
    for name, value in (("spread", spread), ("learning_rate", learning_rate)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r} must be greater than 0")
    for name, value in (("min_dist", min_dist), ("gamma", gamma)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value!r} must not be negative")
    if min_dist > spread:
        raise ValueError(f"min_dist={min_dist!r} must not be greater than spread={spread!r}")


def _from(reference: Any, key: str) -> tuple[ops.ParametricUMAP, dict[str, Any]]:
    """The operator with the network of a reference, and its settings."""
    if not is_anndata(reference):
        raise TypeError(f"`reference` must be an AnnData, got {type(reference).__name__}")
    entry = reference.uns.get(key)
    if not isinstance(entry, Mapping) or not {"net", "center", "scale", "params"} <= set(entry):
        raise KeyError(
            f"key_added={key!r}: `reference.uns` has no network of that name; call `sd.tl.parametric_umap(reference)` "
            f"first. Available: {available(reference.uns.keys())}"
        )
    params = dict(entry["params"])
    op = ops.ParametricUMAP(
        net={name: jnp.asarray(value, jnp.float32) for name, value in entry["net"].items()},
        center=jnp.asarray(entry["center"], jnp.float32),
        scale=jnp.asarray(entry["scale"], jnp.float32),
        a=float(params["a"]),
        b=float(params["b"]),
        n_components=int(params["n_components"]),
    )
    return op, params
