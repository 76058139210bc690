"""The terms of losses on time, labels and matrices: operators on an output and what it is compared with."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from scdiffx._core.counts import Counts, Matrix, row_sums, values_at
from scdiffx._core.fields import buffer, learnable, operator, replace, static

__all__ = [
    "L1",
    "SCALES",
    "TINY",
    "Correlation",
    "CrossEntropy",
    "MolecularCrossValidation",
    "Reconstruction",
    "TimeOrder",
    "deviance_per_molecule",
    "linear_rate",
    "masked_mean",
    "proportions",
    "same_shape",
]

# Each cell is compared with this many others: enough for a stable order, linear in cells.
_PARTNERS = 64

SCALES = {"linear": lambda v: v, "sqrt": jnp.square, "log1p": jnp.expm1}


def masked_mean(x: Array, keep: Array) -> Array:
    total = keep.sum()
    return jnp.where(keep, x, 0).sum() / jnp.maximum(total, 1)


def _finite(value: Array, target: Array, keep: Array) -> tuple[Array, Array, Array]:
    """Both with harmless numbers where they are not finite, and the mask without those cells."""
    target = jnp.asarray(target, value.dtype)
    keep = keep & jnp.isfinite(value) & jnp.isfinite(target)
    return jnp.where(keep, value, 0), jnp.where(keep, target, 0), keep


def _standardised(x: Array, keep: Array) -> Array:
    mean = masked_mean(x, keep)
    centred = x - mean
    variance = masked_mean(centred**2, keep)
    # A constant output has no order: its derivative is 0, neither NaN nor that of the rounding error of its mean.
    varies = variance > (8 * jnp.finfo(x.dtype).eps * mean) ** 2
    return jnp.where(varies, centred / jnp.sqrt(jnp.where(varies, variance, 1)), 0)


@operator
class Correlation:
    """See :func:`scdiffx.losses.correlation`."""

    of_numbers: ClassVar[bool] = True
    output: str = static()
    target: str | None = static(default=None)

    def __call__(
        self, value: Float[Array, " cells"], target: Float[Array, " cells"], keep: Bool[Array, " cells"]
    ) -> Array:
        value, target, keep = _finite(value, target, keep)
        return 1 - masked_mean(_standardised(value, keep) * _standardised(target, keep), keep)


@operator
class TimeOrder:
    """See :func:`scdiffx.losses.time_order`."""

    of_numbers: ClassVar[bool] = True
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
    """See :func:`scdiffx.losses.cross_entropy`."""

    weight: Array | None = learnable(default=None)
    bias: Array | None = learnable(default=None)
    centre: Array | None = buffer(default=None)
    spread: Array | None = buffer(default=None)
    output: str = static()
    target: str | None = static(default=None)
    categorical: bool = static(default=True)

    def init(self, value: Array, target: Array, keep: Array, key: Array | None = None) -> CrossEntropy:
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
        return -masked_mean(chosen, keep)


def _fit_readout(term: CrossEntropy, value: Array, target: Array, keep: Array) -> CrossEntropy:
    """Start at the readout of the unfitted plan, so that a fit is compared with the defaults at their best.

    That is logistic regression with a standard normal prior on its weights: without one, cells that a plane separates
    have no optimum, and in many dimensions the readout knows the training cells by heart before the fit begins.
    """
    from jax.flatten_util import ravel_pytree
    from scipy.optimize import minimize

    flat, unravel = ravel_pytree((term.weight, term.bias))
    labelled = (keep & (target >= 0)).sum()

    def cost(parameters: Array) -> Array:
        weight, bias = unravel(parameters)
        return replace(term, weight=weight, bias=bias)(value, target, keep) + (weight**2).sum() / (2 * labelled)

    both = jax.jit(jax.value_and_grad(cost))

    def on_host(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        loss, slope = both(jnp.asarray(parameters, flat.dtype))
        return float(loss), np.asarray(slope, np.float64)

    found = minimize(on_host, np.asarray(flat, np.float64), jac=True, method="L-BFGS-B", options={"maxiter": 100})
    weight, bias = unravel(jnp.asarray(found.x, flat.dtype))
    return replace(term, weight=weight, bias=bias)


@operator
class L1:
    """See :func:`scdiffx.losses.l1`."""

    output: str = static()
    target: str | None = static(default=None)

    def __call__(self, value: Array, target: Any, keep: Any) -> Array:
        return jnp.abs(value).mean()


def same_shape(value: Array, target: Any, output: str) -> None:
    if value.ndim != 2 or value.shape != tuple(target.shape):
        raise ValueError(f"{output!r} has shape {value.shape}, its target {tuple(target.shape)}: they must be equal")


@operator
class Reconstruction:
    """See :func:`scdiffx.losses.reconstruction`."""

    of_matrix: ClassVar[bool] = True
    output: str = static()
    target: str | None = static(default=None)

    def __call__(self, value: Float[Array, "cells genes"], target: Matrix, keep: Bool[Array, " cells"]) -> Array:
        same_shape(value, target, self.output)
        if isinstance(target, Counts):
            there = values_at(target, value)
            errors = (value**2).sum(1) + row_sums(target.with_data((there - target.data) ** 2 - there**2))
        else:
            errors = ((value - target) ** 2).sum(1)
        return masked_mean(errors / value.shape[1], keep)


@operator
class MolecularCrossValidation:
    """See :func:`scdiffx.losses.molecular_cross_validation`."""

    of_matrix: ClassVar[bool] = True
    output: str = static()
    target: str | None = static(default=None)
    scale: str = static(default="linear")
    background: float = static(default=0.01)

    def __call__(self, value: Float[Array, "cells genes"], target: Matrix, keep: Bool[Array, " cells"]) -> Array:
        same_shape(value, target, self.output)
        share = proportions(value, keep, self.scale, self.background)
        size = row_sums(target)
        if isinstance(target, Counts):
            log_share = jnp.where(target.data > 0, jnp.log(jnp.maximum(values_at(target, share), TINY)), 0)
            explained = row_sums(target.with_data(target.data * log_share))
            own = row_sums(target.with_data(jax.scipy.special.xlogy(target.data, target.data)))
        else:
            explained = jax.scipy.special.xlogy(target, share).sum(1)
            own = jax.scipy.special.xlogy(target, target).sum(1)
        return deviance_per_molecule(own, explained, size, keep)


TINY = 1e-30


def deviance_per_molecule(own: Array, explained: Array, size: Array, keep: Array) -> Array:
    """Poisson deviance of the kept cells over their molecules, from cells' sums of ``n log n`` and ``n log share``."""
    # Expected and observed totals of a cell are equal, so they cancel in the deviance.
    deviance = 2 * (own - explained - jax.scipy.special.xlogy(size, size))
    return jnp.where(keep, deviance, 0).sum() / jnp.maximum(jnp.where(keep, size, 0).sum(), 1)


def linear_rate(value: Array, scale: str) -> Array:
    """Values brought to the linear scale, cut at 0."""
    return jnp.maximum(SCALES[scale](jnp.maximum(value, 0)), 0)


def proportions(value: Array, keep: Array, scale: str, background: float) -> Array:
    """Rows as positive shares of the genes: on the linear scale, mixed with the mean profile of the cells kept."""
    rate = linear_rate(value, scale)
    total = rate.sum(1, keepdims=True)
    share = rate / jnp.where(total > 0, total, 1)
    # A gene that no cell has gets a share of its own, small as it is.
    mean = jnp.where(keep[:, None], share, 0).sum(0) + 1 / value.shape[1]
    mean = mean / mean.sum()
    return jnp.where(total > 0, (1 - background) * share + background * mean, mean)
