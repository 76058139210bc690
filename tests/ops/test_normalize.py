"""Normalisation by its formulas; agreement with scanpy is in test_parity, derivatives are in test_contract."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

from helpers import called, pbmc_counts
from scdiffx import ops

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    x = pbmc_counts(200, 150).X.toarray().astype(np.float64)
    x[7] = 0
    x[:, 11] = 0
    x[:, 12] = 2
    return x


@pytest.fixture(params=["sparse", "dense"])
def x(request: pytest.FixtureRequest, matrix: np.ndarray) -> ops.Counts | jax.Array:
    return ops.Counts.from_scipy(sp.csr_matrix(matrix)) if request.param == "sparse" else jnp.asarray(matrix)


def dense(x: ops.Counts | jax.Array, like: np.ndarray) -> np.ndarray:
    if not isinstance(x, ops.Counts):
        return np.asarray(x)
    csr = sp.csr_matrix(like)
    return sp.csr_matrix((x.host_values(csr.indptr), csr.indices, csr.indptr), like.shape).toarray()


def test_totals_meet_the_median(x: ops.Counts | jax.Array, matrix: np.ndarray) -> None:
    op = ops.NormalizeTotal().init(x)
    totals = matrix.sum(1)
    assert float(op.target_sum) == np.median(totals[totals > 0])
    result = called(op, x)
    found = dense(result.x, matrix)
    np.testing.assert_allclose(found.sum(1), np.where(totals > 0, float(op.target_sum), 0), rtol=1e-12)
    np.testing.assert_allclose(result.factor, totals / float(op.target_sum), rtol=1e-12)


def test_dominant_genes_do_not_count_towards_the_total(x: ops.Counts | jax.Array, matrix: np.ndarray) -> None:
    op = ops.NormalizeTotal(target_sum=100.0, exclude_highly_expressed=True, max_fraction=0.1).init(x)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    counted = ~(share > 0.1).any(0)
    assert 0 < counted.sum() < matrix.shape[1]
    np.testing.assert_array_equal(op.counted, counted)
    total = matrix[:, counted].sum(1)
    np.testing.assert_allclose(
        dense(called(op, x).x, matrix)[total > 0], (100 * matrix / np.maximum(total, 1)[:, None])[total > 0]
    )


@pytest.mark.parametrize("base", [None, 2.0, 10.0])
def test_logarithm(x: ops.Counts | jax.Array, matrix: np.ndarray, base: float | None) -> None:
    expected = np.log1p(matrix) / (1 if base is None else np.log(base))
    np.testing.assert_allclose(dense(ops.Log1p(base=base)(x), matrix), expected, rtol=1e-12)


@pytest.mark.parametrize("max_value", [None, 1.5])
def test_scaled_genes(x: ops.Counts | jax.Array, matrix: np.ndarray, max_value: float | None) -> None:
    result = called(ops.Scale(max_value=max_value).init(x), x)
    std = matrix.std(0, ddof=1)
    std[std == 0] = 1
    expected = (matrix - matrix.mean(0)) / std
    limit = np.inf if max_value is None else max_value
    np.testing.assert_allclose(result.x, np.clip(expected, -limit, limit), atol=1e-12)
    np.testing.assert_allclose(result.std, std, rtol=1e-12)
    uncentred = called(ops.Scale(max_value=max_value, zero_center=False).init(x), x)
    np.testing.assert_allclose(dense(uncentred.x, matrix), np.minimum(matrix / std, limit), atol=1e-12)


def test_statistics_stay_when_other_cells_come(x: ops.Counts | jax.Array, matrix: np.ndarray) -> None:
    op = ops.Scale().init(x)
    part = op(jnp.asarray(matrix[:20])).x
    np.testing.assert_allclose(part, op(x).x[:20], atol=1e-12)
    with pytest.raises(ValueError, match="init"):
        ops.Scale()(x)
