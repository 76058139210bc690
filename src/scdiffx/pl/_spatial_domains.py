from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx.pl._common import GREY, finish, group_colors, group_legend, legend_room, lookup, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

# Share of the distance between cells that a point covers.
_COVER = 0.9


def spatial_domains(
    adata: AnnData,
    *,
    key: str = "spatial_domain",
    spatial_key: str = "spatial",
    batch: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    size: float | None = None,
) -> Axes:
    """Plot the domains of a tissue where the cells lie.

    Points are as large as cells are apart, the second coordinate grows downwards as in images, and of three coordinates
    the first two are drawn.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) after ``sd.tl.spatial_domains``.
    key
        The `key_added` of ``sd.tl.spatial_domains``; any other categorical column of `adata.obs` can be drawn too.
        Colours are those of ``adata.uns[f"{key}_colors"]``, which are added where there are none.
    spatial_key
        Key of `obsm` with the coordinates.
    batch
        Which slice to draw, if domains were found with a `batch_key`.
    ax
        Axes to draw into; by default those of a new figure.
    show
        Whether to show the figure. By default what ``scanpy.settings.autoshow`` says if scanpy is loaded, and no
        otherwise or with `ax`.
    size
        Area of a point in square points; by default it follows from the density of the cells.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    KeyError
        If there are no domains under `key`, no coordinates, or no such slice.
    ValueError
        If domains were found in several slices and none is named, or the other way round.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> adata.obsm["spatial"] = adata.obsm["X_umap"]  # in place of coordinates in a tissue
    >>> ax = sd.pl.spatial_domains(adata, key="louvain", show=False)
    >>> ax.get_legend().get_title().get_text()
    'louvain'
    """
    if key not in adata.obs:
        raise KeyError(f"key={key!r} is not in `adata.obs`; run `sd.tl.spatial_domains` first")
    where = np.asarray(lookup(adata.obsm, spatial_key, "spatial_key", "obsm"), np.float64)
    entry = adata.uns.get(key)
    batch_key = entry.get("params", {}).get("batch_key") if isinstance(entry, dict) else None
    shown = np.ones(adata.n_obs, bool)
    if batch_key is not None:
        slices = adata.obs[batch_key].astype(str)
        if batch is None:
            raise ValueError(f"domains were found in several slices: pass `batch=`, one of {sorted(slices.unique())}")
        shown = (slices == str(batch)).to_numpy()
        if not shown.any():
            raise KeyError(
                f"batch={batch!r} is not in `adata.obs[{batch_key!r}]`. Available: {sorted(slices.unique())}"
            )
    elif batch is not None:
        raise ValueError(f"batch={batch!r}: domains were not found by slice")
    domains = adata.obs[key].astype("category")
    colors, points = group_colors(adata, key), where[:, :2]
    axes = new_axes(ax, (6.4 + legend_room(list(colors)), 5.0))
    span = np.ptp(points[shown], axis=0)
    margin = 0.02 * span.max() or 1.0
    low, high = points[shown].min(0) - margin, points[shown].max(0) + margin
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(high[1], low[1])
    axes.set_aspect("equal")
    style: dict[str, Any] = {"linewidths": 0, "rasterized": True}
    style["s"] = _area(axes, span, int(shown.sum())) if size is None else size
    missing = domains.isna().to_numpy() & shown
    if missing.any():
        axes.scatter(*points[missing].T, color=GREY, label="none", **style)
    for domain, shade in colors.items():
        inside = (domains == domain).to_numpy() & shown
        if inside.any():
            axes.scatter(*points[inside].T, color=shade, label=str(domain), **style)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if batch is not None:
        axes.set_title(str(batch), fontsize="medium")
    group_legend(axes, title=key, count=len(colors))
    return finish(axes, ax, show)


def _area(axes: Axes, span: np.ndarray, cells: int) -> float:
    """The area of a point whose width is about the distance between cells."""
    box = axes.get_window_extent()
    width, height = (length * 72 / axes.figure.dpi for length in (box.width, box.height))
    scale = min(width / max(span[0], 1e-12), height / max(span[1], 1e-12))
    apart = scale * np.sqrt(max(span[0] * span[1], 1e-12) / max(cells, 1))
    return float(np.clip((_COVER * apart) ** 2, 0.3, 60))
