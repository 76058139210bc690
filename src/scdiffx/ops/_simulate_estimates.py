"""Estimates of the parameters of Splatter's model from counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

__all__ = ["Estimates", "estimated"]

_ABSENT = 1e-3  # molecules in all cells together that a gene without any is given, so that its mean is positive
_ROUNDS = 30
_SMALLEST_BCV = 1e-2
_LARGEST_DF = 1000.0
_FEW = 10  # cells whose library sizes say too little of their spread
_CERTAIN = 0.3  # largest standard error of the logarithm of a factor that says how factors are distributed
# Dropout: library sizes and quantiles that moments are taken over, rounds of correction, genes the curve is fitted to.
_LIBRARIES, _LEVELS, _CORRECTIONS, _TRIED = 8, 32, 5, 100


class Estimates(NamedTuple):
    """Values for the fields of `Simulate`, and the distributions over genes that Splatter draws new genes from."""

    mean: np.ndarray
    factor: np.ndarray | None
    batch_factor: np.ndarray | None
    lib_loc: np.ndarray
    lib_scale: np.ndarray
    bcv: np.ndarray
    dropout: np.ndarray | None
    splatter: dict[str, Any]


class Sums(NamedTuple):
    """Sums over the cells of each combination (batches, states, genes), and over all."""

    counts: np.ndarray
    weighted: np.ndarray  # counts times library sizes
    library: np.ndarray  # powers 0, 1 and 2 of the library sizes (3, batches, states)
    squares: np.ndarray  # of the counts of all cells (genes,)
    typical: float  # median library size


def estimated(
    csr: Any, state: np.ndarray | None = None, batch: np.ndarray | None = None, *, dropout: bool = False
) -> Estimates:
    """Means and factors by iterative proportional fitting, library sizes and dispersions by moments.

    Cells without molecules are left out. Shares of states and batches are shrunk towards those of all cells by the
    weight of one cell of median size.
    """
    x = sp.csr_matrix(csr, dtype=np.float64)
    library = np.asarray(x.sum(1)).ravel()
    used = library > 0
    if used.sum() < 2:
        raise ValueError(
            f"{used.sum()} of {len(used)} cells have molecules: parameters are estimated from at least two"
        )
    state = np.zeros(len(library), int) if state is None else state
    batch = np.zeros(len(library), int) if batch is None else batch
    shape = (int(batch.max()) + 1, int(state.max()) + 1)
    x, library, state, batch = x[used], library[used], state[used], batch[used]
    sums = _sums(x, library, state, batch, shape)
    mean, factor, batch_factor = _shares(sums)
    share = mean * factor[None] * batch_factor[:, None]
    share /= share.sum(2, keepdims=True)
    dispersion, genes = _dispersions(sums, share)
    loc, scale = _library(library, state, batch, share, dispersion)
    splatter: dict[str, Any] = {"lib_loc": float(np.log(library).mean()), "lib_scale": float(np.log(library).std())}
    lost = None
    if dropout:
        # Zeros are compared over all cells, so with the variation that the groups' differences are part of.
        total, _ = _dispersions(sums, np.broadcast_to(mean / mean.sum(), share.shape))
        lost, mean, less = _dropout(x, library, mean, total)
        dispersion = np.maximum((1 + dispersion) * (1 + less) / (1 + total) - 1, 1e-4)
        if lost is not None:
            more = float(np.log(mean.sum()))
            loc, mean = loc + more, mean / mean.sum()
            # Weighted by what the trend was with dropout, for some corrected dispersions are next to 0.
            expected = mean * sums.typical
            around = (genes.bcv_common + genes.bcv_trend / np.sqrt(expected)) ** 2
            common, slope = _trend(dispersion, expected, np.maximum(around, 1e-4) ** 2)
            genes = Genes(common, slope, genes.bcv_df)
            splatter["lib_loc"] += more
            splatter |= {"dropout_mid": float(lost[0]), "dropout_shape": float(lost[1])}
    splatter |= _distributions(sums, mean, factor, batch_factor, dispersion) | genes._asdict()
    return Estimates(
        mean * sums.typical,
        factor if factor.shape[0] > 1 else None,
        batch_factor if batch_factor.shape[0] > 1 else None,
        loc,
        scale,
        np.maximum(np.sqrt(dispersion), _SMALLEST_BCV),
        lost,
        splatter,
    )


def _sums(x: Any, library: np.ndarray, state: np.ndarray, batch: np.ndarray, shape: tuple[int, int]) -> Sums:
    code, cells, combinations = batch * shape[1] + state, np.arange(len(library)), shape[0] * shape[1]

    def total(weight: np.ndarray) -> np.ndarray:
        rows = sp.csr_matrix((weight, (code, cells)), shape=(combinations, len(cells)))
        return np.asarray((rows @ x).todense()).reshape(*shape, -1)

    powers = [np.bincount(code, library**p, combinations).reshape(shape) for p in range(3)]
    squares = np.asarray(x.multiply(x).sum(0)).ravel()
    return Sums(total(np.ones_like(library)), total(library), np.stack(powers), squares, float(np.median(library)))


def _shares(sums: Sums) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of each gene (genes,), factors of states (states, genes) and of batches (batches, genes)."""
    batches, states, genes = sums.counts.shape
    size = sums.library[1]
    mean = np.maximum(sums.counts.sum((0, 1)), _ABSENT) / size.sum()
    factor, batch_factor = np.ones((states, genes)), np.ones((batches, genes))
    prior = sums.typical * mean
    for _ in range(_ROUNDS if batches > 1 and states > 1 else 1):
        before = factor
        if states > 1:
            factor = (sums.counts.sum(0) + prior) / (mean * (size.T @ batch_factor) + prior)
        if batches > 1:
            batch_factor = (sums.counts.sum(1) + prior) / (mean * (size @ factor) + prior)
        if np.abs(factor - before).max() < 1e-6:
            break
    return mean, factor, batch_factor


