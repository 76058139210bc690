"""Where the edges of a sparse graph are: found once on the host, as arrays of fixed width.

An edge lives in a *slot*, a position of an array of shape ``(rows, width)``. Row ``i < n`` holds the first ``width``
edges of cell ``i``; the surplus of high-degree cells goes to overflow rows, whose owner is listed apart, so memory
follows the number of edges and not the largest degree. Every pattern is symmetric (an absent direction holds a 0), and
`reverse` names the slot of the opposite edge.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Bool, Int
from scipy.sparse.csgraph import reverse_cuthill_mckee

from scdiffx._core.devices import divisible

__all__ = ["Pattern", "slots_of"]

_PANEL = 8


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
        rows = divisible(n + _bucket(int((np.maximum(degree - 1, 0) // width).sum()), n))
        slot, owner = slots_of(row, np.arange(len(indices)) - indptr[row], width, n, rows)
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


def slots_of(
    row: np.ndarray, rank: np.ndarray, width: int, n: int, rows: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Flat slots of the `rank`-th edges of each `row` (grouped by row), and the owners of the overflow rows."""
    slot = row * np.int64(width) + rank
    surplus = np.flatnonzero(rank >= width)  # few: a width is chosen so
    place = rank[surplus] % width
    slot[surplus] = (n - 1 + np.cumsum(place == 0)) * width + place
    owner = row[surplus[place == 0]]
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
    rows = divisible(n + _bucket(needed, n))
    if like is not None:
        rows = max(rows, like.indices.shape[0])
    extra_slot, owner = slots_of(owner_cell, rank, width, n, rows)
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
