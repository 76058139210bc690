"""PHATE: a layout of the distances between log probabilities of a diffusion over the cells."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.graph import Graph, Pattern, columns_to_slots, rows_to_slots, squared_distances
from scdiffx._core.random import as_seed
from scdiffx.ops import _mds as scaling
from scdiffx.ops._phate_structure import (
    THRESHOLD,
    PHATEStructure,
    chosen_time,
    entropies,
    landmarks,
    operator_of,
    reach,
)

__all__ = ["PHATE", "PHATEResult", "PHATESettings"]

MDS = ("metric", "classic")
_LEAST = 1e-7  # added to probabilities before their logarithm, as in phate
_CHUNK = 128  # landmarks whose probabilities are held for all cells at once


class PHATEResult(NamedTuple):
    """`embedding` (cells, n_components); `distances` (landmarks, landmarks): of the potentials; `stress`.

    The stress is Kruskal's: the root of the squared errors of the landmarks' distances in the layout, over the squared
    distances.
    """

    embedding: Float[Array, "cells dims"]
    distances: Float[Array, "landmarks landmarks"]
    stress: Array


class PHATESettings(NamedTuple):
    """`gamma`: 1 for log potentials, -1 for probabilities, powers of them between. `mds`: "metric" or "classic".

    The metric scaling takes at most `max_iter` steps, and ends where one moves the points by less than `tol` of their
    spread.
    """

    gamma: float = 1.0
    mds: str = "metric"
    max_iter: int = 1000
    tol: float = 1e-4


@operator
class PHATE:
    """Lay out cells by the potential distances of a diffusion (Moon et al. 2019).

    The kernel is ``exp(-(d / s)^decay)``, with s the distance to the `knn`-th neighbour times `bandwidth`, cut below
    1e-4 and averaged with its transpose. Above `n_landmark` cells the diffusion is one between that many clusters of
    its spectrum, so that the cost is linear in cells. Its operator to the power `t` gives each landmark a row of
    probabilities; the layout reproduces the distances between their negative logs, and cells have the mean place of
    the landmarks that they diffuse to.

    `init` finds neighbours, landmarks and `t` (None: the knee of the von Neumann entropy); these are structure. In the
    coordinates, `decay` and `bandwidth`, the distances between potentials are differentiable, and so is the metric
    layout: implicitly at the minimum of its stress, modulo rigid motions, so that functions of the distances in it have
    exact derivatives where `tol` is small. The classic layout has no derivative here beyond that of the averages.

    Coordinates are in units of the potential distance; phate scales them to norm 1.
    """

    decay: float | Array = learnable(default=40.0, constraint="positive")
    bandwidth: float | Array = learnable(default=1.0, constraint="positive")
    structure: PHATEStructure | None = buffer(default=None, structure=True)
    n_components: int = static(default=2)
    knn: int = static(default=5)
    n_landmark: int = static(default=2000)
    t: int | None = static(default=None)
    settings: PHATESettings = static(default=PHATESettings())

    def init(self, z: Float[Array, "cells dims"], key: Array | None = None) -> PHATE:
        n = z.shape[0]
        if self.settings.mds not in MDS:
            raise ValueError(f"mds={self.settings.mds!r} is unknown. Available: {list(MDS)}")
        if not 1 <= self.knn < n:
            raise ValueError(f"knn={self.knn} must lie between 1 and the number of other cells, {n - 1}")
        least = self.n_components + 1
        if min(n, self.n_landmark) < least:
            raise ValueError(
                f"{min(n, self.n_landmark)} cells or landmarks are too few for n_components={self.n_components}: "
                f"it needs {least}"
            )
        seed = 0 if key is None else as_seed(key)
        nth, kernel = reach(np.asarray(z), self.knn, float(self.decay), float(self.bandwidth), seed)
        landmark = None if n <= self.n_landmark else landmarks(kernel, self.n_landmark, seed)
        entropy = entropies(operator_of(kernel, landmark))
        structure = PHATEStructure(
            Pattern(*(jnp.asarray(a) for a in Pattern.from_csr(kernel.indptr, kernel.indices))),
            jnp.asarray(nth, jnp.int32),
            None if landmark is None else jnp.asarray(landmark, jnp.int32),
            jnp.ones(n, jnp.int32) if landmark is None else jnp.asarray(np.bincount(landmark), jnp.int32),
            jnp.asarray(entropy, z.dtype),
        )
        return replace(self, structure=structure, t=chosen_time(entropy) if self.t is None else self.t)

    def __call__(self, z: Float[Array, "cells dims"]) -> PHATEResult:
        if self.structure is None or self.t is None:
            raise ValueError("PHATE needs its neighbours: call `op = op.init(z)` first")
        kernel = self._kernel(z)
        degree = kernel.row_sums() + 1
        found = _operator(kernel, degree, self.structure)
        with jax.default_matmul_precision("highest"):
            powered = jnp.linalg.matrix_power(found, self.t)
        potential = _potential(powered, self.settings.gamma)
        distances = scaling.pairwise(potential)
        y = scaling.classic_mds(potential, self.n_components)
        if self.settings.mds == "metric":
            y = scaling.metric_mds(distances, y, self.settings.max_iter, self.settings.tol).points
        stress = scaling.stress_of(y, distances)
        if self.structure.landmark is not None:
            y = y[self.structure.landmark]
            y = (kernel @ y + y) / degree[:, None]
        return PHATEResult(y, distances, stress)

    def _kernel(self, z: Float[Array, "cells dims"]) -> Graph:
        """The weights between different cells; each has weight 1 with itself."""
        assert self.structure is not None
        p = self.structure.pattern
        squared = squared_distances(p, z)
        scale = self.bandwidth * _root(((z - z[self.structure.nth]) ** 2).sum(1))
        values = sum(
            _decayed(squared, to_slots(p, scale), self.decay) for to_slots in (rows_to_slots, columns_to_slots)
        )
        return Graph(p, jnp.where(p.valid, values / 2, 0).astype(z.dtype))


def _root(squared: Array) -> Array:
    apart = squared > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1)), 0)


def _decayed(squared: Array, scale: Array, decay: Array | float) -> Array:
    """The weights by one of the two scales. Copies of a cell have weight 1, and one of scale 0 no other neighbours."""
    apart = squared > 0
    usable = apart & (scale > 0)
    ratio = jnp.where(usable, squared, 1) / jnp.where(usable, scale, 1) ** 2
    # Far beyond the cut the power would overflow.
    power = jnp.exp(jnp.minimum(decay / 2 * jnp.log(ratio), 5))
    weight = jnp.exp(-power)
    return jnp.where(usable & (weight >= THRESHOLD), weight, jnp.where(apart, 0, 1))


def _operator(kernel: Graph, degree: Array, structure: PHATEStructure) -> Float[Array, "landmarks landmarks"]:
    """The diffusion operator of the cells, or from landmark to cell to landmark."""
    p, count = kernel.pattern, structure.sizes.shape[0]
    if structure.landmark is None:
        owner = jnp.concatenate([jnp.arange(p.n_cells), jnp.asarray(p.owner)])
        dense = jnp.eye(count, dtype=kernel.dtype).at[owner[:, None], p.indices].add(kernel.values, mode="drop")
        return dense / degree[:, None]
    label, chunk = structure.landmark, min(_CHUNK, count)

    @jax.checkpoint
    def columns(first: Array) -> Array:
        member = (label[:, None] == first + jnp.arange(chunk)).astype(kernel.dtype)
        reached = (kernel @ member + member) / degree[:, None]
        return jax.ops.segment_sum(kernel @ reached + reached, label, count)

    found = lax.map(columns, jnp.arange(0, count, chunk))
    found = jnp.moveaxis(found, 0, 1).reshape(count, -1)[:, :count]
    return found / jax.ops.segment_sum(degree, label, count)[:, None]


def _potential(probability: Array, gamma: float) -> Array:
    if gamma == 1:
        return -jnp.log(probability + _LEAST)
    if gamma == -1:
        return probability
    power = (1 - gamma) / 2
    some = probability > 0
    return jnp.where(some, jnp.exp(power * jnp.log(jnp.where(some, probability, 1))), 0) / power
