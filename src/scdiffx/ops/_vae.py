"""A variational autoencoder of counts: latent cells and denoised expression, by the generative model of scVI."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jaxtyping import Array, Float, Int

from scdiffx._core import counts as C
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.minibatch import SparseRows, densify, host_csr
from scdiffx._core.random import as_seed
from scdiffx.ops._vae_fit import trained

__all__ = ["DISPERSIONS", "LIKELIHOODS", "VAE", "Training", "VAEResult"]

LIKELIHOODS = ("nb", "zinb")
DISPERSIONS = ("gene", "gene-batch")
Net = dict[str, Any]
MIN_CELLS = 10
_STEPS = 5_000
# exp(9) is a Poisson distribution for any count that occurs, and float32 still resolves the gamma function there.
_LOG_THETA = (-7.0, 9.0)
_LOG_STD = (-6.0, 3.0)
_DROPOUT = 0.3


class Training(NamedTuple):
    """How a network is trained: `max_epochs` None is 5,000 gradient steps, but 10 to 400 epochs.

    The weight of the Kullback-Leibler term rises from 0 to 1 over `warmup` epochs. With `patience`, training stops
    after so many epochs without a better likelihood bound on the `validation` share of the cells, and the best weights
    are kept; without, it runs to the end and the last are kept.
    """

    max_epochs: int | None = None
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 50
    patience: int | None = None
    validation: float = 0.1
    progress: bool = False

    def epochs(self, n_cells: int) -> int:
        steps = max(1, n_cells // self.batch_size)
        return self.max_epochs or max(10, min(400, round(_STEPS / steps)))


class VAEResult(NamedTuple):
    """`latent`: posterior means (cells, n_latent). `latent_std`: their standard deviations.

    `normalized`: expected share of each gene of `columns` in the molecules of the cell (cells, columns), or None.
    """

    latent: Float[Array, "cells n_latent"]
    latent_std: Float[Array, "cells n_latent"]
    normalized: Float[Array, "cells columns"] | None


@operator
class VAE:
    """Counts as draws from a negative binomial whose mean a network computes from a latent normal vector (Lopez 2018).

    For cell n with total count l_n, batch b_n and latent z_n ~ N(0, 1): x_ng ~ NB(l_n softmax(f(z_n, b_n))_g,
    theta_g), zero-inflated on request. A second network approximates the posterior of z_n from the counts; the batch
    is given to f alone, so that z has no use for it. `init` trains both on the evidence lower bound, and does nothing
    to an operator that has a `net`. The call is the trained encoder, differentiable with respect to counts and weights.
    """

    by_cell: ClassVar[bool] = True
    net: Net | None = learnable(default=None)
    history: dict[str, Array] | None = buffer(default=None, structure=True)
    columns: Array | None = buffer(default=None)
    n_latent: int = static(default=10)
    n_hidden: int = static(default=128)
    likelihood: str = static(default="nb")
    dispersion: str = static(default="gene")
    training: Training = static(default=Training())

    def init(self, x: C.Matrix, batch: Array | None = None, key: Array | None = None) -> VAE:
        if self.net is not None:
            return self
        check(self.likelihood, self.dispersion, x.shape[0])
        codes = np.zeros(x.shape[0], np.int32) if batch is None else np.asarray(batch, np.int32)
        # Training is in float32 whatever the precision of the input: its noise is that of minibatches.
        with jax.enable_x64(False):
            seed = 0 if key is None else as_seed(key)
            net, history = trained(self, host_csr(x), codes, seed, initial, batch_bound)
        net, history = (jax.tree.map(lambda a: jnp.asarray(a, x.dtype), tree) for tree in (net, history))
        return replace(self, net=net, history=history)

    def __call__(self, x: C.Matrix, batch: Int[Array, " cells"] | None = None) -> VAEResult:
        net = self._net(x)
        mean, std = jnp.split(C.map_rows(x, lambda block: jnp.concatenate(encode(net, block), 1)), 2, axis=1)
        if self.columns is None:
            return VAEResult(mean, std, None)
        return VAEResult(mean, std, self.normalized(mean, batch, self.columns))

    def normalized(
        self, latent: Float[Array, "cells n_latent"], batch: Int[Array, " cells"] | None, columns: Int[Array, " genes"]
    ) -> Float[Array, "cells genes"]:
        """The expected share of the genes at `columns` among a cell's molecules, given latent vectors."""
        net = self._net(latent)
        codes = jnp.zeros(latent.shape[0], jnp.int32) if batch is None else batch
        packed = jnp.concatenate([latent, codes[:, None].astype(latent.dtype)], 1)

        def shares(block: Array) -> Array:
            return jax.nn.softmax(decode(net, block[:, :-1], block[:, -1].astype(jnp.int32)))[:, columns]

        return C.map_rows(packed, shares)

    def loss(self, x: C.Matrix, batch: Int[Array, " cells"] | None = None, key: Array | None = None) -> Array:
        """The negative evidence lower bound in nats per cell, with one latent sample per cell."""
        net = self._net(x)
        n = x.shape[0]
        codes = jnp.zeros(n, jnp.int32) if batch is None else batch
        noise = jax.random.normal(jax.random.key(0) if key is None else key, (n, self.n_latent), x.dtype)
        rows = x.block_rows if isinstance(x, C.Counts) else min(C.BLOCK_ROWS, n)
        pad = -n % rows
        codes, noise = jnp.pad(codes, (0, pad)), jnp.pad(noise, ((0, pad), (0, 0)))

        def step(carry: tuple[Array, Array], block: Array, mask: Array) -> tuple[Array, Array]:
            total, i = carry
            b = jax.lax.dynamic_slice_in_dim(codes, i * rows, rows)
            e = jax.lax.dynamic_slice_in_dim(noise, i * rows, rows)
            fit, divergence = bound(net, block, b, e, self.likelihood)
            there = block > 0
            extra = jnp.where(there, coefficient(jnp.where(there, block, 1), log_theta(net, b)), 0).sum(1)
            return total + ((divergence - fit - extra) * mask).sum(), i + 1

        return C.fold_rows(x, step, (jnp.zeros((), x.dtype), jnp.zeros((), jnp.int32)))[0] / n

    def _net(self, like: Any) -> Net:
        if self.net is None:
            raise ValueError("VAE needs its networks: call `op = op.init(x, batch)` first")
        return {name: jnp.asarray(value, like.dtype) for name, value in self.net.items()}


