"""Spectral functions, eigenpairs and their derivatives, against dense decompositions and finite differences."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

from helpers import largest_array
from scdiffx._core.spectral import eigenpairs, eigsh, spectral
from walks import Edges, edges_of, random_walk, top, two_copies


@pytest.fixture(autouse=True)
def double(x64: None) -> None:
    """Every test of this file runs where float64 is at hand."""


@pytest.fixture(scope="module")
def walk() -> sp.csr_matrix:
    return random_walk(320, 1)


# ---------------------------------------------------------------------------------------------------------- spectral


def powered(values: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.abs(values) ** t


def pseudotime_weights(values: jax.Array) -> jax.Array:
    """scanpy's rule: (l / (1 - l))^2, 1 for eigenvalues of about 1, over the first components only."""
    stationary = values >= 0.9994
    safe = jnp.where(stationary, 0.5, values)
    weights = jnp.where(stationary, 1.0, (safe / (1 - safe)) ** 2)
    return jnp.where(jnp.arange(values.shape[0]) < 6, weights, 0)


def distances(A: Any, root: int, k: int, **kwargs: Any) -> jax.Array:
    x = jnp.zeros((A.shape[0], 1)).at[root, 0].set(1)
    column, diagonal, _ = spectral(pseudotime_weights, A, x, k=k, **kwargs)
    return diagonal[root] + diagonal - 2 * column[:, 0]


def test_spectral_matches_dense(walk: sp.csr_matrix) -> None:
    values, vectors = top(walk.toarray(), 10)
    dense = (vectors * values**3) @ vectors.T
    x = np.random.default_rng(0).standard_normal((walk.shape[0], 4))
    image, diagonal, eigen = spectral(powered, edges_of(walk), jnp.asarray(x), k=10, params=(3.0,))
    np.testing.assert_allclose(image, dense @ x, atol=1e-8)
    np.testing.assert_allclose(diagonal, np.diag(dense), atol=1e-8)
    assert bool(eigen.converged)
    few = spectral(powered, edges_of(walk), jnp.asarray(x), k=10, params=(3.0,), n_weighted=4)[0]
    np.testing.assert_allclose(few, (vectors[:, :4] * values[:4] ** 3) @ vectors[:, :4].T @ x, atol=1e-8)


def slopes_agree(loss: Any, at: jax.Array, gradient: jax.Array, direction: jax.Array, rtol: float = 1e-6) -> None:
    """Central differences at three step sizes; the best one must agree to `rtol`, the small ones to 100 `rtol`."""
    expected = float((gradient * direction).sum())
    assert abs(expected) > 1e-12
    errors = []
    for step in (1e-4, 1e-5, 1e-6):
        slope = (loss(at + step * direction) - loss(at - step * direction)) / (2 * step)
        errors.append(abs(float(slope) / expected - 1))
    assert min(errors) < rtol, errors
    assert max(errors[1:]) < 100 * rtol, errors


def edge_directions(A: Edges, seed: int) -> jax.Array:
    """A relative change of each weight: what a change of distances does."""
    return A.values * np.random.default_rng(seed).standard_normal(A.values.shape)


@pytest.mark.parametrize("graph", ["connected", "two identical components"])
def test_pseudotime_gradient(graph: str) -> None:
    A = edges_of(random_walk(320, 5) if graph == "connected" else two_copies())
    target = jnp.asarray(np.random.default_rng(6).random(A.n))
    # k is even, so that no pair of equal eigenvalues is cut apart.
    solve = partial(distances, root=3, k=10, tol=1e-12, cg_tol=1e-11)

    def loss(values: jax.Array) -> jax.Array:
        return (target * jnp.sqrt(solve(Edges(A.rows, A.cols, values, A.n)) + 0.1)).mean()

    gradient = jax.grad(loss)(A.values)
    assert np.isfinite(np.asarray(gradient)).all()
    for seed in range(2):
        slopes_agree(loss, A.values, gradient, edge_directions(A, seed))


