"""Metrics: what a fit can be expected to do, measured on the plan itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scdiffx._core.runtime import ensure_cache
from scdiffx._fit._split import Split
from scdiffx._fit._training import Run
from scdiffx._program import Program, norm
from scdiffx._steps import Plan
from scdiffx.losses import Loss

__all__ = ["GradientFlow", "gradient_flow"]

_EXPLODING = 1e4


class GradientFlow(NamedTuple):
    """Gradient norms of a loss through a plan.

    `steps`: norm with respect to the outputs of each step, by step name, in order. `parameters`: norm with respect to
    each learnable parameter in unconstrained space. `dead`: parameters whose gradient is exactly 0. `exploding`:
    parameters whose gradient is not finite or over 10,000 times the loss. `loss`: its value.
    """

    steps: dict[str, float]
    parameters: dict[str, float]
    dead: list[str]
    exploding: list[str]
    loss: float


def gradient_flow(plan: Plan, loss: Loss, *, learn: Any = None) -> GradientFlow:
    """How much of a loss's gradient reaches each step and each parameter of a plan.

    Parameters
    ----------
    plan
        A plan from `sd.plan`.
    loss
        From `sd.losses`.
    learn
        Parameters to look at, as in `sd.fit`; default: all.

    Returns
    -------
    GradientFlow
        Norms by step and by parameter, with the dead and the exploding ones named.

    Examples
    --------
    >>> flow = sd.metrics.gradient_flow(plan, sd.losses.correlation("dpt_pseudotime", "day"))  # doctest: +SKIP
    >>> flow.dead  # doctest: +SKIP
    []
    """
    ensure_cache()
    run = Run(Program.build(plan, learn), loss, Split(np.ones(plan.adata.n_obs, bool), None, None))
    program = run.program
    # A zero added to an output shows how the loss would answer to a change of it.
    shapes = jax.eval_shape(program.outputs_by_step, program.ops, program.frozen)
    taps = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    value, (by_param, by_tap) = jax.jit(jax.value_and_grad(run.tapped_loss, argnums=(0, 1)))(run.start, taps)
    parameters = {name: norm(by_param["plan"][name]) for name in program.learned}
    steps = {program.plan.steps[i].name: norm(by_tap[i]) for i in program.active}
    limit = _EXPLODING * max(abs(float(value)), 1e-12)
    return GradientFlow(
        steps,
        parameters,
        dead=[name for name, size in parameters.items() if size == 0],
        exploding=[name for name, size in parameters.items() if not size <= limit],
        loss=float(value),
    )
