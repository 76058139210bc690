"""Transition matrices against scVelo and dense formulas, and the fates that follow from them; see test_contract too."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

import scdiffx as sd
from helpers import QUICK, called, directional_fd, random_direction, tree_vdot
from scdiffx import ops
from scdiffx._core.fields import replace
from scdiffx._program import Program
from scdiffx._slots import Obsm, X

SCVELO = Path(__file__).parent / "transitions_scvelo.npz"


def recorded(name: str) -> sp.csr_matrix:
    with np.load(SCVELO) as stored:
        data, indices, indptr = (stored[f"{name}_{part}"] for part in ("data", "indices", "indptr"))
    return sp.csr_matrix((data, indices.astype(np.int32), indptr.astype(np.int32)), shape=(len(indptr) - 1,) * 2)


@pytest.mark.parametrize(("name", "settings"), [("default", {}), ("plain", {"self_transitions": False, "scale": 4})])
def test_equals_scvelo(name: str, settings: dict[str, Any]) -> None:
    expected = recorded(name)
    adata = ad.AnnData(np.zeros((expected.shape[0], 1), np.float32))
    for key in ("velocity_graph", "velocity_graph_neg"):
        adata.uns[key] = recorded(key)
    sd.tl.transition_matrix(adata, **settings)
    found = adata.obsp["velocity_transitions"]
    assert abs(found - expected).max() < 1e-5
    assert found.nnz == expected.nnz
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


def two_kinds() -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Cosines of six cells, one of which (4) has none, and weights, where another (5) has none."""
    cosines = np.zeros((6, 6))
    cosines[[0, 0, 1, 2, 2, 3, 5], [1, 2, 2, 0, 5, 2, 1]] = 0.9, -0.3, 0.4, -0.8, 0.7, 0.95, -0.2
    weights = np.zeros((6, 6))
    weights[[0, 0, 1, 2, 3], [1, 4, 2, 3, 4]] = 0.5, 0.25, 1.0, 0.1, 0.7
    return sp.csr_matrix(cosines), sp.csr_matrix(weights + weights.T)


def by_hand(cosines: np.ndarray, weights: np.ndarray, scale: float, share: float, stay: bool) -> np.ndarray:
    t = np.where(cosines != 0, np.exp(scale * cosines), 0)
    if stay:
        best = np.maximum(cosines.max(1), 0)
        own = np.clip(np.percentile(best, 98) - best, 0, 1)
        t += np.diag(np.where(own > 0, np.exp(scale * own), 0))
    mixed = np.zeros_like(t)
    for i in range(len(t)):
        parts = [(1 - share, t[i]), (share, weights[i])]
        there = [(w, row / row.sum()) for w, row in parts if row.sum() > 0]
        total = sum(w for w, _ in there)
        mixed[i] = sum((w * row for w, row in there), np.zeros(len(t))) / (total or 1)
    return mixed


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("stay", [True, False])
def test_the_mixture_by_its_definition(stay: bool) -> None:
    cosines, weights = two_kinds()
    args = ops.Directed.from_scipy(cosines), ops.Graph.from_scipy(weights)
    op = ops.TransitionMatrix(scale=3.0, weight_connectivities=0.2, self_transitions=stay).init(*args)
    found = called(op, *args).to_scipy().toarray()
    np.testing.assert_allclose(found, by_hand(cosines.toarray(), weights.toarray(), 3, 0.2, stay), atol=1e-14)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-14)
    alone = ops.TransitionMatrix(scale=3.0, self_transitions=stay).init(args[0])
    nothing = by_hand(cosines.toarray(), np.zeros((6, 6)), 3, 0, stay)
    np.testing.assert_allclose(called(alone, args[0]).to_scipy().toarray(), nothing, atol=1e-14)
    # Cell 4 points nowhere: it stays, or has no edge at all.
    assert nothing[4].tolist() == [0, 0, 0, 0, float(stay), 0]


def test_what_is_missing_is_named() -> None:
    cosines, weights = (ops.Directed.from_scipy(two_kinds()[0]), ops.Graph.from_scipy(two_kinds()[1]))
    with pytest.raises(ValueError, match=r"op.init\(cosines, connectivities\)"):
        ops.TransitionMatrix()(cosines)
    mixing = ops.TransitionMatrix(weight_connectivities=0.2)
    with pytest.raises(ValueError, match=r"weight_connectivities=0.2 needs the connectivities"):
        mixing.init(cosines)
    with pytest.raises(ValueError, match="pass them"):
        mixing.init(cosines, weights)(cosines)


def two_arms(n: int = 100, forward: float = 1.0) -> ad.AnnData:
    """Cells along a stem and two arms in six dimensions, with velocities along them, or back for -1."""
    rng = np.random.default_rng(0)
    time = np.sort(rng.uniform(0, 1, size=n))
    arm = np.where(time < 0.4, 0, np.where(np.arange(n) % 2, 1, -1))
    axes = np.linalg.qr(rng.normal(size=(6, 6)) - 1 / 6)[0][:2]
    x = np.c_[time, arm * np.maximum(time - 0.4, 0)] @ axes + 0.03 * rng.normal(size=(n, 6))
    v = forward * np.c_[np.ones(n), arm] @ axes + 0.1 * rng.normal(size=(n, 6))
    adata = ad.AnnData(x, layers={"Ms": x, "velocity": v}, obsm={"X_pca": x})
    adata.obs["arm"] = np.array(["down", "stem", "up"])[arm + 1]
    sd.pp.neighbors(adata, n_neighbors=8, use_rep="X_pca")
    return adata


