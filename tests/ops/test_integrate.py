"""Integration by trained networks: what they lower, what they reach on real data, and what they leave alone."""

from __future__ import annotations

from functools import partial

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans

import scdiffx as sd
from conftest import _read
from helpers import directional_fd, largest_array, random_direction, tree_vdot
from scdiffx import ops
from scdiffx.ops import _wgan_integrate as wgan
from scdiffx.ops._integration import Cells, discrepancy, features, memberships


@pytest.fixture(scope="module")
def lines() -> ad.AnnData:
    """Every second cell of two cell lines in three data sets: one is a mixture of both."""
    return _read("harmony_cell_lines")[::2].copy()


@pytest.fixture(scope="module")
def clustered(lines: ad.AnnData) -> Cells:
    z = np.asarray(lines.obsm["X_pca"][::4] / lines.obsm["X_pca"].std(), np.float32)
    batch = lines.obs["dataset"].astype("category").cat.codes.to_numpy()[::4].astype(np.int32)
    rng = np.random.default_rng(0)
    return Cells(z, batch, rng.dirichlet(np.ones(3), len(z)).astype(np.float32), 20.0)


def exact_discrepancy(cells: Cells, h: np.ndarray) -> float:
    """From the kernel matrix of all pairs."""
    squared = cdist(h, h, "sqeuclidean")
    kernel = np.mean([np.exp(-squared / (2 * width * cells.spread)) for width in (0.125, 0.5, 1, 2, 8)], 0)
    total = 0.0
    for k in range(cells.member.shape[1]):
        every = cells.member[:, k] / cells.member[:, k].sum()
        for b in range(cells.batch.max() + 1):
            own = cells.member[:, k] * (cells.batch == b)
            difference = own / own.sum() - every
            total += own.sum() * difference @ kernel @ difference
    return total / len(h)


def test_discrepancy_is_that_of_the_kernels(clustered: Cells) -> None:
    exact = exact_discrepancy(clustered, clustered.x)
    estimate = jax.jit(lambda key: discrepancy(clustered, clustered.x, 3, *features(key, 20, clustered.spread)))
    found = np.asarray([float(estimate(jax.random.key(i))) for i in range(40)])
    assert abs(found.mean() - exact) < 4 * found.std() / np.sqrt(len(found))
    assert found.std() < 0.2 * exact


@pytest.mark.slow
def test_a_critic_finds_the_distance_of_two_shifted_samples() -> None:
    import optax

    rng = np.random.default_rng(0)
    batch = np.repeat([0, 1], 300).astype(np.int32)
    h = jnp.asarray(rng.normal(size=(600, 4)) + np.where(batch, 2.0, 0.0)[:, None] * np.eye(4)[0], jnp.float32)
    cells = Cells(h, jnp.asarray(batch), jnp.ones((600, 1), jnp.float32), 1.0)
    given = wgan.weights(cells, 2)
    net, optimizer = wgan.critics(rng, 4, 2), optax.adam(5e-3, b1=0.5, b2=0.9)
    memory = optimizer.init(net)

    @jax.jit
    def step(net, memory, key):
        steps, memory = optimizer.update(jax.grad(wgan.critic_cost)(net, h, cells.batch, given, key), memory)
        return optax.apply_updates(net, steps), memory

    for i in range(400):
        net, memory = step(net, memory, jax.random.key(i))
    # Each batch is half of all cells: the means are 1 apart, and no map of slope 1 tells them further apart.
    assert 0.8 < float(wgan.distance(net, h, given)) < 1.2


