"""Nearest neighbours of every cell, exact or approximate, by matrix products in JAX.

Every native metric is a monotone function of the Euclidean distance between transformed rows, so one search serves all.
Candidates come from float32 matrix products; their distances are then formed again by differences in the precision of
the data, because |x|^2 + |y|^2 - 2 x.y cancels for near neighbours.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from scdiffx._core.knn_leaf import BIG, gaps, leaf_candidates, smallest

__all__ = ["METHODS", "METRICS", "nearest", "nearest_among"]

METRICS = ("euclidean", "sqeuclidean", "cosine", "correlation")
METHODS = ("auto", "exact", "approximate")
EXACT_UP_TO = {"cpu": 20_000}  # cells; above it "auto" is approximate
EXACT_UP_TO_ELSEWHERE = 300_000  # accelerators multiply matrices so fast that leaves pay only later
BLOCK = 256  # cells searched at once: a block of distances to 20,000 cells stays near the processor's cache
SPARE = 8  # candidates kept beyond k, so that rounding in the matrix product costs no neighbour


def nearest(
    x: np.ndarray, k: int, *, metric: str = "euclidean", method: str = "auto", seed: int = 0, dtype: Any = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Find the `k` nearest cells of every cell, the cell itself first.

    Parameters
    ----------
    x
        Cells by features, (n, d), finite.
    k
        Neighbours of each cell, the cell itself counted: 1 <= k <= n.
    metric
        "euclidean", "sqeuclidean", "cosine" or "correlation"; any other metric that
        `sklearn.neighbors.NearestNeighbors` knows goes through scikit-learn, which is exact and much slower.
        Two zero rows (two constant rows for "correlation") are at cosine distance 0, a zero and a non-zero row at 1.
    method
        "exact"; "approximate", which searches each leaf of a balanced tree against its nearest leaves (small data
        are still searched exactly); or "auto": exact up to 20,000 cells (300,000 on an accelerator).
    seed
        Seed of the tree. Same seed, same result.
    dtype
        Of the distances; they are computed in the precision of `x`.

    Returns
    -------
    Indices (n, k) int32 and distances (n, k), ascending, ties by index. Column 0 is the cell itself at distance
    0, also where other cells coincide with it.

    Raises
    ------
    ValueError
        If `x` is not a finite matrix, `k` is not in 1..n, or `metric` or `method` is unknown.
    """
    x, k = _checked(x, k)
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown. Available: {list(METHODS)}.")
    if metric not in METRICS:
        return _through_sklearn(x, k, metric, method, dtype)
    rows = _rows(x, metric)
    centred = rows - rows.mean(axis=0, dtype=np.float64)
    # A power of two scales without rounding; afterwards no square overflows or vanishes.
    exponent = int(np.frexp(np.abs(centred).max())[1])
    rows, centred = np.ldexp(rows, -exponent), np.ldexp(centred, -exponent).astype(np.float32)
    ids = None
    if method == "approximate" or (method == "auto" and len(x) > _exact_up_to()):
        ids = leaf_candidates(centred, k, k + 2, seed)
    if ids is None:
        ids, square = _exact(rows, centred, k)
    else:
        ids, square = _ranked(rows, ids, k)
        short = np.flatnonzero(~np.isfinite(square[:, -1]))
        ids[short], square[short] = _in_double(rows, short, k)
    return ids, _distance(square, metric, exponent).astype(dtype)


