"""Velocities in an embedding: the displacement that is expected from the transitions to the cells around."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scdiffx._core.directed import Directed
from scdiffx._core.fields import learnable, operator, static
from scdiffx.ops._velocity_graph import self_transition

__all__ = ["VelocityEmbedding", "transition_probabilities"]

_ROWS = 64
# Height over width of the axes, and the factor of its scale, in Matplotlib's quiver, after which scVelo scales arrows.
_ASPECT = 3.696 / 4.96
_QUIVER = 1.8


def transition_probabilities(
    cosines: Directed, scale: float | Array = 10.0, *, negative: bool = False, stay: bool = True
) -> tuple[Directed, Float[Array, " cells"]]:
    """Transition probabilities to other cells, from cosines by an exponential kernel, and those to stay.

    With `negative` cosines below 0 have negative "probabilities", which push away; otherwise small ones.
    """
    c = jnp.where(cosines.valid, cosines.values, 0)
    stored = c != 0
    own = self_transition(cosines) if stay else jnp.zeros(cosines.n_cells, c.dtype)
    if negative:
        t, rest = jnp.sign(c) * jnp.expm1(scale * jnp.abs(c)), jnp.expm1(scale * own)
    else:
        t, rest = jnp.where(stored, jnp.exp(scale * c), 0), jnp.where(own > 0, jnp.exp(scale * own), 0)
    total = cosines.row_sums(jnp.abs(t)) + rest
    scaled = 1 / jnp.where(total > 0, total, 1)
    return cosines.with_values(t * cosines.spread(scaled)[:, None]), rest * scaled


@operator
class VelocityEmbedding:
    """Project velocities into an embedding (La Manno 2018; scVelo).

    Each cell moves by the mean of the unit vectors to other cells, weighed by the transition probabilities with their
    mean subtracted. `scale` is the learnable sharpness of the probabilities. ``self_transitions=True`` lets uncertain
    cells stay, ``use_negative_cosines=True`` lets cells push away, and ``autoscale=True`` divides all vectors by what
    makes arrows in a plot of the first two components of a suitable length.
    """

    scale: float | Array = learnable(default=10.0, constraint="positive")
    self_transitions: bool = static(default=True)
    use_negative_cosines: bool = static(default=True)
    autoscale: bool = static(default=True)

    def __call__(self, cosines: Directed, z: Float[Array, "cells dims"]) -> Float[Array, "cells dims"]:
        p, _ = transition_probabilities(
            cosines, self.scale, negative=self.use_negative_cosines, stay=self.self_transitions
        )
        stored = p.valid & (p.values != 0)
        count = p.row_sums(stored.astype(z.dtype))
        mean = p.row_sums() / jnp.maximum(count, 1)
        above = jnp.where(stored, p.values - p.spread(mean)[:, None], 0).astype(z.dtype)
        velocity = p.gathered(_displacements(p, above, z))
        return velocity / (3 * _arrow_scale(z, velocity)) if self.autoscale else velocity


def _displacements(p: Directed, weight: Array, z: Array) -> Array:
    """For each row of slots the weighted sum of the unit vectors from its cell to the targets."""

    @jax.checkpoint
    def block(part: Any) -> Array:
        index, owner, w = part
        step = z[index] - z[owner][:, None]
        squared = (step**2).sum(-1)
        apart = squared > 0
        return ((w * jnp.where(apart, 1 / jnp.sqrt(jnp.where(apart, squared, 1)), 0))[..., None] * step).sum(1)

    owner = jnp.minimum(p.owner, p.n_cells - 1)
    parts = (a.reshape(-1, _ROWS, *a.shape[1:]) for a in (p.indices, owner, weight))
    return jax.lax.map(block, tuple(parts)).reshape(len(owner), z.shape[1])


def _arrow_scale(z: Array, velocity: Array) -> Array:
    """The scale that Matplotlib's quiver finds for arrows at `z` in data units, on a figure of its default size."""
    extent = 1.1 * (z[:, :2].max(0) - z[:, :2].min(0))
    x, y = (velocity[:, i] / jnp.where(extent[i] > 0, extent[i], 1) for i in (0, 1))
    squared = x**2 + (_ASPECT * y) ** 2
    moving = squared > 0
    length = jnp.where(moving, jnp.sqrt(jnp.where(moving, squared, 1)), 0).mean()
    scale = _QUIVER * length * jnp.maximum(10.0, jnp.sqrt(1.0 * z.shape[0]))
    return jnp.where(scale > 0, scale, 1)
