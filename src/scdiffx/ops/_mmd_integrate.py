"""Integration of batches by an autoencoder in which batches have the same distribution within soft clusters."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx.ops._integration import (
    Cells,
    IntegrationResult,
    IntegrationTraining,
    Net,
    discrepancy,
    encode,
    features,
    moved,
    reconstruction,
    trained,
)

__all__ = ["MMDIntegrate"]


@operator
class MMDIntegrate:
    """Experimental: an autoencoder of an embedding whose code has no use for the batch, by maximum mean discrepancy.

    The code is the embedding plus what a small network of it and the batch adds, 0 before training; a second network
    puts the cell back from code and batch. Trained are the squared error of that and `weight` times the squared
    discrepancy (Gretton et al. 2012) of each batch from all cells within each soft cluster, under Gaussian kernels of
    five widths by random features, so that the cost is linear. Clusters are Harmony's, which mix batches as far as
    they can: cells of a type that one batch lacks are not drawn to others. `init` trains; the call is the encoder.
    """

    net: Net | None = learnable(default=None)
    scale: Array | None = buffer(default=None)
    history: dict[str, Array] | None = buffer(default=None, structure=True)
    weight: float = static(default=10.0)
    n_hidden: int = static(default=64)
    training: IntegrationTraining = static(default=IntegrationTraining())

    def init(
        self, z: Float[Array, "cells dims"], batch: Int[Array, " cells"], key: Array | None = None
    ) -> MMDIntegrate:
        if self.net is not None:
            return self
        step = partial(_step, weight=self.weight, batches=int(np.asarray(batch).max()) + 1)
        net, scale, history = trained(z, batch, self.n_hidden, self.training, key, step)
        return replace(self, net=net, scale=scale, history=history)

    def __call__(self, z: Float[Array, "cells dims"], batch: Int[Array, " cells"]) -> IntegrationResult:
        return moved(self.net, self.scale, z, batch, "MMDIntegrate")


def _optimizer() -> Any:
    import optax

    return optax.scale_by_adam()


def _step(state: Any, cells: Cells | None, rate: Any, key: Any, *, weight: float, batches: int) -> Any:
    """One gradient step; without cells, the state before the first."""
    if cells is None:
        return state, _optimizer().init(state)
    return _stepped(state, cells, rate, key, weight=weight, batches=batches)


@partial(jax.jit, static_argnames=("weight", "batches"))
def _stepped(state: Any, cells: Cells, rate: Array, key: Array, *, weight: float, batches: int) -> Any:
    def cost(net: Net) -> Array:
        h = encode(net, cells.x, cells.batch)
        apart = discrepancy(cells, h, batches, *features(key, h.shape[1], cells.spread))
        return reconstruction(net, cells, h) + weight * apart

    net, memory = state
    steps, memory = _optimizer().update(jax.grad(cost)(net), memory)
    return jax.tree.map(lambda value, move: value - rate * move, net, steps), memory
