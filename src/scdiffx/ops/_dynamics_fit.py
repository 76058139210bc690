"""Expectation-maximisation of the dynamical model, for many genes at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scdiffx.ops._moments import averaged
from scdiffx.ops._splicing import Rates, at_time, solution, time_from_start, time_from_switch, unspliced

__all__ = ["Cells", "Fitted", "fit_genes"]

# Jumps of time between consecutive cells: beyond three times this percentile they are cut, at most so many a gene.
_PERCENTILE = 99.5
_JUMPS = 16
_SORTED = 32  # genes
_UNROLL = 4
_PARTS = 6  # of a block, where only some of its genes are wanted


class Cells(NamedTuple):
    """Counts of a block of genes (cells, genes), weights of the cells in the loss, spreads, the neighbours' mean.

    `moments` are the means over the neighbours of both counts and of their squares.
    """

    u: Float[Array, "cells genes"]
    s: Float[Array, "cells genes"]
    weight: Bool[Array, "cells genes"]
    std_u: Float[Array, " genes"]
    std_s: Float[Array, " genes"]
    mean: Any
    moments: tuple[Array, Array, Array, Array]

    @classmethod
    def of(cls, u: Array, s: Array, weight: Array, std_u: Array, std_s: Array, mean: Any) -> Cells:
        return cls(u, s, weight, std_u, std_s, mean, _moments(mean, u, s))


@jax.jit
def _moments(mean: Any, u: Array, s: Array) -> tuple[Array, Array, Array, Array]:
    return averaged(mean, u), averaged(mean, s), averaged(mean, u**2), averaged(mean, s**2)


class State(NamedTuple):
    """Rates with the times they assign, whether transcription is on, and the loss."""

    rates: Rates
    t: Float[Array, "cells genes"]
    on: Int[Array, "cells genes"]
    loss: Float[Array, " genes"]


class Assigned(NamedTuple):
    """What rates give for all genes, and the times since the start and since the switch."""

    state: State
    tau: tuple[Float[Array, "cells genes"], Float[Array, "cells genes"]]


class Fitted(NamedTuple):
    """What the fit of a block of genes found: `tau` since the start and since the switch, `losses` after each stage."""

    rates: Rates
    t: Array
    tau: tuple[Array, Array]
    likelihood: Array
    variance: Array
    losses: Array


def _jumps(tau: np.ndarray, on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where times of each gene jump, among cells that are on and those that are off, and how far (2, jumps, genes).

    Times come and go as bits. On the host: NumPy sorts thirty times faster than XLA does on a processor.
    """
    bits = np.ascontiguousarray(tau)
    times: np.ndarray = bits.view(np.float32 if bits.ndim == 2 else np.float64).reshape(bits.shape[0], -1)
    genes = times.shape[1]
    where: np.ndarray = np.full((2, _JUMPS, genes), np.inf, times.dtype)
    size: np.ndarray = np.zeros((2, _JUMPS, genes), times.dtype)
    # A few genes at a time stay in the cache.
    for i in range(0, genes, _SORTED):
        part = slice(i, i + _SORTED)
        _jumps_of(times[:, part], np.asarray(on)[:, part], where[..., part], size[..., part])
    return tuple(x.view(np.uint32).reshape(*x.shape, *bits.shape[2:]) for x in (where, size))  # type: ignore


def _jumps_of(tau: np.ndarray, on: np.ndarray, where: np.ndarray, size: np.ndarray) -> None:
    """Write the jumps of a few genes."""
    ordered, on = np.ascontiguousarray(tau.T), np.ascontiguousarray(on.T)
    genes, n = ordered.shape
    # Cells that are on become negative and sort first, the latest before the others.
    np.negative(ordered, out=ordered, where=on)
    ordered.sort(1)
    count, row = on.sum(1), np.arange(genes)
    is_on = np.arange(n) < count[:, None]
    gap = np.diff(ordered, axis=1, append=0)
    steps = np.where(is_on, gap, np.roll(gap, 1, axis=1))
    some, rest = count > 0, count < n
    first_on, first_off = (row[some], count[some] - 1), (row[rest], count[rest])
    steps[first_on], steps[first_off] = -ordered[first_on], ordered[first_off]
    at = (n - 1) * _PERCENTILE / 100
    low, high = int(at), min(int(at) + 1, n - 1)
    top = np.partition(steps, (low, high), axis=1)
    gene, which = np.nonzero(steps > 3 * (top[:, low] + (top[:, high] - top[:, low]) * (at - low))[:, None])
    side = np.where(is_on[gene, which], 0, 1)
    # From the earliest to the latest that is on, then of those that are off.
    order = np.lexsort((np.where(side == 0, count[gene] - 1 - which, which), gene))
    gene, which, side = gene[order], which[order], side[order]
    rank = np.arange(len(gene)) - np.searchsorted(gene, gene)
    few = rank < _JUMPS
    gene, which, side, rank = (x[few] for x in (gene, which, side, rank))
    where[side, rank, gene], size[side, rank, gene] = np.abs(ordered[gene, which]), steps[gene, which]


