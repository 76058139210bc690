"""How an output of a plan moves with the settings of its steps, and without some of its cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from scdiffx._calls import analysis
from scdiffx._core.fields import Constraint, learnables, replace
from scdiffx._core.runtime import one_blas_thread
from scdiffx._log import Timer
from scdiffx._program import Program
from scdiffx._slots import Obs, Obsm, Slot, Uns, write_all
from scdiffx._steps import Plan
from scdiffx.tl._attribution import column_of, result_key
from scdiffx.tl._leave_out import table_of

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
    leave_out: str | None = None,
    groupby: str | None = None,
    column: int | str | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Say how an output of a plan moves with each setting that is a single number, or as cells are left out.

    For settings: the derivative of each cell's target in a parameter, in units of the target per unit of the parameter,
    by central differences of the plan with everything held that it finds once. For cells: the change of the mean target
    of groups of cells when a cell, or all of a sample, is left out.

    Parameters
    ----------
    adata
        A plan that computes the target. The results are written to its AnnData; nothing else is.
    target
        Column of `obs`, or key of `obsm`, that the plan writes.
    knobs
        Learnable parameters as "step.field", such as "neighbors.bandwidth", "normalize_total.target_sum" or
        "fate_probabilities.b", or names of steps. By default all that are single numbers and lead to the target.
    leave_out
        "cells" to leave out each cell, or a column of `obs`, such as sample or batch, to leave out each of its levels.
    groupby
        With `leave_out`: column of `obs` with the groups whose mean target is looked at. By default that of all cells.
    column
        Which column of an `obsm` entry: a number, or the name of a fate.
    key_added
        Key of `obsm` and `uns`; by default "influence", target, column and what is left out (if any), joined by
        underscores.
    copy
        Return a copy instead of writing to the plan's AnnData.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["influence_<target>" | key_added]` : DataFrame (cells x knobs)
        Derivatives, float64. NaN for cells whose target is not finite.
    `adata.uns["influence_<target>" | key_added]` : dict
        `params`, and `values`: at which value of each knob.

    With ``leave_out="cells"``:

    `adata.obsm["influence_<target>_cells" | key_added]` : DataFrame (cells x groups)
        Change of each group's mean, float64, in units of the target, if the cell is left out. NaN for cells without
        which the target is not defined: the root, and the only terminal cell of a fate.
    `adata.uns["influence_<target>_cells" | key_added]` : dict
        `params`.

    With another column:

    `adata.uns["influence_<target>_<leave_out>" | key_added]` : dict
        `params`, and `change`: DataFrame (levels x groups). NaN for levels that hold the root or all terminal cells of
        a fate, and for groups of which nothing is left.

    "/" in names of groups becomes "|".

    Raises
    ------
    TypeError
        If `adata` is not a plan.
    KeyError
        If the plan does not write the target, or a column does not exist.
    ValueError
        If a knob is no learnable parameter, no single number, or does not lead to the target, or none does; if cells
        are to be left out and the target does not depend on weights of cells, or settings do not go together.

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

    *Leaving out* goes by weights of cells, which `sd.tl.diffmap`, `sd.tl.pseudotime` and `sd.tl.fate_probabilities`
    take: at weight 0 they give the others what they give on the graph without the cell. The change for a cell is of
    first order: minus the derivative in its weight, and where the plan finds the neighbours (by the default kernel and
    search of `sd.pp.neighbors`) the derivative in the edges between others times what becomes of them as the next
    nearest cell takes the place of the one left out. All cells come from one pass backwards for each group, through the
    implicit derivatives of eigenvectors and absorption probabilities. What is computed before the neighbours, such as
    components, is held, and so is a graph that the AnnData holds or that has another kernel or search. The cell's own
    target, which does not depend on its own weight but by way of its neighbours, remains in the mean of its group.

    A cell that alone has the largest or smallest pseudotime or priming sets their unit, of which a derivative knows
    nothing: for those few, and for levels of a column, of whose change derivatives told little, what follows the
    components is run anew without them, once for each, and means are over the cells that stay.

    On paul15 derivatives predicted mean pseudotimes and fates of clusters that were run anew from the neighbours on
    with correlations of .9 to .99, rather too small by a tenth to a half. With new components too they predicted
    pseudotime without the most influential cells (.96), less that without others (.7), and not their fates: components
    that are found anew move the result by more than one cell does.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> plan = sd.plan(adata)
    >>> for step in (sd.pp.normalize_total, sd.pp.log1p, sd.pp.pca):
    ...     step(plan)
    >>> sd.tl.influence(plan, "X_pca", column=0)
    >>> list(adata.obsm["influence_X_pca_0"])
    ['normalize_total.target_sum']
    """
    if not isinstance(adata, Plan):
        raise TypeError("influence evaluates a plan anew: pass one from `sd.plan(adata)`, not an AnnData")
    slot = adata.slot(target)
    if not isinstance(slot, Obs | Obsm) or not adata.writes(slot):
        raise KeyError(f"target={target!r} is not written by the plan to `obs` or `obsm`")
    if leave_out is None and groupby is not None:
        raise ValueError(f"groupby={groupby!r} needs `leave_out=`: settings are told for each cell")
    if leave_out is not None and knobs is not None:
        raise ValueError(f"knobs={knobs!r} and leave_out={leave_out!r} exclude each other")
    timer = Timer(f"computing influence on {target}")
    key = key_added if key_added is not None else _key(target, column, leave_out)
    params = {"target": target} | ({} if column is None else {"column": column})
    found: dict[Slot, Any]
    if leave_out is None:
        table, values = _differences(Program.towards(adata, slot, knobs), slot, target, column)
        table.index = adata.adata.obs_names.copy()
        found = {Obsm(key): table, Uns(key): {"params": params | {"step": _STEP}, "values": values}}
    else:
        table = table_of(adata, slot, target, column, leave_out, groupby)
        params |= {"leave_out": leave_out} | ({} if groupby is None else {"groupby": groupby})
        of_cells = leave_out == "cells"
        found = {Obsm(key): table} if of_cells else {}
        found[Uns(key)] = {"params": params} | ({} if of_cells else {"change": table})
    written = adata.adata.copy() if copy else adata.adata
    write_all(written, found)
    timer.done(f"{key!r} (adata.{'obsm' if Obsm(key) in found else 'uns'})")
    return written if copy else None


def _key(target: str, column: int | str | None, leave_out: str | None) -> str:
    key = result_key("influence", target, column)
    return key if leave_out is None else f"{key}_{leave_out}".replace("/", "|")


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
