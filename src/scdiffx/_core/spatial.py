"""Neighbours in space, on the host: which cells are near each other in a tissue, slice by slice."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from scdiffx._core.knn import nearest

__all__ = ["neighbors_in_space"]


def neighbors_in_space(
    coordinates: np.ndarray,
    *,
    n_neighbors: int = 6,
    radius: float | None = None,
    batch: np.ndarray | None = None,
    seed: int = 0,
) -> sp.csr_matrix:
    """The symmetric graph of the cells that are near each other, with ones as its values and no loops.

    Parameters
    ----------
    coordinates
        Cells by two or three coordinates, finite.
    n_neighbors
        A cell is joined with its so many nearest cells, and with those whose nearest it is. A slice of fewer cells is
        joined completely.
    radius
        Join all cells within this distance instead, in the unit of the coordinates.
    batch
        Slice of each cell: cells of different slices are never joined.
    seed
        Of the search among more cells than are searched exactly.

    Raises
    ------
    ValueError
        If coordinates are not a finite matrix, `n_neighbors` is less than 1, or `radius` is not greater than 0.
    """
    coordinates = np.asarray(coordinates)
    if coordinates.ndim != 2 or not np.isfinite(coordinates).all():
        raise ValueError(f"coordinates must be a finite matrix; their shape is {coordinates.shape}")
    if n_neighbors < 1:
        raise ValueError(f"n_neighbors={n_neighbors!r} must be at least 1")
    if radius is not None and not (np.isfinite(radius) and radius > 0):
        raise ValueError(f"radius={radius!r} must be greater than 0")
    n = len(coordinates)
    codes = np.zeros(n, int) if batch is None else np.asarray(batch)
    pairs = [np.zeros((2, 0), int)]
    for code in np.unique(codes):
        cells = np.flatnonzero(codes == code)
        if len(cells) > 1:
            here = coordinates[cells]
            pairs.append(cells[_within(here, radius) if radius is not None else _nearest(here, n_neighbors, seed)])
    rows, columns = np.concatenate(pairs, 1)
    graph = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(n, n))
    graph = (graph + graph.T).tocsr()
    graph.data[:] = 1
    graph.sort_indices()
    return graph


def _nearest(here: np.ndarray, k: int, seed: int) -> np.ndarray:
    indices, _ = nearest(here, min(k + 1, len(here)), seed=seed)
    return np.stack([np.repeat(np.arange(len(here)), indices.shape[1] - 1), indices[:, 1:].ravel()])


def _within(here: np.ndarray, radius: float) -> np.ndarray:
    from scipy.spatial import cKDTree

    return np.asarray(cKDTree(here).query_pairs(radius, output_type="ndarray")).T.astype(int)
