"""The hard selection of highly variable genes on the host: scanpy's rules and columns, in float64 from sparse data."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.special import ndtri

from scdiffx._core.counts import Counts, Streamed
from scdiffx._core.loess import Curve, evaluate, loess

DISPERSION = ("seurat", "cell_ranger")
VARIANCE = ("seurat_v3", "seurat_v3_paper")
TINY_MEAN = 1e-12
# A variance this small beside the squared mean is the rounding error of a constant gene.
CONSTANT = 1e-14
CHUNK = 1 << 20

Table = dict[str, np.ndarray]


class Rule(NamedTuple):
    """The settings of a selection."""

    flavor: str
    n_top_genes: int | None
    cutoffs: tuple[float, float, float, float]
    n_bins: int
    span: float

    def check(self) -> None:
        if self.flavor not in DISPERSION + VARIANCE:
            raise ValueError(f"flavor={self.flavor!r} is unknown. Available: {list(DISPERSION + VARIANCE)}")
        if self.n_top_genes is not None and self.n_top_genes < 1:
            raise ValueError(f"n_top_genes={self.n_top_genes} must be at least 1")
        if self.n_bins < 1:
            raise ValueError(f"n_bins={self.n_bins} must be at least 1")
        if len(self.cutoffs) != 4:
            raise ValueError(f"cutoffs={self.cutoffs} must be (min_disp, max_disp, min_mean, max_mean)")

    def in_bounds(self, mean: np.ndarray, score: np.ndarray) -> np.ndarray:
        low, high, low_mean, high_mean = self.cutoffs
        return (mean > low_mean) & (mean < high_mean) & (score > low) & (score < high)


class Bins(NamedTuple):
    """Centre and spread of the dispersions around each gene (batches, genes).

    NaN where no dispersion was around; a spread of infinity where the gene is not expressed in the batch.
    """

    centre: np.ndarray
    spread: np.ndarray


def on_host(x: Any) -> Any:
    """A CSR, CSC or numpy matrix, or rows of one as they are stored."""
    if isinstance(x, Streamed):
        return x
    if isinstance(x, Counts):
        return x.to_scipy()
    if sp.issparse(x):
        return x if x.format in ("csr", "csc") else x.tocsr()
    return np.asarray(x)


def checked_codes(batch: Any, n: int) -> np.ndarray:
    """Batch codes 0, 1, ...; zeros without batches."""
    if batch is None:
        return np.zeros(n, np.intp)
    codes = np.asarray(batch)
    if codes.shape != (n,) or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"batch must be integer codes of shape ({n},), not {codes.dtype} of shape {codes.shape}")
    found = np.unique(codes)
    if not np.array_equal(found, np.arange(len(found))):
        raise ValueError(f"batch codes must be 0, 1, ... without gaps (no code for missing values), not {found[:9]}")
    return codes.astype(np.intp)


def select(
    x: Any, batch: Any, rule: Rule, log_base: float | None = None, gene_names: Any = None
) -> tuple[Table, Bins | list[Curve]]:
    """Scanpy's columns for `x`, and what the scores were measured against: bins, or one curve a batch."""
    rule.check()
    x = on_host(x)
    codes = checked_codes(batch, x.shape[0])
    if rule.flavor in VARIANCE:
        return _by_variance(x, codes, batch is not None, rule)
    parts = _per_batch_dispersions(x, codes, batch is not None, rule, log_base)
    bins = Bins(np.stack([p.centre for p in parts]), np.stack([p.spread for p in parts]))
    table = _columns(parts[0]) if batch is None else _over_batches(parts, rule, gene_names)
    table["dispersions_norm"] = table["dispersions_norm"].astype(np.float32)
    return table, bins


class Dispersions(NamedTuple):
    """One batch, dispersion flavours; each (genes,)."""

    selected: np.ndarray
    mean: np.ndarray
    dispersion: np.ndarray
    score: np.ndarray
    centre: np.ndarray
    spread: np.ndarray


