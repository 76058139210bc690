"""Spectral functions and eigenpairs of a symmetric operator, with implicit derivatives.

A function of the operator, ``f(A) = U f(L) U^T``, depends neither on signs nor on rotations among equal eigenvalues,
and so does its derivative (Daleckii and Krein): divided differences of f inside the kept block, and outside of it one
linear solve for each weighted eigenvector on the complement of the block. Nothing of size n x n is formed, and the
cotangent of `A` is pulled back through ``A @ B``, which touches only the entries that `A` has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from scdiffx._core.eigsh import Eigen, eigsh, product
from scdiffx._core.graph import Graph
from scdiffx._core.krylov import cg

__all__ = ["Eigen", "eigenpairs", "eigsh", "spectral"]


class _Options(NamedTuple):
    k: int
    n_weighted: int
    tol: float | None
    max_steps: int
    oversample: int
    cg_tol: float | None
    cg_steps: int


def spectral(
    f: Callable[..., Float[Array, " k"]],
    A: Any,
    x: Float[Array, "n q"],
    *,
    k: int,
    params: tuple[Any, ...] = (),
    n_weighted: int | None = None,
    start: Float[Array, "n m"] | None = None,
    tol: float | None = None,
    max_steps: int = 300,
    oversample: int = 8,
    cg_tol: float | None = None,
    cg_steps: int = 2000,
) -> tuple[Float[Array, "n q"], Float[Array, " n"], Eigen]:
    """``f(A) @ x`` and the diagonal of ``f(A)``, where f is restricted to the `k` largest eigenpairs.

    Parameters
    ----------
    f
        ``f(values, *params) -> weights`` on the vector of `k` eigenvalues in decreasing order: elementwise, but free to
        treat positions differently (0 for those beyond the first few, say). Static: define it once, without
        closing over arrays; what it depends on belongs in `params`.
    A
        Symmetric operator: a pytree with ``A @ V`` for dense (n, b) and ``A.shape``.
    x
        Probes; one-hot columns give columns of ``f(A)``.
    k
        Eigenpairs kept. Keep some more than f gives weight to: what matters is that the weighted eigenvalues are
        well apart from the first one that is *not kept*.
    params
        Further arguments of f, differentiable.
    n_weighted
        Only the first `n_weighted` positions can have a weight other than 0 (default: all). Saves solves.
    start, tol, max_steps, oversample
        See `eigsh`.
    cg_tol, cg_steps
        Relative residual (default 1e-9 in float64, 1e-5 in float32) and largest number of steps of the solves that the
        derivative needs.

    Returns
    -------
    ``f(A) @ x``, ``diag(f(A))`` and the `Eigen` behind them, which carries no derivative here. Derivatives in `A`, `x`
    and `params`, of first order. Eigenvalues closer than a relative 1e-8 (float64; 1e-4 in float32) count as equal: the
    divided difference becomes the mean of f' at the two.

    References
    ----------
    Daleckii and Krein (1965), Integration and differentiation of functions of Hermitian operators.
    """
    if x.ndim != 2 or x.shape[0] != A.shape[0]:
        raise ValueError(f"x must have shape ({A.shape[0]}, q), got {x.shape}")
    n_weighted = k if n_weighted is None else n_weighted
    if not 1 <= n_weighted <= k:
        raise ValueError(f"n_weighted={n_weighted} must be in 1..k={k}")
    options = _Options(k, n_weighted, tol, max_steps, oversample, cg_tol, cg_steps)
    A, there, back = _nearby(A)
    start = None if start is None else there(lax.stop_gradient(start))
    image, diagonal, eigen = _spectral(f, options, A, there(x), params, start)
    eigen = eigen._replace(vectors=back(eigen.vectors))
    return back(image), back(diagonal), jax.tree.map(lax.stop_gradient, eigen)


def eigenpairs(
    A: Any,
    k: int,
    *,
    start: Float[Array, "n m"] | None = None,
    tol: float | None = None,
    max_steps: int = 300,
    oversample: int = 8,
    cg_tol: float | None = None,
    cg_steps: int = 2000,
) -> Eigen:
    """The `k` largest eigenpairs with derivatives of ``values`` and ``vectors`` in `A`.

    Parameters are those of `eigsh` and `spectral`. Terms that couple eigenvalues closer than a relative 1e-8 (float64;
    1e-4 in float32) are dropped, so the derivative is always finite. It is exact for losses that see equal eigenvalues
    alike and their vectors only through the space they span. A loss that weights vectors by their values, such as a
    scaled embedding, is a function of the operator: differentiate that by `spectral`, which is exact there too. The
    k-th eigenvalue must differ from the next one if the loss depends on its vector: choose k at a gap.
    """
    options = _Options(k, k, tol, max_steps, oversample, cg_tol, cg_steps)
    A, there, back = _nearby(A)
    eigen = _eigenpairs(options, A, None if start is None else there(lax.stop_gradient(start)))
    return Eigen(eigen.values, back(eigen.vectors), *jax.tree.map(lax.stop_gradient, tuple(eigen[2:])))


# ------------------------------------------------------------------------------------------------------ shared parts


def _nearby(A: Any) -> tuple[Any, Callable[[Array], Array], Callable[[Array], Array]]:
    """The operator with rows in an order that suits caches, and the maps of vectors to that order and back."""
    if not isinstance(A, Graph):
        return A, lambda v: v, lambda v: v
    order = A.pattern.order
    return A.reordered(), partial(_taken, at=order), partial(_put_back, at=order)


@jax.jit
def _taken(v: Array, at: Array) -> Array:
    return v.at[at].get(mode="promise_in_bounds", unique_indices=True)


@jax.jit
def _put_back(v: Array, at: Array) -> Array:
    return jnp.zeros_like(v).at[at].set(v, mode="promise_in_bounds", unique_indices=True)


def _find(options: _Options, A: Any, start: Array | None) -> Eigen:
    k, _, tol, max_steps, oversample, *_ = options
    return eigsh(A, k, start=start, tol=tol, max_steps=max_steps, oversample=oversample)


def _tie(values: Array) -> Array:
    """The gap below which two eigenvalues count as equal: there rounding outweighs what a difference can tell."""
    return (1e-8 if values.dtype == jnp.float64 else 1e-4) * jnp.abs(values).max()


def _outside(options: _Options, A: Any, values: Array, vectors: Array, sides: Array) -> Array:
    """``(l_i - A)^+ s_i`` on the complement of the kept block, for the first columns i that `sides` has."""
    shifts = values[: sides.shape[1]]

    def complement(v: Array) -> Array:
        return v - product(vectors, product(vectors.T, v))

    # Twice: what is left of the block in the right-hand side would be amplified by 1 / (l_i - l_j).
    sides = complement(complement(sides))
    tol = (1e-9 if values.dtype == jnp.float64 else 1e-5) if options.cg_tol is None else options.cg_tol
    found = cg(lambda v: complement(shifts * v - A @ v), sides, tol=tol, max_steps=options.cg_steps).x
    return complement(found)


def _pull(A: Any, vectors: Array, inner: Array, outer: Array) -> Any:
    """The cotangent of `A` for ``U inner U^T + outer U^T + U outer^T``, where inner is symmetric."""
    m = outer.shape[1]
    right = jnp.concatenate([vectors, outer], 1)
    left = jnp.concatenate([(product(vectors, inner)).at[:, :m].add(outer), vectors[:, :m]], 1)
    return jax.vjp(lambda op: op @ right, A)[1](left)[0]


# ------------------------------------------------------------------------------------------------ spectral functions


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _spectral(
    f: Callable[..., Array], options: _Options, A: Any, x: Array, params: Any, start: Array | None
) -> tuple[Array, Array, Eigen]:
    eigen = _find(options, A, start)
    return *_applied(f, options, eigen.values, eigen.vectors, x, params), eigen


def _weights(f: Callable[..., Array], options: _Options, values: Array, *params: Any) -> Array:
    weights = f(values, *params)
    if weights.shape != values.shape:
        raise ValueError(f"f must return one weight for each of the {values.shape[0]} eigenvalues, got {weights.shape}")
    return jnp.where(jnp.arange(options.k) < options.n_weighted, weights, 0)


@partial(jax.jit, static_argnums=(0, 1))
def _applied(
    f: Callable[..., Array], options: _Options, values: Array, vectors: Array, x: Array, params: Any
) -> tuple[Array, Array]:
    weights = _weights(f, options, values, *params)
    return product(vectors, weights[:, None] * product(vectors.T, x)), product(vectors**2, weights)


def _spectral_fwd(
    f: Callable[..., Array], options: _Options, A: Any, x: Array, params: Any, start: Array | None
) -> tuple[tuple[Array, Array, Eigen], tuple[Any, ...]]:
    image, diagonal, eigen = _spectral(f, options, A, x, params, start)
    return (image, diagonal, eigen), (A, x, params, eigen.values, eigen.vectors)


def _differences(values: Array, weights: Array, slopes: Array) -> Array:
    """(f_i - f_j) / (l_i - l_j), and the mean slope where the eigenvalues are equal."""
    gap = values[:, None] - values[None, :]
    equal = jnp.abs(gap) <= _tie(values)
    ratio = (weights[:, None] - weights[None, :]) / jnp.where(equal, 1, gap)
    return jnp.where(equal, (slopes[:, None] + slopes[None, :]) / 2, ratio)


def _spectral_bwd(
    f: Callable[..., Array], options: _Options, saved: tuple[Any, ...], cotangents: tuple[Array, Array, Eigen]
) -> tuple[Any, Array, Any, None]:
    return *_spectral_adjoint(f, options, saved, *cotangents[:2]), None


@partial(jax.jit, static_argnums=(0, 1))
def _spectral_adjoint(
    f: Callable[..., Array], options: _Options, saved: tuple[Any, ...], g: Array, on_diagonal: Array
) -> tuple[Any, Array, Any]:
    A, x, params, values, vectors = saved
    weights, pull_f = jax.vjp(partial(_weights, f, options), values, *params)
    slopes = pull_f(jnp.ones_like(weights))[0]
    g_kept, x_kept = product(vectors.T, g), product(vectors.T, x)
    # The cotangent of f(A), symmetrised, times the eigenvectors: it is known only in factors.
    sides = (product(g, x_kept.T) + product(x, g_kept.T)) / 2 + on_diagonal[:, None] * vectors
    kept = product(vectors.T, sides)
    inner = (kept + kept.T) / 2
    m = options.n_weighted
    outer = _outside(options, A, values, vectors, jnp.where(weights != 0, sides, 0)[:, :m]) * weights[:m]
    A_bar = _pull(A, vectors, inner * _differences(values, weights, slopes), outer)
    return A_bar, product(vectors, weights[:, None] * g_kept), pull_f(jnp.diag(inner))[1:]


_spectral.defvjp(_spectral_fwd, _spectral_bwd)


# -------------------------------------------------------------------------------------------------------- eigenpairs


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _eigenpairs(options: _Options, A: Any, start: Array | None) -> Eigen:
    return _find(options, A, start)


def _eigenpairs_fwd(options: _Options, A: Any, start: Array | None) -> tuple[Eigen, tuple[Any, Array, Array]]:
    eigen = _find(options, A, start)
    return eigen, (A, eigen.values, eigen.vectors)


def _eigenpairs_bwd(options: _Options, saved: tuple[Any, Array, Array], cotangent: Eigen) -> tuple[Any, None]:
    return _eigenpairs_adjoint(options, *saved, cotangent.values, cotangent.vectors), None


@partial(jax.jit, static_argnums=0)
def _eigenpairs_adjoint(
    options: _Options, A: Any, values: Array, vectors: Array, on_values: Array, on_vectors: Array
) -> Any:
    gap = values[None, :] - values[:, None]
    apart = jnp.abs(gap) > _tie(values)
    coupling = jnp.where(apart, product(vectors.T, on_vectors) / jnp.where(apart, gap, 1), 0)
    inner = (coupling + coupling.T) / 2 + jnp.diag(on_values)
    outer = _outside(options, A, values, vectors, on_vectors) / 2
    return _pull(A, vectors, inner, outer)


_eigenpairs.defvjp(_eigenpairs_fwd, _eigenpairs_bwd)
