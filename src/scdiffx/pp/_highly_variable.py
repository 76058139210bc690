from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import scipy.sparse as sp

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.counts import Streamed
from scdiffx._log import warn
from scdiffx._slots import Obs, Slot, Uns, Var, X, available, check_counts, matrix_of, write_all
from scdiffx._steps import Plan, Step, Write, apply

if TYPE_CHECKING:
    from anndata import AnnData

FLAVORS = ("seurat", "cell_ranger", "seurat_v3", "seurat_v3_paper")


@public
def highly_variable_genes(
    adata: AnnData | Plan,
    *,
    layer: str | None = None,
    n_top_genes: int | None = None,
    min_disp: float = 0.5,
    max_disp: float = np.inf,
    min_mean: float = 0.0125,
    max_mean: float = 3.0,
    span: float = 0.3,
    n_bins: int = 20,
    flavor: str = "seurat",
    subset: bool = False,
    batch_key: str | None = None,
    soft: bool = False,
    copy: bool = False,
) -> AnnData | None:
    """Find the genes that vary more than their mean explains.

    The same genes and columns as scanpy. With ``soft=True`` every gene also gets a weight in (0, 1), differentiable in
    the expression values and learnable, over 1/2 exactly for the selected genes; `pp.pca` then uses the weights.

    Parameters
    ----------
    adata
        Annotated data (cells x genes), or a plan: log1p values for "seurat" and "cell_ranger", counts for "seurat_v3".
        A dask array or a matrix in a file is read once, or twice for "seurat_v3" (not with ``soft=True``).
    layer
        Layer to use instead of `X`.
    n_top_genes
        Number of genes to keep; by default the cut-offs decide ("seurat_v3": 2000).
    min_disp, max_disp, min_mean, max_mean
        Bounds on the normalised dispersion and the mean; used without `n_top_genes`, by "seurat" and "cell_ranger".
    span
        Share of the genes in each local fit of "seurat_v3".
    n_bins
        Number of bins of the mean, within which "seurat" compares dispersions.
    flavor
        "seurat", "cell_ranger", "seurat_v3" or "seurat_v3_paper".
    subset
        Drop the other genes; not on a plan.
    batch_key
        Column of `adata.obs`: select in each batch and merge.
    soft
        Also write weights.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.var["highly_variable"]` : bool (genes,)
        Which genes are highly variable.
    `adata.var["means"]` : float64 (genes,)
        Mean expression.
    `adata.var["dispersions"]` : float64 (genes,), with "seurat"
        Logarithm of variance over mean.
    `adata.var["dispersions_norm"]` : float32 (genes,), with "seurat"
        The same, relative to genes of similar mean.
    `adata.var["highly_variable_rank"]` : float32 (genes,), with "seurat_v3"
        Rank by normalised variance, from 0; NaN for genes that are not highly variable.
    `adata.var["variances", "variances_norm"]` : float64 (genes,), with "seurat_v3"
        Variance of the counts, and that of counts standardised by the variance expected at their mean.
    `adata.var["highly_variable_nbatches"]` : int64 (genes,), with `batch_key`
        In how many batches the gene is highly variable.
    `adata.var["highly_variable_intersection"]` : bool (genes,), with `batch_key`
        Whether it is in all of them.
    `adata.var["gene_weight"]` : float32 (genes,), with ``soft=True``
        How highly variable, in [0, 1].
    `adata.uns["hvg"]` : dict
        The `flavor`.

    Raises
    ------
    ValueError
        If a parameter is out of range or a value is not finite (or negative, for counts).
    KeyError
        If `layer` or `batch_key` does not exist.

    References
    ----------
    Satija et al. (2015), Spatial reconstruction of single-cell gene expression data; Zheng et al. (2017); Stuart et
    al. (2019), Comprehensive integration of single-cell data.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> sd.pp.highly_variable_genes(adata, n_top_genes=100, soft=True)
    >>> int(adata.var["highly_variable"].sum()), int((adata.var["gene_weight"] > 0.5).sum())
    (100, 100)
    """
    if flavor not in FLAVORS:
        raise ValueError(f"flavor={flavor!r} is unknown. Available: {list(FLAVORS)}")
    if subset and isinstance(adata, Plan):
        raise ValueError("subset=True cannot be used on a plan, where the genes are fixed")
    data = adata.adata if isinstance(adata, Plan) else adata
    if batch_key is not None and batch_key not in data.obs:
        raise KeyError(f"batch_key={batch_key!r} is not in `adata.obs`. Available: {available(data.obs)}")
    op = ops.HighlyVariable(
        flavor=flavor,
        n_top_genes=n_top_genes,
        cutoffs=(min_disp, max_disp, min_mean, max_mean),
        n_bins=n_bins,
        span=span,
    )
    batch = None if batch_key is None else np.asarray(data.obs[batch_key].astype("category").cat.codes)
    log_base = data.uns.get("log1p", {}).get("base") if not isinstance(adata, Plan) else None
    names = np.asarray(data.var_names)

    def columns(matrix: Any) -> dict[Slot, Any]:
        table = op.table(matrix, batch, log_base=log_base, gene_names=names)
        return {**{Var(key): value for key, value in table.items()}, Uns("hvg"): {"flavor": flavor}}

    if not isinstance(adata, Plan) and not soft:
        values = columns(_checked(adata, layer, flavor))
        target: Any = adata.copy() if copy else adata
        write_all(target, values)
    else:
        if log_base is not None and soft:
            raise ValueError(f"soft=True needs the natural logarithm, but uns['log1p']['base'] is {log_base!r}")
        if not isinstance(adata, Plan):
            _checked(adata, layer, flavor)
        step = _step(op, layer, batch_key, flavor, soft, columns)
        copied = apply(adata, step, copy=copy)
        target = copied if copy else adata
    if subset:
        target._inplace_subset_var(target.var["highly_variable"].to_numpy())
    return target if copy else None


def _step(
    op: ops.HighlyVariable, layer: str | None, batch_key: str | None, flavor: str, soft: bool, columns: Any
) -> Step:
    def notes(op: Any, result: Any, args: tuple[Any, ...]) -> Mapping[Slot, Any]:
        return columns(args[0] if not isinstance(args[0], jax.Array) else np.asarray(args[0]))

    if soft:
        write = Write(Var("gene_weight"), lambda op, result: result.weight, np.float32)
    else:
        write = Write(Var("highly_variable"), lambda op, result: result.weight > 0.5)
    return Step(
        "highly_variable_genes",
        op,
        reads=(
            X(layer, counts=flavor.startswith("seurat_v3")),
            None if batch_key is None else Obs(batch_key, codes=True),
        ),
        writes=(write,),
        message="extracting highly variable genes",
        notes=notes,
    )


def _checked(adata: AnnData, layer: str | None, flavor: str) -> Any:
    slot = X(layer, counts=True)
    matrix: Any = slot.streamed(adata) if slot.is_lazy(adata) else matrix_of(adata, layer)
    if adata.n_obs < 2:
        raise ValueError("`adata` has 1 cell; variances need at least two cells")
    if not isinstance(matrix, Streamed):
        check_counts(matrix, adata.obs_names, adata.var_names)
    if flavor.startswith("seurat_v3"):
        _expect_counts(next(matrix.stored())[1] if isinstance(matrix, Streamed) else matrix, flavor)
    return matrix


def _expect_counts(matrix: Any, flavor: str) -> None:
    values = matrix.data if sp.issparse(matrix) else matrix
    if (values[:: max(1, values.shape[0] // 100_000)] % 1 != 0).any():
        warn(f"`flavor={flavor!r}` expects raw count data, but non-integers were found.")
