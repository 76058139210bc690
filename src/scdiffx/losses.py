"""Losses: what a fit minimises. Each compares an output of the plan with a target; they add up and scale.

>>> import scdiffx as sd
>>> loss = sd.losses.correlation("dpt_pseudotime", "day") + 0.1 * sd.losses.l1("gene_weight")
>>> len(loss.terms)
2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from scdiffx._core.counts import Counts as _Counts
from scdiffx._core.counts import Matrix, row_sums, values_at
from scdiffx._core.fields import buffer, learnable, operator, replace, static

__all__ = ["Loss", "correlation", "cross_entropy", "l1", "molecular_cross_validation", "reconstruction", "time_order"]

# Each cell is compared with this many others: enough for a stable order, linear in cells.
_PARTNERS = 64


@dataclass(frozen=True)
class Loss:
    """A weighted sum of terms."""

    terms: tuple[tuple[float, Any], ...]

    def __add__(self, other: Loss) -> Loss:
        if not isinstance(other, Loss):
            return NotImplemented
        return Loss(self.terms + other.terms)

    def __mul__(self, factor: float) -> Loss:
        if not isinstance(factor, int | float | np.floating):
            return NotImplemented
        return Loss(tuple((float(factor) * weight, term) for weight, term in self.terms))

    __rmul__ = __mul__


def correlation(output: str, target: str) -> Loss:
    """1 - Pearson correlation between an output and a column of obs.

    Parameters
    ----------
    output
        Key of a numeric output with one value per cell, such as "dpt_pseudotime".
    target
        Numeric column of obs; cells where it is NaN, or where the output is infinite, do not count.
    """
    return Loss(((1.0, Correlation(output=output, target=target)),))


def time_order(output: str, target: str, *, temperature: float = 0.1) -> Loss:
    """How often pairs of cells are in the wrong order, softly.

    For pairs whose targets differ, ``softplus(-d / temperature) * temperature`` of the standardised difference `d` of
    the outputs in the direction of the target. Each cell meets a fixed sample of 64 others, so the cost is linear.

    Parameters
    ----------
    output
        Key of a numeric output with one value per cell.
    target
        Numeric column of obs; cells where it is NaN do not count.
    temperature
        Softness, in standard deviations of the output; greater than 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be greater than 0")
    return Loss(((1.0, TimeOrder(output=output, target=target, temperature=float(temperature))),))


def cross_entropy(output: str, target: str) -> Loss:
    """Cross-entropy of a linear readout of an output against labels; the readout is learned with the plan.

    Parameters
    ----------
    output
        Key of an array with one row per cell, such as "X_pca".
    target
        Categorical column of obs; cells without a label (NaN) do not count.
    """
    return Loss(((1.0, CrossEntropy(output=output, target=target)),))


def l1(output: str) -> Loss:
    """Mean absolute value of an output, such as "gene_weight": few genes rather than many.

    Parameters
    ----------
    output
        Key of a numeric output.
    """
    return Loss(((1.0, L1(output=output)),))


def reconstruction(output: str, layer: str | None = None) -> Loss:
    """Mean squared difference between a matrix that the plan computes and one of the AnnData.

    Parameters
    ----------
    output
        Name of a layer that the plan writes (cells, genes), such as "magic".
    layer
        Layer to compare with; default `X` as it is in the AnnData before the plan.
    """
    return Loss(((1.0, Reconstruction(output=output, target=layer)),))


def molecular_cross_validation(output: str, layer: str, *, scale: str = "linear", background: float = 0.01) -> Loss:
    """How well a denoised matrix predicts molecules that it has not seen (Batson et al. 2019).

    The deviance of a Poisson model per held-out molecule: rows of the output are brought to the linear scale, cut at
    0, made proportions, mixed with a share of the mean profile, and multiplied with the cell's held-out molecules. The
    plan must read the other molecules only: :func:`scdiffx.pp.split_counts` splits them.

    Parameters
    ----------
    output
        Name of a layer that the plan writes (cells, genes), such as "magic".
    layer
        Layer with the counts held out.
    scale
        What the output is: "linear" (proportional to expression), "sqrt" or "log1p" of that.
    background
        Share of the mean profile, in (0, 1): without it one molecule of a gene predicted to be absent costs infinity.
    """
    if scale not in _SCALES:
        raise ValueError(f"scale={scale!r} is not available. Available: {list(_SCALES)}")
    if not 0 < background < 1:
        raise ValueError(f"background={background!r} must lie between 0 and 1")
    term = MolecularCrossValidation(output=output, target=layer, scale=scale, background=float(background))
    return Loss(((1.0, term),))


