from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx.pl._common import finish, group_colors, legend_room, lookup, new_axes, palette
from scdiffx.pl._polygon import draw_cells, draw_corners, point_area, ring_order

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes


def fate_probabilities(
    adata: AnnData,
    *,
    color: str = "priming_degree_fwd",
    normalize: bool = True,
    ax: Axes | None = None,
    show: bool | None = None,
    cmap: str = "viridis",
    size: float | None = None,
) -> Axes:
    """Plot fate probabilities in a circle: the nearer a cell is to a state, the likelier it ends there.

    CellRank's circular projection: the states stand on a circle, and a cell is at the mean of their places, weighted by
    its probabilities. With more than three states, those whose probabilities are correlated are neighbours (with more
    than eight they keep their order). Cells without fates (NaN) are not drawn but counted.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) after ``sd.tl.fate_probabilities``, or after CellRank.
    color
        Column of `adata.obs`: numbers are drawn with `cmap`, others in the colours of
        ``adata.uns[f"{color}_colors"]``, which are added where there are none.
    normalize
        Whether to divide each state's probabilities by their mean first, so that rare states attract cells too.
    ax
        Axes to draw into; by default those of a new figure.
    show
        Whether to show the figure. By default what ``scanpy.settings.autoshow`` says if scanpy is loaded, and no
        otherwise or with `ax`.
    cmap
        Colour map of numbers.
    size
        Area of a point in square points; by default it falls with the number of cells.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    KeyError
        If there are no fate probabilities, or `color` is not in `adata.obs`.
    ValueError
        If there are fewer than three states, or no cell has a fate.

    References
    ----------
    Lange et al. (2022), CellRank for directed single-cell fate mapping; Velten et al. (2017), Human haematopoietic stem
    cell lineage commitment is a continuous process.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> sd.tl.pseudotime(adata, root=0)
    >>> states = ["CD19+ B", "CD14+ Monocyte", "CD56+ NK"]
    >>> sd.tl.fate_probabilities(adata, states, groupby="bulk_labels")
    >>> ax = sd.pl.fate_probabilities(adata, color="bulk_labels", show=False)
    >>> ax.get_legend().get_title().get_text()
    'bulk_labels'
    """
    if "lineages_fwd" not in adata.obsm:
        raise KeyError("'lineages_fwd' is not in `adata.obsm`: run `sd.tl.fate_probabilities` first")
    values = lookup(adata.obs, color, "color", "obs")
    fates: np.ndarray = np.asarray(adata.obsm["lineages_fwd"], np.float64)
    if fates.shape[1] < 3:
        raise ValueError(f"a circle needs at least 3 states, `adata.obsm['lineages_fwd']` has {fates.shape[1]}")
    known = np.isfinite(fates).all(1)
    if not known.any():
        raise ValueError("no cell has a fate: all of `adata.obsm['lineages_fwd']` is NaN")
    names, colors = _states(adata, fates.shape[1])
    share = _normalized(fates[known]) if normalize else fates[known]
    order = ring_order(share)
    angle = np.linspace(0, 2 * np.pi, len(order), endpoint=False)
    corners = np.c_[np.cos(angle), np.sin(angle)]
    shades = {} if values.dtype.kind in "fiu" else group_colors(adata, color)
    axes = new_axes(ax, (6.6 + legend_room(list(shades)), 5.0))
    draw_corners(axes, corners, [names[i] for i in order], [colors[i] for i in order])
    area = point_area(int(known.sum())) if size is None else size
    draw_cells(axes, share[:, order] @ corners, values[known], shades, color, cmap, area)
    if not known.all():
        note = f"{(~known).sum()} cells without a fate are not shown"
        axes.text(0.5, -0.02, note, transform=axes.transAxes, ha="center", va="top", color="#595959")
    return finish(axes, ax, show)


def _states(adata: AnnData, count: int) -> tuple[list[str], list[Any]]:
    """Names and colours of the columns, which are the categories of the terminal states."""
    column = adata.obs.get("term_states_fwd")
    names = [] if column is None or column.dtype.name != "category" else [str(name) for name in column.cat.categories]
    colors = list(adata.uns.get("term_states_fwd_colors", []))
    return (
        names if len(names) == count else [str(i) for i in range(count)],
        colors if len(colors) == count else palette(count),
    )


def _normalized(fates: np.ndarray) -> np.ndarray:
    mean = fates.mean(0)
    scaled = fates / np.where(mean > 0, mean, 1)
    return np.asarray(scaled / scaled.sum(1, keepdims=True))
