"""A loss made ready for a plan: what its terms read, what they compare it with, and on which cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from scdiffx._core.counts import dense
from scdiffx._core.fields import learnables, replace, structural
from scdiffx._slots import Connectivities, Obs, Obsm, Slot, X
from scdiffx._steps import Plan, _cast, initialised, restructured
from scdiffx.losses import Loss

__all__ = ["Objective", "Part", "check_arguments", "labels_of", "of_cells", "parts_of"]


# The values of the slots that are asked for.
ValuesOf = Callable[[Iterable[Slot]], Mapping[Slot, Any]]


class Part(NamedTuple):
    """What travels into compiled code: terms with what they hold, their targets (None: a value of the plan), the cells.

    As constants these would be folded while compiling.
    """

    terms: list[Any]
    targets: list[Any]
    keep: Bool[Array, " cells"]


class Objective:
    """A loss on a plan; `written` are the slots whose values every evaluation has."""

    def __init__(self, loss: Loss, plan: Plan, written: Iterable[Slot]) -> None:
        self.plan = plan
        self.written = set(written)
        self.weights = [weight for weight, _ in loss.terms]
        self.terms = [term for _, term in loss.terms]
        self.slots = [plan.slot(term.output) for term in self.terms]

    def prepared(self, values: ValuesOf, keep: Any) -> Part:
        """Terms with readouts and neighbours found at these values, among the cells to `keep`."""
        targets = [self._target(term) for term in self.terms]
        part = Part(self.terms, targets, jnp.asarray(keep))
        return part._replace(terms=self._each(part, values(self.needed), initialised))

    def restructured(self, part: Part, values: Mapping[Slot, Any], at: Part) -> Part:
        """The part with discrete structure found anew, among the cells of `at`."""
        return part._replace(terms=self._each(part._replace(keep=at.keep), values, restructured))

    def has_structure(self, part: Part) -> bool:
        return any(structural(term) for term in part.terms)

    def _each(self, part: Part, values: Mapping[Slot, Any], prepare: Callable[..., Any]) -> list[Any]:
        for term, slot in zip(self.terms, self.slots, strict=True):
            if slot not in self.written:
                raise ValueError(f"no learned parameter affects {term.output!r}: the loss cannot be lowered through it")
        both = zip(part.terms, self.slots, part.targets, strict=True)
        return [prepare(term, (values.get(slot), target, part.keep), None) for term, slot, target in both]

    @property
    def needed(self) -> set[Slot]:
        """The slots whose values terms are prepared by."""
        return {slot for term, slot in zip(self.terms, self.slots, strict=True) if hasattr(term, "init")}

    def value(self, values: Mapping[Slot, Any], part: Part, readouts: list[dict[str, Any]] | None = None) -> Any:
        """The weighted sum of the terms; pure."""
        terms = part.terms
        if readouts is not None:
            terms = [replace(term, **own) for term, own in zip(terms, readouts, strict=True)]
        total = 0.0
        for weight, term, slot, target in zip(self.weights, terms, self.slots, part.targets, strict=True):
            graph = _graph_of(term)
            other = target if graph is None else values.get(graph, target)
            # Of a batch with the cells around it, which follow, only terms that look at others take all.
            value = values[slot] if hasattr(term, "within") else _first(values[slot], slot, len(part.keep))
            total = total + weight * term(value, other, part.keep)
        return total

    @staticmethod
    def readouts(part: Part) -> list[dict[str, Any]]:
        """What the terms themselves learn."""
        return [{name: getattr(term, name) for name in learnables(term)} for term in part.terms]

    def _target(self, term: Any) -> Any:
        """What a term compares with: a graph, a matrix of counts, or a column of obs (as codes, -1 for missing)."""
        name, adata = term.target, self.plan.adata
        graph = _graph_of(term)
        if graph is not None:
            if graph in self.written:
                return None
            return _cast(self.plan.run()[2][graph] if self.plan.writes(graph) else graph.read(adata), jnp.float32)
        if getattr(term, "of_matrix", False):
            return _cast(X(name, counts=True).read(adata), jnp.float32)
        if name is None:
            return None
        slot = Obs(name)
        if not slot.exists(adata):
            raise KeyError(f"the target {name!r} is not in `adata.obs`. Available: {list(adata.obs)[:20]}")
        return _column(term, adata)


def _column(term: Any, adata: Any) -> Any:
    slot = Obs(term.target)
    return slot.numbers(adata) if getattr(term, "of_numbers", False) else slot.read(adata)


def parts_of(
    loss: Loss, split: Any, plan: Plan, written: Iterable[Slot], values: ValuesOf
) -> tuple[dict[str, Objective], dict[str, Part]]:
    """What each part of a split is judged by, and its terms and cells: "train", and "holdout" and "test" where given.

    Parts of cells are judged by the training loss and share its terms.
    """
    main = Objective(loss, plan, written)
    objectives, parts = {"train": main}, {"train": main.prepared(values, split.train)}
    for name in ("holdout", "test"):
        by = getattr(split, name)
        if isinstance(by, Loss):
            objectives[name] = Objective(by, plan, written)
            parts[name] = objectives[name].prepared(values, split.train)
        elif by is not None:
            objectives[name] = main
            parts[name] = parts["train"]._replace(keep=jnp.asarray(by))
    return objectives, parts


def check_arguments(plan: Any, loss: Any, **counts: int | None) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"`plan` must come from `sd.plan(adata)`, got {type(plan).__name__}")
    if not isinstance(loss, Loss):
        raise TypeError(f"`loss` must come from `sd.losses`, got {type(loss).__name__}")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r} must be at least 1")


def of_cells(slot: Slot) -> bool:
    """Whether a slot has a row for each cell."""
    return isinstance(slot, X | Obs | Obsm)


def _first(value: Any, slot: Slot, count: int) -> Any:
    return dense(value)[:count] if of_cells(slot) and value.shape[0] > count else value


def _graph_of(term: Any) -> Connectivities | None:
    """The graph that a term of a loss compares with, if it is one that does."""
    return Connectivities(term.target) if getattr(term, "of_graph", False) else None


def labels_of(loss: Loss, adata: Any) -> tuple[Any, np.ndarray] | None:
    """The first term that compares with a column of obs, and the column as read (NaN or -1: unknown)."""
    for _, term in loss.terms:
        of_column = not any(getattr(term, kind, False) for kind in ("of_graph", "of_matrix", "of_pairs"))
        if of_column and term.target is not None and Obs(term.target).exists(adata):
            return term, np.asarray(_column(term, adata))
    return None
