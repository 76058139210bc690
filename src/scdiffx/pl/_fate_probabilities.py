from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx.pl._common import finish, lookup, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_GREY = "#bdbdbd"
# As many states are ordered by trying all orders; more keep theirs.
_MOST_ORDERED = 8


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
        ``adata.uns[f"{color}_colors"]``, where these exist.
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
    order = _order(share)
    angle = np.linspace(0, 2 * np.pi, len(order), endpoint=False)
    corners = np.c_[np.cos(angle), np.sin(angle)]
    axes = new_axes(ax, (6.0, 5.0))
    _draw_corners(axes, corners, [names[i] for i in order], [colors[i] for i in order])
    area = min(40.0, max(1.0, 40_000 / known.sum())) if size is None else size
    _draw_cells(axes, share[:, order] @ corners, values[known], _saved(adata, color), color, cmap, area)
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
        colors if len(colors) == count else [f"C{i}" for i in range(count)],
    )


def _normalized(fates: np.ndarray) -> np.ndarray:
    mean = fates.mean(0)
    scaled = fates / np.where(mean > 0, mean, 1)
    return np.asarray(scaled / scaled.sum(1, keepdims=True))


def _order(share: np.ndarray) -> np.ndarray:
    """The order around the circle in which neighbours are as correlated as possible."""
    count = share.shape[1]
    if not 3 < count <= _MOST_ORDERED:
        return np.arange(count)
    spread = share - share.mean(0)
    norm = np.linalg.norm(spread, axis=0)
    distance = 1 - (spread.T @ spread) / np.where(np.outer(norm, norm) > 0, np.outer(norm, norm), 1)
    orders = [np.array((0, *rest)) for rest in permutations(range(1, count)) if rest[0] < rest[-1]]
    return min(orders, key=lambda order: float(distance[order, np.roll(order, -1)].sum()))


def _draw_corners(ax: Axes, corners: np.ndarray, names: list[str], colors: list[Any]) -> None:
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


def _draw_cells(
    ax: Axes, points: np.ndarray, values: Any, saved: dict[Any, Any], name: str, cmap: str, area: float
) -> None:
    style: dict[str, Any] = {"s": area, "linewidths": 0, "rasterized": True}
    if values.dtype.kind in "fiu":
        drawn = ax.scatter(points[:, 0], points[:, 1], c=values.to_numpy(np.float64), cmap=cmap, **style)
        ax.figure.colorbar(drawn, ax=ax, label=name, shrink=0.7, pad=0.12)
        return
    groups = values.astype("category")
    missing = groups.isna().to_numpy()
    if missing.any():
        ax.scatter(points[missing, 0], points[missing, 1], color=_GREY, **style)
    for i, group in enumerate(groups.cat.categories):
        inside = (groups == group).to_numpy()
        if inside.any():
            shade = saved.get(group, f"C{i % 10}")
            ax.scatter(points[inside, 0], points[inside, 1], color=shade, label=str(group), **style)
    ax.legend(loc="center left", bbox_to_anchor=(1.12, 0.5), frameon=False, title=name)


def _saved(adata: AnnData, column: str) -> dict[Any, Any]:
    colors, values = adata.uns.get(f"{column}_colors"), adata.obs[column]
    if colors is None or values.dtype.name != "category" or len(colors) < len(values.cat.categories):
        return {}
    return dict(zip(values.cat.categories, colors, strict=False))
