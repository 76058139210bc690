"""Genes with the largest attribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx.pl._common import finish, lookup, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

__all__ = ["attribution"]

_UP, _DOWN = "#D55E00", "#0072B2"
_SIGNS = ("both", "positive", "negative")


def attribution(
    adata: AnnData,
    target: str,
    *,
    groups: Sequence[str] | None = None,
    n_genes: int = 10,
    sign: str = "both",
    key: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes:
    """Plot the genes with the largest attribution in each group as bars.

    Parameters
    ----------
    adata
        After `sd.tl.attribution`.
    target
        Its target; with a column, "<target>_<column>".
    groups
        Which groups to show, one block of bars each; default all of them.
    n_genes
        How many genes a group.
    sign
        "both" for the largest absolute values, "positive" or "negative" for the largest or the smallest values.
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
        If there is no such attribution or group.
    ValueError
        If `n_genes` or `sign` is not usable.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> sd.tl.attribution(adata, "S_score")
    >>> ax = sd.pl.attribution(adata, "S_score", n_genes=5, show=False)
    >>> ax.get_xlabel()
    'correlation with S_score'
    """
    if n_genes < 1:
        raise ValueError(f"n_genes={n_genes!r} must be at least 1")
    if sign not in _SIGNS:
        raise ValueError(f"sign={sign!r} is unknown. Available: {list(_SIGNS)}")
    key = f"attribution_{target}".replace("/", "|") if key is None else key
    if key not in adata.varm or key not in adata.uns:
        raise KeyError(f"`adata.varm` has no {key!r}: run `sd.tl.attribution` first")
    table: Any = adata.varm[key]
    known = [str(name) for name in adata.uns[key]["groups"]]
    chosen = known if groups is None else [str(g) for g in ([groups] if isinstance(groups, str) else groups)]
    for name in chosen:
        lookup(dict.fromkeys(known), name, "groups", f"uns[{key!r}]['groups']")
    values = [table[f"{name.replace('/', '|')}_value"].to_numpy(np.float64) for name in chosen]
    blocks = [(value, _top(value, n_genes, sign)) for value in values]
    bars = sum(len(top) for _, top in blocks)
    given, ax = ax, new_axes(ax, (5.2, 1.0 + 0.2 * (bars + 1.6 * len(blocks))))
    _draw(ax, blocks, chosen if known != ["all"] else [""], np.asarray(adata.var_names))
    ax.set_xlabel(f"{adata.uns[key]['params']['method']} with {target}")
    return finish(ax, given, show)


def _top(value: np.ndarray, n: int, sign: str) -> np.ndarray:
    """Positions of the genes to show, from the largest value to the smallest."""
    by = {"both": np.abs(value), "positive": value, "negative": -value}[sign]
    chosen = np.argsort(-by, kind="stable")[:n]
    return np.asarray(chosen[np.argsort(-value[chosen], kind="stable")])


def _draw(ax: Axes, blocks: list[tuple[np.ndarray, np.ndarray]], names: list[str], genes: np.ndarray) -> None:
    places: list[float] = []
    labels: list[str] = []
    row = 0.0
    for (value, top), name in zip(blocks, names, strict=True):
        if name:
            ax.text(0.0, row, name, transform=ax.get_yaxis_transform(), fontweight="bold", va="center")
            row += 1
        at = row + np.arange(len(top))
        ax.barh(at, value[top], color=np.where(value[top] >= 0, _UP, _DOWN), height=0.75)
        places.extend(at)
        labels.extend(genes[top])
        row += len(top) + 0.6
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(places, labels, fontsize="small")
    ax.set_ylim(row - 0.6, -0.8)
    # Small numbers have long labels.
    ax.locator_params(axis="x", nbins=4)
    ax.spines[["top", "right"]].set_visible(False)
