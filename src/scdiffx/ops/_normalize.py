"""Depth normalisation, logarithm and gene scaling, as scanpy defines them."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scdiffx._core import counts as C
from scdiffx._core.fields import buffer, learnable, operator, replace, static

__all__ = ["Log1p", "NormalizeTotal", "NormalizeTotalResult", "Scale", "ScaleResult"]


class NormalizeTotalResult(NamedTuple):
    """`x`: the normalised matrix. `factor`: what each cell was divided by, its total over the target (cells,)."""

    x: C.Rows
    factor: Float[Array, " cells"]


@operator
class NormalizeTotal:
    """Divide each cell by its total and multiply by a common target.

    `target_sum` None becomes the median total of the non-empty cells at `init`. With `exclude_highly_expressed`, genes
    that make up more than `max_fraction` of any one cell do not count towards the totals; which genes these are is
    discrete structure. Cells without counts stay at 0.

    Examples
    --------
    >>> import jax
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> x = np.random.default_rng(0).poisson(2.0, (60, 20)).astype(np.float32)
    >>> op = sd.ops.NormalizeTotal().init(x)
    >>> jax.grad(lambda x: (op(x).x ** 2).sum())(x).shape
    (60, 20)
    """

    by_cell: ClassVar[bool] = True
    target_sum: float | Array | None = learnable(default=None, constraint="positive")
    counted: Array | None = buffer(default=None)
    exclude_highly_expressed: bool = static(default=False)
    max_fraction: float = static(default=0.05)

    def init(self, x: C.Rows, key: Array | None = None) -> NormalizeTotal:
        op = self
        if self.exclude_highly_expressed:
            op = replace(op, counted=_never_dominant(x, self.max_fraction))
        if self.target_sum is None:
            size = np.asarray(op._size(x))
            median = np.median(size[size > 0]) if (size > 0).any() else 1.0
            op = replace(op, target_sum=jnp.asarray(median, x.dtype))
        return op

    def _size(self, x: C.Rows) -> Array:
        return C.row_sums(x if self.counted is None else C.scale_columns(x, jnp.asarray(self.counted, x.dtype)))

    def __call__(self, x: C.Rows) -> NormalizeTotalResult:
        op = self if self.target_sum is not None else self.init(x)
        size = op._size(x)
        factor = size / jnp.asarray(op.target_sum, x.dtype)
        inverse = 1 / jnp.where(factor > 0, factor, 1)
        return NormalizeTotalResult(C.scale_rows(x, inverse.astype(x.dtype)), factor)


def _never_dominant(x: C.Rows, max_fraction: float) -> Array:
    limit = C.row_sums(x) * max_fraction
    over = C.scale_rows(x, 1 / jnp.where(limit > 0, limit, jnp.inf))
    return C.column_sums(over, lambda v: (v > 1).astype(x.dtype)) == 0


@operator
class Log1p:
    """log(1 + x), natural or to another `base`.

    Examples
    --------
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> x = np.random.default_rng(0).poisson(2.0, (60, 20)).astype(np.float32)
    >>> bool(np.allclose(sd.ops.Log1p()(x), np.log1p(x), rtol=1e-5))
    True
    """

    by_cell: ClassVar[bool] = True
    base: float | None = static(default=None)

    def __call__(self, x: C.Rows) -> C.Rows:
        divisor = 1.0 if self.base is None else math.log(self.base)
        return C.map_values(x, lambda v: jnp.log1p(v) / divisor)


class ScaleResult(NamedTuple):
    """`x`: the scaled matrix. `mean`, `std`: the statistics used (genes,); a constant gene has std 1."""

    x: C.Matrix
    mean: Float[Array, " genes"]
    std: Float[Array, " genes"]


@operator
class Scale:
    """Centre each gene and divide by its standard deviation (n - 1); then clip at `max_value`.

    The statistics are estimated once, at `init`, so that a cell's values never depend on which cells come with it.

    Examples
    --------
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> x = np.random.default_rng(0).poisson(2.0, (60, 20)).astype(np.float32)
    >>> op = sd.ops.Scale(max_value=3.0).init(x)
    >>> bool(abs(op(x).x).max() <= 3)
    True
    """

    by_cell: ClassVar[bool] = True
    mean: Array | None = buffer(default=None)
    std: Array | None = buffer(default=None)
    zero_center: bool = static(default=True)
    max_value: float | None = static(default=None)

    def init(self, x: C.Matrix, key: Array | None = None) -> Scale:
        mean, variance = jax.jit(C.column_moments)(x)
        std = jnp.sqrt(variance)
        # A spread this small beside the mean is the rounding error of a constant gene.
        constant = std <= 8 * jnp.finfo(std.dtype).eps * jnp.abs(mean)
        return replace(self, mean=mean, std=jnp.where(constant, 1, std))

    def __call__(self, x: C.Matrix) -> ScaleResult:
        if self.mean is None or self.std is None:
            raise ValueError("Scale needs its statistics: call `op = op.init(x)` first")
        mean, std = jnp.asarray(self.mean, x.dtype), jnp.asarray(self.std, x.dtype)
        if not self.zero_center:
            scaled: Any = C.scale_columns(x, 1 / std)
            if self.max_value is not None:
                limit = self.max_value
                scaled = C.map_values(scaled, lambda v: jnp.minimum(v, limit))
            return ScaleResult(scaled, mean, std)
        dense = C.map_rows(x, lambda block: (block - mean) / std)
        if self.max_value is not None:
            dense = jnp.clip(dense, -self.max_value, self.max_value)
        return ScaleResult(dense, mean, std)
