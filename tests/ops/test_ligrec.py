"""Ligands and receptors against squidpy, liana and their definition; derivatives and cost are in test_contract."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats
from sklearn.neighbors import kneighbors_graph

import scdiffx as sd
from helpers import called, pbmc_counts
from scdiffx import ops

RECORDED = Path(__file__).parent / "ligrec_squidpy.npz"
TABLE = "resources/liana_omni_resource.csv.gz"


@pytest.fixture(scope="module")
def pairs(data_dir: Path) -> pd.DataFrame:
    table = pd.read_csv(data_dir / TABLE)
    return table[table["resource"] == "cellphonedb"].reset_index(drop=True)


@pytest.fixture(scope="module")
def blood(data_dir: Path, pairs: pd.DataFrame) -> ad.AnnData:
    """Cells of soupx_pbmc with the genes of the table."""
    adata = ad.read_h5ad(data_dir / "soupx_pbmc" / "soupx_pbmc.h5ad")
    sd.pp.normalize_total(adata, target_sum=1e4)
    sd.pp.log1p(adata)
    sides = pd.concat([pairs["source_genesymbol"], pairs["target_genesymbol"]])
    return adata[:, adata.var_names.isin(sides.str.split("_").explode())].copy()


def recorded(prefix: str) -> dict[str, np.ndarray]:
    with np.load(RECORDED) as stored:
        return {name.removeprefix(prefix): x for name, x in stored.items() if name.startswith("group_") == bool(prefix)}


def assert_within_chance(ours: np.ndarray, theirs: np.ndarray, n: int, theirs_n: int = 10_000) -> None:
    """Whether the shares of permutations differ by no more than both samples do."""
    ours = (ours * (n + 1) - 1) / n
    pooled = (ours * n + theirs * theirs_n + 1) / (n + theirs_n + 2)
    z = (ours - theirs) / np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / theirs_n))
    assert np.abs(z).max() < 5
    assert np.sqrt((z**2).mean()) < 1.4  # tests of the same genes go together


def test_equals_squidpy(blood: ad.AnnData, pairs: pd.DataFrame) -> None:
    theirs = recorded("")
    table = pairs.iloc[theirs["rows"]]
    found = sd.tl.ligrec(blood, "annotation", table, copy=True).uns["ligrec"]
    rows = {tuple(pair): i for i, pair in enumerate(table[["source_genesymbol", "target_genesymbol"]].to_numpy())}
    row = [rows[pair] for pair in zip(found["ligand"], found["receptor"], strict=True)]
    column = found["source"].cat.codes * len(found["source"].cat.categories) + found["target"].cat.codes
    assert len(found) == np.isfinite(theirs["pvalue"]).sum() > 900
    np.testing.assert_allclose(found["mean"], theirs["mean"][row, column], atol=1e-6)
    assert_within_chance(found["pvalue"].to_numpy(), theirs["pvalue"][row, column], 1000)
    untested = np.ones(len(found[["ligand", "receptor"]].drop_duplicates()) * 36 - len(found))
    family = stats.false_discovery_control([*found["pvalue"], *untested])
    np.testing.assert_allclose(found["qvalue"], family[: len(found)])
    assert (np.diff(found["pvalue"]) >= 0).all()


def test_complexes_by_group_equal_lianas(blood: ad.AnnData, pairs: pd.DataFrame) -> None:
    theirs = recorded("group_")
    settings = {"complex_policy": "group_min", "threshold": 0.1, "copy": True}
    found = sd.tl.ligrec(blood, "annotation", pairs.iloc[::3], **settings).uns["ligrec"]
    names = found["source"].cat.categories
    chosen = pairs.loc[theirs["rows"], ["source_genesymbol", "target_genesymbol"]].to_numpy()
    keys = [(names[s], names[t], *pair) for s, t, pair in zip(theirs["source"], theirs["target"], chosen, strict=True)]
    found = found.set_index(["source", "target", "ligand", "receptor"])
    assert len(found) == len(keys)
    assert sum("_" in ligand + receptor for *_, ligand, receptor in keys) >= 4
    # liana adds up in single precision.
    np.testing.assert_allclose(found.loc[keys, "mean"], theirs["mean"], rtol=3e-6)
    assert_within_chance(found.loc[keys, "pvalue"].to_numpy(), theirs["pvalue"], 1000)


def small(n: int = 90) -> tuple[np.ndarray, np.ndarray, sp.csr_matrix]:
    """Expression of ten genes, labels of three groups that lie together, and a directed graph of five neighbours."""
    x = np.log1p(pbmc_counts(n_cells=n, n_genes=100).X.toarray().astype(np.float64))
    x = x[:, np.argsort(-x.mean(0))[10:20]]
    rng = np.random.default_rng(0)
    points = rng.uniform(size=(n, 2))
    labels = np.where(rng.uniform(size=n) < 0.3, rng.integers(3, size=n), (3 * points[:, 0]).astype(int))
    order = np.argsort(((points[:, None] - points) ** 2).sum(2), axis=1)[:, 1:6]
    graph = sp.csr_matrix((rng.uniform(0.5, 1, 5 * n), (np.repeat(np.arange(n), 5), order.ravel())), shape=(n, n))
    return x, labels, graph


SIDES = {"ligands": np.array([[0, 0], [3, 4], [9, 9]]), "receptors": np.array([[5, 5], [6, 7], [0, 8]])}


def by_hand(x: np.ndarray, member: np.ndarray, graph: np.ndarray | None, policy: str) -> np.ndarray:
    """Means of SIDES by their definition, edge by edge."""
    edges = np.ones((len(x), len(x))) if graph is None else (graph + graph.T) / 2
    means = np.zeros((3, 3, x.shape[1]))
    for a in range(3):
        for b in range(3):
            weight = member[:, [a]] * edges * member[:, b]
            means[a, b] = weight.sum(1) @ x / weight.sum()
    overall = member.sum(1) @ x
    result = np.zeros((3, 3, 3))
    for i, sides in enumerate(zip(*SIDES.values(), strict=True)):
        chosen = [[side[overall[side].argmin()]] if policy == "min" else side for side in sides]
        for a in range(3):
            for b in range(3):
                result[i, a, b] = (means[a, b, chosen[0]].min() + means[b, a, chosen[1]].min()) / 2
    return result


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("policy", ["min", "group_min"])
@pytest.mark.parametrize("near", [False, True], ids=["everywhere", "neighbours"])
def test_means_by_their_definition(policy: str, near: bool) -> None:
    x, labels, graph = small()
    soft = np.random.default_rng(1).dirichlet(np.ones(3), len(x))
    membership, member = (labels, np.eye(3)[labels]) if policy == "min" else (soft, soft)
    edges = (ops.Graph.from_scipy(graph),) if near else ()
    op = ops.LigRec(complex_policy=policy, **SIDES).init(jnp.asarray(x), jnp.asarray(membership))
    found = called(op, jnp.asarray(x), jnp.asarray(membership), *edges)
    expected = by_hand(x, member, graph.toarray() if near else None, policy)
    np.testing.assert_allclose(found.mean, expected, rtol=1e-10)
    np.testing.assert_allclose(found.mean, (found.ligand + found.receptor) / 2)


def test_permutations_by_their_definition() -> None:
    x, labels, graph = small()
    sparse = ops.Graph.from_scipy(graph)
    op = ops.LigRec(complex_policy="group_min", n_groups=3, **SIDES)
    member = np.eye(3)[labels]
    for edges in (None, sparse):
        dense = None if edges is None else graph.toarray()
        found = op.test(x, labels, edges, n_perms=40, threshold=0)
        rng, observed, reached = np.random.default_rng(0), by_hand(x, member, dense, "group_min"), 0
        for _ in range(40):
            order = rng.permuted(np.arange(len(x)))
            given = (x, member[order]) if edges is None else (x[order], member)
            reached += by_hand(*given, dense, "group_min") >= observed - 1e-12
        assert len(found.pvalue) == 27
        at = found.interaction, found.sender, found.receiver
        np.testing.assert_allclose(found.pvalue, (1 + reached[at]) / 41)
        # A soft membership of ones and zeros is no other.
        np.testing.assert_array_equal(op.test(x, member, edges, n_perms=40, threshold=0).pvalue, found.pvalue)


@pytest.mark.parametrize("way", ["everywhere", "neighbours", "group", "soft"])
def test_p_values_of_shuffled_cells_are_uniform(way: str) -> None:
    x, labels, graph = small()
    edges = ops.Graph.from_scipy(graph) if way in ("neighbours", "group") else None
    soft = np.random.default_rng(1).dirichlet(np.ones(3), len(x))
    op = ops.LigRec(ligands=np.array([[9]]), receptors=np.array([[5]]), n_groups=3)
    rng, found = np.random.default_rng(2), []
    for seed in range(120):
        order = rng.permutation(len(x))
        if way == "group":  # within the groups
            order[np.argsort(labels, kind="stable")] = order[np.argsort(labels[order], kind="stable")]
            assert (labels[order] == labels).all()
        settings = {"shuffle": "group"} if way == "group" else {}
        given = soft if way == "soft" else labels
        result = op.test(x[order], given, edges, n_perms=49, threshold=0, seed=seed, **settings)
        found.append(result.pvalue[(result.sender == 0) & (result.receiver == 1)].item())
    # P-values are multiples of 1/50: spread each over its step.
    spread = np.asarray(found) - rng.uniform(size=len(found)) / 50
    assert stats.kstest(spread, "uniform").pvalue > 0.01
    assert stats.kstest(spread**2, "uniform").pvalue < 0.01


@pytest.fixture(scope="module")
def cortex(data_dir: Path) -> ad.AnnData:
    """Two types of cells in the real places of osmfish_cortex; ligand and receptor belong to no type.

    In "near" the ligand is high in senders that touch a receiver: the values of each type are those of "anywhere".
    """
    source = ad.read_h5ad(data_dir / "osmfish_cortex" / "osmfish_cortex.h5ad")
    source = source[source.obs["cell_type"].isin(["Astrocyte Gfap", "Oligodendrocyte Mature"])].copy()
    rng = np.random.default_rng(0)
    cells = ad.AnnData(np.log1p(source.X[rng.permutation(source.n_obs)]).tocsr(), obs=source.obs)
    cells.var_names = source.var_names
    # Without ties.
    cells.obsm["spatial"] = source.obsm["spatial"] + rng.uniform(0, 0.01, (source.n_obs, 2))
    ligand, _ = signal(cells)
    found = kneighbors_graph(cells.obsm["spatial"], 6)
    touches = (found + found.T) @ (cells.obs["cell_type"] == "Oligodendrocyte Mature").to_numpy(float)
    values = cells.X.toarray()
    senders = np.flatnonzero(cells.obs["cell_type"] == "Astrocyte Gfap")
    by_touch = senders[np.argsort(touches[senders] + rng.uniform(0, 3, len(senders)))]
    values[by_touch, cells.var_names.get_loc(ligand)] = np.sort(values[senders, cells.var_names.get_loc(ligand)])
    cells.layers["near"] = sp.csr_matrix(values)
    assert cells.n_obs > 500
    return cells


def signal(cells: ad.AnnData) -> tuple[str, str]:
    widest = np.argsort(-np.asarray((cells.X > 0).mean(0)).ravel())
    return cells.var_names[widest[0]], cells.var_names[widest[1]]


def p_value(cells: ad.AnnData, **settings: object) -> tuple[float, float]:
    table = sd.tl.ligrec(cells, "cell_type", [signal(cells)], n_perms=199, copy=True, **settings).uns["ligrec"]
    row = table[(table["source"] == "Astrocyte Gfap") & (table["target"] == "Oligodendrocyte Mature")].iloc[0]
    return row["mean"], row["pvalue"]


def test_neighbours_find_what_the_whole_misses(cortex: ad.AnnData) -> None:
    everywhere, planted = p_value(cortex), p_value(cortex, layer="near")
    assert planted[0] == pytest.approx(everywhere[0])
    assert min(planted[1], everywhere[1]) > 0.05
    assert p_value(cortex, neighbors=True)[1] > 0.05
    for shuffle in ("all", "group"):
        assert p_value(cortex, neighbors=True, shuffle=shuffle, layer="near")[1] <= 0.01


def test_a_graph_of_obsp_is_taken_as_it_is(cortex: ad.AnnData) -> None:
    cells = cortex.copy()
    directed = kneighbors_graph(cells.obsm["spatial"], 6)
    cells.obsp["spatial_connectivities"] = directed.maximum(directed.T)
    cells.obsp["there"], cells.obsp["back"] = directed, directed.T.tocsr()
    assert p_value(cortex, neighbors=True) == p_value(cells, neighbors=True)
    found = [p_value(cells, neighbors=key) for key in ("there", "back")]
    assert found[0] == found[1]
    assert found[0][0] != p_value(cells, neighbors=True)[0]


def test_slices_that_differ_are_no_signal() -> None:
    x, _, _ = small()
    rng = np.random.default_rng(4)
    batch = np.arange(len(x)) % 2
    adata = ad.AnnData(np.abs(x[:, :6]) + batch[:, None])
    adata.obs["type"] = np.where(rng.uniform(size=len(x)) < 0.2 + 0.6 * batch, "b", "a")
    adata.obs["slice"] = np.where(batch, "second", "first")
    adata.obsm["spatial"] = rng.uniform(size=(len(x), 2))
    pairs = [("0", "1"), ("2", "3")]

    def smallest(**settings: object) -> float:
        return sd.tl.ligrec(adata, "type", pairs, n_perms=199, copy=True, **settings).uns["ligrec"]["pvalue"].min()

    assert smallest() < 0.01 < smallest(batch_key="slice")
    assert smallest(neighbors=True, batch_key="slice") > 0.01
    adata.obsp["spatial_connectivities"] = sp.csr_matrix(np.ones((len(x), len(x))))
    with pytest.raises(ValueError, match="joins cells of different batches by 4050 of 8100"):
        smallest(neighbors=True, batch_key="slice")


def test_interactions_come_in_several_forms_and_cells_without_label_do_not_count() -> None:
    adata = pbmc_counts(n_cells=150)
    names = [("GNLY", "CD8A"), ("S100A8", "CD74_absent"), ("absent", "CD74")]
    table = pd.DataFrame(names, columns=["ligand", "receptor"]).assign(source=["P1", "P2", "P3"], target="Q")
    forms = [names, [*names, names[0]], table, table[["ligand", "receptor"]].set_axis(["source", "target"], axis=1)]
    found = [sd.tl.ligrec(adata, "cell_type", form, n_perms=9, copy=True).uns["ligrec"] for form in forms]
    for other in found[1:]:
        pd.testing.assert_frame_equal(found[0], other)
    assert set(found[0]["receptor"]) == {"CD8A", "CD74_absent"}
    settings = {"complex_policy": "group_min", "n_perms": 9, "copy": True}
    assert set(sd.tl.ligrec(adata, "cell_type", names, **settings).uns["ligrec"]["receptor"]) == {"CD8A"}
    labelled = adata.obs["cell_type"] != "CD34+"
    adata.obs["some"] = adata.obs["cell_type"].where(labelled)
    some = sd.tl.ligrec(adata, "some", names, n_perms=9, copy=True).uns["ligrec"]
    rest = sd.tl.ligrec(adata[labelled.to_numpy()].copy(), "cell_type", names, n_perms=9, copy=True).uns["ligrec"]
    np.testing.assert_array_equal(some["pvalue"], rest["pvalue"])
    assert "CD34+" not in set(some["source"])


@pytest.mark.slow
def test_a_fit_reaches_the_means() -> None:
    adata = pbmc_counts(n_cells=150)
    plan = sd.plan(adata)
    sd.pp.normalize_total(plan)
    sd.tl.ligrec(plan, "cell_type", [("GNLY", "CD8A"), ("S100A8", "CD74")], n_perms=19)
    fitted = sd.fit(plan, sd.losses.l1("ligrec"), n_steps=2, progress=False)
    assert fitted.history["train"][-1] < fitted.history["train"][0]
    assert list(fitted.params) == ["normalize_total.target_sum"]


@pytest.mark.slow
def test_groups_that_a_plan_finds_are_counted() -> None:
    adata = pbmc_counts(n_cells=150)
    adata.obsm["X_pca"] = adata.X[:, :9].toarray()
    plan = sd.plan(adata)
    sd.tl.kmeans(plan, 3, n_init=1)
    sd.tl.ligrec(plan, "kmeans", [("GNLY", "CD8A"), ("S100A8", "CD74")], n_perms=19)
    plan.apply()
    assert set(adata.uns["ligrec"]["source"]) == {"0", "1", "2"}


def test_wrong_calls_name_themselves() -> None:
    x, labels, _ = small()
    with pytest.raises(ValueError, match="columns of ligands"):
        ops.LigRec().init(x, labels)
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 2\).*interactions, members"):
        ops.LigRec(ligands=SIDES["ligands"], receptors=SIDES["receptors"][:2]).init(x, labels)
    with pytest.raises(ValueError, match=r"complex_policy='max'.*'group_min'"):
        ops.LigRec(complex_policy="max", **SIDES).init(x, labels)
    with pytest.raises(ValueError, match="call `op = op"):
        ops.LigRec(**SIDES)(jnp.asarray(x), jnp.asarray(labels))
    with pytest.raises(ValueError, match=r"shuffle='cells'.*'group'"):
        ops.LigRec(**SIDES).test(x, labels, shuffle="cells")
    with pytest.raises(ValueError, match="needs a graph"):
        ops.LigRec(**SIDES).test(x, labels, shuffle="group")
