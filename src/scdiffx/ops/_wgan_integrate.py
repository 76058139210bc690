"""Integration of batches by an autoencoder against critics that tell the batches apart."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from scdiffx._core import counts as C
from scdiffx._core.fields import buffer, learnable, operator, static
from scdiffx.ops._integration import IntegrationResult, IntegrationTraining, applied, fitted
from scdiffx.ops._integration_models import Cells, Net, uniform
from scdiffx.ops._vae_fit import lowered

__all__ = ["WGANIntegrate"]

_PAIRS = 256
_CRITIC_STEPS = 3
_PENALTY = 10.0
_CRITIC_RATE = 2e-3
_CRITIC_HIDDEN = 64


@operator
class WGANIntegrate:
    """Experimental: an autoencoder whose code has no use for the batch, by Wasserstein critics.

    The autoencoders of an embedding and, with `n_latent`, of counts are those of :class:`MMDIntegrate`. A critic for
    each batch is trained to tell its cells from all cells, these weighted to the batch's shares of soft clusters, with
    a penalty on slopes other than 1 (Gulrajani et al. 2017): the difference of its means estimates their Wasserstein
    distance. The autoencoder lowers its error plus `weight` times the mean distance (of counts, in units of what
    training has lowered the bound by so far on held-out cells, and a `weight` of 0.3 suits); critics make three steps
    for each of its own. Clusters are Harmony's, which mix batches as far as they can: cells of a type that one batch
    lacks are not drawn to others. `init` trains; the call is the encoder.
    """

    by_cell: ClassVar[bool] = True
    net: Net | None = learnable(default=None)
    scale: Array | None = buffer(default=None)
    history: dict[str, Array] | None = buffer(default=None, structure=True)
    n_latent: int | None = static(default=None)
    weight: float = static(default=1.0)
    n_hidden: int = static(default=64)
    training: IntegrationTraining = static(default=IntegrationTraining())

    def init(self, x: C.Matrix, batch: Int[Array, " cells"], key: Array | None = None) -> WGANIntegrate:
        found: WGANIntegrate = fitted(self, x, batch, key, _step, critics)
        return found

    def __call__(self, x: C.Matrix, batch: Int[Array, " cells"]) -> IntegrationResult:
        return applied(self, x, batch)


class _Weights(NamedTuple):
    """`of` (cells, batches): the batch's cells less all cells, weighted like them; `share`: of the batches."""

    of: Array
    share: Array
    log_pool: Array


def critics(rng: np.random.Generator, dims: int, batches: int) -> Net:
    """Networks with one output a batch."""
    return {
        "critic_1": uniform(rng, dims, _CRITIC_HIDDEN),
        "critic_2": uniform(rng, _CRITIC_HIDDEN, _CRITIC_HIDDEN),
        "critic_3": uniform(rng, _CRITIC_HIDDEN, batches),
        "critic_bias_1": np.zeros(_CRITIC_HIDDEN, np.float32),
        "critic_bias_2": np.zeros(_CRITIC_HIDDEN, np.float32),
    }


def criticised(net: Net, h: Array) -> Array:
    h = jax.nn.leaky_relu(h @ net["critic_1"] + net["critic_bias_1"], 0.2)
    return jax.nn.leaky_relu(h @ net["critic_2"] + net["critic_bias_2"], 0.2) @ net["critic_3"]


def weights(cells: Cells, batches: int) -> _Weights:
    """All cells weighted so that they are in the soft clusters as the batch is."""
    own = jax.nn.one_hot(cells.batch, batches)
    shares = (cells.member.T @ own) / jnp.maximum(cells.member.sum(0), 1e-6)[:, None]
    pool = cells.member @ shares
    pool = pool / jnp.maximum(pool.sum(0), 1e-6)
    size = own.sum(0)
    return _Weights(own / jnp.maximum(size, 1) - pool, size / len(own), jnp.log(jnp.maximum(pool, 1e-30)))


def distance(net: Net, h: Array, given: _Weights) -> Array:
    """The mean over the batches' cells of the critics' estimates of the Wasserstein distance."""
    return (given.share * (given.of * criticised(net, h)).sum(0)).sum()


def critic_cost(net: Net, h: Array, batch: Array, given: _Weights, key: Array) -> Array:
    """What a critic lowers: minus its estimate, and the penalty between random cells of a batch and of all cells."""
    pick, other, between = jax.random.split(key, 3)
    one = jax.random.randint(pick, (_PAIRS,), 0, len(h))
    two = jax.random.categorical(other, given.log_pool.T[batch[one]])
    t = jax.random.uniform(between, (_PAIRS, 1))
    slopes = jax.vmap(jax.grad(lambda point, b: criticised(net, point)[b]))(t * h[one] + (1 - t) * h[two], batch[one])
    length = jnp.sqrt((slopes**2).sum(1) + 1e-12)
    return _PENALTY * ((length - 1) ** 2).mean() - distance(net, h, given)


def _optimizer(critic: bool) -> Any:
    import optax

    return optax.scale_by_adam(b1=0.5, b2=0.9) if critic else optax.scale_by_adam(b1=0.5)


def _parts(net: Net) -> tuple[Net, Net]:
    names = [name for name in net if name.startswith("critic")]
    return {n: net[n] for n in net if n not in names}, {n: net[n] for n in names}


def _step(state: Any, cells: Cells | None, rate: Any, key: Any, weight: Any, **settings: Any) -> Any:
    """Steps of the critics and one of the autoencoder; without cells, the state before the first."""
    if cells is None:
        coder, critic = _parts(state)
        return state, (_optimizer(critic=False).init(coder), _optimizer(critic=True).init(critic))
    return _stepped(state, cells, rate, key, weight, **settings)


@partial(jax.jit, static_argnames=("batches", "forward"))
def _stepped(state: Any, cells: Cells, rate: Array, key: Array, weight: Array, *, batches: int, forward: Any) -> Any:
    net, (coder_memory, critic_memory) = state
    coder, critic = _parts(net)
    given = weights(cells, batches)
    h, _ = forward(coder, cells, key)

    def sharpen(carry: tuple[Net, Any], key: Array) -> tuple[tuple[Net, Any], None]:
        critic, memory = carry
        steps, memory = _optimizer(critic=True).update(
            jax.grad(critic_cost)(critic, h, cells.batch, given, key), memory
        )
        return (jax.tree.map(lambda value, move: value - _CRITIC_RATE * move, critic, steps), memory), None

    (critic, critic_memory), _ = jax.lax.scan(sharpen, (critic, critic_memory), jax.random.split(key, _CRITIC_STEPS))

    def cost(coder: Net) -> Array:
        h, error = forward(coder, cells, key)
        return error.mean() + weight * distance(critic, h, given)

    steps, coder_memory = _optimizer(critic=False).update(jax.grad(cost)(coder), coder_memory)
    return lowered(coder, steps, rate) | critic, (coder_memory, critic_memory)
