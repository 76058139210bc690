"""Absorption probabilities of Markov chains on a graph, with implicit derivatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scdiffx._core.graph import Graph, Pattern, _gathered_sum, columns_to_slots, row_sums, rows_to_slots
from scdiffx._core.krylov import _bicgstab

__all__ = ["Absorption", "absorption", "on_diagonal", "reaching", "row_normalized"]


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


def on_diagonal(p: Pattern) -> Bool[Array, "rows width"]:
    """The slots of steps that stay."""
    row = jnp.concatenate([jnp.arange(p.n_cells, dtype=jnp.int32), jnp.asarray(p.owner)])
    return (jnp.asarray(p.indices) == row[:, None]) & p.valid


def reaching(graph: Graph, target: Bool[Array, "cells q"]) -> Bool[Array, "cells q"]:
    """Which cells have a path of positive weights to a cell of each target; the targets themselves included."""
    p = graph.pattern
    present = ((graph.values > 0) & p.valid).astype(jnp.float32)

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        seen, _ = state
        grown = seen | (_gathered_sum(p, present, seen.astype(jnp.float32)) > 0)
        return grown, (grown != seen).any()

    return jax.lax.while_loop(lambda s: s[1], step, (target, jnp.asarray(True)))[0]


@partial(jax.jit, static_argnames="n_fates")
def absorption(transitions: Graph, terminal: Int[Array, " cells"], n_fates: int) -> Absorption:
    """The chance that a walk ends in each fate: the solution of ``(I - Q) X = R``.

    `terminal` numbers the fate of terminal cells from 0 and is -1 elsewhere. Rows of `transitions` sum to 1 or less.
    Cells without a path to any fate would make the system singular: what enters them is lost, and their chances are 0.
    """
    p, dtype = transitions.pattern, transitions.dtype
    fates = jax.nn.one_hot(terminal, n_fates, dtype=dtype)
    # Walks stop in terminal cells.
    leaving = transitions.values * rows_to_slots(p, (terminal < 0).astype(dtype))
    reaches = reaching(transitions.with_values(leaving), fates > 0)
    live = ((terminal < 0) & reaches.any(1)).astype(dtype)
    leaving = leaving * rows_to_slots(p, live)
    inner = leaving * columns_to_slots(p, live)
    into = transitions.with_values(leaving) @ fates
    lost = live - row_sums(p, inner) - into.sum(1)
    lost = jnp.where(lost > 16 * jnp.finfo(dtype).eps, lost, 0)
    ends = jnp.concatenate([into, lost[:, None]], 1)
    chances, converged = _ends(_OneMinus(transitions.with_values(inner)), ends, live)
    return Absorption(chances[:, :-1] + fates, reaches, converged)


# A walk that is caught for long makes the system ill-conditioned: residuals of 1e-10 have left errors of 1e-3. The
# chances of all ends sum to 1, which tells the error, and one more round from the true residual mends it.
_ROUNDS = 10
_STEPS = 4000  # products in a round
# In double precision, the only one in which this is called.
_RESIDUAL = 1e-9  # relative, to reach
_OFF = 1e-8  # how far sums may be from 1


def _solved(system: _OneMinus, b: Array, goal: float, off: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Rounds of corrections until `off` is at most `goal` or no longer shrinks; the solution and its `off`."""

    def going(state: tuple[Array, Array, Array, Array]) -> Array:
        _, distance, shrinking, count = state
        return (distance > goal) & shrinking & (count < _ROUNDS)

    def correct(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        x, distance, _, count = state
        wanted = jnp.where(count > 0, 0.1 * goal / distance, _RESIDUAL)
        new = x + _bicgstab(system.__matmul__, b - system @ x, wanted, jnp.asarray(_STEPS))[0]
        better = off(new) < distance
        return jnp.where(better, new, x), jnp.where(better, off(new), distance), better, count + 1

    start = (jnp.zeros_like(b), jnp.full((), jnp.inf, b.dtype), jnp.asarray(True), jnp.zeros((), jnp.int32))
    x, distance, _, _ = jax.lax.while_loop(going, correct, start)
    return x, distance


@jax.custom_vjp
def _ends(system: _OneMinus, ends: Array, total: Array) -> tuple[Array, Array]:
    """Solve for the chances of all ends, which have to sum to `total`; and whether they do to 100 times `_OFF`."""
    order = jnp.asarray(system.graph.pattern.order)
    near, b, wanted = _OneMinus(system.graph.reordered()), ends[order], total[order]
    x, distance = _solved(near, b, _OFF, lambda x: jnp.abs(x.sum(1) - wanted).max())
    return jnp.zeros_like(x).at[order].set(x, unique_indices=True), distance <= 100 * _OFF


def _ends_fwd(system: _OneMinus, ends: Array, total: Array) -> tuple[tuple[Array, Array], tuple[_OneMinus, Array]]:
    result = _ends(system, ends, total)
    return result, (system, result[0])


def _ends_bwd(saved: tuple[_OneMinus, Array], cotangent: tuple[Array, Any]) -> tuple[_OneMinus, Array, None]:
    system, x = saved
    order = jnp.asarray(system.graph.pattern.order)
    near, b = _OneMinus(system.graph.reordered()).T, cotangent[0][order]
    size = jnp.linalg.norm(b, axis=0)

    def residual(x: Array) -> Array:
        left = jnp.linalg.norm(b - near @ x, axis=0)
        return jnp.where(size > 0, left / jnp.where(size > 0, size, 1), 0).max()

    dual = _solved(near, b, _RESIDUAL, residual)[0]
    dual = jnp.zeros_like(dual).at[order].set(dual, unique_indices=True)
    return jax.vjp(lambda a: a @ x, system)[1](-dual)[0], dual, None


_ends.defvjp(_ends_fwd, _ends_bwd)
