"""Cell types by multinomial logistic regression, with calibrated probabilities and a test for unlike cells."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from scdiffx._core import counts as C
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.random import as_seed
from scdiffx._core.runtime import one_blas_thread
from scdiffx._log import warn
from scdiffx.ops._annotation_fit import (
    INSIDE,
    PENALTIES,
    Envelope,
    Training,
    compact,
    envelope,
    folds,
    logistic,
    rows,
    standardised,
    standards,
    temperature,
)

__all__ = ["LogisticAnnotation", "LogisticAnnotationResult", "calibration_error", "decided"]

_BINS = 15
_TOLERANCE = 1e-6  # largest slope of the mean loss


class LogisticAnnotationResult(NamedTuple):
    """What the cells are.

    `probabilities` of the types (cells, types), calibrated. `distance` (cells,): of a cell from the most probable type,
    squared, in units of the distance within which 98 % of that type's held-out cells lie; above 1 the cell is unlike
    those. `confidence` (cells,): the largest probability, lowered where the distance is above 1. `types`
    (cells,): the number of the type, -1 for unassigned.
    """

    probabilities: Float[Array, "cells types"]
    confidence: Float[Array, " cells"]
    distance: Float[Array, " cells"]
    types: Int[Array, " cells"]


class Standards(NamedTuple):
    """Mean and standard deviation of each gene among the labelled cells, and how well cells held out were told.

    `accuracy` and `calibration_error` are those of the cells of each fold under the model of the other folds.
    """

    mean: Float[Array, " genes"]
    sd: Float[Array, " genes"]
    accuracy: Float[Array, ""]
    calibration_error: Float[Array, ""]


@operator
class LogisticAnnotation:
    """Ridge multinomial logistic regression on standardised logarithms, after CellTypist (Dominguez Conde et al. 2022).

    As in CellTypist genes are standardised by the labelled cells, values more than ten standard deviations above the
    mean are cut, and the ridge is ``|weights|^2 / (2 C)`` beside the sum of the cells' losses. CellTypist fits one
    logistic regression for each type against the others; this is the multinomial model, whose probabilities add up.

    `init` fits `weights` and `bias` to the cells with a label by L-BFGS (the problem is convex), and again without each
    of `n_folds` folds. From the cells of these it takes the `temperature` by which log odds are divided (Guo et al.
    2017), and the spread of each type: a Gaussian in principal components of 2,000 variable genes whose covariance the
    types share, with the squared distance that 98 % of the type's held-out cells do not exceed. Log odds alone cannot
    tell an unseen type, for they are large in directions that training never saw. So confidence is the largest
    probability, times ``exp((limit - distance^2) / 2)`` where a cell is farther from its type than that limit.

    In the call, derivatives reach the expression and the three learnables; which type is the most probable is discrete.
    """

    by_cell: ClassVar[bool] = True
    INSIDE: ClassVar[float] = INSIDE
    weights: Array | None = learnable(default=None)
    bias: Array | None = learnable(default=None)
    temperature: float | Array | None = learnable(default=None, constraint="positive")
    standards: Standards | None = buffer(default=None)
    spread: Envelope | None = buffer(default=None)
    penalty: float | None = static(default=None)
    n_folds: int = static(default=3)
    threshold: float = static(default=0.5)

    def init(
        self,
        x: C.Matrix,
        labels: Int[Array | np.ndarray, " cells"] | None = None,
        clusters: Array | None = None,
        key: Array | None = None,
    ) -> LogisticAnnotation:
        if self.weights is not None:
            return self
        if labels is None:
            raise ValueError("LogisticAnnotation needs labels (cells,) to be fitted to, -1 for unlabelled")
        codes = np.asarray(labels)
        known = np.flatnonzero(codes >= 0)
        sizes = np.bincount(codes[known])
        if len(sizes) < 2 or (sizes == 0).any():
            raise ValueError(f"labels must have two or more types, numbered from 0 without gaps; their cells: {sizes}")
        seed = 0 if key is None else as_seed(key)
        with one_blas_thread(), jax.enable_x64(True):
            data = standards(rows(x, known), codes[known])
            fold = folds(data.codes, self.n_folds, np.random.default_rng(seed))
            small, axes = compact(data)
            op, start = self._chosen(small, fold)
            assert op.penalty is not None
            weights, bias, converged = logistic(small, np.ones(len(known)), op.penalty, start, _TOLERANCE)
            weights = weights if axes is None else axes @ weights
            spread = envelope(data, fold, self.n_folds)
        if not converged:
            warn(f"the logistic regression has not converged at penalty={op.penalty}: lower it")
        op = replace(op, weights=weights, bias=bias, spread=spread)
        return jax.tree.map(lambda v: v.astype(x.dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v, op)

    def _chosen(self, data: Training, fold: np.ndarray) -> tuple[LogisticAnnotation, tuple[Array, Array]]:
        """With what held-out cells tell of each fold's model: the temperature, and the penalty if not given.

        And the mean model of the folds, near that of all cells.
        """
        # The only cell of its type cannot be told by a model that has never seen one.
        counted = np.bincount(data.codes)[data.codes] > 1
        if not counted.any():
            raise ValueError("each type has a single cell: none can be held out to calibrate probabilities")
        right = data.codes[counted]
        starts: list[Any] = [None] * self.n_folds
        best: tuple[float, float, float, np.ndarray, tuple[Array, Array]] | None = None
        for penalty in PENALTIES if self.penalty is None else (self.penalty,):
            logits = np.zeros((len(fold), data.n_types))
            for number in range(self.n_folds):
                weights, bias, _ = logistic(data, fold != number, penalty, starts[number])
                starts[number] = weights, bias
                logits[fold == number] = np.asarray(data.logits(weights, bias))[fold == number]
            heat, loss = temperature(logits[counted], right)
            if best is not None and loss >= best[0]:
                break  # a weaker ridge does not help: the loss has one minimum over it
            mean = jax.tree.map(lambda *parts: sum(parts) / self.n_folds, *starts)
            best = loss, penalty, heat, logits[counted] / heat, mean
        assert best is not None
        chances = np.exp(best[3] - best[3].max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        told = chances.argmax(1) == right
        held_out = (told.mean(), calibration_error(chances.max(1), told))
        op = replace(
            self,
            penalty=best[1],
            temperature=jnp.asarray(best[2], data.x.dtype),
            standards=Standards(data.mean, data.sd, *(jnp.asarray(v, data.x.dtype) for v in held_out)),
        )
        return op, best[4]

    def __call__(
        self,
        x: C.Matrix,
        labels: Int[Array, " cells"] | None = None,
        clusters: Int[Array, " cells"] | None = None,
    ) -> LogisticAnnotationResult:
        """Cells with a label (not -1) keep it; the most frequent type of each of the `clusters` becomes that of all."""
        if self.weights is None or self.bias is None or self.standards is None or self.spread is None:
            raise ValueError("LogisticAnnotation needs its weights: call `op = op.init(x, labels)` first")
        n_types = self.weights.shape[1]
        dtype = x.dtype
        weights, mean, sd = (jnp.asarray(v, dtype) for v in (self.weights, *self.standards[:2]))
        spread = jax.tree.map(lambda v: jnp.asarray(v, v.dtype if v.dtype == jnp.int32 else dtype), self.spread)

        def both(block: Array) -> Array:
            z = standardised(block, mean, sd)
            logits = jnp.matmul(z, weights, precision=lax.Precision.HIGHEST)
            return jnp.concatenate([logits, jnp.matmul(z[:, spread.genes], spread.projection)], 1)

        found = C.map_rows(x, both)
        logits = (found[:, :n_types] + jnp.asarray(self.bias, dtype)) / jnp.asarray(self.temperature, dtype)
        square = ((found[:, n_types:] - spread.centres[logits.argmax(1)]) ** 2).sum(1)
        return LogisticAnnotationResult(*decided(logits, square, spread.limit, self.threshold, labels, clusters))


def decided(
    logits: Float[Array, "cells types"],
    square: Float[Array, " cells"],
    limit: Float[Array, " types"],
    threshold: float,
    labels: Int[Array, " cells"] | None,
    clusters: Int[Array, " cells"] | None,
) -> tuple[Array, Array, Array, Array]:
    """Probabilities, confidence, distance and types, as in :class:`LogisticAnnotationResult`.

    `square` are squared distances from the most probable type, and `limit` those up to which cells are alike.
    """
    n_types = logits.shape[1]
    chances, best = jax.nn.softmax(logits), logits.argmax(1)
    excess = jnp.maximum(square - limit[best], 0)
    confidence = chances.max(1) * jnp.exp(-excess / 2)
    types = jnp.where(confidence >= threshold, best, -1).astype(jnp.int32)
    if labels is not None:
        types = jnp.where(labels >= 0, labels, types)
        confidence = jnp.where(labels >= 0, 1, confidence)
    if clusters is not None:
        types = _voted(types, clusters, n_types)
        types = types if labels is None else jnp.where(labels >= 0, labels, types)
    return chances, confidence, square / limit[best], types


def _voted(types: Array, clusters: Array, n_types: int) -> Int[Array, " cells"]:
    """The most frequent type of each cell's cluster, where unassigned is one too; of a tie the first."""
    votes = jnp.zeros((types.shape[0], n_types + 1), jnp.int32).at[clusters, types].add(1)
    winner = votes.argmax(1).astype(jnp.int32)
    return jnp.where(winner < n_types, winner, -1)[clusters]


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy over 15 equal bins (Guo et al. 2017)."""
    place = np.minimum((np.asarray(confidence) * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(place, np.asarray(confidence, float) - right, minlength=_BINS)
    return float(np.abs(gaps).sum() / max(len(place), 1))