def _per_batch_dispersions(
    x: Any, codes: np.ndarray, batched: bool, rule: Rule, log_base: float | None
) -> list[Dispersions]:
    def linear(values: np.ndarray) -> np.ndarray:
        # In the precision of the data, as the values it came from.
        return np.expm1(values if log_base is None else values * values.dtype.type(np.log(log_base)))

    sizes = np.bincount(codes)
    sums = _sums(x, codes, len(sizes), transform=linear if rule.flavor == "seurat" else None, positive=batched)
    parts = []
    for b, size in enumerate(sizes):
        mean, variance = _moments(sums.total[b], sums.squares[b], size)
        kept = sums.positive[b] > 0 if batched else np.ones(len(mean), bool)
        parts.append(_dispersions(mean, variance, kept, rule))
    return parts


def _columns(part: Dispersions) -> Table:
    return {
        "highly_variable": part.selected,
        "means": part.mean,
        "dispersions": part.dispersion,
        "dispersions_norm": part.score,
    }


def _dispersions(mean: np.ndarray, variance: np.ndarray, kept: np.ndarray, rule: Rule) -> Dispersions:
    full = [np.zeros(len(mean), bool), *(np.zeros(len(mean)) for _ in range(5))]
    full[-1][:] = np.inf
    mean = np.where(mean[kept] == 0, TINY_MEAN, mean[kept])
    dispersion = variance[kept] / mean
    if rule.flavor == "seurat":
        dispersion = np.log(np.where(dispersion > 0, dispersion, np.nan))
        mean = np.log1p(mean)
    if len(mean):
        centre, spread = _bin_statistics(mean, dispersion, rule)
        with np.errstate(divide="ignore", invalid="ignore"):
            score = (dispersion - centre) / spread
        selected = _selected(mean, score, rule)
        for whole, part in zip(full, (selected, mean, dispersion, score, centre, spread), strict=True):
            whole[kept] = part
    return Dispersions(*full)


