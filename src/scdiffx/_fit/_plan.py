"""Where plans come from: nothing, or the history of an analysis."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from scdiffx._calls import repeat
from scdiffx._fitted import FIT
from scdiffx._signatures import changed_arguments
from scdiffx._slots import Slot, history_of, is_anndata, left_out
from scdiffx._steps import Plan

__all__ = ["plan"]


def plan(adata: Any) -> Plan:
    """Start a plan: pass it to functions of `sd.pp` and `sd.tl` in place of the AnnData, and they are recorded.

    ``sd.plan.from_history(adata)`` starts from the calls that an analysed AnnData remembers.

    Parameters
    ----------
    adata
        The AnnData that the plan will read; it is not changed until `Fitted.apply`. Not a MuData or a SpatialData: a
        fit is tied to the genes of one matrix. Pass a modality or a table, or for what concerns all modalities
        ``AnnData(obs=mdata.obs, obsm={"X_joint": mdata.obsm["X_joint"]})``.

    Returns
    -------
    The plan.

    Raises
    ------
    TypeError
        If `adata` is not an AnnData.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> plan = sd.plan(adata)
    >>> sd.pp.normalize_total(plan)
    >>> sd.pp.log1p(plan)
    >>> [step.name for step in plan.steps]
    ['normalize_total', 'log1p']
    """
    _check(adata, "adata")
    return Plan(adata)


def from_history(adata: Any, *, on: Any = None, skip: str | Iterable[str] = ()) -> Plan:
    """Rebuild a plan from the calls that an AnnData remembers in ``uns["scdiffx"]["history"]``.

    Applied to the data as they were (``plan.apply()``), the plan gives the same keys and values, to rounding. The
    history holds calls of `sd.pp` and `sd.tl` only: what happened between them, such as calls of scanpy or a selection
    of genes, is not in it and has to have been done to `on`.

    Parameters
    ----------
    adata
        The analysed AnnData, with a history.
    on
        The AnnData that the plan will read: the data as they were before the analysis, or others. Default: `adata`
        itself, which has to hold still what its first steps read.
    skip
        Functions to leave out, such as ``["tl.umap"]``.

    Returns
    -------
    The plan.

    Raises
    ------
    KeyError
        If there is no history.
    ValueError
        If a call cannot be part of a plan (such as `tl.umap`, or a fit), an argument is data or code and so not in the
        history, a name in `skip` is not in the history, the history cannot be read, or `on` is not given and `adata` no
        longer holds what the steps read.
    """
    _check(adata, "adata")
    if on is not None:
        _check(on, "on")
    calls = history_of(adata)
    skipped = {skip} if isinstance(skip, str) else set(skip)
    if unknown := sorted(skipped - {name for name, _ in calls}):
        raise ValueError(f"skip={unknown} is not in the history. Available: {sorted({name for name, _ in calls})}")
    built = Plan(adata if on is None else on)
    for number, (name, arguments) in enumerate(calls, 1):
        if name not in skipped:
            _add(built, number, name, arguments)
    if on is None:
        _check_unchanged(built)
    return built


# A function with a second door, as `dict.fromkeys`: both belong to the one name that users know.
plan.from_history = from_history  # type: ignore[attr-defined]


def _check(adata: Any, argument: str) -> None:
    if not is_anndata(adata):
        hint = "pass one of its modalities, or an AnnData with the `obs` and `obsm` that the plan reads"
        hints = {"MuData": f": {hint}", "SpatialData": ": pass one of its tables, `sdata.tables[...]`"}
        kind = type(adata).__name__
        raise TypeError(f"`{argument}` must be an AnnData, got {kind}{hints.get(kind, '')}")


def _add(built: Plan, number: int, name: str, arguments: dict[str, Any]) -> None:
    call = f"call {number} of the history, {name!r},"
    if name == FIT:
        raise ValueError(
            f"{call} applied a fit, whose parameters are not in the history. Leave it out with skip=[{name!r}]"
        )
    missing = {key: what for key, value in arguments.items() if (what := left_out(value)) is not None}
    if missing:
        named = ", ".join(f"{key} ({what})" for key, what in missing.items())
        raise ValueError(
            f"{call} had arguments that are not in it: {named}. Make this call on a plan yourself, or skip it"
        )
    try:
        repeat(built, name, changed_arguments(name, arguments))
    except (TypeError, ValueError, KeyError) as error:
        reason = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ValueError(f"{call} cannot be part of this plan: {reason}. Leave it out with skip=[{name!r}]") from error


def _check_unchanged(built: Plan) -> None:
    """Raise where a step reads from the AnnData what a step of the plan has since written over."""
    written_over = {w.slot for step in built.steps for w in step.writes}
    before: set[Slot] = set()
    for step in built.steps:
        if lost := sorted((set(step.sources) - before) & written_over):
            raise ValueError(
                f"{step.name!r} reads {lost[0]}, which the analysis has written over: pass the data as they were "
                "before as on="
            )
        before |= {w.slot for w in step.writes}
