"""How means of an output of a plan change if cells are left out."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from scdiffx import ops
from scdiffx._core.counts import dense
from scdiffx._core.runtime import one_blas_thread
from scdiffx._program import Program, leading, read_value
from scdiffx._slots import Obs, Obsm, Slot, Weights, available
from scdiffx._steps import Plan, Step, _cast, restructured, run_step
from scdiffx.ops._neighbors import Replacements, replacements
from scdiffx.tl._attribution import column_of, groups_of

# What takes the weights of cells; the operators are known by their arguments.
_TAKING = "`sd.tl.diffmap`, `sd.tl.pseudotime` and `sd.tl.fate_probabilities`"


class LeftOut:
    """A plan with a weight for each cell, and what it gives for a target as cells are left out.

    What the plan finds before its neighbours is held; these are found anew, unless the AnnData holds the graph.
    """

    def __init__(self, plan: Plan, slot: Obs | Obsm, target: str, column: int | str | None) -> None:
        weighted, self.sources = _weighted(plan)
        if not leading(weighted, self.sources, slot):
            names = [step.name for step in plan.steps]
            raise ValueError(
                f"target={target!r} does not depend on weights of cells: they are taken by {_TAKING}, but the plan "
                f"has {names}"
            )
        self.program, found = Program.between(weighted, self.sources, slot, double=True)
        self.slot = slot
        y = np.asarray(found[slot])
        self.at = None if y.ndim == 1 else column_of(target, column, y.shape[1], slot.columns)
        self.now = np.asarray(y if self.at is None else y[:, self.at], np.float64)
        self.needed = _needed(self.program)
        self.ends = _ends(self.program, found)
        self.searches = _searches(self.program, found)

    def target(self, values: dict[Slot, Any]) -> Any:
        y = values[self.slot]
        return y if self.at is None else y[:, self.at]

    def undefined(self, out: np.ndarray) -> bool:
        """Whether nothing is left of the root or of a fate, or too little for the neighbours."""
        fewest = max((search.step.op.n_neighbors for search in self.searches.values()), default=1)
        return (~out).sum() < fewest or any(out[cells].all() for cells in self.needed)

    def without(self, out: np.ndarray, member: np.ndarray) -> np.ndarray:
        """The change of each group's mean over the cells that stay, evaluated anew (groups,)."""
        if self.undefined(out):
            return np.full(member.shape[1], np.nan)
        with jax.enable_x64(True):
            graphs = {slot: search.without(out) for slot, search in self.searches.items()}
            share = jnp.asarray(~out, jnp.float64)
            values = self._run(_shared(self.program.frozen | graphs, self.sources, share))[1]
            moved = np.asarray(self.target(values), np.float64)
        both = np.isfinite(moved) & np.isfinite(self.now) & ~out
        change = np.where(both, moved, 0) - np.where(both, self.now, 0)
        size = (member * both[:, None]).sum(0)
        return np.where(size > 0, change @ member / np.maximum(size, 1), np.nan)

    def _run(self, values: dict[Slot, Any]) -> tuple[list[Any], dict[Slot, Any]]:
        """The active steps with their structure found anew: operators and values."""
        used, values = list(self.program.ops), dict(values)
        for i in self.program.active:
            step = self.program.plan.steps[i]
            args = tuple(read_value(slot, values) for slot in step.reads)
            used[i], result = run_step(step, args, op=used[i], prepare=restructured)
            values |= step.outputs(used[i], result)
        return used, values

    def slopes(self, member: np.ndarray) -> np.ndarray:
        """The change of the groups' means to first order as each cell is left out (cells, groups)."""
        member = member * np.isfinite(self.now)[:, None]
        size = member.sum(0)

        @jax.jit
        def run(operators: list[Any], frozen: dict[Slot, Any], replaced: dict[Slot, Any], means: Any) -> Any:
            def outputs(share: Any, edges: dict[Slot, Any]) -> Any:
                graphs = {slot: replaced[slot].graph.with_values(v) for slot, v in edges.items()}
                return self.target(self.program.evaluate(operators, _shared(frozen | graphs, self.sources, share)))

            edges = {slot: r.graph.values for slot, r in replaced.items()}
            pull = jax.vjp(outputs, jnp.ones(means.shape[1], means.dtype), edges)[1]

            def change(mean: Any) -> Any:
                share, edges = pull(mean)
                return sum((replaced[slot].effect(bar) for slot, bar in edges.items()), -share)

            return jax.lax.map(change, means)

        with jax.enable_x64(True), one_blas_thread():
            found = {slot: search.replaced() for slot, search in self.searches.items()}
            replaced = {slot: r for slot, r in found.items() if r is not None}
            frozen = self.program.frozen | {slot: r.graph for slot, r in replaced.items()}
            used = self._run(frozen)[0] if replaced else self.program.ops
            means = jnp.asarray((member / np.maximum(size, 1)).T, jnp.float64)
            slopes = np.asarray(run(used, frozen, replaced, means)).T
        return np.where(size > 0, slopes, np.nan)


