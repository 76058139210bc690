"""Whether receivers change with what their neighbours send: regression of genes on one pair at a time, on the host.

A pair's feature is the receptor of a cell times the mean ligand around it. What the cell itself, the types around and
the ligand alone explain is taken away first: receivers with the receptor must change more than those without.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from scipy import stats

from scdiffx._core.runtime import one_blas_thread

__all__ = ["CommunicationTest", "Signals", "basis_of", "folds_of", "permutation_test", "standardised", "z_scores"]

_CHUNKS = 6  # blocks of cells in a fold
_NOISE = 2.0  # standard errors, below which the response of a gene does not count
_TAIL = 10  # permutations that reach a value, below which the tail of a gamma distribution stands for their share
_TINY = 1e-12


class Signals(NamedTuple):
    """What cells send and receive with, by pair; `walk` takes the mean over the neighbours."""

    sent: Float[np.ndarray, "cells pairs"]
    borne: Float[np.ndarray, "cells pairs"]
    walk: sp.csr_matrix


class CommunicationTest(NamedTuple):
    """For each pair the `statistic`, its `pvalue`, and the `gain`.

    The statistic is the mean over genes of by how much their squared z-scores exceed 4. The gain is the share of the
    genes' variance that the pair adds in held-out cells, in their standardised expression without what controls
    explain; below 0 where it misleads.
    """

    statistic: Float[np.ndarray, " pairs"]
    pvalue: Float[np.ndarray, " pairs"]
    gain: Float[np.ndarray, " pairs"]


def folds_of(order: Int[np.ndarray, " cells"], n_folds: int, rng: np.random.Generator) -> Int[np.ndarray, " cells"]:
    """Folds of blocks of cells, stretches of an order in which neighbours are near each other.

    Single cells are no independent test: their neighbours know their surroundings.
    """
    n, chunks = len(order), _CHUNKS * n_folds
    fold = np.empty(n, int)
    fold[order] = rng.permutation(np.arange(chunks) % n_folds)[np.arange(n) * chunks // max(n, 1)]
    return fold


def basis_of(controls: Float[np.ndarray, "cells controls"]) -> Float[np.ndarray, "cells dims"]:
    """An orthonormal basis of the controls and the constant."""
    centred = controls - controls.mean(0)
    size = np.linalg.norm(centred, axis=0)
    centred = np.column_stack([np.ones(len(controls)), centred[:, size > _TINY] / size[size > _TINY]])
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    return np.asarray(left[:, size > 1e-6 * size[0]], np.float32)


def standardised(y: Float[np.ndarray, "cells genes"], basis: np.ndarray) -> Float[np.ndarray, "cells genes"]:
    """What the basis leaves of each gene, with variance 1."""
    left = y - basis @ (basis.T @ y)
    size = np.sqrt((left**2).mean(0))
    return np.asarray(left / np.where(size > 1e-5, size, np.inf), np.float32)


class _Partial(NamedTuple):
    """Products of a pair's feature with genes and itself, less what the controls and the ligand alone explain."""

    cross: np.ndarray
    square: np.ndarray


def _partial(around: np.ndarray, pairs: np.ndarray, left: np.ndarray, basis: np.ndarray) -> _Partial:
    """Of `left`, whose columns are orthogonal to the basis."""
    of_ligand, of_pair = basis.T @ around, basis.T @ pairs
    own = (around**2).sum(0) - (of_ligand**2).sum(0)
    both = (around * pairs).sum(0) - (of_ligand * of_pair).sum(0)
    whole = (pairs**2).sum(0)
    slope = np.where(own > 1e-6 * (around**2).sum(0), both / np.maximum(own, _TINY), 0)
    square = whole - (of_pair**2).sum(0) - slope * both
    cross = sp.csr_matrix(pairs).T @ left - slope[:, None] * (around.T @ left)
    # But for rounding nothing is left of a pair whose feature the controls explain.
    there = square > 1e-5 * whole
    return _Partial(np.where(there[:, None], cross, 0), np.where(there, square, np.inf))


def z_scores(signals: Signals, left: np.ndarray, basis: np.ndarray) -> Float[np.ndarray, "pairs genes"]:
    """By how many standard errors each gene changes with the feature of each pair."""
    around = signals.walk @ signals.sent
    p = _partial(around, signals.borne * around, left, basis)
    return np.asarray(p.cross / np.sqrt(p.square)[:, None])


def _excess(z: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(z**2 - _NOISE**2, 0).mean(1), np.float64)


def permutation_test(
    signals: Signals,
    y: Float[np.ndarray, "cells genes"],
    controls: Float[np.ndarray, "cells controls"],
    strata: Int[np.ndarray, " cells"],
    fold: Int[np.ndarray, " cells"],
    *,
    n_perms: int,
    seed: int,
) -> CommunicationTest:
    """Compare the statistics with those after senders, with all their ligands, change places within strata."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(strata == s) for s in np.unique(strata)]
    with one_blas_thread():
        basis = basis_of(controls)
        left = standardised(y, basis)
        observed = _excess(z_scores(signals, left, basis))
        null, order = np.empty((n_perms, len(observed))), np.arange(len(y))
        for i in range(n_perms):
            for cells in members:
                order[cells] = rng.permutation(cells)
            null[i] = _excess(z_scores(signals._replace(sent=signals.sent[order]), left, basis))
        gain = _gains(signals, left, basis, fold)
    return CommunicationTest(observed, _pvalues(observed, null), gain)


def _pvalues(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """The share of permutations that reach the value; where few do, the tail of a gamma distribution.

    The statistic is a mean of many positive numbers, and a few hundred permutations cannot tell one in a million.
    """
    reached = (null >= observed * (1 - 1e-6)).sum(0)
    share = (1 + reached) / (1 + len(null))
    mean, variance = null.mean(0), null.var(0)
    usable = (variance > 0) & (reached < _TAIL) & (len(null) > 2 * _TAIL)
    mean, variance = (np.where(usable, v, 1) for v in (mean, variance))
    tail = stats.gamma.sf(observed, mean**2 / variance, scale=variance / mean)
    return np.asarray(np.where(usable, np.clip(tail, 1e-300, _TAIL / (1 + len(null))), share))


def _gains(signals: Signals, left: np.ndarray, basis: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Of responses found in the other folds, less two standard errors."""
    around = signals.walk @ signals.sent
    pairs = signals.borne * around
    around, pairs = (a - basis @ (basis.T @ a) for a in (around, pairs))
    found = np.zeros(pairs.shape[1])
    for f in range(int(fold.max()) + 1):
        out = fold == f
        m, s, y = around[~out], pairs[~out], left[~out]
        slope = (m * s).sum(0) / np.maximum((m**2).sum(0), _TINY)
        response = m.T @ y / np.maximum((m**2).sum(0), _TINY)[:, None]
        s = s - slope * m
        size = (s**2).sum(0)
        error = 1 / np.sqrt(np.where(size > _TINY, size, np.inf))[:, None]
        b = (s.T @ y) * error**2
        b = np.sign(b) * np.maximum(np.abs(b) - _NOISE * error, 0)
        s = pairs[out] - slope * around[out]
        cross = s.T @ left[out] - (s * around[out]).sum(0)[:, None] * response
        found += 2 * (b * cross).sum(1) - (s**2).sum(0) * (b**2).sum(1)
    return found / left.size
