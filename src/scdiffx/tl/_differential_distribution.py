"""Genes whose whole distribution differs between groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._slots import Obs, Slot, Uns, Varm, X, available
from scdiffx._steps import Plan, Step, Write, apply

if TYPE_CHECKING:
    from anndata import AnnData

_KEY = "differential_distribution"


@public
def differential_distribution(
    adata: AnnData | Plan,
    groupby: str,
    *,
    groups: Sequence[str] | None = None,
    reference: str = "rest",
    alpha: float = 0.05,
    temperature: float | None = None,
    layer: str | None = None,
    key_added: str = _KEY,
    copy: bool = False,
) -> AnnData | None:
    """Compare the distribution of each gene between groups of cells, not only its mean.

    The two-sample Kolmogorov-Smirnov test, and for genes that differ the kind of difference.

    Parameters
    ----------
    adata
        Annotated data (cells x genes), normalised and on a logarithmic scale, or a plan.
    groupby
        Categorical or string column of `obs`.
    groups
        Which groups to test; default all of them.
    reference
        Group to compare with, or "rest" for all other labelled cells.
    alpha
        Level of the q-values below which a gene differs, between 0 and 1.
    temperature
        None for the exact statistic. A number (0.1, say) makes it differentiable in the expression: the width of each
        value's step, in standard deviations of the gene. P-values need the exact statistic, and are left out then.
    layer
        Layer to test rather than `X`.
    key_added
        Key of `uns` and `varm`.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.varm["differential_distribution" | key_added]` : float32 (genes, groups)
        KS statistic in [0, 1] of each tested group.
    `adata.uns["differential_distribution" | key_added]` : dict
        `params`; `groups`, the names of the columns above; `table`, a data frame sorted by p-value within each group
        with `group`, `reference`, `gene`, `statistic`, `pvalue` (two-sided, asymptotic as in `scipy.stats.ks_2samp`),
        `qvalue` (Benjamini-Hochberg over the genes of the group), `mean_group`, `mean_reference`, `location_qvalue`,
        `spread_qvalue` and `pattern`.

    Raises
    ------
    KeyError
        If `groupby`, a group or the reference does not exist.
    ValueError
        If a group or its reference has fewer than two cells, there are fewer than two groups, or a number is out of
        range.

    Notes
    -----
    The pattern follows from two more tests, each with q-values over the genes of the group: Welch's t-test of the
    means, and Welch's t-test of the absolute deviations from the group's mean (Levene). A gene whose KS q-value is
    below `alpha` is a "shift" if only the first is below `alpha`, a "scale" if only the second is, "both" if both are,
    and "none" otherwise; so are all genes whose KS q-value is not below `alpha`. On counts, with their many ties, the
    KS p-value is conservative: too large rather than too small. Cells are the unit of all tests: with several donors,
    a significant gene may differ between donors only.

    References
    ----------
    Korthauer et al. (2016), A statistical approach for identifying differential distributions in single-cell RNA-seq
    experiments (the patterns; the test is not theirs). Hodges (1958), The significance probability of the Smirnov
    two-sample test.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> sd.tl.differential_distribution(adata, "bulk_labels", groups=["CD19+ B"])
    >>> table = adata.uns["differential_distribution"]["table"]
    >>> table["gene"].iloc[0]
    'CD79A'
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha!r} must lie between 0 and 1")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be None or greater than 0")
    names, sizes = _groups(data, groupby)
    tested = names if groups is None else [str(g) for g in ([groups] if isinstance(groups, str) else groups)]
    for name in [*tested, *([] if reference == "rest" else [reference])]:
        if name not in names:
            raise KeyError(f"{name!r} is not a group of `adata.obs[{groupby!r}]`. Available: {available(names)}")
    tested = [name for name in tested if name != reference]
    second = -1 if reference == "rest" else names.index(reference)
    pairs = tuple((names.index(name), second) for name in tested)
    for first, _ in pairs:
        others = sum(sizes) - sizes[first] if second < 0 else sizes[second]
        if min(sizes[first], others) < 2:
            raise ValueError(f"group {names[first]!r} against {reference!r}: both sides need at least two cells")
    if not pairs:
        raise ValueError(f"groups={groups!r} and reference={reference!r} leave nothing to compare")
    params = {"groupby": groupby, "reference": reference, "alpha": alpha}

    def notes(op: ops.DifferentialDistribution, result: Any, args: Any) -> Mapping[Slot, Any]:
        entry: dict[str, Any] = {"params": params, "groups": np.asarray(tested, dtype=object)}
        if temperature is None:
            counts = [(sizes[a], sum(sizes) - sizes[a] if b < 0 else sizes[b]) for a, b in pairs]
            entry["table"] = _table(result, counts, tested, reference, list(data.var_names), alpha)
        return {Uns(key_added): entry}

    step = Step(
        "differential_distribution",
        ops.DifferentialDistribution(pairs=pairs, temperature=temperature),
        reads=(X(layer), Obs(groupby, codes=True)),
        writes=(Write(Varm(key_added), lambda op, result: result.statistic.T, np.float32),),
        message="comparing distributions",
        notes=notes,
    )
    return apply(adata, step, copy=copy)


def _groups(data: AnnData, groupby: str) -> tuple[list[str], list[int]]:
    if groupby not in data.obs:
        raise KeyError(f"groupby={groupby!r} is not in `adata.obs`. Available: {available(data.obs)}")
    labels = data.obs[groupby].astype("category").cat
    names = [str(name) for name in labels.categories]
    sizes = np.bincount(labels.codes.to_numpy()[labels.codes.to_numpy() >= 0], minlength=len(names))
    if (sizes > 0).sum() < 2:
        raise ValueError(f"groupby={groupby!r} has {(sizes > 0).sum()} group(s) with cells; two are needed")
    return names, [int(size) for size in sizes]


def _table(
    result: Any, counts: list[tuple[int, int]], tested: list[str], reference: str, genes: list[str], alpha: float
) -> Any:
    import pandas as pd
    from scipy import stats

    frames = []
    for i, (name, (n, m)) in enumerate(zip(tested, counts, strict=True)):
        statistic, mean, spread, variance = (np.asarray(part[i], np.float64) for part in result)
        # The asymptotic p-value of scipy.stats.ks_2samp.
        pvalue = np.clip(stats.kstwo.sf(statistic, np.round(n * m / (n + m))), 0, 1)
        location = _welch(mean, variance, n, m)
        deviation = _welch(spread, np.maximum(variance - spread**2, 0), n, m)
        q, q_location, q_spread = (stats.false_discovery_control(p) for p in (pvalue, location, deviation))
        code = np.where(q < alpha, (q_location < alpha) + 2 * (q_spread < alpha), 0)
        frame = pd.DataFrame(
            {
                "group": name,
                "reference": reference,
                "gene": genes,
                "statistic": statistic,
                "pvalue": pvalue,
                "qvalue": q,
                "mean_group": mean[:, 0],
                "mean_reference": mean[:, 1],
                "location_qvalue": q_location,
                "spread_qvalue": q_spread,
                "pattern": np.array(["none", "shift", "scale", "both"])[code],
            }
        )
        frames.append(frame.iloc[np.lexsort((-statistic, pvalue))])
    table = pd.concat(frames, ignore_index=True)
    for column in ("group", "reference", "gene", "pattern"):
        table[column] = pd.Categorical(table[column])
    table.index = table.index.astype(str)
    return table


def _welch(mean: np.ndarray, variance: np.ndarray, n: int, m: int) -> np.ndarray:
    """Two-sided p-values of Welch's t-test from means and variances (divisor n) of both sides."""
    from scipy import stats

    a, b = variance[:, 0] / (n - 1), variance[:, 1] / (m - 1)
    error = a + b
    varies = error > 0
    safe = np.where(varies, error, 1)
    freedom = safe**2 / np.where(varies, a**2 / (n - 1) + b**2 / (m - 1), 1)
    t = (mean[:, 0] - mean[:, 1]) / np.sqrt(safe)
    return np.where(varies, 2 * stats.t.sf(np.abs(t), np.maximum(freedom, 1)), 1.0)
