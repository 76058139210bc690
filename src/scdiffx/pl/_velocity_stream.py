from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial import cKDTree

from scdiffx.pl._common import GREY, finish, group_colors, lookup, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_BASES = ("umap", "tsne", "pca")
_POINTS = 50


def velocity_stream(
    adata: AnnData,
    *,
    basis: str | None = None,
    vkey: str = "velocity",
    color: str | None = None,
    density: float = 1.0,
    smooth: float = 0.5,
    cutoff: float = 5.0,
    ax: Axes | None = None,
    show: bool | None = None,
    cmap: str = "viridis",
    size: float | None = None,
) -> Axes:
    """Plot velocities as streamlines over an embedding.

    The velocities of the cells are averaged over a grid; lines follow them, thicker where they are longer, and end
    where there are few cells.

    Parameters
    ----------
    adata
        Annotated data after `sd.tl.velocity_embedding`.
    basis
        Name of the embedding without ``"X_"``; by default the first of "umap", "tsne" and "pca" that has velocities.
    vkey
        Name of the velocities.
    color
        Column of `adata.obs` with groups, drawn in the colours of ``adata.uns[f"{color}_colors"]``, which are added
        where there are none, and named at their middle, or with numbers.
    density
        How close lines are to each other.
    smooth
        Width of the average over the grid, in grid steps.
    cutoff
        Percentage of the grid, where velocities are shortest, that has no lines.
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
        If the embedding or its velocities, or `color`, do not exist.
    ValueError
        If the embedding has one dimension, no cell has a velocity, or a number is not usable.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> sd.pp.split_counts(adata, {"spliced": 0.75, "unspliced": 0.25})  # in place of measured layers
    >>> sd.pp.pca(adata, n_comps=9)
    >>> sd.pp.neighbors(adata, n_neighbors=9)
    >>> sd.tl.velocity(adata, mode="deterministic", min_r2=-1)
    >>> sd.tl.velocity_graph(adata)
    >>> sd.tl.velocity_embedding(adata, basis="pca")
    >>> ax = sd.pl.velocity_stream(adata, color="bulk_labels", show=False)
    >>> ax.get_xlabel()
    'PC1'
    """
    for name, value in (("density", density), ("smooth", smooth)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r} must be greater than 0")
    if not 0 <= cutoff < 100:
        raise ValueError(f"cutoff={cutoff!r} must be at least 0 and less than 100")
    points, velocity, name = _field(adata, basis, vkey)
    known = np.isfinite(velocity).all(1) & np.isfinite(points).all(1)
    if not velocity[known].any():
        raise ValueError(f"`adata.obsm[{f'{vkey}_{name}'!r}]` has no velocity that is not 0")
    column = None if color is None else lookup(adata.obs, color, "color", "obs")
    axes = new_axes(ax, (5.6, 4.6))
    area = min(60.0, max(2.0, 60_000 / len(points))) if size is None else size
    _draw_cells(axes, adata, points, column, color, cmap, area)
    x, y, field = _on_grid(points[known], velocity[known], density, smooth, cutoff)
    length = np.sqrt((field**2).sum(0))
    axes.streamplot(
        x,
        y,
        field[0],
        field[1],
        density=2 * density,
        color="#252525",
        linewidth=0.4 + 1.2 * np.nan_to_num(length / np.nanmax(length)),
        arrowsize=0.9,
        zorder=3,
    )
    labels = {"umap": "UMAP", "tsne": "tSNE", "pca": "PC"}.get(name, name)
    axes.set_xlabel(f"{labels}1")
    axes.set_ylabel(f"{labels}2")
    axes.set_xticks([])
    axes.set_yticks([])
    return finish(axes, ax, show)


def _field(adata: AnnData, basis: str | None, vkey: str) -> tuple[np.ndarray, np.ndarray, str]:
    """The first two components of the embedding and of the velocities, and the name of the basis."""
    if basis is None:
        basis = next((name for name in _BASES if f"{vkey}_{name}" in adata.obsm), "umap")
    name = basis.removeprefix("X_")
    parts = []
    for key in (f"X_{name}", f"{vkey}_{name}"):
        if key not in adata.obsm:
            keys = [str(k) for k in adata.obsm]
            hint = "run `sd.tl.velocity_embedding` first"
            raise KeyError(f"basis={basis!r}: {key!r} is not in `adata.obsm`. Available: {keys}; {hint}")
        values: np.ndarray = np.asarray(adata.obsm[key], np.float64)
        if values.ndim != 2 or values.shape[1] < 2:
            raise ValueError(f"basis={basis!r}: `adata.obsm[{key!r}]` has shape {values.shape}; 2 columns are needed")
        parts.append(values[:, :2])
    return parts[0], parts[1], name


def _on_grid(
    points: np.ndarray, velocity: np.ndarray, density: float, smooth: float, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean velocities on a grid (2, rows, columns), nan where there are few cells or hardly any velocity."""
    steps = max(int(_POINTS * density), 4)
    low, high = points.min(0), points.max(0)
    margin = 0.01 * np.where(high > low, high - low, 1)
    x, y = (np.linspace(a - m, b + m, steps) for a, b, m in zip(low, high, margin, strict=True))
    grid = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    k = max(1, min(len(points), max(10, len(points) // 50)))
    distance, near = cKDTree(points).query(grid, k=k)
    distance, near = distance.reshape(len(grid), k), near.reshape(len(grid), k)
    width = smooth * np.mean([x[1] - x[0], y[1] - y[0]])
    weight = np.exp(-0.5 * (distance / width) ** 2)
    mass = weight.sum(1)
    mean = (velocity[near] * weight[..., None]).sum(1) / np.maximum(1, mass)[:, None]
    length = np.linalg.norm(mean, axis=1)
    occupied = mass > 0.01 * np.percentile(mass, 99)
    shortest = np.percentile(length[occupied], cutoff)
    mean[~occupied | (length < shortest)] = np.nan
    return x, y, mean.T.reshape(2, steps, steps)


def _draw_cells(
    ax: Axes, adata: AnnData, points: np.ndarray, column: Any, color: str | None, cmap: str, area: float
) -> None:
    style: dict[str, Any] = {"s": area, "linewidths": 0, "rasterized": True, "alpha": 0.55}
    if column is None:
        ax.scatter(points[:, 0], points[:, 1], color=GREY, **style)
        return
    if column.dtype.kind in "fiu":
        drawn = ax.scatter(points[:, 0], points[:, 1], c=column.to_numpy(np.float64), cmap=cmap, **style)
        ax.figure.colorbar(drawn, ax=ax, label=color)
        return
    groups = column.astype("category").cat
    colors = list(group_colors(adata, str(color)).values())
    for i, name in enumerate(groups.categories):
        there = points[(groups.codes == i).to_numpy()]
        if len(there):
            ax.scatter(there[:, 0], there[:, 1], color=colors[i], label=str(name), **style)
            frame = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.75, "edgecolor": "none"}
            x, y = np.median(there, 0)
            ax.text(x, y, str(name), ha="center", va="center", fontsize=9, zorder=4, bbox=frame)
