"""Where velocities lead: transition probabilities between cells, on a graph."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float, Int

from scdiffx._core.chain import on_diagonal, row_normalized
from scdiffx._core.directed import Directed
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.graph import Graph, Pattern, rows_to_slots
from scdiffx._core.pattern import slots_of
from scdiffx.ops._velocity_embedding import transition_probabilities

__all__ = ["TransitionMatrix"]

# Beyond every array: what is looked up there is 0.
_NOWHERE = np.iinfo(np.int32).max


@operator
class TransitionMatrix:
    """Transition probabilities from velocities (La Manno 2018; scVelo), if wanted mixed with the graph (CellRank).

    A walk steps to other cells in proportion to ``exp(scale * cosine)``; with ``self_transitions=True`` it stays as far
    as the best cosine of its cell falls short of those of others. `weight_connectivities`, unless None, is the share of
    steps that follow the connectivities instead, divided by their sums. Both numbers are learnable. Rows of the result
    sum to 1; a row that only one of the two has is that one, and a cell with neither has an empty row.

    `init` finds the pattern of the result, the symmetric union of all edges and, for self transitions, the diagonal,
    and for each of its slots the ones of the cosines and of the connectivities that go there.
    """

    scale: float | Array = learnable(default=10.0, constraint="positive")
    weight_connectivities: float | Array | None = learnable(default=None, constraint="unit")
    pattern: Pattern | None = buffer(default=None, structure=True)
    from_cosines: Int[Array, "rows width"] | None = buffer(default=None, structure=True)
    from_connectivities: Int[Array, "rows width"] | None = buffer(default=None, structure=True)
    self_transitions: bool = static(default=True)

    def init(
        self, cosines: Directed, connectivities: Graph | None = None, key: Array | None = None
    ) -> TransitionMatrix:
        edges = [_edges(cosines.indices, cosines.owner, cosines.valid)]
        if self.weight_connectivities is not None:
            if connectivities is None:
                raise ValueError(f"weight_connectivities={self.weight_connectivities!r} needs the connectivities")
            p = connectivities.pattern
            edges.append(_edges(p.indices, p.row_of_slot(), p.valid))
        union = _union(edges, cosines.n_cells, diagonal=self.self_transitions)
        pattern = Pattern.from_csr(union.indptr, union.indices)
        lookups = [jnp.asarray(_lookup(pattern, union, *part)) for part in edges]
        mixed = self.weight_connectivities is not None
        return replace(
            self,
            # Arrays of the type of the cosines: a fit that moves them compiles nothing anew.
            scale=jnp.asarray(self.scale, cosines.dtype),
            weight_connectivities=jnp.asarray(self.weight_connectivities, cosines.dtype) if mixed else None,
            pattern=pattern,
            from_cosines=lookups[0],
            from_connectivities=lookups[1] if mixed else None,
        )

    def __call__(self, cosines: Directed, connectivities: Graph | None = None) -> Graph:
        if self.pattern is None or self.from_cosines is None:
            raise ValueError("TransitionMatrix needs its pattern: call `op = op.init(cosines, connectivities)` first")
        mixed = self.weight_connectivities is not None and self.from_connectivities is not None
        if mixed and connectivities is None:
            raise ValueError("TransitionMatrix mixes with connectivities: pass them")
        moves, stays = transition_probabilities(cosines, self.scale, stay=self.self_transitions)
        graph = Graph(self.pattern, _placed(moves.values, self.from_cosines))
        if self.self_transitions:
            own = jnp.where(on_diagonal(self.pattern), rows_to_slots(self.pattern, stays), 0)
            graph = graph.with_values(graph.values + own)
        if connectivities is None or self.from_connectivities is None or self.weight_connectivities is None:
            return graph
        weights = connectivities.values.astype(cosines.dtype)
        near = row_normalized(graph.with_values(_placed(weights, self.from_connectivities)))
        w = self.weight_connectivities
        return row_normalized(graph.with_values((1 - w) * graph.values + w * near.values))


def _placed(values: Float[Array, "_ _"], source: Int[Array, "rows width"]) -> Float[Array, "rows width"]:
    return values.reshape(-1).at[source].get(mode="fill", fill_value=0)


def _edges(index: Any, owner: Any, valid: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, targets and flat slots of all edges."""
    slots = np.flatnonzero(np.asarray(valid))
    return np.asarray(owner)[slots // index.shape[1]], np.asarray(index).ravel()[slots], slots


def _union(edges: list[tuple[np.ndarray, np.ndarray, np.ndarray]], n: int, *, diagonal: bool) -> sp.csr_matrix:
    """The symmetric pattern of all edges; its indices are sorted."""
    own = np.arange(n if diagonal else 0)
    row, column = (np.concatenate([*(part[i] for part in edges), own]) for i in (0, 1))
    one = sp.csr_matrix((np.ones(len(row), np.int8), (row, column)), shape=(n, n))
    union = (one + one.T).tocsr()
    union.sort_indices()
    return union


def _lookup(p: Pattern, union: sp.csr_matrix, row: np.ndarray, column: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """For each slot of the pattern the given slot that goes there."""
    n, degree = p.n_cells, np.diff(union.indptr)
    start = np.repeat(np.arange(n, dtype=np.int64), degree)
    there = slots_of(start, np.arange(union.nnz) - union.indptr[start], p.indices.shape[1], n)[0]
    found = np.full(p.indices.size, _NOWHERE, np.int32)
    found[there[np.searchsorted(start * n + union.indices, row.astype(np.int64) * n + column)]] = slots
    return found.reshape(p.indices.shape)
