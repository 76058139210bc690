"""The network of :class:`scdiffx.ops.SpatialAutoencoder`, and its training on blocks of neighbouring cells."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Bool, Float, Int

from scdiffx._core.graph import Graph, Pattern, columns_to_slots, rows_to_slots
from scdiffx._log import progress_bar
from scdiffx.ops._gat import attend, initial_attention

__all__ = ["Block", "Net", "SpatialTraining", "blocks_of", "encoded", "errors", "initial", "trained"]

Net = dict[str, Any]
_CHECK_EVERY = 10
_LARGEST_GRADIENT = 5.0


class SpatialTraining(NamedTuple):
    """The autoencoder's size, and how it is trained.

    `n_layers` of attention, each of `n_heads` and `n_hidden` units in all. A step of Adam (`learning_rate`, decoupled
    `weight_decay`) hides the share `masked` of the cells. Training ends after `max_steps`, or after
    `patience` steps in which the share `validation` of the cells, hidden throughout, was not predicted better; the best
    weights are kept. With `prune`, a resolution of Leiden, a second attention is confined to neighbours of the same
    expression cluster and counts `alpha` in the mean of both. Of more than `max_cells` cells a step takes a block of at
    most so many, contiguous in space, with the neighbours within `halo` hops.
    """

    n_hidden: int = 32
    n_heads: int = 2
    n_layers: int = 2
    masked: float = 0.3
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    max_steps: int = 300
    patience: int = 50
    validation: float = 0.1
    prune: float | None = None
    alpha: float = 0.5
    max_cells: int = 8_192
    halo: int = 2
    progress: bool = False


def initial(x: np.ndarray, s: SpatialTraining, dims: int, rng: np.random.Generator) -> Net:
    """Weights before training: about means over neighbourhoods of a random projection."""
    features = x.shape[1]

    def normal(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns)) / math.sqrt(rows)

    each = s.n_hidden // s.n_heads
    layers = [initial_attention(s.n_hidden, s.n_heads, each, rng) for _ in range(s.n_layers)]
    if s.prune is not None:
        second = [initial_attention(s.n_hidden, s.n_heads, each, rng)["attend"] for _ in range(s.n_layers)]
        layers = [layer | {"attend_within": own} for layer, own in zip(layers, second, strict=True)]
    net = {
        "mean": x.mean(0, dtype=np.float64),
        "log_scale": np.log([max(float(x.std(0, dtype=np.float64).max()), 1e-12)]),
        "enter": normal(features, s.n_hidden),
        "enter_shift": np.zeros(s.n_hidden),
        **{name: np.stack([layer[name] for layer in layers]) for name in layers[0]},
        "shift": np.zeros((s.n_layers, s.n_hidden)),
        "latent": normal(s.n_hidden, dims),
        "decode": normal(dims, features),
        "decode_shift": np.zeros(features),
    }
    return {name: np.asarray(value, np.float32) for name, value in net.items()}


_OF_LAYERS = ("receive", "send", "attend", "attend_within", "shift")


def encoded(
    net: Net,
    graph: Graph,
    x: Float[Array, "cells features"],
    clusters: Int[Array, " cells"] | None = None,
    alpha: float = 0.0,
    shown: Bool[Array, " cells"] | None = None,
) -> Float[Array, "cells dims"]:
    """The embedding. Cells that are not `shown` have no part in it: their own is made from their neighbours."""
    p, present = graph.pattern, jax.lax.stop_gradient(graph.values) > 0
    within = None
    if clusters is not None:
        within = present & (rows_to_slots(p, clusters) == columns_to_slots(p, clusters))

    def layer(weights: Net, h: Array, heard: Array | None) -> Array:
        value = attend(weights, p, h, present=present, heard=heard).value
        if within is not None:
            own = attend(weights | {"attend": weights["attend_within"]}, p, h, present=within, heard=heard).value
            value = (1 - alpha) * value + alpha * own
        return jax.nn.elu(value.reshape(h.shape) + weights["shift"])

    h = jax.nn.elu((x - net["mean"]) / jnp.exp(net["log_scale"]) @ net["enter"] + net["enter_shift"])
    if shown is not None:
        h = jnp.where(shown[:, None], h, 0)
    else:  # All cells at once: what the edges hold is computed again on the way back.
        layer = jax.checkpoint(layer)
    for i in range(net["shift"].shape[0]):
        h = layer({name: net[name][i] for name in _OF_LAYERS if name in net}, h, shown if i == 0 else None)
    return h @ net["latent"]


def errors(net: Net, embedding: Float[Array, "cells dims"], x: Array) -> Float[Array, " cells"]:
    """Squared errors of the features decoded from the embedding, in units of the network's scale."""
    decoded = embedding @ net["decode"] + net["decode_shift"]
    return (((x - net["mean"]) / jnp.exp(net["log_scale"]) - decoded) ** 2).sum(1)


