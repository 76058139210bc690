"""The gather kernels against scipy, and their derivatives against finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from jax.test_util import check_grads
from sklearn.neighbors import NearestNeighbors

from scdiffx._core.graph import (
    Graph,
    Pattern,
    columns_to_slots,
    flip,
    reachable,
    row_sums,
    rows_to_slots,
    squared_distances,
)


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(300, 3))


@pytest.fixture(scope="module")
def lists(points) -> np.ndarray:
    return NearestNeighbors(n_neighbors=6).fit(points).kneighbors(points)[1][:, 1:]


@pytest.fixture
def graph(lists, x64) -> Graph:
    pattern = Pattern.from_neighbors(lists)
    values = np.random.default_rng(1).random(pattern.indices.shape) * pattern.valid
    return Graph(Pattern(*map(jnp.asarray, pattern)), jnp.asarray(values))


def test_the_pattern_is_the_union_of_both_directions(graph, lists):
    n, k = lists.shape
    directed = sp.csr_matrix((np.ones(n * k), (np.repeat(np.arange(n), k), lists.ravel())), shape=(n, n))
    union = (directed + directed.T) > 0
    found = graph.with_values(jnp.asarray(graph.pattern.valid, float)).to_scipy() > 0
    assert (found != union).nnz == 0
    np.testing.assert_array_equal(np.asarray(graph.pattern.indices)[:n, :k], lists)
    assert len(graph.pattern.owner) > 0  # some cells have more neighbours than the width: overflow rows are in use


def test_products_equal_scipy(graph):
    matrix, v = graph.to_scipy(), np.random.default_rng(2).normal(size=(300, 4))
    np.testing.assert_allclose(graph @ v, matrix @ v, rtol=1e-12)
    np.testing.assert_allclose(graph @ v[:, 0], matrix @ v[:, 0], rtol=1e-12)
    np.testing.assert_allclose(graph.T @ v, matrix.T @ v, rtol=1e-12)
    np.testing.assert_allclose(graph.row_sums(), np.asarray(matrix.sum(1)).ravel(), rtol=1e-12)
    left, right = np.random.default_rng(3).random((2, 300))
    scaled = graph.scaled(jnp.asarray(left), jnp.asarray(right)).to_scipy()
    np.testing.assert_allclose(scaled.toarray(), left[:, None] * matrix.toarray() * right, rtol=1e-12)


def test_reordered_is_the_permuted_matrix_and_its_transpose_too(graph):
    order = np.asarray(graph.pattern.order)
    np.testing.assert_array_equal(np.sort(order), np.arange(300))
    matrix, moved = graph.to_scipy()[order][:, order], jax.jit(Graph.reordered)(graph)
    assert abs(moved.to_scipy() - matrix).max() == 0
    assert abs(moved.T.to_scipy() - matrix.T).max() == 0
    # Neighbours come nearer to each other.
    apart = [np.abs(np.subtract(*m.nonzero())).mean() for m in (graph.to_scipy(), matrix)]
    assert apart[1] < 0.5 * apart[0]


def test_any_scipy_matrix_survives_the_round_trip(x64):
    matrix = sp.random(80, 80, 0.05, random_state=0, format="csr")  # not symmetric, some empty rows
    assert abs(Graph.from_scipy(matrix).to_scipy() - matrix).max() == 0
    with pytest.raises(ValueError, match="square"):
        Graph.from_scipy(sp.random(3, 4, 0.5))


def test_derivatives_meet_finite_differences(graph, points):
    p = graph.pattern
    v = jnp.asarray(np.random.default_rng(4).normal(size=(300, 3)))

    def product(values, v):
        return jnp.sin(Graph(p, values * p.valid) @ v).sum()

    def slots(u):
        return jnp.sin(rows_to_slots(p, u) * columns_to_slots(p, u**2) + flip(p, rows_to_slots(p, u))).sum()

    check_grads(product, (graph.values, v), order=1, modes=["rev"])
    check_grads(lambda z: jnp.sin(squared_distances(p, z)).sum(), (jnp.asarray(points),), order=1, modes=["rev"])
    check_grads(slots, (v[:, 0],), order=1, modes=["rev"])
    check_grads(lambda x: jnp.sin(row_sums(p, x * p.valid)).sum(), (graph.values,), order=1, modes=["rev"])


def test_reachable_cells_are_those_of_the_component(x64):
    blocks = sp.block_diag([sp.diags([1.0, 1.0], [-1, 1], shape=(m, m)) for m in (7, 5)]).tocsr()
    seen = reachable(Graph.from_scipy(blocks), 8)
    np.testing.assert_array_equal(seen, np.arange(12) >= 7)


def test_a_refreshed_pattern_keeps_its_shape(points, lists):
    first = Pattern.from_neighbors(lists)
    moved = points + np.random.default_rng(5).normal(scale=0.1, size=points.shape)
    again = NearestNeighbors(n_neighbors=6).fit(moved).kneighbors(moved)[1][:, 1:]
    second = Pattern.from_neighbors(again, like=first)
    assert jax.tree.map(np.shape, tuple(first)) == jax.tree.map(np.shape, tuple(second))
    assert not np.array_equal(first.indices, second.indices)
