"""Cell types by a semi-supervised variational autoencoder of counts, after scANVI."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core import counts as C
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.minibatch import host_csr
from scdiffx._core.random import as_seed
from scdiffx.ops._logistic_annotation import decided
from scdiffx.ops._scanvi_fit import Cells, SemiSupervisedTraining, Surroundings, trained
from scdiffx.ops._scanvi_net import bound, classify, entropy
from scdiffx.ops._vae import VAE, coefficient, encode, log_theta

__all__ = ["SemiSupervisedVAE", "SemiSupervisedVAEResult"]

Net = dict[str, Any]


class SemiSupervisedVAEResult(NamedTuple):
    """What the cells are.

    `probabilities` of the types (cells, types), calibrated where enough labels could be held out. `confidence`
    (cells,): the largest, lowered where `distance` is above 1. `distance` (cells,): that in the latent space from the
    labelled cells of the most probable type, squared, in units of the distance within which 98 % of held-out ones lie.
    `types` (cells,): the number of the type, -1 for unassigned. `latent` (cells, n_latent): means of the posterior.
    """

    probabilities: Float[Array, "cells types"]
    confidence: Float[Array, " cells"]
    distance: Float[Array, " cells"]
    types: Int[Array, " cells"]
    latent: Float[Array, "cells n_latent"]


@operator
class SemiSupervisedVAE:
    """scANVI (Xu et al. 2021): the second model of Kingma et al. (2014) on the autoencoder of :class:`VAE`.

    The counts come from z1 and the batch as in :class:`VAE`, but z1 from the type y, of equal prior probabilities, and
    z2 ~ N(0, 1) within the type: p(z1 | z2, y), q(z1 | x), q(z2 | z1, y) and the classifier q(y | z1) are networks. In
    the bound, labelled cells have their type and the others the mean over q(y | z1); labelled cells, in minibatches of
    their own, add their classification loss times a weight. (scvi-tools 1.4 takes the mean over q(y | z1) for labelled
    cells too.) `init` trains the autoencoder, unless `vae` has weights, and the whole from there; at the start of that
    the bound is the autoencoder's, because z1 is N(0, 1) within each type.

    It is then trained anew from there without each of some folds of the labels. The cells of these give the
    `temperature` by which log odds are divided, and how far from the labelled cells of a type its cells lie in the
    latent space.
    The call is the encoder and the classifier at the mean of z1, differentiable in counts and weights; which type is
    the most probable is discrete. With `genes`, the networks are of these columns alone.
    """

    net: Net | None = learnable(default=None)
    temperature: float | Array | None = learnable(default=None, constraint="positive")
    vae: VAE = buffer(default=VAE())
    around: Surroundings = buffer(default=Surroundings())
    genes: Array | None = buffer(default=None)
    history: dict[str, Array] | None = buffer(default=None, structure=True)
    threshold: float = static(default=0.5)
    training: SemiSupervisedTraining = static(default=SemiSupervisedTraining())

    def init(
        self,
        x: C.Matrix,
        batch: Array | None = None,
        labels: Int[Array | np.ndarray, " cells"] | None = None,
        clusters: Array | None = None,
        key: Array | None = None,
    ) -> SemiSupervisedVAE:
        if self.net is not None:
            return self
        if labels is None:
            raise ValueError("SemiSupervisedVAE needs labels (cells,) to be trained on, -1 for unlabelled")
        codes = np.asarray(labels, np.int32)
        sizes = np.bincount(codes[codes >= 0])
        if len(sizes) < 2 or (sizes == 0).any():
            raise ValueError(f"labels must have two or more types, numbered from 0 without gaps; their cells: {sizes}")
        seed = 0 if key is None else as_seed(key)
        # As for the autoencoder: training is in float32 whatever the precision of the input.
        with jax.enable_x64(False):
            csr = host_csr(x if self.genes is None else C.take_columns(x, self.genes))
            batches = np.zeros(len(codes), np.int32) if batch is None else np.asarray(batch, np.int32)
            vae = self.vae.init(C.Counts.from_scipy(csr), jnp.asarray(batches), key=jax.random.key(seed))
            rng = np.random.default_rng([seed, 2])
            net, history, heat, around = trained(vae, Cells(csr, batches, codes), self.training, rng)
        earlier = {} if vae.history is None else {f"vae_{k}": v for k, v in vae.history.items() if k != "kept"}
        parts = (net, history | earlier, around)
        net, history, around = (jax.tree.map(lambda a: jnp.asarray(a, x.dtype), part) for part in parts)
        return replace(
            self,
            net=net,
            temperature=jnp.asarray(heat, x.dtype),
            around=around,
            history=history,
            vae=replace(vae, net=None, history=None),
        )

    def __call__(
        self,
        x: C.Matrix,
        batch: Int[Array, " cells"] | None = None,
        labels: Int[Array, " cells"] | None = None,
        clusters: Int[Array, " cells"] | None = None,
    ) -> SemiSupervisedVAEResult:
        """Cells with a label (not -1) keep it; the most frequent type of each of the `clusters` becomes that of all.

        `batch` is of use to `init` and `loss` alone: the encoder does not see it.
        """
        net = self._net(x)
        if self.around.limit is None or self.temperature is None:
            raise ValueError("SemiSupervisedVAE needs its networks: call `op = op.init(x, batch, labels)` first")
        projection, centres, limit = (jnp.asarray(v, x.dtype) for v in self.around[:3])
        latent = C.map_rows(x, lambda block: encode(net, self._own(block))[0])
        logits = classify(net, latent) / jnp.asarray(self.temperature, x.dtype)
        square = ((latent @ projection - centres[logits.argmax(1)]) ** 2).sum(1)
        found = decided(logits, square, limit, self.threshold, labels, clusters)
        return SemiSupervisedVAEResult(*found, latent)

    def loss(
        self,
        x: C.Matrix,
        batch: Int[Array, " cells"] | None = None,
        labels: Int[Array, " cells"] | None = None,
        clusters: Array | None = None,
        key: Array | None = None,
    ) -> Float[Array, ""]:
        """The negative bound in nats per cell, at one sample each, plus the weighted mean loss of labelled cells."""
        net = self._net(x)
        n, types, dims = x.shape[0], net["inner_type"].shape[0], net["decoder_in"].shape[0]
        batch = jnp.zeros(n, jnp.int32) if batch is None else batch
        labels = jnp.full(n, -1, jnp.int32) if labels is None else labels
        first, second = jax.random.split(jax.random.key(0) if key is None else key)
        rows = x.block_rows if isinstance(x, C.Counts) else min(C.BLOCK_ROWS, n)
        padded = [jnp.pad(codes, (0, -n % rows)) for codes in (batch, labels)]
        noise = jax.random.normal(first, (len(padded[0]), dims), x.dtype)

        def step(carry: tuple[Array, Array], block: Array, mask: Array) -> tuple[Array, Array]:
            total, i = carry
            block = self._own(block)
            b, y, e = (jax.lax.dynamic_slice_in_dim(part, i * rows, rows) for part in (*padded, noise))
            inner = jax.random.normal(jax.random.fold_in(second, i), (rows, types, dims), x.dtype)
            fit, divergence = bound(net, block, b, y, (e, inner), self.vae.likelihood)
            there = block > 0
            extra = jnp.where(there, coefficient(jnp.where(there, block, 1), log_theta(net, b)), 0).sum(1)
            told = jnp.stack([divergence - fit - extra, entropy(net, block, y)])
            return total + (told * mask).sum(1), i + 1

        bounds, told = C.fold_rows(x, step, (jnp.zeros(2, x.dtype), jnp.zeros((), jnp.int32)))[0]
        return bounds / n + self.training.classification_weight * told / jnp.maximum((labels >= 0).sum(), 1)

    def _own(self, block: Array) -> Array:
        return block if self.genes is None else block[:, self.genes]

    def _net(self, like: Any) -> Net:
        if self.net is None:
            raise ValueError("SemiSupervisedVAE needs its networks: call `op = op.init(x, batch, labels)` first")
        return {name: jnp.asarray(value, like.dtype) for name, value in self.net.items()}
