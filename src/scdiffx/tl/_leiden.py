from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._log import warn
from scdiffx._slots import Connectivities, Obs, Obsm, Slot, Uns, categories
from scdiffx._steps import Plan, Step, Write, apply

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
    temperature: float = 0.1,
    copy: bool = False,
    rng: Any = None,
) -> AnnData | None:
    """Cluster the cells into communities of the neighbour graph, with memberships.

    The partition is igraph's Leiden on the undirected graph, what ``sc.tl.leiden(flavor="igraph", directed=False)``
    finds with the same `random_state` and `n_iterations`; here clusters are numbered by size. It is discrete: no
    derivative passes through it, and in a fit it is found again at every refresh. Memberships are differentiable: the
    softmax of what a cell would add to the modularity in each cluster, all other cells staying where they are.

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
    temperature
        Softness of the memberships, greater than 0, in units of the share of a cell's edges: a cell with 20 % of its
        edges more in one cluster than in another belongs to it e^2 times as much at 0.1, apart from what the clusters'
        sizes lead to expect. The clusters do not depend on it.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obs[key_added]` : categorical of str (cells,)
        Clusters "0", "1", ..., largest first.
    `adata.obsm["leiden_probabilities" | f"{key_added}_probabilities"]` : float32 (cells, clusters)
        Memberships, which sum to 1. With ``n_iterations=-1`` the largest is that of the cell's cluster (before igraph
        1.0, for all but up to 2 % of the cells).
    `adata.uns[key_added]` : dict
        `params` and the `modularity` of the partition.

    Raises
    ------
    ValueError
        If there is no neighbour graph, `resolution` is negative, or `temperature` is not greater than 0.

    Warns
    -----
    UserWarning
        If there are more than 1,000 clusters: the memberships are left out.

    Notes
    -----
    In a plan `temperature` can be learned, and derivatives pass from the memberships to the weights of the graph.

    References
    ----------
    Traag, Waltman and van Eck (2019), From Louvain to Leiden: guaranteeing well-connected communities.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> sd.tl.leiden(adata, resolution=0.5)
    >>> adata.obs["leiden"].cat.categories[0]
    '0'
    """
    if not resolution >= 0:
        raise ValueError(f"resolution={resolution!r} must not be negative")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature!r} must be greater than 0")
    seed = as_seed(one_rng(rng, random_state))
    params = {"resolution": resolution, "random_state": seed, "n_iterations": n_iterations}

    def notes(op: ops.Leiden, result: ops.LeidenResult, args: Any) -> Mapping[Slot, Any]:
        labels = np.asarray(result.membership)
        return {
            Obs(key_added): categories(labels),
            Uns(key_added): {"params": params, "modularity": float(result.modularity)},
        }

    def check(op: ops.Leiden, result: ops.LeidenResult) -> None:
        if result.probabilities is None:
            found = int(np.asarray(result.membership).max()) + 1
            warn(f"leiden found {found} clusters: memberships are left out above 1,000. Is the graph connected?")

    op = ops.Leiden(
        temperature=float(temperature),
        resolution=float(resolution),
        n_iterations=n_iterations,
        use_weights=use_weights,
        seed=seed,
    )
    step = Step(
        "leiden",
        op,
        reads=(Connectivities(neighbors_key),),
        writes=(
            Write(Obs(key_added), lambda op, result: result.membership),
            Write(Obsm(f"{key_added}_probabilities"), lambda op, result: result.probabilities, np.float32),
        ),
        message="running Leiden clustering",
        notes=notes,
        check=check,
    )
    return apply(adata, step, copy=copy)
