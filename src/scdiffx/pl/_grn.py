from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from scdiffx.pl._common import finish, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_WIDTH = 2.5
_COLORS = {1: "#0072B2", -1: "#D55E00"}


def grn(
    adata: AnnData,
    *,
    tfs: Sequence[str] | None = None,
    n_edges: int = 50,
    key: str = "grn",
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes:
    """Plot the strongest edges of a regulatory network: transcription factors as squares, their targets as names.

    Arrows that activate are blue, those that repress vermilion with a bar for a head, and as wide as their weight.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) after ``sd.tl.grn``.
    tfs
        Draw edges of these factors only.
    n_edges
        So many edges of largest absolute weight are drawn.
    key
        The `key_added` of ``sd.tl.grn``.
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
        If there is no network under `key`, or a factor has no edge in it.
    ValueError
        If `n_edges` is below 1.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> sd.tl.grn(adata, ["SPI1", "IRF8"])
    >>> ax = sd.pl.grn(adata, n_edges=10, show=False)
    >>> len(ax.patches)
    10
    """
    import igraph
    from matplotlib.lines import Line2D
    from matplotlib.patches import FancyArrowPatch

    if key not in adata.uns:
        raise KeyError(f"key={key!r} is not in `adata.uns`; run `sd.tl.grn` first")
    if n_edges < 1:
        raise ValueError(f"n_edges={n_edges!r} must be at least 1")
    table = adata.uns[key].astype({"tf": str, "target": str})
    if tfs is not None:
        known = set(table["tf"])
        if missing := [name for name in tfs if name not in known]:
            raise KeyError(f"tfs: {missing[0]!r} has no edge in `adata.uns[{key!r}]`. Available: {sorted(known)[:20]}")
        table = table[table["tf"].isin(list(tfs))]
    table = table[:n_edges]
    regulators = set(table["tf"])
    names = list(dict.fromkeys([*table["tf"], *table["target"]]))
    number = {name: i for i, name in enumerate(names)}
    edges = [(number[a], number[b]) for a, b in zip(table["tf"], table["target"], strict=True)]
    # From a circle this layout draws nothing at random.
    places = np.array(igraph.Graph(len(names), edges).layout_kamada_kawai().coords).reshape(-1, 2)

    axes = new_axes(ax, (7.0, 7.0))
    widths = _WIDTH * table["weight"].abs() / table["weight"].abs().max()
    for (start, end), width, sign in zip(edges, widths, table["sign"], strict=True):
        head = "-|>" if sign > 0 else "|-|,widthA=0,widthB=0.5"
        arrow = FancyArrowPatch(
            places[start], places[end], shrinkA=9, shrinkB=12, lw=max(width, 0.3), color=_COLORS[sign], alpha=0.7,
            arrowstyle=head, connectionstyle="arc3,rad=0.08", mutation_scale=9,
        )  # fmt: skip
        axes.add_patch(arrow)
    for name, (x, y) in zip(names, places, strict=True):
        box = {"boxstyle": "square,pad=0.3", "fc": "0.9", "ec": "0.3"} if name in regulators else None
        weight = "bold" if name in regulators else "normal"
        axes.text(x, y, name, ha="center", va="center", fontsize=8, fontweight=weight, bbox=box, zorder=3)
    axes.update_datalim(places)
    axes.margins(0.1)
    axes.autoscale_view()
    axes.set_axis_off()
    present = [sign for sign in (1, -1) if (table["sign"] == sign).any()]
    lines = [Line2D([], [], color=_COLORS[sign], label="activates" if sign > 0 else "represses") for sign in present]
    axes.legend(handles=lines, frameon=False, loc="upper right")
    return finish(axes, ax, show)
