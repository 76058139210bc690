from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx.pl._common import GREY, finish, group_colors, lookup, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

# What can stand for the cells in the plane, best first, with the first of the two columns: diffusion component 0 is
# stationary and shows nothing. Both names that scanpy's presets give the principal components are known.
_BASES = {"X_umap": 0, "X_diffmap": 1, "X_pca": 0, "pca": 0}
_AXIS_NAMES = {"X_umap": "UMAP", "X_diffmap": "DC", "X_pca": "PC", "pca": "PC"}


def pseudotime(
    adata: AnnData,
    *,
    key: str = "dpt_pseudotime",
    basis: str | None = None,
    groupby: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    cmap: str = "viridis",
    size: float | None = None,
) -> Axes:
    """Plot pseudotime: on an embedding, or with `groupby` its distribution in each group of cells.

    On the embedding, cells whose pseudotime is not finite (which the root cannot reach) are grey and counted in the
    legend, and the root cell ``adata.uns["iroot"]`` is marked where it is set. With `groupby`, each group is a
    horizontal box (quartiles; whiskers to 1.5 times the box; single cells beyond) and groups are sorted by their
    median, earliest at the top; groups that the root cannot reach stand last.

    Parameters
    ----------
    adata
        Annotated data (cells x genes).
    key
        Column of `adata.obs` with numbers.
    basis
        Key of `adata.obsm`, with or without its prefix. By default the first of ``"X_umap"``, ``"X_diffmap"`` and
        ``"X_pca"`` that exists. Of the diffusion map components 2 and 3 are shown: the first one is stationary.
    groupby
        Column of `adata.obs` with groups; drawn in the colours of ``adata.uns[f"{groupby}_colors"]``, which are added
        where there are none.
    ax
        Axes to draw into; by default those of a new figure.
    show
        Whether to show the figure. By default what ``scanpy.settings.autoshow`` says if scanpy is loaded, and no
        otherwise or with `ax`.
    cmap
        Colour map of the embedding.
    size
        Area of a point in square points; by default it falls with the number of cells.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    KeyError
        If `key` or `groupby` is not in `adata.obs`, or `basis` is not in `adata.obsm`.
    TypeError
        If the column `key` does not hold numbers.
    ValueError
        If `basis` has too few columns.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> sd.tl.pseudotime(adata, root=0)
    >>> ax = sd.pl.pseudotime(adata, groupby="bulk_labels", show=False)
    >>> ax.get_xlabel()
    'dpt_pseudotime'
    """
    column = lookup(adata.obs, key, "key", "obs")
    if column.dtype.kind not in "fiu":
        raise TypeError(f"key={key!r}: `adata.obs[{key!r}]` holds {column.dtype}, but pseudotime is a number")
    time = column.to_numpy(np.float64)
    if groupby is not None:
        groups = lookup(adata.obs, groupby, "groupby", "obs").astype("category").cat.remove_unused_categories()
        names = [str(name) for name in groups.cat.categories]
        axes = new_axes(ax, (5.2 + 0.09 * max(map(len, names), default=0), 1.4 + 0.26 * len(names)))
        _draw_groups(axes, time, groups, group_colors(adata, groupby))
        axes.set_xlabel(key)
        axes.set_ylabel(groupby)
    else:
        points, labels = _embedding(adata, basis)
        axes = new_axes(ax, (5.6, 4.4))
        root = adata.uns.get("iroot")
        _draw_embedding(axes, points, time, cmap, size, None if root is None else int(root), key)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
    return finish(axes, ax, show)


def _embedding(adata: AnnData, basis: str | None) -> tuple[np.ndarray, list[str]]:
    """Two columns of an embedding and their names."""
    if basis is None:
        found = [name for name in _BASES if name in adata.obsm]
        basis = found[0] if found else "X_umap"
    name = basis if basis in adata.obsm else f"X_{basis}"
    if name not in adata.obsm:
        lookup(adata.obsm, basis, "basis", "obsm")
    values: np.ndarray = np.asarray(adata.obsm[name])
    first = _BASES.get(name, 0)
    if values.ndim != 2 or values.shape[1] < first + 2:
        raise ValueError(
            f"basis={basis!r}: `adata.obsm[{name!r}]` has shape {values.shape}; {first + 2} columns are needed"
        )
    title = _AXIS_NAMES.get(name, name.removeprefix("X_"))
    return values[:, first : first + 2], [f"{title}{first + 1}", f"{title}{first + 2}"]


def _draw_embedding(
    ax: Axes,
    points: np.ndarray,
    time: np.ndarray,
    cmap: str,
    size: float | None,
    root: int | None,
    key: str,
) -> None:
    area = min(40.0, max(1.0, 60_000 / len(time))) if size is None else size
    style: dict[str, Any] = {"s": area, "linewidths": 0, "rasterized": True}
    finite = np.isfinite(time)
    if not finite.all():
        ax.scatter(points[~finite, 0], points[~finite, 1], color=GREY, label=_absent(time), **style)
    if finite.any():
        drawn = ax.scatter(points[finite, 0], points[finite, 1], c=time[finite], cmap=cmap, **style)
        ax.figure.colorbar(drawn, ax=ax, label=key)
    if root is not None and 0 <= root < len(points):
        star: dict[str, Any] = {"s": 190, "marker": "*", "color": "#D55E00", "edgecolors": "white", "linewidths": 1.2}
        ax.scatter(points[root, 0], points[root, 1], label="root", zorder=3, **star)
    ax.set_xticks([])
    ax.set_yticks([])
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, markerscale=0.9)


def _absent(time: np.ndarray) -> str:
    """How many cells have no finite pseudotime, and why."""
    unreachable, missing = int(np.isinf(time).sum()), int(np.isnan(time).sum())
    parts = [f"{n} {what}" for n, what in ((unreachable, "unreachable"), (missing, "missing")) if n]
    return ", ".join(parts)


def _draw_groups(ax: Axes, time: np.ndarray, groups: Any, colors: dict[Any, str]) -> None:
    values = {name: time[(groups == name).to_numpy()] for name in groups.cat.categories}
    finite = {name: v[np.isfinite(v)] for name, v in values.items()}
    order = sorted(values, key=lambda name: np.median(finite[name]) if len(finite[name]) else np.inf)
    places = range(len(order))
    boxes = ax.boxplot(
        [finite[name] for name in order],
        positions=places,
        orientation="horizontal",
        widths=0.7,
        patch_artist=True,
        boxprops={"linewidth": 0.8},
        medianprops={"color": "black", "linewidth": 1.2},
        flierprops={"marker": ".", "markersize": 3, "markerfacecolor": "black", "markeredgewidth": 0},
        manage_ticks=False,
    )
    for box, name in zip(boxes["boxes"], order, strict=True):
        box.set(facecolor=colors[name], alpha=0.7)
    for place, name in zip(places, order, strict=True):
        if not len(finite[name]):
            ax.text(
                0.01, place, _absent(values[name]), transform=ax.get_yaxis_transform(), va="center", color="#595959"
            )
    ax.set_yticks(places, [_tick(name, values[name], finite[name]) for name in order])
    ax.set_ylim(len(order) - 0.4, -0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _tick(name: Any, values: np.ndarray, finite: np.ndarray) -> str:
    """The group with its number of cells, and how many of them are not in the box."""
    lost = len(values) - len(finite)
    return f"{name} ({len(values)})" if not lost or not len(finite) else f"{name} ({len(values)}, {_absent(values)})"
