from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._log import warn
from scdiffx._slots import Connectivities, Obs, Obsm, Uns, available
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.ops._diffusion import SINGLE_TOL

if TYPE_CHECKING:
    from anndata import AnnData


def warn_unconverged(op: Any, result: Any) -> None:
    """Say so when the eigensolver stopped early, and what can be done."""
    if not bool(result.converged):
        warn(
            "the eigensolver did not reach its tolerance: the last components may be inaccurate; "
            "a smaller `n_comps` or a larger `n_neighbors` in `pp.neighbors` helps"
        )


def weights_of(adata: AnnData | Plan, weights: str | None) -> Obs | None:
    """The column with the weights of cells, checked where it is there already."""
    if weights is None:
        return None
    slot = Obs(weights)
    if isinstance(adata, Plan) and adata.writes(slot):
        return slot
    data: Any = adata.adata if isinstance(adata, Plan) else adata
    if not slot.exists(data):
        raise KeyError(f"weights={weights!r} is not in `adata.obs`. Available: {available(data.obs)}")
    column = data.obs[weights]
    if column.dtype.kind not in "fiub":
        raise TypeError(f"weights={weights!r}: `adata.obs[{weights!r}]` holds {column.dtype}, not numbers")
    values = column.to_numpy(np.float64)
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(bad):
        raise ValueError(
            f"weights={weights!r}: the weight {values[bad[0]]} of cell {data.obs_names[bad[0]]!r} is not a finite "
            "number of at least 0"
        )
    return slot


@public
def diffmap(
    adata: AnnData | Plan,
    n_comps: int = 15,
    *,
    neighbors_key: str = "neighbors",
    weights: str | None = None,
    random_state: Any = None,
    copy: bool = False,
    rng: Any = None,
) -> AnnData | None:
    """Compute a diffusion map: the leading eigenvectors of the graph's symmetric transition matrix.

    Computed in float64 as scanpy does. The first component is stationary and carries no information. The solver
    starts from fixed vectors, so `random_state` and `rng` are checked but do not change the result.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with a neighbour graph, or a plan.
    n_comps
        Number of components, the stationary one included.
    neighbors_key
        Key of `adata.uns` that describes the graph.
    weights
        Column of `obs` with a weight of at least 0 for each cell, such as "cell_weight" of `sd.pp.cell_weights`: as how
        many cells it counts in densities and walks. A cell of weight 0 (below 1e-6) is as if it were not there; its own
        components are 0. By default all cells count as 1. In a plan derivatives reach the weights.
    random_state, rng
        Accepted for compatibility; give at most one.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["X_diffmap"]` : float32 (cells, n_comps)
        Diffusion components.
    `adata.uns["diffmap_evals"]` : float32 (n_comps,)
        Eigenvalues in decreasing order.

    Raises
    ------
    KeyError
        If there is no column `weights`.
    TypeError
        If it does not hold numbers.
    ValueError
        If there is no neighbour graph, `n_comps` is below 3, or a weight is negative or not finite.

    References
    ----------
    Coifman et al. (2005), Geometric diffusions as a tool for harmonic analysis and structure definition of data;
    Haghverdi et al. (2015), Diffusion maps for high-dimensional single-cell analysis of differentiation data.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> sd.tl.diffmap(adata)
    >>> adata.obsm["X_diffmap"].shape
    (700, 15)
    """
    if n_comps <= 2:
        raise ValueError(f"n_comps={n_comps!r} must be at least 3: the first component is stationary")
    as_seed(one_rng(rng, random_state))
    step = Step(
        "diffmap",
        ops.DiffusionMap(n_comps=n_comps, tol=None if isinstance(adata, Plan) else SINGLE_TOL),
        reads=(Connectivities(neighbors_key), None, weights_of(adata, weights)),
        writes=(
            Write(Obsm("X_diffmap"), lambda op, result: result.eigenvectors, np.float32),
            Write(Uns("diffmap_evals"), lambda op, result: result.eigenvalues, np.float32),
        ),
        message=f"computing diffusion map using n_comps={n_comps}",
        check=warn_unconverged,
        precise=True,
        compiled=False,
    )
    return apply(adata, step, copy=copy)
