"""The network of :class:`scdiffx.ops.Communication`: graph attention whose edges carry ligands times receptors."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from scdiffx._core.graph import Pattern, columns_to_slots, rows_to_slots
from scdiffx._log import progress_bar
from scdiffx.ops._gat import attend, initial_attention

__all__ = ["Message", "change", "trained"]

Net = dict[str, Any]
_HEADS = 2
_CHECK = 10  # steps between looks at the held-out cells
_WARMUP = 20


class Message(NamedTuple):
    """What the network reads: standardised features of cells, ligands and receptors of its pairs, and the pairs' sums.

    `scale` standardises the product of ligand and receptor over an edge.
    """

    features: Float[Array | np.ndarray, "cells features"]
    sent: Float[Array | np.ndarray, "cells edge_features"]
    borne: Float[Array | np.ndarray, "cells edge_features"]
    scale: Float[Array | np.ndarray, " edge_features"]
    summed: Float[Array | np.ndarray, "cells edge_features"]


def change(
    net: Net, p: Pattern, m: Message, present: Bool[Array, "rows width"] | None = None
) -> Float[Array, "cells programs"]:
    """What the network adds to the linear model: 0 before training.

    An edge's features are products of the sender's ligand and the receiver's receptor. They bend the attention, and
    their sums over the neighbours are read beside what is attended to.
    """
    edges = columns_to_slots(p, m.sent) * rows_to_slots(p, m.borne) * m.scale
    h = jax.nn.gelu(m.features @ net["read"] + net["read_shift"])
    value = attend(net["attention"], p, h, edges, present).value.reshape(h.shape[0], -1)
    joined = jnp.concatenate([h, value, m.summed], 1)
    return jax.nn.gelu(joined @ net["join"] + net["join_shift"]) @ net["out"]


def _initial(m: Message, hidden: int, programs: int, rng: np.random.Generator) -> Net:
    features, edge_features = m.features.shape[1], m.sent.shape[1]

    def normal(n_in: int, n_out: int) -> np.ndarray:
        return (rng.standard_normal((n_in, n_out)) / math.sqrt(n_in)).astype(np.float32)

    dims = max(hidden // _HEADS, 1)
    return {
        "read": normal(features, hidden),
        "read_shift": np.zeros(hidden, np.float32),
        "attention": initial_attention(hidden, _HEADS, dims, rng, edge_features),
        "join": normal(hidden + _HEADS * dims + edge_features, hidden),
        "join_shift": np.zeros(hidden, np.float32),
        "out": np.zeros((hidden, programs), np.float32),
    }


def _optimizer(decay: float) -> Any:
    import optax

    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(decay))


@partial(jax.jit, static_argnames=("decay", "dropout"), donate_argnums=(0,))
def _step(
    state: Any, data: Any, rate: Array, seed: Array, *, decay: float, dropout: float
) -> tuple[Any, Float[Array, ""]]:
    net, optimizer_state = state
    p, m, target, train, present = data
    key = jax.random.key(seed)
    kept = jax.random.bernoulli(key, 1 - dropout, m.features.shape) / (1 - dropout)

    def cost(net: Net) -> Array:
        error = (target - change(net, p, m._replace(features=m.features * kept), present)) ** 2
        return (error.mean(1) * train).sum() / train.sum()

    value, grads = jax.value_and_grad(cost)(net)
    steps, optimizer_state = _optimizer(decay).update(grads, optimizer_state, net)
    return (jax.tree.map(lambda a, b: a - rate * b, net, steps), optimizer_state), value


@jax.jit
def _error(net: Net, data: Any, cells: Array) -> Float[Array, ""]:
    p, m, target, _, present = data
    error = (target - change(net, p, m, present)) ** 2
    return (error.mean(1) * cells).sum() / cells.sum()


def trained(
    p: Pattern,
    m: Message,
    present: np.ndarray,
    target: Float[np.ndarray, "cells programs"],
    split: Any,
    settings: Any,
    seed: int,
) -> tuple[Net, np.ndarray]:
    """Weights that predict what the linear model leaves, those best in the validation cells; and both errors."""
    rng = np.random.default_rng(seed)
    net = _initial(m, settings.n_hidden, target.shape[1], rng)
    p, m, present = jax.tree.map(jnp.asarray, (p, m, present))
    train, held = (jnp.asarray(cells, jnp.float32) for cells in (split.train, split.validation))
    data = (p, m, jnp.asarray(target, jnp.float32), train, present)
    state = (jax.tree.map(jnp.asarray, net), _optimizer(settings.decay).init(net))
    best, history = (float(_error(net, data, held)), net), []
    steps, since = settings.n_steps, 0
    bar = progress_bar(steps, "communication", settings.progress)
    for i in range(steps):
        rate = settings.learning_rate * min(1, (i + 1) / _WARMUP) * (1 + math.cos(math.pi * i / steps)) / 2
        numbers = (np.float32(rate), np.uint32(rng.integers(2**32)))
        state, value = _step(state, data, *numbers, decay=settings.decay, dropout=settings.dropout)
        bar.update()
        if (i + 1) % _CHECK and i + 1 < steps:
            continue
        check = float(_error(state[0], data, held))
        if not math.isfinite(check):
            raise FloatingPointError(f"the error is not finite after step {i}: lower the learning rate")
        history.append((float(value), check))
        since += 1
        if check < best[0]:
            # The next step reuses the memory of the weights.
            best, since = (check, jax.tree.map(np.array, state[0])), 0
        if since >= settings.patience:
            break
    bar.close()
    return best[1], np.asarray(history).reshape(-1, 2).T
