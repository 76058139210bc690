"""The kinetics of splicing: transcription, splicing and degradation, and the times at which counts are reached."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["Rates", "at_time", "solution", "time_from_start", "time_from_switch", "unspliced"]

# Logarithms are taken of what lies between this and 1 minus this, as in scVelo.
_EDGE = 1e-6


class Rates(NamedTuple):
    """The kinetics of each gene (genes,): unspliced counts are divided by `scaling`, transcription ends at `switch`."""

    alpha: Float[Array, " genes"]
    beta: Float[Array, " genes"]
    gamma: Float[Array, " genes"]
    scaling: Float[Array, " genes"]
    switch: Float[Array, " genes"]


def _log(x: Array) -> Array:
    x = jnp.clip(x, _EDGE, 1 - _EDGE)
    if x.dtype != jnp.float64:
        return jnp.log(x)
    # XLA's logarithm in double precision takes nine times as long as in single, its exponential twice: correct the
    # one by the other. What is left of the error is its third power.
    near = jax.lax.stop_gradient(jnp.log(x.astype(jnp.float32)).astype(x.dtype))
    ratio = x * jnp.exp(-near)
    return near + 2 * (ratio - 1) / (ratio + 1)


def _apart(beta: Array, gamma: Array) -> Array:
    """The difference of the rates, never 0."""
    d = gamma - beta
    return jnp.where(jnp.abs(d) < 1e-7, 1e-7, d)


def unspliced(tau: Array, u0: Array | float, alpha: Array, beta: Array) -> Array:
    decay = jnp.exp(-beta * tau)
    return u0 * decay + alpha / beta * (1 - decay)


def solution(
    tau: Array, u0: Array | float, s0: Array | float, alpha: Array | float, beta: Array, gamma: Array
) -> tuple[Array, Array]:
    """Unspliced and spliced counts after `tau` from (u0, s0); rates that are nearly alike lose no digits."""
    u_decay, s_decay = jnp.exp(-beta * tau), jnp.exp(-gamma * tau)
    gap = jnp.maximum(jnp.abs(gamma - beta), 1e-7)
    between = jnp.maximum(u_decay, s_decay) * jnp.expm1(-gap * tau) / gap
    u = u0 * u_decay + alpha / beta * (1 - u_decay)
    s = s0 * s_decay + alpha / gamma * (1 - s_decay) + (alpha - u0 * beta) * between
    return u, s


def time_from_start(u: Array, s: Array, r: Rates) -> Array:
    """The time after which counts are reached from 0: by unspliced counts where these are slower, else by both."""
    share = r.beta / _apart(r.beta, r.gamma)
    end = r.alpha / r.gamma - share * (r.alpha / r.beta)
    by_u = r.gamma >= r.beta
    # One logarithm for both cases: they are what takes time.
    left = jnp.where(by_u, 1 - u * r.beta / r.alpha, (s - share * u - end) / -end)
    return -_log(left) / jnp.where(by_u, r.beta, r.gamma)


def time_from_switch(u: Array, s: Array, u0: Array, s0: Array, r: Rates) -> Array:
    """The time after which counts are reached from (u0, s0) when transcription has ended."""
    share = r.beta / _apart(r.beta, r.gamma)
    by_u = r.gamma >= r.beta
    left = jnp.where(by_u, u / u0, (s - share * u) / (s0 - share * u0))
    return -_log(left) / jnp.where(by_u, r.beta, r.gamma)


def at_time(t: Array, r: Rates) -> tuple[Array, Array, Array]:
    """Unspliced and spliced counts at the times since the start of transcription, and the rate of transcription."""
    on = t < r.switch
    u0, s0 = solution(r.switch, 0.0, 0.0, r.alpha, r.beta, r.gamma)
    alpha = jnp.where(on, r.alpha, 0)
    tau = jnp.where(on, t, t - r.switch)
    u, s = solution(tau, jnp.where(on, 0, u0), jnp.where(on, 0, s0), alpha, r.beta, r.gamma)
    return u, s, alpha
