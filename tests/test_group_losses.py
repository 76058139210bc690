"""Losses on groups of cells: their definitions, what they reward, derivatives, and their place in a fit."""

from __future__ import annotations

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.spatial.distance import cdist
from sklearn.metrics import calinski_harabasz_score

import scdiffx as sd
from conftest import _read
from helpers import directional_fd, largest_array, random_direction, tree_vdot
from scdiffx.losses._groups import BatchMixing, Compactness, Entropy, Modularity


@pytest.fixture(scope="module")
def lines() -> ad.AnnData:
    """Every second cell of two cell lines in three data sets: one is a mixture of both."""
    return _read("harmony_cell_lines")[::2].copy()


@pytest.fixture(scope="module")
def embedded(lines: ad.AnnData) -> tuple[jax.Array, jax.Array, jax.Array]:
    codes = lines.obs["dataset"].astype("category").cat.codes.to_numpy()
    return jnp.asarray(lines.obsm["X_pca"], jnp.float32), jnp.asarray(codes, jnp.int32), jnp.ones(len(codes), bool)


def mixing_of(z: jax.Array, batch: jax.Array, keep: jax.Array) -> tuple[float, jax.Array]:
    term = BatchMixing(output="z", target="b").init(z, batch, keep)
    loss, slope = jax.value_and_grad(term)(z, batch, keep)
    return float(loss), slope


