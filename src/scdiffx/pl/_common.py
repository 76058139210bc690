"""What every plot needs: axes, keys, colours of groups and their legend, and whether to show."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

__all__ = ["GREY", "finish", "group_colors", "group_legend", "legend_room", "lookup", "new_axes", "palette"]

GREY = "#bdbdbd"  # of what has no value
# First the palette of Okabe and Ito, told apart with every kind of colour vision, what is clearest on white in front.
# Each one that follows is the colour farthest from all before it (and from white and grey) to the eye that tells them
# apart least: distances in CIELAB, for normal sight and for its three deficiencies as Machado et al. (2009) simulate
# them.
# fmt: off
_COLORS = (
    "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#000000", "#f0e442",
    "#8700f0", "#692d0f", "#4b3c5a", "#a5f078", "#9678ff", "#2d2da5", "#e1004b", "#5af0a5",
    "#690f78", "#b4a54b", "#3c693c", "#963c00", "#d20fb4", "#786978", "#a5c3e1", "#961ed2",
    "#f07887", "#874b87", "#7896f0", "#78d278", "#a5d24b", "#5a961e", "#0f4b2d", "#a5695a",
    "#964bff", "#963c5a", "#b487c3", "#78b496", "#1e782d", "#87f0c3", "#f0d2e1", "#5a2d96",
)
# fmt: on
_LEGEND_ROWS = 20


def lookup(mapping: Any, key: str, argument: str, where: str) -> Any:
    """The entry, or a KeyError that names the argument, what came and what there is."""
    if key not in mapping:
        keys = [str(k) for k in mapping]
        shown = ", ".join(repr(k) for k in keys[:20]) + (", ..." if len(keys) > 20 else "")
        raise KeyError(f"{argument}={key!r} is not in `adata.{where}`. Available: [{shown}]")
    return mapping[key]


def new_axes(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    """The axes given, or those of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=figsize, layout="constrained")[1]


def finish(ax: Axes, given: Axes | None, show: bool | None) -> Axes:
    """Show the figure if asked to; by default as scanpy's settings say, and never for axes of the caller."""
    if show is None:
        scanpy = sys.modules.get("scanpy")
        show = given is None and bool(getattr(getattr(scanpy, "settings", None), "autoshow", False))
    if show:
        import matplotlib.pyplot as plt

        plt.show()
    return ax


def palette(count: int) -> list[str]:
    """Colours of so many groups: those above for up to 40, beyond that scanpy's, which no eye tells apart for sure."""
    if count <= len(_COLORS):
        return list(_COLORS[:count])
    from scanpy.plotting import palettes

    return [str(color) for color in palettes.default_102[:count]] if count <= 102 else [GREY] * count


def group_colors(adata: AnnData, key: str) -> dict[Any, str]:
    """A colour for each category of a column of obs: those saved in `uns`, or else new ones, which are saved.

    scanpy's rule and its place, ``uns[f"{key}_colors"]``: colours are used if there are enough of them and Matplotlib
    knows them all. They are not saved for a column that is not categorical, nor in a view, which would become a copy.
    """
    from matplotlib.colors import is_color_like, to_hex

    column, name = adata.obs[key], f"{key}_colors"
    groups = list(column.astype("category").cat.categories)
    saved = adata.uns.get(name)
    is_categorical = column.dtype.name == "category"
    if is_categorical and saved is not None and len(saved) >= len(groups) and all(map(is_color_like, saved)):
        return {group: to_hex(color) for group, color in zip(groups, saved, strict=False)}
    colors = palette(len(groups))
    if is_categorical and not adata.is_view:
        adata.uns[name] = colors
    return dict(zip(groups, colors, strict=True))


def legend_room(names: Sequence[Any]) -> float:
    """Inches that a legend of these names needs beside the axes, beyond those of a short one."""
    return max(0.0, _legend_columns(len(names)) * (0.45 + 0.075 * max((len(str(n)) for n in names), default=0)) - 0.7)


def group_legend(ax: Axes, *, title: str, at: float = 1.02, handles: Any = None, count: int) -> None:
    """The legend of groups at the right of the axes: columns of 20, with dots that can be seen."""
    from matplotlib.collections import PathCollection

    style: dict[str, Any] = {} if handles is None else {"handles": handles}
    legend = ax.legend(
        loc="center left",
        bbox_to_anchor=(at, 0.5),
        frameon=False,
        title=title,
        ncols=_legend_columns(count),
        fontsize="small" if count > _LEGEND_ROWS else None,
        **style,
    )
    if ax.get_aspect() != "auto":
        # The room that an equal aspect leaves is on the side of the legend.
        ax.set_anchor("W")
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([40])


def _legend_columns(count: int) -> int:
    return max(1, -(-count // _LEGEND_ROWS))
