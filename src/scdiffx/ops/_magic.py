"""Imputation by diffusion over the cells (MAGIC)."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scdiffx._core import counts as C
from scdiffx._core.counts import Matrix, dense
from scdiffx._core.devices import padded, whole
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.graph import Graph, Pattern, flip, squared_distances
from scdiffx._core.knn import nearest
from scdiffx._core.random import as_seed
from scdiffx._core.section import Section

__all__ = ["Magic", "MagicResult"]

# magic-impute's constants: weights below the first are cut; `t` is found where one more step changes less than the
# second (as a Procrustes disparity of at most so many genes), within so many steps.
_THRESHOLD = 1e-4
_CONVERGED = 1e-3
_GENES_FOR_T = 500
_MAX_T = 20


class MagicResult(NamedTuple):
    """`imputed`: smoothed values (cells, genes). `t`: the diffusion time used."""

    imputed: Float[Array, "cells genes"]
    t: Array


@operator
class Magic:
    """Average each gene over the cells that a random walk of `t` steps reaches (van Dijk et al. 2018).

    The walk steps on the alpha-decay kernel of a representation, ``exp(-(d / s)^decay)`` with s the distance to the
    neighbour of rank ``knn[0]``, over at most ``knn[1]`` neighbours; or on the weights of a given graph. A cell stays
    where it is with weight `self_weight`. The matrix of the walk is applied step by step, never raised to a power.

    Every part of the smoother can be learned: the walk (`bandwidth`, `decay`, `self_weight`), its length `t` (between
    whole numbers the results are interpolated), and its `filter`, a change of the weights of the 0 to `n_steps` step
    walks, 0 at first. What the weights leave to 1 goes to the mean of the gene. `t` None is chosen at `init`: the
    first time from which one more step hardly changes the result.
    """

    of_all_for: ClassVar[tuple[str, ...]] = ("filter",)
    t: float | Array | None = learnable(default=3.0, constraint="positive")
    bandwidth: float | Array | None = learnable(default=1.0, constraint="positive")
    decay: float | Array | None = learnable(default=1.0, constraint="positive")
    self_weight: float | Array = learnable(default=1.0, constraint="positive")
    filter: Array | None = learnable(default=None)
    pattern: Pattern | None = buffer(default=None, structure=True)
    knn: tuple[int, int] = static(default=(5, 15))
    n_steps: int | None = static(default=None)

    def init(self, x: Matrix, neighbourhood: Array | Graph, key: Array | None = None) -> Magic:
        op = self
        if isinstance(neighbourhood, Graph):
            # The weights are given: there is no kernel whose shape could be learned.
            op = replace(op, bandwidth=None, decay=None)
        else:
            scale, most = self.knn
            if not 1 <= scale <= most < x.shape[0]:
                raise ValueError(f"knn={self.knn} must rise from at least 1 to less than {x.shape[0]}, the cells")
            seed = 0 if key is None else as_seed(key)
            indices, _ = nearest(np.asarray(neighbourhood), most + 1, seed=seed)
            pattern = Pattern.from_neighbors(indices[:, 1:], like=self.pattern)
            op = replace(op, pattern=Pattern(*(jnp.asarray(a) for a in pattern)))
        if op.t is None:
            op = replace(op, t=jnp.asarray(float(op._time(x, neighbourhood)), x.dtype))
        n_steps = max(math.ceil(float(np.asarray(op.t))), 1) if op.n_steps is None else op.n_steps
        return replace(op, n_steps=n_steps, filter=jnp.zeros(n_steps + 1, x.dtype))

    def _time(self, x: Matrix, neighbourhood: Array | Graph) -> int:
        """The first time at which the last step changed less than the threshold, and one step more, as in MAGIC."""
        from scipy.spatial import procrustes

        value = dense(x)
        if value.shape[1] > _GENES_FOR_T:
            chosen = np.sort(np.random.default_rng(0).permutation(value.shape[1])[:_GENES_FOR_T])
            value = value[:, chosen]
        graph, stay = _walk(self, neighbourhood, value)
        for t in range(1, _MAX_T):
            following = _one_step(graph, stay, value)
            pair = [np.asarray(v, np.float64) for v in (value, following)]
            if any(np.ptp(v, axis=0).max() == 0 for v in pair) or procrustes(*pair)[2] < _CONVERGED:
                return t + 1
            value = following
        return _MAX_T

    def _walk(self, neighbourhood: Array | Graph, like: Array) -> tuple[Graph, Array]:
        """The weights of the walk, and the share with which a cell stays where it is; rows sum to 1 together."""
        if isinstance(neighbourhood, Graph):
            kernel = neighbourhood
        else:
            kernel = self._kernel(neighbourhood)
        stay = jnp.asarray(self.self_weight, like.dtype)
        total = kernel.row_sums() + stay
        ones = jnp.ones_like(total)
        return kernel.scaled((1 / total).astype(like.dtype), ones), stay / total

    def _kernel(self, z: Float[Array, "cells dims"]) -> Graph:
        p = self.pattern
        if p is None or self.bandwidth is None or self.decay is None:
            raise ValueError("Magic needs the neighbour search: call `op = op.init(x, neighbourhood)` first")
        rank, most = self.knn
        squared = squared_distances(p, z)[: z.shape[0], :most]
        apart = squared > 0
        distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1)), 0)
        scale = (distance[:, rank - 1] * self.bandwidth)[:, None]
        usable = apart & (scale > 0)
        ratio = jnp.where(usable, distance / jnp.where(scale > 0, scale, 1), 1)
        power = jnp.where(usable, jnp.exp(self.decay * jnp.log(ratio)), 0)
        weight = jnp.exp(-power)
        # Copies of a cell have weight 1; a cell with many copies has scale 0 and no other neighbours.
        weight = jnp.where((usable & (weight >= _THRESHOLD) | ~apart) & p.valid[: z.shape[0], :most], weight, 0)
        directed = jnp.zeros(p.indices.shape, z.dtype).at[: z.shape[0], :most].set(weight.astype(z.dtype))
        return Graph(p, (directed + flip(p, directed)) / 2)

    def reach(self, learned: Collection[str]) -> tuple[int, ...]:
        """Values come from as far as the walk goes; its last step is by weights, which rest on what is around them."""
        if self.n_steps is None or self.t is None:
            raise ValueError("Magic needs its walk: call `op = op.init(x, neighbourhood)` first")
        fixed = not {"t", "filter"} & set(learned)
        hops = min(math.ceil(float(np.asarray(self.t))), self.n_steps) if fixed else self.n_steps
        return (hops, hops - 1 if self.pattern is None else hops + 1)

    def within(self, section: Section) -> Magic:
        """The operator on the cells of a section; of structure on the host."""
        return self if self.pattern is None else replace(self, pattern=section.pattern(self.pattern))

    def of_all(self, x: Matrix) -> dict[str, Array]:
        """What calling needs of all cells where `x` holds some of them, if `filter` is not 0."""
        return {"mean": C.column_sums(x) / x.shape[0]}

    def __call__(self, x: Matrix, neighbourhood: Array | Graph, mean: Array | None = None) -> MagicResult:
        if self.n_steps is None or self.filter is None or self.t is None:
            raise ValueError("Magic needs its walk: call `op = op.init(x, neighbourhood)` first")
        genes = x.shape[1]
        x = padded(dense(x), axis=1)
        # Each device walks on the whole graph, with its genes: steps mix cells, never genes.
        graph, stay = jax.tree.map(whole, self._walk(neighbourhood, x))
        t = jnp.minimum(jnp.asarray(self.t, x.dtype), self.n_steps)
        steps = jnp.arange(self.n_steps + 1)
        weights = jnp.maximum(1 - jnp.abs(steps - t), 0) + self.filter

        def step(carry: tuple[Array, Array], weight: Array) -> tuple[tuple[Array, Array], None]:
            value, total = carry
            value = _step(graph, stay, value)
            return (value, total + weight * value), None

        rest = (1 - weights.sum()) * (x.mean(0) if mean is None else padded(mean))
        start = (x, weights[0] * x + rest)
        (_, imputed), _ = jax.lax.scan(step, start, weights[1:])
        return MagicResult(imputed[:, :genes], t)


def _step(graph: Graph, stay: Array, value: Array) -> Array:
    return graph @ value + stay[:, None] * value


_one_step = jax.jit(_step)


@jax.jit
def _walk(op: Magic, neighbourhood: Array | Graph, like: Array) -> tuple[Graph, Array]:
    return op._walk(neighbourhood, like)
