from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._slots import Connectivities, Given, Obs, Obsm, Slot, Uns
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.ops._diffusion import SINGLE_TOL
from scdiffx.tl._diffmap import warn_unconverged, weights_of

if TYPE_CHECKING:
    from anndata import AnnData

# Below this many cells a start from known components saves less than compiling for it costs.
_WARM_START = 20_000


@public
def pseudotime(
    adata: AnnData | Plan,
    n_dcs: int = 10,
    *,
    root: int | str | None = None,
    neighbors_key: str = "neighbors",
    weights: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Order cells by diffusion pseudotime, their distance from a root cell along the graph.

    The same numbers as ``sc.tl.diffmap`` followed by ``sc.tl.dpt``, in float64. Diffusion components are computed anew
    from the present graph; from 20,000 cells on the search for them starts at those that are already there, and is over
    at once where these are its eigenvectors. Also available as ``sd.tl.dpt``.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with a neighbour graph, or a plan.
    n_dcs
        Number of diffusion components that count.
    root
        Index or name of the root cell; by default `adata.uns["iroot"]`.
    neighbors_key
        Key of `adata.uns` that describes the graph.
    weights
        Column of `obs` with a weight of at least 0 for each cell, such as "cell_weight" of `sd.pp.cell_weights`: as how
        many cells it counts in densities and walks. A cell of weight 0 (below 1e-6) is as if it were not there, and
        cannot be reached. By default all cells count as 1. In a plan derivatives reach the weights.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obs["dpt_pseudotime"]` : float32 (cells,)
        Pseudotime in [0, 1]; infinite for cells that the root cannot reach, and for those of weight 0.
    `adata.obsm["X_diffmap"]` : float32 (cells, n_comps)
        Diffusion components, 15 or as many as were there.
    `adata.uns["diffmap_evals"]` : float32 (n_comps,)
        Their eigenvalues.
    `adata.uns["iroot"]` : int
        Index of the root cell.

    Raises
    ------
    KeyError
        If there is no column `weights`.
    TypeError
        If it does not hold numbers.
    ValueError
        If there is no neighbour graph, no root, the root is not a cell or of weight 0, or a weight is negative or not
        finite.

    References
    ----------
    Haghverdi et al. (2016), Diffusion pseudotime robustly reconstructs lineage branching.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> sd.tl.pseudotime(adata, root=0)
    >>> int(adata.obs["dpt_pseudotime"].argmin())
    0
    """
    if n_dcs < 1:
        raise ValueError(f"n_dcs={n_dcs!r} must be at least 1")
    data = adata.adata if isinstance(adata, Plan) else adata
    index = root_index(data, root)
    known = Obsm("X_diffmap")
    present = not isinstance(adata, Plan) and known.exists(data)
    n_comps = max(15, n_dcs, data.obsm["X_diffmap"].shape[1] if present else 0)
    warm = present and data.n_obs >= _WARM_START

    def notes(op: ops.Pseudotime, result: ops.PseudotimeResult, args: Any) -> Mapping[Slot, Any]:
        return {Uns("iroot"): index}

    def check(op: ops.Pseudotime, result: ops.PseudotimeResult) -> None:
        if not np.isfinite(result.pseudotime[index]):
            raise ValueError(f"weights={weights!r}: the root, cell {data.obs_names[index]!r}, has the weight 0")
        warn_unconverged(op, result)

    # A start that was found to this tolerance has been rounded to single precision since, which adds as much.
    tol = None if isinstance(adata, Plan) else 2 * SINGLE_TOL if warm else SINGLE_TOL
    step = Step(
        "pseudotime",
        ops.Pseudotime(n_dcs=n_dcs, n_comps=n_comps, tol=tol),
        reads=(Connectivities(neighbors_key), Given(index), known if warm else None, weights_of(adata, weights)),
        writes=(
            Write(Obs("dpt_pseudotime"), lambda op, result: result.pseudotime, np.float32),
            Write(known, lambda op, result: result.eigenvectors, np.float32),
            Write(Uns("diffmap_evals"), lambda op, result: result.eigenvalues, np.float32),
        ),
        message=f"computing Diffusion Pseudotime using n_dcs={n_dcs}",
        notes=notes,
        check=check,
        precise=True,
        compiled=False,
    )
    return apply(adata, step, copy=copy)


dpt = pseudotime


def root_index(adata: AnnData, root: int | str | None) -> int:
    """The index of the root cell given as index, name, or by `uns["iroot"]`."""
    if root is None:
        if "iroot" not in adata.uns:
            raise ValueError(
                "No root cell found. Pass `root=` (an index or a cell name), or set "
                "`adata.uns['iroot'] = np.flatnonzero(adata.obs['cell_type'] == 'Stem')[0]`."
            )
        root = int(adata.uns["iroot"])
    if isinstance(root, str):
        if root not in adata.obs_names:
            raise ValueError(f"root={root!r} is not in `adata.obs_names`")
        return int(adata.obs_names.get_loc(root))
    if not 0 <= int(root) < adata.n_obs:
        raise ValueError(f"root={root!r} is not the index of one of the {adata.n_obs} cells")
    return int(root)