def _without_jumps(tau: Array, tau_off: Array, on: Array) -> tuple[Array, Array]:
    # As bits: in the threads of callbacks JAX would round double precision.
    bits = jax.lax.bitcast_convert_type(jnp.where(on, tau, tau_off), jnp.uint32)
    shape = jax.ShapeDtypeStruct((2, _JUMPS, *bits.shape[1:]), jnp.uint32)
    found = jax.pure_callback(_jumps, (shape, shape), bits, on)
    where, size = (jax.lax.bitcast_convert_type(x, tau.dtype) for x in found)

    def cut(i: Array, both: tuple[Array, Array]) -> tuple[Array, Array]:
        a, b = both
        return a - jnp.where(tau >= where[0, i], size[0, i], 0), b - jnp.where(tau_off >= where[1, i], size[1, i], 0)

    most = (size > 0).any(2).sum(1).max()
    # Slots are filled by rank over both sides together.
    used = jnp.where((size > 0).any((0, 2)), jnp.arange(_JUMPS) + 1, 0).max()
    a, b = jax.lax.fori_loop(0, jnp.maximum(used, most), cut, (tau, tau_off))
    return jnp.where(on, a, tau), jnp.where(on, tau_off, b)


def _distances(c: Cells, u: Array, r: Rates, tau: Array, tau_off: Array, end: tuple[Array, Array]) -> tuple[Any, Any]:
    """Squared distances to the curves after the switch and before it, in standard deviations."""
    std_u = c.std_u / r.scaling
    before, after = solution(tau, 0.0, 0.0, r.alpha, r.beta, r.gamma), solution(tau_off, *end, 0.0, r.beta, r.gamma)
    return tuple(((u - x) / std_u) ** 2 + ((c.s - y) / c.std_s) ** 2 for x, y in (after, before))  # type: ignore


def _times(c: Cells, u: Array, r: Rates, end: tuple[Array, Array], project: bool) -> tuple[Array, Array]:
    tau = jnp.clip(time_from_start(u, c.s, r), 0, r.switch)
    tau_off = time_from_switch(u, c.s, *end, r)
    longest = jnp.where(c.s > 0, tau_off, -jnp.inf).max(0)
    tau_off = jnp.clip(tau_off, 0, longest)
    if not project:
        return tau, tau_off
    projected = _projected(c, u, r, end)
    slow = r.beta < r.gamma
    return jnp.where(slow, projected[0], tau), jnp.where(slow, projected[1], tau_off)


