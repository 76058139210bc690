"""Cells x genes matrices as blocks of rows: sparse values stay sparse, and a block is densified only while it is used.

Where the non-zeros are is structure and fixed; their values are differentiable. JAX's own sparse products are an order
of magnitude slower than a dense product of a small block, hence blocks. Functions of `Rows` also take a matrix that is
streamed from elsewhere: its pieces go through what a whole matrix in memory goes through.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core.devices import in_parts, n_parts, padded
from scdiffx._core.packed import BLOCK_ROWS, Counts, Matrix
from scdiffx._core.streamed import Streamed

__all__ = [
    "BLOCK_ROWS",
    "Counts",
    "Matrix",
    "Rows",
    "Streamed",
    "column_moments",
    "column_sums",
    "dense",
    "detections",
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

Rows = Matrix | Streamed
C = TypeVar("C")
P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", Matrix, Rows)


def _one_program(*static: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Runs a function of a matrix as one compiled program where it is called outside of any.

    Step by step, its loops are closures that JAX compiles anew at every call. What is streamed goes through piece by
    piece, and each piece comes back here.
    """

    def wrap(f: Callable[P, T]) -> Callable[P, T]:
        compiled: Callable[..., Any] = jax.jit(f, static_argnames=static, inline=True)

        @functools.wraps(f)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return f(*args, **kwargs) if isinstance(args[0], Streamed) else compiled(*args, **kwargs)

        return call

    return wrap


def n_rows(x: Rows) -> int:
    return int(x.shape[0])


def _dense_block(x: Counts, data: Array, position: Array) -> Array:
    rows, genes = x.block_rows, x.shape[1]
    flat = jnp.zeros(rows * genes, data.dtype).at[position].set(data, mode="drop", unique_indices=True)
    return flat.reshape(rows, genes)


