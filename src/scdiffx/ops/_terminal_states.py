"""Terminal states found from the graph: where directed walks gather."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components
from scipy.stats import norm

from scdiffx._core.graph import Graph

__all__ = ["terminal_states"]

# A walk starts anywhere and goes on with this chance: it lasts 20 steps on average.
_CONTINUE = 0.95
_STEPS = 300
# Palantir's level for a cell that holds more walks than it should.
_LEVEL = 0.9999
_FEWEST_CELLS = 5


def terminal_states(
    transitions: Graph, graph: Graph, pseudotime: np.ndarray | None = None, n_cells: int = 30
) -> np.ndarray:
    """Number the cells of terminal states from 0; -1 for the others.

    As in Palantir (Setty et al. 2019), terminal cells are those that hold outlying shares of the walks, beyond the
    0.9999 quantile of a normal distribution with the median and the median absolute deviation of the cells; they fall
    into states by their connections. Different from it, walks last a geometric number of steps (20 on average), for
    the stationary distribution of a reducible chain says nothing; shares are per weight in the graph; states of fewer
    than 5 cells do not count, nor those whose median cell is not later than the median of all. Each state keeps the
    `n_cells` cells with the largest shares; the states are ordered by their largest.
    """
    step = sp.csr_matrix(transitions.to_scipy().T)
    weights = graph.to_scipy().astype(np.float64)
    n = step.shape[0]
    share = start = np.ones(n)
    for _ in range(_STEPS):
        share = (1 - _CONTINUE) * start + _CONTINUE * (step @ share)
    strength = np.asarray(weights.sum(1)).ravel()
    density = np.divide(share, strength, out=np.zeros(n), where=strength > 0)
    middle = np.median(density)
    spread = np.median(np.abs(density - middle))
    found = np.flatnonzero(density > middle + norm.ppf(_LEVEL) * spread)
    count, part = connected_components(weights[found][:, found], directed=False)
    groups = [found[part == i] for i in range(count)]
    groups = [cells for cells in groups if len(cells) >= _FEWEST_CELLS and _is_late(cells, pseudotime)]
    labels = np.full(n, -1, np.int32)
    for i, cells in enumerate(sorted(groups, key=lambda cells: -density[cells].max())):
        labels[cells[np.argsort(-density[cells], kind="stable")[:n_cells]]] = i
    return labels


def _is_late(cells: np.ndarray, pseudotime: np.ndarray | None) -> bool:
    if pseudotime is None:
        return True
    finite = np.isfinite(pseudotime)
    return bool(np.median(pseudotime[cells]) > np.median(pseudotime[finite])) if finite.any() else True
