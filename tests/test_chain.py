"""The derivative of the whole chain, from counts to pseudotime, and what it does on degenerate data."""

from __future__ import annotations

from typing import Any, NamedTuple

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

from helpers import QUICK, allowed_direction, directional_fd, pbmc_counts, tree_vdot
from scdiffx import ops
from scdiffx._core.fields import learnables, replace

CELLS, GENES = 300, 300


class Chain(NamedTuple):
    """Normalise, take logarithms, weigh the genes, project, find neighbours, order the cells from the first."""

    normalize: Any
    variable: Any
    pca: Any
    neighbors: Any
    pseudotime: Any

    def __call__(self, counts: Any) -> jax.Array:
        log = ops.Log1p()(self.normalize(counts).x)
        weight = self.variable(log).weight
        scores = self.pca(log, weight).scores
        graph = self.neighbors(scores).connectivities
        return self.pseudotime(graph, jnp.asarray(0)).pseudotime

    @classmethod
    def prepared(cls, counts: Any, anchored: bool, n_comps: int = 10, like: Any = None) -> Chain:
        normalize = ops.NormalizeTotal().init(counts)
        log = ops.Log1p()(normalize(counts).x)
        variable = ops.HighlyVariable(n_top_genes=100).init(log)
        weight = variable(log).weight
        pca = ops.PCA(n_comps=n_comps, anchored=anchored).init(log, weight)
        neighbors = ops.Neighbors(n_neighbors=15) if like is None else like
        neighbors = neighbors.init(pca(log, weight).scores)
        return cls(normalize, variable, pca, neighbors, ops.Pseudotime(n_dcs=8, n_comps=10))

    def parameters(self) -> dict[str, jax.Array]:
        return {
            f"{step}.{name}": jnp.asarray(getattr(op, name))
            for step, op in self._asdict().items()
            for name in learnables(op)
        }

    def with_parameters(self, parameters: dict[str, jax.Array]) -> Chain:
        ops_ = self._asdict()
        for name, value in parameters.items():
            step, field = name.split(".")
            ops_[step] = replace(ops_[step], **{field: value})
        return Chain(**ops_)


def loss(parameters: dict[str, jax.Array], x: Any, chain: Chain) -> tuple[jax.Array, jax.Array]:
    """One minus the correlation of the pseudotime with an uneven target, over the cells that the root reaches; both."""
    time = chain.with_parameters(parameters)(x)
    kept = jnp.isfinite(time)
    n = jnp.maximum(kept.sum(), 1)
    a, b = (jnp.where(kept, v, 0) for v in (time, jnp.sin(jnp.arange(len(time)) * 0.1)))
    a, b = (jnp.where(kept, v - v.sum() / n, 0) for v in (a, b))
    return 1 - (a * b).sum() / jnp.sqrt((a**2).sum() * (b**2).sum() + 1e-12), time


# `allow_int`: the positions in a count matrix are whole numbers.
value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True), compiler_options=QUICK)


@pytest.fixture
def counts(_paul15: ad.AnnData) -> sp.csr_matrix:
    cells = np.random.default_rng(0).permutation(_paul15.n_obs)[:CELLS]
    part = _paul15.X[np.sort(cells)]
    frequent = np.argsort(-np.asarray((part > 0).sum(0)).ravel(), kind="stable")[: 3 * GENES : 3]
    return part[:, np.sort(frequent)].astype(np.float64)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_chain_derivative_matches_finite_differences(counts: sp.csr_matrix) -> None:
    x = ops.Counts.from_scipy(counts)
    chain = Chain.prepared(x, anchored=True)
    parameters = chain.parameters()
    expected = {"normalize.target_sum", "variable.temperature", "variable.shift", "neighbors.bandwidth"}
    assert set(parameters) == expected | {"pca.shift", "pca.scale"}
    by_parameter, by_count = value_and_grad(parameters, x, chain)[1]
    (step,) = allowed_direction(x)
    trials = {"counts": (lambda v: (parameters, x.with_data(v)), x.data, step, by_count.data)}
    for name, value in parameters.items():
        step = jnp.asarray(np.random.default_rng(3).standard_normal(value.shape))
        trials[name] = (lambda v, name=name: (parameters | {name: v}, x), value, step, by_parameter[name])
    for name, (put, at, step, gradient) in trials.items():
        exact = tree_vdot(gradient, step)
        assert exact != 0, name
        size = float(jnp.sqrt(jnp.mean(at**2))) or 1.0
        steps = np.array([1e-5, 1e-6]) * size
        # The program of the derivative gives values too: one of its own for them takes longer to compile than it saves.
        numeric = directional_fd(lambda v, put=put: value_and_grad(*put(v), chain)[0][0], at, step, steps)
        np.testing.assert_allclose(numeric, exact, rtol=1e-3, err_msg=name)


def far_apart(x: np.ndarray) -> np.ndarray:
    """The cells, and the same cells with other genes expressed as strongly: two parts that no edge joins."""
    half = x[: len(x) // 2, : x.shape[1] // 2]
    empty = np.zeros_like(half)
    return np.block([[half, empty], [empty, half]])


def emptied(x: np.ndarray, axis: int) -> np.ndarray:
    """Every third gene or cell without a count."""
    empty = np.arange(x.shape[axis]) % 3 == 1
    return np.where(empty if axis else empty[:, None], 0, x)


# Each keeps the shape of the matrix, so that all run the same compiled program.
DEGENERATE = {
    "nothing special": lambda x: x,
    "two disconnected copies": far_apart,
    "each cell five times": lambda x: np.repeat(x[: len(x) // 5], 5, axis=0),
    "ten cells over and over": lambda x: np.tile(x[:10], (len(x) // 10, 1)),
    "empty genes": lambda x: emptied(x, 1),
    "empty cells": lambda x: emptied(x, 0),
    "constant genes": lambda x: np.where(np.arange(x.shape[1]) % 4 == 0, 2, x),
    "all of it": lambda x: emptied(emptied(far_apart(np.repeat(x[::2], 2, axis=0)), 0), 1),
}


TRIALS = [pytest.param(kind, a, 150, id=f"{kind}-{a}-150") for kind in DEGENERATE for a in (True, False)]
# With 400 cells, eigenvectors are found by iterations.
TRIALS += [
    pytest.param(kind, False, 400, marks=pytest.mark.slow, id=f"{kind}-False-400")
    for kind in ("two disconnected copies", "each cell five times", "all of it")
]


@pytest.mark.parametrize(("kind", "anchored", "cells"), TRIALS)
def test_derivative_is_finite_on_degenerate_data(kind: str, anchored: bool, cells: int) -> None:
    """In float32, as users run it."""
    usual = jnp.asarray(pbmc_counts(cells, 120).X.toarray())
    x = jnp.asarray(DEGENERATE[kind](np.asarray(usual)), jnp.float32)
    like = Chain.prepared(usual, anchored, n_comps=6).neighbors
    chain = Chain.prepared(x, anchored, n_comps=6, like=like)
    (value, time), (by_parameter, by_count) = value_and_grad(chain.parameters(), x, chain)
    assert np.isfinite(float(value))
    for name, gradient in {**by_parameter, "counts": by_count}.items():
        assert bool(jnp.isfinite(gradient).all()), name
    # Cells whose neighbours all are copies of them keep their weights of 1 wherever they move.
    assert kind == "ten cells over and over" or float(jnp.abs(by_count).max()) > 0
    time = np.asarray(time)
    assert not np.isnan(time).any()
    if kind == "two disconnected copies":
        assert np.isfinite(time[: cells // 2]).mean() > 0.9
        assert np.isinf(time[cells // 2 :]).all()
