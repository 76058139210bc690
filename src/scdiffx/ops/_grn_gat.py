"""Gene regulation by graph attention from factors to their targets; how each factor matters is read by derivatives."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scdiffx._core.counts import Matrix, fold_rows, n_rows
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.minibatch import host_csr
from scdiffx._core.random import as_seed
from scdiffx._log import progress_bar
from scdiffx.ops._grn import GRN, GRNResult, active, held_out, held_out_cells, solved, standardised, sums

__all__ = ["AttentionGRN", "GRNTraining"]

Net = dict[str, Any]
_SLOPE = 0.2
_CHECK = 25  # steps between looks at the held-out cells
_ROWS = 64  # cells whose edges are held at once
_NOWHERE = -1e9


class GRNTraining(NamedTuple):
    """The network's size, and how it is trained.

    Without a prior each gene listens to the `n_regulators` factors of largest ridge weight. `n_heads` of attention have
    `n_dims` units each. Adam takes at most `n_steps` steps on `batch_size` cells, its rate falling from `learning_rate`
    along a cosine, with decoupled `decay`; the weights are kept that predict the held-out cells best.
    """

    n_regulators: int = 10
    n_heads: int = 2
    n_dims: int = 8
    n_steps: int = 300
    batch_size: int = 64
    learning_rate: float = 1e-2
    decay: float = 1e-2
    progress: bool = False


@operator
class AttentionGRN:
    """Each gene predicted by graph attention (GATv2) on the graph from factors to targets; experimental.

    In each cell a factor k sends ``z_k u_k + v_k``; gene j scores it by ``a . leaky_relu(r_j + z_k u_k + v_k)`` and
    receives the mean of what is sent, weighted by the softmax of the scores over its factors, of which it reads its own
    linear function. So what a factor does to a gene may depend on its own level and on the others'.

    Attention is not effect: `weights` are derivatives of the predicted gene in each factor, averaged over the cells, in
    standard deviations, and have a sign. In simulated cells they find the edges less well than :class:`GRN` does, but
    on logarithms of counts often better.

    `tfs` are the columns of the factors. `regulators` (genes, most), the positions among them of each gene's factors
    (-1 for none), are a prior network's, or `init` takes those of the largest weights in ridge regression. `init`
    trains the network on four fifths of the cells. `r2` (genes,) is the share of the variance of each gene that is
    predicted in the others, which also choose when to stop, and `r2_linear` that of ridge regression on the same cells.
    """

    net: Net | None = learnable(default=None)
    tfs: Int[Array, " tfs"] | None = buffer(default=None)
    regulators: Int[Array, "genes most"] | None = buffer(default=None)
    r2: Float[Array, " genes"] | None = buffer(default=None)
    r2_linear: Float[Array, " genes"] | None = buffer(default=None)
    training: GRNTraining = static(default=GRNTraining())

    def init(self, x: Matrix, key: Array | None = None) -> AttentionGRN:
        seed = 0 if key is None else as_seed(key)
        ridge = GRN(tfs=self.tfs, regulators=self.regulators).init(x, key)
        held = held_out_cells(n_rows(x), seed)[1]
        h = held_out(x, jnp.asarray(held), ridge)
        if self.regulators is None:
            regulators = _strongest(np.asarray(solved(h.kept, ridge)), self.training.n_regulators)
        else:
            regulators = np.asarray(self.regulators)
        moments, graph = (np.asarray(h.kept.mean), np.asarray(h.kept.scale)), (np.asarray(self.tfs), regulators)
        net, r2 = jax.tree.map(
            lambda a: jnp.asarray(a, x.dtype), _trained(host_csr(x), held, moments, graph, self, seed)
        )
        return replace(self, net=net, regulators=jnp.asarray(regulators, jnp.int32), r2=r2, r2_linear=ridge.r2)

    def __call__(self, x: Matrix) -> GRNResult:
        if self.net is None or self.tfs is None or self.regulators is None:
            raise ValueError("AttentionGRN needs to be trained: call its init first")
        m = standardised(sums(x, self.tfs), n_rows(x), self.tfs)
        net, regulators, there = self.net, self.regulators, self.regulators >= 0
        column = self.tfs[jnp.where(there, regulators, 0)]

        @jax.checkpoint
        def derivative(part: tuple[Array, Array]) -> Array:
            block, mask = part
            inputs = jnp.where(there, ((block - m.mean) / m.scale)[:, column], 0)
            slopes = jax.grad(lambda inputs: predicted(net, inputs, regulators, there).sum())(inputs)
            return (slopes * mask[:, None, None]).sum(0)

        def add(total: Array, block: Array, mask: Array) -> Array:
            pad = -len(block) % _ROWS
            block, mask = jnp.pad(block, ((0, pad), (0, 0))), jnp.pad(mask, (0, pad))
            parts = block.reshape(-1, _ROWS, block.shape[1]), mask.reshape(-1, _ROWS)
            return jax.lax.scan(lambda sofar, part: (sofar + derivative(part), None), total, parts)[0]

        slopes = fold_rows(x, add, jnp.zeros(there.shape, x.dtype)) / n_rows(x)
        varies = m.cross[jnp.arange(len(self.tfs)), self.tfs] > 0
        at = jnp.where(there, regulators, len(self.tfs))
        weights = jnp.zeros((len(self.tfs), x.shape[1]), x.dtype)
        weights = weights.at[at, jnp.arange(x.shape[1])[:, None]].set(slopes, mode="drop")
        weights = jnp.where(varies[:, None], weights, 0)
        return GRNResult(weights, active(x, weights, m))


def predicted(
    net: Net, inputs: Float[Array, "cells genes most"], regulators: Int[Array, "genes most"], there: Bool[Array, ...]
) -> Float[Array, "cells genes"]:
    """Genes from what their factors are in each cell, both in standard deviations."""
    heads, dims = net["attend"].shape
    at = jnp.where(there, regulators, 0)
    sent = (inputs[..., None] * net["send"][at] + net["send_shift"][at]).reshape(*inputs.shape, heads, dims)
    joint = net["receive"].reshape(-1, 1, heads, dims) + sent
    score = (jax.nn.leaky_relu(joint, _SLOPE) * net["attend"]).sum(-1)
    # A gene without factors has weights of 0, not the softmax of nothing.
    weight = jnp.where(there[..., None], jax.nn.softmax(jnp.where(there[..., None], score, _NOWHERE), -2), 0)
    received = (weight[..., None] * sent).sum(-3).reshape(*inputs.shape[:2], -1)
    return (received * net["read"]).sum(-1) + net["shift"]


def _strongest(weights: np.ndarray, most: int) -> Int[np.ndarray, "genes most"]:
    order = np.argsort(-np.abs(weights), 0, kind="stable")[:most].T
    return np.where(np.take_along_axis(weights.T, order, 1) != 0, order, -1).astype(np.int32)


def _initial(n_tfs: int, n_genes: int, t: GRNTraining, rng: np.random.Generator) -> Net:
    size = t.n_heads * t.n_dims

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / math.sqrt(size)).astype(np.float32)

    return {
        "send": normal(n_tfs, size),
        "send_shift": normal(n_tfs, size),
        "receive": normal(n_genes, size),
        "attend": 0.3 * normal(t.n_heads, t.n_dims),
        "read": normal(n_genes, size),
        "shift": np.zeros(n_genes, np.float32),
    }


def _optimizer(decay: float) -> Any:
    import optax

    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(decay))


@jax.jit
def _left(net: Net, rows: Array, graph: Any) -> Float[Array, "cells genes"]:
    column, regulators = graph
    there = regulators >= 0
    return rows - predicted(net, jnp.where(there, rows[:, column], 0), regulators, there)


@partial(jax.jit, static_argnames="decay")
def _step(state: Any, rows: Array, graph: Any, rate: Array, decay: float) -> Any:
    net, optimizer_state = state
    grads = jax.grad(lambda net: (_left(net, rows, graph) ** 2).mean())(net)
    steps, optimizer_state = _optimizer(decay).update(grads, optimizer_state, net)
    return jax.tree.map(lambda a, b: a - rate * b, net, steps), optimizer_state


def _trained(
    csr: Any, held: np.ndarray, moments: tuple[np.ndarray, np.ndarray], graph: Any, op: AttentionGRN, seed: int
) -> tuple[Net, np.ndarray]:
    """The weights that predict the held-out cells best, and the shares of the genes' variance that they predict."""
    t, rng = op.training, np.random.default_rng([seed, 1])
    mean, scale = (a.astype(np.float32) for a in moments)
    train, out = np.flatnonzero(~held), np.flatnonzero(held)
    size = min(t.batch_size, len(train))

    def rows(cells: np.ndarray) -> np.ndarray:
        return (csr[cells].toarray() - mean) / scale

    def errors(net: Net, graph: Any) -> np.ndarray:
        total = np.zeros((2, len(mean)))
        for first in range(0, len(out), size):
            # Cells come again to fill the last batch, and do not count.
            cells = np.resize(out[first : first + size], size)
            z, real = rows(cells), min(size, len(out) - first)
            total += ((np.asarray(_left(net, z, graph))[:real] ** 2).sum(0), (z[:real] ** 2).sum(0))
        return np.where(total[1] > 0, total[0] / np.where(total[1] > 0, total[1], 1), 1)

    with jax.enable_x64(False):
        tfs, regulators = graph
        graph = jax.tree.map(jnp.asarray, (tfs[np.maximum(regulators, 0)].astype(np.int32), regulators))
        net = jax.tree.map(jnp.asarray, _initial(len(tfs), len(mean), t, rng))
        state, best = (net, _optimizer(t.decay).init(net)), (net, errors(net, graph))
        bar = progress_bar(t.n_steps, "grn", t.progress)
        for i in range(t.n_steps):
            rate = np.float32(t.learning_rate * (1 + math.cos(math.pi * i / t.n_steps)) / 2)
            state = _step(state, rows(rng.choice(train, size, replace=False)), graph, rate, t.decay)
            bar.update()
            if (i + 1) % _CHECK and i + 1 < t.n_steps:
                continue
            found = errors(state[0], graph)
            if not np.isfinite(found).all():
                raise FloatingPointError(f"the error is not finite after step {i}: lower the learning rate")
            if found.mean() < best[1].mean():
                best = (state[0], found)
        bar.close()
        return jax.tree.map(np.asarray, best[0]), 1 - best[1]
