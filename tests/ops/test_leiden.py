"""Leiden partitions; agreement with scanpy is in test_parity."""

from __future__ import annotations

import random

import igraph
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

from scdiffx import ops
from scdiffx._core.fields import replace
from scdiffx._log import settings
from scdiffx.ops._leiden import _rounded


@pytest.fixture(scope="module")
def graph() -> ops.Graph:
    """Three blocks of 60, 40 and 20 nodes with few weak edges between them."""
    rng = np.random.default_rng(0)
    block = np.repeat([1, 0, 2], [40, 60, 20])
    within = (block[:, None] == block) & (rng.random((120, 120)) < 0.4)
    between = rng.random((120, 120)) < 0.01
    upper = np.triu(np.where(within, 1.0, 0.2 * between), 1)
    return ops.Graph.from_scipy(sp.csr_matrix(upper + upper.T))


def modularity(graph: ops.Graph, membership: np.ndarray, resolution: float = 1.0) -> float:
    a = graph.to_scipy().toarray()
    degree = a.sum(1)
    same = membership[:, None] == membership
    return float(((a - resolution * np.outer(degree, degree) / a.sum()) * same).sum() / a.sum())


def test_blocks_are_found_and_numbered_by_size(graph: ops.Graph) -> None:
    result = ops.Leiden().init(graph)(graph)
    np.testing.assert_array_equal(result.membership, np.repeat([1, 0, 2], [40, 60, 20]))
    assert float(result.modularity) == pytest.approx(modularity(graph, np.asarray(result.membership)), abs=1e-6)


def test_settings_have_an_effect(graph: ops.Graph) -> None:
    assert int(ops.Leiden(resolution=5.0).init(graph).membership.max()) > 2
    assert int(ops.Leiden(resolution=0.0).init(graph).membership.max()) == 0
    weighed, plain = (ops.Leiden(use_weights=w).init(graph) for w in (True, False))
    assert float(weighed.modularity) > float(plain.modularity)


def test_the_seed_decides_and_global_generators_are_left_alone(graph: ops.Graph) -> None:
    rng = np.random.default_rng(1)
    noise = sp.random(150, 150, 0.05, random_state=rng)
    unclear = ops.Graph.from_scipy((noise + noise.T).tocsr())
    python, legacy = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    found = [np.asarray(ops.Leiden(seed=s, n_iterations=1).init(unclear).membership) for s in (0, 0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()
    assert random.getstate() == python
    np.testing.assert_array_equal(legacy, np.random.get_state()[1])  # noqa: NPY002


def test_no_derivative_passes_through_the_partition(graph: ops.Graph) -> None:
    op = ops.Leiden().init(graph)
    values = graph.values.astype(jnp.float32)
    gradient = jax.grad(lambda v: op(graph.with_values(v)).modularity)(values)
    assert gradient.shape == values.shape
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize("resolution", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("use_weights", [True, False])
def test_the_largest_membership_is_that_of_the_cells_community(pbmc68k_reduced, resolution, use_weights) -> None:
    real = ops.Graph.from_scipy(pbmc68k_reduced.obsp["connectivities"])
    op = ops.Leiden(resolution=resolution, use_weights=use_weights).init(real)
    p = np.asarray(op(real).probabilities)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    # Before 1.0 igraph leaves a few cells where a move would improve the partition.
    kept = (p.argmax(1) == np.asarray(op.membership)).mean()
    assert kept == 1 if int(igraph.__version__.split(".")[0]) >= 1 else kept > 0.97
    assert 0.5 < p.max(1).mean() < 0.999
    sharp = np.asarray(replace(op, temperature=1e-5)(real).probabilities)
    assert (np.abs(sharp - np.eye(p.shape[1])[p.argmax(1)]) < 1e-3).mean() > 0.99


def test_memberships_are_what_a_move_would_add_to_the_modularity(graph: ops.Graph) -> None:
    op = ops.Leiden(temperature=0.3, resolution=0.8).init(graph)
    found, membership = np.log(np.asarray(op(graph).probabilities)), np.asarray(op.membership)
    a = graph.to_scipy()
    for cell in (0, 50, 110):
        moved = [np.where(np.arange(120) == cell, k, membership) for k in range(3)]
        quality = np.asarray([modularity(graph, m, 0.8) for m in moved])
        # A move changes both directions of an edge, and the modularity is relative to all weights.
        gains = quality * a.sum() / (2 * a[cell].sum()) / 0.3
        np.testing.assert_allclose(found[cell] - found[cell, 0], gains - gains[0], atol=1e-4)


def test_too_many_communities_have_no_memberships() -> None:
    alone = ops.Graph.from_scipy(sp.csr_matrix((1_200, 1_200)))
    result = ops.Leiden().init(alone)(alone)
    assert result.probabilities is None
    assert int(result.membership.max()) == 1_199
    few = ops.Graph.from_scipy(sp.csr_matrix((5, 5)))
    np.testing.assert_array_equal(np.asarray(ops.Leiden().init(few)(few).probabilities).argmax(1), np.arange(5) * 0)


def test_a_partition_is_needed_first(graph: ops.Graph) -> None:
    with pytest.raises(ValueError, match="init"):
        ops.Leiden()(graph)


def _torus(side: int = 25) -> ops.Graph:
    """A torus whose edges have few different weights: many moves of a cell are equally good."""
    rng, cell = np.random.default_rng(0), np.arange(side * side).reshape(side, side)
    there = np.concatenate([np.roll(cell, 1, axis).ravel() for axis in (0, 1)])
    upper = sp.coo_matrix((rng.choice([1, 0.5, 1 / 3], len(there)), (np.tile(cell.ravel(), 2), there)))
    return ops.Graph.from_scipy((upper + upper.T).tocsr())


def _shaken(graph: ops.Graph, size: float, seed: int) -> ops.Graph:
    """The graph with relative noise on its weights, the same in both directions."""
    upper = sp.triu(graph.to_scipy().astype(np.float64)).tocoo()
    upper.data *= 1 + size * np.random.default_rng(seed).standard_normal(upper.nnz)
    return ops.Graph.from_scipy((upper + upper.T).tocsr(), np.float64)


def test_deterministic_partitions_outlast_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = [_shaken(_torus(), size, seed) for seed, size in enumerate((0, 1e-7, 1e-7, 1e-6, 1e-6, 1e-6))]

    def partitions() -> np.ndarray:
        with jax.enable_x64(True):
            return np.stack([np.asarray(ops.Leiden().init(g).membership) for g in graphs])

    plain = partitions()
    assert (plain != plain[0]).any()  # or else there is nothing to outlast
    monkeypatch.setattr(settings, "deterministic", True)
    rounded = partitions()
    np.testing.assert_array_equal(rounded, np.broadcast_to(rounded[0], rounded.shape))
    monkeypatch.setattr(settings, "deterministic", False)
    np.testing.assert_array_equal(partitions(), plain)


def test_deterministic_takes_true_or_false() -> None:
    with pytest.raises(ValueError, match="deterministic='yes' must be True or False"):
        settings.deterministic = "yes"
    assert settings.deterministic is False


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_deterministic_does_not_depend_on_the_unit_of_the_weights(scale: float) -> None:
    weights = np.array([1.0, 0.5, 1 / 3, 1e-5]) * scale
    whole = _rounded(weights)
    np.testing.assert_array_equal(whole, np.round(whole))
    np.testing.assert_allclose(whole / whole[0], weights / scale, atol=2**-11)
    assert 2**11 < whole[0] < 2**13
