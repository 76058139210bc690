"""Trajectories by optimal transport between time points."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core import transport
from scdiffx._core.fields import buffer, learnable, operator, replace, static

__all__ = ["OTTrajectory", "OTTrajectoryResult", "OTTransport", "barycentric", "between", "birth_death", "interpolated"]

# How far marginals may be off, in sum.
_TOL = {"float32": 1e-4, "float64": 1e-9}
# The median of the cost is that among at most so many points of each side.
_MEDIAN_OF = 1024
# Waddington-OT's rates (Schiebinger et al. 2019): lower and upper end, centre and width of the logistic curve.
_BIRTH = (0.3, 1.7, 0.25, 0.5)
_DEATH = (0.3, 1.7, 0.1, 0.2)
_Z_LIMIT = 5.0


class OTTrajectoryResult(NamedTuple):
    """Couplings of each time point with the next, as what is needed to apply them.

    `f`: potential of a cell towards the next time point, 0 at the last. `g`: towards the one before, 0 at the first.
    `scale`: by what squared distances are divided. `growth`: descendants of a cell per unit of time; at the last time
    point what was assumed. `cost`: mean squared distance that mass moves. `iterations` and `error`: of the last round.
    """

    f: Float[Array, " cells"]
    g: Float[Array, " cells"]
    scale: Float[Array, " steps"]
    growth: Float[Array, " cells"]
    cost: Float[Array, " steps"]
    iterations: Int[Array, " steps"]
    error: Float[Array, " steps"]


@operator
class OTTrajectory:
    """Couple each time point with the next by unbalanced entropic optimal transport (Schiebinger et al. 2019).

    The cost is the squared Euclidean distance over its mean (`scale` "mean") or median, or over a number. `tau` says
    how firmly the marginals are held, that of the earlier and that of the later cells, 1 exactly: it stands for
    ``lambda / (lambda + epsilon)`` with the weight lambda of the Kullback-Leibler divergence. Cells of the earlier
    time point count by their growth over the step; in each of `rounds` after the first, by the growth that the coupling
    before gave them. A third input is the growth per unit of time, or the expression of the genes that it follows from:
    `gene_sets` is then the number of genes of proliferation and of apoptosis.

    `epsilon` can be learned. Potentials are solved for by ott-jax and differentiated implicitly; no matrix of cells by
    cells is held.
    """

    epsilon: float | Array = learnable(default=0.05, constraint="positive")
    cells: tuple[Array, ...] | None = buffer(default=None, structure=True)
    tau: tuple[float, float] = static(default=(1.0, 1.0))
    scale: str | float = static(default="mean")
    rounds: int = static(default=1)
    gene_sets: tuple[int, int] | None = static(default=None)
    tol: float | None = static(default=None)
    max_iter: int = static(default=2000)

    def init(self, z: Array, time: Array, growth: Array | None = None, key: Array | None = None) -> OTTrajectory:
        # Loading ott changes settings that compiled functions depend on: not while one is being compiled.
        import scdiffx.ops._sinkhorn  # noqa: F401

        return replace(self, cells=time_points(time))

    def threshold(self, dtype: Any) -> float:
        """How far the marginals of a coupling may be off."""
        return _TOL[jnp.dtype(dtype).name] if self.tol is None else self.tol

    def __call__(
        self, z: Float[Array, "cells dims"], time: Float[Array, " cells"], growth: Array | None = None
    ) -> OTTrajectoryResult:
        from scdiffx.ops._sinkhorn import Settings

        cells = _found(self.cells, "OTTrajectory")
        settings = Settings(self.tau, self.threshold(z.dtype), self.max_iter)
        epsilon = jnp.asarray(self.epsilon, z.dtype)
        prior = _log_growth(growth, self.gene_sets, z)
        f, g, growing = jnp.zeros(len(z), z.dtype), jnp.zeros(len(z), z.dtype), prior
        steps = []
        for here, there in pairwise(cells):
            x, y, scale = between(z[here], z[there], self.scale)
            span = (time[there[0]] - time[here[0]]).astype(z.dtype)
            step = _couple(x, y, prior[here] * span, epsilon, settings, self.rounds)
            f, g = f.at[here].set(step.f), g.at[there].set(step.g)
            growing = growing.at[here].set(step.log_growth / span)
            steps.append((scale, step.cost * scale, step.iterations, step.error))
        scales, cost, iterations, error = (jnp.stack(part) for part in zip(*steps, strict=True))
        return OTTrajectoryResult(f, g, scales, jnp.exp(growing), cost, iterations, error)


class _Step(NamedTuple):
    f: Array
    g: Array
    log_growth: Array
    cost: Array
    iterations: Array
    error: Array


def _couple(x: Array, y: Array, log_growth: Array, epsilon: Array, settings: Any, rounds: int) -> _Step:
    """Couple two time points. The growth of a step keeps the mean that was assumed: only ratios can be inferred."""
    from scdiffx.ops._sinkhorn import potentials

    n, m = len(x), len(y)
    mean = jax.nn.logsumexp(log_growth) - np.log(n)
    log_b = jnp.full(m, -np.log(m), x.dtype)
    what = jnp.column_stack([jnp.ones(m, x.dtype), y, jnp.square(y).sum(1)])

    def once(start: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], Any]:
        f, g, log_growth = start
        log_a = log_growth - jax.nn.logsumexp(log_growth)
        f, g, iterations, error = potentials(x, y, log_a, log_b, epsilon, f, g, settings)
        moved = transport.apply(x, y, f, g, epsilon, what)
        log_growth = jnp.log(moved[:, 0]) - jnp.log(moved[:, 0].sum()) + np.log(n) + mean
        return (f, g, log_growth), (moved, iterations, error)

    start = (jnp.zeros(n, x.dtype), jnp.zeros(m, x.dtype), log_growth)
    (f, g, log_growth), traced = jax.lax.scan(once, start, length=rounds)
    moved, iterations, error = (part[-1] for part in traced)
    sums = moved[:, 0]
    squares = sums @ jnp.square(x).sum(1) + moved[:, -1].sum() - 2 * (x * moved[:, 1:-1]).sum()
    return _Step(f, g, log_growth, squares / sums.sum(), iterations, error)


@operator
class OTTransport:
    """Carry values of cells along couplings: back in time to what becomes of a cell, or forth to what it came from.

    Going back, a cell gets the mean of the values of its descendants, weighted by the coupling; going forth, that of
    its ancestors. `values` are numbers of cells, or numbers of groups, from 0, of which there are `n_groups`. Only
    those of the time point `start` count, and cells beyond it get NaN.
    """

    cells: tuple[Array, ...] | None = buffer(default=None, structure=True)
    forth: bool = static(default=False)
    start: int | None = static(default=None)
    n_groups: int | None = static(default=None)

    def init(self, z: Array, time: Array, coupling: Any, values: Array, key: Array | None = None) -> OTTransport:
        cells = time_points(time)
        start = (0 if self.forth else len(cells) - 1) if self.start is None else self.start
        return replace(self, cells=cells, start=start)

    def __call__(
        self, z: Float[Array, "cells dims"], time: Array, coupling: dict[str, Array], values: Array
    ) -> Float[Array, "cells columns"]:
        cells = _found(self.cells, "OTTransport")
        if self.start is None:
            raise ValueError("OTTransport needs its time points: call `op = op.init(z, time, coupling, values)` first")
        wide = values if self.n_groups is None else jax.nn.one_hot(values, self.n_groups, dtype=z.dtype)
        wide = (wide if wide.ndim == 2 else wide[:, None]).astype(z.dtype)
        carried = wide[cells[self.start]]
        result = jnp.full(wide.shape, jnp.nan, z.dtype).at[cells[self.start]].set(carried)
        step = 1 if self.forth else -1
        stop = len(cells) if self.forth else -1
        for k in range(self.start + step, stop, step):
            carried = self._carry(z, coupling, cells[k - step], cells[k], min(k, k - step), carried)
            result = result.at[cells[k]].set(carried)
        return result

    def _carry(
        self, z: Array, coupling: dict[str, Array], source: Array, target: Array, pair: int, values: Array
    ) -> Array:
        """Means of the values of the cells `source`, for each of the cells `target`."""
        scale = coupling["scale"][pair]
        x, y, _ = between(z[target], z[source], scale)
        h = coupling["f" if self.forth else "g"][source]
        epsilon = jnp.asarray(coupling["epsilon"], z.dtype)
        # The mean does not depend on the potential of the target: with this one, weights sum to 1.
        level = -epsilon * transport.log_sums(x, y, h, epsilon)
        return transport.apply(x, y, level, h, epsilon, values)


def time_points(time: Array) -> tuple[Array, ...]:
    """The cells of each time point, earliest first."""
    host = np.asarray(time)
    points = np.unique(host)
    if len(points) < 2:
        raise ValueError(f"there must be at least two time points, got {points.tolist()}")
    return tuple(jnp.asarray(np.flatnonzero(host == point), jnp.int32) for point in points)


def between(x: Array, y: Array, scale: str | float | Array) -> tuple[Array, Array, Array]:
    """Both point clouds such that their squared distance is the cost, and by what it was divided."""
    # Where the origin lies does not matter, but products lose digits far away from it.
    centre = jax.lax.stop_gradient(y.mean(0))
    x, y = x - centre, y - centre
    if not isinstance(scale, str):
        size = jnp.asarray(scale, x.dtype)
    elif scale == "mean":
        size = jnp.square(x).sum(1).mean() + jnp.square(y).sum(1).mean() - 2 * x.mean(0) @ y.mean(0)
    else:
        some, others = (v[:: -(-len(v) // _MEDIAN_OF)] for v in (x, y))
        size = jnp.median(jnp.square(some).sum(1)[:, None] + jnp.square(others).sum(1) - 2 * some @ others.T)
    # Points that are all the same are at distance 0 on any scale.
    size = jnp.where(size > 0, size, 1)
    return x / jnp.sqrt(size), y / jnp.sqrt(size), size


def interpolated(
    x: Float[Array, "n dims"],
    y: Float[Array, "m dims"],
    f: Float[Array, " n"],
    g: Float[Array, " m"],
    epsilon: Array,
    share: Array,
    key: Array,
    n_samples: int,
) -> Float[Array, "samples dims"]:
    """Points at a share of the way between pairs drawn from a coupling; a source counts by its growth so far."""
    growth = f / epsilon + transport.log_sums(x, y, g, epsilon)
    for_source, for_target = jax.random.split(key)
    # One draw from each of equal parts of the mass leaves less to chance than independent draws.
    up_to = jnp.cumsum(jax.nn.softmax(share * growth))
    at = (jnp.arange(n_samples) + jax.random.uniform(for_source, dtype=x.dtype)) / n_samples
    i = jnp.minimum(jnp.searchsorted(up_to, at * up_to[-1]), len(x) - 1)
    j = transport.draw(x[i], y, g, epsilon, jax.random.uniform(for_target, (n_samples,), x.dtype))
    return (1 - share) * x[i] + share * y[j]


def barycentric(x: Array, y: Array, g: Array, epsilon: Array, share: Array) -> Float[Array, "n dims"]:
    """Every point at a share of the way to the mean of where the coupling sends it."""
    level = -epsilon * transport.log_sums(x, y, g, epsilon)
    return (1 - share) * x + share * transport.apply(x, y, level, g, epsilon, y)


def birth_death(expression: Float[Array, "cells genes"], gene_sets: tuple[int, int]) -> Float[Array, " cells"]:
    """Logarithm of Waddington-OT's growth: birth less death, each a logistic curve of the score of a gene set.

    A score is the mean of the z-scores of the genes, each cut at 5. The first `gene_sets[0]` genes are those of
    proliferation, the others of apoptosis; a set without genes has no part.
    """
    deviation = expression - expression.mean(0)
    variance = jnp.square(deviation).mean(0)
    z = jnp.clip(deviation / jnp.sqrt(jnp.where(variance > 0, variance, 1)), -_Z_LIMIT, _Z_LIMIT)
    birth, death = z[:, : gene_sets[0]], z[:, gene_sets[0] :]
    rate = jnp.zeros(len(expression), expression.dtype)
    for sign, part, (low, high, centre, width) in ((1, birth, _BIRTH), (-1, death, _DEATH)):
        if part.shape[1]:
            rate = rate + sign * (low + (high - low) * jax.nn.sigmoid(4 / width * (part.mean(1) - centre)))
    return rate


def _log_growth(growth: Array | None, gene_sets: tuple[int, int] | None, z: Array) -> Array:
    if growth is None:
        return jnp.zeros(len(z), z.dtype)
    if gene_sets is None:
        return jnp.log(growth.astype(z.dtype))
    return birth_death(growth.astype(z.dtype), gene_sets)


def _found(cells: tuple[Array, ...] | None, name: str) -> tuple[Array, ...]:
    if cells is None:
        raise ValueError(f"{name} needs its time points: call `op = op.init(z, time, ...)` first")
    return cells
