"""Where the fit of the dynamical model starts: rates from extreme cells, and whether the counts have two modes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Start", "quantile", "starting_point"]

_GRID = 30


class Start(NamedTuple):
    """Starting rates and what stays fixed: weights of the cells (cells, genes), and numbers for each gene (genes,)."""

    weight: np.ndarray
    upper: np.ndarray
    recoverable: np.ndarray
    std_u: np.ndarray
    std_s: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray
    gamma: np.ndarray
    scaling: np.ndarray
    switch: np.ndarray
    pval_steady: np.ndarray
    steady_u: np.ndarray
    steady_s: np.ndarray


def quantile(x: np.ndarray, mask: np.ndarray, percent: float) -> np.ndarray:
    """The percentile of each column over the cells of the mask."""
    ordered = np.sort(np.where(mask, x, np.inf), axis=0)
    place = np.maximum(mask.sum(0) - 1, 0) * percent / 100
    low = np.floor(place).astype(int)
    high = np.minimum(low + 1, np.maximum(mask.sum(0) - 1, 0))
    a, b = (np.take_along_axis(ordered, i[None], 0)[0] for i in (low, high))
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(a), a + (b - a) * (place - low), 0)


def _mean(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return (x * mask).sum(0) / np.maximum(mask.sum(0), 1)


def _std(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.sqrt(_mean((x - _mean(x, mask)) ** 2, mask))


def _upper_mode(x: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The p-value of a second mode above the middle, by a kernel density on a grid, and where that mode is."""
    from scipy.stats import norm

    n, genes = mask.sum(0), np.arange(x.shape[1])
    low = np.where(mask, x, np.inf).min(0)
    high = np.where(mask, x, -np.inf).max(0)
    low, high = (np.where(np.isfinite(v), v, 0) for v in (low, high))
    grid = low + (high - low) * np.linspace(0, 1, _GRID)[:, None]
    width = _std(x, mask) * np.sqrt(n / np.maximum(n - 1, 1)) * np.maximum(n, 1) ** -0.2
    safe = np.where(width > 0, width, 1)
    inverse = (1 / safe).astype(np.float32)
    scaled = np.where(mask, x * inverse, np.inf).astype(np.float32)
    density = np.stack([np.exp(-0.5 * (scaled - (g * inverse).astype(np.float32)) ** 2).sum(0) for g in grid])
    density = density / (np.maximum(n, 1) * safe * np.sqrt(2 * np.pi))
    middle = _GRID // 2 - 2
    start = middle + density[middle : middle + 4].argmin(0)
    above = np.arange(_GRID)[:, None] >= start
    peak = np.where(above, density, -np.inf).argmax(0)
    excess = density[peak, genes] - _mean(density, above)
    p = norm.sf(excess / np.maximum(density.std(0) / np.sqrt(_GRID), 1))
    place = (grid[peak, genes] + grid[np.minimum(peak + 1, _GRID - 1), genes]) / 2
    usable = (width > 0) & (n > 1)
    return np.where(usable, p, 1), np.where(usable, place, 0)


def starting_point(mu: np.ndarray, ms: np.ndarray) -> Start:
    """scVelo's start: rates by the cells beyond the 98th percentile, or by the upper mode where there is one."""
    u, s = np.asarray(mu, np.float64), np.asarray(ms, np.float64)
    weight = (u > 0) & (s > 0)
    recoverable = weight.sum(0) > 2
    bounds = [quantile(x, weight, 99) for x in (u, s)]
    for x, bound in zip((u, s), bounds, strict=True):
        weight &= (x <= bound) | (bound <= 0)
    upper = weight & (u > (u * weight).max(0) / 3) & (s > (s * weight).max(0) / 3)
    std_u, std_s = _std(u, weight), _std(s, weight)
    flat = (std_u == 0) | (std_s == 0)
    std_u, std_s = np.where(flat, 1, std_u), np.where(flat, 1, std_s)
    scaling = std_u / std_s
    u = u / scaling
    high_u, high_s = (weight & (x >= quantile(x, weight, 98)) for x in (u, s))
    squares = (s**2 * high_s).sum(0)
    gamma = (u * s * high_s).sum(0) / np.where(squares > 0, squares, 1) + 1e-6
    gamma = np.where(gamma < 0.05 / scaling, gamma * 1.2, np.where(gamma > 1.5 / scaling, gamma / 1.2, gamma))
    u_inf, s_inf = _mean(u, high_u | high_s), _mean(s, high_s)
    (p_u, steady_u), (p_s, steady_s) = (_upper_mode(x, weight) for x in (u, s))
    steady = np.maximum(p_u, p_s)
    bimodal = steady < 1e-3
    u_inf = np.where(bimodal, (u_inf + steady_u) / 2, u_inf)
    safe = np.where(u_inf > 0, u_inf, 1)
    alpha = np.where(bimodal, gamma * s_inf, safe)
    alpha = np.where(alpha > 0, alpha, 1)
    beta = np.where(bimodal, alpha / safe, 1.0)
    switch = _switch(u_inf, s_inf, alpha, beta, gamma)
    rates = (alpha, beta, gamma, scaling, switch)
    return Start(weight, upper, recoverable, std_u, std_s, *rates, steady, steady_u, steady_s)


def _switch(u: np.ndarray, s: np.ndarray, alpha: np.ndarray, beta: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """When the end of transcription is reached."""

    def log(x: np.ndarray) -> np.ndarray:
        return np.log(np.clip(x, 1e-6, 1 - 1e-6))

    gap = np.where(gamma == beta, 1e-9, gamma - beta)
    share = beta / gap
    end = alpha / gamma - share * (alpha / beta)
    by_both = -log((s - share * u - end) / -end) / gamma
    return np.where(gamma >= beta, -log(1 - u * beta / alpha) / beta, by_both)
