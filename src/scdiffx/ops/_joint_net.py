"""The networks of the autoencoder of genes and proteins: likelihood of proteins, background, and where both start."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core.minibatch import SparseRows, densify
from scdiffx.ops import _vae
from scdiffx.ops._vae import hidden, log_kernel, log_theta, posterior, prior_divergence, read_genes, softplus

__all__ = ["ProteinDecoding", "batch_bound", "bound", "decode_proteins", "initial", "log_mixture", "read_proteins"]

Net = dict[str, Any]
_LOG_STD = (-6.0, 3.0)
# Rounds of the mixture that the networks start from: they only have to tell high from low.
_ROUNDS = 30


class ProteinDecoding(NamedTuple):
    """What a latent vector says of proteins, each (cells, proteins).

    `background` and `background_std` are mean and standard deviation of the log background, `log_ratio` > 0 is the
    foreground over it, `logit` that of foreground against background.
    """

    background: Array
    background_std: Array
    log_ratio: Array
    logit: Array


def read_proteins(net: Net, y: Float[Array, "cells proteins"]) -> Float[Array, "cells n_hidden"]:
    """What the counts of proteins give to the hidden layer of the encoder: their depth is signal, and stays."""
    return jnp.log1p(y) @ net["protein_in"] + net["protein_in_bias"]


def decode_proteins(net: Net, z: Float[Array, "cells n_latent"], batch: Int[Array, " cells"]) -> ProteinDecoding:
    out = hidden(net, z, batch) @ net["protein_out"] + net["protein_bias"][batch]
    background, log_std, ratio, logit = jnp.split(out, 4, axis=1)
    return ProteinDecoding(background, jnp.exp(jnp.clip(log_std, *_LOG_STD)), softplus(ratio), logit)


def log_mixture(
    y: Float[Array, "cells proteins"],
    log_background: Float[Array, "cells proteins"],
    log_ratio: Float[Array, "cells proteins"],
    logit: Float[Array, "cells proteins"],
    log_r: Float[Array, "1 proteins"],
) -> Float[Array, "cells proteins"]:
    """Log probability of counts, less their coefficient: background or, by `logit`, foreground of larger mean."""
    low = log_kernel(y, log_background, log_r) - softplus(logit)
    high = log_kernel(y, log_background + log_ratio, log_r) - softplus(-logit)
    return jnp.logaddexp(low, high)


def background_divergence(net: Net, found: ProteinDecoding, batch: Array) -> Float[Array, " cells"]:
    """Of Kullback and Leibler, of the posteriors of log background from the prior of the batch."""
    log_prior = jnp.clip(net["background_log_std"], *_LOG_STD)[batch]
    shift = found.background - net["background_mean"][batch]
    square = (shift**2 + found.background_std**2) * jnp.exp(-2 * log_prior)
    return ((square - 1) / 2 + log_prior - jnp.log(found.background_std)).sum(1)


def bound(
    net: Net, x: Array, y: Array, batch: Array, noise: Array, likelihood: str, dropout_key: Array | None = None
) -> tuple[Array, Array]:
    """For each cell, the log likelihood of both modalities less their coefficients, and the divergence.

    `noise` (cells, n_latent + proteins) makes one sample of the latent vector and of the background.
    """
    mean, std = posterior(net, read_genes(net, x) + read_proteins(net, y), dropout_key)
    z = mean + std * noise[:, : mean.shape[1]]
    found = decode_proteins(net, z, batch)
    log_background = found.background + found.background_std * noise[:, mean.shape[1] :]
    log_r = log_theta(net, batch, "protein_log_theta")
    fit = _vae.reconstruction(net, x, z, batch, likelihood)
    fit += log_mixture(y, log_background, found.log_ratio, found.logit, log_r).sum(1)
    return fit, prior_divergence(mean, std) + background_divergence(net, found, batch)


def batch_bound(
    net: Net, rows: SparseRows, batch: Array, key: Array, likelihood: str, *, training: bool
) -> tuple[Array, Array]:
    """Log likelihood and divergence of the cells of a minibatch, whose proteins stand behind the genes."""
    size, genes, proteins = batch.shape[0], net["encoder_in"].shape[0], net["protein_in"].shape[0]
    both = densify(rows, size, genes + proteins)
    noise = jax.random.normal(key, (size, net["decoder_in"].shape[0] + proteins))
    dropout_key = jax.random.fold_in(key, 1) if training else None
    fit, divergence = bound(net, both[:, :genes], both[:, genes:], batch, noise, likelihood, dropout_key)
    tables = net["log_theta"], jnp.broadcast_to(net["protein_log_theta"], (net["log_theta"].shape[0], proteins))
    return _vae.with_coefficients(jnp.concatenate(tables, 1), rows, batch, fit), divergence


def initial(n_proteins: int, op: Any, csr: Any, codes: np.ndarray, batches: int, rng: np.random.Generator) -> Net:
    """Weights before training: genes as they start alone, proteins at two levels of each."""
    genes = csr.shape[1] - n_proteins
    net = _vae.initial(op, csr[:, :genes].tocsr(), codes, batches, rng)
    logs = np.log1p(csr[:, genes:].toarray().astype(np.float64))
    low, high, spread, share = two_levels(logs)
    # Standardised on the way in, whatever the depth of the proteins.
    weights = rng.uniform(-1, 1, (n_proteins, op.n_hidden)) * math.sqrt(3 / n_proteins)
    weights /= np.maximum(logs.std(0), 0.1)[:, None]
    # Half of the variance within a level is given to the background, half to the counts.
    log_std = np.log(spread) - math.log(2) / 2
    bias = np.concatenate([low, log_std, np.log(np.expm1(np.maximum(high - low, 0.1))), np.log(share / (1 - share))])
    out = 0.1 * rng.uniform(-1, 1, (op.n_hidden, 4 * n_proteins)) * math.sqrt(3 / op.n_hidden)
    proteins = {
        "protein_in": weights,
        "protein_in_bias": -logs.mean(0) @ weights,
        "protein_out": out,
        "protein_bias": np.tile(bias, (batches, 1)),
        "protein_log_theta": np.clip(-2 * log_std, -2, 5)[None],
        "background_mean": np.tile(low, (batches, 1)),
        "background_log_std": np.tile(log_std, (batches, 1)),
    }
    return net | {name: value.astype(np.float32) for name, value in proteins.items()}


def two_levels(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper mean, common standard deviation and share of the upper, of two normal components a column."""
    low, high = np.quantile(logs, [0.25, 0.95], axis=0)
    spread, share = np.maximum(logs.std(0), 0.1), np.full(logs.shape[1], 0.5)
    for _ in range(_ROUNDS):
        logit = np.log(share / (1 - share)) + ((logs - low) ** 2 - (logs - high) ** 2) / (2 * spread**2)
        upper = 0.5 * (1 + np.tanh(logit / 2))
        share = np.clip(upper.mean(0), 0.01, 0.99)
        low = ((1 - upper) * logs).sum(0) / np.maximum((1 - upper).sum(0), 1e-9)
        high = (upper * logs).sum(0) / np.maximum(upper.sum(0), 1e-9)
        square = (1 - upper) * (logs - low) ** 2 + upper * (logs - high) ** 2
        spread = np.maximum(np.sqrt(square.mean(0)), 0.1)
    return low, high, spread, share
