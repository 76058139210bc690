"""How genes go with a number of each cell: correlations, and slopes averaged over cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scdiffx._core.counts import Counts, Matrix, map_values, transposed_product

__all__ = ["Correlations", "correlations", "mean_slopes"]


class Correlations(NamedTuple):
    """Pearson's `value` of each gene in each group (0 where either side does not vary), and the target's `spread`."""

    value: Float[Array, "genes groups"]
    spread: Float[Array, " groups"]


def correlations(x: Matrix, target: Float[Array, "cells groups"], member: Float[Array, "cells groups"]) -> Correlations:
    """Correlate the genes with a target in each group; `member` is 1 for the cells of a group."""
    n = member.sum(0)
    centred = (target - (target * member).sum(0) / n) * member
    spread = jnp.sqrt((centred**2).sum(0) / n)
    mean, square = transposed_product(x, member) / n, transposed_product(map_values(x, jnp.square), member) / n
    variance = square - mean**2
    varies = (variance > 100 * jnp.finfo(x.dtype).eps * square) & (spread > 0)
    scale = jnp.sqrt(jnp.where(varies, variance, 1)) * jnp.where(spread > 0, spread, 1)
    value = jnp.where(varies, transposed_product(x, centred) / n / scale, 0)
    return Correlations(jnp.clip(value, -1, 1), spread)


def mean_slopes(
    f: Callable[[Matrix], Float[Array, " cells"]],
    x: Matrix,
    member: Float[Array, "cells groups"],
    signs: Float[Array, "probes cells"],
) -> Float[Array, "genes groups"]:
    """The derivative of a cell's target in its own expression, averaged over the cells of a group that have the gene.

    One product with the transposed Jacobian for each row of random `signs` (0 for cells to leave out). A cell's target
    depends on other cells as well; times the cell's own sign such terms cancel in the mean (Hutchinson).
    """
    start: Any = x.data if isinstance(x, Counts) else x

    def matrix(values: Array) -> Matrix:
        return x.with_data(values) if isinstance(x, Counts) else values

    _, pull = jax.vjp(lambda values: f(matrix(values)), start)

    def probe(total: Array, sign: Array) -> tuple[Array, None]:
        (slope,) = pull(sign)
        if isinstance(x, Counts):
            rows = jnp.pad(sign, (0, x.data.shape[0] * x.block_rows - len(sign))).reshape(-1, x.block_rows)
            own = jax.vmap(lambda s, at: s.at[at].get(mode="fill", fill_value=0))(rows, x.row)
        else:
            own = sign[:, None]
        return total + own * slope, None

    total, _ = jax.lax.scan(probe, jnp.zeros_like(start), signs)
    there = (start != 0).astype(start.dtype)
    slopes = transposed_product(matrix(total / len(signs) * there), member)
    return slopes / jnp.maximum(transposed_product(matrix(there), member), 1)