def _row_blocks(x: Array, parts: int) -> tuple[Array, int]:
    """A dense matrix as (blocks, rows, genes), padded with zero rows; the number of blocks is a multiple of `parts`."""
    n, genes = x.shape
    rows = min(BLOCK_ROWS, max(-(-n // parts), 1))
    blocks = max(1, -(-n // (rows * parts))) * parts
    return jnp.pad(x, ((0, blocks * rows - n), (0, 0))).reshape(blocks, rows, genes), rows


def _masks(n: Any, blocks: int, rows: int, dtype: Any) -> Array:
    return (jnp.arange(blocks * rows) < n).astype(dtype).reshape(blocks, rows)


def _blocks(x: Matrix, *, shared: bool) -> tuple[Any, int, Callable[[Any], Array]]:
    """Row blocks, as many for each device if they are shared; the rows of one; and what makes a dense block of it."""
    if not isinstance(x, Counts):
        blocks, rows = _row_blocks(x, n_parts() if shared else 1)
        return blocks, rows, lambda block: block
    parts: Any = (x.data, x.position)
    if shared:
        parts = padded(x.data), padded(x.position, fill=x.block_rows * x.shape[1])
    return parts, x.block_rows, lambda part: _dense_block(x, *part)


def fold_rows(x: Rows, step: Callable[[C, Array, Array], C], init: C, *, adds: bool = False) -> C:
    """Reduce over dense row blocks: ``carry = step(carry, block, mask)``, where `mask` is 0 on pad rows.

    Blocks are densified anew on the way back, so differentiation keeps no dense matrix either. With `adds` the carry is
    a sum of what each block gives: several devices then take some of the blocks each.
    """
    if isinstance(x, Streamed):
        return x.fold(lambda carry, piece, n: _fold(piece, step, carry, n, adds), init)
    return _fold(x, step, init, n_rows(x), adds)


def _fold(x: Matrix, step: Callable[[C, Array, Array], C], init: C, n: Any, adds: bool) -> C:
    parts, rows, expand = _blocks(x, shared=adds)
    masks = _masks(n, jax.tree.leaves(parts)[0].shape[0], rows, x.dtype)

    @jax.checkpoint
    def body(carry: C, part: Any) -> tuple[C, None]:
        return step(carry, expand(part[0]), part[1]), None

    if not adds or n_parts() == 1:
        return jax.lax.scan(body, init, (parts, masks))[0]
    zero = jax.tree.map(jnp.zeros_like, init)
    sums = in_parts(lambda part: jax.lax.scan(body, zero, part)[0], (parts, masks))
    return jax.tree.map(lambda start, each: start + each.sum(0), init, sums)


def map_rows(x: Rows, f: Callable[[Array], Array]) -> Array:
    """Apply `f` to dense row blocks (rows, genes) -> (rows, ...) and stack the results."""
    if isinstance(x, Streamed):
        return x.by_rows(lambda piece: map_rows(piece, f))
    parts, _, expand = _blocks(x, shared=True)
    out = _in_turn(lambda part: f(expand(part)), parts)
    return out.reshape(-1, *out.shape[2:])[: n_rows(x)]


def _in_turn(f: Callable[[Any], T], parts: Any) -> T:
    """What `f` gives for each block, one after the other on each device; nothing is kept for the way back."""
    body = jax.checkpoint(f)
    if n_parts() == 1:
        return jax.lax.map(body, parts)
    out = in_parts(lambda part: jax.lax.map(body, part), parts)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)


def _of_stored(x: Counts, f: Callable[..., T], *by_block: Array) -> T:
    """``f(data, position, *by_block)`` of the stored values of each block: what it makes of them stays in the cache."""
    stored, _, _ = _blocks(x, shared=True)
    found = _in_turn(lambda part: f(*part), (*stored, *map(padded, by_block)))
    return jax.tree.map(lambda a: a[: x.data.shape[0]], found)


@_one_program()
def dense(x: Matrix) -> Float[Array, "cells genes"]:
    """All values, for matrices that are small."""
    return map_rows(x, lambda block: block) if isinstance(x, Counts) else x


def map_values(x: R, f: Callable[[Array], Array]) -> R:
    """Apply an elementwise `f` with f(0) = 0."""
    if isinstance(x, Streamed):
        return x.changed(lambda piece: map_values(piece, f))
    return x.with_data(f(x.data)) if isinstance(x, Counts) else f(x)


def _crowded(x: Counts) -> bool:
    """Whether so many places hold values that sums over dense blocks beat a scatter (about 8 times, per value)."""
    return x.data.shape[1] * 8 >= x.block_rows * x.shape[1]


@_one_program()
def row_sums(x: Rows) -> Float[Array, " cells"]:
    if isinstance(x, Streamed):
        x.totals = x.by_rows(row_sums) if x.totals is None else x.totals
        return x.totals
    if not isinstance(x, Counts):
        return x.sum(1)
    if _crowded(x):
        return map_rows(x, lambda block: block.sum(1))
    rows, genes = x.block_rows, x.shape[1]

    def of_block(data: Array, position: Array) -> Array:
        at = jnp.zeros(rows, data.dtype).at[position // genes]
        return at.add(data, mode="drop", indices_are_sorted=True)

    return _of_stored(x, of_block).reshape(-1)[: n_rows(x)]


@_one_program()
def rows_to_values(x: Counts, v: Array, pad: int = 0) -> Array:
    """What `v` (cells,) holds for the cell of each stored value (blocks, nnz); `pad` at pads."""
    blocks, rows, genes = x.data.shape[0], x.block_rows, x.shape[1]
    each = jnp.pad(v, (0, blocks * rows - n_rows(x))).reshape(blocks, rows)
    each = jnp.pad(each, ((0, 0), (0, 1)), constant_values=pad)  # the row of pads

    def of_block(data: Array, position: Array, values: Array) -> Array:
        return values.at[position // genes].get(mode="promise_in_bounds", indices_are_sorted=True)

    return _of_stored(x, of_block, each)


@_one_program("n_groups")
def group_sums(x: Matrix, group: Int[Array, " cells"], n_groups: int) -> Float[Array, "groups genes"]:
    """Sum the cells of each group, numbered from 0."""
    if not isinstance(x, Counts):
        return jax.ops.segment_sum(x, group, n_groups)
    at = rows_to_values(x, group, pad=n_groups)
    return jnp.zeros((n_groups, x.shape[1]), x.dtype).at[at, x.column].add(x.data, mode="drop")


@_one_program()
def scale_rows(x: R, factor: Float[Array, " cells"]) -> R:
    if isinstance(x, Streamed):
        return x.changed(scale_rows, factor)
    if not isinstance(x, Counts):
        return x * factor[:, None]
    return x.with_data(x.data * rows_to_values(x, factor))


@_one_program()
def scale_columns(x: R, factor: Float[Array, " genes"]) -> R:
    if isinstance(x, Streamed):
        return x.changed(lambda piece: scale_columns(piece, factor))
    if not isinstance(x, Counts):
        return x * factor
    return x.with_data(x.data * factor[x.column])


@_one_program()
def take_columns(x: R, columns: Int[Array, " selected"]) -> R:
    """The genes at `columns`, in that order; what they are is structure."""
    if isinstance(x, Streamed):
        return x.changed(lambda piece: take_columns(piece, columns), genes=len(columns))
    if not isinstance(x, Counts):
        return x[:, columns]
    selected, genes, rows = columns.shape[0], x.shape[1], x.block_rows
    place = jnp.full(genes, -1, jnp.int32).at[columns].set(jnp.arange(selected, dtype=jnp.int32))

    def of_block(data: Array, position: Array) -> tuple[Array, Array]:
        new = place[position % genes]
        kept = (new >= 0) & (position < rows * genes)
        # Dropped values become zeros, so that sums over the stored values see the selected genes alone.
        return jnp.where(kept, data, 0), jnp.where(kept, position // genes * selected + new, rows * selected)

    data, position = _of_stored(x, of_block)
    return Counts(data, position, (x.shape[0], selected), x.block_rows)


@_one_program("f")
def column_sums(x: Rows, f: Callable[[Array], Array] = lambda v: v) -> Float[Array, " genes"]:
    """Sum f(x) over the cells, for an elementwise f with f(0) = 0."""
    if isinstance(x, Streamed):
        parts = x.each(lambda piece: column_sums(piece, f))
        return jnp.asarray(sum(part.astype(np.float64) for _, part in parts), x.dtype)
    if not isinstance(x, Counts):
        return f(x).sum(0)
    # Block by block: a partial sum over a thousand cells keeps float32 exact enough before blocks are added.
    if _crowded(x):
        zero = jnp.zeros(x.shape[1], x.dtype)
        return fold_rows(x.with_data(f(x.data)), lambda total, block, _: total + block.sum(0), zero, adds=True)
    genes = x.shape[1]
    sums = _of_stored(x, lambda d, p: jnp.zeros(genes, d.dtype).at[p % genes].add(f(d)))
    return sums.sum(0)


def detections(x: Rows) -> Float[Array, " genes"]:
    """The number of cells in which a gene was found."""
    return column_sums(x, _positive)


def _positive(v: Array) -> Array:
    return (v > 0).astype(v.dtype)


@_one_program()
def column_moments(x: Rows) -> tuple[Float[Array, " genes"], Float[Array, " genes"]]:
    """Mean and unbiased variance of each gene, by the two-pass formula."""
    n = n_rows(x)
    mean = column_sums(x) / n
    if isinstance(x, Counts):
        squares, stored = _squares(x, mean)
        squares = squares + (n - stored) * mean**2
    elif isinstance(x, Streamed):
        zero = jnp.zeros(x.shape[1], x.dtype)
        squares = fold_rows(
            x, lambda total, block, mask: total + ((block - mean) ** 2 * mask[:, None]).sum(0), zero, adds=True
        )
    else:
        squares = ((x - mean) ** 2).sum(0)
    return mean, squares / max(n - 1, 1)


def _squares(x: Counts, mean: Array) -> Array:
    """For each gene the sum of the squares of what is stored, from `mean`, and how many that are: (2, genes)."""
    genes, end = x.shape[1], x.block_rows * x.shape[1]

    def of_block(data: Array, position: Array) -> Array:
        at, held = position % genes, position < end
        square = jnp.where(held, (data - mean[at]) ** 2, 0)
        zero = jnp.zeros(genes, data.dtype)
        return jnp.stack([zero.at[at].add(square), zero.at[at].add(held.astype(data.dtype))])

    return _of_stored(x, of_block).sum(0)


@_one_program()
def matmul(x: Rows, v: Float[Array, "genes dims"]) -> Float[Array, "cells dims"]:
    """x @ v."""
    return map_rows(x, lambda block: block @ v)


@_one_program()
def transposed_product(x: Matrix, v: Float[Array, "cells k"]) -> Float[Array, "genes k"]:
    """x.T @ v, block by block."""
    like = jax.ShapeDtypeStruct((x.shape[1], v.shape[1]), x.dtype)
    return jax.linear_transpose(lambda w: matmul(x, w), like)(v.astype(x.dtype))[0]


@_one_program()
def values_at(x: Counts, dense: Float[Array, "cells genes"]) -> Float[Array, "blocks nnz"]:
    """What a dense matrix of the same shape holds where `x` has its values; 0 at pads."""
    blocks, rows = x.data.shape[0], x.block_rows
    flat = jnp.pad(dense, ((0, blocks * rows - n_rows(x)), (0, 0))).reshape(blocks, -1)
    return jax.vmap(lambda d, at: d.at[at].get(mode="fill", fill_value=0))(flat, x.position)


@_one_program()
def gram(x: Rows, mean: Float[Array, " genes"]) -> Float[Array, "genes genes"]:
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
    panels, _ = fold_rows(x, step, (zeros, zeros), adds=True)
    upper = jnp.zeros((genes, genes), x.dtype)
    for panel, a, b in zip(panels, edges[:-1], edges[1:], strict=True):
        upper = upper.at[a:b, a:].set(panel)
    upper = jnp.triu(upper)
    return upper + jnp.triu(upper, 1).T
