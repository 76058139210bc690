from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx.pl._common import finish, lookup, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_CELLS, _LEVEL = "#0072B2", "#D55E00"
_KINDS = ("fraction", "genes")


def ambient(
    adata: AnnData,
    *,
    groupby: str | None = None,
    kind: str = "fraction",
    n_genes: int = 20,
    layer: str | None = None,
    key: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes:
    """Plot how much ambient RNA the cells held, or which genes it consisted of.

    Parameters
    ----------
    adata
        After `sd.pp.remove_ambient`.
    groupby
        Column of `adata.obs`: one box of ambient fractions for each of its groups, instead of a histogram of all cells.
    kind
        "fraction" for the ambient fractions of the cells, "genes" for the genes that lost most counts: a bar is the
        share of the gene's counts that was removed, and its label says how many they were.
    n_genes
        How many genes to show.
    layer
        Where the observed counts are, if not in `X`; for the genes.
    key
        What `key_added` was, if it was given.
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
        If there are no ambient fractions, or no such column or layer.
    ValueError
        If `kind` or `n_genes` is not usable.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> sd.pp.remove_ambient(adata, groupby="bulk_labels")
    >>> ax = sd.pl.ambient(adata, kind="genes", n_genes=5, show=False)
    >>> len(ax.get_yticklabels())
    5
    """
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} is unknown. Available: {list(_KINDS)}")
    if n_genes < 1:
        raise ValueError(f"n_genes={n_genes!r} must be at least 1")
    column, corrected = ("ambient_fraction", "decontaminated") if key is None else (f"{key}_fraction", key)
    if column not in adata.obs or corrected not in adata.layers:
        raise KeyError(f"`adata.obs` has no {column!r}: run `sd.pp.remove_ambient` first")
    fraction = adata.obs[column].to_numpy(np.float64)
    if kind == "genes":
        observed: Any = adata.X if layer is None else lookup(adata.layers, layer, "layer", "layers")
        both: tuple[Any, Any] = (observed, adata.layers[corrected])
        before, after = (np.asarray(m.sum(0), np.float64).ravel() for m in both)
        given, ax = ax, new_axes(ax, (5.0, 1.0 + 0.22 * min(n_genes, adata.n_vars)))
        _genes(ax, before, after, np.asarray(adata.var_names), n_genes)
    elif groupby is not None:
        groups = lookup(adata.obs, groupby, "groupby", "obs").astype("category")
        given, ax = ax, new_axes(ax, (6.4, 1.2 + 0.3 * len(groups.cat.categories)))
        _boxes(ax, fraction, groups, groupby)
    else:
        given, ax = ax, new_axes(ax, (6.4, 4.0))
        _histogram(ax, fraction)
    ax.spines[["top", "right"]].set_visible(False)
    return finish(ax, given, show)


def _histogram(ax: Axes, fraction: np.ndarray) -> None:
    # A few cells far out would leave no room for the others.
    top = max(float(np.quantile(fraction, 0.995)), 0.01)
    counts, edges = np.histogram(np.minimum(fraction, top), bins=40, range=(0, top))
    ax.stairs(counts, edges, fill=True, color=_CELLS, alpha=0.6)
    median = float(np.median(fraction))
    ax.axvline(median, color=_LEVEL, linestyle="--", linewidth=1.5, label=f"median {median:.1%}")
    ax.set_xlim(0, top)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("ambient fraction" + (f" (above {top:.2f}: in the last bin)" if fraction.max() > top else ""))
    ax.set_ylabel("cells")
    ax.legend(frameon=False)


def _boxes(ax: Axes, fraction: np.ndarray, groups: Any, name: str) -> None:
    used = [c for c in groups.cat.categories if (groups == c).any()]
    values = [fraction[(groups == c).to_numpy()] for c in used]
    parts = ax.boxplot(values, orientation="horizontal", widths=0.6, patch_artist=True, showfliers=False)
    for box in parts["boxes"]:
        box.set(facecolor=_CELLS, alpha=0.6)
    for line in parts["medians"]:
        line.set(color=_LEVEL, linewidth=1.5)
    ax.set_yticks(range(1, len(used) + 1), [f"{c} ({len(v)})" for c, v in zip(used, values, strict=True)])
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel("ambient fraction")
    ax.set_ylabel(name)


def _genes(ax: Axes, observed: np.ndarray, kept: np.ndarray, names: np.ndarray, n_genes: int) -> None:
    removed = observed - kept
    most = np.argsort(-removed, kind="stable")[:n_genes]
    share = removed[most] / np.maximum(observed[most], 1)
    bars = ax.barh(range(len(most)), share, color=_CELLS, alpha=0.6)
    ax.bar_label(bars, [f"{n:,.0f}" for n in removed[most]], padding=3, fontsize="small")
    ax.set_yticks(range(len(most)), names[most], fontsize="small")
    ax.invert_yaxis()
    ax.set_xlim(0, max(float(share.max(initial=0)) * 1.15, 0.01))
    ax.set_xlabel("share of the gene's counts removed")
    ax.set_title("genes that lost most counts", fontsize="medium")
