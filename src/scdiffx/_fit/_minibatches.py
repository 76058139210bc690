"""Minibatches of cells for a plan whose moving steps look at one cell at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scdiffx._core.counts import Counts
from scdiffx._core.fields import structural
from scdiffx._core.graph import Graph
from scdiffx._core.minibatch import widest
from scdiffx._fit._objective import Part
from scdiffx._program import Program
from scdiffx._slots import Obs, Obsm, Slot, X

__all__ = ["Minibatches"]


class Minibatches:
    """Draws training cells: an epoch is a permutation of them that depends on the seed and its number alone."""

    def __init__(self, program: Program, settled: list[Any], part: Part, size: int, seed: int) -> None:
        _check(program, settled, part)
        self.cells = np.flatnonzero(np.asarray(part.keep))
        if not 1 <= size <= len(self.cells):
            raise ValueError(
                f"batch_size={size!r} must lie between 1 and the number of training cells, {len(self.cells)}"
            )
        self.size, self.seed, self.part = size, seed, part
        self.frozen = {
            slot: _by_rows(value, size) if _of_cells(slot) else value for slot, value in program.frozen.items()
        }
        self.of_cells = [slot for slot in program.frozen if _of_cells(slot)]
        self.targets = [None if target is None else _by_rows(target, size) for target in part.targets]
        self.keep = jnp.ones(size, bool)

    def draw(self, step: int) -> tuple[dict[Slot, Any], Part]:
        """The frozen values and the part of the loss for the cells of a step."""
        per_epoch = len(self.cells) // self.size
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.cells)
        cells = np.sort(order[place * self.size : (place + 1) * self.size])
        frozen = {slot: value(cells) if slot in self.of_cells else value for slot, value in self.frozen.items()}
        targets = [None if rows is None else rows(cells) for rows in self.targets]
        return frozen, self.part._replace(targets=targets, keep=self.keep)


def _of_cells(slot: Slot) -> bool:
    return isinstance(slot, X | Obs | Obsm)


def _by_rows(value: Any, size: int) -> Any:
    """A function that takes rows; of a sparse matrix always as many values, padded."""
    if isinstance(value, Counts):
        csr = value.to_scipy()
        width = widest(csr, size)
        # One block each, so that a batch of any rows meets the same compiled code.
        return lambda cells: Counts.from_scipy(csr[cells], longest=min(width, csr.nnz))
    host = jax.tree.map(np.asarray, value)
    return lambda cells: jax.tree.map(lambda a: jnp.asarray(a[cells]), host)


def _check(program: Program, settled: list[Any], part: Part) -> None:
    """Every step must give a cell the same result whichever cells come with it, and so must the loss."""
    steps = program.plan.steps
    whole = [
        steps[i].name
        for i in program.active
        if not (getattr(program.ops[i], "by_cell", False) or settled[i] is not program.ops[i])
    ]
    if whole:
        fine = [steps[i].name for i in program.active if steps[i].name not in whole]
        raise ValueError(
            f"batch_size cannot be used here: {whole} look at all cells at once (those that do not: {fine}). "
            "Learn only what follows them, or leave batch_size out"
        )
    for term, target in zip(part.terms, part.targets, strict=True):
        if structural(term) or isinstance(target, Graph) or getattr(term, "of_graph", False):
            raise ValueError(f"batch_size cannot be used with {type(term).__name__}: it compares each cell with others")
