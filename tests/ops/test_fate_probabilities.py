"""Fates against CellRank, direct solution and closed forms; broken chains; states that are found; known fates."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.sparse.linalg import spsolve

import scdiffx as sd
from helpers import QUICK, called, directional_fd
from scdiffx import ops

STATES = ["CD14+ Monocyte", "CD19+ B", "CD56+ NK"]
# CellRank 2.3.3 (scanpy 1.12.4, gmres with tol=1e-12) on the input of `blood`, cells 5, 116, ..., 671: probabilities,
# their sums and sums of squares over all cells, and the priming degree by entropy.
CELLRANK = {
    "soft": (
        [
            [0.0, 1.0, 0.0],
            [0.517407809, 0.090622565, 0.391969626],
            [0.820962268, 0.037161173, 0.141876559],
            [0.0, 1.0, 0.0],
            [0.016033533, 0.280943247, 0.70302322],
            [0.992407342, 0.000297251, 0.007295407],
            [0.0, 1.0, 0.0],
        ],
        [271.4103292345613, 148.38636881803606, 280.2033019439764],
        [233.4597560904346, 109.13872298749118, 217.02319845163103],
        [1.0, 0.054935782, 0.426846282, 1.0, 0.315243094, 0.95316195, 1.0],
    ),
    "hard": (
        [
            [0.0, 1.0, 0.0],
            [0.682026641, 0.073836579, 0.24413678],
            [0.866794755, 0.032089738, 0.101115508],
            [0.0, 1.0, 0.0],
            [0.032506745, 0.324999892, 0.642493364],
            [0.997585705, 0.000108905, 0.00230539],
            [0.0, 1.0, 0.0],
        ],
        [292.5856724224664, 157.61055416465032, 249.80377341425944],
        [259.65870921219505, 113.0067193530437, 187.20183964220746],
        [1.0, 0.176102454, 0.518688041, 1.0, 0.214070866, 0.982022706, 1.0],
    ),
}


@pytest.fixture
def blood(pbmc68k_reduced: ad.AnnData) -> ad.AnnData:
    first = pbmc68k_reduced.obsm["X_pca"][:, 0].astype(float)
    pbmc68k_reduced.obs["late"] = (first - first.min()) / np.ptp(first)
    # Of equal weights CellRank keeps any: make them differ.
    weights = pbmc68k_reduced.obsp["connectivities"].astype(float).tocoo()
    weights.data *= 1 + 1e-5 * np.sin(weights.row + weights.col)
    pbmc68k_reduced.obsp["connectivities"] = weights.tocsr()
    return pbmc68k_reduced


def weights_and_time(adata: ad.AnnData) -> tuple[sp.csr_matrix, np.ndarray]:
    return adata.obsp["connectivities"].astype(float).tocsr(), adata.obs["late"].to_numpy()


def soft_by_hand(weights: sp.csr_matrix, time: np.ndarray, b: float, nu: float) -> np.ndarray:
    found = weights.toarray()
    for i, j in zip(*found.nonzero(), strict=True):
        if time[j] < time[i]:
            found[i, j] *= 2.0 / (1.0 + np.exp(b * (time[i] - time[j]))) ** (1.0 / nu)
    return found / found.sum(1, keepdims=True)


def hard_by_hand(weights: sp.csr_matrix, time: np.ndarray, fraction: float) -> np.ndarray:
    found = np.zeros(weights.shape)
    for i in range(len(time)):
        row = weights[[i]]
        order = np.flip(np.argsort(row.data, kind="stable"))
        kept = min(30, int(np.floor(len(order) * fraction)))
        for rank, at in enumerate(order):
            j = row.indices[at]
            if rank < kept or time[i] <= time[j]:
                found[i, j] = row.data[at]
    return found / found.sum(1, keepdims=True)


def solved_directly(transitions: np.ndarray, terminal: np.ndarray) -> np.ndarray:
    inside, n_fates = terminal < 0, terminal.max() + 1
    ends = np.stack([transitions[inside][:, terminal == i].sum(1) for i in range(n_fates)], 1)
    found = np.eye(n_fates)[terminal]
    system = sp.csc_matrix(np.eye(inside.sum()) - transitions[inside][:, inside])
    found[inside] = spsolve(system, ends).reshape(ends.shape)
    return found


def line(n: int, up: float, terminal: dict[int, int]) -> tuple[ops.Graph, jax.Array]:
    """A walk on a line that goes up with a chance of `up`, and is stopped at the cells of `terminal`."""
    steps = sp.diags([np.r_[np.full(n - 2, 1 - up), 1.0], np.r_[1.0, np.full(n - 2, up)]], [-1, 1])
    labels = np.full(n, -1)
    labels[list(terminal)] = list(terminal.values())
    return ops.Graph.from_scipy(sp.csr_matrix(steps)), jnp.asarray(labels, jnp.int32)


def fates_of(graph: ops.Graph, terminal: jax.Array) -> ops.FateProbabilitiesResult:
    op = ops.FateProbabilities(scheme=None).init(graph, terminal)
    return called(op, graph, terminal)


def assert_is_cellranks(scheme: str, probabilities: np.ndarray, priming: np.ndarray) -> None:
    rows, sums, squares, degree = CELLRANK[scheme]
    np.testing.assert_allclose(probabilities[5::111], rows, atol=1e-6)
    np.testing.assert_allclose(probabilities.sum(0), sums, rtol=1e-7)
    np.testing.assert_allclose((probabilities**2).sum(0), squares, rtol=1e-7)
    np.testing.assert_allclose(priming[5::111], degree, atol=1e-6)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-12)


def test_hard_scheme_equals_cellrank(blood: ad.AnnData) -> None:
    # A few cells have neighbours in one terminal group only.
    with pytest.warns(UserWarning, match="not every terminal state can be reached") as caught:
        sd.tl.fate_probabilities(
            blood, STATES, "bulk_labels", time_key="late", threshold_scheme="hard", priming="entropy"
        )
    assert len(caught) == 1
    assert_is_cellranks("hard", blood.obsm["lineages_fwd"], blood.obs["priming_degree_fwd"].to_numpy())


@pytest.mark.usefixtures("x64")
def test_soft_scheme_equals_cellrank_and_its_definition(blood: ad.AnnData) -> None:
    weights, time = weights_and_time(blood)
    terminal = np.asarray([STATES.index(name) if name in STATES else -1 for name in blood.obs["bulk_labels"]])
    graph, args = ops.Graph.from_scipy(weights), (jnp.asarray(terminal, jnp.int32), jnp.asarray(time))
    entropy, divergence = (
        called(ops.FateProbabilities(priming=priming).init(graph, *args), graph, *args)
        for priming in ("entropy", "kl_divergence")
    )
    share = np.asarray(entropy.probabilities)
    assert_is_cellranks("soft", share, np.asarray(entropy.priming))
    assert bool(entropy.converged)
    np.testing.assert_allclose(entropy.absorbed, 1, atol=1e-8)
    np.testing.assert_allclose(share, solved_directly(soft_by_hand(weights, time, 10, 0.5), terminal), atol=1e-7)
    with np.errstate(divide="ignore", invalid="ignore"):
        raw = np.nansum(share * np.log2(share / share.mean(0)), 1)
    np.testing.assert_allclose(divergence.priming, (raw - raw.min()) / np.ptp(raw), atol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scheme", ["soft", "hard", None])
def test_chains_equal_their_formulas(blood: ad.AnnData, scheme: str | None) -> None:
    weights, time = weights_and_time(blood)
    settings = {"soft": {"b": 7.0, "nu": 0.8}, "hard": {"frac_to_keep": 0.2}, None: {}}[scheme]
    graph, when = ops.Graph.from_scipy(weights), jnp.asarray(time)
    op = ops.FateProbabilities(scheme=scheme, **settings).init(graph, jnp.zeros(len(time), jnp.int32))
    by_hand = {
        "soft": lambda: soft_by_hand(weights, time, 7.0, 0.8),
        "hard": lambda: hard_by_hand(weights, time, 0.2),
        None: lambda: weights.toarray() / weights.toarray().sum(1, keepdims=True),
    }[scheme]()
    np.testing.assert_allclose(op.transitions(graph, when).to_scipy().toarray(), by_hand, atol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("up", [0.5, 0.25])
def test_a_line_has_the_chances_of_the_gambler(up: float) -> None:
    """With up=0.25 the walk is driven away from the upper end: its chances fall to 1e-19, and stay positive."""
    n = 41
    result = fates_of(*line(n, up, {0: 0, n - 1: 1}))
    place, ratio = np.arange(n), (1 - up) / up
    upper = place / (n - 1) if up == 0.5 else (1 - ratio**place) / (1 - ratio ** (n - 1))
    np.testing.assert_allclose(result.probabilities[:, 1], upper, atol=1e-9)
    assert float(result.probabilities.min()) >= 0


@pytest.mark.usefixtures("x64")
def test_walks_that_are_held_for_long_do_not_spoil_the_result() -> None:
    """Two ends behind slopes that the walk has to climb: 10^8 steps, which a residual of 1e-9 does not notice."""
    n = 41
    drift = np.where(np.arange(n) < n // 2, 0.75, 0.25)
    steps = sp.diags([np.r_[1 - drift[1:-1], 1.0], np.r_[1.0, drift[1:-1]]], [-1, 1])
    terminal = np.full(n, -1)
    terminal[[0, -1]] = 0, 1
    result = fates_of(ops.Graph.from_scipy(sp.csr_matrix(steps)), jnp.asarray(terminal, jnp.int32))
    assert bool(result.converged)
    np.testing.assert_allclose(result.absorbed, 1, atol=1e-6)
    np.testing.assert_allclose(result.probabilities, solved_directly(steps.toarray(), terminal), atol=1e-6)


def test_derivatives_in_single_precision_are_those_in_double() -> None:
    """At the middle of a line hangs a pocket of later cells, out of which walks hardly get: terms of 10^5 cancel."""
    n, m = 40, 10
    weights = sp.lil_matrix((n + m, n + m))
    weights[:n, :n] = sp.diags([np.ones(n - 1), np.ones(n - 1)], [-1, 1])
    weights[n:, n:] = 1 - np.eye(m)
    weights[n // 2, n] = weights[n, n // 2] = 0.5
    when = np.r_[np.abs(np.arange(n) - n // 2) / n, 0.6 + 0.01 * np.arange(m)]
    terminal = np.full(n + m, -1, np.int32)
    terminal[[0, n - 1]] = 0, 1

    def gradients(dtype: type) -> list[np.ndarray]:
        graph, labels = ops.Graph.from_scipy(sp.csr_matrix(weights, dtype=dtype)), jnp.asarray(terminal)
        op = ops.FateProbabilities().init(graph, labels)

        def total(values: jax.Array, time: jax.Array) -> jax.Array:
            fates = op(graph.with_values(values), labels, time).probabilities[:, 0]
            return (fates * jnp.sin(jnp.arange(n + m, dtype=dtype))).sum()

        found = jax.jit(jax.grad(total, argnums=(0, 1)), compiler_options=QUICK)(graph.values, jnp.asarray(when, dtype))
        return [np.asarray(g) for g in found]

    single = gradients(np.float32)
    with jax.enable_x64(True):
        double = gradients(np.float64)
    for a, b in zip(single, double, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.usefixtures("x64")
def test_steps_that_stay_change_no_fate() -> None:
    """A walk on a line that stays in some cells for up to 10^9 steps."""
    n = 41
    graph, terminal = line(n, 0.5, {0: 0, n - 1: 1})
    leaves = sp.diags(10.0 ** -(9 * np.arange(n) % 10))
    slow = ops.Graph.from_scipy(sp.csr_matrix(leaves @ graph.to_scipy() + sp.eye(n) - leaves))
    result = fates_of(slow, terminal)
    assert bool(result.converged)
    np.testing.assert_allclose(result.probabilities[:, 1], np.arange(n) / (n - 1), atol=1e-8)
    np.testing.assert_allclose(result.absorbed, 1, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_what_cannot_be_reached_and_where_walks_are_caught() -> None:
    """Cell 1 steps to 0, 2 or 3; 3 and 4 keep the walk; 5 and 6 see nothing else; 7 has no edge."""
    steps = np.zeros((8, 8))
    steps[0, 1] = steps[2, 1] = 1
    steps[1, [0, 2, 3]] = 0.5, 0.25, 0.25
    steps[3, 4] = steps[4, 3] = steps[5, 6] = steps[6, 5] = 1
    result = fates_of(ops.Graph.from_scipy(sp.csr_matrix(steps)), jnp.asarray([0, -1, 1, -1, -1, -1, -1, -1]))
    np.testing.assert_allclose(result.probabilities[:3], [[1, 0], [2 / 3, 1 / 3], [0, 1]], atol=1e-12)
    np.testing.assert_allclose(result.absorbed[:3], [1, 0.75, 1], atol=1e-12)
    assert np.isnan(np.asarray(result.probabilities[3:])).all()
    assert np.isnan(np.asarray(result.priming[3:])).all()
    assert np.asarray(result.reaches).tolist() == [[True, False], [True, True], [False, True]] + [[False] * 2] * 5


def two_arms(n: int = 160, split: float = 0.4) -> ad.AnnData:
    """Cells that go along a line and then to the end of one of two arms, with their graph and pseudotime."""
    rng = np.random.default_rng(0)
    time = np.sort(np.minimum(rng.uniform(0, 1.25, size=n), 1) + 0.01 * rng.uniform(size=n))
    arm = np.where(time < split, 0, np.where(np.arange(n) % 2, 1, -1))
    points = np.c_[time, arm * np.maximum(time - split, 0)] + 0.01 * rng.normal(size=(n, 2))
    adata = ad.AnnData(np.zeros((n, 2), np.float32), obsm={"X_pca": points.astype(np.float32)})
    adata.obs["arm"] = pd.Categorical(np.array(["down", "stem", "up"])[arm + 1])
    adata.obs["dpt_pseudotime"] = time
    adata.uns["arm_colors"] = ["#111111", "#222222", "#333333"]
    sd.pp.neighbors(adata, n_neighbors=8, use_rep="X_pca")
    return adata


def test_states_by_group_by_cells_and_looked_for() -> None:
    adata = two_arms()
    up, down = (adata.obs_names[adata.obs["arm"] == arm][-5:].tolist() for arm in ("up", "down"))
    sd.tl.fate_probabilities(adata, {"north": up, "south": down})
    assert adata.obs["term_states_fwd"].cat.categories.tolist() == ["north", "south"]
    assert adata.obs_names[adata.obs["term_states_fwd"] == "north"].tolist() == up
    late = adata.obs["dpt_pseudotime"].to_numpy() > 0.5
    goes_up = adata.obsm["lineages_fwd"][:, 0] > 0.5
    assert (goes_up[late] == (adata.obs["arm"] == "up")[late]).all()
    assert adata.obs["priming_degree_fwd"].to_numpy()[late].min() > adata.obs["priming_degree_fwd"].iloc[:20].max()
    swapped = sd.tl.fate_probabilities(adata, {"south": down, "north": up}, copy=True)
    np.testing.assert_allclose(swapped.obsm["lineages_fwd"][:, ::-1], adata.obsm["lineages_fwd"], atol=1e-8)

    sd.tl.fate_probabilities(adata, groupby="arm")
    assert sorted(adata.uns["fate"]["names"]) == ["down", "up"]
    colors = dict(zip(adata.uns["fate"]["names"], adata.uns["term_states_fwd_colors"], strict=True))
    assert colors == {"down": "#111111", "up": "#333333"}
    found = adata.obs["term_states_fwd"]
    assert (found.dropna() == adata.obs["arm"][found.notna()].astype(str)).all()
    assert adata.obs["dpt_pseudotime"][found.notna()].min() > 0.8
    assert sd.tl.fate_probabilities(adata, copy=True).uns["fate"]["names"].tolist() == ["0", "1"]


def test_a_transition_matrix_of_ones_own() -> None:
    adata = two_arms()
    sd.tl.fate_probabilities(adata, ["up", "down"], "arm")
    weights, time = adata.obsp["connectivities"], adata.obs["dpt_pseudotime"].to_numpy()
    adata.obsp["T_fwd"] = sp.csr_matrix(soft_by_hand(weights.astype(float), time, 10, 0.5))
    other = sd.tl.fate_probabilities(adata, ["up", "down"], "arm", transition_key="T_fwd", copy=True)
    np.testing.assert_allclose(other.obsm["lineages_fwd"], adata.obsm["lineages_fwd"], atol=1e-6)
    assert other.uns["fate"]["params"]["transition_key"] == "T_fwd"
    adata.obsp["T_fwd"].data[0] = -1
    with pytest.raises(ValueError, match=r"T_fwd.*negative"):
        sd.tl.fate_probabilities(adata, ["up", "down"], "arm", transition_key="T_fwd")


def test_warnings_say_which_cells_cannot_reach_which_fate() -> None:
    """Two graphs without an edge between them; the root is in the first, and pseudotime infinite in the second."""
    one = two_arms()
    adata = ad.concat([one, one, one[:10]], index_unique="-", pairwise=False)
    blocks = [one.obsp["connectivities"]] * 2 + [one.obsp["connectivities"][:10, :10]]
    adata.obsp["connectivities"] = adata.obsp["distances"] = sp.block_diag(blocks, format="csr")
    adata.uns["neighbors"] = {"connectivities_key": "connectivities", "distances_key": "distances"}
    n = one.n_obs
    adata.obs.loc[adata.obs_names[n:], "dpt_pseudotime"] = np.inf
    cells = {"up": adata.obs_names[n - 5 : n], "far": adata.obs_names[2 * n - 5 : 2 * n]}
    with pytest.warns(UserWarning, match="reach") as caught:
        sd.tl.fate_probabilities(adata, cells)
    texts = sorted(str(w.message) for w in caught)
    assert texts[0].startswith(f"10 of {2 * n + 10} cells can reach no terminal state")
    assert f"'up' ({n - 5} cells), 'far' ({n - 5} cells)" in texts[1]
    assert {w.filename for w in caught} == {__file__}
    found = adata.obsm["lineages_fwd"]
    np.testing.assert_allclose(found[: 2 * n], np.repeat([[1, 0], [0, 1]], n, 0), atol=1e-12)
    assert np.isnan(found[2 * n :]).all()
    assert adata.uns["fate"]["n_unreaching"].tolist() == [n + 5, n + 5]


@pytest.mark.slow
def test_in_a_plan_derivatives_reach_the_direction() -> None:
    adata = two_arms()
    plan = sd.plan(adata)
    sd.tl.fate_probabilities(plan, ["up", "down"], "arm")
    adata.obs["up"] = np.where(adata.obs["arm"] == "stem", 0.3, adata.obs["arm"] == "up")
    fitted = sd.fit(plan, sd.losses.correlation("priming_degree_fwd", "dpt_pseudotime"), n_steps=3, progress=False)
    assert set(fitted.params) == {"fate_probabilities.b", "fate_probabilities.nu"}
    assert fitted.losses["train_after"] < fitted.losses["train_before"]
    fitted.apply()
    assert "b" in adata.uns["fate"]["params"]
    np.testing.assert_allclose(adata.obsm["lineages_fwd"].sum(1), 1, atol=1e-9)
    with pytest.raises(ValueError, match="have to be given"):
        sd.tl.fate_probabilities(sd.plan(adata), groupby="arm")


def prepared(adata: ad.AnnData, key: str, root: str) -> ad.AnnData:
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    sd.pp.highly_variable_genes(adata, n_top_genes=2000)
    sd.pp.pca(adata, n_comps=30)
    sd.pp.neighbors(adata, n_neighbors=15)
    inside = np.flatnonzero(adata.obs[key] == root)
    scores = adata.obsm["X_pca"]
    adata.uns["iroot"] = int(inside[((scores[inside] - scores[inside].mean(0)) ** 2).sum(1).argmin()])
    sd.tl.pseudotime(adata)
    return adata


def accuracies(adata: ad.AnnData, key: str, fates: dict[str, list[str]]) -> list[float]:
    """The share of right likeliest fates in each fate; its 30 latest cells, at most half of them, are terminal."""
    time, states = adata.obs["dpt_pseudotime"].to_numpy(), {}
    truth = np.full(adata.n_obs, -1)
    for i, (name, clusters) in enumerate(fates.items()):
        cells = np.flatnonzero(adata.obs[key].isin(clusters))
        truth[cells] = i
        states[name] = adata.obs_names[cells[np.argsort(-time[cells])[: min(30, len(cells) // 2)]]]
    sd.tl.fate_probabilities(adata, states)
    right = adata.obsm["lineages_fwd"].argmax(1) == truth
    scored = adata.obs["term_states_fwd"].isna().to_numpy()
    return [float(right[scored & (truth == i)].mean()) for i in range(len(fates))]


@pytest.mark.slow
def test_known_fates_of_blood_progenitors(paul15: ad.AnnData) -> None:
    """On the way the solver has to get through a chain that keeps walks for 10^8 steps: CellRank's raises there."""
    adata = prepared(paul15, "paul15_clusters", "7MEP")
    fates = {"erythroid": [f"{i}Ery" for i in range(1, 7)], "myeloid": ["14Mo", "15Mo", "16Neu", "17Neu"]}
    erythroid, myeloid = accuracies(adata, "paul15_clusters", fates)
    assert erythroid > 0.99
    assert myeloid > 0.97
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.tl.fate_probabilities(adata, ["1Ery", "16Neu", "15Mo"], "paul15_clusters")
    weights, time = adata.obsp["connectivities"].astype(float), adata.obs["dpt_pseudotime"].to_numpy()
    terminal = adata.obs["term_states_fwd"].cat.codes.to_numpy().astype(int)
    exact = solved_directly(soft_by_hand(weights.tocsr(), time.astype(float), 10, 0.5), terminal)
    np.testing.assert_allclose(adata.obsm["lineages_fwd"], exact, atol=1e-6)
    sd.tl.fate_probabilities(adata, groupby="paul15_clusters")
    assert set(adata.uns["fate"]["names"]) == {"1Ery", "16Neu", "13Baso", "11DC"}


