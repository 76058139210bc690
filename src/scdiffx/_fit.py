"""Joint optimisation of a plan against a loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scdiffx._core.fields import fields_of_kind, learnables, replace
from scdiffx._core.random import as_seed
from scdiffx._core.runtime import ensure_cache
from scdiffx._log import progress_bar
from scdiffx._program import Program
from scdiffx._slots import is_anndata
from scdiffx._steps import Plan, initialised, replay
from scdiffx.losses import Loss

__all__ = ["Fitted", "fit", "plan"]

FORMAT = 1
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


@dataclass
class Fitted:
    """A fitted plan.

    Attributes
    ----------
    params
        The parameters by name ("step.field"), as the operators use them.
    losses
        Loss before and after, on the training and the held-out cells: keys "train_before", "train_after",
        "holdout_before", "holdout_after" (the last two with a holdout only).
    adopted
        Whether the fitted parameters won on the held-out cells (without a holdout: on the training cells). If not,
        `params` are the defaults.
    history
        Lists "step", "train" and, with a holdout, "holdout".
    """

    calls: list[tuple[str, dict[str, Any]]]
    params: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]
    losses: dict[str, float]
    adopted: bool
    history: dict[str, list[float]]
    genes: list[str]
    _plan: Plan | None = field(default=None, repr=False)

    def plan(self, adata: Any) -> Plan:
        """The plan on an AnnData: the one it was fitted on, or a new one with the same genes."""
        if self._plan is not None and adata is self._plan.adata:
            return self._plan
        if list(adata.var_names) != self.genes:
            missing = sorted(set(self.genes) - set(adata.var_names))[:5]
            raise ValueError(
                f"`adata` must have the {len(self.genes)} genes of the fit in their order; it has {adata.n_vars}"
                + (f", without {missing}" if missing else "")
            )
        return replay(self.calls, adata)

    def apply(self, adata: Any = None, *, copy: bool = False) -> Any:
        """Run the fitted plan and write its keys, on the AnnData of the fit or on new cells with the same genes.

        What was estimated once (targets, gene means, components, thresholds) stays; neighbours are searched among the
        cells given, and soft gene weights compare their variability with the thresholds of the fit.

        Returns
        -------
        None, or the copy with ``copy=True``.
        """
        if adata is None:
            if self._plan is None:
                raise ValueError("this fit was loaded from a file: pass the AnnData to apply it to")
            adata = self._plan.adata
        target = self.plan(adata)
        names = iter([step.name for step in target.steps])

        def prepare(op: Any, args: tuple[Any, ...], key: Any) -> Any:
            name = next(names)
            return self._filled(name, initialised(self._with_networks(name, op), args, key))

        return target.apply(prepare=prepare, copy=copy)

    def _with_networks(self, name: str, op: Any) -> Any:
        """The operator with its fitted networks, so that `init` does not train others first.

        Such an `init` does nothing, so what it would have estimated beside the networks is put in place as well.
        """
        changes: dict[str, Any] = {}
        for f in fields_of_kind(op, "learnable"):
            start = f"{name}.{f.name}['"
            net = {key[len(start) : -2]: jnp.asarray(v) for key, v in self.params.items() if key.startswith(start)}
            if net and getattr(op, f.name) is None:
                changes[f.name] = net
        if changes:
            empty = [f.name for f in fields_of_kind(op, "buffer") if getattr(op, f.name) is None]
            found = {field: self.buffers.get(f"{name}.{field}") for field in empty}
            changes |= {field: jnp.asarray(value) for field, value in found.items() if value is not None}
        return replace(op, **changes)

    def _filled(self, name: str, op: Any) -> Any:
        """The operator with the fitted parameters and the statistics of the fit."""
        changes: dict[str, Any] = {}
        for stored, fields in ((self.params, learnables(op)), (self.buffers, _kept(op))):
            for f in fields:
                flat, tree = jax.tree_util.tree_flatten_with_path(getattr(op, f))
                keys = [f"{name}.{f}{jax.tree_util.keystr(path)}" for path, _ in flat]
                if all(key in stored for key in keys) and keys:
                    leaves = [_like(stored[key], old, key) for key, (_, old) in zip(keys, flat, strict=True)]
                    changes[f] = jax.tree_util.tree_unflatten(tree, leaves)
        return replace(op, **changes)

    def save(self, path: str | Path) -> None:
        """Write the fit to a folder: `arrays.npz` and `fit.json`. Nothing in it is code."""
        folder = Path(path)
        record = {
            "format": FORMAT,
            "calls": self.calls,
            "losses": self.losses,
            "adopted": self.adopted,
            "history": self.history,
        }
        try:
            text = json.dumps(record, indent=1)
        except TypeError as error:
            raise ValueError(f"the plan has an argument that cannot be saved: {error}") from None
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"param/{k}": v for k, v in self.params.items()} | {f"buffer/{k}": v for k, v in self.buffers.items()}
        arrays["genes"] = np.asarray(self.genes, dtype=str)
        np.savez(folder / "arrays.npz", **arrays)  # type: ignore[arg-type]
        (folder / "fit.json").write_text(text)

    @classmethod
    def load(cls, path: str | Path) -> Fitted:
        """Read a fit that `save` wrote; `apply` it to an AnnData with the same genes."""
        folder = Path(path)
        for name in ("fit.json", "arrays.npz"):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder} holds no saved fit: {name} is missing")
        record = json.loads((folder / "fit.json").read_text())
        if record.get("format") != FORMAT:
            raise ValueError(f"{folder} has format {record.get('format')!r}; this version reads {FORMAT}")
        with np.load(folder / "arrays.npz", allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        genes = arrays.pop("genes").tolist()
        params = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
        buffers = {k.removeprefix("buffer/"): v for k, v in arrays.items() if k.startswith("buffer/")}
        calls = [(name, dict(arguments)) for name, arguments in record["calls"]]
        return cls(calls, params, buffers, record["losses"], record["adopted"], record["history"], genes)


def _like(saved: np.ndarray, old: Any, key: str) -> Any:
    if np.shape(old) != saved.shape:
        raise ValueError(f"the saved {key!r} has shape {saved.shape}, but this plan needs {np.shape(old)}")
    return jnp.asarray(saved)


def _kept(op: Any) -> list[str]:
    """Buffers that are estimated once."""
    return [
        f.name for f in fields_of_kind(op, "buffer") if not f.metadata["structure"] and getattr(op, f.name) is not None
    ]


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
        self.terms = self._initialised_terms([term for _, term in loss.terms])
        self.start: dict[str, Any] = {"plan": program.start(), "loss": [self._readout(t) for t in self.terms]}
        # What is compared with travels as an argument: as a constant it would be folded while compiling.
        self.given = (self.targets, self.train, self.held)
        self._step = jax.jit(jax.value_and_grad(self._losses, has_aux=True))

    def _initialised_terms(self, terms: list[Any]) -> list[Any]:
        """Terms with their readouts started on the values of the unfitted plan and the training cells."""
        values = jax.jit(self.program.evaluate)(self.program.ops, self.program.frozen)
        ready = []
        for term, slot, target in zip(terms, self.slots, self.targets, strict=True):
            if slot not in values:
                raise ValueError(f"no learned parameter affects {term.output!r}: the loss cannot be lowered through it")
            init = getattr(term, "init", None)
            ready.append(term if init is None else init(values[slot], target, self.train))
        return ready

    @staticmethod
    def _readout(term: Any) -> dict[str, Any]:
        return {name: getattr(term, name) for name in learnables(term)}

    def tapped_loss(self, params: Any, taps: Any) -> Any:
        """The training loss with `taps` added to the outputs of the steps."""
        return self._losses(params, self.program.ops, self.program.frozen, self.given, taps)[0]

    def _losses(self, params: Any, ops: list[Any], frozen: Any, given: Any, taps: Any = None) -> tuple[Any, Any]:
        targets, train, held = given
        values = self.program.evaluate(self.program.with_params(params["plan"], ops), frozen, taps)
        terms = [replace(t, **p) for t, p in zip(self.terms, params["loss"], strict=True)]

        def total(keep: Any) -> Any:
            parts = zip(self.weights, terms, self.slots, targets, strict=True)
            return sum(w * term(values[slot], target, keep) for w, term, slot, target in parts)

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
        program = self.program
        bar = progress_bar(n_steps, "fit", progress)
        for step in range(n_steps):
            if refresh_every and step and step % refresh_every == 0 and program.has_structure:
                program = program.refreshed(params["plan"])
            (train, chosen), grads = self._step(params, program.ops, program.frozen, self.given)
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
        program = self.program.refreshed(best["plan"]) if self.program.has_structure else self.program
        after = self._losses(best, program.ops, program.frozen, self.given)
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


def _apply_updates(optimizer: Any, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    import optax

    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def _flat_params(plan: Plan, ops: list[Any]) -> dict[str, np.ndarray]:
    return _flat(plan, ops, learnables)


def _flat_buffers(plan: Plan, ops: list[Any]) -> dict[str, np.ndarray]:
    return _flat(plan, ops, _kept)


def _flat(plan: Plan, ops: list[Any], names: Callable[[Any], Iterable[str]]) -> dict[str, np.ndarray]:
    """Arrays by "step.field"; those of a network or another pytree by "step.field['name']"."""
    flat = {}
    for step, op in zip(plan.steps, ops, strict=True):
        for name in names(op):
            for path, leaf in jax.tree_util.tree_flatten_with_path(getattr(op, name))[0]:
                flat[f"{step.name}.{name}{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    return flat
