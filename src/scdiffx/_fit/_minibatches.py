"""Minibatches of cells, with the cells around them where moving steps look at neighbours."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scdiffx._core.counts import BLOCK_ROWS, Counts
from scdiffx._core.devices import n_parts
from scdiffx._core.fields import replace, structural
from scdiffx._core.graph import Graph
from scdiffx._core.minibatch import widest
from scdiffx._core.section import Surroundings, rounded_up
from scdiffx._fit._objective import Part, of_cells
from scdiffx._fit._reach import Reach, pieces
from scdiffx._program import Program, read_value
from scdiffx._slots import Obsm, Slot

__all__ = ["Minibatches"]

# Of all cells; a batch that reaches more saves nothing.
_MOST = 0.5


class Minibatches:
    """Draws training cells; an epoch depends on the seed, its number and the structure at hand alone.

    Where steps look one cell at a time it is a permutation. Where they look at neighbours, the training cells are
    divided into as many pieces as there are batches, of cells that are near each other: the cells around such a batch
    are far fewer than around one drawn at random. A batch is drawn from one piece, and the pieces come in random order.
    """

    def __init__(self, program: Program, settled: list[Any], part: Part, size: int, seed: int) -> None:
        self.reach = Reach.of(program, settled, part)
        self.cells = np.flatnonzero(np.asarray(part.keep))
        if not 1 <= size <= len(self.cells):
            raise ValueError(
                f"batch_size={size!r} must lie between 1 and the number of training cells, {len(self.cells)}"
            )
        self.size, self.seed, self.n_cells = size, seed, len(part.keep)
        self.frozen = {slot: _hosted(slot, value) for slot, value in program.frozen.items()}
        self.targets = [None if target is None else _Rows(target) for target in part.targets]
        self.keep = jnp.ones(size, bool)
        self.whole = {
            i: jax.jit(settled[i].of_all)(read_value(program.plan.steps[i].reads[0], program.frozen))
            for i in self.reach.of_all
        }
        self.refresh(program, settled, part)
        room = self.around.size
        if room > max(_MOST * self.n_cells, size):
            raise ValueError(
                f"batch_size={size}: {self.reach.describe()}, so batches reach up to {room} of {self.n_cells} cells: "
                "beyond half of them little is saved. Leave batch_size out, or make it, the number of neighbours, or "
                "the steps of a walk smaller"
            )

    def refresh(self, program: Program, settled: list[Any], part: Part) -> None:
        """Take structure as it is in these operators and terms."""
        steps, active = program.plan.steps, set(program.active)
        self.ops: list[Any] = [
            _on_host(op) if i in self.reach.steps else op if i in active else None for i, op in enumerate(settled)
        ]
        self.part = part._replace(terms=[_on_host(t) if hasattr(t, "within") else t for t in part.terms])
        self.lists = [term.looked_at() for term in self.part.terms if hasattr(term, "within")]
        patterns = [p for i in self.reach.steps if (p := getattr(self.ops[i], "pattern", None)) is not None]
        patterns += [value.pattern for value in self.frozen.values() if isinstance(value, Graph)]
        self.around = Surroundings(self.n_cells, patterns)
        self.pieces: list[np.ndarray] | None = None
        if not self.reach.hops:
            self.around.resize(min(self.size * (1 + sum(a.shape[1] for a in self.lists)), self.n_cells))
            return
        slots = [slot for i in self.reach.steps for slot in steps[i].sources if isinstance(slot, Obsm)]
        near: Any = None
        for slot in slots[:1]:
            near = program.frozen[slot] if slot in program.frozen else program.values([slot])[slot]
        self.pieces = pieces(self.cells, len(self.cells) // self.size, near, patterns[0])
        most = max(len(self.around.reached(self._compared(piece), self.reach.hops)) for piece in self.pieces)
        self.around.resize(min(rounded_up(most), self.n_cells))

    def _compared(self, own: np.ndarray) -> np.ndarray:
        """The cells, and after them the others that terms compare them with."""
        if not self.lists:
            return own
        others = np.unique(np.concatenate([lists[own].ravel() for lists in self.lists]))
        return np.concatenate([own, np.setdiff1d(others[others >= 0], own)])

    def _own(self, step: int) -> np.ndarray:
        """The cells of a step's batch."""
        per_epoch = len(self.cells) // self.size
        epoch, place = divmod(step, per_epoch)
        rng = np.random.default_rng([self.seed, epoch])
        if self.pieces is None:
            order = rng.permutation(self.cells)
            return np.sort(order[place * self.size : (place + 1) * self.size])
        number = int(rng.permutation(per_epoch)[place])
        piece = np.random.default_rng([self.seed, epoch, number]).permutation(self.pieces[number])
        return np.sort(piece[: self.size])

    def draw(self, step: int) -> tuple[list[Any], dict[Slot, Any], dict[str, Part], None, Any]:
        """What the loss of a step is a function of, beside the parameters: what there is of the cells of its batch.

        Operators, frozen values, the training part, no taps, and what steps need of all cells.
        """
        own = self._own(step)
        section = self.around.section(own, self.around.reached(self._compared(own), self.reach.hops))
        ops = [op.within(section) if hasattr(op, "within") else op for op in self.ops]
        frozen = {
            slot: value.take(section.cells)
            if isinstance(value, _Rows)
            else section.graph(value)
            if isinstance(value, Graph)
            else value
            for slot, value in self.frozen.items()
        }
        terms = [term.within(section) if hasattr(term, "within") else term for term in self.part.terms]
        targets = [None if rows is None else rows.take(own) for rows in self.targets]
        return ops, frozen, {"train": Part(terms, targets, self.keep)}, None, self.whole


class _Rows:
    """A value with a row for each cell, on the host; of a sparse matrix always as many values are taken, padded."""

    def __init__(self, value: Any) -> None:
        self.sparse = isinstance(value, Counts)
        self.host = value.to_scipy() if isinstance(value, Counts) else jax.tree.map(np.asarray, value)
        self.widths: dict[int, int] = {}

    def take(self, cells: np.ndarray) -> Any:
        if not self.sparse:
            return jax.tree.map(lambda a: jnp.asarray(a[cells]), self.host)
        size = len(cells)
        if size not in self.widths:
            # No cell comes twice, so that none of the blocks is longer than one of the longest rows.
            self.widths[size] = min(widest(self.host, min(size, BLOCK_ROWS * n_parts())), self.host.nnz)
        return Counts.from_scipy(self.host[cells], longest=self.widths[size])


def _hosted(slot: Slot, value: Any) -> Any:
    if isinstance(value, Graph):
        return jax.tree.map(np.asarray, value)
    return _Rows(value) if of_cells(slot) else value


def _on_host(op: Any) -> Any:
    """The operator with its structure in host arrays."""
    return replace(op, **{name: jax.tree.map(np.asarray, getattr(op, name)) for name in structural(op)})
