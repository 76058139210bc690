"""Genes that switch on or off along pseudotime: a sigmoid against a constant (switchDE)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from scdiffx._core.counts import Matrix, column_sums, dense, scale_rows, take_columns
from scdiffx._core.fields import buffer, operator, replace, static

__all__ = ["SwitchDE", "SwitchDEResult"]

# Starts of the search (strength, time), in units of the range of pseudotime. Where the strength is small all times are
# alike, but without such starts the search for a gene that hardly changes would set out in the wrong direction.
_STARTS = [(4.0**i, 0.5) for i in range(-5, 0)] + [(2.0**i, j / 16) for i in range(-1, 7) for j in range(17)]
# The sigmoid is 1 / (1 + exp(-z)) with z linear in pseudotime; at its first and last value z stays within this.
_LARGEST = 100.0
_BLOCK_GENES = 128
# The search for a gene ends where a Newton step would lower its squares by less than this share; there the steps get
# shorter quadratically, and a few more cost little.
_ENOUGH = 1e-8
_LAST_STEPS = 4
# Smallest eigenvalue that the scaled Hessian of a step has.
_DEFINITE = 1e-6
_MAX_STEPS = 30
_NULL_GENES = 256
_NULL_WINDOW = 64


class SwitchDEResult(NamedTuple):
    """Per gene, for the best sigmoid ``level / (1 + exp(-strength (t - time)))``.

    `time` is the switch time, `strength` its rate (below 0 for genes that switch off), `level` what the sigmoid
    approaches. `statistic` is twice the log likelihood ratio to a constant, with its `pvalue`. `converged` is false
    where the search used up its steps: where a step between two of few distinct times has no best strength.
    """

    time: Float[Array, " genes"]
    strength: Float[Array, " genes"]
    level: Float[Array, " genes"]
    statistic: Float[Array, " genes"]
    pvalue: Float[Array, " genes"]
    converged: Bool[Array, " genes"]


@operator
class SwitchDE:
    """Fit ``level / (1 + exp(-strength (t - time)))`` to each gene by least squares (Campbell and Yau 2017).

    The level is eliminated (variable projection), so that two parameters a gene are left. The search starts at the best
    of 282 pairs, which all genes share, and takes Newton steps. The time stays within the range of pseudotime, and
    ``strength (t - time)`` within 100 there: what is steeper is a step. Cells without finite pseudotime are left out.

    Without a `null` the statistic counts as chi-squared with 2 degrees of freedom. That is not its distribution: a
    constant gene has no switch time, and how far the second parameter can follow the noise depends on the gene's mean
    in units of its standard error. `init` fits up to 256 genes, spread evenly over that ratio, to `n_permutations`
    shuffled pseudotimes, and matches mean and variance of a scaled chi-squared to the statistics of the 64 genes around
    each. `null` holds the logarithm of the ratio, the scale and the degrees of freedom (3, genes); between these genes
    they are interpolated.

    Derivatives are those of the minimum, by the implicit function theorem; what is at its bound stays there.
    """

    null: Array | None = buffer(default=None)
    n_permutations: int = static(default=20)

    def init(self, x: Matrix, t: Float[Array, " cells"], key: Array | None = None) -> SwitchDE:
        if not self.n_permutations:
            return self
        ratio = np.asarray(_log_ratio(x, t))
        order = np.flatnonzero(np.isfinite(ratio))
        order = order[np.argsort(ratio[order], kind="stable")]
        if not len(order):
            return self
        few = min(_NULL_GENES, len(order))
        chosen = order[np.linspace(0, len(order) - 1, few).astype(int)]
        # Few genes are fitted all, with the program that is compiled for the call anyway.
        some = x.shape[1] > _NULL_GENES
        part, columns = (take_columns(x, jnp.asarray(chosen)), slice(None)) if some else (x, chosen)
        keys = jax.random.split(jax.random.key(0) if key is None else key, self.n_permutations)
        found = [np.asarray(_fitted(part, jax.random.permutation(k, t)).statistic, np.float64) for k in keys]
        null = np.stack([ratio[chosen], *_matched(np.stack(found)[:, columns])])
        return replace(self, null=jnp.asarray(null, x.dtype))

    def __call__(self, x: Matrix, t: Float[Array, " cells"]) -> SwitchDEResult:
        result = _fitted(x, t)
        if self.null is None:
            return result._replace(pvalue=jnp.exp(-result.statistic / 2))
        ratio = jax.lax.stop_gradient(_log_ratio(x, t))
        at, scale, freedom = self.null
        scale, freedom = (jnp.interp(ratio, at, values) for values in (scale, freedom))
        return result._replace(pvalue=jax.scipy.special.gammaincc(freedom / 2, result.statistic / (2 * scale)))


def _matched(null: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and degrees of freedom with the mean and the variance of the genes around each gene."""
    genes = null.shape[1]
    width = min(_NULL_WINDOW, genes)
    first = np.clip(np.arange(genes) - width // 2, 0, genes - width)
    windows = [null[:, i : i + width] for i in first]
    mean, variance = (np.array([f(w) for w in windows]) for f in (np.mean, np.var))
    return variance / (2 * mean), 2 * mean**2 / variance


def _log_ratio(x: Matrix, t: Array) -> Array:
    """Logarithm of the mean in standard errors; infinite for genes that do not vary or are not there."""
    there = jnp.isfinite(t).astype(x.dtype)
    n = there.sum()
    x = scale_rows(x, there)
    mean = column_sums(x) / n
    square = column_sums(x, jnp.square) / n
    variance = square - mean**2
    varies = variance > 100 * jnp.finfo(x.dtype).eps * square
    return jnp.where(varies, jnp.log(mean * jnp.sqrt(n / jnp.where(varies, variance, 1))), jnp.inf)


@jax.jit
def _fitted(x: Matrix, t: Float[Array, " cells"]) -> SwitchDEResult:
    there = jnp.isfinite(t)
    first, last = (f(jnp.where(there, t, v)) for f, v in ((jnp.min, jnp.inf), (jnp.max, -jnp.inf)))
    span = jnp.where(last > first, last - first, 1)
    u = (jnp.where(there, t, first) - first) / span
    genes = x.shape[1]
    width = min(_BLOCK_GENES, genes)
    blocks = -(-genes // width)
    # The last block repeats the last gene.
    columns = jnp.minimum(jnp.arange(blocks * width), genes - 1).reshape(blocks, width)
    ends = jnp.stack([1 - u, u], 1) * there[:, None]
    starts = _starts(jax.lax.stop_gradient(u), there)

    def block(at: Array) -> SwitchDEResult:
        values = dense(take_columns(x, at))
        return _fit_block(values * there[:, None], ends, there, starts)

    found = jax.lax.map(jax.checkpoint(block), columns)
    found = SwitchDEResult(*(part.reshape(-1)[:genes] for part in found))
    return found._replace(time=first + span * found.time, strength=found.strength / span)


def _starts(u: Array, there: Array) -> tuple[Array, Array]:
    """The z of all rising starts at the first and the last time (2, starts), and their curves (cells, starts)."""
    k, time = np.array(_STARTS).T
    z = jnp.asarray(np.stack([-k * time, k * (1 - time)]), u.dtype)
    return z, jax.nn.sigmoid(z[0] + (z[1] - z[0]) * u[:, None]) * there[:, None]


def _start(x: Array, n: Array, starts: tuple[Array, Array]) -> Array:
    """The start with the largest share of squares for each gene, (2, genes)."""
    z, curve = starts
    total, along = x.sum(0), curve.T @ x
    length, size = (curve**2).sum(0)[:, None], curve.sum(0)[:, None]
    # A falling sigmoid is 1 minus a rising one.
    explained = jnp.stack([along**2 / length, (total - along) ** 2 / (n - 2 * size + length)])
    best = jnp.argmax(explained.reshape(-1, x.shape[1]), axis=0)
    rising = best < z.shape[1]
    return jnp.where(rising, 1, -1) * z[:, best % z.shape[1]]


class _Local(NamedTuple):
    """Half the sum of squares at z (2, genes), its gradient, Hessian (00, 01, 11) and the size of its diagonal (2)."""

    value: Array
    slope: Array
    bend: Array
    scale: Array


def _curve(z: Array, ends: Array) -> Array:
    """The sigmoids (cells, genes); 0 for cells that are left out."""
    return jax.nn.sigmoid(ends @ z) * ends.sum(1, keepdims=True)


def _level(s: Array, x: Array) -> Array:
    return (s * x).sum(0) / (s**2).sum(0)


def _slope(z: Array, x: Array, ends: Array) -> Array:
    s = _curve(z, ends)
    level = _level(s, x)
    return -level * (ends.T @ (s * (1 - s) * (x - level * s)))


def _local(z: Array, x: Array, ends: Array) -> _Local:
    s = _curve(z, ends)
    length = (s**2).sum(0)
    level = (s * x).sum(0) / length
    r = x - level * s
    p = s * (1 - s)
    products = jnp.stack([ends[:, 0] ** 2, ends[:, 0] * ends[:, 1], ends[:, 1] ** 2], 1)
    pr, sp = ends.T @ (p * r), ends.T @ (s * p)
    bend, scale = products.T @ (p * (1 - 2 * s) * r), products.T @ p**2
    # Mixed derivatives of the squares in the level and either z.
    mixed = level * sp - pr
    mixed = jnp.stack([mixed[0] ** 2, mixed[0] * mixed[1], mixed[1] ** 2])
    bend = level**2 * scale - level * bend - mixed / length
    return _Local((r**2).sum(0) / 2, -level * pr, bend, level**2 * scale[::2])


def _free(z: Array, slope: Array, side: Array) -> Array:
    """Which z can move downhill: those at a bound (0 or the largest) that the slope pushes against cannot."""
    inward = side * slope
    return ~(((side * z <= 0) & (inward >= 0)) | ((side * z >= _LARGEST) & (inward <= 0)))


def _scaled(here: _Local, free: Array) -> tuple[Array, Array, Array, Array]:
    """The Hessian of the free z (00, 01, 11) in units in which steps are of order 1, and these units (2, genes)."""
    # Without the units products of small curvatures would vanish in float32.
    unit = 1 / jnp.sqrt(jnp.maximum(here.scale, jnp.finfo(here.scale.dtype).tiny ** 0.5))
    a, c = (jnp.where(f, h * u * u, 1) for f, h, u in zip(free, here.bend[::2], unit, strict=True))
    return a, jnp.where(free.all(0), here.bend[1] * unit[0] * unit[1], 0), c, unit


def _smallest(here: _Local, free: Array) -> Array:
    """The smallest eigenvalue of the scaled Hessian of the free z."""
    a, b, c, _ = _scaled(here, free)
    return (a + c) / 2 - jnp.sqrt(((a - c) / 2) ** 2 + b**2)


def _newton(here: _Local, slope: Array, free: Array, shift: Any) -> Array:
    """The Newton step of the free z with the scaled Hessian shifted, which has to make it positive definite."""
    a, b, c, unit = _scaled(here, free)
    a, c, g = a + shift, c + shift, jnp.where(free, slope * unit, 0)
    return -unit * jnp.stack([c * g[0] - b * g[1], a * g[1] - b * g[0]]) / (a * c - b * b)


def _search(x: Array, ends: Array, z: Array) -> tuple[Array, _Local, Array, Array]:
    """The minimum near `z` by damped Newton steps within the bounds, what is free there, and which genes arrived."""
    enough = max(_ENOUGH, float(jnp.finfo(x.dtype).eps))
    # A rising sigmoid has z from below 0 to above 0, a falling one the other way.
    side = jnp.where(z[1] >= z[0], 1, -1) * jnp.asarray([[-1], [1]], x.dtype)

    def step(state: _State) -> _State:
        at = _local(state.proposed, x, ends)
        # Near a minimum the squares differ by less than their rounding, and Newton's own steps are better.
        better = (at.value < state.here.value) | state.trusted
        here = jax.tree.map(lambda new, old: jnp.where(better, new, old), at, state.here)
        z = jnp.where(better, state.proposed, state.z)
        lower = jnp.where(state.damping > 1e-3, state.damping / 8, 0)
        damping = jnp.where(better, lower, jnp.maximum(state.damping, 1e-2) * 4)
        free = _free(z, here.slope, side)
        smallest = _smallest(here, free)
        shift = jnp.maximum(_DEFINITE - smallest, 0)
        done = -(_newton(here, here.slope, free, shift) * here.slope).sum(0) <= enough * here.value
        trusted = done & (damping == 0) & (smallest > _DEFINITE)
        proposed = side * jnp.clip(side * (z + _newton(here, here.slope, free, shift + damping)), 0, _LARGEST)
        left = jnp.where(done.all(), state.left - 1, _LAST_STEPS)
        return _State(state.i + 1, left, z, here, proposed, damping, done, trusted)

    def going(state: _State) -> Array:
        return (state.i < _MAX_STEPS) & (state.left > 0)

    zeros = jnp.zeros(x.shape[1], x.dtype)
    nowhere = _Local(zeros + jnp.inf, jnp.zeros_like(z), jnp.zeros((3, *zeros.shape), x.dtype), jnp.zeros_like(z))
    start = _State(0, _LAST_STEPS, z, nowhere, z, zeros, zeros > 0, zeros > 0)
    end = jax.lax.while_loop(going, step, start)
    return end.z, end.here, _free(end.z, end.here.slope, side), end.done


class _State(NamedTuple):
    """Of the search: steps done and left, z and what is `here`, the `proposed` z, and whether the minimum is near."""

    i: Any
    left: Any
    z: Array
    here: _Local
    proposed: Array
    damping: Array
    done: Array
    trusted: Array


def _fit_block(x: Array, ends: Array, there: Array, starts: tuple[Array, Array]) -> SwitchDEResult:
    n = there.sum().astype(x.dtype)
    mean = x.sum(0) / n
    constant = (((x - mean) * there[:, None]) ** 2).sum(0)
    fixed_x, fixed_ends = jax.lax.stop_gradient((x, ends))
    varies = jax.lax.stop_gradient(constant) > n * (100 * jnp.finfo(x.dtype).eps * jnp.abs(mean)) ** 2
    z, here, free, done = _search(fixed_x, fixed_ends, _start(fixed_x, n, starts))
    free = free & (_smallest(here, free) > jnp.finfo(x.dtype).eps) & varies
    # The derivative of one more Newton step in the data is that of the minimum.
    step = _newton(here, _slope(z, x, ends), free, 0)
    z = z + (step - jax.lax.stop_gradient(step))
    s = _curve(z, ends)
    level = _level(s, x)
    squares = ((x - level * s) ** 2).sum(0)
    strength = z[1] - z[0]
    moves = varies & (strength != 0)
    statistic = n * jnp.log(jnp.where(varies, constant, 1) / jnp.where(varies, squares, 1))
    return SwitchDEResult(
        jnp.where(moves, -z[0] / jnp.where(moves, strength, 1), 0.5),
        jnp.where(moves, strength, 0),
        jnp.where(moves, level, 2 * mean),
        jnp.maximum(statistic, 0),
        jnp.ones_like(statistic),
        done | ~varies,
    )
