"""Newton's steps on the potentials and moments of a coupling, by elimination."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["System", "descent", "held", "solve"]

# The least curvature that a step counts on, in units of the bound's.
_FLATTEST = 0.05


class System(NamedTuple):
    """The symmetric derivative of the residual times epsilon, the last columns over ``bend alpha``, in blocks."""

    p: Array
    rows: Array
    columns: Array
    r: Array
    s: Array
    t: Array


def held(system: System, moves: Array | None) -> System:
    """The system of the potentials, and of the moments that move, alone."""
    if moves is not None:
        t = jnp.where(moves & moves[:, None], system.t, -jnp.eye(len(system.t), dtype=system.t.dtype))
        return system._replace(r=system.r * moves, s=system.s * moves, t=t)
    return system._replace(r=0 * system.r, s=0 * system.s, t=-jnp.eye(len(system.t), dtype=system.t.dtype))


def solve(system: System, a: Array, b: Array, c: Array, damping: Array | float = 0.0) -> tuple[Array, Array, Array]:
    """Solve by elimination of the rows. Potentials are known up to a constant: that of the columns is held."""
    p, rows, columns, r, s, t = system
    rows, columns = (1 + damping) * rows, (1 + damping) * columns
    m = len(columns)
    right = jnp.column_stack([p, r])
    matrix = jnp.block([[jnp.diag(columns), s], [s.T, t]]) - right.T @ (right / rows[:, None])
    # Points may have next to no weight: scaled, their rows are like others.
    scale = jnp.concatenate([1 / jnp.sqrt(columns), jnp.ones(len(t), p.dtype)])
    null = jnp.concatenate([columns, jnp.zeros(len(t), p.dtype)]) * scale
    matrix = matrix * scale[:, None] * scale + null[:, None] * null
    # Transposed, scales are those of rows for one right side and for many.
    given = jnp.concatenate([b, c]) - right.T @ (a.T / rows).T
    found = (scale * jnp.linalg.solve(matrix, (scale * given.T).T).T).T
    return ((a - right @ found).T / rows).T, found[:m], found[m:]


def descent(
    system: System,
    right: tuple[Array, Array, Array],
    bend: Float[np.ndarray, " features"],
    cold: Array,
    joint: Array,
    damping: Array,
) -> tuple[Array, Array, Array]:
    """Newton's step on potentials and convex moments; with `joint` on W too, where it goes down if it would go up.

    `cold` is alpha over epsilon. Of the Hessian in W, in units in which that of the concave squares' bound is 1,
    eigenvalues are taken without their signs: what is stationary yet no minimum does not attract.
    """
    concave = np.flatnonzero(bend > 0)
    moves = jnp.asarray(bend < 0)
    damping = jnp.where(joint, 0, damping)
    rest = held(system, moves)
    rest = rest._replace(t=rest.t + damping * jnp.diag(jnp.diag(rest.t)))
    a, b, c = right
    sides = (
        jnp.column_stack([a, system.r[:, concave]]),
        jnp.column_stack([b, system.s[:, concave]]),
        jnp.column_stack([c, system.t[:, concave]]) * moves[:, None],
    )
    found = solve(rest, *sides, damping)
    across = jnp.stack([side[:, 1:].T @ part for side, part in zip(sides, found, strict=True)]).sum(0)
    size = jnp.sqrt(cold * jnp.asarray(bend[concave], c.dtype))
    inner = system.t[jnp.ix_(concave, concave)] - across[:, 1:]
    values, vectors = jnp.linalg.eigh(size[:, None] * inner * size)
    # The derivative of the residual is minus the Hessian.
    inverse = vectors / -jnp.maximum(jnp.abs(values), _FLATTEST) @ vectors.T
    dw = jnp.where(joint, size * (inverse @ (size * (c[concave] - across[:, 0]))), 0)
    df, dg, dc = (v[:, 0] - v[:, 1:] @ dw for v in found)
    return df, dg, dc.at[concave].set(dw)
