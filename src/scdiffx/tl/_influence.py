"""How an output of a plan moves with the settings of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from scdiffx._core.fields import Constraint, learnables, replace
from scdiffx._core.runtime import one_blas_thread
from scdiffx._log import Timer
from scdiffx._program import Program
from scdiffx._slots import Obs, Obsm, Slot, Uns, write_all
from scdiffx._steps import Plan, analysis
from scdiffx.tl._attribution import column_of, result_key

if TYPE_CHECKING:
    from anndata import AnnData

# Of the parameter, to both sides. Larger steps meet jumps (the soft fates' where cells change order); at smaller ones
# it shows where solvers stop. From 1e-5 to 1e-7 nothing changed by more than 1e-3.
_STEP = 1e-6


@analysis
def influence(
    adata: Plan,
    target: str,
    *,
    knobs: str | Sequence[str] | None = None,
    column: int | str | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Say how an output of a plan moves, cell by cell, with each setting that is a single number.

    The derivative of the target in a parameter, in units of the target per unit of the parameter, by central
    differences of the plan with everything held that it finds once.

    Parameters
    ----------
    adata
        A plan that computes the target. The results are written to its AnnData; nothing else is.
    target
        Column of `obs`, or key of `obsm`, that the plan writes.
    knobs
        Learnable parameters as "step.field", such as "neighbors.bandwidth", "normalize_total.target_sum" or
        "fate_probabilities.b", or names of steps. By default all that are single numbers and lead to the target.
    column
        Which column of an `obsm` entry: a number, or the name of a fate.
    key_added
        Key of `obsm` and `uns`; by default "influence", target and column (if any), joined by underscores.
    copy
        Return a copy instead of writing to the plan's AnnData.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["influence_<target>" | key_added]` : DataFrame (cells x knobs)
        Derivatives, float64. NaN for cells whose target is not finite.
    `adata.uns["influence_<target>" | key_added]` : dict
        `params`, and `values`: at which value of each knob.

    Raises
    ------
    TypeError
        If `adata` is not a plan.
    KeyError
        If the plan does not write the target, or the column does not exist.
    ValueError
        If a knob is no learnable parameter, no single number, or does not lead to the target, or none does.

    Notes
    -----
    The parameters are moved by a millionth of their value (of 1 where they are 0) up and down, as far as they are
    allowed there, and what follows them is computed in float64: two evaluations for each. These are differences, not
    automatic derivatives: those of the solvers and graph operations go from outputs back to inputs only, at one
    evaluation for each cell.

    Neighbours, components, selected genes, trained networks and whatever else the plan finds once are held. A plan that
    is run anew with another setting finds them anew, and moves by jumps as well: the derivative tells what the numbers
    do, not what the choices do. Settings after the search for neighbours predict small changes well; those before it,
    such as the target sum, do not, since new components and neighbours move the result by more. Soft fates jump where
    two cells change order in pseudotime. To see everything, run the plan with both settings.
    """
    if not isinstance(adata, Plan):
        raise TypeError("influence evaluates a plan anew: pass one from `sd.plan(adata)`, not an AnnData")
    slot = adata.slot(target)
    if not isinstance(slot, Obs | Obsm) or not adata.writes(slot):
        raise KeyError(f"target={target!r} is not written by the plan to `obs` or `obsm`")
    timer = Timer(f"computing influence on {target}")
    table, values = _differences(Program.towards(adata, slot, knobs), slot, target, column)
    key = key_added if key_added is not None else result_key("influence", target, column)
    table.index = adata.adata.obs_names.copy()
    params = {"target": target, "step": _STEP} | ({} if column is None else {"column": column})
    written = adata.adata.copy() if copy else adata.adata
    write_all(written, {Obsm(key): table, Uns(key): {"params": params, "values": values}})
    timer.done(f"{key!r} (adata.obsm)")
    return written if copy else None


def _differences(
    program: Program, slot: Obs | Obsm, target: str, column: int | str | None
) -> tuple[Any, dict[str, float]]:
    """The table of derivatives, and the values of the knobs."""
    import pandas as pd

    @jax.jit
    def evaluate(ops: list[Any], frozen: dict[Slot, Any]) -> Any:
        y = program.evaluate(ops, frozen)[slot]
        return y if y.ndim == 1 else y[:, column_of(target, column, y.shape[1], slot.columns)]

    columns, values = {}, {}
    with jax.enable_x64(True), one_blas_thread(), np.errstate(invalid="ignore"):
        for name in program.learned:
            i, field = program.find(name)
            now = getattr(program.ops[i], field)
            ends = _around(now, learnables(program.ops[i])[field])
            low, high = (
                np.asarray(evaluate(_with(program.ops, i, replace(program.ops[i], **{field: end})), program.frozen))
                for end in ends
            )
            columns[name] = (high - low) / float(ends[1] - ends[0])
            values[name] = float(now)
    return pd.DataFrame(columns), values


def _around(value: jax.Array, constraint: Constraint) -> list[jax.Array]:
    """Values to both sides; the value itself on a side that the constraint closes."""
    step = _STEP * abs(value) + _STEP * (value == 0)
    return [moved if bool(constraint.accepts(moved)) else value for moved in (value - step, value + step)]


def _with(ops: list[Any], i: int, op: Any) -> list[Any]:
    return [*ops[:i], op, *ops[i + 1 :]]