_SCALES = {"linear": lambda v: v, "sqrt": jnp.square, "log1p": jnp.expm1}


def _masked_mean(x: Array, keep: Array) -> Array:
    total = keep.sum()
    return jnp.where(keep, x, 0).sum() / jnp.maximum(total, 1)


def _finite(value: Array, target: Array, keep: Array) -> tuple[Array, Array, Array]:
    """Both with harmless numbers where they are not finite, and the mask without those cells."""
    keep = keep & jnp.isfinite(value) & jnp.isfinite(target)
    return jnp.where(keep, value, 0), jnp.where(keep, target, 0), keep


def _standardised(x: Array, keep: Array) -> Array:
    mean = _masked_mean(x, keep)
    centred = x - mean
    variance = _masked_mean(centred**2, keep)
    # A constant output has no order: its derivative is 0, neither NaN nor that of the rounding error of its mean.
    varies = variance > (8 * jnp.finfo(x.dtype).eps * mean) ** 2
    return jnp.where(varies, centred / jnp.sqrt(jnp.where(varies, variance, 1)), 0)


@operator
class Correlation:
    """See :func:`correlation`."""

    output: str = static()
    target: str | None = static(default=None)

    def __call__(
        self, value: Float[Array, " cells"], target: Float[Array, " cells"], keep: Bool[Array, " cells"]
    ) -> Array:
        value, target, keep = _finite(value, target, keep)
        return 1 - _masked_mean(_standardised(value, keep) * _standardised(target, keep), keep)


@operator
class TimeOrder:
    """See :func:`time_order`."""

    output: str = static()
    target: str | None = static(default=None)
    temperature: float = static(default=0.1)

    def __call__(
        self, value: Float[Array, " cells"], target: Float[Array, " cells"], keep: Bool[Array, " cells"]
    ) -> Array:
        value, target, keep = _finite(value, target, keep)
        value = _standardised(value, keep)
        n = value.shape[0]
        # Cyclic shifts by fixed distances pair every cell with the same number of others, without indexing.
        shifts = np.unique(np.random.default_rng(0).integers(1, max(n, 2), min(_PARTNERS, max(n - 1, 1))))

        def one(shift: Array) -> tuple[Array, Array]:
            other = (jnp.arange(n) + shift) % n
            sign = jnp.sign(target[other] - target)
            counted = keep & keep[other] & (sign != 0)
            cost = jax.nn.softplus(-sign * (value[other] - value) / self.temperature) * self.temperature
            return jnp.where(counted, cost, 0).sum(), counted.sum()

        costs, counts = jax.lax.map(one, jnp.asarray(shifts))
        return costs.sum() / jnp.maximum(counts.sum(), 1)


@operator
class CrossEntropy:
    """See :func:`cross_entropy`."""

    weight: Array | None = learnable(default=None)
    bias: Array | None = learnable(default=None)
    centre: Array | None = buffer(default=None)
    spread: Array | None = buffer(default=None)
    output: str = static()
    target: str | None = static(default=None)
    categorical: bool = static(default=True)

    def init(self, value: Array, target: Array, keep: Array) -> CrossEntropy:
        labelled = np.asarray(keep & (target >= 0))
        classes = int(np.asarray(target).max(initial=-1)) + 1
        if classes < 2 or not labelled.any():
            raise ValueError(f"{self.target!r} needs at least two labels among the training cells, found {classes}")
        centre, spread = value[labelled].mean(0), value[labelled].std(0)
        term = replace(
            self,
            weight=jnp.zeros((value.shape[1], classes), value.dtype),
            bias=jnp.zeros(classes, value.dtype),
            centre=centre,
            spread=jnp.where(spread > 0, spread, 1),
        )
        return _fit_readout(term, value, target, keep)

    def __call__(self, value: Float[Array, "cells dims"], target: Array, keep: Bool[Array, " cells"]) -> Array:
        if self.weight is None or self.bias is None or self.centre is None or self.spread is None:
            raise ValueError("CrossEntropy needs its readout: call `term = term.init(value, target, keep)` first")
        logits = (value - self.centre) / self.spread @ self.weight + self.bias
        keep = keep & (target >= 0)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(target, 0)[:, None], axis=1)[:, 0]
        return -_masked_mean(chosen, keep)


