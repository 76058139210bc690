"""Expression along pseudotime of genes that switch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx.pl._common import finish, lookup, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

__all__ = ["switch_genes"]


def switch_genes(
    adata: AnnData,
    genes: Sequence[str] | None = None,
    *,
    n_genes: int = 40,
    max_qval: float = 0.05,
    n_bins: int = 60,
    layer: str | None = None,
    key: str = "switch",
    cmap: str = "viridis",
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes:
    """Plot a heatmap of switching genes along pseudotime, ordered by when they switch.

    Rows are genes, those that switch on above those that switch off, each from the earliest to the latest; columns are
    bins of pseudotime with equally many cells. A row shows the mean of each bin between the gene's lowest bin (0) and
    its highest (1); a tick marks the switch time.

    Parameters
    ----------
    adata
        After `sd.tl.switch_de`.
    genes
        Names of the genes to show. By default the `n_genes` with the smallest p-values among those with q-values of at
        most `max_qval`; of equal p-values, the steeper.
    n_genes, max_qval
        How many genes to show, and up to which q-value.
    n_bins
        Number of bins; fewer where pseudotime has fewer distinct values.
    layer
        Layer to show rather than `X`.
    key
        What `key_added` was.
    cmap
        Matplotlib's name of the colours.
    ax
        Axes to draw into; by default those of a new figure.
    show
        Whether to show the figure. By default what ``scanpy.settings.autoshow`` says if scanpy is loaded, and no
        otherwise or with `ax`.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    KeyError
        If the results, the pseudotime, a gene or the layer are missing.
    ValueError
        If no gene is left to show, or a number is not usable.

    Examples
    --------
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> sd.pp.normalize_total(adata)
    >>> sd.pp.log1p(adata)
    >>> adata.obs["time"] = np.linspace(0, 1, 150)  # in place of a pseudotime
    >>> sd.tl.switch_de(adata, "time", n_permutations=3)
    >>> ax = sd.pl.switch_genes(adata, ["HES4", "CD52"], show=False)
    >>> ax.get_xlabel()
    'time'
    """
    if n_genes < 1:
        raise ValueError(f"n_genes={n_genes!r} must be at least 1")
    if n_bins < 2:
        raise ValueError(f"n_bins={n_bins!r} must be at least 2")
    if key not in adata.uns or f"{key}_time" not in adata.var:
        raise KeyError(f"key={key!r}: `adata.var` has no {key + '_time'!r}; run `sd.tl.switch_de` first")
    name = str(adata.uns[key]["params"]["pseudotime"])
    time = lookup(adata.obs, name, "pseudotime", "obs").to_numpy(np.float64)
    matrix: Any = adata.X if layer is None else lookup(adata.layers, layer, "layer", "layers")
    chosen = _chosen(adata, genes, n_genes, max_qval, key)
    edges, means = _binned(matrix[:, chosen], time, n_bins)
    given, ax = ax, new_axes(ax, (5.6, 1.1 + 0.19 * len(chosen)))
    _draw(ax, means, edges, adata.var[f"{key}_time"].to_numpy()[chosen], cmap)
    ax.set_yticks(range(len(chosen)), adata.var_names[chosen], fontsize="small")
    ax.set_xlabel(name)
    return finish(ax, given, show)


def _chosen(adata: AnnData, genes: Sequence[str] | None, n_genes: int, max_qval: float, key: str) -> np.ndarray:
    """Positions of the genes, in the order of the rows."""
    strength = adata.var[f"{key}_strength"].to_numpy(np.float64)
    if genes is None:
        p, q = (adata.var[f"{key}_{part}"].to_numpy() for part in ("pval", "qval"))
        chosen = np.flatnonzero((q <= max_qval) & (strength != 0))
        if not len(chosen):
            raise ValueError(f"no gene has a q-value of at most max_qval={max_qval!r}; the smallest is {q.min():.3g}")
        chosen = chosen[np.lexsort((-np.abs(strength[chosen]), p[chosen]))[:n_genes]]
    else:
        names = [genes] if isinstance(genes, str) else [str(gene) for gene in genes]
        missing = [gene for gene in names if gene not in adata.var_names]
        if missing or not names:
            raise KeyError(f"genes {missing} are not in `adata.var_names`")
        chosen = adata.var_names.get_indexer_for(names)
    time = adata.var[f"{key}_time"].to_numpy()[chosen]
    return np.asarray(chosen[np.lexsort((time, strength[chosen] < 0))])


def _binned(part: Any, time: np.ndarray, n_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges of bins with equally many cells, and the mean of each gene in each bin between 0 and 1 (genes, bins)."""
    there = np.isfinite(time)
    values = np.asarray(part.toarray() if hasattr(part, "toarray") else part, np.float64)[there]
    time = time[there]
    distinct = np.unique(time)
    if len(distinct) <= n_bins:
        middle = (distinct[1:] + distinct[:-1]) / 2
        edges = np.concatenate([distinct[:1], middle, distinct[-1:]])
    else:
        edges = np.unique(np.quantile(time, np.linspace(0, 1, n_bins + 1)))
    of = np.clip(np.searchsorted(edges, time, side="right") - 1, 0, len(edges) - 2)
    sums = np.zeros((len(edges) - 1, values.shape[1]))
    np.add.at(sums, of, values)
    means = sums / np.maximum(np.bincount(of, minlength=len(sums)), 1)[:, None]
    low, span = means.min(0), np.ptp(means, axis=0)
    return edges, ((means - low) / np.where(span > 0, span, 1)).T


def _draw(ax: Axes, means: np.ndarray, edges: np.ndarray, switch: np.ndarray, cmap: str) -> None:
    rows = np.arange(len(means))
    drawn = ax.pcolormesh(edges, np.arange(len(means) + 1) - 0.5, means, cmap=cmap, vmin=0, vmax=1, rasterized=True)
    ax.scatter(switch, rows, marker="|", s=60, color="white", linewidths=2.2)
    ax.scatter(switch, rows, marker="|", s=60, color="#D55E00", linewidths=1.2)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylim(len(means) - 0.5, -0.5)
    ax.figure.colorbar(drawn, ax=ax, label="expression, lowest to highest", shrink=0.6)
