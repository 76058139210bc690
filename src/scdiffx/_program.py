"""A plan made ready for differentiation: operators with their structure, frozen inputs, and a pure function of both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scdiffx._core.fields import learnables, number_stays, replace, structural
from scdiffx._slots import Part, Slot
from scdiffx._steps import Plan, _cast, restructured

__all__ = ["Program", "parameter_names", "select"]

Params = dict[str, Any]


@dataclass
class Program:
    """The part of a plan that depends on what is learned.

    ``ops`` are all operators as initialised; ``learned`` the names of the parameters that move; ``active`` the
    positions that are evaluated anew; ``frozen`` the values that the active steps read from elsewhere; ``found`` what
    the plan's own run made of every slot, or will make when asked.
    """

    plan: Plan
    ops: list[Any]
    learned: list[str]
    active: list[int]
    frozen: dict[Slot, Any]
    dtype: Any = jnp.float32
    found: dict[Slot, Any] = field(default_factory=dict)

    @classmethod
    def build(cls, plan: Plan, learn: str | Iterable[str] | None = None, dtype: Any = jnp.float32) -> Program:
        """Run the plan once. Only what follows a learned parameter is evaluated later; the rest is frozen.

        In double precision, call this and all that follows inside of ``jax.enable_x64(True)``.
        """
        if not plan.steps:
            raise ValueError("the plan is empty: call functions of `sd.pp` and `sd.tl` on it first")
        # The plan starts as it would without the scope of double precision, in which its steps decide by their inputs.
        with jax.enable_x64(False) if dtype == jnp.float64 else contextlib.nullcontext():
            ops, inputs, values = plan.run(lazily=dtype == jnp.float32)
        ops = [_cast(op, dtype) for op in ops]
        learned = select(parameter_names(plan, ops), learn)
        if not learned:
            raise ValueError("nothing to learn: no step of the plan has a learnable parameter")
        active = _active(plan, learned)
        return cls(plan, ops, learned, active, _frozen(plan, active, inputs, values, dtype), dtype, values)

    @classmethod
    def between(
        cls, plan: Plan, source: Slot | Sequence[Slot], target: Slot, double: bool | None = None
    ) -> tuple[Program, dict[Slot, Any]]:
        """The part of a plan that leads from slots, as their last writers leave them, to a target; and all values.

        Nothing is learned in it: the sources are among the frozen values. Floats are double where a source is, unless
        `double` says.
        """
        sources = [source] if isinstance(source, Slot) else list(source)
        active = leading(plan, sources, target)
        if not active:
            raise ValueError(f"{target} does not depend on {sources[0]} through a step of the plan")
        ops, inputs, values = plan.run()
        found = inputs | values
        if double is None:
            double = any(found[slot].dtype == np.float64 for slot in sources if slot in found)
        with jax.enable_x64(True) if double else contextlib.nullcontext():
            dtype = jnp.float64 if double else jnp.float32
            ops = [_cast(op, dtype) for op in ops]
            return cls(plan, ops, [], active, _frozen(plan, active, inputs, values, dtype)), found

    @classmethod
    def towards(cls, plan: Plan, target: Slot, knobs: str | Iterable[str] | None = None) -> Program:
        """The part of a plan that leads from parameters that are single numbers to a target.

        These are all on which the target depends, or the `knobs`, which may be names of steps. Floats are double, and
        the numbers arrays.
        """
        ops, inputs, values = plan.run()
        known = parameter_names(plan, ops)
        owners = {step.name: op for step, op in zip(plan.steps, ops, strict=True)}
        numbers = [name for name in known if _is_number(owners[name.rsplit(".", 1)[0]], name.rsplit(".", 1)[1])]
        last = max(i for i, step in enumerate(plan.steps) if any(w.slot == target for w in step.writes))
        learned = [name for name in numbers if last in _resting(plan, _active(plan, [name]), {target})]
        if knobs is not None:
            asked = [knobs] if isinstance(knobs, str) else list(knobs)
            chosen = select(known, asked, "knobs")
            for name in (name for name in chosen if name in asked and name not in learned):
                reason = "does not lead to the target" if name in numbers else "is not a single number"
                raise ValueError(f"knobs={name!r} {reason}. Available: {learned}")
            learned = [name for name in chosen if name in learned]
        if not learned:
            raise ValueError(f"no parameter that is a single number leads to {target}. Parameters: {known}")
        active = _resting(plan, _active(plan, learned), {target})
        with jax.enable_x64(True):
            ops = [_cast(op, jnp.float64) for op in ops]
            program = cls(plan, ops, learned, active, _frozen(plan, active, inputs, values, jnp.float64))
            for name in learned:
                i, field = program.find(name)
                ops[i] = replace(ops[i], **{field: jnp.asarray(getattr(ops[i], field), jnp.float64)})
        return program

    def start(self) -> Params:
        """The learned parameters at their current values, in unconstrained space."""
        params = {}
        for name in self.learned:
            i, field = self.find(name)
            to_real = learnables(self.ops[i])[field].to_real
            value = getattr(self.ops[i], field)
            params[name] = jax.tree.map(lambda v, to_real=to_real: to_real(jnp.asarray(v, self.dtype)), value)
        return params

    def find(self, name: str) -> tuple[int, str]:
        """The step of a parameter, by number, and the field."""
        step, field = name.rsplit(".", 1)
        return next(i for i, s in enumerate(self.plan.steps) if s.name == step), field

    def with_params(self, params: Params, ops: list[Any] | None = None) -> list[Any]:
        """The operators with the learned parameters in place."""
        ops = list(self.ops if ops is None else ops)
        for name, value in params.items():
            i, field = self.find(name)
            from_real = learnables(ops[i])[field].from_real
            ops[i] = replace(ops[i], **{field: jax.tree.map(from_real, value)})
        return ops

    def evaluate(
        self,
        ops: list[Any],
        frozen: Mapping[Slot, Any],
        taps: Mapping[int, Mapping[Slot, Any]] | None = None,
        whole: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> dict[Slot, Any]:
        """All values after the active steps; pure.

        `taps` are added to the outputs of each step. `whole` holds arguments by name for those steps that need
        something of all cells where the frozen values are of some.
        """
        values = dict(frozen)
        for i in self.active:
            step = self.plan.steps[i]
            known = {} if whole is None else whole.get(i, {})
            result = ops[i](*(read_value(slot, values) for slot in step.reads), **known)
            for slot, value in step.outputs(ops[i], result).items():
                values[slot] = value if taps is None else _tapped(value, taps[i][slot])
        return values

    def outputs_by_step(self, ops: list[Any], frozen: Mapping[Slot, Any]) -> dict[int, dict[Slot, list[Any]]]:
        """The floating leaves of every output of every active step."""
        values, found = dict(frozen), {}
        for i in self.active:
            step = self.plan.steps[i]
            outputs = step.outputs(ops[i], ops[i](*(read_value(slot, values) for slot in step.reads)))
            values.update(outputs)
            found[i] = {slot: [x for x in jax.tree.leaves(v) if _is_float(x)] for slot, v in outputs.items()}
        return found

    def refreshed(self, params: Params) -> Program:
        """The program with discrete structure found anew at the given parameters."""
        ops = self.with_params(params)
        for name in self.learned:
            i, field = self.find(name)
            alike = jax.tree.map(number_stays, getattr(self.ops[i], field), getattr(ops[i], field))
            ops[i] = replace(ops[i], **{field: alike})
        used, inputs, values = self.plan.run(ops=ops, prepare=restructured, lazily=True)
        used = [_cast(op, jnp.float32) for op in used]
        frozen = _frozen(self.plan, self.active, inputs, values)
        return Program(self.plan, used, self.learned, self.active, frozen, found=values)

    def values(self, wanted: Iterable[Slot]) -> dict[Slot, Any]:
        """What :meth:`evaluate` gives for some slots at the operators as they are, from the run that initialised them.

        Steps that prepare nothing and lead to none of these slots have not been run.
        """
        moved = self._moved()
        return {slot: _cast(self.found[slot], self.dtype) if slot in moved else self.frozen[slot] for slot in wanted}

    @property
    def written(self) -> set[Slot]:
        """The slots that every evaluation has a value for."""
        return self._moved() | set(self.frozen)

    def _moved(self) -> set[Slot]:
        return {w.slot for i in self.active for w in self.plan.steps[i].writes}

    def settled(self) -> list[Any]:
        """The operators, with what does not move during a fit computed once where an operator can hold it.

        An operator's optional ``settled(*args)`` returns such a copy; its inputs must not depend on what is learned.
        """
        moving: set[Slot] = set()
        ops = list(self.ops)
        for i in self.active:
            step = self.plan.steps[i]
            settle = getattr(ops[i], "settled", None)
            if settle is not None and not moving & set(step.sources):
                ops[i] = settle(*(read_value(slot, self.frozen) for slot in step.reads))
            moving |= {w.slot for w in step.writes}
        return ops

    @property
    def has_structure(self) -> bool:
        """Whether an active step holds structure that a refresh would find anew."""
        return any(structural(self.ops[i]) for i in self.active)

    def first_not_finite(self, params: Params) -> str:
        """The name of the first step whose output is NaN, for error messages."""
        ops, values = self.with_params(params), dict(self.frozen)
        for i in self.active:
            step = self.plan.steps[i]
            result = ops[i](*(read_value(slot, values) for slot in step.reads))
            outputs = step.outputs(ops[i], result)
            values.update(outputs)
            leaves = [x for x in jax.tree.leaves(outputs) if _is_float(x)]
            if any(bool(jnp.isnan(x).any()) for x in leaves):
                return step.name
        return "the derivative of a later step or the loss"


def _is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating))


def _is_number(op: Any, field: str) -> bool:
    leaves = jax.tree.leaves(getattr(op, field))
    return len(leaves) == 1 and np.ndim(leaves[0]) == 0


def _tapped(value: Any, taps: list[Any]) -> Any:
    """Add one tap to each floating leaf."""
    leaves, tree = jax.tree.flatten(value)
    rest = iter(taps)
    return jax.tree.unflatten(tree, [x + next(rest) if _is_float(x) else x for x in leaves])


def read_value(slot: Slot | None, values: Mapping[Slot, Any]) -> Any:
    """The value of a slot among those of a program."""
    if slot is None:
        return None
    return slot.take(read_value(slot.of, values)) if isinstance(slot, Part) else values[slot]


def _active(plan: Plan, learned: Iterable[str]) -> list[int]:
    owners = {name.rsplit(".", 1)[0] for name in learned}
    return _touched(plan, 0, set(), owners)[0]


def leading(plan: Plan, sources: Sequence[Slot], target: Slot) -> list[int]:
    """The steps through which the target depends on the sources, as their last writers leave them."""
    last = max((i for i, s in enumerate(plan.steps) for w in s.writes if w.slot in sources), default=-1)
    touched, moving = _touched(plan, last + 1, set(sources), set())
    return _resting(plan, touched, {target} & moving)


def _touched(plan: Plan, first: int, moving: set[Slot], owners: set[str]) -> tuple[list[int], set[Slot]]:
    """The steps from `first` on that move because they are owners or read what moves, and all that moves at the end."""
    touched = []
    for i, step in enumerate(plan.steps[first:], start=first):
        written = {w.slot for w in step.writes}
        if step.name in owners or moving & set(step.sources):
            touched.append(i)
            moving = moving | written
        else:
            moving = moving - written
    return touched, moving


def _resting(plan: Plan, touched: list[int], needed: set[Slot]) -> list[int]:
    """Those of the steps on which slots rest, as the last of them leaves them."""
    active = []
    for i in reversed(touched):
        step = plan.steps[i]
        if needed & {w.slot for w in step.writes}:
            active.append(i)
            needed = (needed - {w.slot for w in step.writes}) | set(step.sources)
    return active[::-1]


def _frozen(
    plan: Plan, active: list[int], inputs: dict[Slot, Any], values: dict[Slot, Any], dtype: Any = jnp.float32
) -> dict[Slot, Any]:
    """What the active steps read that no active step before them writes, as it stood when they ran."""
    frozen: dict[Slot, Any] = {}
    written: set[Slot] = set()
    for i in active:
        for slot in plan.steps[i].sources:
            if slot not in written and slot not in frozen:
                frozen[slot] = _value_before(plan, i, slot, inputs, values, dtype)
        written |= {w.slot for w in plan.steps[i].writes}
    return frozen


def _value_before(plan: Plan, i: int, slot: Slot, inputs: dict[Slot, Any], values: dict[Slot, Any], dtype: Any) -> Any:
    before = any(w.slot == slot for s in plan.steps[:i] for w in s.writes)
    if not before:
        return _cast(inputs[slot], dtype)
    later = any(w.slot == slot for s in plan.steps[i:] for w in s.writes)
    if later:
        raise ValueError(f"{slot} is written both before and after the learned steps; use `key_added` or a layer")
    return _cast(values[slot], dtype)


def parameter_names(plan: Plan, ops: list[Any]) -> list[str]:
    """All learnable parameters of a plan, as "step.field"."""
    return [f"{step.name}.{field}" for step, op in zip(plan.steps, ops, strict=True) for field in learnables(op)]


def select(available: list[str], wanted: str | Iterable[str] | None, argument: str = "learn") -> list[str]:
    """The parameters that an argument means: names of steps or "step.field"."""
    if wanted is None:
        return available
    chosen = []
    for name in [wanted] if isinstance(wanted, str) else list(wanted):
        matches = [a for a in available if a == name or a.rsplit(".", 1)[0] == name]
        if not matches:
            raise ValueError(f"{argument}={name!r} names no learnable parameter. Available: {available}")
        chosen += [m for m in matches if m not in chosen]
    return chosen


def norm(tree: Any) -> float:
    """Euclidean norm over all floating leaves, in float64."""
    leaves = [
        np.asarray(x, np.float64) for x in jax.tree.leaves(tree) if getattr(x, "dtype", None) != jax.dtypes.float0
    ]
    return float(np.sqrt(sum((x**2).sum() for x in leaves)))
