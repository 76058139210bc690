"""A variational autoencoder of counts of genes and of surface proteins: one latent space, after totalVI."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float, Int

from scdiffx._core import counts as C
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.minibatch import host_csr
from scdiffx._core.random import as_seed
from scdiffx.ops._joint_net import batch_bound, bound, decode_proteins, initial, read_proteins
from scdiffx.ops._vae import Training, check, coefficient, decode, log_theta, posterior, read_genes
from scdiffx.ops._vae_fit import trained

__all__ = ["JointVAE", "JointVAEResult"]

Net = dict[str, Any]


class JointVAEResult(NamedTuple):
    """`latent`: posterior means (cells, n_latent). `latent_std`: their standard deviations.

    `normalized`: expected share of each gene of `columns` in the molecules of the cell (cells, columns), or None.
    `proteins`: expected counts of proteins, without background (cells, proteins). `foreground`: the probability that a
    protein's count is more than background (cells, proteins).
    """

    latent: Float[Array, "cells n_latent"]
    latent_std: Float[Array, "cells n_latent"]
    normalized: Float[Array, "cells columns"] | None
    proteins: Float[Array, "cells proteins"]
    foreground: Float[Array, "cells proteins"]


@operator
class JointVAE:
    """Counts of genes and of proteins from one latent normal vector for each cell (after totalVI, Gayoso 2021).

    Genes x_n are as in :class:`VAE`. A protein is background or foreground: y_nt ~ (1 - p_nt) NB(b_nt, phi_t) +
    p_nt NB(b_nt r_nt, phi_t), with p_nt and r_nt > 1 networks of z_n and the batch. The background is latent too:
    log b_nt ~ N(c_t, d_t), the same prior for all cells of a batch, its posterior a network of z_n and the batch.
    One encoder sees both modalities. Of totalVI these are left out: a latent library size (the total count of genes
    takes its place), proteins that were not measured in some batches, the dispersion of proteins by batch.
    `init`, the call and what is differentiable are as in :class:`VAE`.
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

    def init(self, x: C.Matrix, y: C.Matrix, batch: Array | None = None, key: Array | None = None) -> JointVAE:
        if self.net is not None:
            return self
        check(self.likelihood, self.dispersion, x.shape[0])
        if y.shape[0] != x.shape[0] or not y.shape[1]:
            raise ValueError(f"proteins of shape {tuple(y.shape)} do not go with genes of {x.shape[0]} cells")
        codes = np.zeros(x.shape[0], np.int32) if batch is None else np.asarray(batch, np.int32)
        with jax.enable_x64(False):
            seed = 0 if key is None else as_seed(key)
            # Side by side, both are drawn as one matrix.
            both = sp.hstack([host_csr(x), host_csr(y)], format="csr")
            net, history = trained(self, both, codes, seed, partial(initial, y.shape[1]), batch_bound)
        net, history = (jax.tree.map(lambda a: jnp.asarray(a, x.dtype), tree) for tree in (net, history))
        return replace(self, net=net, history=history)

    def __call__(self, x: C.Matrix, y: C.Matrix, batch: Int[Array, " cells"] | None = None) -> JointVAEResult:
        net, codes = self._net(x), _codes(x, batch)
        given = C.map_rows(x, lambda block: read_genes(net, block)) + read_proteins(net, C.dense(y).astype(x.dtype))
        mean, std = posterior(net, given)
        found = decode_proteins(net, mean, codes)
        foreground = jax.nn.sigmoid(found.logit)
        # The mean of a log-normal background.
        level = jnp.exp(found.background + found.background_std**2 / 2 + found.log_ratio)
        shares = None if self.columns is None else self._shares(mean, codes, self.columns)
        return JointVAEResult(mean, std, shares, foreground * level, foreground)

    def _shares(self, latent: Array, codes: Array, columns: Array) -> Float[Array, "cells columns"]:
        net = self._net(latent)
        packed = jnp.concatenate([latent, codes[:, None].astype(latent.dtype)], 1)
        return C.map_rows(
            packed, lambda rows: jax.nn.softmax(decode(net, rows[:, :-1], rows[:, -1].astype(jnp.int32)))[:, columns]
        )

    def loss(
        self, x: C.Matrix, y: C.Matrix, batch: Int[Array, " cells"] | None = None, key: Array | None = None
    ) -> Float[Array, ""]:
        """The negative evidence lower bound in nats per cell, with one latent sample per cell."""
        net, n = self._net(x), x.shape[0]
        rows = x.block_rows if isinstance(x, C.Counts) else min(C.BLOCK_ROWS, n)
        proteins = C.dense(y).astype(x.dtype)
        noise = jax.random.normal(
            jax.random.key(0) if key is None else key, (n, self.n_latent + proteins.shape[1]), x.dtype
        )
        codes = jnp.pad(_codes(x, batch), (0, -n % rows))
        proteins, noise = (jnp.pad(part, ((0, -n % rows), (0, 0))) for part in (proteins, noise))

        def step(carry: tuple[Array, Array], block: Array, mask: Array) -> tuple[Array, Array]:
            total, i = carry
            b, t, e = (jax.lax.dynamic_slice_in_dim(part, i * rows, rows) for part in (codes, proteins, noise))
            fit, divergence = bound(net, block, t, b, e, self.likelihood)
            for counts, log_r in ((block, log_theta(net, b)), (t, log_theta(net, b, "protein_log_theta"))):
                there = counts > 0
                fit += jnp.where(there, coefficient(jnp.where(there, counts, 1), log_r), 0).sum(1)
            return total + ((divergence - fit) * mask).sum(), i + 1

        return C.fold_rows(x, step, (jnp.zeros((), x.dtype), jnp.zeros((), jnp.int32)))[0] / n

    def _net(self, like: Any) -> Net:
        if self.net is None:
            raise ValueError("JointVAE needs its networks: call `op = op.init(x, y, batch)` first")
        return {name: jnp.asarray(value, like.dtype) for name, value in self.net.items()}


def _codes(x: C.Matrix, batch: Array | None) -> Int[Array, " cells"]:
    return jnp.zeros(x.shape[0], jnp.int32) if batch is None else batch
