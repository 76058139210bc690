"""Entropic couplings of two point clouds, applied block by block from their potentials: never a matrix.

A coupling is ``P[i, j] = exp((f[i] + g[j] - |x[i] - y[j]|^2) / epsilon)``. A block of its rows is made, used and
dropped, also in derivatives, so memory is linear in the points.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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
    columns = y, (g - _norms(y)) / epsilon
    return _by_rows(_log_sums, columns, (2 / epsilon * x,)) - _norms(x) / epsilon


def apply(
    x: Float[Array, "n dims"],
    y: Float[Array, "m dims"],
    f: Float[Array, " n"],
    g: Float[Array, " m"],
    epsilon: Array,
    values: Float[Array, "m columns"],
) -> Float[Array, "n columns"]:
    """The coupling times `values`. Its transpose is applied with x and y, and f and g, exchanged."""
    columns = y, (g - _norms(y)) / epsilon, values
    return _by_rows(_apply, columns, (2 / epsilon * x, (f - _norms(x)) / epsilon))


def draw(
    x: Float[Array, "n dims"], y: Float[Array, "m dims"], g: Float[Array, " m"], epsilon: Array, at: Float[Array, " n"]
) -> Array:
    """The column at quantile `at` (in [0, 1)) of each row of the coupling: a draw where `at` is uniform."""
    return _by_rows(_draw, (y, (g - _norms(y)) / epsilon), (2 / epsilon * x, at))


def _log_sums(columns: tuple[Array, ...], rows: tuple[Array, ...]) -> Array:
    y, from_column = columns
    return jax.nn.logsumexp(rows[0] @ y.T + from_column, axis=1)


def _apply(columns: tuple[Array, ...], rows: tuple[Array, ...]) -> Array:
    (y, from_column, values), (x, from_row) = columns, rows
    return jnp.exp(x @ y.T + from_row[:, None] + from_column) @ values


def _draw(columns: tuple[Array, ...], rows: tuple[Array, ...]) -> Array:
    (y, from_column), (x, at) = columns, rows
    logits = x @ y.T + from_column
    up_to = jnp.cumsum(jnp.exp(logits - logits.max(axis=1, keepdims=True)), axis=1)
    return jnp.minimum((up_to <= at[:, None] * up_to[:, -1:]).sum(axis=1), len(y) - 1)


def _norms(x: Array) -> Array:
    return jnp.square(x).sum(axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_rows(function: Callable[..., Array], columns: tuple[Array, ...], rows: tuple[Array, ...]) -> Array:
    """``function(columns, block)`` of blocks of rows, concatenated.

    Backwards, a block is computed again rather than kept: `jax.checkpoint` asks for the same, but within an outer loop
    JAX keeps the blocks all the same.
    """
    blocks, n = _blocked(columns, rows)
    result = jax.lax.map(lambda block: function(columns, block), blocks)
    return result.reshape(-1, *result.shape[2:])[:n]


def _by_rows_backward(function: Callable[..., Array], saved: Any, cotangent: Array) -> tuple[Any, Any]:
    columns, rows = saved
    blocks, n = _blocked(columns, (*rows, cotangent))

    def add(total: Any, block: tuple[Array, ...]) -> tuple[Any, Any]:
        to_columns, to_rows = jax.vjp(function, columns, block[:-1])[1](block[-1])
        return jax.tree.map(jnp.add, total, to_columns), to_rows

    to_columns, to_rows = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, columns), blocks)
    return to_columns, tuple(part.reshape(-1, *part.shape[2:])[:n] for part in to_rows)


_by_rows.defvjp(lambda function, columns, rows: (_by_rows(function, columns, rows), (columns, rows)), _by_rows_backward)


def _blocked(columns: tuple[Array, ...], rows: tuple[Array, ...]) -> tuple[tuple[Array, ...], int]:
    """The rows in blocks of one size, the last one filled up with zeros, and how many there are."""
    n = len(rows[0])
    size = min(max(_ENTRIES // max(len(columns[0]), 1), _LEAST_ROWS), n)
    n_blocks = -(-n // size)
    pad = n_blocks * size - n
    return tuple(
        jnp.pad(a, [(0, pad), *[(0, 0)] * (a.ndim - 1)]).reshape(n_blocks, size, *a.shape[1:]) for a in rows
    ), n
