from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scdiffx.pl._common import finish, lookup, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_CELLS, _SIMULATED = "#0072B2", "#D55E00"


def doublets(adata: AnnData, *, batch: str | None = None, ax: Axes | None = None, show: bool | None = None) -> Axes:
    """Plot the doublet scores of the cells beside those of simulated doublets.

    Two histograms, each with its own total of 1, and the threshold above which cells were called. A good threshold
    runs between the two modes of the simulated doublets.

    Parameters
    ----------
    adata
        After `sd.pp.scrublet` (or scanpy's).
    batch
        Which batch, if the scores were computed by batch.
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
        If there are no scores, or no such batch.
    ValueError
        If the scores were computed by batch and none is named, or the other way round.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> sd.pp.scrublet(adata, threshold=0.2)
    >>> ax = sd.pl.doublets(adata, show=False)
    >>> ax.get_title()
    'doublet scores'
    """
    if "scrublet" not in adata.uns or "doublet_score" not in adata.obs:
        raise KeyError("there are no doublet scores in `adata`: run `sd.pp.scrublet` first")
    entry, scores = adata.uns["scrublet"], adata.obs["doublet_score"].to_numpy(np.float64)
    title = "doublet scores"
    if "batches" in entry:
        if batch is None:
            raise ValueError(f"scores were computed by batch: pass `batch=`, one of {list(entry['batches'])}")
        labels = adata.obs[entry["batched_by"]].astype(str).str.replace("/", "|")
        entry = lookup(entry["batches"], str(batch).replace("/", "|"), "batch", "uns['scrublet']['batches']")
        scores = scores[(labels == str(batch).replace("/", "|")).to_numpy()]
        title = f"doublet scores, {batch}"
    elif batch is not None:
        raise ValueError(f"batch={batch!r}: scores were not computed by batch")
    simulated = np.asarray(entry["doublet_scores_sim"], np.float64)
    scores = scores[np.isfinite(scores)]
    given = ax
    ax = new_axes(ax, (6.4, 4.0))
    edges = np.linspace(0, max(scores.max(initial=0), simulated.max(initial=0)), 31)
    for values, color, label in ((scores, _CELLS, "cells"), (simulated, _SIMULATED, "simulated doublets")):
        share = np.histogram(values, edges)[0] / max(len(values), 1)
        ax.stairs(share, edges, fill=True, color=color, alpha=0.45, label=label)
        ax.stairs(share, edges, color=color)
    if "threshold" in entry:
        called = float((scores > entry["threshold"]).mean())
        ax.axvline(entry["threshold"], color="black", linestyle="--", linewidth=1)
        label = f"threshold {entry['threshold']:.2f}: {called:.1%} of the cells above"
        ax.plot([], [], color="black", linestyle="--", linewidth=1, label=label)
    ax.set_yscale("symlog", linthresh=1e-2)
    ax.set_ylim(bottom=0)
    ax.set_xlim(0, edges[-1])
    ax.set_xlabel("doublet score")
    ax.set_ylabel("share")
    ax.set_title(title, fontsize="medium")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small")
    return finish(ax, given, show)
