"""Gene regulation: each gene regressed on the transcription factors, by ridge or by the lasso."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scdiffx._core.counts import Matrix, column_sums, fold_rows, matmul, n_rows, scale_rows
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.random import as_seed
from scdiffx.ops._grn_lasso import descended, lasso

__all__ = ["GRN", "GRNResult"]

# Penalties to choose from, per cell, of coefficients of standardised genes.
PENALTIES = {
    "ridge": tuple(float(x) for x in np.geomspace(1e-4, 10, 11)),
    # From that which leaves no weight, so that each start is near.
    "lasso": tuple(float(x) for x in np.geomspace(1, 1e-4, 13)),
}
_WORSE = 2
# How well the lasso's weights are known where they are compared alone.
_ROUGH = 1e-4
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
    """Regression of each gene on the transcription factors, in standardised expression: ridge, or the lasso.

    `tfs` are the columns of the factors. A gene that is a factor itself is regressed on the others. The weights of gene
    j minimise ``|z_j - Z w|^2 / n + penalty |w|^2``; all genes are solved with one factorisation. With `method`
    "lasso" they minimise ``|z_j - Z w|^2 / (2 n) + penalty |w|_1``, as scikit-learn's do: most are 0. Derivatives are
    those of the minimum, at the factors that are chosen. With `regulators` (genes, most), the positions among `tfs` of
    the factors that a prior network has for each gene (-1 for none), a gene is regressed on these alone.

    Where `penalty` is None, `init` takes the one of eleven, from 1e-4 to 10, with which a random fifth of the cells is
    predicted best from the others, over all genes together; for the lasso the one of thirteen, from 1 down to 1e-4 or
    to where two in a row predict worse. `r2` (genes,) is the share of each gene's variance that is predicted there.

    With `n_subsamples` (even) `init` also draws so many halves of the cells, in pairs without a cell in common;
    `stability` (tfs, genes) is the share of them in which the lasso gives the edge a weight.

    The activity of a factor in a cell is the sum of its targets' standardised expression, weighted by its weights
    divided by their norm: it is high where what the factor raises is high, and what it lowers is low.
    """

    penalty: float | Array | None = learnable(default=None, constraint="positive")
    tfs: Int[Array, " tfs"] | None = buffer(default=None)
    regulators: Int[Array, "genes most"] | None = buffer(default=None)
    r2: Float[Array, " genes"] | None = buffer(default=None)
    stability: Float[Array, "tfs genes"] | None = buffer(default=None)
    method: str = static(default="ridge")
    n_subsamples: int = static(default=0)

    def init(self, x: Matrix, key: Array | None = None) -> GRN:
        if self.tfs is None:
            raise ValueError("GRN needs tfs, the columns of the transcription factors")
        _check(self.method, self.n_subsamples)
        rng, held = held_out_cells(n_rows(x), 0 if key is None else as_seed(key))
        penalties = PENALTIES[self.method] if self.penalty is None else (float(self.penalty),)
        best, errors = _best(held_out(x, jnp.asarray(held), self), self, penalties)
        op = replace(self, penalty=jnp.asarray(best, x.dtype), r2=1 - errors)
        return replace(op, stability=_stability(x, op, rng)) if self.n_subsamples else op

    def __call__(self, x: Matrix) -> GRNResult:
        assert self.tfs is not None
        m = standardised(sums(x, self.tfs), n_rows(x), self.tfs)
        weights = solved(m, self)
        return GRNResult(weights, active(x, weights, m))


def held_out_cells(n: int, seed: int) -> tuple[np.random.Generator, Bool[np.ndarray, " cells"]]:
    """The fifth of the cells on which predictions are judged, and the generator after the draw."""
    rng = np.random.default_rng(seed)
    return rng, rng.permutation(n) < max(1, round(_HELD_OUT * n))


def active(x: Matrix, weights: Float[Array, "tfs genes"], m: Moments) -> Float[Array, "cells tfs"]:
    """Activities of the factors."""
    square = (weights**2).sum(1, keepdims=True)
    # A factor without targets has the activity 0, and a norm without a derivative.
    share = weights / jnp.sqrt(jnp.where(square > 0, square, 1)) / m.scale
    return matmul(x, share.T) - share @ m.mean


def _check(method: str, n_subsamples: int) -> None:
    if method not in PENALTIES:
        raise ValueError(f"method={method!r} is unknown. Available: {sorted(PENALTIES)}")
    if n_subsamples < 0 or n_subsamples % 2:
        raise ValueError(f"n_subsamples={n_subsamples!r} must be even and at least 0: halves come in pairs")
    if n_subsamples and method != "lasso":
        raise ValueError(f"n_subsamples={n_subsamples!r} needs method='lasso': ridge regression chooses no edges")


class _Sums(NamedTuple):
    total: Float[Array, " genes"]
    square: Float[Array, " genes"]
    cross: Float[Array, "tfs genes"]


def sums(x: Matrix, tfs: Array) -> _Sums:
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
    if op.method == "lasso":
        return lasso(covariance, m.cross, allowed(op, m.cross.shape[1]), penalty)
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


def allowed(op: GRN, n_genes: int) -> Bool[Array, "tfs genes"]:
    """Which edges there may be."""
    assert op.tfs is not None
    n_tfs, genes = op.tfs.shape[0], jnp.arange(n_genes)
    if op.regulators is None:
        return op.tfs[:, None] != genes
    at = jnp.where(op.regulators >= 0, op.regulators, n_tfs)
    return jnp.zeros((n_tfs, n_genes), bool).at[at, genes[:, None]].set(True, mode="drop")


class _HeldOut(NamedTuple):
    """Moments of the cells that are kept, and of the others about the mean of these, in their standard deviations."""

    kept: Moments
    square: Float[Array, " genes"]
    cross: Float[Array, "tfs genes"]


@jax.jit
def held_out(x: Matrix, held: Array, op: GRN) -> _HeldOut:
    assert op.tfs is not None
    kept, out = (scale_rows(x, side.astype(x.dtype)) for side in (~held, held))
    m = standardised(sums(kept, op.tfs), (~held).sum(), op.tfs)
    s, n = sums(out, op.tfs), held.sum()
    mean, at = m.mean, m.mean[op.tfs]
    cross = s.cross - jnp.outer(at, s.total) - jnp.outer(s.total[op.tfs], mean) + n * jnp.outer(at, mean)
    square = (s.square - 2 * mean * s.total + n * mean**2) / m.scale**2
    return _HeldOut(m, square, cross / jnp.outer(m.scale[op.tfs], m.scale))


@jax.jit
def _error(h: _HeldOut, op: GRN, penalty: Array, start: Array) -> tuple[Array, Array]:
    """Squared errors in held-out cells, as shares of the squared distances there from the mean, and the weights."""
    assert op.tfs is not None
    if op.method == "lasso":
        c = h.kept.cross
        w = descended(c[:, op.tfs], c, allowed(op, c.shape[1]), penalty, start, _ROUGH)
    else:
        w = solved(h.kept, replace(op, penalty=penalty))
    left = h.square - 2 * (w * h.cross).sum(0) + (w * (h.cross[:, op.tfs] @ w)).sum(0)
    return jnp.where(h.square > 0, left / jnp.where(h.square > 0, h.square, 1), 1), w


def _best(h: _HeldOut, op: GRN, penalties: tuple[float, ...]) -> tuple[float, Float[Array, " genes"]]:
    """The penalty with which the errors are smallest, and these."""
    found: list[tuple[float, float, Array]] = []
    weights = jnp.zeros_like(h.cross)
    for penalty in penalties:
        errors, weights = _error(h, op, jnp.asarray(penalty, h.cross.dtype), weights)
        found.append((float(errors.mean()), penalty, errors))
        least = int(np.argmin([mean for mean, *_ in found]))
        # The path of the lasso goes from none to all weights, each step slower than the one before.
        if op.method == "lasso" and len(found) - least > _WORSE:
            break
    return found[least][1:]


def _stability(x: Matrix, op: GRN, rng: np.random.Generator) -> Float[Array, "tfs genes"]:
    """In which share of halves of the cells each edge has a weight (Meinshausen and Buehlmann 2010)."""
    assert op.tfs is not None
    whole = jax.jit(sums)(x, op.tfs)
    start, n = jax.jit(solved)(standardised(whole, n_rows(x), op.tfs), op), n_rows(x)
    chosen = jnp.zeros_like(start)
    for _ in range(op.n_subsamples // 2):
        half = jnp.asarray(rng.permutation(n) < n // 2)
        chosen = chosen + _chosen(x, half, whole, op, start)
    return chosen / op.n_subsamples


@jax.jit
def _chosen(x: Matrix, half: Array, whole: _Sums, op: GRN, start: Array) -> Float[Array, "tfs genes"]:
    """Which edges have a weight among half of the cells, and among the others: 0, 1 or 2."""
    assert op.tfs is not None
    one = sums(scale_rows(x, half.astype(x.dtype)), op.tfs)
    both = ((one, half.sum()), (jax.tree.map(jnp.subtract, whole, one), (~half).sum()))
    may, penalty = allowed(op, x.shape[1]), jnp.asarray(op.penalty, x.dtype)
    crosses = [standardised(s, n, op.tfs).cross for s, n in both]
    found = [descended(c[:, op.tfs], c, may, penalty, start, _ROUGH) != 0 for c in crosses]
    return jnp.asarray(found).sum(0).astype(x.dtype)
