"""Local regression against the authors' routines (scikit-misc), and as a differentiable curve."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scdiffx._core.loess import Curve, evaluate, loess


def noisy(n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    return x, np.sin(2 * x) + 0.1 * rng.normal(size=n)


def tied(n, places, seed=0):
    """Points on a lattice, a third of them at one place: the tree has to cut beside the ties."""
    rng = np.random.default_rng(seed)
    x = np.append(rng.integers(0, places, n - n // 3) / 3.0, np.full(n // 3, 1.0))
    return x, x**2 + rng.normal(size=n)


def reference(x, y, span):
    skmisc = pytest.importorskip("skmisc.loess", reason="scikit-misc is the reference")
    model = skmisc.loess(x, y, span=span, degree=2)
    model.fit()
    return np.asarray(model.outputs.fitted_values)


@pytest.mark.parametrize("span", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("n", [20, 37, 500, 3000])
def test_equals_reference(n, span):
    x, y = noisy(n)
    np.testing.assert_allclose(evaluate(loess(x, y, span=span), x), reference(x, y, span), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("places", "span"), [(12, 0.5), (40, 0.4), (200, 0.5)])
def test_equals_reference_with_ties(places, span):
    x, y = tied(600, places)
    np.testing.assert_allclose(evaluate(loess(x, y, span=span), x), reference(x, y, span), rtol=0, atol=1e-10)


def test_equals_reference_on_real_means_and_variances(paul15):
    x = paul15.X.toarray().astype(np.float64)
    mean, variance = x.mean(0), x.var(0, ddof=1)
    keep = variance > 0
    a, b = np.log10(mean[keep]), np.log10(variance[keep])
    np.testing.assert_allclose(evaluate(loess(a, b), a), reference(a, b, 0.3), rtol=0, atol=1e-11)


def test_a_parabola_is_its_own_regression():
    x = np.linspace(-1, 2, 400)
    curve = loess(x, 3 * x**2 - x + 1)
    np.testing.assert_allclose(curve.values, 3 * curve.knots**2 - curve.knots + 1, atol=1e-10)
    np.testing.assert_allclose(curve.slopes, 6 * curve.knots - 1, atol=1e-9)
    np.testing.assert_allclose(evaluate(curve, x), 3 * x**2 - x + 1, atol=1e-10)


def test_smaller_cells_give_more_knots():
    x, y = noisy(1000)
    assert len(loess(x, y, cell=0.1).knots) > len(loess(x, y, cell=0.2).knots) > len(loess(x, y, cell=0.8).knots)


def test_jax_equals_numpy_and_has_the_right_slope(x64):
    x, y = noisy(300)
    curve = loess(x, y)
    at = np.concatenate([np.random.default_rng(1).uniform(-2, 2, 50), [-9.0, 9.0]])
    values, slopes = jax.jit(lambda t: jax.vmap(jax.value_and_grad(lambda u: evaluate(Curve(*curve), u)))(t))(at)
    np.testing.assert_allclose(values, evaluate(curve, at), rtol=1e-12)
    step = 1e-6
    fd = (evaluate(curve, at + step) - evaluate(curve, at - step)) / (2 * step)
    np.testing.assert_allclose(slopes, fd, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(slopes[-2:], [curve.slopes[0], curve.slopes[-1]])


def test_float32_stays_float32():
    x, y = noisy(300)
    curve = loess(x, y)
    short = Curve(*(jnp.asarray(v, jnp.float32) for v in curve))
    out = evaluate(short, jnp.asarray(x, jnp.float32))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, evaluate(curve, x), atol=1e-5)


def test_padding_changes_nothing():
    x, y = noisy(300)
    curve = loess(x, y)
    longer = curve.padded(len(curve.knots) + 5)
    at = np.linspace(-6, 6, 300)
    assert len(longer.knots) == len(curve.knots) + 5
    np.testing.assert_allclose(evaluate(longer, at), evaluate(curve, at), rtol=1e-10, atol=1e-10)


def test_errors():
    x, y = noisy(30)
    with pytest.raises(ValueError, match=r"span=0\.05 leaves 1 of 30"):
        loess(x, y, span=0.05)
    with pytest.raises(ValueError, match=r"span=1\.5"):
        loess(x, y, span=1.5)
    with pytest.raises(ValueError, match="share the place"):
        loess(np.append(np.zeros(20), x[:10]), y)
    with pytest.raises(ValueError, match="finite"):
        loess(np.append(x[1:], np.nan), y)
