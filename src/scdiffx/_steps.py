"""Steps join an operator to the slots it reads and writes; plans record steps; `apply` runs a step on an AnnData."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scdiffx._core.counts import Streamed
from scdiffx._core.devices import readable
from scdiffx._core.fields import called, replace, structural
from scdiffx._core.random import as_key
from scdiffx._core.runtime import one_blas_thread
from scdiffx._log import Timer
from scdiffx._signatures import complete
from scdiffx._slots import (
    Obs,
    Obsm,
    Part,
    Slot,
    Uns,
    Var,
    X,
    available,
    check_history,
    record,
    write_all,
)

__all__ = [
    "Plan",
    "Step",
    "Write",
    "apply",
    "host_outputs",
    "initialised",
    "restructured",
    "run_step",
]


class Write(NamedTuple):
    """An output: where it goes, how it is taken from the operator and its result, and its dtype in the AnnData."""

    slot: Any
    extract: Callable[[Any, Any], Any]
    dtype: Any = None


def _nothing(op: Any, result: Any, args: tuple[Any, ...]) -> Mapping[Slot, Any]:
    return {}


@dataclass(frozen=True)
class Step:
    """An operator with the slots it reads (None for an absent optional input) and the outputs it writes.

    `notes` yields bookkeeping that only an AnnData needs (parameters in `uns`); `check` looks at the result before
    anything is written. ``precise=True`` computes in float64 when run on an AnnData, whatever the input;
    ``compiled=False`` leaves compilation to the operator's own parts, where several operators share a long one.
    """

    name: str
    op: Any
    reads: tuple[Slot | None, ...]
    writes: tuple[Write, ...]
    message: str = ""
    notes: Callable[[Any, Any, tuple[Any, ...]], Mapping[Slot, Any]] = _nothing
    check: Callable[[Any, Any], None] = lambda op, result: None
    precise: bool = False
    compiled: bool = True
    rng: Any = 0

    @property
    def sources(self) -> list[Slot]:
        """The slots that the step reads, whole ones in place of their parts."""
        return [slot.of if isinstance(slot, Part) else slot for slot in self.reads if slot is not None]

    def outputs(self, op: Any, result: Any) -> dict[Slot, Any]:
        """The differentiable outputs by slot; an operator may leave out (None) what it cannot make here."""
        found = {w.slot: w.extract(op, result) for w in self.writes}
        return {slot: value for slot, value in found.items() if value is not None}


def _cast(tree: Any, dtype: Any) -> Any:
    def leaf(x: Any) -> Any:
        if isinstance(x, Streamed):
            return x.astype(dtype)
        return jnp.asarray(x, dtype) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)


def _is_double(tree: Any) -> bool:
    return any(getattr(x, "dtype", None) == np.float64 for x in jax.tree.leaves(tree))


def initialised(op: Any, args: tuple[Any, ...], key: Any) -> Any:
    """The operator with its buffers and networks filled from data, if it has any to fill."""
    init = getattr(op, "init", None)
    return op if init is None else init(*args, key=key)


def restructured(op: Any, args: tuple[Any, ...], key: Any) -> Any:
    """The operator with its discrete structure found anew; everything estimated once stays."""
    names = structural(op)
    if not names:
        return op
    fresh = op.init(*args, key=key)
    return replace(op, **{name: getattr(fresh, name) for name in names})


def run_step(
    step: Step, args: tuple[Any, ...], *, op: Any = None, prepare: Callable[..., Any] = initialised
) -> tuple[Any, Any]:
    """Prepare the operator and call it; returns the operator as called and its result."""
    double = step.precise or _is_double(args)
    with jax.enable_x64(True) if double else contextlib.nullcontext():
        if double:
            args = _cast(args, jnp.float64)
        with one_blas_thread():
            op = prepare(step.op if op is None else op, args, as_key(step.rng))
            # What is streamed is read from the host between compiled parts.
            whole = step.compiled and not any(isinstance(arg, Streamed) for arg in args)
            return op, readable(jax.block_until_ready(called(op, *args) if whole else op(*args)))


def _to_host(adata: Any, write: Write, value: Any, single: bool) -> Any:
    host = write.slot.host(adata, value)
    dtype = write.dtype
    if dtype is None and single and getattr(host, "dtype", None) == np.float64:
        dtype = np.float32
    return host if dtype is None else host.astype(dtype)


def host_outputs(adata: Any, step: Step, op: Any, result: Any, args: tuple[Any, ...]) -> dict[Slot, Any]:
    """Everything the step writes to an AnnData, as host values."""
    step.check(op, result)
    single = not _is_double(args)
    found = step.outputs(op, result)
    values = {w.slot: _to_host(adata, w, found[w.slot], single) for w in step.writes if w.slot in found}
    return values | dict(step.notes(op, result, args))


class Values(dict[Slot, Any]):
    """What steps made of slots; `rest` runs those that were left for later, one after the other."""

    rest: Iterator[None] = iter(())

    def __missing__(self, slot: Slot) -> Any:
        for _ in self.rest:
            if slot in self:
                return self[slot]
        raise KeyError(slot)


@dataclass
class Plan:
    """The calls of a workflow, recorded instead of run; `sd.pp` and `sd.tl` take it in place of an AnnData."""

    adata: Any
    steps: list[Step] = field(default_factory=list)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def add(self, step: Step) -> None:
        """Append a step; a second use of the same name is numbered."""
        names = {s.name for s in self.steps}
        name, count = step.name, 2
        while name in names:
            name, count = f"{step.name}_{count}", count + 1
        for slot in step.reads:
            if slot is not None and not self.has(slot):
                raise KeyError(
                    f"{step.name} reads {slot}, which neither the AnnData nor an earlier step of the plan provides"
                )
            if isinstance(slot, X) and not self.writes(slot) and slot.is_lazy(self.adata):
                raise TypeError(
                    f"{step.name} reads {slot}, which is not in memory, as a plan needs it to be: plan on some of the "
                    "genes or cells, `sd.plan(adata[:, genes].to_memory())`"
                )
        self.steps.append(step if name == step.name else _renamed(step, name))

    def writes(self, slot: Slot) -> bool:
        """Whether a step of the plan writes the slot."""
        return any(w.slot == slot for s in self.steps for w in s.writes)

    def has(self, slot: Slot) -> bool:
        """Whether the slot can be read: written by a step, or present in the AnnData."""
        if isinstance(slot, Part):
            return self.has(slot.of)
        return self.writes(slot) or slot.exists(self.adata)

    def slot(self, name: str) -> Slot:
        """The slot that a name in a loss means: an output of the plan first; obs, obsm and var before layers."""
        outputs = [w.slot for s in self.steps for w in s.writes]
        places = (Obs(name), Obsm(name), Var(name), X(name))
        for candidate in (*places, Uns(name)):
            if candidate in outputs:
                return outputs[outputs.index(candidate)]
        for place in places:
            if place.exists(self.adata):
                return place
        named = {getattr(s, "key", "") for s in outputs if isinstance(s, Obs | Obsm | Var | Uns)}
        names = sorted(named | {s.layer for s in outputs if isinstance(s, X) and s.layer is not None})
        raise KeyError(
            f"{name!r} is neither an output of the plan {available(names)} nor a key of the AnnData; "
            f"obs: {available(self.adata.obs)}, obsm: {available(self.adata.obsm.keys())}"
        )

    def run(
        self,
        *,
        ops: list[Any] | None = None,
        prepare: Callable[..., Any] = initialised,
        on_result: Callable[[Step, Any, Any, tuple[Any, ...]], None] | None = None,
        lazily: bool = False,
    ) -> tuple[list[Any], dict[Slot, Any], dict[Slot, Any]]:
        """Run all steps in order; returns the operators as used, the slots read from the AnnData, and all values.

        With `lazily` the last steps, those after which no operator has anything to prepare, run when one of their
        values is asked for.
        """
        inputs: dict[Slot, Any] = {}
        values = Values()
        used = [step.op for step in self.steps] if ops is None else list(ops)

        def run(number: int) -> None:
            step = self.steps[number]
            with jax.enable_x64(True):
                args = tuple(self._value(slot, inputs, values) for slot in step.reads)
            op, result = run_step(step, args, op=used[number], prepare=prepare)
            if on_result is not None:
                on_result(step, op, result, args)
            used[number] = op
            for slot, value in step.outputs(op, result).items():
                values[slot] = value if _is_double(args) else _cast(value, jnp.float32)

        last = self._prepared_by(used) if lazily else len(used)
        for number in range(last):
            run(number)
        # What the steps left for later read from the AnnData is among the inputs all the same.
        written: set[Slot] = set()
        for step in self.steps[last:]:
            with jax.enable_x64(True):
                for slot in set(step.sources) - written:
                    self._value(slot, inputs, values)
            written |= {w.slot for w in step.writes}
        values.rest = map(run, range(last, len(used)))
        return used, inputs, values

    def _prepared_by(self, ops: list[Any]) -> int:
        """The number of steps after which no operator has anything to prepare, and none changes what others wrote."""
        last = max((i + 1 for i, op in enumerate(ops) if hasattr(op, "init")), default=0)
        slots = [[w.slot for step in part for w in step.writes] for part in (self.steps[:last], self.steps[last:])]
        return len(ops) if set(slots[0]) & set(slots[1]) or len(set(slots[1])) < len(slots[1]) else last

    def _value(self, slot: Slot | None, inputs: dict[Slot, Any], values: dict[Slot, Any]) -> Any:
        if slot is None:
            return None
        if isinstance(slot, Part):
            return slot.take(self._value(slot.of, inputs, values))
        if slot in values:
            return values[slot]
        if slot not in inputs:
            inputs[slot] = slot.read(self.adata)
        return inputs[slot]

    def apply(
        self,
        *,
        ops: list[Any] | None = None,
        prepare: Callable[..., Any] = initialised,
        copy: bool = False,
        called: list[tuple[str, dict[str, Any]]] | None = None,
    ) -> Any:
        """Run the plan on its AnnData and write every step's keys, all at the end.

        The history receives the calls of the plan, or those given as `called`.
        """
        check_history(self.adata)
        outputs: dict[Slot, Any] = {}

        def collect(step: Step, op: Any, result: Any, args: tuple[Any, ...]) -> None:
            outputs.update(host_outputs(self.adata, step, op, result, args))

        self.run(ops=ops, prepare=prepare, on_result=collect)
        target = self.adata.copy() if copy else self.adata
        write_all(target, outputs)
        record(target, [(name, complete(name, given)) for name, given in self.calls] if called is None else called)
        return target if copy else None


def _renamed(step: Step, name: str) -> Step:
    from dataclasses import replace as changed

    return changed(step, name=name)


def apply(target: Any, step: Step, *, copy: bool = False) -> Any:
    """Record the step on a plan, or run it on an AnnData and write what it computed, all at once."""
    if isinstance(target, Plan):
        target.add(step)
        return None
    for write in step.writes:
        if isinstance(write.slot, X):
            write.slot.check_writable(target)
    timer = Timer(step.message or f"computing {step.name}")
    # Outside this scope JAX would cut float64 data to float32 as they enter.
    with jax.enable_x64(True):
        args = tuple(None if slot is None else slot.read(target) for slot in step.reads)
    op, result = run_step(step, args)
    outputs = host_outputs(target, step, op, result, args)
    adata = target.copy() if copy else target
    write_all(adata, outputs)
    timer.done(", ".join(repr(getattr(slot, "key", slot)) for slot in outputs))
    return adata if copy else None
