"""The mixture with one covariance against scikit-learn's and its invariance; derivatives and cost: test_contract."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

from helpers import called, pbmc_counts
from scdiffx import ops

COUNT = 5


@pytest.fixture(scope="module")
def blood() -> np.ndarray:
    counts = pbmc_counts(500, 300).X.toarray().astype(np.float64)
    log = np.log1p(counts * 1e3 / counts.sum(1, keepdims=True))
    left, _, _ = np.linalg.svd(log - log.mean(0), full_matrices=False)
    # In units of standard deviations scikit-learn's ridge is the same; the size of a dimension does not matter else.
    return left[:, :8] * np.sqrt(500) + 3


def start_of(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    means = x[np.random.default_rng(1).choice(len(x), COUNT, replace=False)]
    return np.full(COUNT, 1 / COUNT), means, np.cov(x.T)


@pytest.mark.usefixtures("x64")
def test_equals_scikit_learn_from_the_same_start(blood: np.ndarray) -> None:
    weights, means, covariance = start_of(blood)
    theirs = GaussianMixture(
        COUNT,
        covariance_type="tied",
        tol=1e-14,
        max_iter=5000,
        weights_init=weights,
        means_init=means,
        precisions_init=np.linalg.inv(covariance),
    ).fit(blood)
    start = ops.TiedMixture(n_components=COUNT, weights=weights, means=means, covariance=covariance, tol=1e-10)
    op = start.init(jnp.asarray(blood))
    result = called(op, jnp.asarray(blood))
    np.testing.assert_allclose(result.weights, theirs.weights_, atol=1e-7)
    np.testing.assert_allclose(result.means, theirs.means_, atol=1e-6)
    np.testing.assert_allclose(result.covariance, theirs.covariances_, atol=1e-6)
    np.testing.assert_allclose(result.memberships, theirs.predict_proba(blood), atol=1e-5)
    np.testing.assert_array_equal(result.labels, theirs.predict(blood))
    assert float(result.log_likelihood) == pytest.approx(theirs.score(blood), abs=1e-6)
    # The call goes on from where `init` ended, and comes to the same end for other units.
    scaled = ops.replace(op, means=op.means * 7, covariance=op.covariance * 49)
    moved = called(scaled, jnp.asarray(7 * blood))
    np.testing.assert_allclose(moved.memberships, result.memberships, atol=1e-7)
    np.testing.assert_allclose(moved.log_likelihood, result.log_likelihood - 8 * np.log(7), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_starts_are_as_likely_as_scikit_learns_and_numbered_by_size(blood: np.ndarray) -> None:
    theirs = GaussianMixture(COUNT, covariance_type="tied", n_init=10, random_state=0, tol=1e-6, max_iter=1000)
    op = ops.TiedMixture(n_components=COUNT, tol=1e-10).init(jnp.asarray(blood))
    result = called(op, jnp.asarray(blood))
    assert float(result.log_likelihood) > theirs.fit(blood).score(blood) - 0.02
    assert (np.diff(np.bincount(result.labels, minlength=COUNT)) <= 0).all()
    # The other way in: a partition.
    again = ops.TiedMixture(tol=1e-10).from_labels(jnp.asarray(blood), result.labels)
    assert again.n_components == COUNT
    np.testing.assert_array_equal(called(again, jnp.asarray(blood)).labels, result.labels)


@pytest.mark.usefixtures("x64")
def test_what_cannot_be_fitted_is_refused(blood: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"n_components=501.*500"):
        ops.TiedMixture(n_components=501).init(jnp.asarray(blood))
    with pytest.raises(ValueError, match=r"call `op = op\.init"):
        ops.TiedMixture()(jnp.asarray(blood))
    with pytest.warns(UserWarning, match="max_iter=1 "):
        ops.TiedMixture(n_components=COUNT, n_init=1, max_iter=1).init(jnp.asarray(blood))
