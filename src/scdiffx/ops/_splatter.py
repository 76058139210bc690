"""New genes by Splatter's model: means, outliers, and factors of groups, batches and steps of paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from scdiffx.ops._simulate import Simulate

__all__ = ["new_genes", "path_order", "per", "step_probabilities"]

_SMALLEST_BCV = 1e-3  # the operator's trend is relative to the common part, which so cannot be 0

_ANCHORS = 5
_LEAST = 1e-6


def new_genes(
    rng: np.random.Generator,
    n_vars: int,
    p: Mapping[str, Any],
    *,
    groups: Sequence[str] = (),
    batches: Sequence[str] = (),
    path_from: Sequence[int] | None = None,
) -> tuple[Simulate, dict[str, np.ndarray]]:
    """The operator of genes drawn with the parameters `p`, and the truth of each gene as columns.

    With `path_from` the groups are paths, and the operator's states are all steps of the first path, then the second's.
    """
    base, outlier, mean = gene_means(
        rng, n_vars, p["mean_shape"], p["mean_rate"], p["out_prob"], p["out_fac_loc"], p["out_fac_scale"]
    )
    truth = {"base_mean": base, "outlier_factor": outlier, "mean": mean}
    common = max(float(p["bcv_common"]), _SMALLEST_BCV)
    bcv = variation(rng, n_vars, common, float(p["bcv_df"]))
    truth["bcv"] = bcv
    states, batch_factor = None, None
    if len(groups) > 1 or path_from is not None:
        names = ("de_prob", "de_down_prob", "de_fac_loc", "de_fac_scale")
        settings = np.stack([per(p[name], len(groups), name) for name in names], 1)
        factors = [lognormal_factors(rng, n_vars, *row) for row in settings]
        truth |= {f"de_factor_{name}": f for name, f in zip(groups, factors, strict=True)}
        states = np.stack(factors)
    if path_from is not None:
        columns = [
            per(p[name], len(groups), name) for name in ("path_n_steps", "path_nonlinear_prob", "path_sigma_fac")
        ]
        parts = []
        for i, (steps, nonlinear, sigma) in enumerate(zip(*columns, strict=True)):
            start = np.ones(n_vars) if path_from[i] == 0 else factors[path_from[i] - 1]
            sigma_factor = np.where(rng.random(n_vars) < nonlinear, sigma, 0.0)
            truth[f"sigma_factor_{groups[i]}"] = sigma_factor
            parts.append(brownian_bridges(rng, start, factors[i], int(steps), sigma_factor))
        states = np.concatenate(parts)
    if len(batches) > 1:
        settings = np.stack([per(p[name], len(batches), name) for name in ("batch_fac_loc", "batch_fac_scale")], 1)
        factors = [lognormal_factors(rng, n_vars, 1.0, 0.5, *row) for row in settings]
        truth |= {f"batch_factor_{name}": f for name, f in zip(batches, factors, strict=True)}
        batch_factor = np.stack(factors)
    dropout = None if p.get("dropout_mid") is None else [p["dropout_mid"], p["dropout_shape"]]
    single = {
        "mean": mean,
        "factor": states,
        "batch_factor": batch_factor,
        "lib_loc": p["lib_loc"],
        "lib_scale": p["lib_scale"],
        "bcv": bcv,
        "bcv_trend": p["bcv_trend"] / common or None,
        "dropout": dropout,
    }
    given = {name: jnp.asarray(value, jnp.float32) for name, value in single.items() if value is not None}
    return Simulate(**given), truth


def gene_means(
    rng: np.random.Generator, n: int, shape: float, rate: float, out_prob: float, loc: float, scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gamma means, outlier factors, and the means with outliers: the median mean times their factor."""
    base = rng.gamma(shape, 1 / rate, n)
    outlier = lognormal_factors(rng, n, out_prob, 0.0, loc, scale)
    mean = np.where(outlier != 1, np.median(base) * outlier, base)
    return base, outlier, np.maximum(mean, np.finfo(np.float32).tiny)


def lognormal_factors(
    rng: np.random.Generator, n: int, prob: float, down_prob: float, loc: float, scale: float
) -> np.ndarray:
    """Factors (genes,), 1 but for a share `prob`; of those a share `down_prob` is below 1.

    Its size is that of a log-normal number or of its inverse, whichever lies on the side that was drawn.
    """
    chosen = rng.random(n) < prob
    size = np.abs(rng.normal(loc, scale, n))
    return np.where(chosen, np.exp(np.where(rng.random(n) < down_prob, -size, size)), 1.0)


def variation(rng: np.random.Generator, n: int, common: float, df: float) -> np.ndarray:
    """The BCV of each gene apart from its dependence on the mean: `common` by an inverse chi factor."""
    return common * np.sqrt(df / rng.chisquare(df, n)) if np.isfinite(df) else np.full(n, common)


def brownian_bridges(
    rng: np.random.Generator, start: np.ndarray, end: np.ndarray, n_steps: int, sigma_fac: np.ndarray
) -> np.ndarray:
    """Factors (steps, genes) from `start` to `end`: a random walk of five points between them, smoothly joined.

    The standard deviation of the walk is uniform up to `sigma_fac` times the mean of both ends; 0 gives straight lines.
    """
    from scipy.interpolate import Akima1DInterpolator

    time = np.linspace(0, 1, _ANCHORS)[:, None]
    sigma = rng.uniform(0, 1, len(start)) * sigma_fac * (start + end) / 2
    jumps = rng.normal(size=(_ANCHORS - 1, len(start))) * sigma / np.sqrt(_ANCHORS - 1)
    walk = np.vstack([np.zeros(len(start)), np.cumsum(jumps, 0)])
    anchors = start + walk - time * (walk[-1] - end + start)
    return np.maximum(Akima1DInterpolator(time[:, 0], anchors)(np.linspace(0, 1, n_steps)), _LEAST)


def step_probabilities(n_steps: int, skew: float) -> np.ndarray:
    """How likely each step is: linear, all equal at 0.5, the first most likely towards 1 and the last towards 0."""
    weight = np.linspace(skew, 1 - skew, n_steps)
    return weight / weight.sum()


def path_order(path_from: Sequence[int]) -> list[int]:
    """Paths (from 0) such that each comes after the one at whose end it begins (from 1; 0 is the origin)."""
    order: list[int] = []
    while len(order) < len(path_from):
        ready = [i for i, f in enumerate(path_from) if i not in order and (f == 0 or f - 1 in order)]
        if not ready:
            raise ValueError(
                f"path_from={list(path_from)!r} must name for each path 0, the origin, or the number (from 1) of the "
                "path at whose end it begins, without a circle"
            )
        order += ready
    return order


def per(value: Any, n: int, name: str) -> np.ndarray:
    """A number for all, or one for each of n."""
    values = np.asarray(value, dtype=np.float64)
    if values.ndim and values.shape != (n,):
        raise ValueError(f"{name}={value!r} must be a number or {n} of them")
    return np.broadcast_to(values, (n,))
