"""What every plot needs: axes, keys, and whether to show."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

__all__ = ["GREY", "finish", "lookup", "new_axes", "saved_colors"]

GREY = "#bdbdbd"  # of what has no value


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


def saved_colors(adata: AnnData, groupby: str) -> dict[Any, Any]:
    """The colours that scanpy saved, by group; nothing where there are too few of them."""
    column, colors = adata.obs[groupby], adata.uns.get(f"{groupby}_colors")
    if colors is None or column.dtype.name != "category" or len(colors) < len(column.cat.categories):
        return {}
    return dict(zip(column.cat.categories, colors, strict=False))
