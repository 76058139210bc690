"""Removal of ambient RNA: what share of a cell's molecules came from the soup around it, and which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core import counts as C
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.minibatch import host_csr
from scdiffx.ops._ambient_estimates import (
    Clusters,
    clustered,
    gene_weights,
    indicator,
    levels,
    likeliest,
    plausible,
    prior_strength,
    seed_of,
    shares,
    without_bursts,
)

__all__ = ["RemoveAmbient", "RemoveAmbientResult"]

# Ratios to the soup of genes that are not expressed scatter by a third. So up to about twice the cluster's level a gene
# counts as not expressed, by a soft step of this steepness.
_FOLD = 2.0
_STEEPNESS = 4
_MOST = 0.99


class RemoveAmbientResult(NamedTuple):
    """`corrected`: native counts, in the form of the input (cells, genes). `fraction`: ambient share (cells,)."""

    corrected: C.Matrix
    fraction: Float[Array, " cells"]


@operator
class RemoveAmbient:
    """Native counts of cells whose molecules are a mixture of their cluster's and of the soup's.

    The model of cell n in cluster c is x_ng ~ Poisson(l_n [(1 - rho_n) p_cg + rho_n a_g]), with the soup's composition
    `ambient` a, the composition p_c = (mean_c - level_c a) / (1 - level_c) of the cluster's own molecules, cut at 0,
    and rho_n around the `level` of the cluster. A count is divided by the posterior of its origin, which is the
    expectation step of this mixture; no more is taken from it than soup can plausibly give.

    `init` finds what is not given: the soup (the average cell), clusters (Leiden), their levels (the lower end of the
    ratios to the soup, over genes that are specific to other clusters: elsewhere the likelihood is flat), and how
    closely cells keep to them. The call estimates each cell's fraction by weighted least squares of its deviation from
    the cluster's mean, which is its likelihood with the natural variation of genes, and a normal prior around the level
    whose variance is the squared level over `concentration`. With a `seed`, corrected counts are integers.
    """

    ambient: Array | None = learnable(default=None, constraint="simplex")
    level: float | Array | None = learnable(default=None, constraint="unit")
    concentration: float | Array | None = learnable(default=None, constraint="positive")
    clusters: Clusters | None = buffer(default=None)
    membership: Int[Array, " cells"] | None = buffer(default=None, structure=True)
    seed: int | None = static(default=None)

    def init(self, x: C.Matrix, groups: Array | None = None, key: Array | None = None) -> RemoveAmbient:
        csr = host_csr(x).astype(np.float64)
        if groups is not None:
            codes = np.asarray(groups)
            if self.clusters is not None and codes.max() >= len(self.clusters.mean):
                raise ValueError(f"there are {codes.max() + 1} groups, but {len(self.clusters.mean)} were known before")
        elif self.clusters is not None:
            codes = likeliest(csr, np.asarray(self.clusters.mean))
        else:
            codes = clustered(x, seed_of(key))
        op = replace(self, membership=jnp.asarray(codes, jnp.int32))
        return op if op.clusters is not None else op._estimated(csr, codes, x.dtype)

    def _estimated(self, csr: Any, codes: np.ndarray, dtype: Any) -> RemoveAmbient:
        depth = np.asarray(csr.sum(1), np.float64).ravel()
        k = int(codes.max()) + 1
        mean, cut = without_bursts(csr, codes, k)
        size = indicator(codes, k) @ depth
        average = np.asarray(csr.sum(0), np.float64).ravel()
        ambient = shares(average if self.ambient is None else np.asarray(self.ambient, np.float64))
        level = levels(mean, size, ambient) if self.level is None else np.broadcast_to(self.level, k)
        level = np.asarray(level, np.float64)
        found = gene_weights(cut, codes, depth, mean, ambient, level)
        arrays = (jnp.asarray(ambient, dtype), jnp.asarray(level, dtype))
        op = replace(self, ambient=arrays[0], level=arrays[1])
        op = replace(op, clusters=jax.tree.map(lambda a: jnp.asarray(a, dtype), found))
        if op.concentration is not None:
            return op
        own = np.arange(len(codes)), codes
        said = np.asarray(cut @ found.weights.T)[own] / np.maximum(depth, 1)
        deviation = said - (found.weights * mean).sum(1)[codes]
        variance = found.noise[codes, 0] / np.maximum(depth, 1) + found.noise[codes, 1]
        return replace(op, concentration=jnp.asarray(prior_strength(deviation, variance, level[codes]), dtype))

    def __call__(self, x: C.Matrix, groups: Array | None = None) -> RemoveAmbientResult:
        """`groups` is of use to `init` alone."""
        if self.clusters is None or self.membership is None:
            raise ValueError("RemoveAmbient needs its clusters: call `op = op.init(x)` first")
        ambient, level = jnp.asarray(self.ambient, x.dtype), jnp.asarray(self.level, x.dtype)[:, None]
        mean = jnp.asarray(self.clusters.mean, x.dtype)
        native = jnp.maximum(mean - level * ambient, 0) / (1 - level)
        fraction, depth = self._fraction(x, self.clusters, self.membership, ambient, level, native)
        # A native share lies above the level, so the ratio is bounded where it is used.
        near = jnp.where(native > 0, _FOLD * level * ambient / jnp.where(native > 0, mean, 1), 0)
        corrected = _corrected(x, self.membership, fraction, depth, ambient, native / (1 + near**_STEEPNESS))
        if self.seed is not None:
            corrected = _rounded(x, corrected, self.seed)
        return RemoveAmbientResult(corrected, fraction)

    def _fraction(
        self, x: C.Matrix, clusters: Clusters, own: Array, ambient: Array, level: Array, native: Array
    ) -> tuple[Array, Array]:
        """The cells' ambient fractions, and their depths."""
        mean, weights, noise = (jnp.asarray(a, x.dtype) for a in clusters)
        depth = C.row_sums(x)
        inverse = jnp.where(depth > 0, 1 / jnp.where(depth > 0, depth, 1), 0)
        cut = _by_entry(x, own, lambda value, cell, gene: jnp.minimum(value, plausible(cell(depth) * gene(mean))))
        said = jnp.take_along_axis(C.matmul(cut, weights.T), own[:, None], 1)[:, 0] * inverse
        gain = (weights * (ambient - native)).sum(1)
        gain = jnp.where(gain > 0, gain, 1)
        base, expected = level[own, 0], (weights * mean).sum(1)[own]
        deviation = jnp.where(depth > 0, (said - expected) / gain[own], 0)
        variance = noise[own, 0] * inverse + noise[own, 1]
        # The mode under a normal prior around the level, cut at 0.
        spread = base**2 / jnp.asarray(self.concentration, x.dtype)
        total = spread + variance
        shrunk = base + deviation * spread / jnp.where(total > 0, total, 1)
        fraction = jnp.clip(shrunk, 0, _MOST)
        return fraction, depth