class Genes(NamedTuple):
    """How variation depends on the mean, ``bcv_common + bcv_trend / sqrt(mean)``; degrees of freedom about that."""

    bcv_common: float
    bcv_trend: float
    bcv_df: float


def _dispersions(sums: Sums, share: np.ndarray) -> tuple[np.ndarray, Genes]:
    """Dispersion (genes,) by moments, shrunk towards its trend over the mean as far as it is uncertain.

    The variance of a moment estimate is that of squared deviations under the negative binomial at the trend; the spread
    of the true dispersions about the trend is what the estimates spread beyond that (scaled inverse chi-squared).
    """
    mass, square = (np.einsum("bsg,bs->g", share**p, sums.library[p]) for p in (1, 2))
    cross = np.einsum("bsg,bsg->g", share, sums.weighted)
    raw = (sums.squares - 2 * cross + square - mass) / square
    cells, typical = mass**2 / square, square / mass  # as if so many cells had one mean
    found = sums.squares > 0
    genes = Genes(0.1, 0.0, 4.0)
    spread = 1.0
    trend = np.full_like(raw, max(float(np.median(raw[found])), 0.01))
    for _ in range(5):
        variance = typical + trend * typical**2
        error = (2 * variance**2 + 6 * trend * variance**2 + variance) / (cells * typical**4)
        common, slope = _trend(raw[found], typical[found], error[found] + spread * trend[found] ** 2)
        trend = np.maximum((common + slope / np.sqrt(typical)) ** 2, 1e-4)
        sure = found & (error < 0.1 * trend**2)
        if sure.sum() >= 20:
            ratio = np.maximum(raw[sure] / trend[sure], 1e-2)
            spread = max(float(np.var(np.log(ratio)) - np.mean(error[sure] / trend[sure] ** 2)), 2 / _LARGEST_DF)
        genes = Genes(common, slope, min(2 * _inverse_trigamma(spread), _LARGEST_DF))
    weight = spread * trend**2 / (spread * trend**2 + error)
    shrunk = np.where(found, weight * raw + (1 - weight) * trend, trend)
    return np.maximum(shrunk, 1e-4), genes


