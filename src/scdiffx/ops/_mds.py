"""Multidimensional scaling: the start by the classic one, the metric one by SMACOF with an implicit derivative."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float

__all__ = ["Scaled", "classic_mds", "metric_mds", "pairwise", "stress_of"]

_POWER_STEPS = 30
_MORE = 8  # columns of the subspace beyond those wanted
_RELAXED = 1.8  # of the step that SMACOF takes; at 2 the scale of the points would oscillate for ever
_CG_STEPS = 1000


class Scaled(NamedTuple):
    """Points (n, dims), and the number of iterations that found them."""

    points: Float[Array, "n dims"]
    steps: Array


def pairwise(x: Float[Array, "n d"]) -> Float[Array, "n n"]:
    """Euclidean distances of rows; those of equal rows have a derivative of 0."""
    x = x - x.mean(0)
    size = (x**2).sum(1)
    squared = size[:, None] + size - 2 * jnp.matmul(x, x.T, precision=lax.Precision.HIGHEST)
    apart = (squared > 0) & ~jnp.eye(len(x), dtype=bool)
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1)), 0)


def classic_mds(x: Float[Array, "n d"], dims: int) -> Float[Array, "n dims"]:
    """Classic scaling of the Euclidean distances of rows: their first principal components, by subspace iteration.

    The largest coordinate of each component is positive. Without a useful derivative.
    """
    x = lax.stop_gradient(x - x.mean(0))
    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    width = min(dims + _MORE, *x.shape)

    def step(_: int, basis: Array) -> Array:
        return jnp.linalg.qr(product(x, product(x.T, basis)))[0]

    start = jax.random.normal(jax.random.key(0), (x.shape[0], width), x.dtype)
    basis = lax.fori_loop(0, _POWER_STEPS, step, jnp.linalg.qr(start)[0])
    left, size, _ = jnp.linalg.svd(product(basis.T, x), full_matrices=False)
    found = (product(basis, left) * size)[:, :dims]
    peak = jnp.take_along_axis(found, jnp.abs(found).argmax(0)[None], 0)
    return found * jnp.where(peak < 0, -1, 1)


def _gaps(y: Array) -> Array:
    """Distances of few-dimensional points by their differences, which do not cancel; 0 has a derivative of 0."""
    squared = sum((v[:, None] - v) ** 2 for v in y.T)
    apart = squared > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1)), 0)


def _raw(y: Array, distances: Array) -> Array:
    return ((_gaps(y) - distances) ** 2).sum() / 2


def stress_of(y: Float[Array, "n dims"], distances: Float[Array, "n n"]) -> Array:
    """Kruskal's stress-1, the root of the squared errors over the squared distances that were asked for."""
    total = (distances**2).sum()
    return jnp.sqrt(2 * _raw(y, distances) / jnp.where(total > 0, total, 1))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def metric_mds(distances: Float[Array, "n n"], start: Float[Array, "n dims"], max_iter: int, tol: float) -> Scaled:
    """Points whose distances are nearest to those given, by relaxed SMACOF steps from a start, centred.

    Ends where a step moves the points by less than `tol` of their spread (root mean squares). The derivative is that of
    the minimum, modulo rigid motions: along these the points do not move.
    """

    def guttman(y: Array) -> Array:
        gaps = _gaps(y)
        ratio = jnp.where(gaps > 0, distances / jnp.where(gaps > 0, gaps, 1), 0)
        return jnp.stack([(ratio * (v[:, None] - v)).sum(1) / len(y) for v in y.T], 1)

    def going(state: tuple[Array, Array, Array]) -> Array:
        return state[1] & (state[2] < max_iter)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        y, _, i = state
        change = guttman(y) - y
        return y + _RELAXED * change, (change**2).sum() > tol**2 * (y**2).sum(), i + 1

    gaps = _gaps(start)
    norm = (gaps**2).sum()
    scale = (gaps * distances).sum() / jnp.where(norm > 0, norm, 1)
    begin = ((start - start.mean(0)) * scale, jnp.asarray(True), jnp.asarray(0))
    y, _, steps = lax.while_loop(going, step, begin)
    return Scaled(guttman(y), steps)


def _forward(distances: Array, start: Array, max_iter: int, tol: float) -> tuple[Scaled, tuple[Array, Array]]:
    found = metric_mds(distances, start, max_iter, tol)
    return found, (distances, found.points)


def _backward(max_iter: int, tol: float, saved: tuple[Array, Array], cotangent: Scaled) -> tuple[Array, Array]:
    """At the minimum the slope of the stress stays 0: one solve with its second derivatives, by conjugate gradients."""
    distances, y = saved
    slope = jax.grad(_raw)
    motions = _rotations(y)

    def across(v: Array) -> Array:
        v = v - v.mean(0)
        return v - (motions @ (motions.T @ v.ravel())).reshape(v.shape) if motions.shape[1] else v

    def curvature(v: Array) -> Array:
        return across(jax.jvp(lambda p: slope(p, distances), (y,), (across(v),))[1])

    target = across(cotangent.points)
    precise = 1e-12 if y.dtype == jnp.float64 else 1e-5
    solved, _ = cg(curvature, target, tol=precise, maxiter=_CG_STEPS)
    (by_distance,) = jax.vjp(lambda d: slope(y, d), distances)[1](-across(solved))
    return by_distance, jnp.zeros_like(y)


def _rotations(y: Array) -> Array:
    """An orthonormal basis (n * dims, planes) of the motions that rotations make."""
    n, dims = y.shape
    turns = [jnp.zeros_like(y).at[:, b].set(y[:, a]).at[:, a].set(-y[:, b]) for a, b in combinations(range(dims), 2)]
    if not turns:
        return jnp.zeros((n * dims, 0), y.dtype)
    return jnp.linalg.qr(jnp.stack([turn.ravel() for turn in turns], 1))[0]


metric_mds.defvjp(_forward, _backward)
