"""Metrics: what a fit can be expected to do, measured on the plan itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scdiffx._core.random import as_seed
from scdiffx._core.runtime import ensure_cache, one_blas_thread
from scdiffx._fit._split import Split
from scdiffx._fit._training import Run
from scdiffx._program import Program, norm
from scdiffx._steps import Plan
from scdiffx.losses import Loss

__all__ = ["GradientFlow", "gradient_flow"]

_EXPLODING = 1e4


class GradientFlow(NamedTuple):
    """Gradients of a loss through a plan.

    `steps`: norm with respect to the outputs of each step, by step name, in order. `parameters`: norm with respect to
    each learnable parameter in unconstrained space. `dead`: parameters whose gradient is exactly 0. `exploding`:
    parameters whose gradient is not finite or over 10,000 times the loss. `loss`: its value. `cosine` and `error`: by
    parameter, how derivatives along random directions compare with finite differences, as the cosine between the two
    and as the norm of their difference over that of the finite differences; NaN for a dead parameter whose finite
    differences are 0 too.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> plan = sd.plan(adata)
    >>> sd.pp.pca(plan, n_comps=5)
    >>> loss = sd.losses.cross_entropy("X_pca", "bulk_labels")
    >>> flow = sd.metrics.gradient_flow(plan, loss, n_directions=0)
    >>> list(flow.steps), list(flow.parameters)
    (['pca'], ['pca.shift', 'pca.scale'])
    """

    steps: dict[str, float]
    parameters: dict[str, float]
    dead: list[str]
    exploding: list[str]
    loss: float
    cosine: dict[str, float]
    error: dict[str, float]


@one_blas_thread()
def gradient_flow(
    plan: Plan, loss: Loss, *, learn: Any = None, n_directions: int = 4, step: float = 1e-5, rng: Any = 0
) -> GradientFlow:
    """How much of a loss's gradient reaches each step and each parameter of a plan, and whether it is right.

    All is computed in double precision, at the structure that the plan has unfitted: where a neighbour list changes
    within `step`, finite differences meet another function than the derivative.

    Parameters
    ----------
    plan
        A plan from `sd.plan`.
    loss
        From `sd.losses`.
    learn
        Parameters to look at, as in `sd.fit`; default: all.
    n_directions
        Random directions for finite differences, each of which evaluates the plan twice for each parameter; 0 for none.
    step
        How far a finite difference goes to either side, in unconstrained space; greater than 0.
    rng
        Seed of the directions.

    Returns
    -------
    GradientFlow
        Norms by step and by parameter, with the dead and the exploding ones named, and the comparison with finite
        differences. :func:`scdiffx.pl.gradients` draws it.

    Raises
    ------
    ValueError
        If a number is not usable, or nothing is learnable.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> plan = sd.plan(adata)
    >>> sd.pp.pca(plan, n_comps=5)
    >>> loss = sd.losses.cross_entropy("X_pca", "bulk_labels")
    >>> flow = sd.metrics.gradient_flow(plan, loss, n_directions=1)
    >>> flow.dead, bool(flow.cosine["pca.scale"] > 0.999)
    ([], True)
    """
    ensure_cache()
    if n_directions < 0:
        raise ValueError(f"n_directions={n_directions!r} must not be negative")
    if not step > 0:
        raise ValueError(f"step={step!r} must be greater than 0")
    with jax.enable_x64(True):
        program = Program.build(plan, learn, jnp.float64)
        run = Run(program, loss, Split(np.ones(plan.adata.n_obs, bool), None, None))
        # A zero added to an output shows how the loss would answer to a change of it.
        shapes = jax.eval_shape(program.outputs_by_step, program.ops, program.frozen)
        taps = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        given = {"train": run.given["train"]}
        # What does not move is an argument: as a constant it would be folded while compiling.
        rest = (program.ops, program.frozen, given)
        both = jax.jit(jax.value_and_grad(lambda p, t, *rest: run.judged_with(p, t, *rest), argnums=(0, 1)))
        value, (by_param, by_tap) = both(run.start, taps, *rest)
        evaluate = jax.jit(lambda p, *rest: run.judged_with(p, None, *rest))
        compared = _compared(lambda p: float(evaluate(p, *rest)), run.start, by_param, n_directions, step, as_seed(rng))
    parameters = {name: norm(by_param["plan"][name]) for name in program.learned}
    steps = {program.plan.steps[i].name: norm(by_tap[i]) for i in program.active}
    limit = _EXPLODING * max(abs(float(value)), 1e-12)
    return GradientFlow(
        steps,
        parameters,
        dead=[name for name, size in parameters.items() if size == 0],
        exploding=[name for name, size in parameters.items() if not size <= limit],
        loss=float(value),
        cosine={name: cosine for name, (cosine, _) in compared.items()},
        error={name: error for name, (_, error) in compared.items()},
    )


def _compared(
    evaluate: Callable[[Any], float], start: Any, slopes: Any, n_directions: int, step: float, seed: int
) -> dict[str, tuple[float, float]]:
    """Cosine and relative error of derivatives beside central differences, by parameter."""
    if n_directions == 0:
        return {}
    rng, found = np.random.default_rng(seed), {}
    for name, at in start["plan"].items():
        exact, differences = [], []
        for _ in range(n_directions):
            direction = jax.tree.map(lambda a: rng.standard_normal(np.shape(a)), at)
            pairs = zip(jax.tree.leaves(slopes["plan"][name]), jax.tree.leaves(direction), strict=True)
            exact.append(sum(float((np.asarray(g) * d).sum()) for g, d in pairs))
            ends = []
            for side in (step, -step):
                moved = jax.tree.map(lambda a, d, side=side: a + side * d, at, direction)
                ends.append(evaluate({**start, "plan": {**start["plan"], name: moved}}))
            differences.append((ends[0] - ends[1]) / (2 * step))
        a, b = np.asarray(exact), np.asarray(differences)
        sizes = np.linalg.norm(a) * np.linalg.norm(b)
        with np.errstate(divide="ignore", invalid="ignore"):
            found[name] = (float(a @ b / sizes), float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    return found
