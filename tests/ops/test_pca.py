"""Principal components against a full decomposition; agreement with scanpy is in test_parity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

from helpers import QUICK, called, pbmc_counts
from scdiffx import ops
from scdiffx._core.fields import replace
from scdiffx.ops import _pca

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    return np.log1p(pbmc_counts(400, 300).X.toarray().astype(np.float64))


def reference(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    centred = x - x.mean(0)
    _, size, axes = np.linalg.svd(centred, full_matrices=False)
    variance = size**2 / (len(x) - 1)
    axes = axes[:k].T * np.sign(axes[:k].T[np.abs(axes[:k].T).argmax(0), np.arange(k)])
    return centred @ axes, axes, variance


@pytest.mark.parametrize("form", ["gram", "blocks", "dense"])
def test_components_equal_the_full_decomposition(
    matrix: np.ndarray, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "blocks":
        monkeypatch.setattr(_pca, "MAX_GRAM_GENES", 10)
    x = jnp.asarray(matrix) if form == "dense" else ops.Counts.from_scipy(sp.csr_matrix(matrix))
    # Not through `called`: what is compiled once would not see the other limit.
    found = jax.jit(ops.PCA(n_comps=12, anchored=False), compiler_options=QUICK)(x)
    scores, axes, variance = reference(matrix, 12)
    np.testing.assert_allclose(found.components, axes, atol=1e-7)
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    np.testing.assert_allclose(found.variance, variance[:12], rtol=1e-10)
    np.testing.assert_allclose(found.variance_ratio, variance[:12] / variance.sum(), rtol=1e-10)


def test_without_centring_the_axes_are_those_of_the_second_moment(matrix: np.ndarray) -> None:
    found = called(ops.PCA(n_comps=5, anchored=False, zero_center=False), jnp.asarray(matrix))
    axes = np.linalg.svd(matrix, full_matrices=False)[2][:5].T
    assert np.abs((axes * np.asarray(found.components)).sum(0)).min() > 1 - 1e-10
    np.testing.assert_allclose(found.scores, matrix @ np.asarray(found.components), atol=1e-9)
    np.testing.assert_allclose(found.variance, np.asarray(found.scores).var(0), rtol=1e-9)


def test_mask_and_weights(matrix: np.ndarray) -> None:
    mask = np.arange(300) % 3 == 0
    weight = np.random.default_rng(0).uniform(size=300)
    x = ops.Counts.from_scipy(sp.csr_matrix(matrix))
    masked = ops.PCA(n_comps=6, anchored=False).init(x, None, mask)
    scores, axes, _ = reference(matrix[:, mask], 6)
    found = called(masked, x)
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    np.testing.assert_allclose(np.asarray(found.components)[mask], axes, atol=1e-7)
    assert not np.asarray(found.components)[~mask].any()
    weighed = called(ops.PCA(n_comps=6, anchored=False), x, jnp.asarray(weight))
    np.testing.assert_allclose(weighed.scores, reference(matrix * weight, 6)[0], atol=1e-6)


@pytest.mark.slow
def test_an_anchored_projection_starts_at_the_components_and_stays(matrix: np.ndarray) -> None:
    x = jnp.asarray(matrix)
    anchored = ops.PCA(n_comps=6).init(x)
    result = called(anchored, x)
    free = called(ops.PCA(n_comps=6, anchored=False), x)
    np.testing.assert_allclose(result.scores, free.scores, atol=1e-8)
    np.testing.assert_allclose(result.variance, free.variance, rtol=1e-8)
    np.testing.assert_allclose(result.variance_ratio, free.variance_ratio, rtol=1e-8)
    np.testing.assert_allclose(called(anchored, x[:30]).scores, result.scores[:30], atol=1e-10)
    moved = replace(anchored, shift=anchored.shift + 0.1)
    expected = (matrix - matrix.mean(0)) @ (np.asarray(free.components) + 0.1)
    np.testing.assert_allclose(called(moved, x).scores, expected, atol=1e-8)


def test_equal_variances_have_finite_derivatives() -> None:
    """Two genes exchanged between two halves of the cells: every eigenvalue of the covariance is double."""
    half = np.random.default_rng(0).normal(size=(60, 5))
    empty = np.zeros_like(half)
    x = jnp.asarray(np.block([[half, empty], [empty, half]]))
    op = ops.PCA(n_comps=4, anchored=False, zero_center=False)

    def captured(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        result = op(x)
        return (result.scores**2).sum(), result.variance

    both = jax.jit(jax.value_and_grad(captured, has_aux=True), compiler_options=QUICK)
    (_, values), gradient = both(x)
    assert abs(float(values[0] - values[1])) < 1e-9
    assert bool(jnp.isfinite(gradient).all())
    # What four components capture is a function of x alone, whatever basis of the plane they take.
    step = np.random.default_rng(1).normal(size=x.shape)
    numeric = (both(x + 1e-6 * step)[0][0] - both(x - 1e-6 * step)[0][0]) / 2e-6
    np.testing.assert_allclose(float((gradient * step).sum()), float(numeric), rtol=1e-6)


@pytest.mark.parametrize("n_comps", [0, 301])
def test_impossible_sizes(matrix: np.ndarray, n_comps: int) -> None:
    with pytest.raises(ValueError, match=f"n_comps={n_comps}"):
        ops.PCA(n_comps=n_comps, anchored=False)(jnp.asarray(matrix))


def test_components_of_the_same_shape_are_compiled_once(caplog: pytest.LogCaptureFixture) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 12)))
    ops.PCA(n_comps=2).init(x)
    with jax.log_compiles():
        ops.PCA(n_comps=2).init(x + 1)
        ops.PCA(n_comps=3).init(x)
    programs = [record.message.split()[1] for record in caplog.records if record.message.startswith("Compiling")]
    assert sum("_fitted" in name for name in programs) == 1
