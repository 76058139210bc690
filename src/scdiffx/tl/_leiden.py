from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import Connectivities, Obs, Slot, Uns, categories
from scdiffx._steps import Plan, Step, Write, apply, public

if TYPE_CHECKING:
    from anndata import AnnData


@public
def leiden(
    adata: AnnData | Plan,
    resolution: float = 1.0,
    *,
    random_state: Any = None,
    key_added: str = "leiden",
    use_weights: bool = True,
    n_iterations: int = -1,
    neighbors_key: str = "neighbors",
    copy: bool = False,
    rng: Any = None,
) -> AnnData | None:
    """Cluster the cells into communities of the neighbour graph.

    The partition is igraph's Leiden on the undirected graph, what ``sc.tl.leiden(flavor="igraph", directed=False)``
    finds with the same `random_state` and `n_iterations`; here clusters are numbered by size. It is discrete: no
    derivative passes through it, and in a fit it is found again at every refresh.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with a neighbour graph, or a plan.
    resolution
        Higher values give more clusters.
    random_state, rng
        Seed: an integer, a numpy generator or a JAX key; give one of the two. Default 0.
    key_added
        Key of `adata.obs` and `adata.uns` for the result.
    use_weights
        Whether edges count by their connectivity, or equally.
    n_iterations
        Passes of the algorithm; -1 runs until nothing improves.
    neighbors_key
        Key of `adata.uns` that describes the graph.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obs[key_added]` : categorical of str (cells,)
        Clusters "0", "1", ..., largest first.
    `adata.uns[key_added]` : dict
        `params` and the `modularity` of the partition.

    Raises
    ------
    ValueError
        If there is no neighbour graph, or `resolution` is negative.

    References
    ----------
    Traag, Waltman and van Eck (2019), From Louvain to Leiden: guaranteeing well-connected communities.
    """
    if not resolution >= 0:
        raise ValueError(f"resolution={resolution!r} must not be negative")
    seed = as_seed(one_rng(rng, random_state))
    params = {"resolution": resolution, "random_state": seed, "n_iterations": n_iterations}

    def notes(op: ops.Leiden, result: ops.LeidenResult, args: Any) -> Mapping[Slot, Any]:
        labels = np.asarray(result.membership)
        return {
            Obs(key_added): categories(labels),
            Uns(key_added): {"params": params, "modularity": float(result.modularity)},
        }

    op = ops.Leiden(resolution=float(resolution), n_iterations=n_iterations, use_weights=use_weights, seed=seed)
    step = Step(
        "leiden",
        op,
        reads=(Connectivities(neighbors_key),),
        writes=(Write(Obs(key_added), lambda op, result: result.membership),),
        message="running Leiden clustering",
        notes=notes,
    )
    return apply(adata, step, copy=copy)