class _Search(NamedTuple):
    """A step that finds neighbours, as it was run: its operator, and the representation."""

    step: Step
    op: ops.Neighbors
    z: Any

    def replaced(self) -> Replacements | None:
        double = _cast((self.op, self.z), jnp.float64)
        return replacements(*double)

    def without(self, out: np.ndarray) -> ops.Graph:
        """The graph of the others, in which those that are left out have no edges."""
        kept = np.flatnonzero(~out)
        z = self.z if isinstance(self.z, jax.Array) else dense(self.z)
        graph = run_step(self.step, (z[kept],))[1].connectivities.to_scipy().tocoo()
        shape = (len(out), len(out))
        return ops.Graph.from_scipy(sp.csr_matrix((graph.data, (kept[graph.row], kept[graph.col])), shape), np.float64)


def _shared(frozen: dict[Slot, Any], sources: list[Slot], share: Any) -> dict[Slot, Any]:
    """The values with the weights times a share."""
    return frozen | {slot: frozen[slot] * share for slot in sources if slot in frozen}


def _searches(program: Program, found: dict[Slot, Any]) -> dict[Slot, _Search]:
    """The searches that the graphs come from which the program reads."""
    searches = {}
    for i, step in enumerate(program.plan.steps):
        graph = next((w.slot for w in step.writes if w.slot in program.frozen), None)
        if isinstance(step.op, ops.Neighbors) and graph is not None:
            searches[graph] = _Search(step, program.ops[i], read_value(step.reads[0], found))
    return searches


def of_cells(left: LeftOut, member: np.ndarray) -> np.ndarray:
    """The change of each group's mean if a cell is left out (cells, groups)."""
    found = left.slopes(member)
    cells = len(found)
    for cell in left.ends:
        found[cell] = left.without(np.arange(cells) == cell, member)
    for group in left.needed:
        if len(group) == 1:
            found[group] = np.nan
    return found


def of_levels(left: LeftOut, labels: Any, member: np.ndarray) -> np.ndarray:
    """The change of each group's mean if a level of a column is left out (levels, groups)."""
    codes = labels.cat.codes.to_numpy()
    return np.stack([left.without(codes == i, member) for i in range(len(labels.cat.categories))])


def table_of(
    plan: Plan, slot: Obs | Obsm, target: str, column: int | str | None, leave_out: str, groupby: str | None
) -> Any:
    """The changes as a data frame (cells or levels x groups)."""
    import pandas as pd

    data = plan.adata
    names, member = groups_of(data, groupby, None)
    labels = None
    if leave_out != "cells":
        if leave_out not in data.obs:
            raise KeyError(
                f"leave_out={leave_out!r} is neither 'cells' nor in `adata.obs`. Available: {available(data.obs)}"
            )
        labels = data.obs[leave_out].astype("category").cat.remove_unused_categories()
    left = LeftOut(plan, slot, target, column)
    found = of_cells(left, member) if labels is None else of_levels(left, labels, member)
    index = data.obs_names.copy() if labels is None else [str(name) for name in labels.cat.categories]
    return pd.DataFrame(found, index=index, columns=[name.replace("/", "|") for name in names])


def _weighted(plan: Plan) -> tuple[Plan, list[Slot]]:
    """The plan with weights for every step that takes them, 1 where it has none; and where the weights are."""
    ones = Weights(np.ones(plan.adata.n_obs))
    steps: list[Step] = []
    sources: list[Slot] = []
    for i, step in enumerate(plan.steps):
        at = _place(step)
        if at is not None:
            reads = [*step.reads, *([None] * (at + 1 - len(step.reads)))]
            source = reads[at] or ones
            if any(w.slot == source for later in plan.steps[i:] for w in later.writes):
                raise ValueError(f"{source} is written after {step.name}, which takes it for weights")
            sources += [source] if source not in sources else []
            reads[at] = source
            step = replace(step, reads=tuple(reads))
        steps.append(step)
    return Plan(plan.adata, steps), sources


def _place(step: Step) -> int | None:
    """Which of the inputs of a step are weights of cells."""
    names = list(inspect.signature(type(step.op).__call__).parameters)
    return names.index("weights") - 1 if "weights" in names else None


def _needed(program: Program) -> list[np.ndarray]:
    """Sets of cells of which one has to stay: the root, and the terminal cells of each fate."""
    needed = []
    for i in program.active:
        step = program.plan.steps[i]
        if isinstance(step.op, ops.Pseudotime):
            needed.append(np.atleast_1d(np.asarray(read_value(step.reads[1], program.frozen))))
        elif isinstance(step.op, ops.FateProbabilities):
            codes = np.asarray(read_value(step.reads[1], program.frozen))
            needed += [np.flatnonzero(codes == fate) for fate in range(codes.max() + 1)]
    return needed


def _ends(program: Program, found: dict[Slot, Any]) -> list[int]:
    """Cells that alone are the first or last in a column of the plan: where it is scaled to its range, they set it."""
    cells: set[int] = set()
    for i in program.active:
        for slot in (w.slot for w in program.plan.steps[i].writes if isinstance(w.slot, Obs)):
            y = np.asarray(found[slot])
            finite = y[np.isfinite(y)] if y.dtype.kind == "f" else y[:0]
            for end in (finite.min(), finite.max()) if len(finite) else ():
                at = np.flatnonzero(y == end)
                cells |= {int(at[0])} if len(at) == 1 else set()
    return sorted(cells)