def _fit_readout(term: CrossEntropy, value: Array, target: Array, keep: Array) -> CrossEntropy:
    """Start at the readout of the unfitted plan, so that a fit is compared with the defaults at their best."""
    from jax.flatten_util import ravel_pytree
    from scipy.optimize import minimize

    flat, unravel = ravel_pytree((term.weight, term.bias))

    def cost(parameters: Array) -> Array:
        weight, bias = unravel(parameters)
        return replace(term, weight=weight, bias=bias)(value, target, keep)

    both = jax.jit(jax.value_and_grad(cost))

    def on_host(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        loss, slope = both(jnp.asarray(parameters, flat.dtype))
        return float(loss), np.asarray(slope, np.float64)

    found = minimize(on_host, np.asarray(flat, np.float64), jac=True, method="L-BFGS-B", options={"maxiter": 100})
    weight, bias = unravel(jnp.asarray(found.x, flat.dtype))
    return replace(term, weight=weight, bias=bias)


@operator
class L1:
    """See :func:`l1`."""

    output: str = static()
    target: str | None = static(default=None)

    def __call__(self, value: Array, target: Any, keep: Any) -> Array:
        return jnp.abs(value).mean()


def _same_shape(value: Array, target: Any, output: str) -> None:
    if value.ndim != 2 or value.shape != tuple(target.shape):
        raise ValueError(f"{output!r} has shape {value.shape}, its target {tuple(target.shape)}: they must be equal")


@operator
class Reconstruction:
    """See :func:`reconstruction`."""

    of_matrix: ClassVar[bool] = True
    output: str = static()
    target: str | None = static(default=None)

    def __call__(self, value: Float[Array, "cells genes"], target: Matrix, keep: Bool[Array, " cells"]) -> Array:
        _same_shape(value, target, self.output)
        if isinstance(target, _Counts):
            there = values_at(target, value)
            errors = (value**2).sum(1) + row_sums(target.with_data((there - target.data) ** 2 - there**2))
        else:
            errors = ((value - target) ** 2).sum(1)
        return _masked_mean(errors / value.shape[1], keep)


@operator
class MolecularCrossValidation:
    """See :func:`molecular_cross_validation`."""

    of_matrix: ClassVar[bool] = True
    output: str = static()
    target: str | None = static(default=None)
    scale: str = static(default="linear")
    background: float = static(default=0.01)

    def __call__(self, value: Float[Array, "cells genes"], target: Matrix, keep: Bool[Array, " cells"]) -> Array:
        _same_shape(value, target, self.output)
        share = proportions(value, keep, self.scale, self.background)
        size = row_sums(target)
        if isinstance(target, _Counts):
            log_share = jnp.where(target.data > 0, jnp.log(jnp.maximum(values_at(target, share), _TINY)), 0)
            explained = row_sums(target.with_data(target.data * log_share))
            own = row_sums(target.with_data(jax.scipy.special.xlogy(target.data, target.data)))
        else:
            explained = jax.scipy.special.xlogy(target, share).sum(1)
            own = jax.scipy.special.xlogy(target, target).sum(1)
        # Expected and observed totals of a cell are equal, so they cancel in the deviance.
        deviance = 2 * (own - explained - jax.scipy.special.xlogy(size, size))
        return jnp.where(keep, deviance, 0).sum() / jnp.maximum(jnp.where(keep, size, 0).sum(), 1)


_TINY = 1e-30


def proportions(value: Array, keep: Array, scale: str, background: float) -> Array:
    """Rows as positive shares of the genes: on the linear scale, mixed with the mean profile of the cells kept."""
    rate = jnp.maximum(_SCALES[scale](jnp.maximum(value, 0)), 0)
    total = rate.sum(1, keepdims=True)
    share = rate / jnp.where(total > 0, total, 1)
    # A gene that no cell has gets a share of its own, small as it is.
    mean = jnp.where(keep[:, None], share, 0).sum(0) + 1 / value.shape[1]
    mean = mean / mean.sum()
    return jnp.where(total > 0, (1 - background) * share + background * mean, mean)
