"""The figures of the main job, made outside of pyplot so that none of them stays open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scdiffx.pl._pseudotime import pseudotime

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

__all__ = ["save_figures"]

_WIDTH = 11.0


def save_figures(adata: AnnData, folder: Path, *, variance_ratio: np.ndarray) -> list[Path]:
    """Draw the variance of the components, the clusters and the pseudotime; returns the files."""
    import scanpy
    from matplotlib.figure import Figure

    n_groups = adata.obs["leiden"].cat.categories.size
    variance = Figure((6.0, 3.8), layout="constrained")
    _variance(variance.subplots(), variance_ratio)

    clusters = Figure((_WIDTH, 4.6), layout="constrained")
    left, right = clusters.subplots(1, 2)
    # Numbers beside the points: colours alone cannot tell many clusters apart.
    shared = {"color": "leiden", "show": False, "legend_fontsize": 9, "legend_fontoutline": 2}
    scanpy.pl.embedding(adata, "pca", ax=left, legend_loc="on data", title="principal components", **shared)
    # scanpy counts from 1, and the first component is stationary
    scanpy.pl.diffmap(adata, ax=right, components="2,3", title="diffusion map", **shared)

    ordered = Figure((_WIDTH, max(4.6, 1.4 + 0.26 * n_groups)), layout="constrained")
    left, right = ordered.subplots(1, 2)
    pseudotime(adata, ax=left)
    pseudotime(adata, groupby="leiden", ax=right)

    files = []
    for name, figure in (("variance", variance), ("clusters", clusters), ("pseudotime", ordered)):
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=150)
    return files


def _variance(ax: Axes, ratio: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.plot(np.arange(1, len(ratio) + 1), 100 * ratio, marker="o", markersize=4, color="#0072B2")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("principal component")
    ax.set_ylabel("% of variance")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(axis="y", which="both", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
