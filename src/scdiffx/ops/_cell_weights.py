"""Soft quality control: a weight for each cell instead of a filter."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scdiffx._core.fields import buffer, learnable, operator, replace, static

__all__ = ["CellWeights"]


@operator
class CellWeights:
    """The product of sigmoids, one for each cut-off: near 1 on its right side, near 0 on the other, 1/2 on it.

    `sides` says what each cut-off is: the position of its metric among the arguments, and 1 for a lower bound or -1
    for an upper. The transition is `temperature` robust standard deviations of the metric wide (1.4826 MAD, estimated
    at `init`); as it falls to 0 the weights become the filter. Cut-offs and temperature can be learned.

    Examples
    --------
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> mito = np.linspace(0, 0.2, 60)
    >>> op = sd.ops.CellWeights(cutoff=np.array([0.1]), sides=((0, -1),)).init(mito)
    >>> float(op(mito)[0]) > 0.5 > float(op(mito)[-1])
    True
    """

    by_cell: ClassVar[bool] = True
    cutoff: Float[Array, " bounds"] = learnable()
    temperature: float | Array = learnable(default=0.1, constraint="positive")
    spread: Float[Array, " bounds"] | None = buffer(default=None)
    sides: tuple[tuple[int, int], ...] = static()

    def init(self, *metrics: Float[Array, " cells"], key: Array | None = None) -> CellWeights:
        if len(self.sides) != len(self.cutoff):
            raise ValueError(f"there are {len(self.cutoff)} cut-offs and {len(self.sides)} sides")
        spread = []
        for metric, _ in self.sides:
            x = metrics[metric]
            robust = 1.4826 * jnp.median(jnp.abs(x - jnp.median(x)))
            # More than half of the cells can share one value, such as no mitochondrial count.
            robust = jnp.where(robust > 0, robust, x.std())
            spread.append(jnp.where(robust > 0, robust, 1))
        return replace(self, spread=jnp.stack(spread))

    def __call__(self, *metrics: Float[Array, " cells"]) -> Float[Array, " cells"]:
        if self.spread is None:
            raise ValueError("CellWeights needs the spread of the metrics: call `op = op.init(*metrics)` first")
        log_weight = jnp.zeros_like(metrics[0])
        for (metric, side), cutoff, spread in zip(self.sides, self.cutoff, self.spread, strict=True):
            log_weight += jax.nn.log_sigmoid(side * (metrics[metric] - cutoff) / (self.temperature * spread))
        return jnp.exp(log_weight)