def test_exact_degeneracy_breaks_plain_autodiff_but_not_the_rule() -> None:
    A = edges_of(two_copies())

    def plain(m: jax.Array) -> jax.Array:
        values, vectors = jnp.linalg.eigh(m)
        kept = vectors[:, ::-1][:, :10]
        p = (kept * pseudotime_weights(values[::-1][:10])) @ kept.T
        return (p[3, 3] + jnp.diag(p) - 2 * p[3]).sum()

    def ours(values: jax.Array) -> jax.Array:
        return distances(Edges(A.rows, A.cols, values, A.n), 3, 10, cg_tol=1e-11).sum()

    matrix = jnp.asarray(A.dense())
    np.testing.assert_allclose(plain(matrix), ours(A.values), rtol=1e-8)
    assert not np.isfinite(np.asarray(jax.grad(plain)(matrix))).all()
    assert np.isfinite(np.asarray(jax.grad(ours)(A.values))).all()


def test_gradient_of_a_dense_operator_is_symmetric_and_matches_eigh() -> None:
    matrix = jnp.asarray(random_walk(320, 7).toarray())
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 320, 3))
    h = rng.standard_normal(320)

    def ours(m: jax.Array, t: jax.Array) -> jax.Array:
        image, diagonal, _ = spectral(powered, m, x, k=10, params=(t,), tol=1e-12, cg_tol=1e-12)
        return (g * image).sum() + (h * diagonal).sum()

    def plain(m: jax.Array, t: jax.Array) -> jax.Array:
        values, vectors = jnp.linalg.eigh(m)
        kept = vectors[:, ::-1][:, :10]
        dense = (kept * powered(values[::-1][:10], t)) @ kept.T
        return (g * (dense @ x)).sum() + (h * jnp.diag(dense)).sum()

    got, wanted = (jax.grad(loss, argnums=(0, 1))(matrix, 2.5) for loss in (ours, plain))
    np.testing.assert_allclose(got[0], got[0].T, atol=1e-10)
    np.testing.assert_allclose(got[0], (wanted[0] + wanted[0].T) / 2, atol=1e-7 * np.abs(wanted[0]).max())
    np.testing.assert_allclose(got[1], wanted[1], rtol=1e-9)


def test_gradient_in_the_probes_and_the_parameter(walk: sp.csr_matrix) -> None:
    A = edges_of(walk)
    rng = np.random.default_rng(1)
    x, g = (jnp.asarray(a) for a in rng.standard_normal((2, A.n, 2)))

    def loss(x: jax.Array, t: jax.Array) -> jax.Array:
        image, diagonal, _ = spectral(powered, A, x, k=10, params=(t,))
        return (g * image**2).sum() + diagonal.max()

    to_x, to_t = jax.grad(loss, argnums=(0, 1))(x, 2.0)
    slopes_agree(lambda v: loss(v, 2.0), x, to_x, jnp.asarray(rng.standard_normal(x.shape)))
    slopes_agree(lambda t: loss(x, t), jnp.asarray(2.0), to_t, jnp.asarray(1.0))


def test_divided_differences_are_continuous_where_eigenvalues_meet() -> None:
    """Across the switch from a difference to a slope, the gradient must not jump."""

    def gradient(gap: float) -> np.ndarray:
        values = np.r_[0.9, 0.8 + gap, 0.8, np.linspace(0.5, -0.5, 237)]
        matrix = jnp.asarray((q * values) @ q.T)
        return np.asarray(jax.grad(lambda m: (spectral(powered, m, x, k=5, params=(4.0,))[0] * y).sum())(matrix))

    q = np.linalg.qr(np.random.default_rng(0).standard_normal((240, 240)))[0]
    x, y = np.random.default_rng(1).standard_normal((2, 240, 2))
    gradients = [gradient(gap) for gap in (0.0, 1e-10, 0.9e-8, 1.1e-8, 1e-6)]
    for a, b in pairwise(gradients):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())


