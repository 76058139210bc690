"""Sparse graphs of fixed width: the pattern is found once on the host, the values are differentiable.

An edge lives in a *slot*, a position of an array of shape ``(rows, width)``. Row ``i < n`` holds the first ``width``
edges of cell ``i``; the surplus of high-degree cells goes to overflow rows, whose owner is listed apart, so memory
follows the number of edges and not the largest degree. Every pattern is symmetric (an absent direction holds a 0), and
`reverse` names the slot of the opposite edge, so that the transpose of each kernel is again a gather: naive
differentiation would scatter, which costs several times more.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Bool, Float, Int
from scipy.sparse.csgraph import reverse_cuthill_mckee

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


class Pattern(NamedTuple):
    """Where the edges of a graph are. Pad slots (not `valid`) point at cell 0; values there must be 0.

    `order` lists the cells such that neighbours are near each other in it, see :meth:`Graph.reordered`.
    """

    indices: Int[Array, "rows width"] | np.ndarray
    reverse: Int[Array, "rows width"] | np.ndarray
    owner: Int[Array, " overflow"] | np.ndarray
    valid: Bool[Array, "rows width"] | np.ndarray
    order: Int[Array, " cells"] | np.ndarray

    @property
    def n_cells(self) -> int:
        return int(self.indices.shape[0] - self.owner.shape[0])

    @classmethod
    def from_neighbors(cls, indices: np.ndarray, *, like: Pattern | None = None) -> Pattern:
        """The undirected union of directed neighbour lists `indices` (n, k), the cell itself excluded.

        Slots ``[:n, :k]`` are the given lists in their order; edges that only the other side lists follow.
        `like` keeps the array shapes of an earlier pattern where they suffice, so that compiled code can be reused.
        """
        n, k = indices.shape
        if like is not None and like.n_cells != n:
            like = None
        mutual, partner, one_way = _partners(np.asarray(indices, dtype=np.int64))
        return _place(n, k, indices, mutual, partner, one_way, indices.ravel()[one_way], one_way // k, like)

    @classmethod
    def from_csr(cls, indptr: np.ndarray, indices: np.ndarray) -> Pattern:
        """The pattern of a structurally symmetric CSR matrix with sorted indices."""
        n = len(indptr) - 1
        degree = np.diff(indptr)
        width = _best_width(degree, 1)
        row = np.repeat(np.arange(n), degree)
        rows = n + _bucket(int((np.maximum(degree - 1, 0) // width).sum()), n)
        slot, owner = _slots_of(row, np.arange(len(indices)) - indptr[row], width, n, rows)
        position = sp.csr_matrix((np.arange(len(indices)), indices, indptr), shape=(n, n)).tocsc().data
        return cls(
            indices=_filled(rows, width, slot, indices),
            reverse=_filled(rows, width, slot, slot[position], default=np.arange(rows * width)),
            owner=owner.astype(np.int32),
            valid=_filled(rows, width, slot, np.ones(len(slot), bool), default=np.zeros(rows * width, bool)),
            order=_order(indptr, indices),
        )

    def row_of_slot(self) -> np.ndarray:
        """The cell that each row of slots belongs to; `n_cells` for pad rows (host array)."""
        return np.concatenate([np.arange(self.n_cells), np.asarray(self.owner)])


def _partners(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which edges are listed from both sides, where the other listing is, and those from one side, by target."""
    n, k = indices.shape
    target = indices.ravel()
    source = np.repeat(np.arange(n), k)
    key = source * n + target
    opposite = target * n + source
    del source
    order = np.argsort(key, kind="stable")
    found = np.searchsorted(key[order], opposite)
    partner = order[np.minimum(found, key.size - 1, out=found)]
    del order, found
    mutual = key[partner] == opposite
    one_way = np.flatnonzero(~mutual)
    return mutual, partner, one_way[np.argsort(target[one_way], kind="stable")]


