from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx.pl._common import GREY, finish, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Blue and vermilion of the Okabe-Ito palette: told apart with every kind of colour vision.
_STEPS, _PARAMETERS = "#0072B2", "#D55E00"


def gradients(flow: Any, *, ax: Axes | None = None, show: bool | None = None) -> Axes:
    """Plot how much of a loss's gradient reaches each step and each parameter of a plan.

    Bars show gradient norms on a logarithmic scale: of the outputs of the steps in the order of the plan, and below of
    the parameters. Beside a parameter stands the cosine of its derivatives with finite differences, where these were
    made; parameters that the gradient does not reach, or reaches with a number too large to use, are named so.

    Parameters
    ----------
    flow
        From `sd.metrics.gradient_flow`.
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
    >>> flow = sd.metrics.gradient_flow(plan, loss, n_directions=0)
    >>> ax = sd.pl.gradients(flow, show=False)
    >>> [text.get_text() for text in ax.get_yticklabels()]
    ['pca', 'pca.shift', 'pca.scale']
    """
    names = [*flow.steps, *flow.parameters]
    sizes = np.asarray([*flow.steps.values(), *flow.parameters.values()], float)
    given = ax
    ax = new_axes(ax, (6.4, 1.2 + 0.28 * len(names)))
    usable = np.isfinite(sizes) & (sizes > 0)
    low = 10 ** (np.floor(np.log10(sizes[usable].min())) - 1) if usable.any() else 1e-3
    high = 10 ** (np.ceil(np.log10(sizes[usable].max())) + 1) if usable.any() else 1.0
    place = np.arange(len(names)) + np.repeat([0, 0.6], [len(flow.steps), len(flow.parameters)])
    for kind, color, rows in (
        ("output of a step", _STEPS, slice(len(flow.steps))),
        ("parameter", _PARAMETERS, slice(len(flow.steps), None)),
    ):
        widths = np.where(usable, sizes, low)[rows] - low
        ax.barh(place[rows], widths, left=low, height=0.7, color=color, label=kind)
    for y, name, size in zip(place, names, np.where(usable, sizes, low), strict=True):
        ax.text(size * 1.15, y, _note(flow, name), va="center", fontsize="small")
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.set_yticks(place, names)
    ax.invert_yaxis()
    ax.set_xlabel("norm of the gradient")
    ax.set_title(f"gradient of the loss, which is {flow.loss:.4g}", fontsize="medium")
    ax.grid(axis="x", color=GREY, linewidth=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return finish(ax, given, show)


def _note(flow: Any, name: str) -> str:
    if name not in flow.parameters:
        return ""
    said = ["dead"] if name in flow.dead else ["exploding"] if name in flow.exploding else []
    cosine = flow.cosine.get(name, np.nan)
    return ", ".join(said + ([f"cosine {cosine:.3f}"] if np.isfinite(cosine) else []))
