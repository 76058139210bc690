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


@jax.jit
def transitions(graph: Graph) -> Graph:
    """The symmetric transition matrix of a weighted graph, with the sampling density divided out (Coifman 2005)."""
    density = _inverse(graph.row_sums())
    kernel = graph.scaled(density, density)
    scale = _inverse_root(kernel.row_sums())
    return kernel.scaled(scale, scale)


def _inverse(x: Array) -> Array:
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


def _inverse_root(x: Array) -> Array:
    return jnp.where(x > 0, 1 / jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


@operator
class DiffusionMap:
    """The leading eigenvectors of the symmetric transition matrix of the graph (Coifman et al. 2005, as in scanpy).

    The largest entry of each eigenvector is positive. Where eigenvalues coincide the eigenvectors are defined up to
    rotation: their derivative is finite everywhere and exact for losses that do not depend on that choice. `tol` bounds
    the residuals of the eigenpairs; None for the solver's default, 1e-10 in float64 and 5e-6 in float32.
    """

    n_comps: int = static(default=15)
    tol: float | None = static(default=None)

    def __call__(self, graph: Graph, start: Array | None = None) -> DiffusionMapResult:
        n_comps = min(self.n_comps, graph.shape[0] - 1)
        eigen = eigenpairs(transitions(graph), n_comps, start=start, tol=self.tol)
        return DiffusionMapResult(eigen.values, fix_signs(eigen.vectors), eigen.converged)


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
    computed, of which the first `n_dcs` count; `tol` is that of :class:`DiffusionMap`.
    """

    n_dcs: int = static(default=10)
    n_comps: int = static(default=15)
    tol: float | None = static(default=None)

    def __call__(self, graph: Graph, root: Int[Array, ""], start: Array | None = None) -> PseudotimeResult:
        n = graph.shape[0]
        n_comps = max(min(self.n_comps, n - 1), min(self.n_dcs, n - 1))
        probe = jnp.zeros((n, 1), graph.dtype).at[root, 0].set(1)
        n_dcs = min(self.n_dcs, n_comps)
        column, diagonal, eigen = spectral(
            _distance_weights, transitions(graph), probe, k=n_comps, n_weighted=n_dcs, start=start, tol=self.tol
        )
        time, distance = _from_root(graph, column[:, 0], diagonal, root)
        return PseudotimeResult(
            time,
            distance,
            eigen.values,
            fix_signs(eigen.vectors),
            eigen.converged,
        )


@jax.jit
def _from_root(graph: Graph, column: Array, diagonal: Array, root: Array) -> tuple[Array, Array]:
    """Scaled and plain distance from the root, infinite for cells in other components."""
    squared = diagonal[root] + diagonal - 2 * column
    connected = reachable(graph, root)
    positive = (squared > 0) & connected & (jnp.arange(graph.shape[0]) != root)
    distance = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)
    largest = distance.max()
    scaled = distance / jnp.where(largest > 0, largest, 1)
    return jnp.where(connected, scaled, jnp.inf), jnp.where(connected, distance, jnp.inf)
