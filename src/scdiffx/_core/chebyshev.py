"""The polynomial filter of the eigensolver: Chebyshev polynomials of a symmetric operator, applied to residuals."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from scdiffx._core.graph import Graph

__all__ = ["degree_for", "filtered", "noise", "normalised"]

_DEGREE = 20  # largest filter degree; above it the search space would be refreshed too rarely
_GROWTH = 1e4  # by how much a filter may amplify the top of the spectrum over the window: rounding noise grows as much


def normalised(rows: Array) -> Array:
    """Unit rows; zero and non-finite ones become 0."""
    rows = jnp.where(jnp.isfinite(rows), rows, 0)
    largest = jnp.abs(rows).max(1, keepdims=True)
    rows = rows / jnp.where(largest > 0, largest, 1)  # so that the squares neither overflow nor vanish
    norm = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norm > 0, norm, 1)


def noise(n: int, columns: int, seed: Any, dtype: Any) -> Array:
    """Uniform numbers in [-1, 1), the same under any settings: a hash, which compiles faster than a PRNG."""
    bits = jnp.arange(n * columns, dtype=jnp.uint32) + jnp.asarray(seed, jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits = (bits ^ (bits >> 16)) >> 8  # 24 bits: exact in float32
    return (bits.astype(jnp.float32) / 2**23 - 1).astype(dtype).reshape(n, columns)


def _affine(A: Any, v: Array, scale: Array, shift: Array) -> Array:
    return A.affine(v, scale, shift) if isinstance(A, Graph) else scale * (A @ v) + shift


def _mapped(lower: Array, cut: Array) -> tuple[Array, Array]:
    """Centre and half width of the damped interval; the width never vanishes."""
    least = jnp.finfo(lower.dtype).eps * jnp.maximum(jnp.abs(cut), jnp.abs(lower)) + jnp.finfo(lower.dtype).tiny
    return (cut + lower) / 2, jnp.maximum((cut - lower) / 2, least)


def degree_for(lower: Array, cut: Array, top: Array, target: Array) -> Array:
    """The degree at which the filter favours the top over the `target` by no more than `_GROWTH`."""
    centre, half = _mapped(lower, cut)
    rate = [jnp.arccosh(jnp.maximum((x - centre) / half, 1)) for x in (top, target)]
    degree = jnp.log(_GROWTH) / jnp.maximum(rate[0] - rate[1], jnp.log(_GROWTH) / _DEGREE)
    return jnp.clip(degree, 2, _DEGREE).astype(jnp.int32)


def filtered(A: Any, seed: Array, source: Array, values: Array, lower: Array, cut: Array, degree: Array) -> Array:
    """Unit vectors along ``p(A) x - p(l) x`` for columns x with Ritz value l, given only ``source = A x - l x``.

    p is the Chebyshev polynomial that stays within 1 on [lower, cut]. Both it and its multiple of x are divided by
    its value at l, lest they overflow; the recurrence below is that of the difference. With no source, a `seed` is
    filtered itself (by the Chebyshev polynomial of the second kind).
    """
    centre, half = _mapped(lower, cut)
    level, source = (values - centre) / half, source / half
    reference = jnp.maximum(level, 1)

    def climb(_: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        before, now, weight_before, weight, ratio = carry
        following = 1 / (2 * reference - ratio)
        shift = following * (2 * weight * source - ratio * before) - 2 * following * centre / half * now
        after = _affine(A, now, 2 * following / half, shift)
        weight_after = following * (2 * level * weight - ratio * weight_before)
        return now, after, weight, weight_after, following

    ones = jnp.ones_like(level)
    first = (jnp.zeros_like(source), seed + source / reference, ones, level / reference, ones / reference)
    result = normalised(lax.fori_loop(1, degree, climb, first)[1].T).T
    # Where the operator vanishes so may the filter; any direction is as good there.
    return jnp.where((result == 0).all(0), seed, result)