def _trend(raw: np.ndarray, mean: np.ndarray, error: np.ndarray) -> tuple[float, float]:
    """The BCV's part that all genes share, and its slope in 1 / sqrt(mean), by weighted least squares."""
    from scipy.optimize import least_squares

    root = np.sqrt(mean)
    fit = least_squares(
        lambda p: ((p[0] + p[1] / root) ** 2 - raw) / np.sqrt(error), [0.3, 0.3], bounds=([0, 0], [np.inf, np.inf])
    )
    return float(fit.x[0]), float(fit.x[1])


def _inverse_trigamma(value: float) -> float:
    from scipy.optimize import brentq
    from scipy.special import polygamma

    return float(brentq(lambda y: polygamma(1, y) - value, 1e-3, 1e6)) if value < 1e5 else 1e-2


def _library(
    library: np.ndarray, state: np.ndarray, batch: np.ndarray, share: np.ndarray, dispersion: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Location and scale of the log library sizes (batches, states), less the noise of the counts themselves."""
    logs = np.log(library)
    loc = np.full(share.shape[:2], logs.mean())
    code = batch * share.shape[1] + state
    within = logs - (np.bincount(code, logs) / np.maximum(np.bincount(code), 1))[code]
    scale = np.full(share.shape[:2], within.std())
    noise = np.einsum("bsg,g->bs", share**2, dispersion)
    for b, s in np.unique(np.stack([batch, state], 1), axis=0):
        own = logs[(batch == b) & (state == s)]
        loc[b, s] = own.mean()
        if len(own) >= _FEW:
            scale[b, s] = own.std(ddof=1)
        noise[b, s] += np.exp(-own).mean()
    return loc, np.sqrt(np.maximum(scale**2 - noise, 1e-4))


def _distributions(
    sums: Sums, mean: np.ndarray, factor: np.ndarray, batch_factor: np.ndarray, dispersion: np.ndarray
) -> dict[str, Any]:
    """Splatter's parameters of gene means, outliers, and factors of groups and batches."""
    found = sums.squares > 0
    values = mean[found] * sums.typical
    logs = np.log(values)
    middle = np.median(logs)
    outlier = logs > middle + 2 * 1.4826 * np.median(np.abs(logs - middle))
    shape, rate = _gamma(values[~outlier])
    away = logs[outlier] - middle if outlier.any() else np.zeros(1)
    result: dict[str, Any] = {
        "mean_shape": shape,
        "mean_rate": rate,
        "out_prob": float(outlier.mean()),
        "out_fac_loc": float(away.mean()),
        "out_fac_scale": float(away.std()),
    }
    cells = np.maximum(sums.library[0], 1e-9)
    if len(factor) > 1:
        result["group_prob"] = cells.sum(0) / cells.sum()
        logs = np.log(factor[:, found])
        # Shares sum to 1, so that what rises lowers all the others; and in most groups a gene is as in Splatter's base.
        logs -= np.median(logs, axis=1, keepdims=True)
        if len(logs) > 2:
            logs -= np.median(logs, axis=0)
        changes = [
            _changed(f, c[found], dispersion[found] / n)
            for f, c, n in zip(logs, sums.counts.sum(0), cells.sum(0), strict=True)
        ]
        names = ("de_prob", "de_down_prob", "de_fac_loc", "de_fac_scale")
        result |= {name: np.array(part) for name, part in zip(names, zip(*changes, strict=True), strict=True)}
    if len(batch_factor) > 1:
        counts, n = sums.counts.sum(1)[:, found], cells.sum(1)[:, None]
        known = 1 / np.maximum(counts, 1) + dispersion[found] / n < _CERTAIN**2
        sizes = [np.abs(np.log(f[found][k])) for f, k in zip(batch_factor, known, strict=True)]
        result |= {
            "batch_prob": cells.sum(1) / cells.sum(),
            "batch_fac_loc": np.array([size.mean() if len(size) else 0.0 for size in sizes]),
            "batch_fac_scale": np.array([size.std() if len(size) else 0.0 for size in sizes]),
        }
    return result


def _gamma(values: np.ndarray) -> tuple[float, float]:
    """Shape and rate by maximum likelihood."""
    from scipy.optimize import brentq
    from scipy.special import digamma

    gap = np.log(values.mean()) - np.log(values).mean()
    shape = brentq(lambda k: np.log(k) - digamma(k) - gap, 1e-3, 1e6) if gap > 1e-6 else 1e6
    return float(shape), float(shape / values.mean())


def _changed(logs: np.ndarray, counts: np.ndarray, biological: np.ndarray) -> tuple[float, float, float, float]:
    """De_prob, de_down_prob, de_fac_loc and de_fac_scale, from genes whose factor is known well enough.

    Those with a factor other than 1 at a false discovery rate of 5 %.
    """
    from scipy.stats import false_discovery_control, norm

    error = np.sqrt(1 / np.maximum(counts, 1) + biological)
    logs, error = logs[error < _CERTAIN], error[error < _CERTAIN]
    hit = false_discovery_control(2 * norm.sf(np.abs(logs) / error)) < 0.05
    size = np.abs(logs[hit])
    if not hit.any():
        return 0.0, 0.5, 0.0, 0.0
    return float(hit.mean()), float((logs[hit] < 0).mean()), float(size.mean()), float(size.std())


def _dropout(
    x: Any, library: np.ndarray, share: np.ndarray, dispersion: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """Midpoint and shape of the loss, and shares and dispersions before it.

    The curve is the one under which genes of the observed means and variances come nearest to the observed zeros. None
    if without dropout they are less than twice as far from them (root mean square).
    """
    from scipy.optimize import minimize

    size = np.quantile(library, (np.arange(_LIBRARIES) + 0.5) / _LIBRARIES)
    zeros = 1 - np.bincount(x.indices, minlength=x.shape[1]) / x.shape[0]
    telling = np.flatnonzero((zeros > 0.05) & (zeros < 0.95))
    if not len(telling):
        return None, share, dispersion
    some = telling[np.argsort(zeros[telling])][np.linspace(0, len(telling) - 1, min(_TRIED, len(telling))).astype(int)]

    def off(curve: np.ndarray) -> float:
        return float(((_before_loss(share[some], dispersion[some], size, curve)[2] - zeros[some]) ** 2).sum())

    centre = float(np.log(np.median(share[some]) * np.median(library)))
    without = off(np.array([-50.0, -1.0]))
    starts = [np.array([centre + d, -1.0]) for d in (-4, -2, 0)]
    fit = minimize(off, min(starts, key=off), method="Nelder-Mead", options={"maxfev": 50, "xatol": 0.02})
    if fit.fun > without / 4:
        return None, share, dispersion
    return fit.x, *_before_loss(share, dispersion, size, fit.x)[:2]


def _before_loss(
    share: np.ndarray, dispersion: np.ndarray, size: np.ndarray, curve: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares and dispersions that dropout turns into those given, and the zeros that there are then.

    Losses of the first two moments are means over library sizes `size` and over quantiles of the gamma distribution.
    """
    from scipy.special import expit, gammaincinv

    level = (np.arange(_LEVELS) + 0.5) / _LEVELS
    before, rest = share, dispersion
    for _ in range(_CORRECTIONS):
        wide = np.maximum(gammaincinv(1 / rest[:, None], level) * rest[:, None], 1e-30)[:, None]
        rate = before[:, None, None] * size[:, None] * wide
        kept = expit(-curve[1] * (np.log(rate) - curve[0]))
        zeros = (1 - kept * -np.expm1(-rate)).mean((1, 2))
        first, second = ((rate**p * kept).sum((1, 2)) / (rate**p).sum((1, 2)) for p in (1, 2))
        before = share / np.maximum(first, 0.02)
        rest = np.clip((1 + dispersion) * first**2 / np.maximum(second, 1e-4) - 1, 1e-4, None)
    return before, rest, zeros
