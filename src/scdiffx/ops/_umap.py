"""UMAP: a layout that reproduces the fuzzy weights of a neighbour graph, by sampling edges and random cells."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax import lax
from jaxtyping import Array, Float, Int

from scdiffx._core.fields import buffer, operator, replace, static
from scdiffx._core.graph import Graph, _in_bounds, flip, row_sums, squared_distances
from scdiffx.ops._umap_start import log_radii, random_start, rescaled, spectral_start

__all__ = ["UMAP", "UMAPDensity", "UMAPResult", "UMAPSettings"]

STARTS = ("spectral", "random")
_SLOTS = 2  # edges of each cell that move it together; the patterns' widths are multiples of it
_CLIP = 4.0
_NEAR = 1e-3  # squared distance below which repulsion no longer grows
_TINY = 1e-12
_LEAST_RADIUS = 1e-8


class UMAPResult(NamedTuple):
    """`embedding` (cells, n_components); `radius` (cells,): with densities, the log local radii in it, else None."""

    embedding: Float[Array, "cells dims"]
    radius: Float[Array, " cells"] | None


class UMAPSettings(NamedTuple):
    """How the layout is optimised, under scanpy's names.

    `alpha`: first learning rate, which falls linearly to 0. `gamma`: weight of the repulsion. `negative_sample_rate`:
    cells drawn for each sampled edge. `init_pos`: "spectral" or "random", where no `start` is given.
    """

    alpha: float = 1.0
    gamma: float = 1.0
    negative_sample_rate: int = 5
    init_pos: str = "spectral"


class UMAPDensity(NamedTuple):
    """How densMAP keeps densities, under umap-learn's names; `radius` (cells,), log local radii in the data, by `init`.

    `dens_lambda`: weight of the correlation of log radii. `dens_frac`: share of the epochs, the last ones, in which it
    counts. `dens_var_shift`: added to the variance of the radii in the layout.
    """

    dens_lambda: float | Array = 2.0
    dens_frac: float | Array = 0.3
    dens_var_shift: float | Array = 0.1
    radius: Float[Array, " cells"] | None = None


class _Local(NamedTuple):
    """What the density term takes from each cell (cells,), and from the edges in turn; `scale` stands before it."""

    by_radius: Array
    by_weight: Array
    scale: Array


class _Numbers(NamedTuple):
    a: Array | float
    b: Array | float
    alpha: Array | float
    gamma: Array | float
    n_epochs: Array | int


@operator
class UMAP:
    """Lay out a graph of fuzzy weights (McInnes, Healy and Melville 2018).

    Similarities in the layout are ``1 / (1 + a d^(2b))``; the defaults are those of ``min_dist=0.5, spread=1``. `init`
    finds the start, in a box of size 10: given `start` coordinates, or the spectrum of the graph, component by
    component. The call optimises from it. As in umap-learn, an edge of weight w is sampled in every (1/w)-th epoch on
    both of its sides, pulls its ends together, and brings `negative_sample_rate` random cells that push its head away;
    edges that would not be sampled even once are left out, and each coordinate of a push is at most 4.

    umap-learn moves one pair at a time. Here all cells move together, each by two of its slots of edges at once, which
    needs no scattering; a pull by edges of summed strength s moves a cell by what many small pulls would,
    ``(1 - exp(-2 s)) / 2`` of the way. For small learning rates the two are the same. The random cells of an epoch are
    those at a random distance in one random order of the cells. Trustworthiness and preserved neighbours are
    umap-learn's (docs/measured.md).

    With `density` the layout also keeps local densities (densMAP; Narayan, Berger and Cho 2021): `init` then needs the
    distances to the neighbours, and there are 200 epochs more.

    The coordinates have no useful derivative, after hundreds of epochs; `loss` has one, in weights and coordinates.
    """

    start: Float[Array, "cells dims"] | None = buffer(default=None)
    seed: Array | None = buffer(default=None)
    density: UMAPDensity | None = buffer(default=None)
    a: float = static(default=0.5830300203414425)
    b: float = static(default=1.3341669924314914)
    n_components: int = static(default=2)
    n_epochs: int | None = static(default=None)
    settings: UMAPSettings = static(default=UMAPSettings())

    def init(self, graph: Graph, distances: Graph | None = None, key: Array | None = None) -> UMAP:
        n, dims = graph.shape[0], self.n_components
        if n < dims + 2:
            raise ValueError(f"{n} cells are too few for a layout in n_components={dims}: it needs {dims + 2}")
        if not float(graph.values.max()) > 0:
            raise ValueError("the graph has no edge of a weight above 0")
        if self.settings.init_pos not in STARTS:
            raise ValueError(f"init_pos={self.settings.init_pos!r} is unknown. Available: {list(STARTS)}")
        seed = jax.random.key_data(jax.random.key(0) if key is None else key)
        rng = np.random.default_rng(np.asarray(seed).tolist())
        if self.start is not None:
            start = np.asarray(self.start, np.float64)
            if start.shape != (n, dims):
                raise ValueError(f"the start has shape {start.shape} and must have {(n, dims)}")
        elif self.settings.init_pos == "random":
            start = random_start(n, dims, rng)
        else:
            start = spectral_start(_kept(graph, self._epochs(n)), dims, rng)
        density = self.density
        if density is not None:
            if distances is None:
                raise ValueError("with `density`, UMAP needs distances: call `op = op.init(graph, distances)`")
            radius = log_radii(_kept(graph, self._epochs(n)), distances.to_scipy())
            density = density._replace(radius=jnp.asarray(radius, graph.dtype))
        return replace(self, start=jnp.asarray(rescaled(start, rng), graph.dtype), seed=seed, density=density)

    def __call__(self, graph: Graph, distances: Graph | None = None) -> UMAPResult:
        if self.start is None or self.seed is None:
            raise ValueError("UMAP needs its start: call `op = op.init(graph)` first")
        n_epochs = self._epochs(graph.shape[0])
        weights = graph.values / graph.values.max()
        weights = (weights + flip(graph.pattern, weights)) / 2
        kept = graph.with_values(jnp.where(weights < 1 / _least(n_epochs, graph.shape[0]), 0, weights))
        numbers = _Numbers(self.a, self.b, self.settings.alpha, self.settings.gamma, n_epochs)
        key = jax.random.wrap_key_data(self.seed)
        start = tuple(jnp.asarray(self.start, graph.dtype).T)
        density = self.density
        found = _layout(kept, start, key, numbers, density, self.settings.negative_sample_rate)
        radius = None if density is None else _radii(kept, found, numbers)[0]
        return UMAPResult(jnp.stack(found, 1), radius)

    def loss(self, graph: Graph, embedding: Float[Array, "cells dims"], key: Array | None = None) -> Array:
        """The cross entropy that sampling follows, per unit of weight, with one draw of random cells.

        Each edge costs -log of its similarity, and brings `negative_sample_rate` random cells that cost `gamma` times
        -log(1 - similarity). Differentiable in the weights and in the coordinates.
        """
        p, rate = graph.pattern, self.settings.negative_sample_rate
        n = p.n_cells
        strength = row_sums(p, graph.values)
        pull = (graph.values * attraction(squared_distances(p, embedding), self.a, self.b)).sum()
        order_key, key = jax.random.split(jax.random.key(0) if key is None else key)
        order = jax.random.permutation(order_key, n)
        push = jnp.zeros((), embedding.dtype)
        for shift in jax.random.randint(key, (rate,), 0, n):
            other = jnp.roll(order, -shift)
            apart = repulsion(((embedding - embedding[other]) ** 2).sum(1), self.a, self.b)
            push += (strength * jnp.where(other == jnp.arange(n), 0, apart)).sum()
        return (pull + self.settings.gamma * push) / strength.sum()

    def _epochs(self, n: int) -> int:
        if self.n_epochs is not None:
            return self.n_epochs
        return (500 if n <= 10_000 else 200) + (0 if self.density is None else 200)


def _power(squared: Array, b: float | Array) -> Array:
    """``squared ** b``, with a derivative of 0 at 0."""
    apart = squared > 0
    return jnp.where(apart, jnp.exp(b * jnp.log(jnp.where(apart, squared, 1))), 0)


def attraction(squared: Array, a: float | Array, b: float | Array) -> Array:
    """-log of the similarity at a squared distance."""
    return jnp.log1p(a * _power(squared, b))


def repulsion(squared: Array, a: float | Array, b: float | Array) -> Array:
    """-log(1 - similarity) at a squared distance, finite at 0."""
    return attraction(squared, a, b) - b * jnp.log(squared + _NEAR) - jnp.log(a)


def _least(n_epochs: int, n: int) -> int:
    """The weight 1/least is the smallest that counts, of the largest weight."""
    return n_epochs if n_epochs > 10 else 500 if n <= 10_000 else 200


def _kept(graph: Graph, n_epochs: int) -> sp.csr_matrix:
    """The symmetric weights that are sampled, on the host."""
    weights = graph.to_scipy().astype(np.float64)
    weights = (weights + weights.T).tocsr() / 2
    weights.data[weights.data < weights.data.max() / _least(n_epochs, weights.shape[0])] = 0
    weights.eliminate_zeros()
    return weights


def sampled(weights: Array, epoch: Array) -> Array:
    """1 where an edge is sampled in an epoch: one of weight w is when ``epoch * w`` passes an integer."""
    return jnp.floor(epoch * weights) - jnp.floor((epoch - 1) * weights)


@partial(jax.jit, static_argnames="rate")
def _layout(
    graph: Graph, start: tuple[Array, ...], key: Array, numbers: _Numbers, density: UMAPDensity | None, rate: int
) -> tuple[Array, ...]:
    """All epochs; coordinates are one array for each dimension, which is what vectorises."""
    p, dtype = graph.pattern, graph.dtype
    rows, n, n_epochs = p.indices.shape[0], p.n_cells, numbers.n_epochs
    a, b, learning_rate, gamma = (jnp.asarray(x, dtype) for x in numbers[:4])
    numbers = _Numbers(a, b, learning_rate, gamma, n_epochs)
    in_turn = tuple(jnp.asarray(x).T.reshape(-1, _SLOTS, rows) for x in (graph.values, p.indices))
    order_key, key = jax.random.split(key)
    order, owner = jax.random.permutation(order_key, n), jnp.asarray(p.owner)

    def epoch(i: Array, y: tuple[Array, ...], *, dense: bool) -> tuple[Array, ...]:
        shifts = jax.random.randint(jax.random.fold_in(key, i), (in_turn[0].shape[0], rate), 0, n)
        now = jnp.asarray(i, dtype)
        alpha = numbers.alpha * (1 - (now - 1) / n_epochs)
        local = _local(graph, y, numbers, density) if dense and density is not None else None

        def turn(y: tuple[Array, ...], given: tuple[Array, ...]) -> tuple[tuple[Array, ...], None]:
            weights, indices, shift = given
            y, edges = _pulled(y, sampled(weights, now), indices, owner, alpha, numbers, local, weights)
            return _pushed(y, edges, order, shift, alpha, numbers), None

        return lax.scan(turn, y, (*in_turn, shifts))[0]

    if density is None:
        return lax.fori_loop(1, n_epochs, partial(epoch, dense=False), start)
    # The first epoch i with (i + 1) / n_epochs > 1 - dens_frac.
    first = jnp.floor((1 - jnp.asarray(density.dens_frac, dtype)) * n_epochs + 1e-3).astype(jnp.int32)
    first = jnp.clip(first, 1, n_epochs)
    y = lax.fori_loop(1, first, partial(epoch, dense=False), start)
    return lax.fori_loop(first, n_epochs, partial(epoch, dense=True), y)


def _of_cells(rows: Array, owner: Array, n: int) -> Array:
    """Sums of rows, those of the overflow added to their owners."""
    return rows[:n].at[owner].add(rows[n:], mode="drop")


def _of_rows(cells: Array, owner: Array) -> Array:
    return jnp.concatenate([cells, cells.at[owner].get(mode="fill", fill_value=0)])


def _pulled(
    y: tuple[Array, ...],
    on: Float[Array, "slots rows"],
    indices: Int[Array, "slots rows"],
    owner: Array,
    alpha: Array,
    numbers: _Numbers,
    local: _Local | None = None,
    weights: Float[Array, "slots rows"] | None = None,
) -> tuple[tuple[Array, ...], Array]:
    """The cells after the pull of some of their edges, and how many edges were sampled at each.

    With `local`, each edge pulls or pushes by the density term too.
    """
    a, b, n = numbers.a, numbers.b, y[0].shape[0]
    own = [_of_rows(v, owner) for v in y]
    force, strength, edges = [jnp.zeros_like(v) for v in own], jnp.zeros_like(own[0]), jnp.zeros_like(own[0])
    denser = [jnp.zeros_like(v) for v in own]
    for j in range(_SLOTS):
        gap = [v - _in_bounds(w, indices[j]) for v, w in zip(own, y, strict=True)]
        squared = jnp.maximum(sum(g * g for g in gap), _TINY)
        lower = jnp.exp((b - 1) * jnp.log(squared))
        near = 1 / (1 + a * lower * squared)
        pull = on[j] * 2 * a * b * lower * near
        force = [f + pull * g for f, g in zip(force, gap, strict=True)]
        strength, edges = strength + pull, edges + on[j]
        if local is not None and weights is not None:
            both = [_of_rows(x, owner) + _in_bounds(x, indices[j]) for x in local[:2]]
            change = near * ((1 - b * (1 - near)) * both[0] + a * b * lower * near * both[1])
            change = 2 * local.scale * change / jnp.where(weights[j] > 0, weights[j], 1)
            denser = [d + on[j] * jnp.clip(change * g, -_CLIP, _CLIP) for d, g in zip(denser, gap, strict=True)]
    # Twice, because an edge is sampled from both of its sides in the same epoch.
    s = 2 * alpha * _of_cells(strength, owner, n)
    way = 2 * alpha * jnp.where(s > 1e-6, -jnp.expm1(-2 * s) / (2 * jnp.maximum(s, 1e-6)), 1)
    if local is not None:
        force = [f - d for f, d in zip(force, denser, strict=True)]
    moved = tuple(v - way * _of_cells(f, owner, n) for v, f in zip(y, force, strict=True))
    return moved, _of_cells(edges, owner, n)


def _radii(graph: Graph, y: tuple[Array, ...], numbers: _Numbers) -> tuple[Array, Array]:
    """The log local radius of each cell in the layout, and the sum of its similarities to its neighbours."""
    p = graph.pattern
    squared = squared_distances(p, jnp.stack(y, 1))
    near = jnp.where(graph.values > 0, 1 / (1 + numbers.a * _power(squared, numbers.b)), 0)
    total = row_sums(p, near)
    mean = row_sums(p, near * squared) / jnp.where(total > 0, total, 1)
    return jnp.log(_LEAST_RADIUS + mean), total


def _local(graph: Graph, y: tuple[Array, ...], numbers: _Numbers, density: UMAPDensity) -> _Local:
    """The derivative of the correlation of log radii in data and layout, as far as it is one of cells."""
    assert density.radius is not None
    n, dtype = graph.shape[0], graph.dtype
    weight, shift = (jnp.asarray(x, dtype) for x in (density.dens_lambda, density.dens_var_shift))
    known = (density.radius - density.radius.mean()) / jnp.maximum(density.radius.std(), _TINY)
    radius, total = _radii(graph, y, numbers)
    variance = radius.var() + shift
    pull = known - (radius @ known) / (n - 1) * (radius - radius.mean()) / variance
    # umap-learn adds each similarity from both of its sides.
    by_weight = pull / (2 * jnp.where(total > 0, total, 1))
    return _Local(by_weight * jnp.exp(-radius), by_weight, weight * graph.values.sum() / (jnp.sqrt(variance) * n))


def _pushed(
    y: tuple[Array, ...], edges: Array, order: Array, shift: Int[Array, " rate"], alpha: Array, numbers: _Numbers
) -> tuple[Array, ...]:
    """The cells after the push of random others, as many for each sampled edge as there are shifts."""
    a, b, gamma, n = numbers.a, numbers.b, numbers.gamma, y[0].shape[0]
    mixed = [jnp.concatenate([v, v]) for v in (_in_bounds(v, order) for v in y)]
    force = [jnp.zeros_like(v) for v in y]
    for r in range(shift.shape[0]):
        gap = [v - lax.dynamic_slice(m, (shift[r],), (n,)) for v, m in zip(y, mixed, strict=True)]
        squared = sum(g * g for g in gap)
        power = jnp.exp(b * jnp.log(jnp.maximum(squared, _TINY)))
        push = 2 * gamma * b / ((_NEAR + squared) * (1 + a * power))
        force = [f + jnp.clip(push * g, -_CLIP, _CLIP) for f, g in zip(force, gap, strict=True)]
    return tuple(v + alpha * edges * f for v, f in zip(y, force, strict=True))
