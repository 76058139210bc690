"""Ligand-receptor interactions of pairs of groups as dots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx.pl._common import finish, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

__all__ = ["ligrec"]

_AREA = 90.0  # of the dot of the smallest p-value, in square points


def ligrec(
    adata: AnnData,
    *,
    source_groups: Sequence[str] | None = None,
    target_groups: Sequence[str] | None = None,
    interactions: Sequence[tuple[str, str]] | None = None,
    n_interactions: int = 20,
    max_qvalue: float = 0.05,
    key: str = "ligrec",
    cmap: str = "viridis",
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes:
    """Plot interactions as dots: a row for each ligand and receptor, a column for each pair of groups.

    Colour is the mean, the area grows with ``-log10(pvalue)``; a ring marks q-values of at most `max_qvalue`. Pairs
    that were not tested, for want of expression, have no dot.

    Parameters
    ----------
    adata
        After `sd.tl.ligrec`.
    source_groups, target_groups
        Sending and receiving groups to show; default all of them.
    interactions
        Pairs of a ligand and a receptor to show, in this order. By default the `n_interactions` with the largest mean
        at a q-value of at most `max_qvalue`.
    n_interactions, max_qvalue
        How many interactions to show, and up to which q-value.
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
        If the results, a group or an interaction are missing.
    ValueError
        If nothing is left to show, or a number is not usable.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> sd.tl.ligrec(adata, "bulk_labels", [("CCL5", "CD2"), ("GZMB", "CD3D")], n_perms=10)
    >>> ax = sd.pl.ligrec(adata, max_qvalue=1, show=False)
    >>> len(ax.get_yticklabels())
    2
    """
    if n_interactions < 1:
        raise ValueError(f"n_interactions={n_interactions!r} must be at least 1")
    if key not in adata.uns or "qvalue" not in adata.uns[key]:
        raise KeyError(f"key={key!r}: `adata.uns` has no such table; run `sd.tl.ligrec` first")
    table: Any = adata.uns[key]
    for name, column, chosen in (
        ("source_groups", "source", source_groups),
        ("target_groups", "target", target_groups),
    ):
        if chosen is not None:
            table = table[table[column].isin(_known(name, chosen, table[column]))]
    rows = _rows(table, interactions, n_interactions, max_qvalue)
    table = table.merge(rows, on=["ligand", "receptor"])
    columns = table[["source", "target"]].astype(str).drop_duplicates().sort_values(["source", "target"])
    x = {pair: i for i, pair in enumerate(columns.itertuples(index=False, name=None))}
    size = (max(4.6, 2.6 + 0.26 * len(x)), 1.8 + 0.22 * len(rows))
    given, ax = ax, new_axes(ax, size)
    at = [x[pair] for pair in zip(table["source"].astype(str), table["target"].astype(str), strict=True)]
    _draw(ax, np.asarray(at), table, max_qvalue, cmap)
    ax.set_xticks(range(len(x)), [f"{source} → {target}" for source, target in x], rotation=90, fontsize="small")
    names = [f"{ligand} – {receptor}" for ligand, receptor in rows[["ligand", "receptor"]].itertuples(index=False)]
    ax.set_yticks(range(len(rows)), names, fontsize="small")
    ax.set_xlim(-0.7, len(x) - 0.3)
    ax.set_ylim(len(rows) - 0.3, -0.7)
    return finish(ax, given, show)


def _known(argument: str, chosen: Sequence[str], column: Any) -> list[str]:
    known = [str(name) for name in column.cat.categories]
    wanted = [str(name) for name in ([chosen] if isinstance(chosen, str) else chosen)]
    missing = [name for name in wanted if name not in known]
    if missing:
        raise KeyError(f"{argument}: {missing} are not groups of the table. Available: {known[:20]}")
    return wanted


def _rows(table: Any, interactions: Sequence[tuple[str, str]] | None, n: int, max_qvalue: float) -> Any:
    """The interactions to show, from the first row to the last, as a data frame."""
    import pandas as pd

    if interactions is None:
        significant = table[table["qvalue"] <= max_qvalue].sort_values("mean", ascending=False, kind="stable")
        rows = significant[["ligand", "receptor"]].astype(str).drop_duplicates().head(n)
        if not len(rows):
            least = (
                f"the smallest is {table['qvalue'].min():.3g}" if len(table) else "no pair of these groups is tested"
            )
            raise ValueError(f"no interaction has a q-value of at most max_qvalue={max_qvalue!r}; {least}")
    else:
        rows = pd.DataFrame([tuple(pair) for pair in interactions], columns=["ligand", "receptor"])
        there = set(zip(table["ligand"].astype(str), table["receptor"].astype(str), strict=True))
        missing = [pair for pair in rows.itertuples(index=False, name=None) if pair not in there]
        if missing or not len(rows):
            raise KeyError(f"interactions {missing} are not in the table for these groups")
    return rows.assign(row=np.arange(len(rows)))


def _draw(ax: Axes, x: np.ndarray, table: Any, max_qvalue: float, cmap: str) -> None:
    from matplotlib.lines import Line2D

    strength = -np.log10(table["pvalue"].to_numpy())
    most = max(float(strength.max()), 1e-6)
    edges = ["black" if q <= max_qvalue else "none" for q in table["qvalue"]]
    dots = ax.scatter(
        x, table["row"], s=_AREA * strength / most + 4, c=table["mean"], cmap=cmap, edgecolors=edges, linewidths=0.9
    )
    ax.figure.colorbar(dots, ax=ax, label="mean expression of both", shrink=0.6)
    marks = []
    for label, value, edge in (
        ("p = 1", 0.0, "none"),
        (f"p = {10**-most:.2g}", most, "none"),
        (f"q ≤ {max_qvalue:g}", most, "black"),
    ):
        mark = Line2D([], [], marker="o", linestyle="", color="0.6", markeredgecolor=edge, label=label)
        mark.set_markersize(np.sqrt(_AREA * value / most + 4))
        marks.append(mark)
    ax.legend(handles=marks, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize="small", frameon=False)
