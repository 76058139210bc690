"""The fit of a marker annotation: CellAssign's likelihood, its priors, starts, and the climb to its maximum."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from scdiffx._core import counts as C

__all__ = ["N_BASIS", "Layout", "MarkerFit", "MarkerSettings", "climb", "fitted", "joint", "layout", "limits", "starts"]

N_BASIS = 10
_SMALLEST = 1e-10  # of the dispersion, as in CellAssign
_FLOOR = 1e-20  # added to proportions in their prior, as in CellAssign
_A = 20.0  # bound of the logarithms of basis weights, either way
INSIDE = 0.98  # share of the fitted cells that count as alike
_BINS = 10
_PER_BIN = 100
_SUBSAMPLE = 4000  # cells on which starts compete
_BRIEF = 40  # iterations for which they do
_LEAST_BUMP = 0.1  # where a climb begins
_NOISE = 0.3  # standard deviations of the mean score of markers


class MarkerSettings(NamedTuple):
    """How a marker annotation is fitted.

    `min_log_fold` is the least natural logarithm of the fold by which a type raises its markers, `concentration` that
    of the Dirichlet prior of the proportions (both CellAssign's), `min_sd` the least standard deviation of the normal
    prior of the logarithms of log folds, whose mean and standard deviation are fitted too. Of `n_starts` starts the
    best counts. The fit ends where no slope of the mean objective (nats per cell) is above `tol`.
    """

    min_log_fold: float = 2.0
    concentration: float = 0.01
    min_sd: float = 0.1
    n_starts: int = 3
    max_iter: int = 2000
    tol: float = 1e-5


class MarkerFit(NamedTuple):
    """What a fit leaves beside the parameters.

    `basis` are the means at which the dispersion has its bumps, `total` is the mean total count of the fitted cells,
    `log_likelihood` their sum, `objective` that plus the logarithms of the priors. 2 % of the fitted cells whose log
    size factors lie between two of the `edges` have a log likelihood below `limit`.
    """

    basis: Float[Array, " basis"]
    total: Float[Array, ""]
    log_likelihood: Float[Array, ""]
    objective: Float[Array, ""]
    edges: Float[Array, " bins-1"]
    limit: Float[Array, " bins"]
    converged: Bool[Array, ""]


class Layout(NamedTuple):
    """The marker table as numbers: the `columns` of its genes, and for each entry the number of its gene and type."""

    columns: np.ndarray
    gene: np.ndarray
    kind: np.ndarray
    n_types: int


def layout(markers: tuple[tuple[int, ...], ...]) -> Layout:
    """The table of the columns of each type's markers; a type without any is that of cells of no type."""
    sets = [frozenset(genes) for genes in markers]
    if len(sets) < 2 or len(set(sets)) < len(sets):
        raise ValueError(f"markers must be columns for two or more types, all different: {markers}")
    columns = np.unique([gene for genes in markers for gene in genes]).astype(np.int32)
    gene = np.concatenate([np.searchsorted(columns, sorted(genes)) for genes in sets])
    kind = np.repeat(np.arange(len(markers)), [len(genes) for genes in sets])
    return Layout(columns, gene.astype(np.int32), kind.astype(np.int32), len(markers))


def _rising(x: Array, shape: Array) -> Array:
    """log Gamma(shape + x) - log Gamma(shape), exact to rounding where the two nearly cancel."""
    small = shape < 8
    near = jnp.where(small, shape, 1)
    z = jnp.where(small, shape + 8, shape)

    def series(z: Array) -> Array:
        w = 1 / (z * z)
        return (1 / 12 - w * (1 / 360 - w * (1 / 1260 - w / 1680))) / z

    def ratio(first: int) -> Array:
        return math.prod((near + x + i) / (near + i) for i in range(first, first + 4))  # type: ignore[return-value]

    shifted = jnp.where(small, jnp.log(ratio(0)) + jnp.log(ratio(4)), 0)
    return (z - 0.5) * jnp.log1p(x / z) + x * jnp.log(z + x) - x + series(z + x) - series(z) - shifted


def _dispersion(mean: Array, weights: Array, centres: Array) -> Array:
    """The shape of the negative binomial at each mean: radial bumps at the centres, whose width is their distance.

    ``exp(-(u - k)^2 / 2)`` is ``exp(-u^2 / 2) exp(u)^k exp(-k^2 / 2)``: two exponentials and two polynomials do for
    all bumps. They are taken from the middle, where powers stay small; beyond 13 widths nothing is left of a bump.
    """
    middle = (N_BASIS - 1) / 2
    u = jnp.minimum((mean - centres[0]) / (centres[1] - centres[0]) - middle, 13)
    k = np.arange(N_BASIS) - middle
    height = weights * np.exp(-(k**2) / 2).astype(weights.dtype)
    root = jnp.exp(u / 2)
    right, left = jnp.zeros_like(u), jnp.zeros_like(u)
    up = root * root
    down = 1 / up
    for i in range(N_BASIS // 2):
        right = right * up + height[N_BASIS - 1 - i]
        left = left * down + height[i]
    return jnp.exp(-(u**2) / 2) * (right * root + left / root) + _SMALLEST


def _kernel(x: Array, log_mean: Array, weights: Array, centres: Array) -> Array:
    """Logarithm of the negative binomial's probability, but for the factorial of the count."""
    # Without barriers, XLA computes the whole derivative anew for each of the sums that the parameters' slopes are.
    log_mean = lax.optimization_barrier(log_mean)
    mean = jnp.exp(log_mean)
    shape = lax.optimization_barrier(_dispersion(mean, weights, centres))
    spread = jnp.log1p(mean / shape)
    return x * (log_mean - jnp.log(shape) - spread) - shape * spread + _rising(x, shape)


def joint(
    rows: Float[Array, "cells genes+2"],
    baseline: Float[Array, "batches genes"],
    log_folds: Float[Array, " entries"],
    dispersion: Float[Array, " basis"],
    log_proportions: Float[Array, " types"],
    centres: Float[Array, " basis"],
    at: Layout,
) -> Float[Array, "cells types"]:
    """Log probability of each cell's markers and each type; `rows` hold counts, log size factor and batch.

    A type is not evaluated gene by gene, but as the cell without type, corrected at the markers of the type alone.
    """
    # Products with these pick genes and add up entries: faster than gathers, whose derivatives scatter.
    of_gene = jnp.asarray(np.eye(len(at.columns))[at.gene].T, rows.dtype)
    of_type = jnp.asarray(np.eye(at.n_types)[at.kind], rows.dtype)
    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    x, size, batch = rows[:, :-2], rows[:, -2:-1], rows[:, -1].astype(jnp.int32)
    log_mean = size + (baseline if baseline.shape[0] == 1 else jnp.asarray(baseline)[batch])
    # One pass over genes and entries.
    both = jnp.concatenate([x, product(x, of_gene)], 1)
    means = jnp.concatenate([log_mean, product(log_mean, of_gene) + log_folds], 1)
    found = _kernel(both, means, dispersion, centres)
    plain, raised = found[:, : x.shape[1]], found[:, x.shape[1] :]
    gain = product(raised - product(plain, of_gene), of_type)
    return (plain - _rising(x, jnp.ones_like(x))).sum(1)[:, None] + gain + log_proportions


class _Flat(NamedTuple):
    """All that is fitted, on the real line."""

    baseline: Any
    log_log_folds: Any
    log_dispersion: Any
    logits: Any
    prior_mean: Any
    prior_log_variance: Any


def log_prior(flat: _Flat, concentration: float) -> Array:
    """Dirichlet on the proportions, normal on the logarithms of log folds, as CellAssign has them."""
    k = flat.logits.shape[0]
    log_p = jnp.logaddexp(jax.nn.log_softmax(flat.logits), math.log(_FLOOR))
    dirichlet = (concentration - 1) * log_p.sum() + math.lgamma(k * concentration) - k * math.lgamma(concentration)
    variance = jnp.exp(flat.prior_log_variance)
    squares = (flat.log_log_folds - flat.prior_mean) ** 2 / variance
    return dirichlet - (squares + flat.prior_log_variance + math.log(2 * math.pi)).sum() / 2


@partial(jax.jit, static_argnames=("shapes", "concentration", "markers"))
def _objective(
    vector: Array, table: Array, centres: Array, shapes: Any, concentration: float, markers: Any
) -> tuple[tuple[Array, Array], Array]:
    """Minus the mean objective with the log likelihood, and its slope."""
    at = layout(markers)

    def of_block(vector: Array, rows: Array, mask: Array) -> Array:
        flat = _unflat(vector, shapes)
        parts = (flat.baseline, jnp.exp(flat.log_log_folds), jnp.exp(flat.log_dispersion))
        found = joint(rows, *parts, jax.nn.log_softmax(flat.logits), centres, at)
        return (jax.nn.logsumexp(found, axis=1) * mask).sum()

    def add(carry: tuple[Array, Array], rows: Array, mask: Array) -> tuple[Array, Array]:
        # The slope of each block at once: nothing is kept or computed anew for a way back.
        value, slope = jax.value_and_grad(of_block)(vector, rows, mask)
        return carry[0] + value, carry[1] + slope

    total, slope = C.fold_rows(table, add, (jnp.zeros((), vector.dtype), jnp.zeros_like(vector)))
    prior, prior_slope = jax.value_and_grad(lambda v: log_prior(_unflat(v, shapes), concentration))(vector)
    n = table.shape[0]
    return (-(total + prior) / n, total), -(slope + prior_slope) / n


def _unflat(vector: Any, shapes: tuple[tuple[int, ...], ...]) -> _Flat:
    sizes = [math.prod(shape) for shape in shapes]
    ends = np.cumsum(sizes)
    return _Flat(*(vector[e - s : e].reshape(shape) for e, s, shape in zip(ends, sizes, shapes, strict=True)))


def _flatten(flat: _Flat) -> np.ndarray:
    return np.concatenate([np.ravel(part) for part in flat])


class Climb(NamedTuple):
    """Where a climb ended."""

    flat: _Flat
    objective: float
    log_likelihood: float
    converged: bool


def climb(table: np.ndarray, begin: _Flat, centres: np.ndarray, markers: Any, settings: MarkerSettings) -> Climb:
    """The maximum that L-BFGS reaches from `begin`."""
    from scipy.optimize import minimize

    shapes = tuple(np.shape(part) for part in begin)
    there, middle = jnp.asarray(table), jnp.asarray(centres)

    def on_host(vector: np.ndarray) -> tuple[float, np.ndarray, float]:
        (value, total), slope = _objective(
            jnp.asarray(vector), there, middle, shapes=shapes, concentration=settings.concentration, markers=markers
        )
        return float(value), np.asarray(slope), float(total)

    free = _Flat(*(np.full(shape, np.inf) for shape in shapes))
    low = _Flat(*(-part for part in free))._replace(
        log_log_folds=np.full(shapes[1], math.log(settings.min_log_fold)),
        log_dispersion=np.full(shapes[2], -_A),
        prior_log_variance=np.full(shapes[5], 2 * math.log(settings.min_sd)),
    )
    high = free._replace(log_dispersion=np.full(shapes[2], _A))
    bounds = list(zip(_flatten(low), _flatten(high), strict=True))
    options = {"maxiter": settings.max_iter, "maxfun": 2 * settings.max_iter, "gtol": settings.tol, "ftol": 0}
    found = minimize(
        lambda vector: on_host(vector)[:2],
        _flatten(begin),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options=options | {"maxcor": 30},
    )
    value, _, total = on_host(found.x)
    # 1: out of iterations. That the line search ends at rounding is convergence.
    return Climb(_unflat(found.x, shapes), -value * len(table), total, found.status != 1)


def fitted(
    table: np.ndarray, n_batches: int, markers: Any, settings: MarkerSettings, seed: int
) -> tuple[np.ndarray, Climb]:
    """The centres of the dispersion's bumps, and the best maximum from several starts."""
    # By rank instead of column: compiled code is shared wherever the genes are.
    at = layout(markers)
    markers = tuple(tuple(int(i) for i in at.gene[at.kind == kind]) for kind in range(at.n_types))
    values = table[:, :-2]
    centres = np.linspace(values.min(), values.max(), N_BASIS)
    if centres[0] == centres[-1]:
        raise ValueError("the markers have the same count in every cell")
    rng = np.random.default_rng(seed)
    part = table
    if len(table) > _SUBSAMPLE:
        part = table[np.sort(rng.choice(len(table), _SUBSAMPLE, replace=False))]
    trials = starts(part, n_batches, at, settings, rng)
    if len(trials) > 1:
        brief = settings._replace(max_iter=min(_BRIEF, settings.max_iter))
        trials = [max((climb(part, t, centres, markers, brief) for t in trials), key=lambda c: c.objective).flat]
    if part is not table:
        trials = [climb(part, _lifted(trials[0]), centres, markers, settings).flat]
    return centres, climb(table, _lifted(trials[0]), centres, markers, settings)


def _lifted(flat: _Flat) -> _Flat:
    """With no bump of the dispersion near 0, from where the slope in its logarithm would not bring it back."""
    return flat._replace(log_dispersion=np.maximum(flat.log_dispersion, math.log(_LEAST_BUMP)))


def limits(log_likelihood: np.ndarray, log_size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What few of the fitted cells of like size factors fall below, and the edges between these."""
    bins = int(np.clip(len(log_size) // _PER_BIN, 1, _BINS))
    edges = np.quantile(log_size, np.arange(1, bins) / bins)
    bin_of = np.searchsorted(edges, log_size)
    limit = [np.quantile(own, 1 - INSIDE) if len(own := log_likelihood[bin_of == b]) else -np.inf for b in range(bins)]
    return edges, np.asarray(limit)


def starts(
    table: np.ndarray, n_batches: int, at: Layout, settings: MarkerSettings, rng: np.random.Generator
) -> list[_Flat]:
    """Where to begin: what cells named after their highest markers look like, and variations on that."""
    logs = np.log1p(table[:, :-2] / np.exp(table[:, -2:-1]))
    z = (logs - logs.mean(0)) / np.maximum(logs.std(0), 1e-12)
    member = np.zeros((z.shape[1], at.n_types))
    member[at.gene, at.kind] = 1
    known = member.any(0)
    found = []
    for number in range(settings.n_starts):
        # Later starts weigh the markers by chance, and name cells partly by chance.
        used = member if number == 0 else member * rng.exponential(size=member.shape)
        score = z @ used / np.maximum(used.sum(0), 1e-12)
        if number:
            score = score + rng.normal(scale=_NOISE, size=score.shape)
        # Cells with the lowest scores are of no type, where there is such a one.
        score[:, ~known] = np.quantile(score[:, known].max(1), 0.05)
        found.append(_moments(table, n_batches, score.argmax(1), member, at, settings))
    return found


def _moments(
    table: np.ndarray, n_batches: int, types: np.ndarray, member: np.ndarray, at: Layout, settings: MarkerSettings
) -> _Flat:
    """Parameters from the means of cells of given types."""
    x, size, batch = table[:, :-2], np.exp(table[:, -2]), table[:, -1].astype(int)
    of_type = np.eye(at.n_types)[types]
    plain = of_type @ member.T == 0  # (cells, genes): whether the gene is no marker of the cell's type
    least = 1 / size.sum()
    baseline = ((plain * x).sum(0) + least) / ((plain * size[:, None]).sum(0) + 1)
    of_batch = np.empty((n_batches, x.shape[1]))
    for b in range(n_batches):
        own = plain[batch == b]
        of_batch[b] = ((own * x[batch == b]).sum(0) + baseline) / ((own * size[batch == b, None]).sum(0) + 1)
    mean = (x.T @ of_type + least) / (size @ of_type + 1)
    folds = np.log(mean[at.gene, at.kind] / baseline[at.gene])
    logs = np.log(np.clip(folds, 1.05 * settings.min_log_fold, 3 * settings.min_log_fold))
    return _Flat(
        np.log(of_batch if n_batches > 1 else baseline[None]),
        logs,
        np.zeros(N_BASIS),
        np.log(of_type.mean(0) + 1e-3),
        logs.mean(keepdims=True),
        np.log(np.maximum(logs.var(keepdims=True), settings.min_sd**2)),
    )
