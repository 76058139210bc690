"""Gene regulation: each gene regressed on the transcription factors, by ridge."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core.counts import Matrix, column_sums, fold_rows, matmul, n_rows, scale_rows
from scdiffx._core.fields import buffer, learnable, operator, replace
from scdiffx._core.random import as_seed

__all__ = ["GRN", "GRNResult"]

# Penalties to choose from, per cell, of coefficients of standardised genes.
PENALTIES = tuple(float(x) for x in np.geomspace(1e-4, 10, 11))
_HELD_OUT = 0.2
# What a standardised gene has to vary by, relative to its mean square, to vary at all.
_VARIES = 1e-10


class GRNResult(NamedTuple):
    """Regulation.

    `weights` (tfs, genes): by how many of its standard deviations a gene changes when a factor changes by one of its
    own, the other factors as they are; 0 of a factor on itself, and wherever the prior has no edge. `activity` (cells,
    tfs): of the factors, from their targets.
    """

    weights: Float[Array, "tfs genes"]
    activity: Float[Array, "cells tfs"]


class Moments(NamedTuple):
    """Covariances of factors and genes, in standard deviations; `scale` holds these, and is 1 for constant genes."""

    mean: Float[Array, " genes"]
    scale: Float[Array, " genes"]
    cross: Float[Array, "tfs genes"]


@operator
class GRN:
    """Ridge regression of each gene on the transcription factors, in standardised expression.

    `tfs` are the columns of the factors. A gene that is a factor itself is regressed on the others. The weights of gene
    j minimise ``|z_j - Z w|^2 / n + penalty |w|^2``; all genes are solved with one factorisation. With `regulators`
    (genes, most), the positions among `tfs` of the factors that a prior network has for each gene (-1 for none), a gene
    is regressed on these alone.

    Where `penalty` is None, `init` takes the one of eleven, from 1e-4 to 10, with which a random fifth of the cells is
    predicted best from the others, over all genes together. `r2` (genes,) is the share of the variance of each gene
    that is predicted there.

    The activity of a factor in a cell is the sum of its targets' standardised expression, weighted by its weights
    divided by their norm: it is high where what the factor raises is high, and what it lowers is low.
    """

    penalty: float | Array | None = learnable(default=None, constraint="positive")
    tfs: Int[Array, " tfs"] | None = buffer(default=None)
    regulators: Int[Array, "genes most"] | None = buffer(default=None)
    r2: Float[Array, " genes"] | None = buffer(default=None)

    def init(self, x: Matrix, key: Array | None = None) -> GRN:
        if self.tfs is None:
            raise ValueError("GRN needs tfs, the columns of the transcription factors")
        rng = np.random.default_rng(0 if key is None else as_seed(key))
        held = rng.permutation(n_rows(x)) < max(1, round(_HELD_OUT * n_rows(x)))
        penalties = PENALTIES if self.penalty is None else (float(self.penalty),)
        errors = np.asarray(_errors(x, jnp.asarray(held), self, jnp.asarray(penalties, x.dtype)))
        best = int(np.argmin(errors.mean(1)))
        return replace(self, penalty=jnp.asarray(penalties[best], x.dtype), r2=jnp.asarray(1 - errors[best]))

    def __call__(self, x: Matrix) -> GRNResult:
        assert self.tfs is not None
        m = standardised(_sums(x, self.tfs), n_rows(x), self.tfs)
        weights = solved(m, self)
        norm = jnp.sqrt((weights**2).sum(1, keepdims=True))
        share = weights / jnp.where(norm > 0, norm, 1) / m.scale
        return GRNResult(weights, matmul(x, share.T) - share @ m.mean)


class _Sums(NamedTuple):
    total: Float[Array, " genes"]
    square: Float[Array, " genes"]
    cross: Float[Array, "tfs genes"]


def _sums(x: Matrix, tfs: Array) -> _Sums:
    zero = jnp.zeros((tfs.shape[0], x.shape[1]), x.dtype)
    cross = fold_rows(x, lambda total, block, _: total + block[:, tfs].T @ block, zero)
    return _Sums(column_sums(x), column_sums(x, jnp.square), cross)


def standardised(s: _Sums, n: int | Array, tfs: Array) -> Moments:
    mean = s.total / n
    variance = s.square / n - mean**2
    varies = variance > _VARIES * s.square / n
    scale = jnp.sqrt(jnp.where(varies, variance, 1))
    cross = (s.cross / n - jnp.outer(mean[tfs], mean)) / jnp.outer(scale[tfs], scale)
    return Moments(mean, scale, jnp.where(jnp.outer(varies[tfs], varies), cross, 0))


def solved(m: Moments, op: GRN) -> Float[Array, "tfs genes"]:
    """The weights, by one inverse for all genes, or by one small system a gene where a prior says on what."""
    assert op.tfs is not None
    n_tfs = op.tfs.shape[0]
    covariance = m.cross[:, op.tfs]
    penalty = jnp.asarray(op.penalty, m.cross.dtype)
    if op.regulators is None:
        inverse = jnp.linalg.inv(covariance + penalty * jnp.eye(n_tfs, dtype=m.cross.dtype))
        # A factor on the others: the inverse of the matrix without its row and column is in the whole one.
        among = -inverse / jnp.diag(inverse)
        return (inverse @ m.cross).at[:, op.tfs].set(jnp.where(jnp.eye(n_tfs, dtype=bool), 0, among))

    def one(gene: tuple[Array, Array]) -> Array:
        at, with_gene = gene
        there = at >= 0
        both = there[:, None] & there
        system = jnp.where(both, covariance[at[:, None], at], 0) + jnp.diag(jnp.where(there, penalty, 1))
        found = jnp.linalg.solve(system, jnp.where(there, with_gene[at], 0))
        return jnp.zeros(n_tfs, found.dtype).at[jnp.where(there, at, n_tfs)].set(found, mode="drop")

    return jax.lax.map(one, (op.regulators, m.cross.T), batch_size=64).T


@jax.jit
def _errors(x: Matrix, held: Array, op: GRN, penalties: Array) -> Float[Array, "penalties genes"]:
    """Squared errors in held-out cells, as shares of the squared distances there from the mean of the others."""
    assert op.tfs is not None
    kept, out = (scale_rows(x, side.astype(x.dtype)) for side in (~held, held))
    m = standardised(_sums(kept, op.tfs), (~held).sum(), op.tfs)
    s, n = _sums(out, op.tfs), held.sum()
    mean, at = m.mean, m.mean[op.tfs]
    cross = s.cross - jnp.outer(at, s.total) - jnp.outer(s.total[op.tfs], mean) + n * jnp.outer(at, mean)
    cross = cross / jnp.outer(m.scale[op.tfs], m.scale)
    square = (s.square - 2 * mean * s.total + n * mean**2) / m.scale**2

    def error(penalty: Array) -> Array:
        w = solved(m, replace(op, penalty=penalty))
        left = square - 2 * (w * cross).sum(0) + (w * (cross[:, op.tfs] @ w)).sum(0)
        return jnp.where(square > 0, left / jnp.where(square > 0, square, 1), 1)

    return jax.lax.map(error, penalties)