def _by_entry(x: C.Matrix, own: Array, f: Callable[[Array, Any, Any], Array]) -> C.Matrix:
    """Apply `f(values, cell, gene)` with f(0) = 0 to the entries.

    `cell` takes what belongs to an entry from an array (cells,), and `gene` from one (genes,) or (clusters, genes).
    """
    if not isinstance(x, C.Counts):
        return f(x, lambda a: a[:, None], lambda a: a if a.ndim == 1 else a[own])
    n, genes, rows = *x.shape, x.block_rows

    # Block by block, and anew on the way back: what is looked up for the entries takes several times their memory.
    @jax.checkpoint
    def block(part: tuple[Array, Array, Array]) -> Array:
        data, position, start = part
        row, column = position // genes, position % genes
        here = jnp.minimum(start + row, n - 1)
        new = f(data, lambda a: a[here], lambda a: a[column] if a.ndim == 1 else a[own[here], column])
        return jnp.where(row < rows, new, 0)

    starts = rows * jnp.arange(x.data.shape[0], dtype=jnp.int32)
    return x.with_data(jax.lax.map(block, (x.data, x.position, starts)))


def _corrected(
    x: C.Matrix, own: Array, fraction: Array, depth: Array, ambient: Array, native: Float[Array, "clusters genes"]
) -> C.Matrix:
    """What remains of each count after its expected ambient part."""

    def remaining(value: Array, cell: Any, gene: Any) -> Array:
        soup = cell(fraction) * gene(ambient)
        total = soup + (1 - cell(fraction)) * gene(native)
        share = jnp.where(total > 0, soup / jnp.where(total > 0, total, 1), 0)
        # A count far above what soup gives, as in a doublet, is not soup, however rare the gene is in the cluster.
        return value - jnp.minimum(value * share, plausible(cell(depth) * soup))

    return _by_entry(x, own, remaining)


def _rounded(x: C.Matrix, corrected: C.Matrix, seed: int) -> C.Matrix:
    """Integers instead: what is removed is rounded up or down at random so that its sums over genes and cells stay.

    Systematic sampling: fractions are added up along the matrix, and one molecule is taken wherever the sum passes a
    whole number. In fixed point these sums are exact, and wrap around by themselves.
    """
    as_counts = isinstance(x, C.Counts)
    left, observed = (m.data if isinstance(m, C.Counts) else m for m in (corrected, x))
    removed = jax.lax.stop_gradient(observed - left)
    whole = jnp.floor(removed)
    part = ((removed - whole) * 2.0**32).astype(jnp.uint32).ravel()
    start = jnp.asarray(np.random.default_rng(seed).integers(2**32, dtype=np.uint32))
    total = jnp.cumsum(part, dtype=jnp.uint32) + start
    taken = total < part  # where the sum wrapped around
    removed = whole + taken.reshape(whole.shape).astype(whole.dtype)
    exact = jax.lax.stop_gradient(observed - jnp.minimum(removed, observed) - left)
    return x.with_data(left + exact) if as_counts else left + exact  # type: ignore[union-attr]
