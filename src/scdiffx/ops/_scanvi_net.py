"""The networks of semi-supervised annotation and the bound they are trained on."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx.ops._vae import encode, layer_norm, reconstruction

__all__ = ["bound", "classify", "entropy", "initial"]

Net = dict[str, Any]
_LOG_STD = (-6.0, 3.0)
_DROPOUT = 0.1


def initial(latent: int, hidden: int, types: int, rng: np.random.Generator) -> Net:
    """The networks beside the autoencoder's. At first z2 is N(0, 1), p(z1 | z2, y) is too, and types are equal."""

    def uniform(n_in: int, n_out: int) -> np.ndarray:
        return rng.uniform(-1, 1, (n_in, n_out)) * math.sqrt(3 / n_in)

    net = {
        "classifier_in": uniform(latent, hidden),
        "classifier_gain": np.ones(hidden),
        "classifier_bias": np.zeros(hidden),
        "classifier_out": np.zeros((hidden, types)),
        "classifier_out_bias": np.zeros(types),
    }
    for name in ("inner", "outer"):
        net |= {
            f"{name}_in": uniform(latent, hidden),
            f"{name}_type": rng.uniform(-1, 1, (types, hidden)),
            f"{name}_out": np.zeros((hidden, 2 * latent)),
            f"{name}_out_bias": np.zeros(2 * latent),
        }
    return {name: value.astype(np.float32) for name, value in net.items()}


def classify(net: Net, z: Float[Array, "cells n_latent"], key: Array | None = None) -> Float[Array, "cells types"]:
    """Log odds of the types, less a constant of each cell; dropout only with a key."""
    h = jax.nn.relu(layer_norm(z @ net["classifier_in"], net["classifier_gain"], net["classifier_bias"]))
    if key is not None:
        h = jnp.where(jax.random.bernoulli(key, 1 - _DROPOUT, h.shape), h / (1 - _DROPOUT), 0)
    return h @ net["classifier_out"] + net["classifier_out_bias"]


def _by_type(net: Net, name: str, z: Array) -> tuple[Array, Array]:
    """Mean and log standard deviation of a normal vector given another one and each type (cells, types, n_latent)."""
    z = z if z.ndim == 3 else z[:, None]
    h = jax.nn.relu(z @ net[f"{name}_in"] + net[f"{name}_type"])
    mean, log_std = jnp.split(h @ net[f"{name}_out"] + net[f"{name}_out_bias"], 2, axis=-1)
    return mean, jnp.clip(log_std, *_LOG_STD)


def _log_normal(gap: Array, log_std: Array) -> Array:
    return -((gap * jnp.exp(-log_std)) ** 2 / 2 + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def bound(
    net: Net,
    x: Float[Array, "cells genes"],
    batch: Int[Array, " cells"],
    label: Int[Array, " cells"],
    noise: tuple[Float[Array, "cells n_latent"], Float[Array, "cells types n_latent"]],
    likelihood: str,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, " cells"], Float[Array, " cells"]]:
    """For each cell, the log likelihood less `coefficient`, and the divergence of the latent variables.

    At one sample of z1 and, for each type, one of z2. The types count by q(y | z1), or as the `label` (not -1) says:
    the divergence is ``log q(z1|x) - sum_y w_y (log p(z1|z2,y) - KL(q(z2|z1,y) | N(0,1))) + KL(w | p(y))``, with
    equal p(y).
    """
    keys = (None, None) if dropout_key is None else tuple(jax.random.split(dropout_key))
    mean, std = encode(net, x, keys[0])
    z = mean + std * noise[0]
    fit = reconstruction(net, x, z, batch, likelihood)
    posterior = _log_normal(std * noise[0], jnp.log(std))
    log_chance = jax.nn.log_softmax(classify(net, z, keys[1]))
    types = log_chance.shape[1]
    known = label[:, None] >= 0
    weight = jnp.where(known, jax.nn.one_hot(label, types, dtype=z.dtype), jnp.exp(log_chance))
    label_divergence = (weight * jnp.where(known, 0, log_chance)).sum(1) + math.log(types)
    inner, log_std = _by_type(net, "inner", z)
    inner_divergence = ((inner**2 + jnp.exp(2 * log_std) - 1) / 2 - log_std).sum(-1)
    outer, outer_log_std = _by_type(net, "outer", inner + jnp.exp(log_std) * noise[1])
    prior = _log_normal(z[:, None] - outer, outer_log_std)
    return fit, posterior + (weight * (inner_divergence - prior)).sum(1) + label_divergence


def entropy(
    net: Net, x: Float[Array, "cells genes"], label: Int[Array, " cells"], dropout_key: Array | None = None
) -> Float[Array, " cells"]:
    """The classification loss of labelled cells, at the mean of z1; 0 where there is no label."""
    keys = (None, None) if dropout_key is None else tuple(jax.random.split(dropout_key))
    log_chance = jax.nn.log_softmax(classify(net, encode(net, x, keys[0])[0], keys[1]))
    return -(jax.nn.one_hot(label, log_chance.shape[1], dtype=x.dtype) * log_chance).sum(1)
