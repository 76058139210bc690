"""Programs of receivers and their ridge regressions on the cells themselves and on their neighbours, on the host."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from scdiffx.ops._communication_test import Signals, basis_of, standardised, z_scores

__all__ = [
    "MODELS",
    "Blocks",
    "Evaluation",
    "Fitted",
    "Split",
    "evaluate",
    "fitted",
    "programs_of",
    "r2",
    "refitted",
    "split_of",
]

MODELS = ("own", "types", "linear")
# Penalties to choose from, per cell, of coefficients of standardised features.
PENALTIES = tuple(float(x) for x in np.geomspace(1e-3, 100, 11))
_NOISE = 2.0
_TINY = 1e-12


class Blocks(NamedTuple):
    """Features of cells: of their `own`, of the types `near`, and of `signals`: ligands around, and pairs."""

    own: Float[np.ndarray, "cells own"]
    near: Float[np.ndarray, "cells near"]
    signals: Float[np.ndarray, "cells signals"]


class Split(NamedTuple):
    """Cells to fit coefficients, to choose penalties, and to report errors."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class Fitted(NamedTuple):
    """Coefficients of standardised features, and of each model how many features come first in it and its penalty."""

    centre: Float[np.ndarray, " features"]
    scale: Float[np.ndarray, " features"]
    intercept: Float[np.ndarray, " programs"]
    coefficients: tuple[Float[np.ndarray, "features programs"], ...]
    penalties: tuple[float, ...]

    def predicted(self, x: np.ndarray, model: int) -> np.ndarray:
        b = self.coefficients[model]
        q = len(b)
        return np.asarray((x[:, :q] - self.centre[:q]) / self.scale[:q] @ b + self.intercept)


class Evaluation(NamedTuple):
    """Over rotations in which each cell is held out once: shares of the variance of programs, and losses of them.

    `importance` is what the linear model loses when the feature of a pair is replaced by its mean, `between` when
    senders of one group and receivers of another lose it.
    """

    r2: Float[np.ndarray, " models"]
    importance: Float[np.ndarray, " pairs"]
    between: Float[np.ndarray, "pairs groups groups"]


def split_of(fold: Int[np.ndarray, " cells"], number: int) -> Split:
    count = int(fold.max()) + 1
    test, validation = fold == number, fold == (number + 1) % count
    return Split(~test & ~validation, validation, test)


def programs_of(
    signals: Signals, y: np.ndarray, controls: np.ndarray, cells: np.ndarray, n_programs: int
) -> Float[np.ndarray, "genes programs"]:
    """Directions of standardised expression that change most with the pairs' features in some of the cells.

    The leading singular vectors of the responses' z-scores, less two standard errors. They have length 1.
    """
    basis = basis_of(controls[cells])
    part = Signals(signals.sent, signals.borne[cells], signals.walk[cells])
    z = z_scores(part, standardised(y[cells], basis), basis)
    z = np.sign(z) * np.maximum(np.abs(z) - _NOISE, 0)
    axes = np.linalg.eigh(z.T @ z if z.shape[1] <= z.shape[0] else z @ z.T)[1]
    axes = axes[:, ::-1][:, : min(n_programs, *z.shape)]
    if z.shape[1] > z.shape[0]:
        axes = z.T @ axes
    size = np.linalg.norm(axes, axis=0)
    axes = axes / np.where(size > _TINY, size, 1)
    largest = np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0)
    return np.asarray(axes * np.where(largest < 0, -1, 1), np.float64)


def _solved(gram: np.ndarray, cross: np.ndarray, penalty: np.ndarray, n: int) -> np.ndarray:
    q = len(penalty)
    return np.asarray(np.linalg.solve(gram[:q, :q] + np.diag(penalty * n), cross[:q]))


