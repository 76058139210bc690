"""Leiden partitions; agreement with scanpy is in test_parity."""

from __future__ import annotations

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

from scdiffx import ops


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


def test_no_derivative_passes_and_none_is_invented(graph: ops.Graph) -> None:
    op = ops.Leiden().init(graph)
    values = graph.values.astype(jnp.float32)
    gradient = jax.grad(lambda v: op(graph.with_values(v)).modularity)(values)
    assert gradient.shape == values.shape
    assert not np.asarray(gradient).any()


def test_a_partition_is_needed_first(graph: ops.Graph) -> None:
    with pytest.raises(ValueError, match="init"):
        ops.Leiden()(graph)
