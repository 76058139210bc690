"""Where Harmony starts: the batches as numbers, and k-means of the directions of cells."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from jaxtyping import Array

__all__ = ["directions", "levels"]

# k-means takes so many rounds, or until centroids move less than this.
_ROUNDS = 25
_STILL = 1e-6
# Candidates for each centroid of the start.
_TRIALS = 6
# Rows whose distances to all centroids are held at once.
_ROWS = 8192


def levels(batches: tuple[Array, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The combination of batches of each cell, the batches of each combination, and the column of each batch."""
    if not batches:
        raise ValueError("Harmony needs the batch of each cell: `op.init(z, batch)`")
    codes, column, first = [], [], 0
    for i, batch in enumerate(batches):
        names, code = np.unique(np.asarray(batch), return_inverse=True)
        codes.append(code.ravel() + first)
        column += [i] * len(names)
        first += len(names)
    combined, level = np.unique(np.stack(codes, 1), axis=0, return_inverse=True)
    members = np.zeros((len(combined), first), bool)
    members[np.arange(len(combined))[:, None], combined] = True
    return level.ravel().astype(np.int32), members, np.asarray(column, np.int32)


def directions(z: np.ndarray, nclust: int, rng: np.random.Generator) -> np.ndarray:
    """Clusters of the directions of the cells by k-means from a k-means++ start."""
    length = np.linalg.norm(z, axis=1, keepdims=True)
    unit = (z / np.where(length > 0, length, 1)).astype(z.dtype)
    centroids = np.empty((nclust, z.shape[1]), z.dtype)
    near = np.ones(len(z))
    for k in range(nclust):
        # The best of a few random candidates, as in scikit-learn: starts differ less.
        sums = np.cumsum(near if near.sum() > 0 else np.ones(len(z)), dtype=np.float64)
        drawn = np.searchsorted(sums, rng.random(_TRIALS if k else 1) * sums[-1], "right")
        chosen = unit[np.minimum(drawn, len(z) - 1)]
        apart = np.maximum(2 - 2 * (unit @ chosen.T), 0) * (length > 0) + (length == 0)
        apart = np.minimum(near[:, None], apart) if k else apart
        best = apart.sum(0).argmin()
        centroids[k], near = chosen[best], apart[:, best]
    for _ in range(_ROUNDS):
        label = _nearest_centroid(unit, centroids)
        count = np.bincount(label, minlength=nclust)
        own = sp.csr_matrix((np.ones(len(z), z.dtype), label, np.arange(len(z) + 1)), shape=(len(z), nclust))
        moved = np.where(count[:, None] > 0, (own.T @ unit) / np.maximum(count, 1)[:, None], centroids)
        change = np.linalg.norm(moved - centroids)
        centroids = moved.astype(z.dtype)
        if change < _STILL:
            break
    return _nearest_centroid(unit, centroids)


def _nearest_centroid(unit: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    half = (centroids**2).sum(1) / 2
    parts = [
        np.argmax(unit[i : i + _ROWS] @ centroids.T - half, axis=1).astype(np.int32) for i in range(0, len(unit), _ROWS)
    ]
    return np.concatenate(parts)
