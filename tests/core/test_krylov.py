"""Linear solves and their adjoints, against dense solves and finite differences."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import largest_array
from scdiffx._core.krylov import cg, solve


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "cols", "values"], meta_fields=["n"])
@dataclass
class Walk:
    """``I - Q`` for a directed sparse matrix Q of given entries."""

    rows: Any
    cols: Any
    values: Any
    n: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.n, self.n)

    @property
    def T(self) -> Walk:
        return Walk(self.cols, self.rows, self.values, self.n)

    def __matmul__(self, v: jax.Array) -> jax.Array:
        return v.at[self.rows].add(-self.values[:, None] * v[self.cols])

    def dense(self) -> np.ndarray:
        m = np.eye(self.n)
        np.add.at(m, (self.rows, self.cols), -np.asarray(self.values))
        return m


def walk(n: int, dtype: Any = np.float64, leak: float = 0.002, k: int = 6) -> Walk:
    """A drifting walk among neighbours on a line, absorbed everywhere at the rate `leak`."""
    rng = np.random.default_rng(0)
    rows = np.repeat(np.arange(n), k)
    cols = np.clip(rows + rng.integers(-4, 6, rows.size), 0, n - 1)
    weights = rng.random((n, k)) + 0.1
    values = (1 - leak) * weights / weights.sum(1, keepdims=True)
    return Walk(rows.astype(np.int32), cols.astype(np.int32), jnp.asarray(values.ravel(), dtype), n)


@pytest.fixture(autouse=True)
def double(x64: None) -> None:
    """Every test of this file runs where float64 is at hand."""


@pytest.mark.parametrize("method", ["bicgstab", "gmres"])
def test_solve_matches_dense(method: str) -> None:
    A = walk(300)
    b = np.random.default_rng(1).random((300, 3))
    b[:, 2] = 0
    found = solve(A, jnp.asarray(b), method=method)
    assert bool(found.converged)
    np.testing.assert_allclose(found.x, np.linalg.solve(A.dense(), b), rtol=1e-7, atol=1e-9)
    assert found.residuals.max() <= 1e-10
    np.testing.assert_array_equal(found.x[:, 2], 0)
    again = solve(A, jnp.asarray(b), x0=found.x, method=method)
    assert int(again.n_steps) == 2


def test_solve_dense_symmetric_with_cg() -> None:
    rng = np.random.default_rng(2)
    q = np.linalg.qr(rng.standard_normal((200, 200)))[0]
    matrix = (q * np.geomspace(1, 1e3, 200)) @ q.T
    b = rng.standard_normal((200, 4))
    found = solve(jnp.asarray(matrix), jnp.asarray(b), method="cg")
    assert bool(found.converged)
    np.testing.assert_allclose(found.x, np.linalg.solve(matrix, b), atol=1e-7)


def test_one_right_hand_side_is_a_vector() -> None:
    b = np.random.default_rng(1).random(100)
    found = solve(walk(100), jnp.asarray(b))
    assert found.x.shape == (100,)
    np.testing.assert_allclose(found.x, np.linalg.solve(walk(100).dense(), b), rtol=1e-7)


def test_solve_float32_reaches_what_float32_can() -> None:
    A = walk(300, np.float32)
    b = np.random.default_rng(1).random((300, 2)).astype(np.float32)
    found = solve(A, jnp.asarray(b))
    assert found.x.dtype == np.float32
    exact = np.linalg.solve(A.dense().astype(np.float64), b)
    lapack = np.linalg.solve(A.dense().astype(np.float32), b)
    error, reference = (np.abs(x - exact).max() / np.abs(exact).max() for x in (np.asarray(found.x), lapack))
    assert error < max(5 * reference, 1e-4)
    assert bool(found.converged)


@pytest.mark.parametrize("method", ["bicgstab", "gmres"])
def test_adjoint(method: str) -> None:
    A = walk(200, leak=0.02)
    rng = np.random.default_rng(3)
    b = jnp.asarray(rng.random((200, 2)))
    target = jnp.asarray(rng.standard_normal((200, 2)))

    def loss(values: jax.Array, b: jax.Array) -> jax.Array:
        x = solve(Walk(A.rows, A.cols, values, A.n), b, method=method, tol=1e-12).x
        return (target * x**2).sum()

    gradients = jax.grad(loss, argnums=(0, 1))(A.values, b)
    directions = A.values * rng.standard_normal(A.values.shape), jnp.asarray(rng.standard_normal(b.shape))
    for at in (0, 1):
        expected = float((gradients[at] * directions[at]).sum())
        errors = []
        for step in (1e-4, 1e-5, 1e-6):
            change = [step * directions[i] if i == at else 0 for i in (0, 1)]
            up, down = (loss(A.values + s * change[0], b + s * change[1]) for s in (1, -1))
            errors.append(abs(float(up - down) / (2 * step) / expected - 1))
        assert min(errors) < 1e-6, errors
        assert max(errors) < 1e-4, errors


def test_singular_system_is_reported_and_stays_finite() -> None:
    A = walk(100, leak=0.0)
    found = solve(A, jnp.ones(100))
    assert not bool(found.converged)
    assert np.isfinite(np.asarray(found.x)).all()


def test_step_limit_is_reported() -> None:
    found = solve(walk(300), jnp.asarray(np.random.default_rng(1).random(300)), max_steps=4)
    assert not bool(found.converged)


def test_cg_columns_converge_apart() -> None:
    """Each column has its own shift; one has no positive operator, and must not disturb the others."""
    diagonal = jnp.linspace(1, 50, 80)[:, None]
    shifts = jnp.asarray([0.0, 100.0, -200.0])
    b = jnp.asarray(np.random.default_rng(0).standard_normal((80, 3)))
    found = cg(lambda v: (diagonal + shifts) * v, b, tol=1e-11, max_steps=500)
    np.testing.assert_allclose(found.x[:, :2], (b / (diagonal + shifts))[:, :2], rtol=1e-8, atol=1e-12)
    assert np.isfinite(np.asarray(found.x)).all()
    assert found.residuals[:2].max() <= 1e-10
    assert not bool(found.converged)
    assert int(found.n_steps) < 200


def test_memory_grows_linearly() -> None:
    def cost(n: int) -> int:
        A = walk(n)

        def loss(values: jax.Array) -> jax.Array:
            return (solve(Walk(A.rows, A.cols, values, n), jnp.ones((n, 2))).x ** 2).sum()

        return largest_array(jax.value_and_grad(loss), A.values)

    small, large = cost(1000), cost(2000)
    assert 2000 <= small < 1000 * 100
    assert large < 2.5 * small


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"method": "lu"}, "Available"),
        ({"b": np.ones(7)}, "b must have shape"),
        ({"x0": np.ones((9, 2))}, "x0 must have the shape"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], match: str) -> None:
    call = {"b": np.ones(9)} | arguments
    with pytest.raises(ValueError, match=match):
        solve(jnp.eye(9), **call)
