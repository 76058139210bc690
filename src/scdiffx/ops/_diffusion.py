"""Diffusion maps and diffusion pseudotime."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scdiffx._core.fields import operator, static
from scdiffx._core.graph import Graph, reachable
from scdiffx._core.spectral import eigenpairs, spectral
from scdiffx.ops._pca import fix_signs

__all__ = ["SINGLE_TOL", "DiffusionMap", "DiffusionMapResult", "Pseudotime", "PseudotimeResult", "transitions"]

# A cell's own numbers are divided by the root of its weight: below this, by type, rounding is all that is left of them.
LEAST_WEIGHT = {"float64": 1e-6, "float32": 1e-3}

# scanpy gives eigenvectors this close to stationary the weight 1, which keeps 1 / (1 - eigenvalue) finite.
STATIONARY = 0.9994
# For eigenvectors that are written in float32: scanpy's solver leaves residuals of this size too.
SINGLE_TOL = 1e-7


class DiffusionMapResult(NamedTuple):
    """Eigenvalues (comps,), decreasing, and eigenvectors (cells, comps); `converged`: whether the solver got there."""

    eigenvalues: Float[Array, " comps"]
    eigenvectors: Float[Array, "cells comps"]
    converged: Bool[Array, ""]


class PseudotimeResult(NamedTuple):
    """`pseudotime` (cells,) in [0, 1], inf where the root cannot be reached; `distance`: the same before scaling."""

    pseudotime: Float[Array, " cells"]
    distance: Float[Array, " cells"]
    eigenvalues: Float[Array, " comps"]
    eigenvectors: Float[Array, "cells comps"]
    converged: Bool[Array, ""]


def counted(weights: Float[Array, " cells"]) -> Float[Array, " cells"]:
    """Weights of cells, and 0 for those that are too small to count."""
    return jnp.where(weights >= LEAST_WEIGHT[str(weights.dtype)], weights, 0)


@jax.jit
def transitions(graph: Graph, weights: Float[Array, " cells"] | None = None) -> Graph:
    """The symmetric transition matrix of a weighted graph, with the sampling density divided out (Coifman 2005).

    `weights` say how many cells each cell stands for: sums over cells, of the density and of the steps, are weighted.
    Eigenvectors v belong to the functions ``v / sqrt(weights)``. A cell of weight 0 has no edges left.
    """
    if weights is None:
        density = _inverse(graph.row_sums())
        kernel = graph.scaled(density, density)
        scale = _inverse_root(kernel.row_sums())
        return kernel.scaled(scale, scale)
    w = counted(weights)
    density = _inverse(graph @ w)
    kernel = graph.scaled(density, density)
    scale = _inverse_root(kernel @ w) * _root(w)
    return kernel.scaled(scale, scale)


def _inverse(x: Array) -> Array:
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


def _inverse_root(x: Array) -> Array:
    return jnp.where(x > 0, 1 / jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def _root(x: Array) -> Array:
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def _warm(start: Array | None, weights: Array | None) -> Array | None:
    """Where the search begins: eigenvectors from the functions that they belong to."""
    return start if start is None or weights is None else start * _root(counted(weights))[:, None]


def _functions(vectors: Array, weights: Array | None) -> Array:
    """What eigenvectors belong to: 0 for cells of weight 0."""
    signed = fix_signs(vectors)
    return signed if weights is None else signed * _inverse_root(counted(weights))[:, None]


@operator
class DiffusionMap:
    """The leading eigenvectors of the symmetric transition matrix of the graph (Coifman et al. 2005, as in scanpy).

    The largest entry of each eigenvector is positive. Where eigenvalues coincide the eigenvectors are defined up to
    rotation: their derivative is finite everywhere and exact for losses that do not depend on that choice. `tol` bounds
    the residuals of the eigenpairs; None for the solver's default, 1e-10 in float64 and 5e-6 in float32.

    With `weights`, cell i counts as ``weights[i]`` cells in every sum over cells, without weight as none: the others'
    components are those of the graph without it, and its own are 0. Its weight does not change its own components but
    by way of the others. Weights below 1e-6 (1e-3 in single precision) count as 0.

    Examples
    --------
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> z = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    >>> near = sd.ops.Neighbors(n_neighbors=8)
    >>> graph = near.init(z)(z).connectivities
    >>> sd.ops.DiffusionMap(n_comps=4)(graph).eigenvectors.shape
    (60, 4)
    """

    n_comps: int = static(default=15)
    tol: float | None = static(default=None)

    def __call__(
        self, graph: Graph, start: Array | None = None, weights: Float[Array, " cells"] | None = None
    ) -> DiffusionMapResult:
        n_comps = min(self.n_comps, graph.shape[0] - 1)
        eigen = eigenpairs(transitions(graph, weights), n_comps, start=_warm(start, weights), tol=self.tol)
        vectors = _functions(eigen.vectors, weights)
        return DiffusionMapResult(eigen.values, vectors, eigen.converged)


def _distance_weights(values: Array) -> Array:
    """(l / (1 - l))^2, and 1 for stationary eigenvalues."""
    moving = values < STATIONARY
    ratio = values / jnp.where(moving, 1 - values, 1)
    return jnp.where(moving, ratio**2, 1)


@operator
class Pseudotime:
    """Diffusion pseudotime: the distance from a root cell in accumulated transition probabilities (Haghverdi 2016).

    The squared distance is P_rr + P_jj - 2 P_rj with P a function of the transition matrix, so signs and rotations of
    eigenvectors never enter, and derivatives are exact and finite on degenerate spectra. `n_comps` eigenvectors are
    computed, of which the first `n_dcs` count; `tol` and `weights` are those of :class:`DiffusionMap`: with them the
    distance is ``P_rr / w_r + P_jj / w_j - 2 P_rj / sqrt(w_r w_j)``, and cells without weight cannot be reached.

    Examples
    --------
    >>> import jax
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> z = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    >>> near = sd.ops.Neighbors(n_neighbors=8)
    >>> graph = near.init(z)(z).connectivities
    >>> op = sd.ops.Pseudotime(n_dcs=4, n_comps=6)
    >>> later = lambda values: op(graph.with_values(values), 0).pseudotime.sum()
    >>> jax.grad(later)(graph.values).shape == graph.values.shape
    True
    """

    n_dcs: int = static(default=10)
    n_comps: int = static(default=15)
    tol: float | None = static(default=None)

    def __call__(
        self,
        graph: Graph,
        root: Int[Array, ""],
        start: Array | None = None,
        weights: Float[Array, " cells"] | None = None,
    ) -> PseudotimeResult:
        n = graph.shape[0]
        n_comps = max(min(self.n_comps, n - 1), min(self.n_dcs, n - 1))
        probe = jnp.zeros((n, 1), graph.dtype).at[root, 0].set(1)
        n_dcs = min(self.n_dcs, n_comps)
        column, diagonal, eigen = spectral(
            _distance_weights,
            transitions(graph, weights),
            probe,
            k=n_comps,
            n_weighted=n_dcs,
            start=_warm(start, weights),
            tol=self.tol,
        )
        time, distance = _from_root(graph, column[:, 0], diagonal, root, weights)
        vectors = _functions(eigen.vectors, weights)
        return PseudotimeResult(time, distance, eigen.values, vectors, eigen.converged)


@jax.jit
def _from_root(
    graph: Graph, column: Array, diagonal: Array, root: Array, weights: Array | None = None
) -> tuple[Array, Array]:
    """Scaled and plain distance from the root, infinite for cells in other components."""
    if weights is not None:
        own = _inverse_root(counted(weights))
        column, diagonal = column * own * own[root], diagonal * own**2
        graph = graph.scaled(own, own)
    squared = diagonal[root] + diagonal - 2 * column
    connected = reachable(graph, root)
    if weights is not None:
        connected &= own > 0
    positive = (squared > 0) & connected & (jnp.arange(graph.shape[0]) != root)
    distance = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)
    largest = distance.max()
    scaled = distance / jnp.where(largest > 0, largest, 1)
    return jnp.where(connected, scaled, jnp.inf), jnp.where(connected, distance, jnp.inf)