@pytest.mark.slow
def test_known_fates_of_endocrine_cells(data_dir: Path) -> None:
    adata = prepared(ad.read_h5ad(data_dir / "pancreas_velocity" / "pancreas_velocity.h5ad"), "clusters", "Ductal")
    found = accuracies(adata, "clusters", {name: [name] for name in ("Alpha", "Beta", "Delta", "Epsilon")})
    assert (np.array(found) > [0.95, 0.7, 0.95, 0.95]).all()
    sd.tl.fate_probabilities(adata, groupby="clusters")
    assert set(adata.uns["fate"]["names"]) == {"Alpha", "Beta", "Delta"}


def sixty_cells() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A random graph, pseudotime and terminal cells."""
    rng = np.random.default_rng(0)
    upper = np.triu(rng.uniform(size=(60, 60)) * (rng.uniform(size=(60, 60)) < 0.2), 1)
    terminal = np.full(60, -1)
    terminal[[40, 58, 59]], terminal[[50, 51]] = 0, 1
    return upper + upper.T, np.linspace(0, 1, 60), terminal


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scheme", ["soft", pytest.param("hard", marks=pytest.mark.slow)])
def test_without_weight_cells_are_as_if_they_were_not_there(scheme: str) -> None:
    graph, time, terminal = sixty_cells()
    gone, keep = [20, 59], np.delete(np.arange(60), [20, 59])
    weights = np.ones(60)
    weights[gone] = 0
    args = (
        ops.Graph.from_scipy(sp.csr_matrix(graph)),
        jnp.asarray(terminal, jnp.int32),
        jnp.asarray(time),
        jnp.asarray(weights),
    )
    found = called(ops.FateProbabilities(scheme=scheme).init(*args), *args)
    others = sp.csr_matrix(graph[np.ix_(keep, keep)])
    steps = soft_by_hand(others, time[keep], 10, 0.5) if scheme == "soft" else hard_by_hand(others, time[keep], 0.3)
    expected = solved_directly(steps, terminal[keep])
    np.testing.assert_allclose(np.asarray(found.probabilities)[keep], expected, atol=1e-8)
    mean = expected.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        raw = np.nansum(expected * np.log(expected / mean), 1)
    priming = (raw - raw.min()) / np.ptp(raw)
    np.testing.assert_allclose(np.asarray(found.priming)[keep], priming, atol=1e-7)
    # A cell of weight 0 still has a way to go.
    assert float(found.probabilities[20].sum()) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivatives_in_weights() -> None:
    graph, time, terminal = sixty_cells()
    args = ops.Graph.from_scipy(sp.csr_matrix(graph)), jnp.asarray(terminal, jnp.int32), jnp.asarray(time)
    op = ops.FateProbabilities().init(*args)
    rng = np.random.default_rng(1)
    weights, step, side = rng.uniform(0.3, 1.5, 60), rng.normal(size=60), rng.normal(size=60)

    def moved(w: jax.Array) -> jax.Array:
        found = op(*args, w)
        return (found.probabilities[:, 0] * side).sum() + (found.priming * side).sum()

    both = jax.jit(jax.value_and_grad(moved), compiler_options=QUICK)
    exact = float((both(jnp.asarray(weights))[1] * step).sum())
    numeric = directional_fd(lambda w: both(w)[0], jnp.asarray(weights), jnp.asarray(step), (1e-3, 3e-4))
    assert abs(exact) > 1e-2
    np.testing.assert_allclose(numeric, exact, rtol=1e-3)