def check(likelihood: str, dispersion: str, n_cells: int) -> None:
    """Raise where nothing can be trained."""
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood={likelihood!r} is unknown. Available: {list(LIKELIHOODS)}")
    if dispersion not in DISPERSIONS:
        raise ValueError(f"dispersion={dispersion!r} is unknown. Available: {list(DISPERSIONS)}")
    if n_cells < MIN_CELLS:
        raise ValueError(f"training needs at least {MIN_CELLS} cells, got {n_cells}")


def layer_norm(x: Array, gain: Array, bias: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gain + bias


def encode(net: Net, x: Float[Array, "cells genes"], key: Array | None = None) -> tuple[Array, Array]:
    """Mean and standard deviation of the approximate posterior of the latent vectors; dropout only with a key."""
    return posterior(net, read_genes(net, x), key)


def read_genes(net: Net, x: Float[Array, "cells genes"]) -> Float[Array, "cells n_hidden"]:
    """What the counts of genes give to the hidden layer of the encoder."""
    # Relative to the average gene of the cell: 1 on average, whatever the depth and the number of genes.
    total = x.sum(1, keepdims=True)
    return jnp.log1p(x * (x.shape[1] / jnp.where(total > 0, total, 1))) @ net["encoder_in"]


def posterior(net: Net, h: Float[Array, "cells n_hidden"], key: Array | None = None) -> tuple[Array, Array]:
    """Mean and standard deviation of the latent vectors, from what all counts give to the hidden layer."""
    h = jax.nn.relu(layer_norm(h, net["encoder_gain"], net["encoder_bias"]))
    if key is not None:
        h = jnp.where(jax.random.bernoulli(key, 1 - _DROPOUT, h.shape), h / (1 - _DROPOUT), 0)
    mean, log_std = jnp.split(h @ net["encoder_out"] + net["encoder_out_bias"], 2, axis=1)
    return mean, jnp.exp(jnp.clip(log_std, *_LOG_STD))


def decode(net: Net, z: Float[Array, "cells n_latent"], batch: Int[Array, " cells"]) -> Float[Array, "cells genes"]:
    """Logits of the genes' shares."""
    return hidden(net, z, batch) @ net["decoder_out"] + net["gene_bias"][batch]


def hidden(net: Net, z: Float[Array, "cells n_latent"], batch: Int[Array, " cells"]) -> Float[Array, "cells n_hidden"]:
    """The hidden layer of the decoder."""
    return jax.nn.relu(z @ net["decoder_in"] + net["decoder_batch"][batch])


def log_theta(net: Net, batch: Array, name: str = "log_theta") -> Float[Array, "cells_or_1 genes"]:
    """Logarithm of the inverse dispersion, of the genes or of the genes in the cells' batches."""
    table = jnp.clip(net[name], *_LOG_THETA)
    return table[batch] if table.shape[0] > 1 else table


def softplus(x: Array) -> Array:
    """log(1 + exp(x)) for finite x; JAX's own spends most of its time on infinite ones."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def coefficient(x: Array, log_r: Array) -> Array:
    """The part of the log probability of counts x > 0 that does not depend on their mean; it is 0 for x = 0."""
    r = jnp.exp(log_r)
    return gammaln(x + r) - gammaln(r) - gammaln(x + 1)


def log_kernel(
    x: Float[Array, "cells genes"],
    log_mu: Float[Array, "cells genes"],
    log_r: Float[Array, "cells_or_1 genes"],
    dropout: Float[Array, "cells genes"] | None = None,
) -> Float[Array, "cells genes"]:
    """Log probability of counts, less :func:`coefficient`, under NB(mean mu, inverse dispersion r).

    With logits `dropout`, zero-inflated.
    """
    spread = softplus(log_mu - log_r)
    waste = jnp.exp(log_r) * spread
    found = x * (log_mu - log_r - spread) - waste
    if dropout is None:
        return found
    # At 0: log(p + (1 - p) nb), with log p = d - softplus(d) and log(1 - p) = -softplus(d).
    return jnp.where(x > 0, found, dropout + softplus(-waste - dropout)) - softplus(dropout)


def bound(
    net: Net, x: Array, batch: Array, noise: Array, likelihood: str, dropout_key: Array | None = None
) -> tuple[Array, Array]:
    """For each cell, the log likelihood less :func:`coefficient` at one latent sample, and the divergence.

    The divergence is that of Kullback and Leibler from the prior. Where x > 0 the coefficient remains to be added: in
    training it is computed at the few places where it is not 0, because gamma functions cost more than all the rest.
    """
    mean, std = encode(net, x, dropout_key)
    fit = reconstruction(net, x, mean + std * noise, batch, likelihood)
    return fit, prior_divergence(mean, std)


def prior_divergence(mean: Array, std: Array) -> Float[Array, " cells"]:
    """Of Kullback and Leibler, of normal distributions from the standard one."""
    return ((mean**2 + std**2 - 1) / 2 - jnp.log(std)).sum(1)


def reconstruction(net: Net, x: Array, z: Array, batch: Array, likelihood: str) -> Float[Array, " cells"]:
    """Log likelihood of the cells given latent vectors, less :func:`coefficient`."""
    log_depth = jnp.log(jnp.maximum(x.sum(1, keepdims=True), 1))
    log_mu = jax.nn.log_softmax(decode(net, z, batch)) + log_depth
    dropout = z @ net["dropout"] + net["dropout_bias"] if likelihood == "zinb" else None
    return log_kernel(x, log_mu, log_theta(net, batch), dropout).sum(1)


def batch_bound(
    net: Net, rows: SparseRows, batch: Array, key: Array, likelihood: str, *, training: bool
) -> tuple[Array, Array]:
    """Log likelihood and divergence of the cells of a minibatch."""
    size, genes = batch.shape[0], net["encoder_in"].shape[0]
    noise = jax.random.normal(key, (size, net["decoder_in"].shape[0]))
    dropout_key = jax.random.fold_in(key, 1) if training else None
    fit, divergence = bound(net, densify(rows, size, genes), batch, noise, likelihood, dropout_key)
    return add_coefficients(net, rows, batch, fit), divergence


def add_coefficients(net: Net, rows: SparseRows, batch: Array, fit: Array) -> Float[Array, " cells"]:
    """`fit` with the sum of :func:`coefficient` over the genes of each cell of a minibatch."""
    return with_coefficients(net["log_theta"], rows, batch, fit)


def with_coefficients(log_thetas: Array, rows: SparseRows, batch: Array, fit: Array) -> Float[Array, " cells"]:
    """`fit` with the coefficients of all columns, given their table of log inverse dispersions."""
    size, columns = batch.shape[0], log_thetas.shape[1]
    table = jnp.clip(log_thetas, *_LOG_THETA)
    row, column = rows.position // columns, rows.position % columns
    log_r = table[batch[jnp.minimum(row, size - 1)], column] if table.shape[0] > 1 else table[0, column]
    return fit.at[row].add(coefficient(jnp.asarray(rows.data), log_r), mode="drop")


def initial(op: VAE, csr: Any, codes: np.ndarray, batches: int, rng: np.random.Generator) -> Net:
    """Weights before training. The output starts at each batch's mean expression and moment estimate of dispersion."""
    genes, hidden, latent = csr.shape[1], op.n_hidden, op.n_latent

    def uniform(n_in: int, n_out: int) -> np.ndarray:
        return rng.uniform(-1, 1, (n_in, n_out)) * math.sqrt(3 / n_in)

    one_hot = np.eye(batches, dtype=np.float32)[codes]
    total = np.asarray(csr.T @ one_hot).T.astype(np.float64)
    overall = (total.sum(0) + 0.5) / (total.sum() + 0.5 * genes)
    # Shrunk towards all cells, as if each batch held a hundred more molecules of average composition.
    share = (total + 100 * overall) / (total.sum(1, keepdims=True) + 100)
    depth = np.asarray(csr.sum(1), np.float64).ravel()
    square = np.asarray(csr.multiply(csr).sum(0), np.float64).ravel()
    excess = square - total.sum(0) - overall**2 * (depth**2).sum()
    theta = overall**2 * (depth**2).sum() / np.maximum(excess, 1e-3 * overall**2 * (depth**2).sum() + 1e-12)
    rows = batches if op.dispersion == "gene-batch" else 1
    net = {
        "encoder_in": uniform(genes, hidden),
        "encoder_gain": np.ones(hidden),
        "encoder_bias": np.zeros(hidden),
        "encoder_out": np.concatenate([uniform(hidden, latent), 0.1 * uniform(hidden, latent)], 1),
        "encoder_out_bias": np.zeros(2 * latent),
        "decoder_in": uniform(latent, hidden),
        "decoder_batch": rng.uniform(-1, 1, (batches, hidden)),
        "decoder_out": 0.1 * uniform(hidden, genes),
        "gene_bias": np.log(share),
        "log_theta": np.tile(np.clip(np.log(theta), -2, 5), (rows, 1)),
    }
    if op.likelihood == "zinb":
        net |= {"dropout": np.zeros((latent, genes)), "dropout_bias": np.full(genes, -3.0)}
    return {name: value.astype(np.float32) for name, value in net.items()}
