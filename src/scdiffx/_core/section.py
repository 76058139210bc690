"""Some of the cells with those around them, and what graphs and lists of neighbours are among these alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Int

from scdiffx._core.devices import divisible
from scdiffx._core.graph import Graph
from scdiffx._core.pattern import Pattern

__all__ = ["Section", "Surroundings", "rounded_up"]


def rounded_up(count: int) -> int:
    """To a sixteenth of its size at most: similar sections share compiled code."""
    step = max(1, 1 << max(0, int(count).bit_length() - 5))
    return -(-int(count) // step) * step


class _Overflow(NamedTuple):
    """The overflow rows of each cell, from `start[cell]` on; `most`: of all cells of a section at most, rounded up."""

    rows: Int[np.ndarray, " overflow"]
    start: Int[np.ndarray, " cells_and_one"]
    most: int


class Surroundings:
    """Who is whose neighbour among all cells, by any of some patterns; makes sections of `size` cells, pads included.

    Host arrays throughout. Patterns that sections are asked for must be among those given here.
    """

    def __init__(self, n_cells: int, patterns: list[Pattern]) -> None:
        self.n_cells = n_cells
        self.patterns = patterns
        self.edges = sum((_edges(p) for p in patterns), sp.csr_matrix((n_cells, n_cells), dtype=np.int32))
        self._overflow: dict[int, _Overflow] = {}
        self.size = 0

    def resize(self, size: int) -> None:
        """Sections have room for so many cells from now on."""
        self.size = size
        self._overflow = {id(p.indices): _overflow(p, size) for p in self.patterns}

    def reached(self, cells: np.ndarray, hops: int) -> np.ndarray:
        """The cells, and after them in ascending order all others that are at most so many edges away."""
        seen = np.zeros(self.n_cells, bool)
        seen[cells] = True
        last = cells
        for _ in range(hops):
            # Marks, not a sort: edges are many times as many as cells.
            near = np.zeros(self.n_cells, bool)
            near[self.edges[last].indices] = True
            last = np.flatnonzero(near & ~seen)
            seen[last] = True
        seen[cells] = False
        return np.concatenate([cells, np.flatnonzero(seen)])

    def section(self, own: np.ndarray, reached: np.ndarray) -> Section:
        """The section of the cells `reached`, of which its `own` are the first."""
        place = np.full(self.n_cells, -1, np.int32)
        place[reached] = np.arange(len(reached), dtype=np.int32)
        return Section(own, reached, place, self.size, self._overflow)


class Section:
    """Cells in an order of their own: first the `own`, then those around them, then some others as pads.

    Rows of graphs are whole for cells whose neighbours are all here. Pads are in no graph and no list.
    """

    def __init__(
        self, own: np.ndarray, reached: np.ndarray, place: np.ndarray, size: int, overflow: dict[int, _Overflow]
    ) -> None:
        self.own = own
        self.reached = reached
        self.cells = np.concatenate([reached, np.flatnonzero(place < 0)[: size - len(reached)]])
        self._place = place
        self._overflow = overflow

    def places(self, cells: np.ndarray) -> Int[np.ndarray, ...]:
        """Where cells are in the section, -1 for those that are not (and for -1)."""
        return np.where(cells >= 0, self._place[np.maximum(cells, 0)], -1).astype(np.int32)

    def pattern(self, p: Pattern) -> Pattern:
        """The edges between cells of the section, each in the slot of its row that it is in among all cells."""
        width, size = p.indices.shape[1], len(self.cells)
        row, owner = self._rows(p)
        real = np.concatenate([np.arange(size) < len(self.reached), owner < size])
        indices = self._place[p.indices[row]]
        valid = p.valid[row] & (indices >= 0) & real[:, None]
        row_of = np.zeros(len(p.indices), np.int64)
        row_of[row[real]] = np.flatnonzero(real)
        slot = np.arange(row.size * width).reshape(row.size, width)
        reverse = row_of[p.reverse[row] // width] * width + p.reverse[row] % width
        return Pattern(
            indices=np.where(valid, indices, 0).astype(np.int32),
            reverse=np.where(valid, reverse, slot).astype(np.int32),
            owner=owner,
            valid=valid,
            order=np.arange(size, dtype=np.int32),
        )

    def graph(self, graph: Graph) -> Graph:
        """The part of a graph, of host arrays, that is among the cells of the section."""
        local, values = self.pattern(graph.pattern), np.asarray(graph.values)[self._rows(graph.pattern)[0]]
        return Graph(local, np.where(local.valid, values, 0))  # type: ignore[arg-type]

    def _rows(self, p: Pattern) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of slots the section has, cells' own first, and the owners of the others in the section."""
        overflow = self._overflow[id(p.indices)]
        first, last = overflow.start[self.reached], overflow.start[self.reached + 1]
        count = last - first
        rank = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        more = overflow.rows[np.repeat(first, count) + rank]
        missing = overflow.most - len(more)
        owner = np.concatenate([np.repeat(np.arange(len(count)), count), np.full(missing, len(self.cells))])
        return np.concatenate([self.cells, more, np.zeros(missing, np.int64)]), owner.astype(np.int32)


def _edges(p: Pattern) -> sp.csr_matrix:
    valid: Bool[np.ndarray, "rows width"] = np.asarray(p.valid)
    row = np.broadcast_to(p.row_of_slot()[:, None], valid.shape)[valid]
    ends = (np.ones(len(row), np.int32), (row, np.asarray(p.indices)[valid]))
    return sp.csr_matrix(ends, shape=(p.n_cells, p.n_cells))


def _overflow(p: Pattern, size: int) -> _Overflow:
    n, owner = p.n_cells, np.asarray(p.owner)
    rows = np.argsort(owner, kind="stable")
    count = np.bincount(owner[owner < n], minlength=n)
    largest = np.partition(count, max(n - size, 0))[max(n - size, 0) :] if n else count
    most = divisible(size + rounded_up(int(largest.sum()))) - size
    return _Overflow(rows + n, np.concatenate([[0], np.cumsum(count)]), most)
