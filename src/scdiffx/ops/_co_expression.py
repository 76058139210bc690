"""Co-expression of genes that mostly exclude each other, as a sign of doublets (cxds: Bais and Kostka 2020)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core import counts as C

_PAIRED = 500  # genes whose pairs are looked at


def co_expression(x: C.Matrix) -> tuple[Int[Array, " paired"], Float[Array, "paired paired"]]:
    """The genes whose presence varies most, and how surprising it is to find two of them in one cell.

    For each pair, minus the logarithm of the probability of at least as many cells with exactly one of the two, were
    their presences independent.
    """
    n = x.shape[0]
    frequency = np.asarray(C.detections(x), np.float64) / n
    genes = np.sort(np.argsort(-frequency * (1 - frequency), kind="stable")[:_PAIRED])
    part = C.take_columns(x, jnp.asarray(genes, jnp.int32))
    both = np.rint(np.asarray(_presence_gram(part), np.float64))
    alone = np.diag(both)[:, None] + np.diag(both)[None] - 2 * both
    share = np.diag(both) / n
    expected = share[:, None] * (1 - share) + share * (1 - share[:, None])
    surprise = -log_upper_tail(alone, n, expected)
    np.fill_diagonal(surprise, 0)
    return jnp.asarray(genes, jnp.int32), jnp.asarray(surprise, x.dtype)


@jax.jit
def _presence_gram(x: C.Matrix) -> Array:
    """The number of cells that have both genes of each pair."""
    genes = x.shape[1]

    def step(total: Array, block: Array, mask: Array) -> Array:
        present = (block > 0).astype(x.dtype)
        # Counts of a block are exact in any precision; their totals are kept as whole numbers.
        return total + (present.T @ present).astype(jnp.int32)

    return C.fold_rows(x, step, jnp.zeros((genes, genes), jnp.int32))


def log_upper_tail(observed: np.ndarray, n: int, p: np.ndarray) -> np.ndarray:
    """log P(X >= observed) for X ~ Binomial(n, p), also where the probability is too small for a float."""
    from scipy.special import betaln
    from scipy.stats import binom

    with np.errstate(divide="ignore"):
        log = np.asarray(binom.logsf(observed - 1, n, p))
    lost = np.flatnonzero(~np.isfinite(log.ravel()))
    if len(lost):
        k, q = np.ravel(observed)[lost], np.ravel(p)[lost]
        # The terms of the tail over its first, whose ratios fall from (n - k) q / ((k + 1) (1 - q)) < 1 on.
        total, term, i = np.ones(len(k)), np.ones(len(k)), 0
        while (term > 1e-12 * total).any():
            term = term * np.maximum(n - k - i, 0) * q / ((k + i + 1) * (1 - q))
            total, i = total + term, i + 1
        choose = -betaln(k + 1, n - k + 1) - np.log(n + 1)
        log.ravel()[lost] = choose + k * np.log(q) + (n - k) * np.log1p(-q) + np.log(total)
    return log


@jax.jit
def co_expressed(x: C.Matrix, surprise: Array) -> Float[Array, " cells"]:
    """The surprise of all pairs of genes that a cell has, summed, block by block."""

    def one(block: Array) -> Array:
        present = (block > 0).astype(surprise.dtype)
        return ((present @ surprise) * present).sum(1)

    return C.map_rows(x, one)
