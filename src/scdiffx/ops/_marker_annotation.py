"""Cell types from marker genes alone, by CellAssign's negative binomial mixture."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from scdiffx._core import counts as C
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.random import as_seed
from scdiffx._log import warn
from scdiffx.ops._logistic_annotation import _voted
from scdiffx.ops._marker_fit import INSIDE, MarkerFit, MarkerSettings, fitted, joint, layout, limits

__all__ = ["MarkerAnnotation", "MarkerAnnotationResult", "MarkerSettings"]

_NO_COUNTS = 1e-3  # size factor of a cell without counts, whose posterior is then the proportions


class MarkerAnnotationResult(NamedTuple):
    """What the cells are.

    `probabilities` (cells, types): posterior. `confidence` (cells,): the largest of a type with markers.
    `log_likelihood` (cells,): of the markers' counts. `unlike` (cells,): whether that is lower than it is for 98 % of
    the fitted cells of like size factors. `types` (cells,): the number of the type, -1 for unassigned.
    """

    probabilities: Float[Array, "cells types"]
    confidence: Float[Array, " cells"]
    log_likelihood: Float[Array, " cells"]
    unlike: Bool[Array, " cells"]
    types: Int[Array, " cells"]


@operator
class MarkerAnnotation:
    """CellAssign's mixture of negative binomials (Zhang et al. 2019), of the marker genes' counts.

    `markers` are, for each type, the columns of its marker genes; one type may have none, as cells of no type have.
    The mean of a gene in a cell of a type is the cell's size factor times ``exp(baseline + log fold)``, where the log
    fold is 0 unless the gene is a marker of the type; `baseline` (batches, genes) has a row for each batch, `log_folds`
    (entries,) a number for each marker of each type, in their order. The shape of the negative binomial is a sum of ten
    Gaussian bumps over the mean, of heights `dispersion`. `proportions` are those of the types.

    `init` takes the parameters to the maximum of the likelihood times CellAssign's priors: Dirichlet on the
    proportions, normal on the logarithms of log folds, which are at least `settings.min_log_fold`. CellAssign gets
    there by expectation and maximisation; this is L-BFGS on the same function of all parameters, whose slope is that of
    the maximisation step, in double precision. Starts are the cells named after their highest markers, and variations;
    beyond 4,000 cells the starts compete on so many of them. Size factors are total counts over all genes by their mean
    among the fitted cells, unless `size` gives them.

    In the call, derivatives reach the counts and the learnables; which type is the most probable is discrete.
    """

    INSIDE: ClassVar[float] = INSIDE
    baseline: Array | None = learnable(default=None)
    log_folds: Array | None = learnable(default=None, constraint="positive")
    dispersion: Array | None = learnable(default=None, constraint="positive")
    proportions: Array | None = learnable(default=None, constraint="simplex")
    fit: MarkerFit | None = buffer(default=None)
    markers: tuple[tuple[int, ...], ...] = static(default=())
    threshold: float = static(default=0.5)
    settings: MarkerSettings = static(default=MarkerSettings())

    def init(
        self,
        x: C.Matrix,
        size: Float[Array, " cells"] | None = None,
        batch: Int[Array, " cells"] | None = None,
        clusters: Array | None = None,
        key: Array | None = None,
    ) -> MarkerAnnotation:
        at = layout(self.markers)
        if self.baseline is not None:
            return self
        if x.shape[0] <= at.n_types:
            raise ValueError(f"{x.shape[0]} cells are too few for {at.n_types} types")
        with jax.enable_x64(True):
            exact = _double(x)
            total = C.row_sums(exact)
            mean = total.mean() if size is None else jnp.ones(())
            if not mean > 0:
                raise ValueError("no cell has any count")
            table = np.asarray(_table(exact, total / mean if size is None else size, batch, self.markers))
            n_batches = 1 if batch is None else int(np.asarray(batch).max()) + 1
            seed = 0 if key is None else as_seed(key)
            centres, found = fitted(table, n_batches, self.markers, self.settings, seed)
            flat = found.flat
            if not found.converged:
                warn(f"the markers' model has not converged in max_iter={self.settings.max_iter} iterations")
            log_proportions = jax.nn.log_softmax(jnp.asarray(flat.logits))
            parts = (flat.baseline, np.exp(flat.log_log_folds), np.exp(flat.log_dispersion))
            cells = jax.nn.logsumexp(_joint(jnp.asarray(table), *parts, log_proportions, centres, self.markers), axis=1)
            edges, limit = limits(np.asarray(cells), table[:, -2])
            learned = dict(zip(("baseline", "log_folds", "dispersion"), parts, strict=True))
            learned["proportions"] = np.exp(log_proportions)
            numbers = (centres, mean, found.log_likelihood, found.objective, edges, limit)
            fit = MarkerFit(*[*(jnp.asarray(v, x.dtype) for v in numbers), jnp.asarray(found.converged)])
            return replace(self, **{k: jnp.asarray(v, x.dtype) for k, v in learned.items()}, fit=fit)

    def __call__(
        self,
        x: C.Matrix,
        size: Float[Array, " cells"] | None = None,
        batch: Int[Array, " cells"] | None = None,
        clusters: Int[Array, " cells"] | None = None,
    ) -> MarkerAnnotationResult:
        """The most frequent type of each of the `clusters` becomes that of all of its cells."""
        if self.baseline is None or self.fit is None:
            raise ValueError("MarkerAnnotation needs its parameters: call `op = op.init(x)` first")
        if self.baseline.shape[0] > 1 and batch is None:
            raise ValueError(f"the baseline is that of {self.baseline.shape[0]} batches: pass `batch`")
        at = layout(self.markers)
        held = (self.baseline, self.log_folds, self.dispersion, self.proportions)
        baseline, folds, dispersion, proportions = (jnp.asarray(v, x.dtype) for v in held)
        fit: MarkerFit = jax.tree.map(lambda v: v if v.dtype == bool else jnp.asarray(v, x.dtype), self.fit)
        if size is None:
            size = C.row_sums(x) / fit.total
        table = _table(x, size, batch, self.markers)
        log_p = jnp.log(jnp.maximum(proportions, jnp.finfo(x.dtype).tiny))
        found = _joint(table, baseline, folds, dispersion, log_p, fit.basis, self.markers)
        log_likelihood = jax.nn.logsumexp(found, axis=1)
        chances = jax.nn.softmax(found)
        known = jnp.asarray([bool(genes) for genes in self.markers])
        of_known = jnp.where(known, chances, 0)
        confidence, best = of_known.max(1), chances.argmax(1)
        types = jnp.where((confidence >= self.threshold) & known[best], best, -1).astype(jnp.int32)
        if clusters is not None:
            types = _voted(types, clusters, at.n_types)
        bin_of = jnp.searchsorted(fit.edges, lax.stop_gradient(table[:, -2]))
        unlike = lax.stop_gradient(log_likelihood) < fit.limit[bin_of]
        return MarkerAnnotationResult(chances, confidence, log_likelihood, unlike, types)


@partial(jax.jit, static_argnames="markers")
def _table(
    x: C.Matrix, size: Array, batch: Array | None, markers: tuple[tuple[int, ...], ...]
) -> Float[Array, "cells genes+2"]:
    """The markers' counts, the logarithm of the size factor and the number of the batch of each cell."""
    values = C.dense(C.take_columns(x, jnp.asarray(layout(markers).columns)))
    size = jnp.asarray(size, x.dtype)
    log_size = jnp.log(jnp.where(size > 0, size, _NO_COUNTS))
    batch = jnp.zeros_like(log_size) if batch is None else jnp.asarray(batch, x.dtype)
    return jnp.concatenate([values, log_size[:, None], batch[:, None]], 1)


def _double(x: C.Matrix) -> C.Matrix:
    return x.with_data(x.data.astype(jnp.float64)) if isinstance(x, C.Counts) else x.astype(jnp.float64)


@partial(jax.jit, static_argnums=6)
def _joint(table: Array, *parts: Any) -> Float[Array, "cells types"]:
    there = (*parts[:-1], layout(parts[-1]))
    return C.map_rows(table, lambda rows: joint(rows, *there))