class Block(NamedTuple):
    """Cells of one step: what is known of them, which count (`core`), and which may be shown in training (`train`)."""

    x: Float[Array, "cells features"]
    graph: Graph
    clusters: Int[Array, " cells"] | None
    core: Bool[Array, " cells"]
    train: Bool[Array, " cells"]


def blocks_of(
    x: np.ndarray, graph: Graph, clusters: np.ndarray | None, train: np.ndarray, s: SpatialTraining
) -> list[Block]:
    """All cells as one block, or blocks of cells that follow each other in the graph's own order, with their halo."""
    n = len(x)
    if n <= s.max_cells:
        whole: Any = (x, graph, clusters, np.ones(n, bool), train)
        return [jax.tree.map(jnp.asarray, Block(*whole))]
    edges = graph.to_scipy()
    both = (edges + edges.T).tocsr()
    parts = np.array_split(np.asarray(graph.pattern.order), math.ceil(n / s.max_cells))
    cells = [_with_halo(both, core, s.halo) for core in parts]
    most = -(-max(map(len, cells)) // 256) * 256
    graphs = _of_one_shape([_part_of(edges, here, most) for here in cells])

    def padded(values: np.ndarray, here: np.ndarray) -> Array:
        out = np.zeros((most, *values.shape[1:]), values.dtype)
        out[: len(here)] = values[here]
        return jnp.asarray(out)

    return [
        Block(
            padded(x, here),
            near,
            None if clusters is None else padded(clusters, here),
            jnp.arange(most) < len(core),
            padded(train, here),
        )
        for core, here, near in zip(parts, cells, graphs, strict=True)
    ]


def _with_halo(edges: sp.csr_matrix, core: np.ndarray, hops: int) -> np.ndarray:
    """The cells of `core`, followed by those within some hops of them."""
    reached = np.zeros(edges.shape[0], np.float32)
    reached[core] = 1
    for _ in range(hops):
        reached = ((reached + edges @ reached) > 0).astype(np.float32)
    reached[core] = 0
    return np.concatenate([core, np.flatnonzero(reached)])


def _part_of(edges: sp.csr_matrix, cells: np.ndarray, size: int) -> Graph:
    part = sp.csr_matrix(edges[cells][:, cells])
    part.resize(size, size)
    part.sort_indices()
    return Graph.from_scipy(part)


def _of_one_shape(graphs: list[Graph]) -> list[Graph]:
    """As many rows for all graphs of one width, so that they share compiled code."""
    rows = max(len(g.values) for g in graphs)

    def fill(a: Any, value: Any, count: int) -> np.ndarray:
        a = np.asarray(a)
        return np.concatenate([a, np.full((count, *a.shape[1:]), value, a.dtype)])

    def enlarged(g: Graph) -> Graph:
        p, count, width = g.pattern, rows - len(g.values), g.values.shape[1]
        own = np.arange(len(g.values) * width, rows * width, dtype=np.int32).reshape(count, width)
        reverse = np.concatenate([np.asarray(p.reverse), own])
        owner, valid = fill(p.owner, p.n_cells, count), fill(p.valid, False, count)
        grown = Pattern(fill(p.indices, 0, count), reverse, owner, valid, p.order)
        return Graph(Pattern(*map(jnp.asarray, grown)), jnp.asarray(fill(g.values, 0, count)))

    return [enlarged(g) for g in graphs]


def _optimizer(s: SpatialTraining) -> Any:
    import optax

    return optax.chain(
        optax.clip_by_global_norm(_LARGEST_GRADIENT), optax.adamw(s.learning_rate, weight_decay=s.weight_decay)
    )


@partial(jax.jit, static_argnames=("settings",), donate_argnums=(0,))
def _train_step(state: Any, block: Block, seed: Array, *, settings: SpatialTraining) -> tuple[Any, Array]:
    """One gradient step; returns the state and the error of the hidden cells."""
    net, memory = state
    drawn = jax.random.uniform(jax.random.key(seed), block.train.shape) < settings.masked
    counted = block.core & block.train & drawn

    def cost(net: Net) -> Array:
        z = encoded(net, block.graph, block.x, block.clusters, settings.alpha, block.train & ~drawn)
        return jnp.where(counted, errors(net, z, block.x), 0).sum() / jnp.maximum(counted.sum(), 1)

    value, gradient = jax.value_and_grad(cost)(net)
    # Where the features are and how wide they are is known.
    gradient |= {name: jnp.zeros_like(net[name]) for name in ("mean", "log_scale")}
    moves, memory = _optimizer(settings).update(gradient, memory, net)
    moves |= {name: jnp.zeros_like(net[name]) for name in ("mean", "log_scale")}
    return ({name: net[name] + moves[name] for name in net}, memory), value


@partial(jax.jit, static_argnames=("settings",))
def _held_out(net: Net, block: Block, *, settings: SpatialTraining) -> Array:
    """The total error of the cells that are hidden throughout."""
    z = encoded(net, block.graph, block.x, block.clusters, settings.alpha, block.train)
    return jnp.where(block.core & ~block.train, errors(net, z, block.x), 0).sum()


def trained(
    x: np.ndarray, graph: Graph, clusters: np.ndarray | None, s: SpatialTraining, dims: int, seed: int
) -> tuple[Net, dict[str, np.ndarray]]:
    """The best weights, and how training went: errors as shares of the variance of the cells that were held out."""
    rng = np.random.default_rng(seed)
    train = np.ones(len(x), bool)
    train[rng.permutation(len(x))[: max(1, round(s.validation * len(x)))]] = False
    net = initial(x[train], s, dims, rng)
    best, best_step = net, 0
    blocks = blocks_of(x, graph, clusters, train, s)
    spread = (((x - net["mean"]) / np.exp(net["log_scale"])) ** 2).sum(1, dtype=np.float64)
    spread = np.maximum([spread[train].mean(), spread[~train].sum()], 1e-12)
    state = (jax.tree.map(jnp.asarray, net), _optimizer(s).init(net))
    every = max(_CHECK_EVERY, 2 * len(blocks))
    history: dict[str, list[float]] = {"train": [], "validation": []}
    bar, order, since = progress_bar(s.max_steps, "graph attention", s.progress), np.zeros(0, int), []
    for step in range(1, s.max_steps + 1):
        order = rng.permutation(len(blocks)) if not len(order) else order
        state, value = _train_step(state, blocks[order[0]], np.uint32(rng.integers(2**32)), settings=s)
        order = order[1:]
        since.append(value)
        bar.update()
        if step % every and step != s.max_steps:
            continue
        check = sum(float(_held_out(state[0], block, settings=s)) for block in blocks) / spread[1]
        if not math.isfinite(check):
            raise FloatingPointError(f"the error is not finite after {step} steps: lower the learning rate")
        if not history["validation"] or check < min(history["validation"]):
            # The next step reuses the memory of the weights.
            best, best_step = jax.tree.map(np.array, state[0]), step
        history["train"].append(float(np.mean(since)) / spread[0])
        history["validation"].append(check)
        bar.set_postfix({"validation": f"{check:.4f}"}, refresh=False)
        since = []
        if step - best_step >= s.patience:
            break
    bar.close()
    return best, {name: np.asarray(values) for name, values in history.items()} | {"kept": np.asarray(best_step)}
