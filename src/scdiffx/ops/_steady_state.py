"""RNA velocity from the ratio of unspliced to spliced counts in the steady state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scdiffx._core.counts import Matrix, dense
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.graph import Graph
from scdiffx.ops._moments import averaged, by_genes, neighbour_mean

__all__ = ["SteadyState", "SteadyStateResult", "extremes"]

# Maxima below this count as this when genes are scaled, as in scVelo.
_LEAST = 1e-3
_BLOCK = 256
# Residuals have at least this share of the variance.
_EXACT = 1e-6


class SteadyStateResult(NamedTuple):
    """Velocities and fits of the genes.

    `velocity` (cells, genes) in counts per splicing time; `variance` (cells, genes) of the second moments, where these
    are fitted; `gamma`, `ratio` (of the regression on extremes alone), `r2` and `genes` (1 where it fits) (genes,).
    """

    velocity: Float[Array, "cells genes"]
    variance: Float[Array, "cells genes"] | None
    gamma: Float[Array, " genes"]
    ratio: Float[Array, " genes"]
    r2: Float[Array, " genes"]
    genes: Float[Array, " genes"]


def extremes(ms: Any, mu: Any, percentile: float, *, spliced_too: bool = False) -> np.ndarray:
    """Which cells (cells, genes) lie in the upper tail of a gene: of the sum of both counts, each over its maximum.

    ``spliced_too`` adds those in the upper tail of the spliced counts.
    """
    ms, mu = np.asarray(ms), np.asarray(mu)
    out = np.empty(ms.shape, bool)
    for start in range(0, ms.shape[1], _BLOCK):
        s, u = ms[:, start : start + _BLOCK], mu[:, start : start + _BLOCK]
        total = s / np.maximum(s.max(0), _LEAST) + u / np.maximum(u.max(0), _LEAST)
        chosen = total >= np.percentile(total, percentile, axis=0)
        if spliced_too:
            chosen |= s >= np.percentile(s, percentile, axis=0)
        out[:, start : start + _BLOCK] = chosen
    return out


def _ratio(x: Array, y: Array) -> Array:
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)


def _slope(x: Array, y: Array, weight: Array | float = 1.0) -> Array:
    """Least squares without offset; 0 where x is 0."""
    xx, xy = (weight * x * x).sum(0), (weight * x * y).sum(0)
    return _ratio(xy, xx)


def _variance(x: Array) -> Array:
    return ((x - x.mean(0)) ** 2).mean(0)


@operator
class SteadyState:
    """Velocity as the deviation of unspliced counts from those of the steady state (La Manno 2018; scVelo).

    The steady-state ratio of each gene is a regression on its extreme cells, those of the upper tail beyond the
    `percentile`, which `init` finds and which are held constant. With ``stochastic=True`` it is refined by generalised
    least squares over the first and second moments (Bergen 2020) for the genes that fit. `change` (0 at first) is the
    learnable change of the logarithm of each ratio, `power` that of :class:`Moments` for the second moments. A gene
    fits if its r2, on the regression itself or with ``adjusted=True`` on one through all cells, and its ratio are above
    the two numbers of `least`.
    """

    change: Array | None = learnable(default=None)
    power: float | Array | None = learnable(default=0.0)
    selected: Array | None = buffer(default=None, structure=True)
    extreme: Array | None = buffer(default=None, structure=True)
    percentile: float = static(default=95.0)
    stochastic: bool = static(default=False)
    adjusted: bool = static(default=False)
    least: tuple[float, float] = static(default=(0.01, 0.01))

    def init(
        self,
        ms: Array,
        mu: Array,
        spliced: Matrix | None = None,
        unspliced: Matrix | None = None,
        graph: Graph | None = None,
        mask: Array | None = None,
        key: Array | None = None,
    ) -> SteadyState:
        op = replace(
            self,
            change=jnp.zeros(ms.shape[1], ms.dtype),
            selected=jnp.asarray(extremes(ms, mu, self.percentile)),
        )
        if self.stochastic:
            return replace(op, extreme=jnp.asarray(extremes(ms, mu, self.percentile, spliced_too=True)))
        return replace(op, power=None)

    def __call__(
        self,
        ms: Float[Array, "cells genes"],
        mu: Float[Array, "cells genes"],
        spliced: Matrix | None = None,
        unspliced: Matrix | None = None,
        graph: Graph | None = None,
        mask: Float[Array, " genes"] | None = None,
    ) -> SteadyStateResult:
        if self.selected is None or self.change is None:
            raise ValueError("SteadyState needs the extreme cells: call `op = op.init(ms, mu, ...)` first")
        mean = None
        if self.stochastic:
            if spliced is None or unspliced is None or graph is None or self.power is None:
                raise ValueError("the stochastic model needs `spliced`, `unspliced` and `graph` for the second moments")
            mean = neighbour_mean(graph, self.power)
        raw = (None, None) if spliced is None or unspliced is None else (dense(spliced), dense(unspliced))
        mask = jnp.ones(ms.shape[1], ms.dtype) if mask is None else mask

        def first(ms: Array, mu: Array, selected: Array, change: Array, mask: Array) -> tuple[Array, Array, Array]:
            ratio = _slope(ms, mu, selected) * jnp.exp(change)
            residual = mu - (_slope(ms, mu) if self.adjusted else ratio) * ms
            total = _variance(mu)
            r2 = jnp.where(total > 0, 1 - _ratio((residual**2).mean(0), total), 0)
            fits = (r2 > self.least[0]) & (ratio > self.least[1]) & (ms > 0).any(0) & (mu > 0).any(0) & (mask > 0)
            return ratio, r2, fits

        ratio, r2, fits = by_genes(first, ms, mu, self.selected, self.change, mask)
        # scVelo's way out where hardly any gene fits: the best fifth.
        genes = jnp.where(fits.sum() < 2, r2 > jnp.percentile(r2, 80), fits).astype(ms.dtype)
        if mean is None:
            return SteadyStateResult(mu - ratio * ms, None, ratio, ratio, r2, genes)

        def refined(ms: Array, mu: Array, s: Array, u: Array, extreme: Array, ratio: Array, *genewise: Array) -> Any:
            change, genes = genewise
            second, both = 2 * averaged(mean, s**2) - ms, 2 * averaged(mean, s * u) + mu
            # Each moment weighs by the variance of its own residual.
            noise = _variance(mu - ratio * ms), _variance(both - _slope(second, both) * second)
            slope = _generalised((ms, mu, extreme), (second, both, 1), noise)
            gamma = jnp.where(genes > 0, slope * jnp.exp(change), ratio)
            return gamma, ((both - 2 * ms * mu) - gamma * (second - 2 * ms**2)) * genes

        gamma, variance = by_genes(refined, ms, mu, *raw, self.extreme, ratio, self.change, genes)
        return SteadyStateResult(mu - gamma * ms, variance, gamma, ratio, r2, genes)


def _generalised(first: Any, second: Any, noise: tuple[Array, Array]) -> Array:
    """The common slope of two regressions, each weighed by the inverse variance of its residuals."""
    xx = xy = jnp.zeros(noise[0].shape, noise[0].dtype)
    for (x, y, weight), variance in zip((first, second), noise, strict=True):
        # A gene with counts in one or two cells is fitted exactly, up to rounding.
        variance = jnp.maximum(variance, _EXACT * _variance(y))
        precision = 1 / jnp.where(variance > 0, variance, 1)
        xx, xy = xx + precision * (weight * x * x).sum(0), xy + precision * (weight * x * y).sum(0)
    return _ratio(xy, xx)
