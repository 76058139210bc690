"""Sparse graphs of fixed width: the pattern is found once on the host, the values are differentiable.

As a `Pattern` names the slot of the opposite edge, the transpose of each kernel is again a gather: naive
differentiation would scatter, which costs several times more.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float

from scdiffx._core.devices import in_parts, n_parts, padded, place, readable, spread, whole
from scdiffx._core.pattern import Pattern, slots_of

__all__ = [
    "Graph",
    "Pattern",
    "columns_to_slots",
    "flip",
    "reachable",
    "row_sums",
    "rows_to_slots",
    "squared_distances",
]


_GATHERED_ROWS = 8192
_COLUMNS_EACH = 16


def _in_bounds(v: Array, index: Array | np.ndarray) -> Array:
    return jnp.asarray(v).at[index].get(mode="promise_in_bounds")


def _masked(p: Pattern, x: Array) -> Array:
    """Values on slots, 0 at pads; there may be more axes behind."""
    return x * jnp.asarray(p.valid).reshape(*p.valid.shape, *(1,) * (x.ndim - 2))


# The products are compiled as a whole where they are called outside of a program.
_whole = partial(jax.jit, inline=True)


@jax.custom_vjp
@_whole
def row_sums(p: Pattern, x: Float[Array, "rows width ..."]) -> Float[Array, "cells ..."]:
    """Sum the slots of each cell."""
    total = jnp.asarray(x).sum(1)
    return total[: p.n_cells].at[p.owner].add(total[p.n_cells :], mode="drop")


def _spread(p: Pattern, v: Array) -> Array:
    """Values of the cells at the rows of slots; 0 at pad rows."""
    v = jnp.asarray(v)
    return jnp.concatenate([v, v.at[p.owner].get(mode="fill", fill_value=0)])


@jax.custom_vjp
@_whole
def rows_to_slots(p: Pattern, v: Float[Array, "cells ..."]) -> Float[Array, "rows width ..."]:
    """The value of the cell that each edge starts from."""
    spread = _spread(p, v)
    return _masked(p, jnp.broadcast_to(spread[:, None], (*p.indices.shape, *spread.shape[1:])))


row_sums.defvjp(lambda p, x: (row_sums(p, x), p), lambda p, g: (None, rows_to_slots(p, g)))
rows_to_slots.defvjp(lambda p, v: (rows_to_slots(p, v), p), lambda p, g: (None, row_sums(p, _masked(p, g))))


@jax.custom_vjp
@_whole
def flip(p: Pattern, x: Float[Array, "rows width ..."]) -> Float[Array, "rows width ..."]:
    """The value at the opposite edge: the transpose of the matrix."""
    return _in_bounds(x.reshape(-1, *x.shape[2:]), p.reverse)


flip.defvjp(lambda p, x: (flip(p, x), p), lambda p, g: (None, flip(p, g)))


@jax.custom_vjp
@_whole
def columns_to_slots(p: Pattern, v: Float[Array, "cells ..."]) -> Float[Array, "rows width ..."]:
    """The value of the cell that each edge points to."""
    return _masked(p, _in_bounds(v, p.indices))


columns_to_slots.defvjp(
    lambda p, v: (columns_to_slots(p, v), p), lambda p, g: (None, row_sums(p, flip(p, _masked(p, g))))
)


@_whole
def _gathered_sum(p: Pattern, values: Array, v: Array, scale: Any = None, shift: Any = None) -> Array:
    v, index, values = jnp.asarray(v), jnp.asarray(p.indices), jnp.asarray(values)
    n, parts = p.n_cells, n_parts()

    # Unrolled so that XLA fuses gathers, products and sum into one pass over the output. The overflow rows are summed
    # apart: a slice of one common sum would end the fusion and cost four times as much.
    def sum_of_slots(rows: slice) -> Array:
        total = jnp.zeros((), jnp.result_type(values, v))
        for j in range(index.shape[1]):
            total = total + values[rows, j, None] * _in_bounds(v, index[rows, j])
        return total if scale is None else scale * total

    if parts > 1 and v.shape[1] < _COLUMNS_EACH * parts:
        # Each device takes some of the rows, and gets all of the vectors: they are small beside the graph.
        index, values, v = spread(padded(index)), spread(padded(values)), whole(v)
        total = whole(spread(sum_of_slots(slice(None))))[: p.indices.shape[0]]
        own = total[:n] if shift is None else total[:n] + shift
        return whole(whole(own).at[whole(jnp.asarray(p.owner))].add(whole(total[n:]), mode="drop"))
    if parts > 1 and v.shape[1] % parts == 0:
        # A wide matrix is shared out by its columns, which no product mixes: nothing needs to be sent.
        index, values, v = whole(index), whole(values), spread(v, 1)
    total = sum_of_slots(slice(n)) if shift is None else sum_of_slots(slice(n)) + shift
    return total.at[p.owner].add(sum_of_slots(slice(n, None)), mode="drop")


@jax.custom_vjp
def _matmul(p: Pattern, values: Array, v: Array) -> Array:
    return _gathered_sum(p, values, v)


@_whole
def _row_dots(p: Pattern, left: Array, right: Array) -> Array:
    """Inner products left_i . right_j on the slots (i, j): a sampled dense-dense product."""
    left = _spread(p, left)
    dots = [(left * _in_bounds(right, p.indices[:, j])).sum(1) for j in range(p.indices.shape[1])]
    return jnp.stack(dots, 1) * p.valid


def _matmul_bwd(saved: tuple[Pattern, Array, Array], g: Array) -> tuple[None, Array, Array]:
    p, values, v = saved
    return None, _row_dots(p, g, v), _matmul(p, flip(p, values), g)


_matmul.defvjp(lambda p, values, v: (_gathered_sum(p, values, v), (p, values, v)), _matmul_bwd)


@jax.custom_vjp
@_whole
def squared_distances(p: Pattern, z: Float[Array, "cells dims"]) -> Float[Array, "rows width"]:
    """Squared Euclidean distances along the edges; 0 at pad slots."""
    z = jnp.asarray(z)

    def of_row(row: tuple[Array, Array]) -> Array:
        own, index = row
        return ((own - _in_bounds(z, index)) ** 2).sum(1)

    # Rows by the thousand: XLA keeps all that it gathers at once, which is `dims` numbers for every edge.
    def of_rows(rows: tuple[Array, Array]) -> Array:
        return jax.lax.map(of_row, rows, batch_size=_GATHERED_ROWS)

    rows = _spread(p, z), jnp.asarray(p.indices)
    if n_parts() == 1:
        return of_rows(rows) * p.valid
    z = whole(z)
    found = in_parts(of_rows, (padded(rows[0]), padded(rows[1])))
    return found.reshape(-1, found.shape[2])[: len(p.valid)] * p.valid


def _squared_distances_bwd(saved: tuple[Pattern, Array], g: Array) -> tuple[None, Array]:
    p, z = saved
    # d_ij depends on z_i and z_j alike: the adjoint is a graph Laplacian of the two-sided cotangent.
    both = g * p.valid
    both = both + flip(p, both)
    return None, 2 * (row_sums(p, both)[:, None] * z - _gathered_sum(p, both, z))


squared_distances.defvjp(lambda p, z: (squared_distances(p, z), (p, z)), _squared_distances_bwd)


@partial(jax.tree_util.register_dataclass, data_fields=["pattern", "values"], meta_fields=[])
class Graph:
    """A sparse matrix of shape (cells, cells): a fixed pattern and differentiable values on its slots.

    Examples
    --------
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> z = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    >>> near = sd.ops.Neighbors(n_neighbors=8)
    >>> graph = near.init(z)(z).connectivities
    >>> graph.row_sums().shape, graph.to_scipy().shape
    ((60,), (60, 60))
    """

    def __init__(self, pattern: Pattern, values: Float[Array, "rows width"]) -> None:
        self.pattern = pattern
        self.values = values

    @property
    def shape(self) -> tuple[int, int]:
        return (self.pattern.n_cells, self.pattern.n_cells)

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def T(self) -> Graph:
        return Graph(self.pattern, flip(self.pattern, self.values))

    def __matmul__(self, v: Float[Array, "cells ..."]) -> Float[Array, "cells ..."]:
        if v.ndim == 1:
            return _matmul(self.pattern, self.values, v[:, None])[:, 0]
        return _matmul(self.pattern, self.values, v)

    def affine(
        self, v: Float[Array, "cells b"], scale: Float[Array, " b"], shift: Float[Array, "cells b"]
    ) -> Float[Array, "cells b"]:
        """``scale * (self @ v) + shift`` in one pass over the result; without a derivative rule of its own."""
        return _gathered_sum(self.pattern, self.values, v, scale, shift)

    def with_values(self, values: Float[Array, "rows width"]) -> Graph:
        return Graph(self.pattern, values)

    def row_sums(self) -> Float[Array, " cells"]:
        return row_sums(self.pattern, self.values)

    def scaled(self, left: Float[Array, " cells"], right: Float[Array, " cells"]) -> Graph:
        """diag(left) @ self @ diag(right)."""
        p = self.pattern
        return Graph(p, self.values * rows_to_slots(p, left) * columns_to_slots(p, right))

    @jax.jit
    def reordered(self) -> Graph:
        """The matrix with its cells in `pattern.order`: products take half the time if the vectors do not fit a cache.

        Worth its price for many products in a row.
        """
        p, n, width = self.pattern, self.pattern.n_cells, self.pattern.indices.shape[1]
        order = jnp.asarray(p.order)
        place = jnp.zeros(n, order.dtype).at[order].set(jnp.arange(n, dtype=order.dtype), unique_indices=True)
        owner = place.at[p.owner].get(mode="fill", fill_value=n)
        later = jnp.argsort(owner).astype(order.dtype)
        rows = jnp.concatenate([order, n + later])
        row_of = jnp.zeros_like(rows).at[rows].set(jnp.arange(len(rows), dtype=rows.dtype), unique_indices=True)
        indices, reverse, valid, values = (
            jnp.asarray(a).at[rows].get(mode="promise_in_bounds", unique_indices=True)
            for a in (p.indices, p.reverse, p.valid, self.values)
        )
        reverse = _in_bounds(row_of, reverse // width) * width + reverse % width
        moved = Pattern(_in_bounds(place, indices), reverse, owner[later], valid, jnp.arange(n, dtype=order.dtype))
        return Graph(moved, values)

    @classmethod
    def from_scipy(cls, matrix: Any, dtype: Any = None) -> Graph:
        """Any square scipy sparse matrix, its pattern completed to a symmetric one with zeros."""
        csr = sp.csr_matrix(matrix)
        if csr.shape[0] != csr.shape[1]:
            raise ValueError(f"a graph must be square, got a matrix of shape {csr.shape}")
        if not csr.has_canonical_format:
            csr = csr.copy()
            csr.sum_duplicates()
        union, data = _symmetric(csr, dtype or csr.dtype)
        layout = Pattern.from_csr(union.indptr, union.indices)
        values = np.zeros(layout.indices.shape, data.dtype)
        # Row by row, slots and edges come in the same order, but for the overflow rows, which come last.
        n = csr.shape[0]
        degree = np.diff(union.indptr)
        row = np.repeat(np.arange(n), degree)
        rank = np.arange(union.nnz) - np.repeat(union.indptr[:-1], degree)
        values.reshape(-1)[slots_of(row, rank, layout.indices.shape[1], n)[0]] = data
        layout = layout._replace(**{name: place(getattr(layout, name)) for name in ("indices", "reverse", "valid")})
        return cls(layout, jnp.asarray(place(values)))

    def to_scipy(self) -> sp.csr_matrix:
        """The matrix on the host, explicit zeros dropped, indices sorted."""
        p, values = readable((self.pattern, self.values))
        values = np.asarray(values)
        keep = np.asarray(p.valid) & (values != 0)
        rows = np.broadcast_to(p.row_of_slot()[:, None], keep.shape)[keep]
        csr = sp.csr_matrix((values[keep], (rows, np.asarray(p.indices)[keep])), shape=self.shape)
        csr.sort_indices()
        return csr


def _symmetric(csr: sp.csr_matrix, dtype: Any) -> tuple[sp.csr_matrix, np.ndarray]:
    """The pattern completed to a symmetric one, and the values on it, 0 where there were none."""
    n = csr.shape[0]
    pattern = sp.csr_matrix((np.ones(csr.nnz, np.int8), csr.indices, csr.indptr), shape=csr.shape)
    turned = pattern.T.tocsr()  # its indices are sorted
    if np.array_equal(turned.indptr, csr.indptr) and np.array_equal(turned.indices, csr.indices):
        return pattern, csr.data.astype(dtype, copy=False)
    union = (pattern + turned).tocsr()
    union.sort_indices()
    wanted, have = (np.repeat(np.arange(n, dtype=np.int64), np.diff(m.indptr)) * n + m.indices for m in (csr, union))
    data = np.zeros(union.nnz, dtype)
    data[np.searchsorted(have, wanted)] = csr.data
    return union, data


def reachable(graph: Graph, start: Array) -> Array:
    """Which cells a walk from `start` can reach over edges of positive weight (bool per cell)."""
    p = graph.pattern
    present = ((graph.values > 0) & p.valid).astype(jnp.float32)

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        seen, _ = state
        grown = seen | (_gathered_sum(p, present, seen[:, None].astype(jnp.float32))[:, 0] > 0)
        return grown, (grown != seen).any()

    seen = jnp.zeros(p.n_cells, bool).at[start].set(True)
    return jax.lax.while_loop(lambda s: s[1], step, (seen, jnp.asarray(True)))[0]
