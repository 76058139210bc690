from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx.pl._common import finish, group_colors, group_legend, legend_room, lookup, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

# Half of the width of a bar, in steps; how much of the height gaps between groups take; rows of a block of a coupling.
_BAR = 0.035
_GAPS = 0.12
_ROWS = 512


def ot_flow(
    adata: AnnData,
    groupby: str,
    *,
    key: str = "ot_trajectory",
    min_share: float = 0.01,
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes:
    """Plot how groups of cells flow into each other from one time point to the next.

    At each time point a bar for each group, as high as its share of the cells. A ribbon leaves a group with the share
    of its descendants that arrive in the other, and arrives there with the share of its ancestors that come from the
    first: it widens where cells multiply. It has the colour of the group that it leaves.

    Parameters
    ----------
    adata
        After `sd.tl.ot_trajectory`.
    groupby
        Column of `adata.obs` with groups; drawn in the colours of ``adata.uns[f"{groupby}_colors"]``, which are added
        where there are none.
    key
        What `key_added` was, if it was given.
    min_share
        Ribbons that are below this share of all cells at both ends are left out.
    ax
        Axes to draw into; by default those of a new figure.
    show
        Whether to show the figure. By default what ``scanpy.settings.autoshow`` says if scanpy is loaded, and no
        otherwise or with `ax`.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    KeyError
        If there are no couplings, or there is no such column.
    ValueError
        If a cell has no group, `min_share` is not in [0, 1), or cells are no longer those that were coupled.

    Examples
    --------
    >>> import numpy as np
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> adata.obs["day"] = np.arange(700) % 2  # in place of real time points
    >>> sd.tl.ot_trajectory(adata, "day")
    >>> ax = sd.pl.ot_flow(adata, "bulk_labels", show=False)
    >>> ax.get_xlabel()
    'day'
    """
    if key not in adata.uns:
        raise KeyError(f"key={key!r} is not in `adata.uns`: run `sd.tl.ot_trajectory` first")
    if not 0 <= min_share < 1:
        raise ValueError(f"min_share={min_share!r} must be in [0, 1)")
    groups = lookup(adata.obs, groupby, "groupby", "obs").astype("category").cat.remove_unused_categories()
    if groups.isna().any():
        raise ValueError(f"groupby={groupby!r} is missing for {groups.isna().sum()} cells")
    entry = adata.uns[key]
    labels = [str(label) for label in entry["labels"]]
    cells = _time_points(adata, entry, labels)
    names = list(groups.cat.categories)
    codes = groups.cat.codes.to_numpy()
    sizes = np.array([np.bincount(codes[index], minlength=len(names)) for index in cells])
    shares = sizes / sizes.sum(1, keepdims=True)
    axes = new_axes(ax, (3.6 + 1.15 * len(cells) + legend_room(names), 1.8 + 0.3 * min(max(len(names), 8), 20)))
    table = group_colors(adata, groupby)
    colors = [table[name] for name in names]
    bottoms = [_bottoms(part) for part in shares]
    for k, part in enumerate(shares):
        axes.bar(k, part, 2 * _BAR, bottoms[k], color=colors, zorder=2)
    for k in range(len(cells) - 1):
        flow = _flow(adata, entry, cells, codes, k, len(names))
        _draw_ribbons(axes, k, flow, shares[k : k + 2], bottoms[k : k + 2], colors, min_share)
    axes.set_xticks(range(len(cells)), [f"{label}\n({len(index)})" for label, index in zip(labels, cells, strict=True)])
    axes.set_xlabel(str(entry["params"]["time_key"]))
    axes.set_xlim(-0.1, len(cells) - 0.9)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    handles = [_patch(color, str(name)) for name, color in zip(names, colors, strict=True)]
    # The first group stands at the bottom, and so it does in the legend.
    group_legend(axes, title=groupby, at=1.0, handles=handles[::-1], count=len(handles))
    return finish(axes, ax, show)


def _time_points(adata: AnnData, entry: Any, labels: list[str]) -> list[np.ndarray]:
    """The cells of each time point, earliest first."""
    time_key = str(entry["params"]["time_key"])
    moment = lookup(adata.obs, time_key, "time_key", "obs").astype(str).to_numpy()
    cells = [np.flatnonzero(moment == label) for label in labels]
    if len(entry["f"]) != adata.n_obs or sum(map(len, cells)) != adata.n_obs or not all(map(len, cells)):
        raise ValueError("cells or their times are no longer those that were coupled: run `sd.tl.ot_trajectory` again")
    return cells


def _flow(adata: AnnData, entry: Any, cells: list[np.ndarray], codes: np.ndarray, k: int, n_groups: int) -> np.ndarray:
    """The mass that the coupling moves from each group to each, as a share of all."""
    z = lookup(adata.obsm, str(entry["params"]["use_rep"]), "use_rep", "obsm")
    z, f, g = (np.asarray(part, np.float32) for part in (z, entry["f"], entry["g"]))
    here, there = cells[k], cells[k + 1]
    centre = z[there].mean(0)
    y = z[there] - centre
    is_group = (codes[there][:, None] == np.arange(n_groups)).astype(np.float32)
    from_column = g[there] - np.square(y).sum(1) / entry["scale"][k]
    flow = np.zeros((n_groups, n_groups))
    for start in range(0, len(here), _ROWS):
        rows = here[start : start + _ROWS]
        x = z[rows] - centre
        from_row = f[rows] - np.square(x).sum(1) / entry["scale"][k]
        block = np.exp((2 / entry["scale"][k] * x @ y.T + from_row[:, None] + from_column) / float(entry["epsilon"]))
        np.add.at(flow, codes[rows], block @ is_group)
    return flow / flow.sum()


def _bottoms(shares: np.ndarray) -> np.ndarray:
    """Where the bars of a time point begin, with gaps between the groups that it has."""
    gap = _GAPS / max(len(shares) - 1, 1)
    ends = np.cumsum(shares + gap * (shares > 0))
    total = ends[-1] - gap
    return ends - shares - gap * (shares > 0) - total / 2


def _draw_ribbons(
    ax: Axes, k: int, flow: np.ndarray, shares: Any, bottoms: Any, colors: list[Any], min_share: float
) -> None:
    rows, columns = flow.sum(1, keepdims=True), flow.sum(0, keepdims=True)
    leaving = shares[0][:, None] * flow / np.where(rows > 0, rows, 1)
    arriving = shares[1] * flow / np.where(columns > 0, columns, 1)
    left = bottoms[0][:, None] + np.cumsum(leaving, 1) - leaving
    right = bottoms[1] + np.cumsum(arriving, 0) - arriving
    way = np.linspace(0, 1, 40)
    ease = way**2 * (3 - 2 * way)
    at = k + _BAR + (1 - 2 * _BAR) * way
    for a, b in np.argwhere(np.maximum(leaving, arriving) >= max(min_share, 1e-12)):
        low = left[a, b] + (right[a, b] - left[a, b]) * ease
        high = low + leaving[a, b] + (arriving[a, b] - leaving[a, b]) * ease
        ax.fill_between(at, low, high, color=colors[a], alpha=0.45, linewidth=0, zorder=1)


def _patch(color: Any, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color, label=label)
