"""Graph attention against the dense formula, and its derivatives against finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from jax.test_util import check_grads

from scdiffx._core.graph import Graph, Pattern, columns_to_slots, rows_to_slots
from scdiffx.ops._gat import attend, initial_attention

N, FEATURES, HEADS, DIMS = 60, 5, 2, 3


@pytest.fixture
def case(x64):
    rng = np.random.default_rng(0)
    dense = np.triu(rng.random((N, N)) < 0.08, 1)
    dense[0, 1:40] = True  # a cell with overflow rows
    dense[:, -1] = False  # and one without neighbours
    dense = dense | dense.T
    graph = Graph.from_scipy(sp.csr_matrix(dense.astype(float)))
    assert len(graph.pattern.owner) > 0
    x, place = jnp.asarray(rng.normal(size=(N, FEATURES))), jnp.asarray(rng.normal(size=N))
    net = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), initial_attention(FEATURES, HEADS, DIMS, rng, 1))
    net["attend"] = 10 * net["attend"]
    p = graph.pattern
    edges = (columns_to_slots(p, place) - rows_to_slots(p, place))[..., None]
    return dense, Pattern(*map(jnp.asarray, p)), x, np.asarray(place), edges, net


def test_weights_and_values_equal_the_dense_formula(case):
    dense, p, x, place, edges, net = case
    found = attend(net, p, x, edges)
    receive, send = (np.asarray(x @ net[name]).reshape(N, HEADS, DIMS) for name in ("receive", "send"))
    via = (place[None, :] - place[:, None])[..., None, None] * np.asarray(net["via"]).reshape(HEADS, DIMS)
    joint = receive[:, None] + send[None] + via
    score = (np.where(joint > 0, joint, 0.2 * joint) * np.asarray(net["attend"])).sum(-1)
    score = np.where((dense | np.eye(N, dtype=bool))[..., None], score, -np.inf)
    weight = np.exp(score - score.max(1, keepdims=True))
    weight = weight / weight.sum(1, keepdims=True)
    np.testing.assert_allclose(found.value, np.einsum("ijh,jhd->ihd", weight, send), atol=1e-12)
    np.testing.assert_allclose(found.own, weight[np.arange(N), np.arange(N)], atol=1e-12)
    for head in range(HEADS):
        off = Graph(p, found.weights[..., head]).to_scipy().toarray()
        np.testing.assert_allclose(off, weight[..., head] * dense, atol=1e-12)


def test_edges_can_be_left_out_and_a_lonely_cell_receives_itself(case):
    _, p, x, _, edges, net = case
    lonely = attend(net, p, x, edges, jnp.zeros(p.valid.shape, bool))
    np.testing.assert_allclose(lonely.own, 1)
    np.testing.assert_allclose(lonely.value, (x @ net["send"]).reshape(N, HEADS, DIMS), atol=1e-12)
    np.testing.assert_allclose(attend(net, p, x, edges).own[-1], 1)


def test_derivatives(case):
    _, p, x, _, edges, net = case
    check_grads(
        lambda x, e, net: attend(net, p, x, e).value,
        (x, edges, net),
        order=1,
        modes=["rev"],
        eps=1e-7,
        atol=1e-5,
        rtol=1e-5,
    )
    check_grads(
        lambda x: attend(net, p, x, edges).weights, (x,), order=1, modes=["rev"], eps=1e-7, atol=1e-5, rtol=1e-5
    )