def _projected(c: Cells, u: Array, r: Rates, end: tuple[Array, Array]) -> tuple[Array, Array]:
    """The nearest of several hundred points on either curve."""
    n = int(np.clip(u.shape[0] // 5, 200, 500))
    least = jnp.where(c.s > 0, u, jnp.inf).min(0)
    horizon = -jnp.log(jnp.clip(least / end[0], 1e-6, 1 - 1e-6)) / r.beta

    def nearest(horizon: Array, start: tuple[Any, Any], alpha: Any, first: int) -> Array:
        def step(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            tau = horizon * (i / (n - 1))
            x, y = solution(tau, *start, alpha, r.beta, r.gamma)
            distance = (u - x) ** 2 + (c.s - y) ** 2
            closer = distance < best[0]
            return jnp.where(closer, distance, best[0]), jnp.where(closer, tau, best[1])

        start_value = (jnp.full(u.shape, jnp.inf, u.dtype), jnp.zeros_like(u))
        # Unrolled, so that counts are read once for several points.
        return jax.lax.fori_loop(first, n, step, start_value, unroll=_UNROLL)[1]

    return nearest(r.switch, (0.0, 0.0), r.alpha, 0), nearest(horizon, end, 0.0, 1)


def _from_point(c: Cells, u: Array | float, s: Array | float) -> Array:
    """The mean over the neighbours of the squared distances to a point, in standard deviations."""
    mean_u, mean_s, square_u, square_s = c.moments
    return (square_u - 2 * u * mean_u + u**2) / c.std_u**2 + (square_s - 2 * s * mean_s + s**2) / c.std_s**2


def _assign(c: Cells, r: Rates, project: bool) -> tuple[Array, Array, Array, Array]:
    """Times since start and switch, the time of each cell, and whether transcription is on there.

    Means over neighbours are what takes time, so each is taken once: of the difference where that decides, and of
    distances to a single point from those of the counts.
    """
    u = c.u / r.scaling
    end = solution(r.switch, 0.0, 0.0, r.alpha, r.beta, r.gamma)
    tau, tau_off = _times(c, u, r, end, project)
    off, on = _distances(c, u, r, tau, tau_off, end)
    tau, tau_off = _without_jumps(tau, tau_off, averaged(c.mean, on - off) < 0)
    after, before = (averaged(c.mean, d) for d in _distances(c, u, r, tau, tau_off, end))
    steady = _from_point(c, r.scaling * r.alpha / r.beta, r.alpha / r.gamma)
    best = jnp.argmin(jnp.stack([after, before, _from_point(c, 0.0, 0.0), steady]), axis=0)
    t = jnp.where(best == 0, tau_off + r.switch, jnp.where(best == 1, tau, jnp.where(best == 2, 0, r.switch)))
    return tau, tau_off, t, ((best == 1) | (best == 2)).astype(jnp.int32)


def _residuals(c: Cells, r: Rates, t: Array, ratio: Array) -> tuple[Array, Array, Array]:
    """Distances of unspliced and spliced counts, and the regularisation of the steady-state ratio (nan for none)."""
    u, s, _ = at_time(t, r)
    away = jnp.where(jnp.isnan(ratio), 0, r.gamma / r.beta - ratio) * c.s / c.std_s
    return (u - c.u / r.scaling) / c.std_u * r.scaling, (s - c.s) / c.std_s, away


@jax.jit
def _loss(c: Cells, r: Rates, t: Array, ratio: Array) -> Array:
    parts = _residuals(c, r, t, ratio)
    return jnp.where(c.weight, sum(p**2 for p in parts), 0).sum(0)


@partial(jax.jit, static_argnames="project")
def _evaluate(c: Cells, r: Rates, ratio: Array, project: bool) -> Assigned:
    tau, tau_off, t, on = _assign(c, r, project)
    return Assigned(State(r, t, on, _loss(c, r, t, ratio)), (tau, tau_off))


@partial(jax.jit, static_argnames="project")
def _evaluate_at(genes: Array, into: Assigned, c: Cells, r: Rates, ratio: Array, project: bool) -> Assigned:
    """Evaluate a few genes, numbers beyond the last stand for none, and write what they give into that of all."""

    def few(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.at[..., genes].get(mode="clip"), tree)

    cells = few(c._replace(mean=None))._replace(mean=c.mean)
    found = _evaluate(cells, few(r), few(ratio), project)
    return jax.tree.map(lambda x, y: x.at[..., genes].set(y, mode="drop"), into, found)


@partial(jax.jit, static_argnames="names")
def _replaced(rates: Rates, values: Array, names: tuple[str, ...]) -> Rates:
    return rates._replace(**dict(zip(names, values, strict=True)))


@jax.jit
def _where(condition: Array, a: State, b: State) -> State:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


@jax.jit
def _earlier_switch(state: State, current: State) -> tuple[Array, Array]:
    """The last time at which transcription is on, and whether it is before the switch."""
    t, switch = current.t, current.rates.switch
    last = jnp.where(state.on == 1, t, -jnp.inf).max(0)
    sooner = (last > 0) & (last < switch)
    last = last + t.max(0) / t.shape[0] * (t == switch).sum(0)
    return jnp.where(sooner, last, switch), sooner


@jax.jit
def _takes(state: State, current: State, alternative: State, sooner: Array) -> Array:
    r, switch = current.rates, alternative.rates.switch
    fits = alternative.loss * 0.99 <= jnp.minimum(current.loss, state.loss)
    higher = unspliced(r.switch, 0.0, r.alpha, r.beta) * 0.99 < unspliced(switch, 0.0, r.alpha, r.beta)
    return sooner & (fits | higher)


class Fit:
    """The state of a block of genes while it is fitted, by scVelo's sequence of steps."""

    def __init__(self, cells: Cells, rates: Rates) -> None:
        self.cells = cells
        self.ratio = jnp.full_like(rates.alpha, jnp.nan)
        self.share = 1 / jnp.maximum(cells.weight.sum(0), 1)
        self.project = False
        # What is kept, and the same rates with the times that they are assigned now.
        self.last = _evaluate(cells, rates, self.ratio, False)
        self.state = self.present = self.last.state
        self.losses = [self.state.loss]

    def evaluate(self, rates: Rates, genes: np.ndarray | None = None) -> State:
        """What the rates give; given a mask of genes, for these alone, and anything for the others."""
        if self.project:
            # Only where degradation is faster than splicing are times projected, and that is what takes long.
            slow = np.asarray(rates.beta < rates.gamma)
            for project in (False, True):
                self._evaluate_some(rates, slow == project, project)
        elif genes is None:
            self.last = _evaluate(self.cells, rates, self.ratio, False)
        else:
            self._evaluate_some(rates, genes, False)
        return self.last.state

    def _evaluate_some(self, rates: Rates, genes: np.ndarray, project: bool) -> None:
        """A part of the block at a time, always of the same width: one program is compiled for all."""
        width = -(-len(genes) // (_PARTS * 16)) * 16
        found = np.flatnonzero(genes)
        for first in range(0, len(found), width):
            some = found[first : first + width]
            at = np.pad(some, (0, width - len(some)), constant_values=len(genes))
            self.last = _evaluate_at(jnp.asarray(at), self.last, self.cells, rates, self.ratio, project)

    def update(self, rates: Rates) -> None:
        """Take the rates for the genes where they lower the loss; then end transcription sooner where that fits."""
        same = rates is self.present.rates
        self._take(self.present if same else self.evaluate(rates), adjust=True)

    def _take(self, trial: State, adjust: bool) -> None:
        state = self.state
        better = trial.loss < state.loss
        current, new = _where(better, trial, self.present), _where(better, trial, state)
        if adjust:
            switch, sooner = _earlier_switch(state, current)
            alternative = self.evaluate(current.rates._replace(switch=switch), np.asarray(sooner))
            takes = _takes(state, current, alternative, sooner)
            current, new = _where(takes, alternative, current), _where(takes, alternative, new)
        self.state, self.present = new, current

    def project_times(self) -> None:
        """From now on times are assigned by projection, and taken where that lowers the loss."""
        self.project = True
        self.present = self.evaluate(self.state.rates)
        self._take(self.present, adjust=False)

    def simplex(self, names: tuple[str, ...], tolerance: float = 1e-4, refit_time: bool = True) -> None:
        """One step of Nelder and Mead's simplex in the rates of these names, as in SciPy; then update."""
        rates, t = self.state.rates, self.state.t

        def mse(x: Array, genes: np.ndarray | None = None) -> Array:
            at = _replaced(rates, x, names)
            loss = self.evaluate(at, genes).loss if refit_time else _loss(self.cells, at, t, self.ratio)
            return loss * self.share

        best = nelder_mead_step(mse, jnp.stack([getattr(rates, name) for name in names]), tolerance)
        self.update(_replaced(rates, best, names))
        self.losses.append(self.state.loss)

    def scan(self, name: str, sight: float, points: int) -> None:
        """Try several values around the present one."""
        start = getattr(self.state.rates, name)
        for offset in np.linspace(-1, 1, points) * sight:
            rates, value = self.state.rates, start * (1 + offset)
            if name == "scaling":
                rates = rates._replace(beta=rates.beta / rates.scaling * value)
            self.update(rates._replace(**{name: value}))


class Simplex(NamedTuple):
    """Corners (n + 1, n, genes), best first, their values, and which genes have converged."""

    corner: Array
    value: Array
    small: Array


@jax.jit
def _corners(x: Array) -> list[Array]:
    return [x, *(x.at[k].set(jnp.where(x[k] != 0, 1.05 * x[k], 0.00025)) for k in range(x.shape[0]))]


@jax.jit
def _sorted(corners: list[Array], values: list[Array], tolerance: float) -> tuple[Simplex, Array]:
    """The simplex, and its worst corner reflected in the centre of the others."""
    corner, value = jnp.stack(corners), jnp.stack(values)
    order = jnp.argsort(value, axis=0, stable=True)
    corner = jnp.take_along_axis(corner, order[:, None], 0)
    value = jnp.take_along_axis(value, order, 0)
    near = jnp.abs(corner[1:] - corner[0]).max((0, 1)) <= tolerance
    small = near & (jnp.abs(value[0] - value[1:]).max(0) <= tolerance)
    return Simplex(corner, value, small), 2 * corner[:-1].mean(0) - corner[-1]


@jax.jit
def _second(s: Simplex, at_reflected: Array) -> Array:
    """Further than the reflected corner where that is the best, else between centre and the better of the two."""
    centre, worst = s.corner[:-1].mean(0), s.corner[-1]
    weight = jnp.where(at_reflected < s.value[0], 2.0, jnp.where(at_reflected < s.value[-1], 0.5, -0.5))
    return centre + weight * (centre - worst)


@jax.jit
def _moved(
    s: Simplex, reflected: Array, at_reflected: Array, second: Array, at_second: Array
) -> tuple[Array, Array, Array]:
    """The better of the best corner and the new one, its value, and the genes whose simplex has to shrink."""
    best, value = s.corner[0], s.value
    expand, outside = at_reflected < value[0], at_reflected < value[-1]
    plain = ~expand & (at_reflected < value[-2])
    contracts = jnp.where(outside, at_second <= at_reflected, at_second < value[-1])
    take = jnp.where(expand, at_second < at_reflected, ~plain & contracts)
    shrink = ~(expand | plain | take | s.small)
    new, at_new = jnp.where(take, second, reflected), jnp.where(take, at_second, at_reflected)
    better = ~(s.small | shrink) & (at_new < value[0])
    return jnp.where(better, new, best), jnp.where(better, at_new, value[0]), shrink


@jax.jit
def _shrunk(s: Simplex, k: int) -> Array:
    return s.corner[0] + 0.5 * (s.corner[k] - s.corner[0])


@jax.jit
def _better(x: Array, value: Array, other: Array, at_other: Array, where: Array) -> tuple[Array, Array]:
    take = where & (at_other < value)
    return jnp.where(take, other, x), jnp.where(take, at_other, value)


def nelder_mead_step(f: Callable[..., Array], x: Float[Array, "n genes"], tolerance: float) -> Array:
    """The best corner (n, genes) after one step of the simplex around `x`, for all genes at once.

    `f` may leave out genes where its second argument is false.
    """
    corners = _corners(x)
    simplex, reflected = _sorted(corners, [f(at) for at in corners], tolerance)
    at_reflected = f(reflected)
    second = _second(simplex, at_reflected)
    best, value, shrink = _moved(simplex, reflected, at_reflected, second, f(second))
    few = np.asarray(shrink)
    if few.any():
        for k in range(1, len(corners)):
            other = _shrunk(simplex, k)
            best, value = _better(best, value, other, f(other, few), shrink)
    return best


def fit_genes(cells: Cells, rates: Rates, upper: Array) -> Fitted:
    """Fit a block of genes."""
    fit = Fit(cells, rates)
    for sight in (0.5, 0.1):
        fit.scan("scaling", sight, 4)
    fit.ratio = fit.state.rates.gamma / fit.state.rates.beta
    fit.scan("alpha", 0.1, 5)
    fit.simplex(("switch", "alpha"))
    fit.simplex(("switch", "beta", "scaling"))
    fit.simplex(("alpha", "gamma"), 1e-2)
    fit.simplex(("switch",))
    fit.simplex(("switch", "alpha", "beta", "gamma"), 1e-2)
    fit.project_times()
    fit.simplex(("switch", "alpha", "beta", "gamma"), 1e-2, refit_time=False)
    fit.update(fit.present.rates)
    losses = jnp.stack([*fit.losses, fit.state.loss])
    fit.evaluate(fit.state.rates)
    return _finished(cells, fit.state, fit.last, fit.ratio, upper, losses)


@jax.jit
def _finished(c: Cells, state: State, last: Assigned, ratio: Array, upper: Array, losses: Array) -> Fitted:
    count = jnp.maximum(upper.sum(0), 1)

    def spread(squared: Array, sign: Array) -> Array:
        signed = jnp.where(upper, jnp.sign(sign) * jnp.sqrt(squared), 0).sum(0) / count
        return jnp.where(upper, squared, 0).sum(0) / count - signed**2

    x, y, away = _residuals(c, state.rates, state.t, ratio)
    squared = x**2 + y**2 + away**2
    variance = spread(squared, y)
    variance = jnp.where(variance == 0, 1, variance)
    n = jnp.maximum(upper.sum(0) - 0.01 * upper.shape[0], 2)
    loglik = -0.5 / n * jnp.where(upper, squared, 0).sum(0) / variance - 0.5 * jnp.log(2 * jnp.pi * variance)
    x, y, _ = _residuals(c, state.rates, last.state.t, ratio)
    return Fitted(state.rates, state.t, last.tau, jnp.exp(loglik), spread(x**2 + y**2, y), losses)
