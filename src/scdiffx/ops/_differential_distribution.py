"""Differences between whole distributions of expression: the Kolmogorov-Smirnov statistic, exact and soft."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scdiffx._core.counts import Matrix, dense, take_columns
from scdiffx._core.fields import learnable, operator, static

__all__ = ["DifferentialDistribution", "DifferentialDistributionResult"]

_BLOCK_GENES = 256
_POINTS = 64  # where the soft distribution functions are compared


class DifferentialDistributionResult(NamedTuple):
    """Per pair and gene: the KS `statistic` in [0, 1], and moments of both sides.

    `mean`, `spread` (mean absolute deviation from the mean) and `variance` (with divisor n).
    """

    statistic: Float[Array, "pairs genes"]
    mean: Float[Array, "pairs genes 2"]
    spread: Float[Array, "pairs genes 2"]
    variance: Float[Array, "pairs genes 2"]


@operator
class DifferentialDistribution:
    """The largest gap between the distribution functions of a gene in two groups of cells (Kolmogorov; Smirnov).

    Groups are codes (cells,), -1 for none, or columns of a soft `membership` (cells, groups). Each of `pairs` names two
    groups; -1 as the second means all other cells. The gap is taken after the last of equal values.

    With ``temperature=None`` it is exact: a derivative passes to soft memberships, and none to the expression, on whose
    ranks alone it depends. With a temperature each value counts as a logistic step of that width (in standard
    deviations of the gene), the functions are compared at 64 quantiles, and derivatives reach the expression; small
    temperatures come as near the exact gap as that grid allows.
    """

    temperature: float | Array | None = learnable(default=None, constraint="positive")
    pairs: tuple[tuple[int, int], ...] = static()

    def __call__(
        self, x: Matrix, membership: Int[Array, " cells"] | Float[Array, "cells groups"]
    ) -> DifferentialDistributionResult:
        shares = self._shares(membership, x.dtype)
        genes = x.shape[1]
        width = min(_BLOCK_GENES, genes)
        blocks = -(-genes // width)
        # The last block repeats the last gene.
        columns = jnp.minimum(jnp.arange(blocks * width), genes - 1).reshape(blocks, width)

        def block(at: Int[Array, " genes"]) -> tuple[Array, ...]:
            values = dense(take_columns(x, at))
            gaps = self._exact(values, shares) if self.temperature is None else self._soft(values, shares)
            return (gaps, *_moments(values, shares))

        found = jax.lax.map(jax.checkpoint(block), columns)
        return DifferentialDistributionResult(
            *(jnp.moveaxis(part, 0, 1).reshape(len(self.pairs), -1, *part.shape[3:])[:, :genes] for part in found)
        )

    def _shares(self, membership: Array, dtype: Any) -> Float[Array, "pairs 2 cells"]:
        """The weight of each cell on either side of each pair; sides sum to 1."""
        if membership.ndim == 1:
            everyone = (membership >= 0).astype(dtype)
            membership = jax.nn.one_hot(membership, max(max(pair) for pair in self.pairs) + 1, dtype=dtype)
        else:
            everyone = membership.sum(1)
        sides = []
        for first, second in self.pairs:
            weight = membership[:, first]
            sides.append(jnp.stack([weight, everyone - weight if second < 0 else membership[:, second]]))
        shares = jnp.stack(sides)
        total = shares.sum(2, keepdims=True)
        return (shares / jnp.where(total > 0, total, 1)).astype(dtype)

    def _exact(self, values: Array, shares: Array) -> Array:
        order = jnp.argsort(values, axis=0)
        ordered = jnp.take_along_axis(values, order, axis=0)
        last = jnp.concatenate([ordered[1:] > ordered[:-1], jnp.ones_like(ordered[:1], bool)])

        def gap(sides: Array) -> Array:
            difference = jnp.cumsum((sides[0] - sides[1])[order], axis=0)
            return jnp.where(last, jnp.abs(difference), 0).max(0)

        return jax.lax.map(gap, shares)

    def _soft(self, values: Array, shares: Array) -> Array:
        levels = (jnp.arange(_POINTS) + 0.5) / _POINTS
        points = jnp.quantile(values, levels, axis=0)
        variance = values.var(0)
        scale = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 1)
        width = jnp.asarray(self.temperature, values.dtype) * scale

        def at(point: Array) -> Array:
            # Two widths beyond the point, so that values equal to it count.
            step = jax.nn.sigmoid((point - values) / width + 2)
            return jnp.abs((shares[:, 0] - shares[:, 1]) @ step)

        return jax.lax.map(jax.checkpoint(at), points).max(0)


def _moments(values: Array, shares: Array) -> tuple[Array, Array, Array]:
    """Mean, mean absolute deviation and variance of each side of each pair (pairs, genes, 2)."""

    def one(share: Array) -> tuple[Array, Array, Array]:
        mean = share @ values
        apart = values - mean
        return mean, share @ jnp.abs(apart), share @ apart**2

    flat = shares.reshape(-1, shares.shape[2])
    found = jax.lax.map(one, flat)
    return tuple(jnp.moveaxis(part.reshape(*shares.shape[:2], -1), 1, 2) for part in found)  # type: ignore[return-value]
