"""Minibatches of fits whose moving steps look at neighbours: exact, of one size, refused where they save nothing."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.neighbors import NearestNeighbors, kneighbors_graph

import scdiffx as sd
from helpers import QUICK, largest_of, pbmc_counts
from scdiffx._core.graph import Graph
from scdiffx._core.section import Surroundings
from scdiffx._fit._minibatches import Minibatches, _on_host
from scdiffx._fit._split import three_ways
from scdiffx._fit._training import Run
from scdiffx._program import Program
from scdiffx._steps import _cast

CELLS, BATCH = 700, 28
QUIET = {"progress": False}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def data():
    """Blood cells on a square, each joined to four others near it there."""
    adata = pbmc_counts(CELLS, 60)
    sd.pp.split_counts(adata)
    adata.X = adata.layers["fit"].copy()
    place = np.random.default_rng(0).uniform(size=(CELLS, 2)).astype(np.float32)
    adata.obsm["place"] = place
    near = kneighbors_graph(place, 4)
    adata.obsp["connectivities"] = sp.csr_matrix((near + near.T) / 2)
    adata.obsp["distances"] = sp.csr_matrix(near)
    adata.uns["neighbors"] = {"connectivities_key": "connectivities", "distances_key": "distances"}
    return adata


def on_moving_graph(adata):
    """From a projection that moves over neighbours on it, to values averaged over them."""
    plan = sd.plan(adata)
    sd.pp.log1p(plan)
    sd.pp.pca(plan, n_comps=2)
    sd.pp.neighbors(plan, n_neighbors=4, key_added="own")
    sd.pp.magic(plan, t=1, neighbors_key="own")
    return plan


def on_moving_kernel(adata):
    plan = sd.plan(adata)
    sd.pp.log1p(plan)
    sd.pp.pca(plan, n_comps=2)
    sd.pp.magic(plan, t=0.8, knn=2, knn_max=4)
    return plan


def on_given_graph(adata):
    """Weighted genes, averaged over the neighbours in space."""
    plan = sd.plan(adata)
    sd.pp.normalize_total(plan, target_sum=100)
    sd.pp.magic(plan, t=2, neighbors_key="neighbors")
    return plan


def projected(adata):
    plan = sd.plan(adata)
    sd.pp.log1p(plan)
    sd.pp.highly_variable_genes(plan, n_top_genes=30, soft=True)
    sd.pp.pca(plan, n_comps=4)
    return plan


HELD_OUT = sd.losses.molecular_cross_validation("magic", "choose")
SQUARES = sd.losses.reconstruction("magic", "choose")
FROM_A_WALK = ["normalize_total", "magic.self_weight", "magic.t"]
CASES = {
    "moving graph": (on_moving_graph, SQUARES, None),
    "moving graph, molecules": (on_moving_graph, HELD_OUT, None),
    "moving kernel": (on_moving_kernel, SQUARES, None),
    "given graph": (on_given_graph, SQUARES, FROM_A_WALK),
    "given graph, nothing before it": (on_given_graph, SQUARES, "magic"),
    "lists of mixing": (projected, sd.losses.batch_mixing("X_pca", "half", n_neighbors=8), None),
    "lists of both": (
        projected,
        sd.losses.batch_mixing("X_pca", "half", n_neighbors=4)
        + sd.losses.replicate_consistency("X_pca", "pair", n_neighbors=2),
        None,
    ),
}


def prepared(adata, case, dtype=jnp.float64, size=BATCH):
    make, loss, learn = CASES[case]
    adata = adata.copy()
    adata.obs["half"] = np.where(np.arange(adata.n_obs) % 2, "a", "b")
    adata.obs["pair"] = (np.arange(adata.n_obs) // 2).astype(str)
    program = Program.build(make(adata), learn, dtype)
    run = Run(program, loss, three_ways(adata, loss, None, None, seed=0))
    # Targets too: sums of float32 values depend on how they are blocked.
    part = run.given["train"]
    run.given["train"] = part._replace(targets=[_cast(target, dtype) for target in part.targets])
    run._step = jax.jit(jax.value_and_grad(run._losses, has_aux=True), compiler_options=QUICK)
    return run, Minibatches(program, run.settled, run.given["train"], size, seed=1)


QUICKLY = ("given graph, nothing before it", "lists of mixing")


@pytest.mark.parametrize("case", [c if c in QUICKLY else pytest.param(c, marks=SLOW) for c in CASES])
def test_a_batch_is_the_whole_restricted_and_an_epoch_is_the_whole(data, case):
    """In double precision: the loss of a batch and its derivative, and the mean derivative of an epoch."""
    with jax.enable_x64(True):
        run, batches = prepared(data, case)
        start = jax.tree.map(lambda v: v + 0.05 * np.random.default_rng(0).normal(size=v.shape), run.start)
        mean = jax.tree.map(jnp.zeros_like, start)
        seen = []
        for step in range(CELLS // BATCH):
            (value, _), slope = run._step(start, *batches.draw(step))
            seen.append(batches._own(step))
            keep = jnp.zeros(CELLS, bool).at[seen[-1]].set(True)
            part = run.given["train"]._replace(keep=keep)
            (whole, _), expected = run._step(start, run.settled, run.program.frozen, {"train": part})
            assert value == pytest.approx(float(whole), rel=1e-10)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-11), slope, expected)
            mean = jax.tree.map(lambda m, s: m + s * BATCH / CELLS, mean, slope)
            if step > 2 and case != "moving graph":
                break
        assert np.abs(jax.tree.leaves(slope["plan"])[0]).max() > 1e-6
        if case == "moving graph":
            np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(CELLS))
            _, expected = run._step(start, run.settled, run.program.frozen, run.given)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-11), mean, expected)


def test_steps_draw_all_training_cells_in_pieces_near_each_other(data):
    """Whatever does not divide: no cell twice in an epoch, all in some epoch, the same again for the same seed."""
    _, batches = prepared(data, "moving graph", jnp.float32, 33)
    per_epoch = CELLS // 33
    epochs = [[batches._own(e * per_epoch + i) for i in range(per_epoch)] for e in range(4)]
    for epoch in epochs:
        drawn = np.concatenate(epoch)
        assert len(np.unique(drawn)) == per_epoch * 33
    assert len(np.unique(np.concatenate([np.concatenate(epoch) for epoch in epochs]))) > CELLS - 5
    np.testing.assert_array_equal(batches._own(7), epochs[0][7])
    near = np.mean([len(batches.around.reached(own, 2)) for own in epochs[0]])
    anyhow = np.mean([len(batches.around.reached(np.arange(i, CELLS, per_epoch)[:33], 2)) for i in range(per_epoch)])
    assert near < 0.6 * anyhow


def nearest_six(z):
    distances, indices = NearestNeighbors(n_neighbors=6).fit(z).kneighbors(z)
    return indices, distances


OPERATORS = {
    "umap": sd.ops.Neighbors(n_neighbors=6),
    "gauss": sd.ops.Neighbors(n_neighbors=6, method="gauss"),
    "cosine": sd.ops.Neighbors(n_neighbors=6, metric="cosine"),
    "measured": sd.ops.Neighbors(n_neighbors=6, search=nearest_six),
    "magic": sd.ops.Magic(t=1.7, knn=(2, 6)),
    "magic on graph": sd.ops.Magic(t=2.4),
    "moments": sd.ops.Moments(power=0.4),
}


def inputs(data, name):
    """Positions on the square, or counts with these or with the graph; host arrays in double precision."""
    z = data.obsm["place"].astype(np.float64)
    if isinstance(OPERATORS[name], sd.ops.Neighbors):
        return (z,)
    x = data.layers["fit"].toarray()[:, :10].astype(np.float64)
    graph = jax.tree.map(np.asarray, Graph.from_scipy(data.obsp["connectivities"].astype(np.float64)))
    return {"magic": (x, z), "magic on graph": (x, graph), "moments": (x, 2 * x, graph)}[name]


def by_rows(op, args, v):
    """What an operator gives for each cell: of graphs, sums of rows and a product; and all values at pads."""
    found = [a for a in op(*args) if isinstance(a, Graph) or (a.ndim == 2 and jnp.issubdtype(a.dtype, jnp.floating))]
    graphs = [a for a in found if isinstance(a, Graph)]
    products = [a for g in graphs for a in (g.row_sums()[:, None], g.with_values(g.values**2) @ v)]
    rows = jnp.concatenate([a for a in found if not isinstance(a, Graph)] + products, 1)
    return rows, [jnp.where(g.pattern.valid, 0, g.values) for g in graphs]


def total(x, op, args, v, cells):
    return jnp.sin(by_rows(op, (x, *args[1:]), v)[0][cells]).sum()


results = jax.jit(by_rows, compiler_options=QUICK)
slopes = jax.jit(jax.grad(total), compiler_options=QUICK)


@pytest.mark.parametrize("name", [n if n in ("umap", "moments") else pytest.param(n, marks=SLOW) for n in OPERATORS])
def test_operators_reach_as_far_as_they_say(data, name):
    """Of a section's own cells, results are those among all cells, and so is the derivative of what is made of them."""
    with jax.enable_x64(True):
        op, args = OPERATORS[name], inputs(data, name)
        op = _on_host(op.init(*args) if hasattr(op, "init") else op)
        graph = args[-1] if isinstance(args[-1], Graph) else op
        around = Surroundings(CELLS, [graph.pattern])
        own = np.argsort(((data.obsm["place"] - 0.4) ** 2).sum(1))[:20]
        reached = around.reached(own, max(op.reach(["t", "filter"])))
        assert len(own) + 10 < len(reached) < CELLS / 2
        around.resize(len(reached) + 7)
        section = around.section(own, reached)
        here = tuple(section.graph(a) if isinstance(a, Graph) else a[section.cells] for a in args)
        part = op.within(section) if hasattr(op, "within") else op
        v = np.random.default_rng(0).normal(size=(CELLS, 3))
        some, pads = results(part, here, v[section.cells])
        np.testing.assert_allclose(some[: len(own)], results(op, args, v)[0][own], rtol=1e-10, atol=1e-13)
        assert not any(np.asarray(values).any() for values in pads)
        expected = slopes(args[0], op, args, v, own)
        found = slopes(here[0], part, here, v[section.cells], np.arange(len(own)))
        np.testing.assert_allclose(found[: len(reached)], expected[reached], rtol=1e-8, atol=1e-11)
        assert not found[len(reached) :].any()