def nearest_among(
    x: np.ndarray, cells: np.ndarray, k: int, *, metric: str = "euclidean", dtype: Any = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Find the `k` nearest of other `cells` (n, d) for every row of `x` (m, d), exactly.

    Returns
    -------
    Indices (m, k) int32 and distances (m, k) of `dtype`, ascending, ties by index.

    Raises
    ------
    ValueError
        If one of the two is not a finite matrix, their features differ in number, `k` is not in 1..n, or `metric` is
        unknown.
    """
    (x, _), (cells, k) = _checked(x, 1), _checked(cells, k)
    if x.shape[1] != cells.shape[1]:
        raise ValueError(f"x has {x.shape[1]} features, but the cells to search among have {cells.shape[1]}.")
    if metric not in METRICS:
        distance, ids = _sklearn_search(cells, k, metric).kneighbors(x)
        return ids.astype(np.int32), distance.astype(dtype)
    rows = _rows(np.concatenate([cells, x]), metric)
    centred = rows - rows.mean(axis=0, dtype=np.float64)
    exponent = int(np.frexp(np.abs(centred).max())[1])
    rows, centred = np.ldexp(rows, -exponent), np.ldexp(centred, -exponent).astype(np.float32)
    ids, square = _exact_among(rows, centred, len(cells), k)
    return ids, _distance(square, metric, exponent).astype(dtype)


def _exact_up_to() -> int:
    return EXACT_UP_TO.get(jax.default_backend(), EXACT_UP_TO_ELSEWHERE)


def _checked(x: np.ndarray, k: int) -> tuple[np.ndarray, int]:
    x = np.asarray(x)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x must be a matrix of cells by features with at least one of each; its shape is {x.shape}.")
    if not (np.issubdtype(x.dtype, np.number) or x.dtype == bool) or np.iscomplexobj(x):
        raise ValueError(f"x must hold real numbers; its dtype is {x.dtype}.")
    x = np.ascontiguousarray(x, dtype=np.float32 if x.dtype in (np.float16, np.float32) else np.float64)
    if not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
        raise ValueError(f"x must be finite; {len(bad)} cells hold NaN or infinity, the first is cell {bad[0]}.")
    if int(k) != k or not 1 <= k <= len(x):
        raise ValueError(f"k={k} must be a whole number from 1 to the number of cells, {len(x)}.")
    return x, int(k)


def _rows(x: np.ndarray, metric: str) -> np.ndarray:
    """Rows whose Euclidean distance orders cells as `metric` does."""
    if metric in ("euclidean", "sqeuclidean"):
        return x
    rows = x.astype(np.float64)
    size = np.abs(rows).max(axis=1, keepdims=True)
    if metric == "correlation":
        rows -= rows.mean(axis=1, keepdims=True)
    # Rows of equal values leave rounding, not zeros, when centred.
    rows[np.abs(rows).max(axis=1) <= 1e-14 * size[:, 0]] = 0
    rows /= np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(length == 0, 1, length)
    # A zero row becomes orthogonal to all others through one more coordinate: |u - v|^2 = 2 (1 - cos) holds for it too.
    return np.concatenate([rows, (length == 0).astype(np.float64)], axis=1) if (length == 0).any() else rows


def _distance(square: np.ndarray, metric: str, exponent: int) -> np.ndarray:
    if metric == "euclidean":
        return np.ldexp(np.sqrt(square), exponent)
    square = np.ldexp(square, 2 * exponent)
    return square if metric == "sqeuclidean" else square / 2


def _padded(n: int) -> int:
    """The next multiple of a sixteenth of a power of two: few shapes, so few compilations, and 3 % more work."""
    step = max(BLOCK, 1 << max(0, n.bit_length() - 5))
    return -(-n // step) * step


def _pad(x: np.ndarray, n: int, value: float = 0) -> np.ndarray:
    return np.pad(x, ((0, n - len(x)), *[(0, 0)] * (x.ndim - 1)), constant_values=value)


@partial(jax.jit, static_argnames=("keep", "groups"))
def _scan(query: jax.Array, cells: jax.Array, size: jax.Array, keep: int, groups: int) -> tuple[jax.Array, jax.Array]:
    """The `keep` nearest of all cells for every query and the largest |y|^2 - 2 q.y among them."""

    def one_block(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, column = smallest(gaps(lax.dynamic_slice_in_dim(query, start, BLOCK), cells, size), keep, groups)
        return column, value[:, -1]

    ids, last = lax.map(one_block, jnp.arange(0, len(query), BLOCK))
    return ids.reshape(-1, keep), last.reshape(-1)


def _groups(n: int, keep: int) -> int:
    """The power of two that balances the two selections of `smallest`, n / groups and keep * groups entries."""
    groups = 1
    while 4 * groups * groups * keep <= n * 2 and n // (2 * groups) >= keep:
        groups *= 2
    return groups


def _exact(rows: np.ndarray, centred: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    n = len(rows)
    total = _padded(n)
    keep = min(k + SPARE, total)
    size = np.einsum("nd,nd->n", centred, centred)
    padded = _pad(centred, total)
    ids, last = _scan(padded, padded, _pad(size, total, BIG), keep, _groups(total, keep))
    ids, square = _ranked(rows, np.asarray(ids)[:n], k)
    if keep < n:
        # A cell left out is at least `last` away up to the rounding of a product of d + 1 terms, bounded by `margin`
        # for any cell near enough to matter. Where that does not settle it, decide in float64.
        unsettled = np.flatnonzero(_unsettled(square[:, -1], size, np.asarray(last)[:n], rows.shape[1]))
        ids[unsettled], square[unsettled] = _in_double(rows, unsettled, k)
    return ids, square


def _unsettled(furthest: np.ndarray, size: np.ndarray, last: np.ndarray, d: int) -> np.ndarray:
    reach = 2 * np.sqrt(size) + np.sqrt(furthest)
    margin = (d + 3) * np.finfo(np.float32).eps * reach**2
    return (furthest > 0) & (furthest + margin > last + size)


def _exact_among(rows: np.ndarray, centred: np.ndarray, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """As `_exact`, for the rows after the first `n` among these."""
    m, total, keep = len(rows) - n, _padded(n), min(k + SPARE, n)
    size = np.einsum("nd,nd->n", centred, centred)
    query, cells = _pad(centred[n:], _padded(m)), _pad(centred[:n], total)
    ids, last = _scan(query, cells, _pad(size[:n], total, BIG), keep, _groups(total, keep))
    near, found, square = np.array(ids[:m]), np.empty((m, k), np.int32), np.empty((m, k), rows.dtype)
    for start in range(0, m, BLOCK):
        here = slice(start, min(start + BLOCK, m))
        found[here], square[here] = _ordered(rows[n:][here], rows, near[here], k)
    if keep < n:
        everything = np.arange(n)[None]
        for row in np.flatnonzero(_unsettled(square[:, -1], size[n:], np.asarray(last)[:m], rows.shape[1])):
            found[row], square[row] = _ordered(rows[n + row][None], rows, everything, k)
    return found, square


def _ordered(query: np.ndarray, rows: np.ndarray, near: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` nearest of the candidates `near`, by differences."""
    square = ((rows[near] - query[:, None]) ** 2).sum(axis=2)
    order = np.lexsort((near, square))[:, :k]
    return np.take_along_axis(near, order, axis=1), np.take_along_axis(square, order, axis=1)


@partial(jax.jit, static_argnames="k")
def _rank(rows: jax.Array, ids: jax.Array, real: int, k: int) -> tuple[jax.Array, jax.Array]:
    """Exact squared distances to candidates, sorted: the k nearest with the cell itself first."""

    def one_block(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        near = lax.dynamic_slice_in_dim(ids, start, BLOCK)
        own = start + jnp.arange(BLOCK, dtype=ids.dtype)[:, None]
        here = lax.dynamic_slice_in_dim(rows, start, BLOCK)[:, None]
        square = ((rows.at[near].get(mode="clip") - here) ** 2).sum(axis=2)
        square = jnp.where((near == own) | (near >= real), jnp.inf, square)
        square, near = lax.sort((square, near), num_keys=2)
        return (
            jnp.concatenate([own, near[:, : k - 1]], axis=1),
            jnp.concatenate([jnp.zeros_like(square[:, :1]), square[:, : k - 1]], axis=1),
        )

    ids, square = lax.map(one_block, jnp.arange(0, len(rows), BLOCK, dtype=ids.dtype))
    return ids.reshape(-1, k), square.reshape(-1, k)


def _ranked(rows: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    n, total = len(rows), _padded(len(rows))
    with jax.enable_x64(True) if rows.dtype == np.float64 else nullcontext():
        near, square = _rank(_pad(rows, total), _pad(ids.astype(np.int32), total), n, k)
        return np.array(near[:n]), np.array(square[:n])


def _in_double(rows: np.ndarray, which: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Search the cells `which` among all in float64 on the host: for the few that float32 does not settle."""
    wide = rows.astype(np.float64)
    wide -= wide.mean(axis=0)
    size = np.einsum("nd,nd->n", wide, wide)
    keep = min(k + SPARE, len(rows))
    ids, square = np.empty((len(which), k), np.int32), np.empty((len(which), k), rows.dtype)
    for start in range(0, len(which), BLOCK):
        own = which[start : start + BLOCK]
        near = np.argpartition(size - 2 * wide[own] @ wide.T, keep - 1, axis=1)[:, :keep]
        gap = ((rows[near] - rows[own][:, None]) ** 2).sum(axis=2)
        gap = np.where(near == own[:, None], np.inf, gap)
        order = np.lexsort((near, gap))[:, : k - 1]
        ids[start : start + BLOCK] = np.column_stack([own, np.take_along_axis(near, order, axis=1)])
        square[start : start + BLOCK, 1:] = np.take_along_axis(gap, order, axis=1)
        square[start : start + BLOCK, 0] = 0
    return ids, square


def _sklearn_search(x: np.ndarray, k: int, metric: str) -> Any:
    from sklearn.neighbors import VALID_METRICS, NearestNeighbors

    available = sorted({*METRICS, *(name for names in VALID_METRICS.values() for name in names)})
    if metric not in available or metric == "precomputed":
        raise ValueError(f"metric={metric!r} is unknown. Available: {[m for m in available if m != 'precomputed']}.")
    return NearestNeighbors(n_neighbors=k, metric=metric).fit(x)


def _through_sklearn(x: np.ndarray, k: int, metric: str, method: str, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    search = _sklearn_search(x, min(k + 1, len(x)), metric)
    if method == "approximate":
        raise ValueError(f"method='approximate' is available for the metrics {list(METRICS)}, not for {metric!r}.")
    distance, ids = search.kneighbors(x)
    distance[ids == np.arange(len(x))[:, None]] = -1
    order = np.argsort(distance, axis=1, kind="stable")[:, :k]
    ids, distance = np.take_along_axis(ids, order, axis=1), np.take_along_axis(distance, order, axis=1)
    # Where copies of a cell crowd it out of its own list, the cell takes the place of the first.
    ids[:, 0], distance[:, 0] = np.arange(len(x)), 0
    return ids.astype(np.int32), distance.astype(dtype)
