"""Soft quality control."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._slots import Obs, available
from scdiffx._steps import Plan, Step, Write, apply

if TYPE_CHECKING:
    from anndata import AnnData


@public
def cell_weights(
    adata: AnnData | Plan,
    bounds: Mapping[str, tuple[float | None, float | None]],
    *,
    temperature: float = 0.1,
    key_added: str = "cell_weight",
    copy: bool = False,
) -> AnnData | None:
    """Weigh cells by quality metrics: a filter with soft edges.

    Each bound contributes a sigmoid that is near 1 on its right side, 1/2 on the bound and near 0 beyond; the weight
    is their product. As `temperature` falls to 0 it becomes the filter that keeps the cells within all bounds.

    Parameters
    ----------
    adata
        Annotated data with metrics in `obs` (from ``sc.pp.calculate_qc_metrics``), or a plan.
    bounds
        Lower and upper bound by column of `obs`, None for no bound:
        ``{"n_genes_by_counts": (200, None), "pct_counts_mt": (None, 10)}``.
    temperature
        Width of the transition in robust standard deviations of the metric; greater than 0.
    key_added
        Name of the column.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obs["cell_weight" | key_added]` : float32 (cells,)
        Weight in [0, 1].

    Raises
    ------
    KeyError
        If a metric is not in `obs`.
    TypeError
        If a metric is not numeric.
    ValueError
        If a metric is not finite, there is no bound, a lower bound is not below the upper, `temperature` is not
        greater than 0, or there are no cells.

    Notes
    -----
    `sd.tl.diffmap`, `sd.tl.pseudotime` and `sd.tl.fate_probabilities` take the column as `weights`. In a plan the
    cut-offs and the temperature can be learned.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> sd.pp.cell_weights(adata, {"percent_mito": (None, 0.03), "n_genes": (1000, None)})
    >>> bool(adata.obs["cell_weight"].between(0, 1).all())
    True
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature!r} must be greater than 0")
    if data.n_obs == 0:
        raise ValueError("`adata` is empty: it has 0 cells")
    cutoffs: list[float] = []
    sides: list[tuple[int, int]] = []
    for i, (name, (low, high)) in enumerate(bounds.items()):
        if name not in data.obs:
            raise KeyError(f"{name!r} is not in `adata.obs`. Available: {available(data.obs)}")
        values = data.obs[name]
        if values.dtype.kind not in "fiub":
            raise TypeError(f"`adata.obs[{name!r}]` has dtype {values.dtype}: a metric must be numeric")
        if not np.isfinite(values.to_numpy(np.float64)).all():
            first = data.obs_names[np.flatnonzero(~np.isfinite(values.to_numpy(np.float64)))[0]]
            raise ValueError(f"`adata.obs[{name!r}]` is not finite for cell {first!r}")
        if low is not None and high is not None and not low < high:
            raise ValueError(f"bounds[{name!r}]={(low, high)!r}: the lower bound must be below the upper")
        for bound, side in ((low, 1), (high, -1)):
            if bound is not None:
                if not math.isfinite(bound):
                    raise ValueError(f"bounds[{name!r}]={(low, high)!r}: use None for no bound")
                cutoffs.append(float(bound))
                sides.append((i, side))
    if not sides:
        raise ValueError(f"bounds={dict(bounds)!r} holds no bound")
    step = Step(
        "cell_weights",
        ops.CellWeights(cutoff=jnp.asarray(cutoffs, jnp.float32), temperature=float(temperature), sides=tuple(sides)),
        reads=tuple(Obs(name) for name in bounds),
        writes=(Write(Obs(key_added), lambda op, result: result, np.float32),),
        message="weighing cells by quality",
    )
    return apply(adata, step, copy=copy)
