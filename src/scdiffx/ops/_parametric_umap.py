"""UMAP by a network: the layout as a function of the coordinates, which places new cells too."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.graph import Graph
from scdiffx._core.random import as_seed
from scdiffx._log import progress_bar
from scdiffx.ops._integration_models import Net, uniform
from scdiffx.ops._umap import attraction, repulsion

__all__ = ["ParametricUMAP", "ParametricUMAPResult", "ParametricUMAPTraining"]

_STEPS_AT_ONCE = 50
_LAYERS = ("first", "second", "third", "last")


class ParametricUMAPResult(NamedTuple):
    """`embedding`: the places of the cells (cells, n_components)."""

    embedding: Float[Array, "cells dims"]


class ParametricUMAPTraining(NamedTuple):
    """The network's width, and how it is trained: `n_steps` of Adam, the rate falling from `learning_rate` to 0.

    A step draws `batch_size` edges with chances in proportion to their weights, and for each of them
    `negative_sample_rate` random cells, whose repulsion counts `gamma` times.
    """

    n_hidden: int = 128
    n_steps: int = 1500
    learning_rate: float = 3e-3
    batch_size: int = 1024
    negative_sample_rate: int = 5
    gamma: float = 1.0
    progress: bool = False


@operator
class ParametricUMAP:
    """A network from coordinates to a layout, trained on UMAP's objective (Sainburg, McInnes and Gentner 2021).

    Three hidden layers of rectified units. `init` trains it on a graph of fuzzy weights between the cells,
    and does nothing to an operator that has a `net`. The call is the network: it needs no graph, places cells that
    were not there, and is differentiable in coordinates and weights.
    """

    by_cell: ClassVar[bool] = True
    net: Net | None = learnable(default=None)
    center: Float[Array, " features"] | None = buffer(default=None)
    scale: Array | None = buffer(default=None)
    history: Float[Array, " checks"] | None = buffer(default=None, structure=False)
    a: float = static(default=0.5830300203414425)
    b: float = static(default=1.3341669924314914)
    n_components: int = static(default=2)
    training: ParametricUMAPTraining = static(default=ParametricUMAPTraining())

    def init(
        self, x: Float[Array, "cells features"], graph: Graph | None = None, key: Array | None = None
    ) -> ParametricUMAP:
        if self.net is not None:
            return self
        if graph is None:
            raise ValueError("ParametricUMAP is trained on a graph: call `op = op.init(x, graph)`")
        if graph.shape[0] != x.shape[0]:
            raise ValueError(f"the graph has {graph.shape[0]} cells and the coordinates have {x.shape[0]}")
        if not float(graph.values.max()) > 0:
            raise ValueError("the graph has no edge of a weight above 0")
        seed = 0 if key is None else as_seed(key)
        # Training is in float32 whatever the precision of the input: its noise is that of sampling.
        with jax.enable_x64(False):
            found = _trained(self, np.asarray(x, np.float32), graph, seed)
        net, center, scale, history = jax.tree.map(lambda a: jnp.asarray(a, x.dtype), found)
        return replace(self, net=net, center=center, scale=scale, history=history)

    def __call__(self, x: Float[Array, "cells features"], graph: Graph | None = None) -> ParametricUMAPResult:
        if self.net is None or self.center is None or self.scale is None:
            raise ValueError("ParametricUMAP needs its network: call `op = op.init(x, graph)` first")
        if x.shape[1] != self.center.shape[0]:
            raise ValueError(f"the network takes {self.center.shape[0]} features, got {x.shape[1]}")
        net = jax.tree.map(lambda w: jnp.asarray(w, x.dtype), self.net)
        scaled = (x - jnp.asarray(self.center, x.dtype)) / jnp.asarray(self.scale, x.dtype)
        return ParametricUMAPResult(placed(net, scaled))


def placed(net: Net, x: Float[Array, "cells features"]) -> Float[Array, "cells dims"]:
    """The network on standardised coordinates."""
    for name in _LAYERS[:-1]:
        x = jax.nn.relu(x @ net[name] + net[f"{name}_shift"])
    return x @ net[_LAYERS[-1]] + net[f"{_LAYERS[-1]}_shift"]


def _initial(rng: np.random.Generator, features: int, hidden: int, dims: int) -> Net:
    net: Net = {}
    for name, n_in, n_out in zip(_LAYERS, (features, *3 * (hidden,)), (*3 * (hidden,), dims), strict=True):
        # Layouts that start small unfold; those that start large stay crumpled.
        net |= {name: uniform(rng, n_in, n_out), f"{name}_shift": np.zeros(n_out, np.float32)}
    net[_LAYERS[-1]] *= 0.1
    return net


def _optimizer() -> Any:
    import optax

    return optax.scale_by_adam()


@partial(jax.jit, static_argnames=("rate",))
def _steps(
    state: Any, x: Array, pairs: Array, rates: Array, key: Array, numbers: tuple[Any, ...], *, rate: int
) -> tuple[Any, Array]:
    """Several gradient steps on edges (steps, 2, batch_size); returns the state and the mean cost."""
    a, b, gamma = numbers

    def cost(net: Net, ends: Array, key: Array) -> Array:
        y = placed(net, x[ends.reshape(-1)]).reshape(2, ends.shape[1], -1)
        total = attraction(((y[0] - y[1]) ** 2).sum(1), a, b)
        for turn in jax.random.split(key, rate):
            order = jax.random.permutation(turn, ends.shape[1])
            apart = repulsion(((y[0] - y[1][order]) ** 2).sum(1), a, b)
            # A cell does not push itself, nor the one it is drawn to.
            total += gamma * jnp.where((ends[0] == ends[1][order]) | (order == jnp.arange(len(order))), 0, apart)
        return total.mean()

    def step(carry: Any, given: Any) -> tuple[Any, Array]:
        net, memory = carry
        ends, pace, turn = given
        value, gradient = jax.value_and_grad(cost)(net, ends, turn)
        moves, memory = _optimizer().update(gradient, memory)
        return (jax.tree.map(lambda w, m: w - pace * m, net, moves), memory), value

    state, values = jax.lax.scan(step, state, (pairs, rates, jax.random.split(key, len(rates))))
    return state, values.mean()


def _trained(op: ParametricUMAP, x: np.ndarray, graph: Graph, seed: int) -> tuple[Any, ...]:
    """The weights, the centre and scale of the coordinates, and the mean cost of every fifty steps."""
    settings, rng = op.training, np.random.default_rng(seed)
    center, scale = x.mean(0), max(float(x.std()), 1e-12)
    scaled = jnp.asarray((x - center) / scale)
    edges = graph.to_scipy().tocoo()
    chances = np.cumsum(edges.data.astype(np.float64))
    net = _initial(rng, x.shape[1], op.training.n_hidden, op.n_components)
    state = (net, _optimizer().init(net))
    key, history = jax.random.key(seed), []
    numbers = tuple(np.float32(v) for v in (op.a, op.b, settings.gamma))
    size = min(settings.batch_size, len(chances))
    bar = progress_bar(settings.n_steps, "parametric UMAP", settings.progress)
    for start in range(0, settings.n_steps, _STEPS_AT_ONCE):
        now = np.arange(start, min(start + _STEPS_AT_ONCE, settings.n_steps))
        drawn = np.searchsorted(chances, rng.random((len(now), size)) * chances[-1], side="right")
        drawn = np.minimum(drawn, len(chances) - 1)
        pairs = np.stack([edges.row[drawn], edges.col[drawn]], 1).astype(np.int32)
        rates = np.float32(settings.learning_rate * 0.5) * (1 + np.cos(np.pi * now / settings.n_steps))
        turn = jax.random.fold_in(key, start)
        state, value = _steps(
            state, scaled, pairs, rates.astype(np.float32), turn, numbers, rate=settings.negative_sample_rate
        )
        if not math.isfinite(float(value)):
            raise FloatingPointError(f"the cost is not finite after {start} steps: lower the learning rate")
        history.append(float(value))
        bar.update(len(now))
    bar.close()
    return state[0], center, np.float32(scale), np.asarray(history)
