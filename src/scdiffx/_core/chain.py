"""Absorption probabilities of Markov chains on a graph, with implicit derivatives."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scdiffx._core.graph import Graph, _gathered_sum, columns_to_slots, row_sums, rows_to_slots
from scdiffx._core.krylov import solve

__all__ = ["Absorption", "absorption", "reaching", "row_normalized"]


class Absorption(NamedTuple):
    """Where walks end.

    `probabilities` (cells, fates): chance to end in each fate rather than elsewhere or never; `reaches` (cells, fates):
    whether it can be reached at all, without passing through another; `converged`: whether the solver got there.
    """

    probabilities: Float[Array, "cells fates"]
    reaches: Bool[Array, "cells fates"]
    converged: Bool[Array, ""]


@partial(jax.tree_util.register_dataclass, data_fields=["graph"], meta_fields=[])
class _OneMinus:
    """The identity minus a graph, as an operator for the solver."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @property
    def shape(self) -> tuple[int, int]:
        return self.graph.shape

    @property
    def T(self) -> _OneMinus:
        return _OneMinus(self.graph.T)

    def __matmul__(self, v: Array) -> Array:
        return v - self.graph @ v


def row_normalized(graph: Graph) -> Graph:
    """Rows divided by their sums; rows without weight stay empty."""
    p = graph.pattern
    total = row_sums(p, graph.values)
    inverse = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
    return graph.with_values(graph.values * rows_to_slots(p, inverse))


def reaching(graph: Graph, target: Bool[Array, "cells q"]) -> Bool[Array, "cells q"]:
    """Which cells have a path of positive weights to a cell of each target; the targets themselves included."""
    p = graph.pattern
    present = ((graph.values > 0) & p.valid).astype(jnp.float32)

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        seen, _ = state
        grown = seen | (_gathered_sum(p, present, seen.astype(jnp.float32)) > 0)
        return grown, (grown != seen).any()

    return jax.lax.while_loop(lambda s: s[1], step, (target, jnp.asarray(True)))[0]


@partial(jax.jit, static_argnames=("n_fates", "tol"))
def absorption(
    transitions: Graph, terminal: Int[Array, " cells"], n_fates: int, tol: float | None = None
) -> Absorption:
    """The chance that a walk ends in each fate: the solution of ``(I - Q) X = R``.

    `terminal` numbers the fate of terminal cells from 0 and is -1 elsewhere. Cells without a path to any fate would
    make the system singular; they are left out, and their probabilities are 0.
    """
    p, dtype = transitions.pattern, transitions.dtype
    fates = jax.nn.one_hot(terminal, n_fates, dtype=dtype)
    transient = terminal < 0
    # Walks stop in terminal cells.
    leaving = transitions.values * rows_to_slots(p, transient.astype(dtype))
    reaches = reaching(transitions.with_values(leaving), fates > 0)
    live = (transient & reaches.any(1)).astype(dtype)
    inner = leaving * rows_to_slots(p, live) * columns_to_slots(p, live)
    into = (transitions @ fates) * live[:, None]
    solution = solve(_OneMinus(transitions.with_values(inner)), into, tol=tol)
    return Absorption(solution.x + fates, reaches, solution.converged)
