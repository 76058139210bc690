from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scdiffx.pl._common import finish, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from scdiffx import Fitted

# Blue and vermilion of the Okabe-Ito palette: told apart with every kind of colour vision.
_CURVES = {"train": ("training cells", "#0072B2"), "holdout": ("held-out cells", "#D55E00")}


def fit(fitted: Fitted, *, ax: Axes | None = None, show: bool | None = None) -> Axes:
    """Plot the loss over the steps of a fit.

    One curve for the training cells and one for the held-out cells, each with the level of the defaults as a dashed
    line of its colour. The point marks the step whose parameters were chosen: the lowest held-out loss, or the lowest
    training loss without held-out cells. The title says whether these parameters were adopted, and gives the loss
    before and after on the cells that decide and, where there are such, on the test cells. Both are computed with fresh
    structure, so the second can differ a little from the point.

    Parameters
    ----------
    fitted
        From `sd.fit` or `sd.Fitted.load`.
    ax
        Axes to draw into; by default those of a new figure.
    show
        Whether to show the figure. By default what ``scanpy.settings.autoshow`` says if scanpy is loaded, and no
        otherwise or with `ax`.

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> plan = sd.plan(adata)
    >>> sd.pp.pca(plan, n_comps=5)
    >>> loss = sd.losses.cross_entropy("X_pca", "bulk_labels")
    >>> fitted = sd.fit(plan, loss, n_steps=3, progress=False)
    >>> ax = sd.pl.fit(fitted, show=False)
    >>> ax.get_ylabel()
    'loss'
    """
    from matplotlib.ticker import MaxNLocator

    names = [name for name in _CURVES if name in fitted.history]
    decides = names[-1]
    given = ax
    ax = new_axes(ax, (6.4, 4.0))
    steps = np.asarray(fitted.history["step"])
    for name in names:
        label, color = _CURVES[name]
        ax.plot(steps, fitted.history[name], color=color, label=label)
        ax.axhline(
            fitted.losses[f"{name}_before"], color=color, linestyle="--", linewidth=1, label=f"defaults, {label}"
        )
    best = int(np.argmin(fitted.history[decides]))
    ax.plot(
        steps[best],
        fitted.history[decides][best],
        linestyle="none",
        marker="o",
        markersize=8,
        markeredgecolor="black",
        color=_CURVES[decides][1],
        label=f"chosen: step {steps[best]}",
        zorder=3,
    )
    before, after = (fitted.losses[f"{decides}_{when}"] for when in ("before", "after"))
    verdict = "fitted parameters adopted" if fitted.adopted else "defaults kept"
    title = f"{verdict}\nloss of the {_CURVES[decides][0]}: {before:.4g} before, {after:.4g} after"
    if "test_before" in fitted.losses:
        title += f"; of the test cells: {fitted.losses['test_before']:.4g}, {fitted.losses['test_after']:.4g}"
    ax.set_title(title, fontsize="medium")
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return finish(ax, given, show)
