"""Cells inside a polygon, at the mean of its corners by their weights."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx.pl._common import GREY, group_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_cells", "draw_corners", "point_area", "ring_order"]

# As many corners are ordered by trying all orders; more keep theirs.
_MOST_ORDERED = 8


def point_area(cells: int) -> float:
    """Area of a point in square points: the smaller, the more cells there are."""
    return min(40.0, max(1.0, 40_000 / cells))


def ring_order(share: np.ndarray) -> np.ndarray:
    """The order around the circle in which neighbours are as correlated as possible."""
    count = share.shape[1]
    if not 3 < count <= _MOST_ORDERED:
        return np.arange(count)
    spread = share - share.mean(0)
    norm = np.linalg.norm(spread, axis=0)
    distance = 1 - (spread.T @ spread) / np.where(np.outer(norm, norm) > 0, np.outer(norm, norm), 1)
    orders = [np.array((0, *rest)) for rest in permutations(range(1, count)) if rest[0] < rest[-1]]
    return min(orders, key=lambda order: float(distance[order, np.roll(order, -1)].sum()))


def draw_corners(ax: Axes, corners: np.ndarray, names: list[str], colors: list[Any]) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb

    for i, name in enumerate(names):
        following = (i + 1) % len(names)
        path = 1.04 * np.linspace(corners[i], corners[following], 101)
        shades = np.linspace(to_rgb(colors[i]), to_rgb(colors[following]), 100)
        ax.add_collection(LineCollection(list(np.stack([path[:-1], path[1:]], 1)), colors=shades, linewidths=2))
        x, y = 1.1 * corners[i]
        side = "center" if abs(x) < 0.2 else "left" if x > 0 else "right"
        height = "center" if abs(y) < 0.2 else "bottom" if y > 0 else "top"
        ax.text(x, y, name, color=colors[i], ha=side, va=height, fontweight="bold")
    ax.set_xlim(-1.15, 1.15)
    ax.set_ylim(-1.15, 1.15)
    ax.set_aspect("equal")
    ax.axis("off")


def draw_cells(
    ax: Axes, points: np.ndarray, values: Any, colors: dict[Any, str], name: str, cmap: str, area: float
) -> None:
    style: dict[str, Any] = {"s": area, "linewidths": 0, "rasterized": True}
    if values.dtype.kind in "fiu":
        drawn = ax.scatter(points[:, 0], points[:, 1], c=values.to_numpy(np.float64), cmap=cmap, **style)
        ax.figure.colorbar(drawn, ax=ax, label=name, shrink=0.7, pad=0.12)
        return
    groups = values.astype("category")
    missing = groups.isna().to_numpy()
    if missing.any():
        ax.scatter(points[missing, 0], points[missing, 1], color=GREY, **style)
    for group in groups.cat.categories:
        inside = (groups == group).to_numpy()
        if inside.any():
            ax.scatter(points[inside, 0], points[inside, 1], color=colors[group], label=str(group), **style)
    group_legend(ax, title=name, at=1.12, count=len(groups.cat.categories))