def _bin_statistics(mean: np.ndarray, dispersion: np.ndarray, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Centre and spread of the dispersions in the bin of each gene."""
    if rule.flavor == "cell_ranger":
        edges = np.unique(np.append(-np.inf, np.percentile(mean, np.arange(10, 105, 5))))
        which = np.searchsorted(edges, mean) - 1
        centre, spread = np.full(len(edges), np.nan), np.full(len(edges), np.nan)
        for b in np.unique(which):
            inside = dispersion[which == b]
            centre[b] = np.median(inside)
            spread[b] = np.median(np.abs(inside - centre[b])) / ndtri(0.75)
        return centre[which], spread[which]
    which = np.searchsorted(_equal_bins(mean, rule.n_bins), mean) - 1
    varies = ~np.isnan(dispersion)
    count = np.bincount(which[varies], minlength=rule.n_bins)
    with np.errstate(divide="ignore", invalid="ignore"):
        centre = np.bincount(which[varies], dispersion[varies], rule.n_bins) / count
        squares = np.bincount(which[varies], (dispersion[varies] - centre[which[varies]]) ** 2, rule.n_bins)
        spread = np.sqrt(squares / (count - 1))
    # A gene alone in its bin gets the score 1.
    alone = count < 2
    spread[alone], centre[alone] = centre[alone], 0
    centre[count == 0] = np.nan
    return centre[which], spread[which]


def _equal_bins(mean: np.ndarray, n_bins: int) -> np.ndarray:
    """Edges of equal bins, closed on the right; the lowest is moved so that the smallest mean falls inside."""
    low, high = mean.min(), mean.max()
    if low == high:
        margin = 0.001 * abs(low) if low else 0.001
        return np.linspace(low - margin, high + margin, n_bins + 1)
    edges = np.linspace(low, high, n_bins + 1)
    edges[0] -= 0.001 * (high - low)
    return edges


def _selected(mean: np.ndarray, score: np.ndarray, rule: Rule) -> np.ndarray:
    if rule.n_top_genes is None:
        return rule.in_bounds(mean, np.nan_to_num(score))
    top = min(rule.n_top_genes, len(score))
    ranked = np.sort(score[~np.isnan(score)])[::-1]
    if top > len(ranked):
        warnings.warn(
            f"`n_top_genes` (={top}) > number of normalized dispersions (={len(ranked)}), "
            "returning all genes with normalized dispersions.",
            UserWarning,
            stacklevel=_callers_level(),
        )
    if len(ranked) == 0:
        return np.zeros(len(score), bool)
    return np.nan_to_num(score, nan=-np.inf) >= ranked[min(top, len(ranked)) - 1]


def _callers_level() -> int:
    """The stack level, for a warning raised by who asks, of the first caller outside of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("scdiffx"):
        frame, level = frame.f_back, level + 1
    return level


def _over_batches(parts: list[Dispersions], rule: Rule, gene_names: Any) -> Table:
    """Averages over the batches; first the genes selected in most of them, ties by the average score."""
    count = np.sum([p.selected for p in parts], 0).astype(np.int64)
    mean, dispersion, score = (
        _mean_of_numbers(np.stack([getattr(p, name) for p in parts])) for name in ("mean", "dispersion", "score")
    )
    if rule.n_top_genes is None:
        score = np.nan_to_num(score, nan=0.0, posinf=np.inf, neginf=-np.inf)
        selected = rule.in_bounds(mean, score)
    else:
        by_name = (
            np.arange(len(count)) if gene_names is None else np.argsort(np.asarray(gene_names, str), kind="stable")
        )
        last = np.where(np.isnan(score), np.inf, -score)
        order = by_name[np.lexsort((last[by_name], -count[by_name]))]
        selected = np.zeros(len(count), bool)
        selected[order[: rule.n_top_genes]] = True
    return {
        "highly_variable": selected,
        "means": mean,
        "dispersions": dispersion,
        "dispersions_norm": score,
        "highly_variable_nbatches": count,
        "highly_variable_intersection": count == len(parts),
    }


def _mean_of_numbers(values: np.ndarray) -> np.ndarray:
    number = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(number, values, 0).sum(0) / number.sum(0)


def _by_variance(x: Any, codes: np.ndarray, batched: bool, rule: Rule) -> tuple[Table, list[Curve]]:
    sizes = np.bincount(codes)
    if sizes.min() < 2:
        raise ValueError(f"flavor={rule.flavor!r} needs two cells in every batch; cells per batch: {sizes.tolist()}")
    sums = _sums(x, codes, len(sizes))
    mean, variance = _moments(sums.total, sums.squares, sizes[:, None])
    curves = [_variance_trend(m, v, rule.span) for m, v in zip(mean, variance, strict=True)]
    deviation = np.stack([_expected_sd(*each) for each in zip(curves, mean, variance, strict=True)])
    n = sizes[:, None]
    clipped = _sums(x, codes, len(sizes), clip=deviation * np.sqrt(n) + mean)
    score = (n * mean**2 + clipped.squares - 2 * clipped.total * mean) / ((n - 1) * deviation**2)
    top = 2000 if rule.n_top_genes is None else rule.n_top_genes
    selected, rank, count = _ranked(score, top, batches_first=rule.flavor == "seurat_v3_paper")
    mean, variance = _moments(sums.total.sum(0), sums.squares.sum(0), len(codes))
    table = {
        "highly_variable": selected,
        "highly_variable_rank": rank,
        "means": mean,
        "variances": variance,
        "variances_norm": score.mean(0),
    }
    return table | ({"highly_variable_nbatches": count} if batched else {}), curves


def _variance_trend(mean: np.ndarray, variance: np.ndarray, span: float) -> Curve:
    varies = variance > 0
    if not varies.any():
        return Curve(np.array([0.0, 1.0]), np.zeros(2), np.zeros(2))
    return loess(np.log10(mean[varies]), np.log10(variance[varies]), span=span)


def _expected_sd(curve: Curve, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    varies = variance > 0
    deviation = np.ones(len(mean))
    deviation[varies] = np.sqrt(10 ** evaluate(curve, np.log10(mean[varies])))
    return deviation


def _ranked(score: np.ndarray, top: int, batches_first: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Selected genes, their median rank over the batches where they are in the top, and the number of those."""
    # The default sort is not stable; among equal scores it decides as scanpy's does.
    rank = np.argsort(np.argsort(-score, axis=1), axis=1).astype(np.float32)
    inside = rank < top
    count = inside.sum(0)
    rank = np.sort(np.where(inside, rank, np.inf), axis=0)
    genes = np.arange(score.shape[1])
    low, high = rank[np.maximum(count - 1, 0) // 2, genes], rank[np.minimum(count // 2, len(rank) - 1), genes]
    median = ((low + high) / 2).astype(np.float32)
    order = np.lexsort((median, -count) if batches_first else (-count, median))
    selected = np.zeros(len(genes), bool)
    selected[order[:top]] = True
    return selected, np.where(count > 0, median, np.nan).astype(np.float32), count


class Sums(NamedTuple):
    """Sums over the cells of each batch (batches, genes), and the number of positive values where asked for."""

    total: np.ndarray
    squares: np.ndarray
    positive: np.ndarray


def _moments(total: np.ndarray, squares: np.ndarray, n: Any) -> tuple[np.ndarray, np.ndarray]:
    mean = total / n
    variance = squares / n - mean**2
    variance = np.where(variance <= CONSTANT * mean**2, 0, variance)
    return mean, variance * n / np.maximum(n - 1, 1)


def _sums(
    x: Any,
    codes: np.ndarray,
    groups: int,
    *,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    clip: np.ndarray | None = None,
    positive: bool = False,
) -> Sums:
    """Sum `x`, its squares and (optionally) its positive signs after `transform` and clipping at `clip`."""
    genes = x.shape[1]
    sums = np.zeros((3, groups * genes))
    for values, target in _chunks(x, codes):
        values = (values if transform is None else transform(values)).astype(np.float64)
        if clip is not None:
            values = np.minimum(values, clip.ravel()[target])
        for k, weights in enumerate((values, values * values, (values > 0) if positive else None)):
            if weights is None:
                continue
            if values.ndim == 2:
                sums[k].reshape(groups, genes)[:] += _dense_sums(weights, target[:, 0] // genes, groups)
            else:
                sums[k] += np.bincount(target, weights, groups * genes)
    return Sums(*sums.reshape(3, groups, genes))


def _dense_sums(values: np.ndarray, codes: np.ndarray, groups: int) -> np.ndarray:
    if groups == 1:
        return values.sum(0)[None]
    return np.stack([values[codes == g].sum(0) for g in range(groups)])


def _chunks(x: Any, codes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of `x`, small enough for the cache, with the places of their values in a (batches, genes) table."""
    genes = x.shape[1]
    if isinstance(x, Streamed):
        for at, rows in x.stored():
            yield from _chunks(rows, codes[at])
        return
    if not sp.issparse(x):
        step = max(1, CHUNK // max(genes, 1))
        for start in range(0, len(x), step):
            yield x[start : start + step], codes[start : start + step, None] * genes + np.arange(genes)
        return
    by_row = x.format == "csr"
    offset = codes * genes
    start = 0
    while start < len(x.indptr) - 1:
        stop = max(start + 1, int(np.searchsorted(x.indptr, x.indptr[start] + CHUNK, side="right")) - 1)
        piece = slice(x.indptr[start], x.indptr[stop])
        major = np.repeat(offset[start:stop] if by_row else np.arange(start, stop), np.diff(x.indptr[start : stop + 1]))
        minor = x.indices[piece]
        yield x.data[piece], major + (minor if by_row else offset[minor])
        start = stop
