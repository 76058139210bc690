"""The largest eigenpairs, against dense decompositions, on ordinary and on awkward spectra."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

from scdiffx._core.eigsh import eigsh
from walks import Edges, edges_of, random_walk, top


@pytest.fixture(autouse=True)
def double(x64: None) -> None:
    """Every test of this file runs where float64 is at hand."""


def assert_eigen(found: Any, matrix: np.ndarray, k: int, tol: float = 1e-9) -> None:
    values, _ = top(matrix, k)
    vectors = np.asarray(found.vectors)
    assert bool(found.converged)
    np.testing.assert_allclose(found.values, values, atol=tol * np.abs(values).max())
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-11)
    residual = np.linalg.norm(matrix @ vectors - vectors * np.asarray(found.values), axis=0)
    assert residual.max() <= tol * np.abs(values).max()
    np.testing.assert_allclose(found.residuals, residual, atol=1e-12 * np.abs(values).max())


@pytest.mark.parametrize("n", [40, 320])
@pytest.mark.parametrize("kind", ["indefinite", "negative", "decaying"])
def test_eigsh_dense(n: int, kind: str) -> None:
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    spectrum = {
        "indefinite": rng.standard_normal(n),
        "negative": -1 - rng.random(n),
        "decaying": 1e4 * 0.9 ** np.arange(n),
    }[kind]
    matrix = (q * spectrum) @ q.T
    assert_eigen(eigsh(jnp.asarray(matrix), 10), matrix, 10)


@pytest.fixture(scope="module")
def walk() -> sp.csr_matrix:
    return random_walk(320, 1)


def test_eigsh_graph(walk: sp.csr_matrix) -> None:
    assert_eigen(eigsh(edges_of(walk), 10), walk.toarray(), 10)


def test_eigsh_float32(walk: sp.csr_matrix) -> None:
    found = eigsh(edges_of(walk, np.float32), 10)
    assert found.vectors.dtype == np.float32
    assert bool(found.converged)
    np.testing.assert_allclose(found.values, top(walk.toarray(), 10)[0], atol=3e-6)
    assert np.linalg.norm(walk @ found.vectors - found.vectors * found.values, axis=0).max() < 1e-5


def test_eigsh_disconnected_copies() -> None:
    """Five identical components: each eigenvalue is exactly fivefold."""
    matrix = sp.block_diag([random_walk(64, 2)] * 5).tocsr()
    found = eigsh(edges_of(matrix), 10)
    assert_eigen(found, matrix.toarray(), 10)
    np.testing.assert_allclose(found.values[:5], 1, atol=1e-12)


def test_eigsh_more_components_than_vectors() -> None:
    matrix = sp.block_diag([random_walk(20, seed, k=5) for seed in range(16)]).tocsr()
    found = eigsh(edges_of(matrix), 10)
    assert_eigen(found, matrix.toarray(), 10)
    np.testing.assert_allclose(found.values, 1, atol=1e-12)


def test_eigsh_rank_deficient_and_zero_rows() -> None:
    rng = np.random.default_rng(3)
    factor = rng.standard_normal((320, 4))
    factor[100:200] = 0
    matrix = factor @ factor.T
    found = eigsh(jnp.asarray(matrix), 10)
    assert_eigen(found, matrix, 10)
    np.testing.assert_allclose(found.values[4:], 0, atol=1e-9 * matrix.max() * 320)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_eigsh_scale(walk: sp.csr_matrix, scale: float) -> None:
    assert_eigen(eigsh(edges_of(walk * scale), 10), walk.toarray() * scale, 10)


def test_eigsh_identity() -> None:
    found = eigsh(edges_of(sp.identity(320)), 10)
    assert_eigen(found, np.eye(320), 10)


def test_eigsh_all_pairs_of_a_tiny_matrix() -> None:
    matrix = random_walk(20, 0, k=4).toarray()
    assert_eigen(eigsh(jnp.asarray(matrix), 20), matrix, 20)


@pytest.mark.parametrize("compiled", [False, True], ids=["alone", "inside of a program"])
def test_warm_start_needs_one_check(walk: sp.csr_matrix, compiled: bool) -> None:
    A = edges_of(walk)
    cold = eigsh(A, 10)
    find = jax.jit(eigsh, static_argnums=1) if compiled else eigsh
    warm = find(A, 10, start=cold.vectors)
    assert int(warm.n_matvecs) <= 40  # the images of the start, the residuals of two windows, and those reported
    assert bool(warm.converged)
    np.testing.assert_allclose(warm.values, cold.values, atol=1e-12)
    near = find(A, 10, start=cold.vectors + 1e-5 * np.random.default_rng(0).standard_normal((A.n, 10)))
    assert_eigen(near, walk.toarray(), 10)
    assert int(near.n_matvecs) < int(cold.n_matvecs)


def test_poor_start_is_no_trap(walk: sp.csr_matrix) -> None:
    """A start that misses wanted vectors, repeats others, holds zeros, and has not converged."""
    vectors = top(walk.toarray(), 20)[1]
    start = np.c_[vectors[:, 8:14], vectors[:, 8:10], np.zeros((walk.shape[0], 2))]
    assert_eigen(eigsh(edges_of(walk), 10, start=jnp.asarray(start)), walk.toarray(), 10)


def test_eigsh_reports_the_limit(walk: sp.csr_matrix) -> None:
    found = eigsh(edges_of(walk), 10, max_steps=4)
    assert not bool(found.converged)
    assert np.isfinite(np.asarray(found.vectors)).all()


def test_eigsh_is_deterministic_and_permutation_does_not_matter(walk: sp.csr_matrix) -> None:
    once, again = eigsh(edges_of(walk), 10), eigsh(edges_of(walk), 10)
    np.testing.assert_array_equal(once.vectors, again.vectors)
    order = np.random.default_rng(0).permutation(walk.shape[0])
    moved = eigsh(edges_of(walk[order][:, order]), 10)
    np.testing.assert_allclose(moved.values, once.values, atol=1e-12)
    overlap = np.abs(np.asarray(once.vectors)[order].T @ np.asarray(moved.vectors))
    np.testing.assert_allclose(overlap, np.eye(10), atol=1e-6)


def test_nan_is_reported_at_once(walk: sp.csr_matrix) -> None:
    A = edges_of(walk)
    found = eigsh(Edges(A.rows, A.cols, A.values.at[5].set(jnp.nan), A.n), 10)
    assert not bool(found.converged)
    assert int(found.n_matvecs) < 400


@pytest.mark.parametrize("call", [{"k": 0}, {"k": 50}, {"k": 3, "oversample": 2}, {"k": 3, "start": np.ones(40)}])
def test_eigsh_bad_arguments(call: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"k=|oversample|start"):
        eigsh(jnp.eye(40), **call)
