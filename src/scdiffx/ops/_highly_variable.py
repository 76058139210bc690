"""Highly variable genes: scanpy's selection as a table, and a weight per gene whose hard limit is that selection."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float, Int

from scdiffx._core.counts import Counts, Matrix, map_values, n_rows, rows_to_values
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.loess import Curve, evaluate
from scdiffx.ops._highly_variable_table import TINY_MEAN, VARIANCE, Bins, Rule, select

__all__ = ["HighlyVariable", "HighlyVariableResult"]

CUTOFFS = (0.5, np.inf, 0.0125, 3.0)
# The signal of a gene without a score: far below every threshold, yet finite.
NEVER = -1e6
# The least distance from its threshold, in scales, at which `init` leaves a gene: more than float32 can lose.
EDGE = 1e-3


class HighlyVariableResult(NamedTuple):
    """What :class:`HighlyVariable` returns, one number a gene."""

    weight: Float[Array, " genes"]
    score: Float[Array, " genes"]
    mean: Float[Array, " genes"]
    dispersion: Float[Array, " genes"]


class Reference(NamedTuple):
    """What is estimated once: bins or trend of each batch, and where the line between the genes runs.

    `found`: scores, means and dispersions of the data, where these do not move (`HighlyVariable.settled`).
    """

    log_base: Any
    centre: Any
    spread: Any
    trend: Any
    threshold: Any
    scale: Any
    found: Any = None


@operator
class HighlyVariable:
    """Weight genes by how much they vary beyond what their mean explains.

    ``weight = sigmoid((signal - threshold) / (temperature * scale) + shift)``. Without a shift, the genes of weight
    over 1/2 are exactly those that scanpy selects on the data given to :meth:`init`, and so are, as the temperature
    falls to 0, the genes of weight 1.

    The signal is the score; its logarithm for the ``seurat_v3`` flavours, whose scores are variance ratios. With
    cut-offs instead of `n_top_genes` it is the distance to the nearest of them (means in log ratios). `scale` is the
    robust standard deviation of the scores (1.4826 MAD), so the temperature has no unit.

    What is discrete or a fit to all genes is taken from :meth:`init` and held: the bin of a gene with its centre and
    spread, the loess curve of variance on mean (evaluated at the gene's own mean, which does carry a derivative), the
    thresholds. Hence the derivative is that of one piece of the selection.

    With batches, the score is the mean over the batches of the scores within each, as in scanpy's table. Scanpy ranks
    by the number of batches first (``seurat_v3``: by the median rank), which is no function of that mean: where a gene
    lies on the wrong side of the common threshold, or within 0.001 `scale` of it, it gets a threshold of its own, at
    the same distance on the right side (at least 0.001 `scale`). So the hard limit equals scanpy's set here too.

    Parameters
    ----------
    flavor
        ``"seurat"`` and ``"cell_ranger"`` read log1p data and score dispersions within bins of the mean (Satija et al.
        2015; Zheng et al. 2017); ``"seurat_v3"`` and ``"seurat_v3_paper"`` read counts and score the variance of
        clipped, standardised counts (Stuart et al. 2019). The last two differ only with batches.
    n_top_genes
        How many genes; None: by `cutoffs` (dispersion flavours), or 2000.
    cutoffs
        (min_disp, max_disp, min_mean, max_mean), open bounds on score and mean; read where `n_top_genes` is None by
        the dispersion flavours.
    n_bins
        Bins of the mean, for ``"seurat"``.
    span
        Neighbourhood of the loess regression as a fraction of the genes, for ``"seurat_v3"``.
    temperature
        Width of the transition, in robust standard deviations of the scores.
    shift
        Learned change of the log-odds of each gene; zeros from :meth:`init`.

    Examples
    --------
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> x = np.random.default_rng(0).poisson(2.0, (60, 20)).astype(np.float32)
    >>> op = sd.ops.HighlyVariable(flavor="seurat_v3", n_top_genes=5).init(x)
    >>> int((op(x).weight > 0.5).sum())
    5
    """

    flavor: str = static(default="seurat")
    n_top_genes: int | None = static(default=None)
    cutoffs: tuple[float, float, float, float] = static(default=CUTOFFS)
    n_bins: int = static(default=20)
    span: float = static(default=0.3)
    temperature: Any = learnable(default=0.1, constraint="positive")
    shift: Any = learnable(default=None, constraint="real")
    reference: Reference | None = buffer(default=None)

    def table(
        self, x: Any, batch: Any = None, *, log_base: float | None = None, gene_names: Any = None
    ) -> dict[str, np.ndarray]:
        """Scanpy's columns for `x` (scipy sparse, numpy, or a concrete :class:`Counts`), in float64 on the host.

        `batch` holds codes 0, 1, ... of the cells; `log_base` is the base of the logarithm in `x` (None: e), read by
        ``"seurat"``. With batches and a dispersion flavour, scanpy breaks ties by the alphabetical order of
        `gene_names`; without names ties keep the order of the genes.

        Returns
        -------
        ``highly_variable`` (bool), ``means`` (float64), and: for dispersion flavours ``dispersions`` (float64),
        ``dispersions_norm`` (float32), with batches ``highly_variable_nbatches`` (int64) and
        ``highly_variable_intersection`` (bool); else ``highly_variable_rank`` (float32), ``variances``,
        ``variances_norm`` (float64), with batches ``highly_variable_nbatches``.

        Raises
        ------
        ValueError
            For an unknown flavour, impossible settings, codes that are not 0, 1, ..., or a batch of one cell where
            variances are standardised.
        """
        return select(x, batch, self._rule, log_base, gene_names)[0]

    @property
    def _rule(self) -> Rule:
        return Rule(self.flavor, self.n_top_genes, self.cutoffs, self.n_bins, self.span)

    def init(
        self,
        x: Any,
        batch: Any = None,
        *,
        log_base: float | None = None,
        gene_names: Any = None,
        key: Any = None,
    ) -> HighlyVariable:
        """Estimate the reference from the data; arguments as for :meth:`table`. `key` is not needed."""
        del key
        table, against = select(x, batch, self._rule, log_base, gene_names)
        x = x if isinstance(x, Counts) else Counts.from_scipy(x) if sp.issparse(x) else jnp.asarray(x)
        codes = None if batch is None else jnp.asarray(batch)
        ref = jax.tree.map(lambda v: jnp.asarray(v, x.dtype), _reference(against, log_base, x.shape[1]))
        score, mean, _ = _scores(self.flavor, ref, x, codes)
        by_score = np.asarray(self._signal(ref, score, mean, by_score=True), np.float64)
        ref = ref._replace(scale=jnp.asarray(_robust_spread(by_score[by_score > NEVER]), x.dtype))
        signal = np.asarray(self._signal(ref, score, mean), np.float64)
        by_rank = self.flavor in VARIANCE or self.n_top_genes is not None
        threshold = _thresholds(signal, table["highly_variable"], float(ref.scale), by_rank)
        shift = jnp.zeros(x.shape[1], x.dtype) if self.shift is None else self.shift
        return replace(self, reference=ref._replace(threshold=jnp.asarray(threshold, x.dtype)), shift=shift)

    def __call__(self, x: Matrix, batch: Int[Array, " cells"] | None = None) -> HighlyVariableResult:
        """Weights of the genes of `x` (cells, genes); `batch` as in :meth:`init` when that was given batches.

        `mean` and `dispersion` are scanpy's ``means`` and ``dispersions`` or ``variances``. A gene without a score
        (constant, or alone with such genes in its bin) has score 0.
        """
        ref = self.reference
        if ref is None:
            raise ValueError("this operator holds no reference yet: call op = op.init(x) first")
        if len(ref.threshold) != x.shape[1]:
            raise ValueError(f"x has {x.shape[1]} genes, and init saw {len(ref.threshold)}")
        if batch is None and _n_batches(ref) > 1:
            raise ValueError(f"init saw {_n_batches(ref)} batches: pass the batch of each cell")
        score, mean, dispersion = _scores(self.flavor, ref, x, batch) if ref.found is None else ref.found
        margin = (self._signal(ref, score, mean) - ref.threshold) / (self.temperature * ref.scale)
        shift = 0.0 if self.shift is None else self.shift
        return HighlyVariableResult(jax.nn.sigmoid(margin + shift), jnp.nan_to_num(score, nan=0.0), mean, dispersion)

    def settled(self, x: Matrix, batch: Int[Array, " cells"] | None = None) -> HighlyVariable:
        """The operator with the scores of these cells: it no longer looks at the data that it is called with."""
        if self.reference is None:
            raise ValueError("this operator holds no reference yet: call op = op.init(x) first")
        return replace(self, reference=self.reference._replace(found=_scores(self.flavor, self.reference, x, batch)))

    def _signal(self, ref: Reference, score: Array, mean: Array, by_score: bool = False) -> Array:
        if self.flavor in VARIANCE:
            positive = score > 0
            return jnp.where(positive, jnp.log(jnp.where(positive, score, 1)), NEVER)
        defined = ~jnp.isnan(score)
        score = jnp.where(defined, score, 0)
        if by_score or self.n_top_genes is not None:
            return jnp.where(defined, score, NEVER)
        low, high, low_mean, high_mean = self.cutoffs
        log_mean = jnp.log(jnp.maximum(mean, TINY_MEAN))
        nearest = jnp.full_like(score, -NEVER)
        for bounded, distance in (
            (np.isfinite(low), lambda: score - low),
            (np.isfinite(high), lambda: high - score),
            (low_mean > 0, lambda: ref.scale * (log_mean - np.log(low_mean))),
            (0 < high_mean < np.inf, lambda: ref.scale * (np.log(high_mean) - log_mean)),
        ):
            nearest = jnp.minimum(nearest, distance()) if bounded else nearest
        return nearest


def _n_batches(ref: Reference) -> int:
    return (ref.trend if ref.centre is None else ref.centre).shape[0]


def _reference(against: Bins | list[Curve], log_base: float | None, genes: int) -> Reference:
    log = 1.0 if log_base is None else np.log(log_base)
    threshold, scale = np.zeros(genes), np.ones(())
    if isinstance(against, Bins):
        return Reference(np.asarray(log), against.centre, against.spread, None, threshold, scale)
    size = max(len(curve.knots) for curve in against)
    trend = np.stack([np.stack(curve.padded(size)) for curve in against])
    return Reference(np.asarray(log), None, None, trend, threshold, scale)


def _robust_spread(values: np.ndarray) -> float:
    """1.4826 times the median absolute deviation; the standard deviation if that is 0, and 1 if this is 0 too."""
    if len(values) == 0:
        return 1.0
    spread = 1.4826 * np.median(np.abs(values - np.median(values)))
    return float(spread or values.std() or 1.0)


def _thresholds(signal: np.ndarray, selected: np.ndarray, scale: float, by_rank: bool) -> np.ndarray:
    """One threshold for all genes, except for those that it would put on the wrong side or leave on the edge."""
    common = 0.0
    if by_rank:
        scored = signal > NEVER
        ranked = np.sort(signal[scored])[::-1]
        count = int(selected[scored].sum())
        above = ranked[count - 1] if count else ranked[0] + 2 * scale if len(ranked) else 0.0
        below = ranked[count] if count < len(ranked) else above - 2 * scale
        common = (above + below) / 2
    distance = np.where(selected, signal - common, common - signal)
    own = signal - np.where(selected, 1, -1) * np.maximum(np.abs(distance), EDGE * scale)
    return np.where(distance >= EDGE * scale, common, own)


@partial(jax.jit, static_argnums=0)
def _scores(flavor: str, ref: Reference, x: Matrix, batch: Array | None) -> tuple[Array, Array, Array]:
    """Score (NaN where there is none), mean and dispersion or variance of each gene."""
    groups = _n_batches(ref)
    cells = _Cells(x, None if batch is None else jnp.asarray(batch, jnp.int32), groups)
    if flavor in VARIANCE:
        return _variance_scores(ref, cells)
    return _dispersion_scores(flavor, ref, cells)


def _dispersion_scores(flavor: str, ref: Reference, cells: _Cells) -> tuple[Array, Array, Array]:
    present = cells.sizes > 0
    if flavor == "seurat":
        cells = cells.map(lambda v: jnp.expm1(v * ref.log_base))
    mean, variance, _ = cells.moments()
    mean = jnp.maximum(mean, TINY_MEAN)
    dispersion = variance / mean
    varies = present
    if flavor == "seurat":
        varies = present & (dispersion > 0)
        dispersion = jnp.log(jnp.where(varies, dispersion, 1))
        mean = jnp.log1p(mean)
    scored = varies & jnp.isfinite(ref.centre) & (ref.spread != 0)
    score = (dispersion - jnp.where(scored, ref.centre, 0)) / jnp.where(scored, ref.spread, 1)
    # In a batch that does not express a gene its values count as 0; where it has none for another reason, not at all.
    absent = present & jnp.isinf(ref.spread)
    return (
        _mean_where(score, scored & ~absent, absent),
        _mean_where(mean, present & ~absent, absent),
        jnp.nan_to_num(_mean_where(dispersion, varies & ~absent, absent), nan=0.0),
    )


def _mean_where(values: Array, real: Array, zero: Array) -> Array:
    """Mean over the batches of the real values and the zeros; NaN where there is neither."""
    number = (real | zero).sum(0)
    return jnp.where(number > 0, jnp.where(real, values, 0).sum(0) / jnp.maximum(number, 1), jnp.nan)


def _variance_scores(ref: Reference, cells: _Cells) -> tuple[Array, Array, Array]:
    n = cells.sizes
    mean, variance, spread_about = cells.moments()
    varies = variance > 0
    log_mean = jnp.log10(jnp.where(varies, mean, 1))
    log_variance = jax.vmap(lambda trend, at: evaluate(Curve(*trend), at))(ref.trend, log_mean)
    expected = jnp.where(varies, 10**log_variance, 1)
    clip = jnp.sqrt(expected) * jnp.sqrt(n) + mean
    score = spread_about(mean, clip) / (jnp.maximum(n - 1, 1) * expected)
    weight = n / n.sum()
    total = (weight * mean).sum(0)
    squares = (jnp.maximum(n - 1, 0) * variance + n * (mean - total) ** 2).sum(0)
    return score.sum(0) / (n > 0).sum(), total, squares / jnp.maximum(n.sum() - 1, 1)


@partial(jax.jit, static_argnums=2)
def _sum_at(values: Float[Array, "blocks nnz"], place: Int[Array, "blocks nnz"], size: int) -> Array:
    """Sums of the values that share a place; those placed past the end are dropped."""

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        # A block's own sum first: in float32 long running sums lose digits.
        value, at = part
        return total + jnp.zeros_like(total).at[at].add(value, mode="drop"), None

    return jax.lax.scan(add, jnp.zeros(size, values.dtype), (values, place))[0]


class _Cells:
    """Sums over the cells of each batch, (batches, genes), of a sparse or dense matrix."""

    def __init__(self, x: Matrix, codes: Int[Array, " cells"] | None, groups: int) -> None:
        self.x, self.codes, self.groups, self.genes = x, codes, groups, x.shape[1]
        self.values = x.data if isinstance(x, Counts) else x
        if codes is None:
            self.sizes = jnp.full((1, 1), n_rows(x), x.dtype)
        else:
            # Codes that `init` did not see go past the end, where sums drop them; negative ones would count from there.
            codes = jnp.where(codes < 0, groups, codes)
            self.sizes = jnp.zeros(groups, x.dtype).at[codes].add(1, mode="drop")[:, None]
        if isinstance(x, Counts):
            self.place = x.column + self.genes * self._batch_of_values(x, codes)

    def _batch_of_values(self, x: Counts, codes: Array | None) -> Array:
        """The batch of each stored value, and one past the last for pads."""
        if codes is None:
            return (x.row == x.block_rows).astype(x.position.dtype)
        return rows_to_values(x, codes, pad=self.groups)

    def map(self, f: Any) -> _Cells:
        return _Cells(map_values(self.x, f), self.codes, self.groups)

    def sum(self, values: Array) -> Array:
        if not isinstance(self.x, Counts):
            if self.codes is None:
                return values.sum(0)[None]
            members = jax.nn.one_hot(self.codes, self.groups, axis=0, dtype=values.dtype)
            return jnp.matmul(members, values, precision="highest")
        return _sum_at(values, self.place, self.groups * self.genes).reshape(self.groups, self.genes)

    def at_values(self, table: Array) -> Array:
        """The entry of a (batches, genes) table that belongs to each value; 0 for pads."""
        if isinstance(self.x, Counts):
            return table.reshape(-1).at[self.place].get(mode="fill", fill_value=0)
        return table if self.codes is None else table[jnp.minimum(self.codes, self.groups - 1)]

    def moments(self) -> tuple[Array, Array, Any]:
        """Mean and unbiased variance, and a function for the sum of squares of clipped values about a centre."""
        n = jnp.maximum(self.sizes, 1)
        mean = self.sum(self.values) / n
        stored = self.sum(jnp.ones_like(self.values)) if isinstance(self.x, Counts) else n

        def spread_about(centre: Array, clip: Array | None = None) -> Array:
            values = self.values if clip is None else jnp.minimum(self.values, self.at_values(clip))
            return self.sum((values - self.at_values(centre)) ** 2) + (n - stored) * centre**2

        return mean, spread_about(mean) / jnp.maximum(n - 1, 1), spread_about