def ends(adata: ad.AnnData) -> dict[str, list[str]]:
    last = {arm: adata.obs_names[adata.obs["arm"] == arm][-6:].tolist() for arm in ("up", "down")}
    return last | {"start": adata.obs_names[:6].tolist()}


def directed(target: Any, states: Any, **settings: Any) -> None:
    """The calls from velocities to fates, on an AnnData or a plan."""
    sd.tl.velocity_graph(target, n_neighbors=6)
    sd.tl.transition_matrix(target, **settings)
    sd.tl.fate_probabilities(target, states, "arm", transition_key="velocity_transitions")


def solved_directly(adata: ad.AnnData) -> np.ndarray:
    terminal = adata.obs["term_states_fwd"].cat.codes.to_numpy()
    dense, inside = adata.obsp["velocity_transitions"].toarray().astype(np.float64), terminal < 0
    dense /= dense.sum(1, keepdims=True)
    found = np.eye(terminal.max() + 1)[terminal]
    into = dense[inside] @ np.where(inside[:, None], 0, found)
    found[inside] = np.linalg.solve(np.eye(inside.sum()) - dense[inside][:, inside], into)
    return found


@pytest.mark.slow
def test_walks_end_where_velocities_lead() -> None:
    shares = {}
    for forward in (1.0, -1.0):
        adata = two_arms(forward=forward)
        directed(adata, ends(adata), weight_connectivities=0.2)
        found = adata.obsm["lineages_fwd"]
        np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
        np.testing.assert_allclose(found, solved_directly(adata), atol=1e-7)
        shares[forward] = found[20:80].mean(0)
    assert shares[1.0][2] < 0.05
    assert shares[-1.0][2] > 0.95
    # Walks that stay for tens of thousands of steps come to the same ends.
    directed(adata, ends(adata))
    assert adata.obsp["velocity_transitions"].diagonal().max() > 1 - 1e-4
    slow = adata.obsm["lineages_fwd"].copy()
    np.testing.assert_allclose(slow.sum(1), 1, atol=1e-12)
    directed(adata, ends(adata), self_transitions=False)
    np.testing.assert_allclose(adata.obsm["lineages_fwd"], slow, atol=1e-6)


@pytest.mark.slow
def test_states_that_are_looked_for() -> None:
    adata = two_arms()
    directed(adata, None, weight_connectivities=0.2)
    assert set(adata.uns["fate"]["names"]) == {"up", "down"}
    back = two_arms(forward=-1.0)
    directed(back, None, weight_connectivities=0.2)
    assert list(back.uns["fate"]["names"]) == ["stem"]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_in_a_plan_derivatives_reach_layers_and_settings() -> None:
    adata = two_arms()
    plan = sd.plan(adata)
    directed(plan, ends(adata), scale=4.0, weight_connectivities=0.2)
    program, _ = Program.between(plan, X("velocity"), Obsm("lineages_fwd"))
    at = next(i for i, step in enumerate(plan.steps) if step.name == "transition_matrix")

    @functools.partial(jax.jit, compiler_options=QUICK)
    @jax.value_and_grad
    def value(moved: dict[str, Any]) -> Any:
        used = list(program.ops)
        used[at] = replace(used[at], scale=moved["scale"], weight_connectivities=moved["weight"])
        frozen = program.frozen | {X("velocity"): moved["velocity"], X("Ms"): moved["Ms"]}
        fates = program.evaluate(used, frozen)[Obsm("lineages_fwd")]
        return (fates * jnp.sin(jnp.arange(fates.size)).reshape(fates.shape)).sum()

    start: dict[str, Any] = {layer: jnp.asarray(adata.layers[layer]) for layer in ("velocity", "Ms")}
    start |= {"scale": jnp.asarray(4.0), "weight": jnp.asarray(0.2)}
    gradient = value(start)[1]
    for name, x in start.items():
        step = random_direction(x, seed=1)
        numeric = directional_fd(lambda v, name=name: value(start | {name: v})[0], x, step, steps=(1e-3, 1e-4))
        exact = tree_vdot(gradient[name], step)
        assert abs(exact) > 1e-3
        # The solver's error spoils a small step, a kink in the cosines a large one.
        assert np.abs(numeric / exact - 1).min() < 1e-4, name


@pytest.mark.slow
def test_a_plan_does_what_the_calls_do_and_a_fit_moves_scale_and_share() -> None:
    adata, called_now = two_arms(), two_arms()
    plan = sd.plan(adata)
    for target in (plan, called_now):
        directed(target, ends(adata), scale=4.0, weight_connectivities=0.2)
    applied = plan.apply(copy=True)
    assert abs(applied.obsp["velocity_transitions"] - called_now.obsp["velocity_transitions"]).max() < 1e-6
    np.testing.assert_allclose(applied.obsm["lineages_fwd"], called_now.obsm["lineages_fwd"], atol=1e-4)
    adata.obs["place"] = np.linspace(0, 1, adata.n_obs)
    fitted = sd.fit(plan, sd.losses.correlation("priming_degree_fwd", "place"), n_steps=3, progress=False)
    assert set(fitted.params) == {"transition_matrix.scale", "transition_matrix.weight_connectivities"}
    assert fitted.losses["train_after"] < fitted.losses["train_before"]
    assert abs(float(fitted.params["transition_matrix.scale"]) - 4) > 1e-3
    fitted.apply()
    np.testing.assert_allclose(adata.obsp["velocity_transitions"].sum(1), 1, atol=1e-6)
