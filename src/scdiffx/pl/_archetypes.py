from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scdiffx.pl._common import finish, group_colors, legend_room, lookup, new_axes, palette
from scdiffx.pl._polygon import draw_cells, draw_corners, point_area, ring_order

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes


def archetypes(
    adata: AnnData,
    *,
    color: str | None = None,
    key: str = "archetypes",
    ax: Axes | None = None,
    show: bool | None = None,
    cmap: str = "viridis",
    size: float | None = None,
) -> Axes:
    """Plot cells as mixtures of archetypes, in a polygon whose corners are the archetypes.

    A cell is at the mean of the corners, weighted by its weights. Of three archetypes a triangle shows the weights
    exactly; with more, different mixtures can share a place, and archetypes whose weights are correlated are neighbours
    (with more than eight they keep their order).

    Parameters
    ----------
    adata
        Annotated data (cells x genes) after ``sd.tl.archetypes``.
    color
        Column of `adata.obs`: numbers are drawn with `cmap`, others in the colours of
        ``adata.uns[f"{color}_colors"]``, which are added where there are none. By default cells have the
        colours of the corners, mixed by their weights.
    key
        The `key_added` of ``sd.tl.archetypes``.
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
        If there are no archetypes under `key`, or `color` is not in `adata.obs`.
    ValueError
        If there are fewer than three archetypes.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> sd.tl.archetypes(adata, n_archetypes=3, n_init=1, n_bootstrap=0)
    >>> ax = sd.pl.archetypes(adata, show=False)
    >>> [text.get_text() for text in ax.texts]
    ['0', '1', '2']
    """
    from matplotlib.colors import to_rgb

    where = "archetype_weights" if key == "archetypes" else f"{key}_weights"
    if where not in adata.obsm:
        raise KeyError(f"key={key!r}: {where!r} is not in `adata.obsm`; run `sd.tl.archetypes` first")
    weights: np.ndarray = np.asarray(adata.obsm[where], np.float64)
    count = weights.shape[1]
    if count < 3:
        raise ValueError(f"a polygon needs at least 3 archetypes, `adata.obsm[{where!r}]` has {count}")
    values = None if color is None else lookup(adata.obs, color, "color", "obs")
    order = ring_order(weights)
    # The first corner is at the top.
    angle = np.pi / 2 - 2 * np.pi * np.arange(count) / count
    corners = np.c_[np.cos(angle), np.sin(angle)]
    of_corner = palette(count)
    shades = [of_corner[i] for i in order]
    of_group = {} if values is None or values.dtype.kind in "fiu" else group_colors(adata, str(color))
    axes = new_axes(ax, (6.6 + legend_room(list(of_group)), 5.0))
    draw_corners(axes, corners, [str(i) for i in order], shades)
    axes.set_ylim(corners[:, 1].min() - 0.15, corners[:, 1].max() + 0.15)
    points = weights[:, order] @ corners
    area = point_area(len(weights)) if size is None else size
    if values is None or color is None:
        mixed = np.clip(weights[:, order] @ np.array([to_rgb(shade) for shade in shades]), 0, 1)
        axes.scatter(points[:, 0], points[:, 1], s=area, c=mixed, linewidths=0, rasterized=True)
    else:
        draw_cells(axes, points, values, of_group, color, cmap, area)
    return finish(axes, ax, show)