def _order(indptr: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """The reverse Cuthill-McKee ordering."""
    n = len(indptr) - 1
    shape = (np.ones(len(indices), np.int8), indices.astype(np.int32), indptr.astype(np.int32))
    return reverse_cuthill_mckee(sp.csr_matrix(shape, shape=(n, n)), symmetric_mode=True).astype(np.int32)


def _filled(rows: int, width: int, slot: np.ndarray, values: Any, default: np.ndarray | None = None) -> np.ndarray:
    flat = np.zeros(rows * width, np.int32) if default is None else default.copy()
    flat[slot] = values
    return flat.reshape(rows, width).astype(bool if flat.dtype == bool else np.int32)


def _best_width(degree: np.ndarray, least: int) -> int:
    """The width with the fewest slots in total, where an overflow row counts as two more: it has to be added back.

    A multiple of the panel, so that graphs of as many cells share compiled code, and one panel only where nearly all
    rows fit into it: sums of so few slots are compiled to slower code.
    """
    counts, most = np.bincount(degree), int(np.percentile(degree, 90))
    first = max(-(-max(least, 1) // _PANEL), 1 if most <= _PANEL else 2) * _PANEL
    widths = np.arange(first, max(first, most) + _PANEL, _PANEL)
    values = np.arange(len(counts))
    overflow = np.asarray([(np.ceil(np.maximum(values - w, 0) / w) * counts).sum() for w in widths])
    return int(widths[np.argmin(widths * (degree.size + overflow) + 2 * overflow)])


def _slots_of(
    row: np.ndarray, rank: np.ndarray, width: int, n: int, rows: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Flat slots of the `rank`-th edges of each `row` (grouped by row), and the owners of the overflow rows."""
    split = rank // width
    surplus = np.flatnonzero((split > 0) & (rank % width == 0))
    overflow_row = np.cumsum((split > 0) & (rank % width == 0)) - 1
    slot = np.where(split == 0, row, n + overflow_row) * width + rank % width
    owner = row[surplus]
    if rows is not None:
        owner = np.concatenate([owner, np.full(rows - n - len(owner), n)])
    return slot, owner


def _place(
    n: int,
    k: int,
    indices: np.ndarray,
    mutual: np.ndarray,
    partner: np.ndarray,
    one_way: np.ndarray,
    owner_cell: np.ndarray,
    other_cell: np.ndarray,
    like: Pattern | None,
) -> Pattern:
    extra = np.bincount(owner_cell, minlength=n)
    width = _best_width(k + extra, k) if like is None else like.indices.shape[1]
    first = np.concatenate([[0], np.cumsum(extra)[:-1]])
    rank = k + np.arange(len(owner_cell)) - first[owner_cell]
    # A row of overflow starts where rank is a multiple of the width; with rank starting at k <= width each such start
    # is present in the list, so overflow rows can be numbered by counting them.
    needed = int(((rank >= width) & (rank % width == 0)).sum())
    rows = n + _bucket(needed, n)
    if like is not None:
        rows = max(rows, like.indices.shape[0])
    extra_slot, owner = _slots_of(owner_cell, rank, width, n, rows)
    own_slot = (np.arange(n)[:, None] * width + np.arange(k)).ravel()
    reverse = np.where(mutual, own_slot[partner], 0)
    reverse[one_way] = extra_slot
    flat_reverse = np.arange(rows * width)
    flat_reverse[own_slot] = reverse
    flat_reverse[extra_slot] = own_slot[one_way]
    slot = np.concatenate([own_slot, extra_slot])
    return Pattern(
        indices=_filled(rows, width, slot, np.concatenate([indices.ravel(), other_cell])),
        reverse=flat_reverse.reshape(rows, width).astype(np.int32),
        owner=owner.astype(np.int32),
        valid=_filled(rows, width, slot, np.ones(len(slot), bool), default=np.zeros(rows * width, bool)),
        order=_order(np.arange(n + 1) * k, indices.ravel()),
    )


def _bucket(needed: int, n: int) -> int:
    """Overflow rows rounded up, so that a refreshed graph of the same cells keeps its shape."""
    step = max(8, n // 16)
    return -(-max(needed, 1) // step) * step


_PANEL = 8
_GATHERED_ROWS = 8192


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

    # Unrolled so that XLA fuses gathers, products and sum into one pass over the output. The overflow rows are summed
    # apart: a slice of one common sum would end the fusion and cost four times as much.
    def sum_of_slots(rows: slice) -> Array:
        total = jnp.zeros((), jnp.result_type(values, v))
        for j in range(index.shape[1]):
            total = total + values[rows, j, None] * _in_bounds(v, index[rows, j])
        return total if scale is None else scale * total

    n = p.n_cells
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
    return jax.lax.map(of_row, (_spread(p, z), jnp.asarray(p.indices)), batch_size=_GATHERED_ROWS) * p.valid


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
        values.reshape(-1)[_slots_of(row, rank, layout.indices.shape[1], n)[0]] = data
        return cls(layout, jnp.asarray(values))

    def to_scipy(self) -> sp.csr_matrix:
        """The matrix on the host, explicit zeros dropped, indices sorted."""
        p = self.pattern
        values = np.asarray(self.values)
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