def lisi(z: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The index with equal weights of the 30 nearest other cells, cell by cell."""
    index = np.argsort(cdist(z, z), axis=1)[:, 1:31]
    shares = np.stack([(labels[index] == name).mean(1) for name in np.unique(labels)])
    return 1 / (shares**2).sum(0)


def test_mixing_follows_lisi_cell_by_cell(embedded):
    z, batch, keep = embedded
    term = BatchMixing(output="z", target="b").init(z, batch, keep)
    cells = np.random.default_rng(0).choice(len(z), 150, replace=False)
    one = jax.jit(lambda i: term(z, batch, jnp.arange(len(z)) == i))
    ours = np.asarray([float(one(i)) for i in cells])
    theirs = lisi(np.asarray(z), np.asarray(batch))[cells]
    # .89 over all cells; of thirty neighbours counted alike, the index itself knows few values.
    assert scipy.stats.spearmanr(-ours, theirs).statistic > 0.85


@pytest.mark.slow
def test_mixing_ranks_uncorrected_corrected_and_shuffled_cells(lines, embedded):
    z, batch, keep = embedded
    corrected = lines.copy()
    sd.pp.harmony_integrate(corrected, "dataset")
    shuffled = z[np.random.default_rng(0).permutation(len(z))]
    before, after, none = (
        mixing_of(x, batch, keep)[0] for x in (z, jnp.asarray(corrected.obsm["X_pca_harmony"]), shuffled)
    )
    # The index itself says .88, .60 and about 0: only one of the three data sets holds both cell lines.
    assert none < after - 0.3 < before - 0.4
    assert abs(none) < 0.05


def test_mixing_is_not_lowered_by_shrinking_and_has_a_derivative_where_batches_are_apart(embedded):
    z, batch, keep = embedded
    loss, _ = mixing_of(z, batch, keep)
    assert mixing_of(1e-3 * z, batch, keep)[0] == pytest.approx(loss, abs=1e-3)
    apart, slope = mixing_of(z.at[:, 0].add(100 * z[:, 0].std() * batch), batch, keep)
    assert loss < apart <= 1
    assert apart > 0.99
    assert bool(jnp.isfinite(slope).all())
    # A step against the derivative brings every batch but the middle one towards the others.
    pulls = [float(slope[np.asarray(batch) == b, 0].mean()) for b in (0, 2)]
    assert pulls[0] < 0 < pulls[1]
    loss, slope = mixing_of(0 * z, batch, keep)
    assert np.isfinite(loss)
    assert not np.asarray(slope).any()


def test_held_out_cells_do_not_enter_the_mixing_of_the_others(embedded):
    z, batch, _ = embedded
    keep = jnp.arange(len(z)) % 3 > 0
    term = BatchMixing(output="z", target="b").init(z, batch, keep)
    assert np.asarray(keep)[np.asarray(term.neighbors)].all()
    moved = jnp.where(keep[:, None], z, 100.0)
    again = BatchMixing(output="z", target="b").init(moved, batch, keep)
    assert float(term(z, batch, keep)) == pytest.approx(float(again(moved, batch, keep)), abs=1e-6)
    assert not (np.asarray(term.neighbors) == np.arange(len(z))[:, None]).any()


def test_neighbours_for_mixing_are_the_nearest_other_cells_of_each_batch(embedded):
    z, batch, keep = embedded
    term = BatchMixing(output="z", target="b").init(z, batch, keep)
    distance = cdist(np.asarray(z, np.float64), np.asarray(z, np.float64))
    np.fill_diagonal(distance, np.inf)
    for b in range(3):
        found = np.asarray(term.neighbors)[:, np.asarray(term.batches) == b]
        nearest = np.sort(distance[:, np.asarray(batch) == b], 1)[:, : found.shape[1]]
        np.testing.assert_allclose(np.sort(np.take_along_axis(distance, found, 1), 1), nearest, rtol=1e-4)


def test_compactness_is_one_minus_the_variance_between(embedded):
    z, group, keep = embedded
    term = Compactness(output="z", target="g").init(z, group, keep)
    within = float(term(z, group, keep))
    ratio = calinski_harabasz_score(np.asarray(z), np.asarray(group))
    n, k = len(z), 3
    assert within == pytest.approx(1 / (1 + ratio * (k - 1) / (n - k)), rel=1e-4)
    assert float(term(1e-3 * z + 2, group, keep)) == pytest.approx(within, rel=1e-2)
    assert float(term(group[:, None].astype(z.dtype), group, keep)) == pytest.approx(0, abs=1e-6)
    loss, slope = jax.value_and_grad(term)(0 * z + 0.3, group, keep)
    assert float(loss) == 1
    assert not np.asarray(slope).any()
    unknown = jnp.where(jnp.arange(n) < 50, -1, group)
    assert float(term(z, unknown, keep)) == pytest.approx(float(term(z[50:], group[50:], keep[50:])), rel=1e-5)


@pytest.mark.parametrize("resolution", [1.0, 0.5])
def test_modularity_of_hard_memberships_is_igraphs(pbmc68k_reduced, resolution):
    import igraph

    graph = sd.ops.Graph.from_scipy(pbmc68k_reduced.obsp["connectivities"])
    op = sd.ops.Leiden().init(graph)
    a = graph.to_scipy().tocoo()
    upper = a.row < a.col
    g = igraph.Graph(n=a.shape[0], edges=np.column_stack([a.row, a.col])[upper].tolist())
    theirs = g.modularity(np.asarray(op.membership).tolist(), a.data[upper].tolist(), resolution=resolution)
    hard = jax.nn.one_hot(op.membership, len(op.communities))
    term = Modularity(output="p", resolution=resolution)
    every = jnp.ones(len(hard), bool)
    assert 1 - float(term(hard, graph, every)) == pytest.approx(theirs, abs=1e-5)
    sharp = sd.ops.Leiden(temperature=1e-4).init(graph)(graph).probabilities
    decided = jax.nn.one_hot(sharp.argmax(1), sharp.shape[1])
    assert float(term(sharp, graph, every)) == pytest.approx(float(term(decided, graph, every)), abs=1e-4)
    soft = op(graph).probabilities
    assert float(term(hard, graph, every)) < float(term(soft, graph, every)) < 1


def test_modularity_leaves_masked_cells_out(pbmc68k_reduced):
    matrix = pbmc68k_reduced.obsp["connectivities"]
    keep = np.arange(matrix.shape[0]) % 4 > 0
    p = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(3), len(keep)), jnp.float32)
    all_of = Modularity(output="p")(p, sd.ops.Graph.from_scipy(matrix), jnp.asarray(keep))
    alone = Modularity(output="p")(p[keep], sd.ops.Graph.from_scipy(matrix[keep][:, keep]), jnp.ones(keep.sum(), bool))
    assert float(all_of) == pytest.approx(float(alone), abs=1e-5)


def test_entropy_is_scipys_relative_to_even_shares():
    p = np.random.default_rng(0).dirichlet(np.ones(4), 50)
    p[0] = [1, 0, 0, 0]
    keep = np.arange(50) % 5 > 0
    given = jnp.asarray(p, jnp.float32), None, jnp.asarray(keep)
    cells = scipy.stats.entropy(p[keep], axis=1).mean() / np.log(4)
    groups = scipy.stats.entropy(p[keep].mean(0)) / np.log(4)
    assert float(Entropy(output="p")(*given)) == pytest.approx(cells, abs=1e-5)
    assert float(Entropy(output="p", of="groups")(*given)) == pytest.approx(groups, abs=1e-5)
    assert bool(jnp.isfinite(jax.grad(Entropy(output="p"))(*given)).all())


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivatives_are_those_of_finite_differences(embedded, pbmc68k_reduced):
    z, batch = np.asarray(embedded[0][::4] / embedded[0].std(), np.float64), embedded[1][::4]
    keep = jnp.arange(len(z)) % 5 > 0
    graph = sd.ops.Graph.from_scipy(pbmc68k_reduced.obsp["connectivities"].astype(np.float64))
    p = np.random.default_rng(0).dirichlet(np.ones(3), 700)
    some = jnp.arange(700) % 5 > 0
    mixing = BatchMixing(output="z", target="b").init(z, batch, keep)
    cases = [
        (mixing, z, batch, keep),
        (Compactness(output="z", target="b").init(z, batch, keep), z, batch, keep),
        (Modularity(output="p", resolution=0.7), p, graph, some),
        (Entropy(output="p"), p, None, some),
        (Entropy(output="p", of="groups"), p, None, some),
    ]
    for term, value, target, mask in cases:
        f = jax.jit(lambda v, term=term, target=target, mask=mask: term(v, target, mask))
        direction = random_direction(value) * (0.1 * value if value is p else 1)
        slope = tree_vdot(jax.grad(f)(value), direction)
        assert abs(slope) > 1e-6
        # The nearest neighbour of some cell changes at longer steps.
        np.testing.assert_allclose(directional_fd(f, value, direction, (1e-5, 1e-6)), slope, rtol=1e-5)


def test_no_array_grows_with_the_square_of_the_cells(embedded):
    z, batch, keep = embedded
    sizes = []
    for n in (400, 800):
        term = BatchMixing(output="z", target="b").init(z[:n], batch[:n], keep[:n])
        sizes.append(largest_array(jax.value_and_grad(term), z[:n], batch[:n], keep[:n]))
    assert sizes[1] <= 2.5 * sizes[0]


@pytest.mark.slow
def test_neighbours_for_mixing_are_found_anew_in_a_fit(lines):
    adata = lines.copy()
    plan = sd.plan(adata)
    sd.pp.harmony_integrate(plan, "dataset", max_iter_harmony=2, theta=0.1)
    losses = sd.losses.batch_mixing("X_pca_harmony", "dataset") + sd.losses.compactness("X_pca_harmony", "cell_type")
    fit = sd.fit(plan, losses, learn="harmony.theta", n_steps=3, refresh_every=1, holdout=0.3, progress=False)
    assert fit.losses["train_after"] < fit.losses["train_before"]


@pytest.mark.slow
def test_a_loss_on_memberships_reaches_the_weights_of_the_graph(pbmc68k_reduced):
    plan = sd.plan(pbmc68k_reduced)
    sd.pp.neighbors(plan, n_neighbors=10, use_rep="X_pca")
    sd.tl.leiden(plan)
    loss = sd.losses.modularity("leiden_probabilities") + 0.1 * sd.losses.entropy("leiden_probabilities")
    fit = sd.fit(plan, loss, n_steps=3, refresh_every=2, progress=False)
    assert fit.losses["train_after"] < fit.losses["train_before"]


def alike(term):
    return term.init(jnp.ones((4, 2)), jnp.zeros(4, jnp.int32), jnp.ones(4, bool))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sd.losses.batch_mixing("z", "b", n_neighbors=1), "n_neighbors=1"),
        (lambda: sd.losses.modularity("p", resolution=-1), "resolution=-1"),
        (lambda: sd.losses.entropy("p", of="genes"), "of='genes'"),
        (
            lambda: BatchMixing(output="z", target="b").init(jnp.ones((4, 2)), jnp.zeros(4, int), jnp.ones(4, bool)),
            "'b'",
        ),
        (
            lambda: Compactness(output="z", target="g").init(jnp.ones((4, 2)), jnp.zeros(4, int), jnp.ones(4, bool)),
            "'g'",
        ),
        (lambda: Entropy(output="p")(jnp.ones(4), None, jnp.ones(4, bool)), "'p' has shape"),
    ],
)
def test_what_is_not_usable_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()