def test_clusters_mix_batches_and_keep_cells_apart(lines: ad.AnnData) -> None:
    z = np.asarray(lines.obsm["X_pca"], np.float32)
    batch = lines.obs["dataset"].astype("category").cat.codes.to_numpy().astype(np.int32)
    member = memberships(z, batch, 0)
    np.testing.assert_allclose(member.sum(1), 1, atol=1e-4)
    kind = lines.obs["cell_type"].astype("category").cat.codes.to_numpy()
    by_kind = np.stack([member[kind == k].sum(0) for k in (0, 1)])
    assert (by_kind.max(0) / by_kind.sum(0)) @ member.sum(0) / len(z) > 0.95
    plain = np.eye(30)[KMeans(30, random_state=0).fit_predict(z / np.linalg.norm(z, axis=1, keepdims=True))]

    def diversity(member):
        shares = np.stack([member[batch == b].sum(0) for b in range(3)]) / np.maximum(member.sum(0), 1e-9)
        return (1 - (shares**2).sum(0)) @ member.sum(0) / len(z)

    assert diversity(member) > diversity(plain) + 0.1
    op = ops.Harmony(nclust=30, rounds=2).init(jnp.asarray(z), jnp.asarray(batch), key=jax.random.key(0))
    centroids = op(jnp.asarray(z), jnp.asarray(batch)).centroids
    cosine = z / np.linalg.norm(z, axis=1, keepdims=True) @ np.asarray(centroids).T
    assert diversity(member) > diversity(np.asarray(jax.nn.softmax(20 * cosine))) + 0.05


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivatives_of_what_is_lowered(clustered: Cells) -> None:
    cells = Cells(*(np.asarray(a, np.float64) if a is not clustered.batch else a for a in clustered))
    given, batch = wgan.weights(cells, 3), jnp.asarray(cells.batch)
    net = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), wgan.critics(np.random.default_rng(0), 20, 3))
    frequencies, phases = features(jax.random.key(0), 20, jnp.asarray(20.0))
    for f in (
        jax.jit(lambda h: discrepancy(cells, h, 3, frequencies, phases)),
        jax.jit(lambda h: wgan.critic_cost(net, h, batch, given, jax.random.key(0))),
    ):
        direction = random_direction(cells.x)
        slope = tree_vdot(jax.grad(f)(cells.x), direction)
        assert abs(slope) > 1e-8
        np.testing.assert_allclose(directional_fd(f, cells.x, direction, (1e-5, 1e-6)), slope, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MMDIntegrate", "WGANIntegrate"])
def test_seeds_and_shapes(lines: ad.AnnData, name: str) -> None:
    z = jnp.asarray(lines.obsm["X_pca"][::4], jnp.float32)
    batch = jnp.asarray(lines.obs["dataset"].astype("category").cat.codes.to_numpy()[::4], jnp.int32)
    make = partial(getattr(ops, name), n_hidden=8, training=ops.IntegrationTraining(max_steps=4, check_every=2))
    op = make().init(z, batch, key=jax.random.key(0))
    again, other = (make().init(z, batch, key=jax.random.key(i)) for i in (0, 1))
    np.testing.assert_array_equal(op(z, batch).corrected, again(z, batch).corrected)
    # Training this short makes nothing better, and the weights before it are kept: the course of it differs.
    assert float(other.history["reconstruction"][-1]) != float(op.history["reconstruction"][-1])
    assert op.init(z, batch) is op
    assert len(op.history["mixing"]) == 3
    with pytest.raises(ValueError, match="init"):
        make()(z, batch)
    with pytest.raises(ValueError, match="two batches"):
        make().init(z, 0 * batch)
    sizes = []
    for n in (100, 200):
        total = partial(lambda v, b: op(v, b).corrected.sum(), b=batch[:n])
        sizes.append(largest_array(jax.value_and_grad(total), z[:n]))
    assert sizes[1] <= 2.5 * sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmd", "wgan"])
def test_batches_mix_and_cells_of_other_lines_stay_apart(lines: ad.AnnData, name: str) -> None:
    adata = lines[::3].copy()
    getattr(sd.pp, f"{name}_integrate")(adata, "dataset", progress=False)
    before, after = adata.obsm["X_pca"], adata.obsm[f"X_{name}"]
    batch = adata.obs["dataset"].to_numpy()
    kind = adata.obs["cell_type"].to_numpy()

    def measured(z):
        index = np.argsort(cdist(z, z), axis=1)[:, 1:31]
        shares = np.stack([(batch[index] == b).mean(1) for b in np.unique(batch)])
        return (1 / (shares**2).sum(0)).mean(), (kind[index] == kind[:, None]).mean()

    (mixed_before, kept_before), (mixed, kept) = measured(before), measured(after)
    # Three data sets, of which a cell can meet two: 2 at best.
    assert mixed > mixed_before + 0.4
    assert kept > 0.95 * kept_before
    history = adata.uns[name]["history"]
    assert history["mixing"][history["kept"]] > history["mixing"][0] + 0.15
    assert history["conservation"][0] == 1


@pytest.mark.slow
def test_a_type_that_a_batch_lacks_is_not_drawn_to_others(lines: ad.AnnData) -> None:
    """Without the mixture, each data set is one line: nothing is to be mixed, and nothing is."""
    adata = lines[lines.obs["dataset"] != "half"].copy()
    sd.pp.mmd_integrate(adata, "dataset", progress=False)
    kind = adata.obs["cell_type"].astype("category").cat.codes.to_numpy()
    z = adata.obsm["X_mmd"]
    index = np.argsort(cdist(z, z), axis=1)[:, 1:16]
    assert (kind[index] == kind[:, None]).mean() > 0.95
