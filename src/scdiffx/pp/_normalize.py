from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._log import warn
from scdiffx._slots import Obs, Slot, Uns, Var, X
from scdiffx._steps import Plan, Step, Write, apply

if TYPE_CHECKING:
    from anndata import AnnData


@public
def normalize_total(
    adata: AnnData | Plan,
    *,
    target_sum: float | None = None,
    exclude_highly_expressed: bool = False,
    max_fraction: float = 0.05,
    key_added: str | None = None,
    layer: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Scale each cell to the same total count.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with counts, or a plan. A dask array stays one, and is read once for the totals.
    target_sum
        Total of each cell afterwards; by default the median total of the cells that have counts.
    exclude_highly_expressed
        Leave genes that make up more than `max_fraction` of any cell out of the totals.
    max_fraction
        Share of a cell's counts, between 0 and 1.
    key_added
        Column of `adata.obs` for the factor that each cell was divided by.
    layer
        Layer to normalise instead of `X`.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.X` or `adata.layers[layer]` : same kind and dtype (integers become float32)
        The normalised matrix.
    `adata.obs[key_added]` : float (cells,), if `key_added` is given
        Total counts over target.

    Raises
    ------
    ValueError
        If `max_fraction` or `target_sum` is out of range, or a value is negative or not finite.
    KeyError
        If `layer` does not exist.
    TypeError
        If the matrix is in a file, which would have to change.

    References
    ----------
    Weinreb et al. (2017), SPRING: a kinetic interface for visualizing high dimensional single-cell expression data.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> sd.pp.normalize_total(adata, target_sum=1e4)
    >>> bool((abs(adata.X.sum(axis=1) - 1e4) < 1).all())
    True
    """
    if not 0 <= max_fraction <= 1:
        raise ValueError(f"max_fraction={max_fraction!r} must lie between 0 and 1")
    if target_sum is not None and not target_sum > 0:
        raise ValueError(f"target_sum={target_sum!r} must be greater than 0")

    def warn_empty(op: ops.NormalizeTotal, result: ops.NormalizeTotalResult) -> None:
        if (np.asarray(result.factor) == 0).any():
            warn("Some cells have zero counts")

    writes = [Write(X(layer), lambda op, result: result.x)]
    if key_added is not None:
        writes.append(Write(Obs(key_added), lambda op, result: result.factor))
    step = Step(
        "normalize_total",
        ops.NormalizeTotal(
            target_sum=None if target_sum is None else float(target_sum),
            exclude_highly_expressed=exclude_highly_expressed,
            max_fraction=max_fraction,
        ),
        reads=(X(layer, counts=True, streams=True),),
        writes=tuple(writes),
        message="normalizing counts per cell",
        check=warn_empty,
    )
    return apply(adata, step, copy=copy)


@public
def log1p(
    adata: AnnData | Plan, *, base: float | None = None, layer: str | None = None, copy: bool = False
) -> AnnData | None:
    """Replace each value by log(1 + value).

    Parameters
    ----------
    adata
        Annotated data (cells x genes), or a plan. A dask array stays one, and nothing is computed yet.
    base
        Base of the logarithm; natural by default.
    layer
        Layer to transform instead of `X`.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.X` or `adata.layers[layer]` : same kind and dtype (integers become float32)
        The transformed matrix.
    `adata.uns["log1p"]` : dict
        The `base`.

    Raises
    ------
    ValueError
        If `base` is not positive or is 1, or a value is negative or not finite.
    KeyError
        If `layer` does not exist.
    TypeError
        If the matrix is in a file, which would have to change.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> sd.pp.normalize_total(adata)
    >>> sd.pp.log1p(adata)
    >>> adata.uns["log1p"]
    {'base': None}
    """
    if base is not None and (not base > 0 or base == 1):
        raise ValueError(f"base={base!r} must be positive and not 1")
    if not isinstance(adata, Plan) and "log1p" in adata.uns and layer is None:
        warn("adata.X seems to be already log-transformed.")

    def notes(op: ops.Log1p, result: Any, args: Any) -> Mapping[Slot, Any]:
        return {Uns("log1p"): {"base": base}}

    step = Step(
        "log1p",
        ops.Log1p(base=None if base is None else float(base)),
        reads=(X(layer, counts=True, streams=True),),
        writes=(Write(X(layer), lambda op, result: result),),
        message="computing log1p",
        notes=notes,
    )
    return apply(adata, step, copy=copy)


@public
def scale(
    adata: AnnData | Plan,
    *,
    zero_center: bool = True,
    max_value: float | None = None,
    layer: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Scale each gene to unit variance and zero mean.

    Statistics are computed in float64. Centring a sparse matrix makes it dense, with scanpy's warning.

    Parameters
    ----------
    adata
        Annotated data (cells x genes), or a plan.
    zero_center
        Whether to subtract the mean; without it sparse data stay sparse.
    max_value
        Clip to this value after scaling (and to its negative, if centred).
    layer
        Layer to scale instead of `X`.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.X` or `adata.layers[layer]` : dtype of the input
        The scaled matrix, dense if centred.
    `adata.var["mean"]`, `adata.var["std"]` : float64 (genes,)
        Statistics before scaling; constant genes have `std` 1.

    Raises
    ------
    ValueError
        If `max_value` is not positive or values are not finite.
    KeyError
        If `layer` does not exist.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> sd.pp.scale(adata, zero_center=False, max_value=10)
    >>> bool(adata.X.max() <= 10)
    True
    """
    if max_value is not None and not max_value > 0:
        raise ValueError(f"max_value={max_value!r} must be greater than 0")

    def warn_dense(op: ops.Scale, result: ops.ScaleResult) -> None:
        if zero_center and sparse_input:
            warn("zero-centering a sparse array/matrix densifies it.")

    sparse_input = not isinstance(adata, Plan) and _is_sparse(adata.X if layer is None else adata.layers.get(layer))
    step = Step(
        "scale",
        ops.Scale(zero_center=zero_center, max_value=max_value),
        reads=(X(layer),),
        writes=(
            Write(X(layer), lambda op, result: result.x),
            Write(Var("mean"), lambda op, result: result.mean, np.float64),
            Write(Var("std"), lambda op, result: result.std, np.float64),
        ),
        message="scaling",
        check=warn_dense,
        precise=True,
    )
    return apply(adata, step, copy=copy)


def _is_sparse(matrix: Any) -> bool:
    import scipy.sparse as sp

    return sp.issparse(matrix)