def test_float32_gradient_follows_float64() -> None:
    matrix = random_walk(320, 5)
    gradients = []
    for dtype in (np.float32, np.float64):
        A = edges_of(matrix, dtype)
        x = jnp.zeros((A.n, 2), dtype).at[[3, 5], [0, 1]].set(1)

        def loss(values: jax.Array, A: Edges = A, x: jax.Array = x) -> jax.Array:
            return (spectral(powered, Edges(A.rows, A.cols, values, A.n), x, k=10, params=(3.0,))[0] ** 2).sum()

        gradients.append(np.asarray(jax.grad(loss)(A.values)))
    assert gradients[0].dtype == np.float32
    np.testing.assert_allclose(gradients[0], gradients[1], atol=2e-3 * np.abs(gradients[1]).max())


def test_spectral_bad_arguments() -> None:
    with pytest.raises(ValueError, match="x must have shape"):
        spectral(powered, jnp.eye(30), jnp.ones(30), k=3, params=(1.0,))
    with pytest.raises(ValueError, match="n_weighted"):
        spectral(powered, jnp.eye(30), jnp.ones((30, 1)), k=3, params=(1.0,), n_weighted=4)
    with pytest.raises(ValueError, match="one weight for each"):
        spectral(lambda values: values.sum(), jnp.eye(30), jnp.ones((30, 1)), k=3)


# -------------------------------------------------------------------------------------------------------- eigenpairs


@pytest.mark.parametrize("n", [150, 320])
def test_eigenpairs_gradient(n: int) -> None:
    A = edges_of(random_walk(n, 8))
    rng = np.random.default_rng(0)
    g, c = jnp.asarray(rng.standard_normal((n, 10))), jnp.asarray(rng.standard_normal(10))
    reference = eigenpairs(A, 10).vectors

    def loss(values: jax.Array) -> jax.Array:
        found = eigenpairs(Edges(A.rows, A.cols, values, A.n), 10, tol=1e-12, cg_tol=1e-11)
        signs = jnp.sign((found.vectors * reference).sum(0))
        return (g * found.vectors * signs).sum() + (c * found.values).sum()

    gradient = jax.grad(loss)(A.values)
    slopes_agree(loss, A.values, gradient, edge_directions(A, 1))


def test_eigenpairs_invariant_loss_on_degenerate_values() -> None:
    """Every eigenvalue twice: the loss sees the span of the vectors, and equal values alike."""
    A = edges_of(two_copies())
    left = jnp.asarray(np.random.default_rng(0).standard_normal((A.n, 3)))

    def loss(values: jax.Array) -> jax.Array:
        found = eigenpairs(Edges(A.rows, A.cols, values, A.n), 10, tol=1e-12, cg_tol=1e-11)
        return (((left.T @ found.vectors) @ found.vectors.T) ** 3).sum() + 5 * (found.values**3).sum()

    gradient = jax.grad(loss)(A.values)
    assert np.isfinite(np.asarray(gradient)).all()
    slopes_agree(loss, A.values, gradient, edge_directions(A, 0))


# -------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.slow
def test_without_x64(walk: sp.csr_matrix) -> None:
    with jax.enable_x64(False):
        A = edges_of(walk, np.float32)
        found = eigsh(A, 10)
        gradient = jax.grad(lambda v: distances(Edges(A.rows, A.cols, v, A.n), 3, 10).sum())(A.values)
    assert bool(found.converged)
    np.testing.assert_allclose(found.values, top(walk.toarray(), 10)[0], atol=3e-6)
    assert np.isfinite(np.asarray(gradient)).all()


@pytest.mark.parametrize("kind", ["spectral", "eigenpairs"])
def test_memory_grows_linearly(kind: str) -> None:
    def cost(n: int) -> int:
        A = edges_of(random_walk(n, 0))

        def loss(values: jax.Array) -> jax.Array:
            op = Edges(A.rows, A.cols, values, n)
            return distances(op, 0, 8).sum() if kind == "spectral" else (eigenpairs(op, 8).vectors ** 4).sum()

        return largest_array(jax.value_and_grad(loss), A.values)

    small, large = cost(1000), cost(2000)
    assert small > 1000 * 8
    assert large < 2.5 * small
    assert large < 2000**2 / 10