def test_all_operators_that_look_at_neighbours_are_tried():
    classes = [c for c in vars(sd.ops).values() if isinstance(c, type)]
    assert {c for c in classes if hasattr(c, "reach")} == {type(op) for op in OPERATORS.values()}


def test_batches_share_one_program_whatever_structure_is_found(data):
    run, batches = prepared(data, "moving graph", jnp.float32)
    step = jax.jit(jax.value_and_grad(run._losses, has_aux=True), compiler_options=QUICK)
    for i in range(4):
        step(run.start, *batches.draw(i))
    params = jax.tree.map(lambda v: v + 0.02, run.start)
    program, given = run.refreshed(run.program, params, run.given)
    batches.refresh(program, program.settled(), given["train"])
    assert (batches.draw(5)[0][2].indices != batches.ops[2].indices[: batches.around.size]).any()
    for i in range(4, 8):
        step(params, *batches.draw(i))
    assert step._cache_size() == 1


def test_memory_of_a_step_does_not_grow_with_the_cells():
    """Positions on a square, denser and denser: as many edges around a batch."""
    largest = []
    for n in (700, 2800):
        adata = pbmc_counts(700, 40)
        adata = adata[np.resize(np.arange(700), n)].copy()
        adata.obs_names_make_unique()
        place = np.random.default_rng(0).uniform(size=(n, 2)).astype(np.float32)
        near = kneighbors_graph(place, 4)
        adata.obsp["connectivities"] = sp.csr_matrix((near + near.T) / 2)
        adata.uns["neighbors"] = {"connectivities_key": "connectivities"}
        adata.layers["choose"] = adata.X.copy()
        run, batches = prepared(adata, "given graph", jnp.float32)
        largest.append(
            largest_of(jax.make_jaxpr(jax.value_and_grad(run._losses, has_aux=True))(run.start, *batches.draw(0)))
        )
    assert largest[1] < 1.5 * largest[0]


