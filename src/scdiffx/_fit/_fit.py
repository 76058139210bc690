"""Joint optimisation of a plan against a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scdiffx._core.fields import learnables
from scdiffx._core.random import as_seed
from scdiffx._core.runtime import ensure_cache, one_blas_thread
from scdiffx._fit._checkpoint import Checkpoint
from scdiffx._fit._controls import direct_predictor
from scdiffx._fit._objective import check_arguments
from scdiffx._fit._split import three_ways
from scdiffx._fit._training import Loop, Run
from scdiffx._fitted import Fitted, flat
from scdiffx._log import say
from scdiffx._program import Program
from scdiffx._steps import Plan
from scdiffx.losses import Loss

__all__ = ["fit"]


@one_blas_thread()
def fit(
    plan: Plan,
    loss: Loss,
    *,
    learn: str | Iterable[str] | None = None,
    optimizer: Any = None,
    n_steps: int = 200,
    refresh_every: int = 25,
    batch_size: int | None = None,
    holdout: float | str | np.ndarray | Loss | None = 0.2,
    test: float | str | np.ndarray | Loss | None = 0.2,
    patience: int | None = None,
    schedules: Mapping[str, Callable[[int], Any]] | None = None,
    checkpoint: str | Path | None = None,
    rng: Any = 0,
    progress: bool = True,
) -> Fitted:
    """Optimise the learnable parameters of a plan together, against one loss.

    The fit starts at the defaults, so the first value of the history is the classical workflow. Cells are split three
    ways: some train, some choose which step's parameters are kept, and some are judged once, at the end. Neighbours and
    other discrete structure are found anew every `refresh_every` steps. Fitted parameters are adopted only if, with
    fresh structure, they beat the defaults on the held-out cells (on the training cells without a holdout).
    `Fitted.report` puts them beside their controls.

    Parameters
    ----------
    plan
        A plan from :func:`~scdiffx.plan`.
    loss
        From `sd.losses`; terms add up and scale.
    learn
        Names of steps or parameters ("pca", "neighbors.bandwidth"); default: all.
    optimizer
        An optax optimiser with whatever it is chained with, such as
        ``optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(0.1, 200)))``; default Adam
        at a rate of 0.02. It moves parameters in unconstrained space.
    n_steps
        Number of gradient steps, at least 1.
    refresh_every
        Steps between searches of discrete structure; 0 for never.
    batch_size
        Take each step on this many training cells, drawn without replacement, rather than on all of them. All cells are
        judged every 25 steps. Where the moving steps of the plan look at one cell at a time, cells are drawn at random.
        Where they look at neighbours (`pp.neighbors`, `pp.magic`, moments), a batch is a group of cells near each
        other, and brings with it all cells on which its results rest, as many edges away as the steps look together:
        loss and derivatives are those of the whole data, restricted to these cells. `batch_mixing` and
        `replicate_consistency` bring the cells that they compare with. Refused: steps that look at all cells, and
        batches that would bring more than half of these.
    holdout
        What to choose by: a fraction of the cells, drawn at random (label by label where the loss has labels), a
        boolean column of obs, or a boolean array, whose cells are kept out of the training loss; or another loss, such
        as one on held-out molecules, judged on the training cells; or None.
    test
        The same for what is judged once, at the end. It takes no part in fitting or choosing.
    patience
        Stop after this many steps without a better held-out (or training) loss.
    schedules
        Parameters that follow a function of the step rather than the gradient, such as a falling temperature:
        ``{"kmeans.temperature": optax.exponential_decay(1.0, 100, 0.1)}``. Their value at the chosen step is kept.
    checkpoint
        A folder for the state of the fit, written whenever structure is refreshed (every 25 steps without refreshes).
        Where it holds the state of the same fit, this goes on from there.
    rng
        Seed of random splits and minibatches.
    progress
        Whether to show a progress bar, and at the end the losses beside those of the controls.

    Returns
    -------
    Fitted
        The AnnData is unchanged until ``fitted.apply()``.

    Raises
    ------
    ValueError
        If a name in `learn`, the holdout or a number is not usable, nothing is learnable, a step or the loss cannot be
        taken by minibatches or saves nothing so, or the checkpoint is that of another fit.
    FloatingPointError
        If the loss or a derivative is not finite; names the step.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> plan = sd.plan(adata)
    >>> sd.pp.pca(plan, n_comps=5)
    >>> loss = sd.losses.cross_entropy("X_pca", "bulk_labels")
    >>> fitted = sd.fit(plan, loss, n_steps=3, progress=False)
    >>> sorted(fitted.params), fitted.history["step"]
    (['pca.scale', 'pca.shift'], [0, 1, 2])
    """
    ensure_cache()
    schedules = {} if schedules is None else dict(schedules)
    check_arguments(plan, loss, n_steps=n_steps, patience=patience, batch_size=batch_size)
    if refresh_every < 0:
        raise ValueError(f"refresh_every={refresh_every!r} must not be negative")
    seed = as_seed(rng)
    split = three_ways(plan.adata, loss, holdout, test, seed)
    program = Program.build(plan, _with_scheduled(plan, learn, schedules))
    run = Run(program, loss, split)
    how = Loop(optimizer, n_steps, refresh_every, patience, batch_size, schedules, seed, progress)
    # The optimiser is code and cannot be compared; its state and all that it worked on can.
    identity = repr((plan.calls, plan.adata.shape, loss, program.learned, how._replace(optimizer=None, n_steps=0)))
    history, best = run.optimise(how, None if checkpoint is None else Checkpoint(checkpoint, identity))
    outcome = run.finish(best, batches=batch_size is not None)
    ops = outcome.program.with_params(outcome.params["plan"])
    fitted = Fitted(
        calls=list(plan.calls),
        params=flat(plan, ops, learnables),
        buffers=flat(plan, ops),
        losses=outcome.losses,
        adopted=outcome.adopted,
        history=history,
        genes=list(plan.adata.var_names),
        predictor=direct_predictor(plan, loss, split, run.embedding),
        _plan=plan,
    )
    if progress:
        say(fitted.report().round(4).to_string())
    return fitted


def _with_scheduled(plan: Plan, learn: str | Iterable[str] | None, schedules: Mapping[str, Any]) -> Any:
    """Names of what is learned and what follows a schedule."""
    if not schedules or learn is None:
        return learn
    return [*([learn] if isinstance(learn, str) else learn), *schedules]
