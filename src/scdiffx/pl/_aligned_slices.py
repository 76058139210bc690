from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx.pl._common import GREY, finish, group_colors, group_legend, legend_room, lookup, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes


def aligned_slices(
    adata: AnnData,
    *,
    color: str | None = None,
    key: str = "align_slices",
    size: float | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes:
    """Plot slices on top of each other in their common coordinates.

    Parameters
    ----------
    adata
        After `sd.tl.align_slices`.
    color
        Column of `adata.obs` that says the colour of a spot: numbers, or groups in the colours of
        ``adata.uns[f"{color}_colors"]``, which are added where there are none. By default the slice.
    key
        What `key_added` was, if it was given.
    size
        Area of a spot in square points; by default smaller the more spots there are.
    ax
        Axes to draw into; by default those of a new figure.
    show
        Whether to show the figure. By default what ``scanpy.settings.autoshow`` says if scanpy is loaded, and no
        otherwise or with `ax`.

    Returns
    -------
    matplotlib.axes.Axes
        Of the first two coordinates. Each slice has a marker of its own; spots without a colour are grey.

    Raises
    ------
    KeyError
        If slices were not aligned, or there is no such column.

    Examples
    --------
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> adata.obsm["spatial"] = np.random.default_rng(0).uniform(size=(150, 2))  # in place of a tissue
    >>> adata.obs["slice"] = np.where(np.arange(150) % 3 == 0, "first", "second")
    >>> sd.tl.align_slices(adata, "slice", epsilon=0.05)
    >>> ax = sd.pl.aligned_slices(adata, show=False)
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['first', 'second']
    """
    if key not in adata.uns:
        raise KeyError(f"key={key!r} is not in `adata.uns`: run `sd.tl.align_slices` first")
    where = "spatial_aligned" if key == "align_slices" else f"{key}_aligned"
    points = np.asarray(lookup(adata.obsm, where, "key", "obsm"))
    batch_key = str(adata.uns[key]["params"]["batch_key"])
    of_slice = lookup(adata.obs, batch_key, "batch_key", "obs").astype(str).to_numpy()
    names = [str(name) for name in adata.uns[key]["slices"]]
    column = batch_key if color is None else color
    values = lookup(adata.obs, column, "color", "obs")
    is_number = values.dtype.kind in "fiu" and column != batch_key
    table = {} if is_number else group_colors(adata, column)
    axes = new_axes(ax, (6.4 + legend_room([] if is_number else [*names, *table]), 4.8))
    area = min(60.0, max(2.0, 20_000 / max(adata.n_obs, 1))) if size is None else size
    colors = values.to_numpy(np.float64) if is_number else _by_group(values, table)
    limits: dict[str, Any] = {"vmin": np.nanmin(colors), "vmax": np.nanmax(colors)} if is_number else {}
    drawn = None
    for k, name in enumerate(names):
        here = of_slice == name
        # Later slices as rings around the spots below: where slices agree, all of them can be seen.
        style: dict[str, Any] = {"s": area * (1 + 1.2 * k / len(names)), "marker": _marker(k)}
        if not is_number:
            axes.scatter(points[here, 0], points[here, 1], facecolors="none", edgecolors=list(colors[here]), **style)
            continue
        known, unknown = here & np.isfinite(colors), here & ~np.isfinite(colors)
        axes.scatter(points[unknown, 0], points[unknown, 1], color=GREY, linewidths=0, **style)
        style |= {"alpha": 0.7, "linewidths": 0, **limits}
        drawn = axes.scatter(points[known, 0], points[known, 1], c=colors[known], **style)
    axes.set_aspect("equal")
    axes.set_xlabel(f"{where} 1")
    axes.set_ylabel(f"{where} 2")
    if drawn is not None:
        axes.figure.colorbar(drawn, ax=axes, label=column, shrink=0.7)
    _legend(axes, table, column, names, batch_key)
    return finish(axes, ax, show)


def _marker(k: int) -> str:
    return "osD^v<>ph8"[k % 10]


def _by_group(values: Any, table: dict[Any, str]) -> np.ndarray:
    """A colour for each spot, by its group."""
    return np.array([table.get(group, GREY) for group in values.astype("category").astype(object)], object)


def _legend(axes: Axes, table: dict[Any, str], column: str, names: list[str], batch_key: str) -> None:
    """What the markers mean, and beside them the colours where these are of groups."""
    from matplotlib.lines import Line2D

    style: dict[str, Any] = {"linestyle": "none", "markerfacecolor": "none"}
    of_slice = column == batch_key
    shades = {str(group): shade for group, shade in table.items()} if of_slice else {}
    handles = [
        Line2D([], [], marker=_marker(k), color=shades.get(name, "black"), label=name, **style)
        for k, name in enumerate(names)
    ]
    if not table:
        # The colour bar stands at the right.
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.15), ncols=4, frameon=False)
        return
    if not of_slice:
        dots: dict[str, Any] = {"marker": "o", "linestyle": "none"}
        handles += [Line2D([], [], color=shade, label=str(group), **dots) for group, shade in table.items()]
    group_legend(axes, title=column, handles=handles, count=len(handles))
