"""Entropic couplings of two point clouds, applied block by block from their potentials: never a matrix.

A coupling is ``P[i, j] = exp((f[i] + g[j] - |x[i] - y[j]|^2) / epsilon)``. A block of its rows is made, used and
dropped, also in derivatives, so memory is linear in the points.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["apply", "draw", "log_sums"]

# Entries of a block. Small blocks stay in the cache of a processor; below some 30 rows the product is no longer fast.
_ENTRIES = 1 << 21
_LEAST_ROWS = 32


def log_sums(
    x: Float[Array, "n dims"], y: Float[Array, "m dims"], g: Float[Array, " m"], epsilon: Array
) -> Float[Array, " n"]:
    """``log sum_j exp((g[j] - |x[i] - y[j]|^2) / epsilon)`` for every i."""
    from_column = (g - _norms(y)) / epsilon

    def block(rows: Array) -> Array:
        return jax.nn.logsumexp(rows @ y.T + from_column, axis=1)

    return _by_rows(block, (2 / epsilon * x,), len(y)) - _norms(x) / epsilon


def apply(
    x: Float[Array, "n dims"],
    y: Float[Array, "m dims"],
    f: Float[Array, " n"],
    g: Float[Array, " m"],
    epsilon: Array,
    values: Float[Array, "m columns"],
) -> Float[Array, "n columns"]:
    """The coupling times `values`. Its transpose is applied with x and y, and f and g, exchanged."""
    from_column = (g - _norms(y)) / epsilon

    def block(rows: Array, from_row: Array) -> Array:
        return jnp.exp(rows @ y.T + from_row[:, None] + from_column) @ values

    return _by_rows(block, (2 / epsilon * x, (f - _norms(x)) / epsilon), len(y))


def draw(
    x: Float[Array, "n dims"], y: Float[Array, "m dims"], g: Float[Array, " m"], epsilon: Array, at: Float[Array, " n"]
) -> Array:
    """The column at quantile `at` (in [0, 1)) of each row of the coupling: a draw where `at` is uniform."""
    from_column = (g - _norms(y)) / epsilon

    def block(rows: Array, at: Array) -> Array:
        logits = rows @ y.T + from_column
        up_to = jnp.cumsum(jnp.exp(logits - logits.max(axis=1, keepdims=True)), axis=1)
        return jnp.minimum((up_to <= at[:, None] * up_to[:, -1:]).sum(axis=1), len(y) - 1)

    return _by_rows(block, (2 / epsilon * x, at), len(y))


def _norms(x: Array) -> Array:
    return jnp.square(x).sum(axis=1)


def _by_rows(function: Callable[..., Array], arrays: tuple[Array, ...], width: int) -> Array:
    """`function` of blocks of rows, concatenated. Backwards, a block is computed again rather than kept."""
    n = len(arrays[0])
    rows = min(max(_ENTRIES // max(width, 1), _LEAST_ROWS), n)
    n_blocks = -(-n // rows)
    if n_blocks == 1:
        return function(*arrays)
    pad = n_blocks * rows - n
    blocks = tuple(jnp.pad(a, [(0, pad), *[(0, 0)] * (a.ndim - 1)]).reshape(n_blocks, rows, *a.shape[1:]) for a in arrays)
    result = jax.lax.map(jax.checkpoint(lambda block: function(*block)), blocks)
    return result.reshape(n_blocks * rows, *result.shape[2:])[:n]
