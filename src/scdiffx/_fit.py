"""Joint optimisation of a plan against a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scdiffx._core.fields import learnables, replace, structural
from scdiffx._core.random import as_seed
from scdiffx._core.runtime import ensure_cache
from scdiffx._fitted import Fitted, kept
from scdiffx._log import progress_bar
from scdiffx._program import Program, graph_of
from scdiffx._slots import Slot, is_anndata
from scdiffx._steps import Plan, initialised, restructured
from scdiffx.losses import Loss

__all__ = ["Fitted", "fit", "plan"]

LEARNING_RATE = 0.02


def plan(adata: Any) -> Plan:
    """Start a plan: pass it to functions of `sd.pp` and `sd.tl` in place of the AnnData, and they are recorded.

    Parameters
    ----------
    adata
        The AnnData that the plan will read; it is not changed until `Fitted.apply`.
    """
    if not is_anndata(adata):
        raise TypeError(f"`adata` must be an AnnData, got {type(adata).__name__}")
    return Plan(adata)


def fit(
    plan: Plan,
    loss: Loss,
    *,
    learn: str | Iterable[str] | None = None,
    optimizer: Any = None,
    n_steps: int = 200,
    refresh_every: int = 25,
    holdout: float | str | np.ndarray | None = None,
    patience: int | None = None,
    rng: Any = 0,
    progress: bool = True,
) -> Fitted:
    """Optimise the learnable parameters of a plan together, against one loss.

    The fit starts at the defaults, so the first value of the history is the classical workflow. Neighbours and other
    discrete structure are found anew every `refresh_every` steps. Fitted parameters are adopted only if, with fresh
    structure, they beat the defaults on the held-out cells (on the training cells without a holdout).

    Parameters
    ----------
    plan
        A plan from :func:`plan`.
    loss
        From `sd.losses`; terms add up and scale.
    learn
        Names of steps or parameters ("pca", "neighbors.bandwidth"); default: all.
    optimizer
        An optax optimiser; default Adam at a rate of 0.02 in unconstrained space.
    n_steps
        Number of gradient steps, at least 1.
    refresh_every
        Steps between searches of discrete structure; 0 for never.
    holdout
        Cells kept out of the training loss, to choose by: a fraction, a boolean column of obs, or a boolean array.
    patience
        Stop after this many steps without a better held-out (or training) loss.
    rng
        Seed of the random holdout.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Fitted
        The AnnData is unchanged until ``fitted.apply()``.

    Raises
    ------
    ValueError
        If a name in `learn`, the holdout or a number is not usable, or nothing is learnable.
    FloatingPointError
        If the loss or a derivative is not finite; names the step.
    """
    ensure_cache()
    _check_arguments(plan, loss, n_steps, refresh_every, patience)
    held = _holdout_mask(plan.adata, holdout, as_seed(rng))
    run = Run(Program.build(plan, learn), loss, held)
    history, best = run.optimise(optimizer, n_steps, refresh_every, patience, progress)
    return run.finish(best, history)


def _check_arguments(plan: Any, loss: Any, n_steps: int, refresh_every: int, patience: int | None) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"`plan` must come from `sd.plan(adata)`, got {type(plan).__name__}")
    if not isinstance(loss, Loss):
        raise TypeError(f"`loss` must come from `sd.losses`, got {type(loss).__name__}")
    if n_steps < 1:
        raise ValueError(f"n_steps={n_steps!r} must be at least 1")
    if refresh_every < 0:
        raise ValueError(f"refresh_every={refresh_every!r} must not be negative")
    if patience is not None and patience < 1:
        raise ValueError(f"patience={patience!r} must be at least 1")


def _holdout_mask(adata: Any, holdout: Any, seed: int) -> np.ndarray | None:
    """Which cells are held out; None without a holdout."""
    if holdout is None:
        return None
    n = adata.n_obs
    if isinstance(holdout, str):
        if holdout not in adata.obs:
            raise KeyError(f"holdout={holdout!r} is not in `adata.obs`. Available: {list(adata.obs)[:20]}")
        holdout = adata.obs[holdout].to_numpy()
    if isinstance(holdout, float):
        if not 0 < holdout < 1:
            raise ValueError(f"holdout={holdout!r} must lie between 0 and 1")
        mask = np.zeros(n, bool)
        mask[np.random.default_rng(seed).permutation(n)[: max(1, round(holdout * n))]] = True
        return mask
    mask = np.asarray(holdout)
    if mask.shape != (n,) or mask.dtype != bool:
        raise ValueError(f"holdout must be a fraction, a boolean column or a boolean array of {n} cells")
    if mask.all() or not mask.any():
        raise ValueError(f"holdout keeps out {mask.sum()} of {n} cells; both groups need cells")
    return mask


class Run:
    """One optimisation: the compiled step and what it needs."""

    def __init__(self, program: Program, loss: Loss, held: np.ndarray | None) -> None:
        self.program = program
        n = program.plan.adata.n_obs
        self.train = jnp.ones(n, bool) if held is None else ~jnp.asarray(held)
        self.held = None if held is None else jnp.asarray(held)
        self.slots = [program.plan.slot(term.output) for _, term in loss.terms]
        self.targets = [program.target(term) for _, term in loss.terms]
        self.weights = [weight for weight, _ in loss.terms]
        self._values = jax.jit(program.evaluate)
        terms = self._prepared([term for _, term in loss.terms], program.ops, program.frozen, initialised)
        self.start: dict[str, Any] = {"plan": program.start(), "loss": [self._readout(term) for term in terms]}
        # What is compared with travels as an argument: as a constant it would be folded while compiling.
        self.given = (terms, self.targets, self.train, self.held)
        self._step = jax.jit(jax.value_and_grad(self._losses, has_aux=True))

    def _prepared(self, terms: list[Any], ops: list[Any], frozen: Any, prepare: Callable[..., Any]) -> list[Any]:
        """Terms after `prepare`, which sees the values of the plan and the training cells."""
        values = self._values(ops, frozen)
        for term, slot in zip(terms, self.slots, strict=True):
            if slot not in values:
                raise ValueError(f"no learned parameter affects {term.output!r}: the loss cannot be lowered through it")
        both = zip(terms, self.slots, self.targets, strict=True)
        return [prepare(term, (values[slot], target, self.train), None) for term, slot, target in both]

    def refreshed(self, program: Program, params: Any) -> tuple[Program, Any]:
        """The program and what its values are compared with, with discrete structure found anew."""
        if program.has_structure:
            program = program.refreshed(params["plan"])
        terms, *rest = self.given
        if any(structural(term) for term in terms):
            terms = self._prepared(terms, program.with_params(params["plan"]), program.frozen, restructured)
        return program, (terms, *rest)

    @staticmethod
    def _readout(term: Any) -> dict[str, Any]:
        return {name: getattr(term, name) for name in learnables(term)}

    def tapped_loss(self, params: Any, taps: Any) -> Any:
        """The training loss with `taps` added to the outputs of the steps."""
        return self._losses(params, self.program.ops, self.program.frozen, self.given, taps)[0]

    def _losses(self, params: Any, ops: list[Any], frozen: Any, given: Any, taps: Any = None) -> tuple[Any, Any]:
        terms, targets, train, held = given
        values = self.program.evaluate(self.program.with_params(params["plan"], ops), frozen, taps)
        terms = [replace(t, **p) for t, p in zip(terms, params["loss"], strict=True)]

        def total(keep: Any) -> Any:
            parts = zip(self.weights, terms, self.slots, targets, strict=True)
            return sum(w * term(values[slot], _other(term, target, values), keep) for w, term, slot, target in parts)

        loss = total(train)
        return loss, loss if held is None else total(held)

    def optimise(
        self, optimizer: Any, n_steps: int, refresh_every: int, patience: int | None, progress: bool
    ) -> tuple[dict[str, list[float]], Any]:
        import optax

        optimizer = optax.adam(LEARNING_RATE) if optimizer is None else optimizer
        update = jax.jit(lambda g, s, p: _apply_updates(optimizer, g, s, p))
        params, state = self.start, optimizer.init(self.start)
        history: dict[str, list[float]] = {"step": [], "train": [], **({} if self.held is None else {"holdout": []})}
        best, best_value, best_step = params, np.inf, 0
        program, given = self.program, self.given
        bar = progress_bar(n_steps, "fit", progress)
        for step in range(n_steps):
            if refresh_every and step and step % refresh_every == 0:
                program, given = self.refreshed(program, params)
            (train, chosen), grads = self._step(params, program.ops, program.frozen, given)
            value = float(chosen)
            if not np.isfinite(value) or not all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads)):
                bar.close()
                culprit = program.first_not_finite(params["plan"])
                raise FloatingPointError(f"the loss or a derivative is not finite at step {step}, in {culprit}")
            history["step"].append(step)
            history["train"].append(float(train))
            if self.held is not None:
                history["holdout"].append(value)
            if value < best_value:
                best, best_value, best_step = params, value, step
            elif patience is not None and step - best_step >= patience:
                break
            params, state = update(grads, state, params)
            bar.set_postfix({"train": f"{float(train):.4f}", "best": f"{best_value:.4f}"}, refresh=False)
            bar.update()
        bar.close()
        return history, best

    def finish(self, best: Any, history: dict[str, list[float]]) -> Fitted:
        """Compare the best iterate with the defaults, each on its own fresh structure, and keep the better."""
        before = self._losses(self.start, self.program.ops, self.program.frozen, self.given)
        program, given = self.refreshed(self.program, best)
        after = self._losses(best, program.ops, program.frozen, given)
        adopted = bool(after[1] < before[1])
        if not adopted:
            best, program = self.start, self.program
        losses = {"train_before": float(before[0]), "train_after": float(after[0])}
        if self.held is not None:
            losses |= {"holdout_before": float(before[1]), "holdout_after": float(after[1])}
        ops = program.with_params(best["plan"])
        return Fitted(
            calls=list(program.plan.calls),
            params=_flat_params(program.plan, ops),
            buffers=_flat_buffers(program.plan, ops),
            losses=losses,
            adopted=adopted,
            history=history,
            genes=list(program.plan.adata.var_names),
            _plan=program.plan,
        )


def _other(term: Any, target: Any, values: Mapping[Slot, Any]) -> Any:
    """What a term compares with: the target as it stands in the AnnData, or as the plan moves it."""
    graph = graph_of(term)
    return target if graph is None else values.get(graph, target)


def _apply_updates(optimizer: Any, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    import optax

    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def _flat_params(plan: Plan, ops: list[Any]) -> dict[str, np.ndarray]:
    return _flat(plan, ops, learnables)


def _flat_buffers(plan: Plan, ops: list[Any]) -> dict[str, np.ndarray]:
    return _flat(plan, ops, kept)


def _flat(plan: Plan, ops: list[Any], names: Callable[[Any], Iterable[str]]) -> dict[str, np.ndarray]:
    """Arrays by "step.field"; those of a network or another pytree by "step.field['name']"."""
    flat = {}
    for step, op in zip(plan.steps, ops, strict=True):
        for name in names(op):
            for path, leaf in jax.tree_util.tree_flatten_with_path(getattr(op, name))[0]:
                flat[f"{step.name}.{name}{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    return flat
