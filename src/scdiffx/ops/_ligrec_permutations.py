"""Interactions of labels that are shuffled over the cells: sparse products of expression with many shuffles at once.

Which values a pair of groups needs is known beforehand, and few are: genes that a group does not express, in no pair of
it, are left out of its products.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from scdiffx._core.runtime import one_blas_thread

__all__ = ["LigRecTest", "permutation_test"]

_NUMBERS = 1 << 22  # in a block of permutations, so that memory does not grow with their number
_ROWS = 4096  # interactions compared at once: their values stay in the processor's cache


class LigRecTest(NamedTuple):
    """For each test its `interaction`, sending and receiving group (positions), and the p-value.

    The p-value is ``(1 + k) / (1 + n)``, where `k` of `n` permutations reach the mean: it is never 0, and not too small
    where means tie.
    """

    interaction: Int[np.ndarray, " tests"]
    sender: Int[np.ndarray, " tests"]
    receiver: Int[np.ndarray, " tests"]
    pvalue: Float[np.ndarray, " tests"]


class _Tests(NamedTuple):
    """What is tested: interaction and groups, the rows and columns of both sides among the means, and their sum."""

    interaction: np.ndarray
    groups: np.ndarray
    rows: tuple[np.ndarray, np.ndarray]
    columns: tuple[np.ndarray, np.ndarray]
    observed: np.ndarray


def permutation_test(
    x: Any,
    member: Float[np.ndarray, "cells groups"],
    graph: sp.csr_matrix | None,
    sides: tuple[np.ndarray, np.ndarray],
    *,
    by_group: bool,
    strata: Int[np.ndarray, " cells"],
    n_perms: int,
    threshold: float,
    seed: int,
) -> LigRecTest:
    """See :meth:`scdiffx.ops.LigRec.test`; `sides` are the columns of ligands and of receptors."""
    there = member.sum(1) > 0
    x, member, strata = sp.csr_matrix(x, dtype=np.float64)[there], member[there], strata[there]
    near = None if graph is None else sp.csr_matrix((graph + graph.T) / 2, dtype=np.float64)[there][:, there]
    if not by_group:
        overall = member.sum(1) @ x
        sides = (_scarcest(overall, sides[0]), _scarcest(overall, sides[1]))
    tests = _tests(x, member, near, sides, threshold)
    rng = np.random.default_rng(seed)
    if near is None:
        reached = _everywhere(x, member, tests, strata, n_perms, rng)
    else:
        reached = _beside(x, member, near, tests, strata, n_perms, rng)
    return LigRecTest(tests.interaction, tests.groups[:, 0], tests.groups[:, 1], (1 + reached) / (1 + n_perms))


def _scarcest(overall: np.ndarray, side: np.ndarray) -> np.ndarray:
    return np.take_along_axis(side, overall[side].argmin(1)[:, None], axis=1)


def _means(x: Any, member: np.ndarray, near: Any) -> np.ndarray:
    """Means of the genes (groups, genes), or with neighbours (groups * groups, genes); 0 for groups without cells."""
    if near is None:
        return _weighted(x, member)
    beside = near @ member
    return np.concatenate([_weighted(x, own[:, None] * beside) for own in member.T])


def _weighted(x: Any, weight: np.ndarray) -> np.ndarray:
    total = weight.sum(0)
    return np.asarray((x.T @ weight).T / np.where(total > 0, total, 1)[:, None])


def _tests(x: Any, member: np.ndarray, near: Any, sides: tuple[np.ndarray, np.ndarray], threshold: float) -> _Tests:
    g = member.shape[1]
    sender, receiver = np.divmod(np.arange(g * g), g)
    rows = (sender, receiver) if near is None else (np.arange(g * g), receiver * g + sender)
    means, shares = _means(x, member, near), _means(x > 0, member, near)
    values = [_least(means, side) for side in sides]
    expressed = [(v > 0) & (_least(shares, side) >= threshold) for v, side in zip(values, sides, strict=True)]
    interaction, pair = np.nonzero((expressed[0][rows[0]] & expressed[1][rows[1]]).T)
    at = tuple(row[pair] for row in rows)
    observed = values[0][at[0], interaction] + values[1][at[1], interaction]
    columns = tuple(side[interaction] for side in sides)
    groups = np.stack([sender[pair], receiver[pair]], 1)
    return _Tests(interaction, groups, at, columns, observed)  # type: ignore[arg-type]


def _least(means: np.ndarray, side: np.ndarray) -> np.ndarray:
    """The least of the members (rows, interactions)."""
    return functools.reduce(np.minimum, (means[:, member] for member in side.T))


class _Places:
    """Where the values of the tests are among those that are computed, complexes last."""

    def __init__(self, tests: _Tests, place: np.ndarray) -> None:
        both = [place[row[:, None], columns] for row, columns in zip(tests.rows, tests.columns, strict=True)]
        width = max(p.shape[1] for p in both)
        stacked = np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1])), mode="edge") for p in both])
        several = (stacked != stacked[:, :1]).any(1)
        self.members, of = np.unique(stacked[several], axis=0, return_inverse=True)
        at = stacked[:, 0].copy()
        at[several] = place.max() + 1 + of.ravel()
        self.ligand, self.receptor = np.split(at, 2)
        # Sums in another order differ by rounding: equal means are equal.
        self.observed = tests.observed * (1 - 1e-10)

    def reached(self, values: Float[np.ndarray, "values perms"]) -> np.ndarray:
        """In how many permutations each test's mean is at least the observed one."""
        if len(self.members):
            values = np.concatenate([values, functools.reduce(np.minimum, (values[m] for m in self.members.T))])
        counts = np.zeros(len(self.observed), int)
        for start in range(0, len(counts), _ROWS):
            at = slice(start, start + _ROWS)
            sums = values[self.ligand[at]]
            sums += values[self.receptor[at]]
            counts[at] = (sums >= self.observed[at, None]).sum(1)
        return counts


