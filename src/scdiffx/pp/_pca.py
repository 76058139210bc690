from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import Obsm, Slot, Uns, Var, Varm, X, preset
from scdiffx._steps import Plan, Step, Write, apply

if TYPE_CHECKING:
    from anndata import AnnData

_SOLVERS = (None, "auto", "arpack", "randomized", "full", "covariance_eigh", "tsqr", "lobpcg")
N_PCS = 50


@public
def pca(
    adata: AnnData | Plan,
    n_comps: int | None = None,
    *,
    layer: str | None = None,
    zero_center: bool = True,
    svd_solver: str | None = None,
    random_state: Any = None,
    mask_var: str | None = "auto",
    key_added: str | None = None,
    copy: bool = False,
    weight_var: str | None = "gene_weight",
    anchored: bool = True,
    rng: Any = None,
) -> AnnData | None:
    """Principal component analysis: coordinates, loadings and explained variance.

    Sparse data stay sparse: the gene covariance is accumulated over centred blocks of cells. A dask array or a matrix
    in a file is read three times, for at most 4,096 genes. On a plan, PCA is a projection that starts at the principal
    components and can be learned; with ``anchored=False`` the components are recomputed from the plan's current values
    and differentiated through.

    Parameters
    ----------
    adata
        Annotated data (cells x genes), or a plan.
    n_comps
        Number of components; default 50, or one less than the smaller dimension.
    layer
        Layer to use instead of `X`.
    zero_center
        Whether to centre the genes.
    svd_solver
        Accepted for compatibility: every one of scanpy's solvers means the same exact components here.
    random_state, rng
        Accepted for compatibility; the result does not depend on a seed.
    mask_var
        Boolean column of `adata.var` that selects genes; None for all. By default "highly_variable" where it exists
        and no gene weights are used.
    key_added
        Key of `obsm`, `varm` and `uns` instead of "X_pca", "PCs" and "pca".
    copy
        Return a copy instead of writing to `adata`.
    weight_var
        Column of `adata.var` with gene weights, such as ``highly_variable_genes(soft=True)`` writes; used if present.
    anchored
        On a plan: whether the components stay where they are at the start.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["X_pca" | key_added]` : float32 (cells, n_comps)
        Coordinates.
    `adata.varm["PCs" | key_added]` : float32, or float64 with a mask, (genes, n_comps)
        Loadings; 0 for genes that were not used.
    `adata.uns["pca" | key_added]` : dict
        `params`, `variance` and `variance_ratio` float32 (n_comps,).

    Raises
    ------
    ValueError
        If `n_comps` does not fit the data, `svd_solver` is unknown, or values are not finite.
    KeyError
        If `layer` or `mask_var` does not exist.

    References
    ----------
    Pearson (1901), On lines and planes of closest fit to systems of points in space.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> sd.pp.pca(adata, n_comps=10)
    >>> adata.obsm["X_pca"].shape, adata.varm["PCs"].shape
    ((700, 10), (765, 10))
    """
    as_seed(one_rng(rng, random_state))
    if svd_solver not in _SOLVERS:
        raise ValueError(f"svd_solver={svd_solver!r} is unknown. Available: {list(_SOLVERS)}")
    has = adata.has if isinstance(adata, Plan) else lambda slot: slot.exists(adata)
    data = adata.adata if isinstance(adata, Plan) else adata
    weight = Var(weight_var) if weight_var is not None and has(Var(weight_var)) else None
    if mask_var == "auto":
        mask_var = "highly_variable" if weight is None and has(Var("highly_variable")) else None
    mask = None if mask_var is None else Var(mask_var)
    selected = _n_selected(adata, mask)
    if n_comps is None:
        smallest = min(data.n_obs, selected)
        n_comps = smallest - 1 if smallest <= N_PCS else N_PCS
    if not 1 <= n_comps <= min(data.n_obs, selected):
        raise ValueError(f"n_comps={n_comps} must lie between 1 and {min(data.n_obs, selected)}, the smaller dimension")
    keys = (key_added,) * 3 if key_added is not None else default_keys()
    params = {
        "zero_center": zero_center,
        "use_highly_variable": mask_var == "highly_variable",
        "mask_var": mask_var,
        **({} if layer is None else {"layer": layer}),
        **({} if weight is None else {"weight_var": weight_var}),
    }

    def notes(op: ops.PCA, result: ops.PCAResult, args: Any) -> Mapping[Slot, Any]:
        variance, ratio = (np.asarray(v, np.float32) for v in (result.variance, result.variance_ratio))
        return {Uns(keys[2]): {"params": params, "variance": variance, "variance_ratio": ratio}}

    step = Step(
        "pca",
        ops.PCA(n_comps=n_comps, zero_center=zero_center, anchored=anchored and isinstance(adata, Plan)),
        reads=(X(layer, streams=True), weight, mask),
        writes=(
            Write(Obsm(keys[0]), lambda op, result: result.scores, np.float32),
            Write(Varm(keys[1]), lambda op, result: result.components, np.float32 if mask is None else np.float64),
        ),
        message=f"computing PCA\n    with n_comps={n_comps}",
        notes=notes,
    )
    return apply(adata, step, copy=copy)


def default_keys() -> tuple[str, str, str]:
    """The keys of obsm, varm and uns that the active scanpy preset prescribes."""
    return ("pca", "pca", "pca") if preset() == "ScanpyV2Preview" else ("X_pca", "PCs", "pca")


def _n_selected(adata: AnnData | Plan, mask: Var | None) -> int:
    """How many genes the mask leaves; an upper bound where a step of the plan has yet to decide."""
    data = adata.adata if isinstance(adata, Plan) else adata
    if mask is None or (isinstance(adata, Plan) and adata.writes(mask)):
        return int(data.n_vars)
    chosen = int(jnp.sum(mask.read(data) > 0))
    if chosen == 0:
        raise ValueError(f"`adata.var[{mask.key!r}]` selects no gene")
    return chosen
