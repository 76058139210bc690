"""Approximate nearest neighbours: balanced leaves, each searched against its nearest leaves by matrix products."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["BIG", "budget", "gaps", "leaf_candidates", "smallest"]

# The squared distance to a place without a cell. Rows arrive scaled to the unit box, so that it exceeds all others.
BIG = 1e30
LEAF = 64  # a leaf holds between this many cells and twice as many
LAYERS = 32  # the distances of a query are dealt to so many layers by `smallest`
SAMPLE = 256  # cells of a node used to find its main direction
POWER_STEPS = 6


def budget(n: int, k: int) -> int:
    """How many cells each cell is compared with.

    Expression noise makes principal components a high-dimensional cloud, in which a neighbour may lie in many leaves.
    On upsampled real data this visits enough for a recall of 0.99 at 24,000 cells and 0.95 at 50,000, which is what
    pynndescent finds there at twice the cost; twice as many visits would give 0.99 at 50,000 cells.
    """
    return int(max(11_000 * max(n / 50_000, 1) ** 0.4, 64 * k))


def gaps(query: jax.Array, cells: jax.Array, size: jax.Array) -> jax.Array:
    """|y|^2 - 2 q.y for all pairs: squared distances up to a constant in each row, all from one matrix product."""
    left = jnp.concatenate([-2 * query, jnp.ones_like(query[:, :1])], axis=1)
    right = jnp.concatenate([cells, size[:, None]], axis=1)
    # The default precision of accelerators (TF32, bfloat16) would lose neighbours.
    return lax.dot_general(left, right, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


def smallest(values: jax.Array, keep: int, groups: int) -> tuple[jax.Array, jax.Array]:
    """The `keep` smallest entries of each row and their columns, exactly.

    A sort of whole rows is slow. The columns are dealt to `groups` equal layers instead and the minimum is taken over
    the layers, which vectorises; the `keep` smallest entries must lie in the `keep` columns with the least minima.
    """
    rows, n = values.shape
    if groups == 1:
        lowest, column = lax.top_k(-values, keep)
        return -lowest, column
    width = n // groups
    grid = values.reshape(rows, groups, width)
    _, best = lax.top_k(-grid.min(axis=1), keep)
    few = jnp.take_along_axis(grid, best[:, None, :], axis=2, mode="promise_in_bounds")
    lowest, slot = smallest(few.reshape(rows, groups * keep), keep, groups // 4 if groups > 16 else 1)
    column = slot // keep * width + jnp.take_along_axis(best, slot % keep, axis=1, mode="promise_in_bounds")
    return lowest, column


def _main_direction(cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A few power steps towards the first principal axis of every node: (nodes, cells, d) -> (nodes, d)."""
    cells = cells[:, :: max(1, cells.shape[1] // SAMPLE)]
    cells = cells - cells.mean(axis=1, keepdims=True)
    axis = rng.standard_normal((len(cells), cells.shape[2]), dtype=np.float32) * cells.std(axis=1)
    for _ in range(POWER_STEPS):
        # einsum rather than a BLAS product: its sums do not depend on the number of threads.
        axis = np.einsum("bmd,bm->bd", cells, np.einsum("bmd,bd->bm", cells, axis))
        axis /= np.maximum(np.linalg.norm(axis, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return axis


def _leaves(x: np.ndarray, depth: int, rng: np.random.Generator) -> np.ndarray:
    """Split the cells in halves along the main direction `depth` times: (2**depth, m) cell numbers.

    Leaves have equal size; the places beyond the last cell repeat cells and are numbered n and above.
    """
    n = len(x)
    size = -(-n // (4 << depth)) * 4
    spare = (size << depth) - n
    source = np.concatenate([np.arange(n), np.linspace(0, n - 1, spare).astype(int)])
    order: np.ndarray = np.arange(n + spare)
    for level in range(depth):
        order = order.reshape(1 << level, -1)
        cells = x[source[order]]
        along = np.einsum("bmd,bd->bm", cells, _main_direction(cells, rng))
        order = np.take_along_axis(order, np.argpartition(along, order.shape[1] // 2, axis=1), axis=1)
    return order.reshape(1 << depth, size)


def _nearest_leaves(centres: np.ndarray, probes: int) -> np.ndarray:
    """For each leaf the `probes` leaves with the nearest centres, itself among them."""
    sizes = np.einsum("ld,ld->l", centres, centres)
    out = np.empty((len(centres), probes), np.int32)
    for start in range(0, len(centres), 1024):
        rows = slice(start, start + 1024)
        gap = sizes - 2 * centres[rows] @ centres.T
        gap[np.arange(len(gap)), start + np.arange(len(gap))] = -np.inf
        out[rows] = np.argpartition(gap, probes - 1, axis=1)[:, :probes]
    return np.sort(out, axis=1)


@partial(jax.jit, static_argnames="keep")
def _search(leaves: jax.Array, penalty: jax.Array, probes: jax.Array, keep: int) -> jax.Array:
    """For every place of every leaf the `keep` nearest places (leaf * m + slot) within the probed leaves."""
    _, m, d = leaves.shape

    def one_leaf(job: tuple[jax.Array, jax.Array]) -> jax.Array:
        own, probe = job
        # Distances are formed as |y|^2 - 2 q.y: centring on the leaf first keeps float32 from cancelling.
        centre = leaves[own].mean(axis=0)
        cells = leaves.at[probe].get(mode="promise_in_bounds").reshape(-1, d) - centre
        size = (cells * cells).sum(axis=1) + penalty.at[probe].get(mode="promise_in_bounds").reshape(-1)
        _, column = smallest(gaps(leaves[own] - centre, cells, size), keep, LAYERS)
        return probe[column // m] * m + column % m

    return lax.map(one_leaf, (jnp.arange(len(leaves)), probes))


def leaf_candidates(x: np.ndarray, k: int, keep: int, seed: int) -> np.ndarray | None:
    """Candidate neighbours of each row of `x`: (n, keep), with n where there is none.

    `x` is float32, centred and within the unit box. The answer is None when most cells would be visited, so that an
    exact search costs no more.
    """
    n = len(x)
    depth = int(np.log2(max(n / LEAF, 1)))
    order = _leaves(x, depth, np.random.default_rng(seed))
    count, size = order.shape
    # Leaves hold a multiple of 4 cells, so 8 leaves fill the layers evenly.
    probes = -(-budget(n, k) // (8 * size)) * 8
    if 8 * probes > 7 * count or LAYERS * keep > probes * size:
        return None
    real = order < n
    spare = np.linspace(0, n - 1, count * size - n).astype(int)
    leaves = x[np.concatenate([np.arange(n), spare])[order]]
    near = _nearest_leaves(leaves.mean(axis=1), probes)
    penalty = np.where(real, np.float32(0), np.float32(BIG))
    place = np.asarray(_search(jnp.asarray(leaves), jnp.asarray(penalty), jnp.asarray(near), keep))
    out = np.empty((n, keep), np.int32)
    out[order[real]] = np.minimum(order, n).astype(np.int32).ravel()[place[real]]
    return out