def _needed(tests: _Tests, shape: tuple[int, int]) -> np.ndarray:
    needed = np.zeros(shape, bool)
    for row, columns in zip(tests.rows, tests.columns, strict=True):
        needed[row[:, None], columns] = True
    return needed


def _orders(rng: np.random.Generator, strata: np.ndarray, n_perms: int) -> np.ndarray:
    """Permutations of the cells within the strata (perms, cells)."""
    order = np.empty((n_perms, len(strata)), np.int64)
    for stratum in np.unique(strata):
        cells = np.flatnonzero(strata == stratum)
        order[:, cells] = rng.permuted(np.broadcast_to(cells, (n_perms, len(cells))), axis=1)
    return order


def _blocks(n_perms: int, size: int) -> list[int]:
    step = int(np.clip(_NUMBERS // size, 1, 256))
    return [min(step, n_perms - start) for start in range(0, n_perms, step)]


def _everywhere(
    x: sp.csr_matrix, member: np.ndarray, tests: _Tests, strata: np.ndarray, n_perms: int, rng: np.random.Generator
) -> np.ndarray:
    needed = _needed(tests, (member.shape[1], x.shape[1]))
    at = _Places(tests, np.cumsum(needed.ravel()).reshape(needed.shape) - 1)
    by_gene = x.T.tocsr()
    parts = [by_gene[columns] / max(total, 1e-300) for columns, total in zip(needed, member.sum(0), strict=True)]
    reached = np.zeros(len(tests.observed), int)
    for size in _blocks(n_perms, max(len(member), int(needed.sum()))):
        order = np.ascontiguousarray(_orders(rng, strata, size).T)
        # Labels that change hands are the same as expression that does, and have fewer columns.
        values = [part @ own[order] for part, own in zip(parts, member.T, strict=True)]
        reached += at.reached(np.concatenate(values))
    return reached


def _beside(
    x: sp.csr_matrix,
    member: np.ndarray,
    near: sp.csr_matrix,
    tests: _Tests,
    strata: np.ndarray,
    n_perms: int,
    rng: np.random.Generator,
) -> np.ndarray:
    g = member.shape[1]
    used = _needed(tests, (g * g, x.shape[1])).any(0)
    dense = x[:, used].toarray()
    at = _Places(tests, np.arange(g * g)[:, None] * dense.shape[1] + np.cumsum(used) - 1)
    beside = near @ member
    cells = [np.flatnonzero(own) for own in member.T]
    reached = np.zeros(len(tests.observed), int)
    with one_blas_thread():
        for size in _blocks(n_perms, max(len(member), g * g * dense.shape[1])):
            values = np.empty((g, g, dense.shape[1], size))
            for i, order in enumerate(_orders(rng, strata, size)):
                for a, own in enumerate(cells):
                    weight = beside[own] * member[own, a, None]
                    total = np.maximum(weight.sum(0), 1e-300)
                    values[a, :, :, i] = (weight / total).T @ dense[order[own]]
            reached += at.reached(values.reshape(-1, size))
    return reached