def fitted(blocks: Blocks, y: Float[np.ndarray, "cells programs"], split: Split) -> Fitted:
    """Models of one, two and three blocks, each with a penalty that is chosen after those of the blocks before it."""
    x = np.concatenate(blocks, 1)
    centre, scale = x[split.train].mean(0), x[split.train].std(0)
    scale = np.where(scale > 1e-8, scale, 1)
    x = (x - centre) / scale
    intercept = y[split.train].mean(0)
    inside, target = x[split.train], y[split.train] - intercept
    gram, cross, n = inside.T @ inside, inside.T @ target, len(inside)
    penalty, coefficients, chosen = np.zeros(0), [], []
    for block in blocks:
        tried = [np.append(penalty, np.full(block.shape[1], p)) for p in PENALTIES]
        found = [_solved(gram, cross, p, n) for p in tried]
        q = len(tried[0])
        left = y[split.validation] - intercept
        errors = [((left - x[split.validation, :q] @ b) ** 2).sum() for b in found]
        best = int(np.argmin(errors))
        penalty = tried[best]
        coefficients.append(found[best])
        chosen.append(PENALTIES[best])
    return Fitted(centre, scale, intercept, tuple(coefficients), tuple(chosen))


def evaluate(
    signals: Signals,
    blocks: Blocks,
    y: Float[np.ndarray, "cells genes"],
    controls: np.ndarray,
    fold: Int[np.ndarray, " cells"],
    member: Float[np.ndarray, "cells groups"],
    n_programs: int,
) -> Evaluation:
    """Hold out each fold once; its programs, penalties and coefficients come from the others."""
    pairs, groups = signals.sent.shape[1], member.shape[1]
    errors, total, importance = np.zeros(len(MODELS)), 0.0, np.zeros(pairs)
    x = np.concatenate(blocks, 1)
    held = []
    for number in range(int(fold.max()) + 1):
        split = split_of(fold, number)
        z = y @ programs_of(signals, y, controls, split.train, n_programs)
        model = fitted(blocks, z, split)
        left = [z[split.test] - model.predicted(x[split.test], i) for i in range(len(MODELS))]
        errors += [(e**2).sum() for e in left]
        total += ((z[split.test] - model.intercept) ** 2).sum()
        b = model.coefficients[-1][-pairs:] / model.scale[-pairs:, None]
        importance += _lost(x[split.test, -pairs:] - model.centre[-pairs:], left[-1], b).sum(0)
        held.append((split.test, left[-1], b))
    between = np.zeros((pairs, groups, groups))
    for g in range(groups):
        part = signals.borne * (signals.walk @ (signals.sent * member[:, [g]]))
        for test, left_there, b in held:
            between[:, g] += _lost(part[test], left_there, b).T @ member[test]
    total = max(total, _TINY)
    return Evaluation(1 - errors / total, importance / total, between / total)


def _lost(part: np.ndarray, left: np.ndarray, b: np.ndarray) -> Float[np.ndarray, "cells pairs"]:
    """By how much squared errors grow without a part of the features of the pairs, one pair at a time."""
    return np.asarray(2 * part * (left @ b.T) + part**2 * (b**2).sum(1))


def r2(y: np.ndarray, predicted: np.ndarray, mean: Any, cells: np.ndarray) -> float:
    """Share of the variance, about the mean of the training cells, that is predicted in some of the cells."""
    total = ((y[cells] - mean) ** 2).sum()
    return float(1 - ((y[cells] - predicted[cells]) ** 2).sum() / max(total, _TINY))


def refitted(blocks: Blocks, y: np.ndarray, penalties: tuple[float, ...]) -> Fitted:
    """The model of all three blocks of all cells, with penalties chosen before."""
    x = np.concatenate(blocks, 1)
    centre, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 1e-8, scale, 1)
    x = (x - centre) / scale
    intercept = y.mean(0)
    penalty = np.repeat(penalties, [block.shape[1] for block in blocks])
    found = _solved(x.T @ x, x.T @ (y - intercept), penalty, len(x))
    return Fitted(centre, scale, intercept, (found,), penalties)
