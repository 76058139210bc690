"""Blocked counts against numpy, sparse and dense alike."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from jax.test_util import check_grads

from helpers import largest_array
from scdiffx._core import counts as C


@pytest.fixture(scope="module", params=[0.05, 0.3])
def matrix(request) -> sp.csr_matrix:
    """Sums go two ways: by scatter, and over dense blocks where many places hold values."""
    return sp.random(2500, 300, request.param, format="csr", random_state=0, dtype=np.float64)


@pytest.fixture(params=["sparse", "dense"])
def x(request, matrix, x64):
    return C.Counts.from_scipy(matrix) if request.param == "sparse" else jnp.asarray(matrix.toarray())


def test_sums_moments_and_products_equal_numpy(x, matrix):
    dense = matrix.toarray()
    v = np.random.default_rng(0).normal(size=(300, 7))
    np.testing.assert_allclose(C.row_sums(x), dense.sum(1), rtol=1e-12)
    np.testing.assert_allclose(C.column_sums(x), dense.sum(0), rtol=1e-12)
    mean, variance = C.column_moments(x)
    np.testing.assert_allclose(mean, dense.mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, dense.var(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(C.matmul(x, jnp.asarray(v)), dense @ v, atol=1e-12)
    centred = dense - dense.mean(0)
    np.testing.assert_allclose(C.gram(x, mean), centred.T @ centred, atol=1e-10)


def test_scaling_and_taking_genes(x, matrix):
    dense = matrix.toarray()
    rows, columns = np.random.default_rng(1).random(2500), np.random.default_rng(2).random(300)
    scaled = C.scale_columns(C.scale_rows(x, jnp.asarray(rows)), jnp.asarray(columns))
    eye = jnp.eye(300)
    np.testing.assert_allclose(C.matmul(scaled, eye), rows[:, None] * dense * columns, atol=1e-14)
    chosen = np.array([200, 3, 77])
    taken = C.take_columns(x, jnp.asarray(chosen))
    np.testing.assert_allclose(C.matmul(taken, jnp.eye(3)), dense[:, chosen], atol=1e-14)
    np.testing.assert_allclose(C.row_sums(taken), dense[:, chosen].sum(1), atol=1e-12)


def test_sums_of_groups_and_products_with_the_transpose(x, matrix):
    dense = matrix.toarray()
    group = np.random.default_rng(3).integers(5, size=2500)
    expected = np.stack([dense[group == i].sum(0) for i in range(6)])
    np.testing.assert_allclose(C.group_sums(x, jnp.asarray(group), 6), expected, atol=1e-12)
    v = np.random.default_rng(4).normal(size=(2500, 3))
    np.testing.assert_allclose(C.transposed_product(x, jnp.asarray(v)), dense.T @ v, atol=1e-11)


def test_values_come_back_in_csr_order(matrix, x64):
    x = C.Counts.from_scipy(matrix)
    np.testing.assert_array_equal(x.host_values(matrix.indptr), matrix.data)
    for found, expected in (
        (x.to_scipy(), matrix),
        (C.take_columns(x, jnp.asarray([200, 3, 77])).to_scipy(), matrix[:, [200, 3, 77]]),
    ):
        np.testing.assert_array_equal(found.toarray(), expected.toarray())
        assert found.has_canonical_format


@pytest.mark.parametrize("density", [0.1, 0.3])
def test_derivatives_in_the_values_meet_finite_differences(density, x64):
    small = sp.random(60, 20, density, format="csr", random_state=0)
    x = C.Counts.from_scipy(small)
    real = np.asarray(x.row) < x.block_rows

    def f(data):
        y = x.with_data(data * real)
        mean, variance = C.column_moments(y)
        return jnp.sin(C.gram(y, mean)).sum() + jnp.sin(C.row_sums(y)).sum() + jnp.sin(variance).sum()

    check_grads(f, (x.data,), order=1, modes=["rev"])


def test_no_dense_matrix_is_held():
    x = C.Counts.from_scipy(sp.random(8 * C.BLOCK_ROWS, 400, 0.01, format="csr", dtype=np.float32, random_state=0))
    assert largest_array(lambda x: C.matmul(x, jnp.ones((400, 2))), x) <= C.BLOCK_ROWS * 400
