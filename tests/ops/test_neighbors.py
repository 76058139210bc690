"""Neighbour graphs by their definitions; agreement with scanpy is in test_parity, derivatives are in test_contract."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.spatial.distance import cdist

from helpers import QUICK, called
from scdiffx import ops
from scdiffx._core.fields import replace
from scdiffx._core.graph import Graph
from scdiffx.ops._neighbors import replacements

pytestmark = pytest.mark.usefixtures("x64")
CELLS, K = 250, 12


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(CELLS, 6)) * np.linspace(2, 0.5, 6)


def built(points: np.ndarray, **settings: object) -> tuple[ops.Neighbors, ops.NeighborsResult]:
    op = ops.Neighbors(n_neighbors=K, **settings).init(jnp.asarray(points))
    return op, called(op, jnp.asarray(points))


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "correlation", "cityblock"])
def test_neighbors_and_their_distances(points: np.ndarray, metric: str) -> None:
    all_pairs = cdist(points, points, metric)
    np.fill_diagonal(all_pairs, np.inf)
    _, result = built(points, metric=metric)
    expected = np.sort(all_pairs, axis=1)[:, : K - 1]
    np.testing.assert_allclose(result.distances, expected, rtol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(all_pairs, np.asarray(result.indices), 1), expected, rtol=1e-6)


def test_fuzzy_weights_solve_their_equation(points: np.ndarray) -> None:
    """The weights of a cell to its neighbours sum to log2(k), and two directions unite as probabilities do."""
    _, result = built(points)
    distance = np.asarray(result.distances)
    excess = distance - distance.min(1, keepdims=True)
    low, high = np.zeros(CELLS), np.full(CELLS, 100.0)
    for _ in range(100):
        middle = (low + high) / 2
        wide = np.exp(-excess / middle[:, None]).sum(1) > np.log2(K)
        low, high = np.where(wide, low, middle), np.where(wide, middle, high)
    directed = np.zeros((CELLS, CELLS))
    np.put_along_axis(directed, np.asarray(result.indices), np.exp(-excess / middle[:, None]), 1)
    union = directed + directed.T - directed * directed.T
    np.testing.assert_allclose(result.connectivities.to_scipy().toarray(), union, atol=1e-9)


def test_gaussian_weights(points: np.ndarray) -> None:
    _, result = built(points, method="gauss")
    pairs = cdist(points, points, "sqeuclidean")
    scale = np.median(np.asarray(result.distances) ** 2, axis=1)
    total = scale[:, None] + scale
    kernel = np.sqrt(2 * np.sqrt(np.outer(scale, scale)) / total) * np.exp(-pairs / total)
    found = result.connectivities.to_scipy()
    np.testing.assert_allclose(found.data, kernel[found.nonzero()], rtol=1e-9)


@pytest.mark.parametrize("method", ops.KERNELS)
def test_graphs_are_symmetric_with_weights_up_to_one(points: np.ndarray, method: str) -> None:
    weights = built(points, method=method)[1].connectivities.to_scipy()
    assert abs(weights - weights.T).max() < 1e-12
    assert weights.data.min() > 0
    assert weights.data.max() <= 1 + 1e-12
    assert weights.diagonal().max() == 0


@pytest.mark.parametrize("method", ops.KERNELS)
def test_a_graph_does_not_know_scale_place_or_rotation(points: np.ndarray, method: str) -> None:
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    first = built(points, method=method)[1].connectivities.to_scipy()
    second = built(37 * points @ turn + 5, method=method)[1].connectivities.to_scipy()
    assert abs(first - second).max() < 1e-7


@pytest.mark.parametrize("method", ops.KERNELS)
def test_bandwidth_one_is_classical_and_more_joins_more(points: np.ndarray, method: str) -> None:
    op, result = built(points, method=method)
    wider = called(replace(op, bandwidth=jnp.asarray(2.0)), jnp.asarray(points)).connectivities
    assert float(wider.row_sums().sum()) > float(result.connectivities.row_sums().sum())


@pytest.mark.parametrize("method", ops.KERNELS)
@pytest.mark.parametrize("copies", [3, 25])
def test_copies_of_a_cell_have_finite_weights_and_derivatives(points: np.ndarray, method: str, copies: int) -> None:
    z = jnp.asarray(np.repeat(points[: 250 // copies], copies, axis=0))
    op = ops.Neighbors(n_neighbors=K, method=method).init(z)

    def total(bandwidth: jax.Array, z: jax.Array) -> jax.Array:
        result = replace(op, bandwidth=bandwidth)(z)
        return (result.connectivities.values**2).sum() + result.distances.sum()

    assert bool(jnp.isfinite(op(z).connectivities.values).all())
    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.asarray(1.0), z):
        assert bool(jnp.isfinite(gradient).all())
    weights = op(z).connectivities.to_scipy().toarray()
    first = weights[:copies, :copies][~np.eye(copies, dtype=bool)]
    assert first.max() == 1
    if copies == 3:
        np.testing.assert_array_equal(first, 1)


def test_a_sparse_representation_equals_a_dense_one(points: np.ndarray) -> None:
    sparse = np.where(points > 0.5, points, 0)
    dense_result = built(sparse)[1]
    x = ops.Counts.from_scipy(sp.csr_matrix(sparse))
    result = called(ops.Neighbors(n_neighbors=K).init(x), x)
    np.testing.assert_allclose(result.distances, dense_result.distances, rtol=1e-9)


def test_a_search_anew_keeps_the_shapes(points: np.ndarray) -> None:
    op, _ = built(points)
    again = op.init(jnp.asarray(points + 0.02 * np.random.default_rng(2).normal(size=points.shape)))
    assert not np.array_equal(op.indices, again.indices)
    assert [x.shape for x in jax.tree.leaves(op.pattern)] == [x.shape for x in jax.tree.leaves(again.pattern)]


def test_impossible_settings(points: np.ndarray) -> None:
    z = jnp.asarray(points)
    with pytest.raises(ValueError, match=r"method='best'.*'gauss'"):
        ops.Neighbors(method="best").init(z)
    for k in (1, CELLS + 1):
        with pytest.raises(ValueError, match=f"n_neighbors={k}"):
            ops.Neighbors(n_neighbors=k).init(z)
    with pytest.raises(ValueError, match="init"):
        ops.Neighbors()(z)


@pytest.mark.slow
def test_replacements_are_the_graph_without_a_cell() -> None:
    z = np.random.default_rng(0).normal(size=(60, 3))
    op = ops.Neighbors(n_neighbors=7)
    base = op.init(jnp.asarray(z))
    found = replacements(base, jnp.asarray(z))
    assert found is not None
    p, k = found.graph.pattern, 6
    same = found.graph.to_scipy() - called(base, jnp.asarray(z)).connectivities.to_scipy()
    assert abs(same).max() < 1e-12
    cotangent = np.random.default_rng(1).normal(size=p.indices.shape)
    effect = np.asarray(jax.jit(type(found).effect, compiler_options=QUICK)(found, jnp.asarray(cotangent)))
    columns, lists = np.asarray(p.indices)[:60, : k + 1], np.asarray(found.indices)
    for gone in (4, 31):
        step = np.zeros((60, 60))
        for j, at in zip(*np.nonzero(lists == gone), strict=True):
            step[j, columns[j]] += np.asarray(found.change)[j, at]
        assert not step[:, gone].any()

        def union(t: float, step: np.ndarray = step) -> np.ndarray:
            own = Graph(p, found.directed).to_scipy().toarray() + t * step
            return own + own.T - own * own.T

        others = np.delete(np.arange(60), gone)
        anew = called(op.init(jnp.asarray(z[others])), jnp.asarray(z[others])).connectivities
        np.testing.assert_allclose(union(1)[np.ix_(others, others)], anew.to_scipy().toarray(), atol=1e-6)
        side = Graph(p, jnp.asarray(cotangent * np.asarray(p.valid))).to_scipy().toarray()
        slope = ((union(1e-6) - union(-1e-6)) * side).sum() / 2e-6
        assert abs(slope) > 1e-2
        assert effect[gone] == pytest.approx(slope, rel=1e-6)


def test_there_are_no_replacements_without_a_next_neighbor() -> None:
    z = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)), jnp.float32)
    for op in (ops.Neighbors(n_neighbors=20), ops.Neighbors(n_neighbors=5, method="gauss")):
        assert replacements(op.init(z), z) is None
