"""What a fit has to be compared with: a grid of classical settings, and a prediction of the same labels."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from scdiffx._calls import replay
from scdiffx._core.random import as_seed
from scdiffx._core.runtime import ensure_cache, one_blas_thread
from scdiffx._fit._objective import check_arguments, labels_of, parts_of
from scdiffx._fit._split import Split, blind, three_ways
from scdiffx._log import progress_bar
from scdiffx._steps import Plan
from scdiffx.losses import Loss
from scdiffx.losses._terms import Correlation, CrossEntropy, TimeOrder

__all__ = ["Grid", "direct_predictor", "grid"]

_NEIGHBORS = 15


@dataclass
class Grid:
    """Classical settings tried on a plan.

    Attributes
    ----------
    table
        DataFrame with a row for each setting: its values, and its loss on "train", "holdout" and "test".
    best
        The setting with the lowest held-out loss (training loss without a holdout), by "call.argument".
    losses
        Its losses.
    plan
        The plan with that setting; `plan.apply()` runs it.
    """

    table: Any
    best: dict[str, Any]
    losses: dict[str, float]
    plan: Plan


@one_blas_thread()
def grid(
    plan: Plan,
    loss: Loss,
    values: Mapping[str, Sequence[Any]],
    *,
    budget: int | None = None,
    holdout: float | str | np.ndarray | Loss | None = 0.2,
    test: float | str | np.ndarray | Loss | None = 0.2,
    rng: Any = 0,
    progress: bool = True,
) -> Grid:
    """Search over classical settings of a plan by the same loss and the same cells as a fit: its control.

    Every setting runs the plan anew, nothing is learned but the readouts of the loss. A gradient step of a fit costs
    about three evaluations: a grid at the budget of a fit has three times as many settings as the fit has steps.

    Parameters
    ----------
    plan
        A plan from `sd.plan`.
    loss
        From `sd.losses`.
    values
        Values to try for arguments of the plan's calls: ``{"pca.n_comps": [10, 30, 50], "neighbors.n_neighbors":
        [10, 15, 30]}``. All combinations are tried.
    budget
        Try this many combinations at most, drawn at random; that of the plan itself is always among those tried.
    holdout, test, rng
        As in `sd.fit`: the same values split the cells in the same way.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Grid
        Pass it to `Fitted.report`.

    Raises
    ------
    ValueError
        If a name in `values` is no call of the plan, a setting cannot be run, or a step was added to the plan by hand.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> plan = sd.plan(adata)
    >>> sd.pp.pca(plan, n_comps=5)
    >>> loss = sd.losses.cross_entropy("X_pca", "bulk_labels")
    >>> found = sd.grid(plan, loss, {"pca.n_comps": [5, 10]}, progress=False)
    >>> found.best
    {'pca.n_comps': 10}
    """
    import pandas as pd

    ensure_cache()
    check_arguments(plan, loss, budget=budget)
    recorded = [step.name for step in replay(plan.calls, plan.adata).steps]
    if unknown := [step.name for step in plan.steps if step.name not in recorded]:
        raise ValueError(
            f"the plan has steps that no recorded call makes, {unknown}: a grid makes the calls anew, and cannot run "
            "them"
        )
    places = {name: _place(plan, name) for name in values}
    seed = as_seed(rng)
    split = three_ways(plan.adata, loss, holdout, test, seed)
    settings: list[dict[str, Any]] = [
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    ]
    if budget is not None and len(settings) >= budget:
        picked = np.random.default_rng(seed).choice(len(settings), budget - 1, replace=False)
        settings = [settings[i] for i in np.sort(picked)]
    bar = progress_bar(len(settings) + 1, "grid", progress)
    rows, plans = [], []
    for setting in [{}, *settings]:
        changed = _changed(plan, {places[name]: value for name, value in setting.items()})
        try:
            losses = _judged(changed, loss, split)
        except ValueError as error:
            bar.close()
            raise ValueError(f"the setting {setting} cannot be run: {error}") from None
        rows.append(setting | losses)
        plans.append(changed)
        bar.update()
    bar.close()
    table = pd.DataFrame(rows, columns=[*values, *(name for name in ("train", "holdout", "test") if name in rows[0])])
    best = int(table["holdout" if "holdout" in table else "train"].argmin())
    parts = {name: float(table[name].iloc[best]) for name in table if name not in values}
    return Grid(table, {} if best == 0 else settings[best - 1], parts, plans[best])


def _place(plan: Plan, name: str) -> tuple[int, str]:
    """The number of a call and the argument, from "call.argument"."""
    call, _, argument = name.rpartition(".")
    names = [step.name for step in plan.steps]
    functions = [function.split(".")[-1] for function, _ in plan.calls]
    for known in (names if len(names) == len(functions) else [], functions):
        if call in known:
            return known.index(call), argument
    raise ValueError(f"values: {name!r} names no call of the plan. Available: {functions}, as 'call.argument'")


def _changed(plan: Plan, changes: Mapping[tuple[int, str], Any]) -> Plan:
    calls = [(name, dict(arguments)) for name, arguments in plan.calls]
    for (i, argument), value in changes.items():
        calls[i][1][argument] = value
    try:
        return replay(calls, plan.adata)
    except TypeError as error:
        raise ValueError(f"values: {error}") from None


def _judged(plan: Plan, loss: Loss, split: Split) -> dict[str, float]:
    """The losses of a plan as it is."""
    _, inputs, values = plan.run()
    everything = inputs | values
    objectives, parts = parts_of(loss, split, plan, everything, lambda wanted: everything)
    losses = {name: float(objectives[name].value(everything, part)) for name, part in parts.items()}
    return losses | {"test": float("nan")} if blind(split, loss, plan.adata) else losses


def direct_predictor(plan: Plan, loss: Loss, split: Split, z: np.ndarray | None) -> dict[str, float]:
    """The first labelled term of a loss for a prediction of its labels from the unfitted plan, by part.

    Times are predicted by the mean of the 15 nearest labelled training cells in `z`, the first array of `obsm` that
    the plan writes, as it is before the fit; classes by their shares among them, each mixed with a hundredth of the
    classes' own shares. Nothing where the loss has no such term or the plan writes no such array.
    """
    found = labels_of(loss, plan.adata)
    if found is None or not isinstance(found[0], Correlation | TimeOrder | CrossEntropy):
        return {}
    term, labels = found
    if z is None:
        return {}
    by_class = isinstance(term, CrossEntropy)
    known = split.train & (labels >= 0 if by_class else np.isfinite(labels)) & np.isfinite(z).all(1)
    if z.ndim != 2 or known.sum() < 2:
        return {}
    masks = {"train": split.train, "holdout": split.holdout, "test": split.test}
    parts = {name: mask for name, mask in masks.items() if isinstance(mask, np.ndarray) and name != "train"}
    predicted = _nearest_labels(z, known, labels, by_class)
    if by_class:
        return {name: _cross_entropy(predicted, labels, mask) for name, mask in parts.items()}
    value = jnp.asarray(predicted, jnp.float32)
    target = jnp.asarray(labels, jnp.float32)
    there = {name: mask & np.isfinite(labels) for name, mask in parts.items()}
    return {name: float(term(value, target, jnp.asarray(m))) if m.any() else float("nan") for name, m in there.items()}


def _nearest_labels(z: np.ndarray, known: np.ndarray, labels: np.ndarray, by_class: bool) -> np.ndarray:
    from sklearn.neighbors import NearestNeighbors

    usable = np.where(np.isfinite(z), z, 0)
    count = min(_NEIGHBORS, int(known.sum()))
    near = labels[known][NearestNeighbors(n_neighbors=count).fit(usable[known]).kneighbors(usable)[1]]
    if not by_class:
        return np.asarray(near.mean(1))
    classes = np.arange(labels.max() + 1)
    shares = (labels[known][:, None] == classes).mean(0)
    return np.asarray(0.99 * (near[:, :, None] == classes).mean(1) + 0.01 * np.maximum(shares, 1e-6))


def _cross_entropy(shares: np.ndarray, labels: np.ndarray, mask: np.ndarray) -> float:
    cells = np.flatnonzero(mask & (labels >= 0))
    return float(-np.log(shares[cells, labels[cells]]).mean()) if len(cells) else float("nan")
