"""Diffusion maps and pseudotime against dense linear algebra; agreement with scanpy is in test_parity."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

from helpers import QUICK, allowed_direction, called, directional_fd, enlarged, largest_array
from scdiffx import ops

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def curve_graph(n: int) -> ops.Graph:
    """Neighbours of points along an arc. All graphs of 120 cells run one compiled program."""
    rng = np.random.default_rng(0)
    t = np.sort(rng.uniform(size=n))
    points = np.c_[np.cos(3 * t), np.sin(3 * t), t] + 0.02 * rng.normal(size=(n, 3))
    z = jnp.asarray(points)
    return called(ops.Neighbors(n_neighbors=10).init(z), z).connectivities


def dense_transitions(weights: np.ndarray) -> np.ndarray:
    q = weights.sum(0)
    kernel = weights / np.outer(q, q)
    z = np.sqrt(kernel.sum(0))
    return kernel / np.outer(z, z)


def dense_distance(weights: np.ndarray, root: int, n_dcs: int) -> np.ndarray:
    values, vectors = np.linalg.eigh(dense_transitions(weights))
    values, vectors = values[::-1][:n_dcs], vectors[:, ::-1][:, :n_dcs]
    ratio = np.where(values < 0.9994, values / (1 - np.where(values < 0.9994, values, 0)), 1)
    return np.sqrt((((vectors - vectors[root]) * ratio) ** 2).sum(1))


def two_copies(graph: ops.Graph) -> ops.Graph:
    one = graph.to_scipy()
    return ops.Graph.from_scipy(sp.block_diag([one, one]).tocsr())


def test_transitions_equal_the_dense_formula() -> None:
    graph = curve_graph(120)
    found = ops.transitions(graph).to_scipy().toarray()
    np.testing.assert_allclose(found, dense_transitions(graph.to_scipy().toarray()), atol=1e-14)


@pytest.mark.parametrize("n", [120, 320], ids=["dense solver", "iterative solver"])
def test_map_equals_a_dense_decomposition(n: int) -> None:
    graph = curve_graph(n)
    result = called(ops.DiffusionMap(n_comps=6), graph)
    values, vectors = np.linalg.eigh(dense_transitions(graph.to_scipy().toarray()))
    assert bool(result.converged)
    np.testing.assert_allclose(result.eigenvalues, values[::-1][:6], atol=1e-10)
    overlap = np.abs((np.asarray(result.eigenvectors) * vectors[:, ::-1][:, :6]).sum(0))
    assert overlap.min() > 1 - 1e-8
    assert abs(float(result.eigenvalues[0]) - 1) < 1e-10


@pytest.mark.parametrize("n", [120, 320], ids=["dense solver", "iterative solver"])
def test_pseudotime_equals_its_dense_definition(n: int) -> None:
    graph = curve_graph(n)
    result = called(ops.Pseudotime(n_dcs=6, n_comps=8), graph, jnp.asarray(4))
    expected = dense_distance(graph.to_scipy().toarray(), 4, 6)
    np.testing.assert_allclose(result.distance, expected, atol=1e-7 * expected.max())
    np.testing.assert_allclose(result.pseudotime, expected / expected.max(), atol=1e-7)
    assert float(result.pseudotime[4]) == 0
    assert float(result.pseudotime.max()) == pytest.approx(1)


def test_pseudotime_follows_the_arc() -> None:
    time = np.asarray(called(ops.Pseudotime(n_dcs=6, n_comps=8), curve_graph(120), jnp.asarray(0)).pseudotime)
    assert np.corrcoef(np.argsort(np.argsort(time)), np.arange(120))[0, 1] > 0.98


def test_what_the_root_does_not_reach_is_infinite() -> None:
    graph = two_copies(curve_graph(60))
    time = np.asarray(called(ops.Pseudotime(n_dcs=6, n_comps=8), graph, jnp.asarray(70)).pseudotime)
    assert np.isinf(time[:60]).all()
    assert np.isfinite(time[60:]).all()
    assert time[70] == 0
    assert time[60:].max() == 1


def test_a_lonely_root() -> None:
    one = curve_graph(119).to_scipy()
    graph = ops.Graph.from_scipy(sp.block_diag([one, sp.csr_matrix((1, 1))]).tocsr())
    time = np.asarray(called(ops.Pseudotime(n_dcs=6, n_comps=8), graph, jnp.asarray(119)).pseudotime)
    assert time[119] == 0
    assert np.isinf(time[:119]).all()


@pytest.mark.parametrize("n", [70, 160], ids=["dense solver", "iterative solver"])
def test_derivatives_on_an_exactly_degenerate_spectrum(n: int) -> None:
    """Two equal components: every eigenvalue is double, where differentiated eigenvectors would be NaN."""
    graph = two_copies(curve_graph(n))
    op = ops.Pseudotime(n_dcs=6, n_comps=10)

    def spread(values: jax.Array) -> jax.Array:
        time = op(graph.with_values(values), jnp.asarray(3)).distance
        return (jnp.where(jnp.isfinite(time), time, 0) ** 2).sum()

    both = jax.jit(jax.value_and_grad(spread), compiler_options=QUICK)
    gradient = both(graph.values)[1]
    assert bool(jnp.isfinite(gradient).all())
    # The same change in both copies keeps the spectrum double.
    (step,) = allowed_direction(curve_graph(n))
    step = two_copies(curve_graph(n).with_values(step)).values
    exact = float((gradient * step).sum())
    numeric = directional_fd(lambda v: both(v)[0], graph.values, step, (1e-5, 1e-6))
    assert exact != 0
    np.testing.assert_allclose(numeric, exact, rtol=1e-4)


def test_a_start_changes_the_way_and_not_the_result() -> None:
    graph = curve_graph(320)
    op = ops.Pseudotime(n_dcs=6, n_comps=8)
    cold = called(op, graph, jnp.asarray(0))
    warm = called(op, graph, jnp.asarray(0), cold.eigenvectors)
    stale = called(op, graph, jnp.asarray(0), jnp.asarray(np.random.default_rng(0).normal(size=(320, 8))))
    for other in (warm, stale):
        np.testing.assert_allclose(other.pseudotime, cold.pseudotime, atol=1e-7)


def test_fewer_cells_than_components() -> None:
    graph = curve_graph(12)
    assert called(ops.DiffusionMap(), graph).eigenvectors.shape == (12, 11)
    assert bool(jnp.isfinite(called(ops.Pseudotime(), graph, jnp.asarray(0)).pseudotime).all())


@functools.cache
def weighed(w: float) -> tuple[ops.PseudotimeResult, np.ndarray, np.ndarray]:
    """Pseudotime where three cells have another weight than 1, and the graph of the others."""
    graph = curve_graph(120)
    gone = np.array([30, 31, 77])
    weights = np.ones(120)
    weights[gone] = w
    result = called(ops.Pseudotime(n_dcs=6, n_comps=8), graph, jnp.asarray(4), None, jnp.asarray(weights))
    keep = np.setdiff1d(np.arange(120), gone)
    return result, keep, graph.to_scipy().toarray()[np.ix_(keep, keep)]


@pytest.mark.parametrize(("w", "far"), [(0.0, 1e-8), (1e-7, 1e-8), (1e-5, 1e-5)])
def test_without_weight_cells_are_as_if_they_were_not_there(w: float, far: float) -> None:
    result, keep, others = weighed(w)
    expected = dense_distance(others, 4, 6)
    np.testing.assert_allclose(np.asarray(result.distance)[keep], expected, atol=far * expected.max())
    vectors = np.linalg.eigh(dense_transitions(others))[1][:, ::-1][:, :6]
    overlap = np.abs((np.asarray(result.eigenvectors)[keep, :6] * vectors).sum(0))
    assert overlap.min() > 1 - far
    own = np.delete(np.asarray(result.pseudotime), keep)
    assert np.isinf(own).all() if w < 1e-6 else np.isfinite(own).all()
    # Not so by weights of edges alone, which densities cancel.
    scaled = np.ones(120)
    scaled[[30, 31, 77]] = 0.5
    edges = curve_graph(120).to_scipy().toarray() * np.outer(scaled, scaled)
    halved = dense_distance(edges, 4, 6)
    assert np.abs(halved / halved.max() - result.pseudotime)[keep].max() > 1e-3


def test_a_whole_weight_is_a_number_of_cells() -> None:
    """Weight 2 is the cell twice; a cell's own weight does not move its own pseudotime but by way of the others."""
    graph = curve_graph(120).to_scipy().toarray()
    twice = np.r_[np.arange(120), 77]
    weights = np.ones(120)
    weights[77] = 2
    found = called(ops.Pseudotime(n_dcs=6, n_comps=8), curve_graph(120), jnp.asarray(4), None, jnp.asarray(weights))
    expected = dense_distance(graph[np.ix_(twice, twice)], 4, 6)
    np.testing.assert_allclose(found.distance, expected[:120], atol=1e-7 * expected.max())


