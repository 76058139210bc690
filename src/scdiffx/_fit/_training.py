"""The loop of a fit: compiled steps over all cells or minibatches, what is kept, and what is adopted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scdiffx._core.fields import learnables
from scdiffx._fit._checkpoint import Checkpoint
from scdiffx._fit._minibatches import Minibatches
from scdiffx._fit._objective import Objective, Part, parts_of
from scdiffx._fit._split import Split, blind
from scdiffx._log import progress_bar
from scdiffx._program import Program
from scdiffx._slots import Obsm
from scdiffx.losses import Loss

__all__ = ["Loop", "Outcome", "Run"]

LEARNING_RATE = 0.02
# How often a fit without refreshes looks at all cells (with minibatches) and saves its state.
EVERY = 25

Params = dict[str, Any]
Parts = dict[str, Part]


class Loop(NamedTuple):
    """How to optimise; see `scdiffx.fit`."""

    optimizer: Any
    n_steps: int
    refresh_every: int
    patience: int | None
    batch_size: int | None
    schedules: Mapping[str, Callable[[int], Any]]
    seed: int
    progress: bool


class Outcome(NamedTuple):
    """What a fit found: the parameters to keep, the program with structure at them, losses before and after."""

    params: Params
    program: Program
    losses: dict[str, float]
    adopted: bool


class Run:
    """One optimisation: the objectives, and the compiled functions of parameters and data.

    The parts are "train", and where there are such cells or losses "holdout" and "test". Those that judge by the
    training loss share its terms and readouts.
    """

    def __init__(self, program: Program, loss: Loss, split: Split) -> None:
        self.program = program
        self._values = jax.jit(program.evaluate)
        self.objectives, self.given = parts_of(loss, split, program.plan, program.written, program.values)
        for name, objective in self.objectives.items():
            if objective is not self.objectives["train"]:
                _without_readout(name, self.given[name])
        # The first table that the unfitted plan makes of the cells, for predictions of the same labels.
        written = [w.slot for step in program.plan.steps for w in step.writes if isinstance(w.slot, Obsm)]
        tables = program.values([slot for slot in written if slot in program.written][:1])
        self.embedding: np.ndarray | None = next((np.asarray(table) for table in tables.values()), None)
        self.blind = blind(split, loss, program.plan.adata)
        self.start: Params = {"plan": program.start(), "loss": Objective.readouts(self.given["train"])}
        self._step = jax.jit(jax.value_and_grad(self._losses, has_aux=True))
        self.judged = jax.jit(lambda *args: self._losses(*args)[1])
        self.settled = program.settled()

    @property
    def alike(self) -> bool:
        """Whether all parts are cells judged by the training loss, so that judging one more costs a step nothing."""
        return all(objective is self.objectives["train"] for objective in self.objectives.values())

    @property
    def chooser(self) -> str:
        """The part by which parameters are chosen."""
        return "holdout" if "holdout" in self.given else "train"

    def _losses(
        self, params: Params, ops: list[Any], frozen: Any, given: Parts, taps: Any = None, whole: Any = None
    ) -> tuple[Any, Any]:
        values = self.program.evaluate(self.program.with_params(params["plan"], ops), frozen, taps, whole)
        found = {}
        for name, part in given.items():
            objective = self.objectives[name]
            own = params["loss"] if objective is self.objectives["train"] else None
            found[name] = objective.value(values, part, own)
        return found["train"], found

    def judged_with(self, params: Params, taps: Any, ops: list[Any], frozen: Any, given: Parts) -> Any:
        """The training loss with `taps` added to the outputs of the steps."""
        return self._losses(params, ops, frozen, given, taps)[0]

    def refreshed(self, program: Program, params: Params, given: Parts) -> tuple[Program, Parts]:
        """The program and the parts with discrete structure found anew."""
        anew = program.has_structure
        if anew:
            program = program.refreshed(params["plan"])
        if any(self.objectives[name].has_structure(part) for name, part in given.items()):
            # A refresh has run the plan at these parameters.
            if anew:
                values = program.values(set().union(*(o.needed for o in self.objectives.values())))
            else:
                values = self._values(program.with_params(params["plan"]), program.frozen)
            found: dict[int, Part] = {}
            for name, part in given.items():
                objective = self.objectives[name]
                if id(objective) not in found:
                    found[id(objective)] = objective.restructured(part, values, given["train"])
            given = {n: p._replace(terms=found[id(self.objectives[n])].terms) for n, p in given.items()}
        return program, given

    def optimise(self, how: Loop, checkpoint: Checkpoint | None) -> tuple[dict[str, list[float]], Params]:
        """The history, and the best iterate by the chooser."""
        return _Descent(self, how, checkpoint).run()

    def finish(self, best: Params, *, batches: bool = False) -> Outcome:
        """Compare the best iterate with the defaults, each on its own fresh structure, and keep the better."""
        # The compiled step has the losses of all parts then: the gradient costs less than compiling without it.
        judged = (lambda *args: self._step(*args)[0][1]) if self.alike and not batches else self.judged
        before = judged(self.start, self.settled, self.program.frozen, self.given)
        program, given = self.refreshed(self.program, best, self.given)
        after = judged(best, program.settled(), program.frozen, given)
        losses = {f"{name}_before": float(value) for name, value in before.items()}
        losses |= {f"{name}_after": float(value) for name, value in after.items()}
        if self.blind:
            losses |= dict.fromkeys(("test_before", "test_after"), float("nan"))
        adopted = bool(after[self.chooser] < before[self.chooser])
        return Outcome(best, program, losses, True) if adopted else Outcome(self.start, self.program, losses, False)


def _without_readout(name: str, part: Part) -> None:
    for term in part.terms:
        if learnables(term):
            raise ValueError(
                f"{name}: {type(term).__name__} learns a readout, which a loss to judge by cannot train; "
                "give cells instead, which the training loss judges"
            )


class _Descent:
    """The state of the loop."""

    def __init__(self, run: Run, how: Loop, checkpoint: Checkpoint | None) -> None:
        import optax

        self.run_, self.how, self.checkpoint = run, how, checkpoint
        self.optimizer = optax.adam(LEARNING_RATE) if how.optimizer is None else how.optimizer
        self.update = jax.jit(lambda g, s, p: _apply_updates(self.optimizer, g, s, p))
        self.program, self.settled = run.program, run.settled
        # What is judged at every step. The test part is looked at when the fit has ended, here or not.
        self.given = {name: part for name, part in run.given.items() if name != "test" or run.alike}
        self.params = self._scheduled(run.start, 0)
        self.state = self.optimizer.init(self.params)
        self.best, self.best_value, self.best_step = self.params, np.inf, 0
        self.history: dict[str, list[float]] = {"step": [], **{name: [] for name in self.given if name != "test"}}
        self.batches = None
        if how.batch_size is not None:
            self.batches = Minibatches(run.program, self.settled, self.given["train"], how.batch_size, how.seed)

    def run(self) -> tuple[dict[str, list[float]], Params]:
        first = self._resumed()
        bar = progress_bar(self.how.n_steps, "fit", self.how.progress)
        bar.update(first)
        for step in range(first, self.how.n_steps):
            every = self.how.refresh_every or EVERY
            if step and step % every == 0:
                if self.checkpoint is not None and step > first:
                    self._save(step)
                if self.how.refresh_every:
                    self._refresh()
            if not self._one(step):
                break
            bar.set_postfix(
                {"train": f"{self.history['train'][-1]:.4f}", "best": f"{self.best_value:.4f}"}, refresh=False
            )
            bar.update()
        bar.close()
        if self.batches is not None:
            self._judge_all(self.how.n_steps)
        return self.history, self.best

    def _one(self, step: int) -> bool:
        """One step; False where patience has run out."""
        self.params = self._scheduled(self.params, step)
        if self.batches is None:
            (_, found), grads = self.run_._step(self.params, self.settled, self.program.frozen, self.given)
            seen = {name: float(value) for name, value in found.items() if name != "test"}
            self._check(step, seen, grads)
            self._note(step, seen)
        else:
            if step % EVERY == 0:
                self._judge_all(step)
            (value, _), grads = self.run_._step(self.params, *self.batches.draw(step))
            self._check(step, {"train": float(value)}, grads)
        if self.how.patience is not None and step - self.best_step >= self.how.patience:
            return False
        grads["plan"] = {
            name: jax.tree.map(jnp.zeros_like, g) if name in self.how.schedules else g
            for name, g in grads["plan"].items()
        }
        self.params, self.state = self.update(grads, self.state, self.params)
        return True

    def _judge_all(self, step: int) -> None:
        found = self.run_.judged(self.params, self.settled, self.program.frozen, self.given)
        self._note(step, {name: float(value) for name, value in found.items() if name != "test"})

    def _note(self, step: int, found: dict[str, float]) -> None:
        self.history["step"].append(step)
        for name, value in found.items():
            self.history[name].append(value)
        if found[self.run_.chooser] < self.best_value:
            self.best, self.best_value, self.best_step = self.params, found[self.run_.chooser], step

    def _check(self, step: int, found: dict[str, float], grads: Any) -> None:
        fine = all(np.isfinite(value) for value in found.values())
        if not fine or not all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads)):
            culprit = self.program.first_not_finite(self.params["plan"])
            raise FloatingPointError(f"the loss or a derivative is not finite at step {step}, in {culprit}")

    def _refresh(self) -> None:
        self.program, self.given = self.run_.refreshed(self.program, self.params, self.given)
        self.settled = self.program.settled()
        if self.batches is not None:
            self.batches.refresh(self.program, self.settled, self.given["train"])

    def _scheduled(self, params: Params, step: int) -> Params:
        if not self.how.schedules:
            return params
        plan = dict(params["plan"])
        for name, schedule in self.how.schedules.items():
            i, field = self.run_.program.find(name)
            constraint = learnables(self.run_.program.ops[i])[field]
            value = jnp.asarray(schedule(step), jnp.float32)
            if not bool(constraint.accepts(value).all()):
                raise ValueError(f"schedules[{name!r}] gives {value} at step {step}; it must be {constraint.describe}")
            plan[name] = jnp.broadcast_to(constraint.to_real(value), jnp.shape(plan[name]))
        return {**params, "plan": plan}

    def _save(self, step: int) -> None:
        assert self.checkpoint is not None
        record = {"step": step, "history": self.history, "best_value": self.best_value, "best_step": self.best_step}
        self.checkpoint.save((self.params, self.state, self.best), record)

    def _resumed(self) -> int:
        """The step to go on at; structure is found anew there, as it was in the fit that was left off."""
        found = None if self.checkpoint is None else self.checkpoint.load((self.params, self.state, self.best))
        if found is None:
            return 0
        (self.params, self.state, self.best), record = found
        self.history = record["history"]
        self.best_value, self.best_step = record["best_value"], record["best_step"]
        return int(record["step"])


def _apply_updates(optimizer: Any, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    import optax

    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state
