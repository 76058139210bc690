"""How far the moving steps of a plan look around a cell, and batches of cells that look no farther than they must."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from scdiffx._core.fields import structural
from scdiffx._core.graph import Graph
from scdiffx._core.pattern import Pattern
from scdiffx._fit._objective import Part
from scdiffx._program import Program

__all__ = ["Reach", "pieces"]


class Reach(NamedTuple):
    """What a batch needs besides its own cells.

    `hops`: how many edges away cells matter to its loss. `steps`: the numbers of the steps that look at neighbours;
    `names`: theirs, and those of the terms that do. `of_all`: those steps that need something of all cells.
    """

    hops: int
    steps: list[int]
    names: list[str]
    of_all: list[int]

    @classmethod
    def of(cls, program: Program, settled: list[Any], part: Part) -> Reach:
        """By what operators say; a ValueError names the steps and terms that cannot be taken by minibatches.

        An operator's ``by_cell`` promises that a cell's result rests on that cell alone. ``reach(learned)`` gives, for
        each input, how many edges away what a cell's result rests on can be; of a graph, a cell's row counts as its.
        ``of_all(x)`` is what it needs of all cells, of a first input that does not move, to learn what is in
        ``of_all_for``.
        """
        plan, steps = program.plan, program.plan.steps
        rests = [i for i in program.active if settled[i] is not program.ops[i]]
        near = [i for i in program.active if i not in rests and hasattr(settled[i], "reach")]
        fine = [*rests, *near, *(i for i in program.active if getattr(settled[i], "by_cell", False))]
        if whole := [steps[i].name for i in program.active if i not in fine]:
            others = [steps[i].name for i in program.active if i in fine]
            raise ValueError(
                f"batch_size cannot be used here: {whole} look at all cells at once (those that do not: {others}). "
                "Learn only what follows them, or leave batch_size out"
            )
        _check_terms(part)
        learned: dict[int, list[str]] = {i: [] for i in program.active}
        for name in program.learned:
            i, field = program.find(name)
            learned[i].append(field)
        of_all = [i for i in near if set(learned[i]) & set(getattr(settled[i], "of_all_for", ()))]
        moved: set[Any] = set()
        for i in program.active:
            if i in of_all and set(steps[i].sources[:1]) & moved:
                fields = [f"{steps[i].name}.{field}" for field in settled[i].of_all_for]
                raise ValueError(
                    f"batch_size cannot be used here: to learn {fields}, {steps[i].name} needs the mean over all cells "
                    "of what moves. Name what else to learn, or leave batch_size out"
                )
            moved |= {write.slot for write in steps[i].writes}
        needed = {plan.slot(term.output): 0 for term in part.terms}
        for i in reversed(program.active):
            out = max((needed[w.slot] for w in steps[i].writes if w.slot in needed), default=None)
            if out is None or i in rests:
                continue
            hops = settled[i].reach(learned[i]) if i in near else (0,) * len(steps[i].reads)
            read = [hop for hop, slot in zip(hops, steps[i].reads, strict=True) if slot is not None]
            for hop, slot in zip(read, steps[i].sources, strict=True):
                needed[slot] = max(needed.get(slot, 0), out + hop)
        terms = [type(term).__name__ for term in part.terms if hasattr(term, "within")]
        return cls(max(needed.values()), near, [steps[i].name for i in near] + terms, of_all)

    def describe(self) -> str:
        """For messages."""
        away = f", and what a cell gets rests on cells up to {self.hops} edges away" if self.hops else ""
        return f"{self.names} look at other cells{away}"


def _check_terms(part: Part) -> None:
    for term, target in zip(part.terms, part.targets, strict=True):
        graph = isinstance(target, Graph) or getattr(term, "of_graph", False)
        if graph or (structural(term) and not hasattr(term, "within")):
            reason = "it is a sum over all edges" if graph else "it compares each cell with others"
            raise ValueError(f"batch_size cannot be used with {type(term).__name__}: {reason}, not a mean over cells")


def pieces(cells: np.ndarray, count: int, near: Any, pattern: Pattern) -> list[np.ndarray]:
    """The cells in so many pieces of about equal size (the smallest has the `count`-th part, rounded down).

    They are halved again and again across the longest axis of `near` (cells, dims), coordinates of all cells by which
    neighbours are near each other; without these, the pattern's order is cut.
    """
    if near is None:
        order = np.asarray(pattern.order)
        return np.array_split(order[np.isin(order, cells)], count)
    z = np.asarray(near, np.float64)
    found = []
    rest = [(cells, count)]
    while rest:
        part, number = rest.pop()
        if number == 1:
            found.append(part)
            continue
        centred = z[part] - z[part].mean(0)
        along = centred @ np.linalg.eigh(centred.T @ centred)[1][:, -1]
        order, cut = np.argsort(along, kind="stable"), len(part) * (number // 2) // number
        rest += [(part[order[:cut]], number // 2), (part[order[cut:]], number - number // 2)]
    return found
