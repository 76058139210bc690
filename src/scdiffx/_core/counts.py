"""Cells x genes matrices as blocks of rows: sparse values stay sparse, and a block is densified only while it is used.

Where the non-zeros are is structure and fixed; their values are differentiable. JAX's own sparse products are an order
of magnitude slower than a dense product of a small block, hence blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float, Int

__all__ = [
    "Counts",
    "Matrix",
    "column_moments",
    "column_sums",
    "fold_rows",
    "gram",
    "group_sums",
    "map_rows",
    "map_values",
    "matmul",
    "n_rows",
    "row_sums",
    "rows_to_values",
    "scale_columns",
    "scale_rows",
    "take_columns",
    "transposed_product",
    "values_at",
]

BLOCK_ROWS = 1024
_ALIGNMENT = 64
C = TypeVar("C")


@partial(jax.tree_util.register_dataclass, data_fields=["data", "position"], meta_fields=["shape", "block_rows"])
class Counts:
    """A sparse cells x genes matrix in row blocks of equal, padded length.

    ``position`` is the place of a value in its flattened dense block; pads lie past its end and are dropped.

    Examples
    --------
    >>> import scipy.sparse as sp
    >>> import scdiffx as sd
    >>> counts = sd.ops.Counts.from_scipy(sp.random(60, 20, 0.2, format="csr", dtype="float32"))
    >>> counts.shape, sd.ops.Log1p()(counts).to_scipy().shape
    ((60, 20), (60, 20))
    """

    def __init__(
        self,
        data: Float[Array, "blocks nnz"],
        position: Int[Array, "blocks nnz"],
        shape: tuple[int, int],
        block_rows: int,
    ) -> None:
        self.data = data
        self.position = position
        self.shape = shape
        self.block_rows = block_rows

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    @property
    def row(self) -> Int[Array, "blocks nnz"]:
        """Row within the block; `block_rows` for pads."""
        return self.position // self.shape[1]

    @property
    def column(self) -> Int[Array, "blocks nnz"]:
        return self.position % self.shape[1]

    def with_data(self, data: Float[Array, "blocks nnz"]) -> Counts:
        return Counts(data, self.position, self.shape, self.block_rows)

    @classmethod
    def from_scipy(cls, matrix: Any, dtype: Any = None, longest: int | None = None) -> Counts:
        """A scipy sparse matrix or array; block lengths are rounded up so that similar data share compiled code.

        `longest` sets the length of all blocks instead.
        """
        csr = sp.csr_matrix(matrix)
        n, genes = csr.shape
        rows = min(BLOCK_ROWS, max(n, 1))
        starts = csr.indptr[np.minimum(np.arange(0, n + rows, rows), n)]
        longest = _bucket(int(np.diff(starts).max(initial=1))) if longest is None else longest
        blocks = len(starts) - 1
        data = _aligned((blocks, longest), np.dtype(dtype or csr.dtype), 0)
        position = _aligned((blocks, longest), np.dtype(np.int32), rows * genes)
        degree = np.diff(csr.indptr)
        offset = ((np.arange(n) % rows) * genes).astype(np.int32)
        for b in range(blocks):
            lo, hi = starts[b], starts[b + 1]
            data[b, : hi - lo] = csr.data[lo:hi]
            cells = slice(b * rows, (b + 1) * rows)
            position[b, : hi - lo] = np.repeat(offset[cells], degree[cells]) + csr.indices[lo:hi]
        # Nobody else holds these arrays, so the device may take them as they are.
        data_there, position_there = (jax.device_put(a, may_alias=True) for a in (data, position))
        return cls(data_there, position_there, (n, genes), rows)

    def host_values(self, indptr: np.ndarray) -> np.ndarray:
        """The values in CSR order, given the row pointers of the matrix this was made from."""
        starts = indptr[np.minimum(np.arange(0, self.shape[0] + self.block_rows, self.block_rows), self.shape[0])]
        data = np.asarray(self.data)
        return np.concatenate([data[b, : starts[b + 1] - starts[b]] for b in range(len(data))])

    def to_scipy(self) -> sp.csr_matrix:
        """The matrix on the host."""
        data, position = np.asarray(self.data), np.asarray(self.position)
        rows, genes = self.block_rows, self.shape[1]
        keep = position < rows * genes
        row = position // genes + rows * np.arange(len(data))[:, None]
        return sp.csr_matrix((data[keep], (row[keep], position[keep] % genes)), shape=self.shape)


Matrix = Counts | Array


def _aligned(shape: tuple[int, int], dtype: np.dtype, fill: int) -> np.ndarray:
    """A host array that starts where JAX on a CPU wants it to, which saves a copy."""
    size = shape[0] * shape[1] * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    array = raw[start : start + size].view(dtype).reshape(shape)
    array.fill(fill)
    return array


def _bucket(length: int) -> int:
    step = max(1, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def n_rows(x: Matrix) -> int:
    return int(x.shape[0])


def _dense_block(x: Counts, data: Array, position: Array) -> Array:
    rows, genes = x.block_rows, x.shape[1]
    flat = jnp.zeros(rows * genes, data.dtype).at[position].set(data, mode="drop", unique_indices=True)
    return flat.reshape(rows, genes)


def _row_blocks(x: Array) -> tuple[Array, int]:
    """A dense matrix as (blocks, rows, genes), padded with zero rows."""
    n, genes = x.shape
    rows = min(BLOCK_ROWS, max(n, 1))
    blocks = max(1, -(-n // rows))
    return jnp.pad(x, ((0, blocks * rows - n), (0, 0))).reshape(blocks, rows, genes), rows


def _masks(n: int, blocks: int, rows: int, dtype: Any) -> Array:
    return (jnp.arange(blocks * rows) < n).astype(dtype).reshape(blocks, rows)


def fold_rows(x: Matrix, step: Callable[[C, Array, Array], C], init: C) -> C:
    """Reduce over dense row blocks: ``carry = step(carry, block, mask)``, where `mask` is 0 on pad rows.

    Blocks are densified anew on the way back, so differentiation keeps no dense matrix either.
    """
    if isinstance(x, Counts):
        parts: Any = (x.data, x.position)
        rows = x.block_rows

        def expand(part: Any) -> Array:
            return _dense_block(x, *part)
    else:
        parts, rows = _row_blocks(x)

        def expand(part: Any) -> Array:
            return part

    masks = _masks(n_rows(x), jax.tree.leaves(parts)[0].shape[0], rows, x.dtype)

    @jax.checkpoint
    def body(carry: C, part: Any) -> tuple[C, None]:
        return step(carry, expand(part[0]), part[1]), None

    return jax.lax.scan(body, init, (parts, masks))[0]


def map_rows(x: Matrix, f: Callable[[Array], Array]) -> Array:
    """Apply `f` to dense row blocks (rows, genes) -> (rows, ...) and stack the results."""
    if isinstance(x, Counts):
        body = jax.checkpoint(lambda part: f(_dense_block(x, *part)))
        out = jax.lax.map(body, (x.data, x.position))
    else:
        out = jax.lax.map(jax.checkpoint(f), _row_blocks(x)[0])
    return out.reshape(-1, *out.shape[2:])[: n_rows(x)]


def map_values(x: Matrix, f: Callable[[Array], Array]) -> Matrix:
    """Apply an elementwise `f` with f(0) = 0."""
    return x.with_data(f(x.data)) if isinstance(x, Counts) else f(x)


def _crowded(x: Counts) -> bool:
    """Whether so many places hold values that sums over dense blocks beat a scatter (about 8 times, per value)."""
    return x.data.shape[1] * 8 >= x.block_rows * x.shape[1]


def row_sums(x: Matrix) -> Float[Array, " cells"]:
    if not isinstance(x, Counts):
        return x.sum(1)
    if _crowded(x):
        return map_rows(x, lambda block: block.sum(1))
    sums = jax.vmap(lambda d, r: jnp.zeros(x.block_rows, d.dtype).at[r].add(d, mode="drop", indices_are_sorted=True))
    return sums(x.data, x.row).reshape(-1)[: n_rows(x)]


def rows_to_values(x: Counts, v: Array, pad: int = 0) -> Array:
    """What `v` (cells,) holds for the cell of each stored value (blocks, nnz); `pad` at pads."""
    blocks, rows = x.data.shape[0], x.block_rows
    padded = jnp.pad(v, (0, blocks * rows - n_rows(x))).reshape(blocks, rows)
    padded = jnp.pad(padded, ((0, 0), (0, 1)), constant_values=pad)  # the row of pads
    return jax.vmap(lambda f, r: f.at[r].get(mode="promise_in_bounds", indices_are_sorted=True))(padded, x.row)


def group_sums(x: Matrix, group: Int[Array, " cells"], n_groups: int) -> Float[Array, "groups genes"]:
    """Sum the cells of each group, numbered from 0."""
    if not isinstance(x, Counts):
        return jax.ops.segment_sum(x, group, n_groups)
    at = rows_to_values(x, group, pad=n_groups)
    return jnp.zeros((n_groups, x.shape[1]), x.dtype).at[at, x.column].add(x.data, mode="drop")


def scale_rows(x: Matrix, factor: Float[Array, " cells"]) -> Matrix:
    if not isinstance(x, Counts):
        return x * factor[:, None]
    return x.with_data(x.data * rows_to_values(x, factor))


def scale_columns(x: Matrix, factor: Float[Array, " genes"]) -> Matrix:
    if not isinstance(x, Counts):
        return x * factor
    return x.with_data(x.data * factor[x.column])


def take_columns(x: Matrix, columns: Int[Array, " selected"]) -> Matrix:
    """The genes at `columns`, in that order; what they are is structure."""
    if not isinstance(x, Counts):
        return x[:, columns]
    selected = columns.shape[0]
    place = jnp.full(x.shape[1] + 1, -1, jnp.int32).at[columns].set(jnp.arange(selected, dtype=jnp.int32))
    new = place[x.column]
    past_the_end = x.block_rows * selected
    kept = (new >= 0) & (x.row < x.block_rows)
    position = jnp.where(kept, x.row * selected + new, past_the_end)
    # Dropped values become zeros, so that sums over the stored values see the selected genes alone.
    data = jnp.where(kept, x.data, 0)
    return Counts(data, position, (x.shape[0], selected), x.block_rows)


def column_sums(x: Matrix, f: Callable[[Array], Array] = lambda v: v) -> Float[Array, " genes"]:
    """Sum f(x) over the cells, for an elementwise f with f(0) = 0."""
    if not isinstance(x, Counts):
        return f(x).sum(0)
    # Block by block: a partial sum over a thousand cells keeps float32 exact enough before blocks are added.
    if _crowded(x):
        zero = jnp.zeros(x.shape[1], x.dtype)
        return fold_rows(x.with_data(f(x.data)), lambda total, block, _: total + block.sum(0), zero)
    sums = jax.vmap(lambda d, c: jnp.zeros(x.shape[1], d.dtype).at[c].add(d))
    return sums(f(x.data), x.column).sum(0)


def column_moments(x: Matrix) -> tuple[Float[Array, " genes"], Float[Array, " genes"]]:
    """Mean and unbiased variance of each gene, by the two-pass formula."""
    n = n_rows(x)
    mean = column_sums(x) / n
    if isinstance(x, Counts):
        centred = jnp.where(x.row < x.block_rows, x.data - mean[x.column], 0)
        non_zero = column_sums(x.with_data(jnp.where(x.row < x.block_rows, jnp.ones_like(x.data), 0)))
        squares = column_sums(x.with_data(centred**2)) + (n - non_zero) * mean**2
    else:
        squares = ((x - mean) ** 2).sum(0)
    return mean, squares / max(n - 1, 1)


def matmul(x: Matrix, v: Float[Array, "genes dims"]) -> Float[Array, "cells dims"]:
    """x @ v."""
    return map_rows(x, lambda block: block @ v)


def transposed_product(x: Matrix, v: Float[Array, "cells k"]) -> Float[Array, "genes k"]:
    """x.T @ v, block by block."""
    like = jax.ShapeDtypeStruct((x.shape[1], v.shape[1]), x.dtype)
    return jax.linear_transpose(lambda w: matmul(x, w), like)(v.astype(x.dtype))[0]


def values_at(x: Counts, dense: Float[Array, "cells genes"]) -> Float[Array, "blocks nnz"]:
    """What a dense matrix of the same shape holds where `x` has its values; 0 at pads."""
    blocks, rows = x.data.shape[0], x.block_rows
    flat = jnp.pad(dense, ((0, blocks * rows - n_rows(x)), (0, 0))).reshape(blocks, -1)
    return jax.vmap(lambda d, at: d.at[at].get(mode="fill", fill_value=0))(flat, x.position)


def gram(x: Matrix, mean: Float[Array, " genes"]) -> Float[Array, "genes genes"]:
    """(x - mean)^T (x - mean), accumulated over centred blocks with compensated summation."""
    genes = x.shape[1]
    edges = np.linspace(0, genes, 5 if genes >= 256 else 2).astype(int)

    def step(carry: tuple[list[Array], list[Array]], block: Array, mask: Array) -> tuple[list[Array], list[Array]]:
        centred = (block - mean) * mask[:, None]
        sums, lost = [], []
        for total, low, a, b in zip(*carry, edges[:-1], edges[1:], strict=True):
            # Only panels on and above the diagonal: the rest follows by symmetry, at 5/8 of the work.
            term = centred[:, a:b].T @ centred[:, a:] - low
            new = total + term
            lost.append((new - total) - term)
            sums.append(new)
        return sums, lost

    zeros = [jnp.zeros((b - a, genes - a), x.dtype) for a, b in itertools.pairwise(edges)]
    panels, _ = fold_rows(x, step, (zeros, zeros))
    upper = jnp.zeros((genes, genes), x.dtype)
    for panel, a, b in zip(panels, edges[:-1], edges[1:], strict=True):
        upper = upper.at[a:b, a:].set(panel)
    upper = jnp.triu(upper)
    return upper + jnp.triu(upper, 1).T
