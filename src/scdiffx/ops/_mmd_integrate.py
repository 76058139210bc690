"""Integration of batches by an autoencoder in which batches have the same distribution within soft clusters."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Int

from scdiffx._core import counts as C
from scdiffx._core.fields import buffer, learnable, operator, static
from scdiffx.ops._integration import IntegrationResult, IntegrationTraining, applied, discrepancy, features, fitted
from scdiffx.ops._integration_models import Cells, Net
from scdiffx.ops._vae_fit import lowered, optimizer

__all__ = ["MMDIntegrate"]


@operator
class MMDIntegrate:
    """Experimental: an autoencoder whose code has no use for the batch, by maximum mean discrepancy.

    Of an embedding, the code is the embedding plus what a small network of it and the batch adds, 0 before training; a
    second network puts the cell back from code and batch, and the error is squared. With `n_latent`, of counts: the
    networks and the negative bound are those of :class:`VAE` and the code is the mean of so many latent variables.
    Trained are the error and `weight` times the squared discrepancy (Gretton et al. 2012) of each batch from all cells
    within each soft cluster, under Gaussian kernels of five widths by random features, so that the cost is linear; of
    counts, in units of what training has lowered the bound by so far on held-out cells, and a `weight` of 1 suits.
    Clusters are Harmony's, which mix batches as far as they can: cells of a type that one batch lacks are not drawn to
    others. `init` trains; the call is the encoder.
    """

    by_cell: ClassVar[bool] = True
    net: Net | None = learnable(default=None)
    scale: Array | None = buffer(default=None)
    history: dict[str, Array] | None = buffer(default=None, structure=True)
    n_latent: int | None = static(default=None)
    weight: float = static(default=10.0)
    n_hidden: int = static(default=64)
    training: IntegrationTraining = static(default=IntegrationTraining())

    def init(self, x: C.Matrix, batch: Int[Array, " cells"], key: Array | None = None) -> MMDIntegrate:
        found: MMDIntegrate = fitted(self, x, batch, key, _step)
        return found

    def __call__(self, x: C.Matrix, batch: Int[Array, " cells"]) -> IntegrationResult:
        return applied(self, x, batch)


def _step(state: Any, cells: Cells | None, rate: Any, key: Any, weight: Any, **settings: Any) -> Any:
    """One gradient step; without cells, the state before the first."""
    if cells is None:
        return state, optimizer().init(state)
    return _stepped(state, cells, rate, key, weight, **settings)


@partial(jax.jit, static_argnames=("batches", "forward"))
def _stepped(state: Any, cells: Cells, rate: Array, key: Array, weight: Array, *, batches: int, forward: Any) -> Any:
    def cost(net: Net) -> Array:
        h, error = forward(net, cells, key)
        apart = discrepancy(cells, h, batches, *features(key, h.shape[1], cells.spread))
        return error.mean() + weight * apart

    net, memory = state
    steps, memory = optimizer().update(jax.grad(cost)(net), memory)
    return lowered(net, steps, rate), memory