FIT = {"learn": ["pca.shift", "neighbors.bandwidth", "magic.self_weight"], "n_steps": 8, "refresh_every": 3, **QUIET}


def test_a_fit_by_batches_lowers_the_loss_of_all_cells(data):
    fitted = sd.fit(on_given_graph(data), SQUARES, learn=FROM_A_WALK, batch_size=BATCH, n_steps=40, **QUIET)
    assert fitted.adopted
    assert fitted.history["step"] == [0, 25, 40]
    assert fitted.losses["test_after"] < 0.95 * fitted.losses["test_before"]


@SLOW
def test_a_fit_goes_on_from_its_checkpoint(data, tmp_path, monkeypatch):
    """Neighbours are looked up anew on the way; what is left off goes on to the same bits."""
    found, draw = [], Minibatches.draw
    monkeypatch.setattr(Minibatches, "draw", lambda self, step: found.append(self.ops[2].indices) or draw(self, step))
    whole = sd.fit(on_moving_graph(data), SQUARES, batch_size=BATCH, **FIT)
    assert whole.history["train"][1] != whole.history["train"][0]
    anew = [not np.array_equal(before, after) for before, after in itertools.pairwise(found)]
    assert anew == [False, False, True, False, False, True, False]
    sd.fit(on_moving_graph(data), SQUARES, batch_size=BATCH, checkpoint=tmp_path, **FIT | {"n_steps": 5})
    resumed = sd.fit(on_moving_graph(data), SQUARES, batch_size=BATCH, checkpoint=tmp_path, **FIT)
    assert resumed.history == whole.history
    for name, value in whole.params.items():
        np.testing.assert_array_equal(resumed.params[name], value)


def test_what_saves_nothing_or_needs_all_cells_is_refused(data):
    with pytest.raises(
        ValueError, match=r"\['neighbors', 'magic'\] look at other cells.* up to 2 edges.* of 700 cells"
    ):
        sd.fit(on_moving_graph(data), HELD_OUT, batch_size=300, **FIT)
    with pytest.raises(ValueError, match="Modularity: it is a sum over all edges"):
        sd.fit(projected(data), sd.losses.modularity("X_pca"), batch_size=BATCH, **QUIET)
    with pytest.raises(ValueError, match=r"to learn \['magic.filter'\], magic needs the mean over all cells"):
        sd.fit(on_given_graph(data), HELD_OUT, batch_size=BATCH, **QUIET)