@pytest.mark.slow
def test_derivatives_of_components_in_weights() -> None:
    graph = curve_graph(120)
    rng = np.random.default_rng(0)
    weights, side, step = rng.uniform(0.3, 1.5, 120), rng.normal(size=120), rng.normal(size=120)

    def moved(w: jax.Array) -> jax.Array:
        result = ops.DiffusionMap(n_comps=6)(graph, None, w)
        return (result.eigenvectors[:, 1:4] ** 2 * side[:, None]).sum() + result.eigenvalues[1]

    both = jax.jit(jax.value_and_grad(moved), compiler_options=QUICK)
    exact = float((both(jnp.asarray(weights))[1] * step).sum())
    numeric = directional_fd(lambda w: both(w)[0], jnp.asarray(weights), jnp.asarray(step), (1e-5, 1e-6))
    np.testing.assert_allclose(numeric, exact, rtol=1e-5)


@pytest.mark.slow
def test_derivatives_in_weights_take_memory_linear_in_the_cells() -> None:
    def slopes(graph: ops.Graph, weights: jax.Array) -> jax.Array:
        return jax.grad(lambda w: ops.Pseudotime(n_dcs=6, n_comps=8)(graph, 4, None, w).pseudotime.sum())(weights)

    args = (curve_graph(120), jnp.ones(120))
    few, many = (largest_array(slopes, *enlarged(args, {120: n})) for n in (25_000, 50_000))
    assert many < 2.5 * few
    assert many < 200 * 50_000
