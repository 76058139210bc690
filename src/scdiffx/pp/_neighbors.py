from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._log import warn
from scdiffx._slots import Connectivities, Distances, Leading, Obsm, Slot, Uns, Varm, X, available, write_all
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.pp._pca import N_PCS, default_keys, pca

if TYPE_CHECKING:
    from anndata import AnnData

# Below this size the search is exact and distances are kept in float64, as in scanpy.
_EXACT = 8192
_DENSE_GENES = 500


@public
def neighbors(
    adata: AnnData | Plan,
    n_neighbors: int = 15,
    n_pcs: int | None = None,
    *,
    use_rep: str | None = None,
    method: str = "umap",
    transformer: Any = None,
    metric: str = "euclidean",
    random_state: Any = None,
    key_added: str | None = None,
    copy: bool = False,
    rng: Any = None,
) -> AnnData | None:
    """Find the nearest neighbours of each cell and weigh them into a graph.

    The search is exact up to about 20,000 cells and by k-means leaves above. Neighbour lists are discrete; distances
    and weights are differentiable in the representation (for the metrics "euclidean", "cosine" and "correlation").

    Parameters
    ----------
    adata
        Annotated data (cells x genes), or a plan.
    n_neighbors
        Neighbours per cell, the cell itself counted.
    n_pcs
        Use only the first `n_pcs` columns of the representation; 0 means `X`.
    use_rep
        Key of `obsm`, or "X". By default the principal components if `X` has more than 50 genes, else `X`.
    method
        "umap" (fuzzy union) or "gauss" (adaptive Gaussian kernel).
    transformer
        A scikit-learn neighbours transformer that does the search instead; its distances are taken as they are.
    metric
        "euclidean", "cosine", "correlation", or any other metric of scikit-learn (searched exactly, no derivative).
    random_state, rng
        Seed of the approximate search; give one of the two. Default 0.
    key_added
        Key of `uns` and prefix of the `obsp` keys.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsp["distances" | f"{key_added}_distances"]` : csr_matrix float64, or float32 (cells, cells)
        Distances to the `n_neighbors` - 1 nearest neighbours; float64 when exact.
    `adata.obsp["connectivities" | f"{key_added}_connectivities"]` : csr_matrix float32 (cells, cells)
        Weights in [0, 1], symmetric.
    `adata.uns["neighbors" | key_added]` : dict
        `connectivities_key` and `distances_key`, where the two are, and `params`.

    Raises
    ------
    ValueError
        If `n_neighbors` does not fit the number of cells, or `method` or `metric` is unknown.
    KeyError
        If `use_rep` does not exist.
    TypeError
        If `transformer` is a name rather than a transformer.

    References
    ----------
    McInnes et al. (2018), UMAP; Haghverdi et al. (2016), Diffusion pseudotime (for "gauss").

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> sd.pp.neighbors(adata, n_neighbors=15, key_added="fifteen")
    >>> int(adata.obsp["fifteen_distances"][0].nnz)
    14
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    if method not in ops.KERNELS:
        raise ValueError(f"method={method!r} is not available. Available: {list(ops.KERNELS)}")
    if not 2 <= n_neighbors <= data.n_obs:
        raise ValueError(f"n_neighbors={n_neighbors} must lie between 2 and the number of cells, {data.n_obs}")
    if isinstance(transformer, str):
        raise TypeError(
            f"transformer={transformer!r} is a name: pass a transformer, as sd.KNeighborsTransformer() is one"
        )
    if transformer is not None and isinstance(adata, Plan):
        raise ValueError("transformer= cannot be used on a plan, which searches anew at every refresh")
    seed = as_seed(one_rng(rng, random_state))
    source = _representation(adata, use_rep, n_pcs)
    if source is None:
        warn(
            f"You’re trying to run this on {data.n_vars} dimensions of `.X`, if you really want this, "
            "set `use_rep='X'`.\n         Falling back to preprocessing with `sd.pp.pca` and default params."
        )
        settings = {"method": method, "transformer": transformer, "metric": metric, "key_added": key_added, "rng": seed}
        if isinstance(adata, Plan):
            # Not through the public names: the plan records the one call that the user made.
            inspect.unwrap(pca)(adata)
            return inspect.unwrap(neighbors)(adata, n_neighbors, n_pcs, **settings)
        return _after_pca(data, n_neighbors, n_pcs, settings, copy)
    key = "neighbors" if key_added is None else key_added
    connectivities, distances = Connectivities(key), Distances(key)
    params = {
        "n_neighbors": n_neighbors,
        "method": method,
        "random_state": seed,
        "metric": metric,
        **({} if use_rep is None else {"use_rep": use_rep}),
        **({} if n_pcs is None else {"n_pcs": n_pcs}),
    }
    dtype = np.float64 if data.n_obs < _EXACT and metric == "euclidean" else np.float32

    def notes(op: ops.Neighbors, result: ops.NeighborsResult, args: Any) -> Mapping[Slot, Any]:
        indices, values = np.asarray(result.indices), np.asarray(result.distances).astype(dtype)
        n, k = indices.shape
        pairs = sp.csr_matrix((values.ravel(), indices.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
        described = {"connectivities_key": connectivities.key, "distances_key": distances.key, "params": params}
        return {distances: pairs, Uns(key): described}

    op = ops.Neighbors(
        n_neighbors=n_neighbors,
        metric=metric,
        method=method,
        search=None if transformer is None else _search_with(transformer, n_neighbors),
    )
    step = Step(
        "neighbors",
        op,
        reads=(source,),
        writes=(Write(connectivities, lambda op, result: result.connectivities, np.float32),),
        message="computing neighbors",
        notes=notes,
        rng=seed,
    )
    return apply(adata, step, copy=copy)


def _after_pca(
    data: AnnData, n_neighbors: int, n_pcs: int | None, settings: dict[str, Any], copy: bool
) -> AnnData | None:
    """Components and neighbours together: computed beside the AnnData and written only when both are there."""
    aside = type(data)(data.X, obs=data.obs[[]].copy(), var=data.var.copy())
    # Not through the public names: the history has the one call that the user made.
    inspect.unwrap(pca)(aside)
    inspect.unwrap(neighbors)(aside, n_neighbors, n_pcs, **settings)
    key = settings["key_added"] or "neighbors"
    outputs: dict[Slot, Any] = {
        **{Obsm(key): value for key, value in aside.obsm.items()},
        **{Varm(key): value for key, value in aside.varm.items()},
        **{Uns(key): value for key, value in aside.uns.items()},
        **{slot(key): aside.obsp[slot(key).key] for slot in (Connectivities, Distances)},
    }
    target = data.copy() if copy else data
    write_all(target, outputs)
    return target if copy else None


def _representation(adata: AnnData | Plan, use_rep: str | None, n_pcs: int | None) -> Slot | None:
    """scanpy's choice of representation; None when principal components are due but missing."""
    data = adata.adata if isinstance(adata, Plan) else adata
    has: Callable[[Slot], bool] = adata.has if isinstance(adata, Plan) else lambda slot: slot.exists(adata)
    pcs = default_keys()[0]
    if use_rep is None:
        if n_pcs == 0 or (n_pcs is None and data.n_vars <= N_PCS):
            use_rep = "X"
        elif has(Obsm(pcs)):
            use_rep = pcs
        else:
            return None
    if use_rep == "X":
        if sp.issparse(data.X) and data.n_vars > _DENSE_GENES:
            raise ValueError(
                f"use_rep='X' would make a sparse matrix of {data.n_vars} genes dense; use principal components, "
                "or put `adata.X.toarray()` in `obsm`"
            )
        return X()
    slot = Obsm(use_rep)
    if not has(slot):
        raise KeyError(f"use_rep={use_rep!r} is not in `adata.obsm`. Available: {available(data.obsm.keys())} and 'X'")
    return slot if n_pcs is None else Leading(slot, n_pcs)


def _search_with(transformer: Any, n_neighbors: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Neighbour lists from a scikit-learn transformer, the cell itself in the first column."""

    def search(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        graph = sp.csr_matrix(transformer.fit_transform(z))
        n = graph.shape[0]
        rows = np.repeat(np.arange(n), np.diff(graph.indptr))
        other = graph.indices != rows
        rows, columns, values = rows[other], graph.indices[other], graph.data[other]
        order = np.lexsort((values, rows))
        rows, columns, values = rows[order], columns[order], values[order]
        found = np.bincount(rows, minlength=n)
        if found.min() < n_neighbors - 1:
            raise ValueError(
                f"the transformer found {found.min()} neighbours for some cell; n_neighbors={n_neighbors} needs "
                f"{n_neighbors - 1}"
            )
        rank = np.arange(len(rows)) - np.repeat(np.cumsum(found) - found, found)
        keep = rank < n_neighbors - 1
        shape = (n, n_neighbors - 1)
        own = np.arange(n)[:, None]
        indices = np.hstack([own, columns[keep].reshape(shape)])
        return indices, np.hstack([np.zeros((n, 1)), values[keep].reshape(shape)])

    return search
