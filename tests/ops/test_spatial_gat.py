"""The graph attention autoencoder: the dense formula, what hidden cells may know, blocks, real layers, plans."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import adjusted_rand_score

import scdiffx as sd
from scdiffx import ops
from scdiffx._core.graph import Graph
from scdiffx._core.spatial import neighbors_in_space
from scdiffx.ops._spatial_gat_net import blocks_of, encoded, errors, initial

SMALL = ops.SpatialTraining(n_hidden=8, n_heads=2, prune=0.3, max_steps=40, max_cells=60)


@pytest.fixture(scope="module")
def tissue() -> ad.AnnData:
    """Three stripes in the places of real cells, each with a mean of its own, under noise."""
    where = np.load(Path(__file__).parent / "spatial_squidpy.npz")["coordinates"]
    rng = np.random.default_rng(0)
    stripe = np.digitize(where[:, 1], np.quantile(where[:, 1], [0.3, 0.7]))
    adata = ad.AnnData(np.zeros((len(where), 1), np.float32))
    adata.obsm["spatial"] = where
    adata.obsm["X_pca"] = (np.eye(4)[stripe] + 0.5 * rng.standard_normal((len(where), 4))).astype(np.float32)
    adata.obs["stripe"] = stripe.astype(str)
    adata.obs["slice"] = np.where(np.arange(len(where)) % 2, "odd", "even")
    return adata


def placed(tissue: ad.AnnData) -> tuple[np.ndarray, Graph, np.ndarray]:
    x, near = np.asarray(tissue.obsm["X_pca"]), neighbors_in_space(tissue.obsm["spatial"])
    return x, Graph.from_scipy(near), near.toarray() > 0


def dense(net: dict, near: np.ndarray, x: np.ndarray, clusters: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """The embedding with full matrices; both attentions count the same."""

    def elu(a: np.ndarray) -> np.ndarray:
        return np.where(a > 0, a, np.expm1(np.minimum(a, 0)))

    def attention(i: int, h: np.ndarray, a: np.ndarray, edges: np.ndarray) -> np.ndarray:
        receive, send = ((h @ net[name][i]).reshape(len(h), *a.shape) for name in ("receive", "send"))
        joint = receive[:, None] + send[None]
        weight = np.exp((np.where(joint > 0, joint, 0.2 * joint) * a).sum(-1)) * edges[..., None]
        total = weight.sum(1, keepdims=True)
        return np.einsum("ijh,jhd->ihd", weight / np.where(total > 0, total, 1), send).reshape(len(h), -1)

    h = elu((x - net["mean"]) / np.exp(net["log_scale"]) @ net["enter"] + net["enter_shift"]) * shown[:, None]
    own = near | np.eye(len(x), dtype=bool)
    for i in range(2):
        edges = own & shown if i == 0 else own
        within = edges & (clusters[:, None] == clusters)
        both = attention(i, h, net["attend"][i], edges) + attention(i, h, net["attend_within"][i], within)
        h = elu(both / 2 + net["shift"][i])
    return h @ net["latent"]


def test_the_embedding_is_the_dense_formula_and_hidden_cells_have_no_part(tissue: ad.AnnData) -> None:
    x, graph, near = placed(tissue)
    rng = np.random.default_rng(1)
    net = initial(x, SMALL, 3, rng)
    net |= {name: 10 * net[name] for name in ("attend", "attend_within")} | {"shift": 0.1 + net["shift"]}
    clusters, shown = rng.integers(0, 2, len(x)), rng.random(len(x)) < 0.5
    embed = jax.jit(lambda x: encoded(net, graph, x, clusters, 0.5, jnp.asarray(shown)))
    np.testing.assert_allclose(embed(x), dense(net, near, x, clusters, shown), atol=1e-5)
    np.testing.assert_array_equal(embed(np.where(shown[:, None], x, 100 + x)), embed(x))
    decoded = np.asarray(embed(x)) @ net["decode"]
    scaled = (x - net["mean"]) / np.exp(net["log_scale"])
    np.testing.assert_allclose(errors(net, embed(x), x), ((scaled - decoded) ** 2).sum(1), rtol=1e-4)


def test_blocks_hold_every_cell_once_and_know_all_that_reaches_it(tissue: ad.AnnData) -> None:
    x, graph, _ = placed(tissue)
    net = initial(x, SMALL, 3, np.random.default_rng(1))
    clusters, train = np.arange(len(x)) % 2, np.arange(len(x)) % 5 > 0
    parts = blocks_of(x, graph, clusters, train, SMALL)
    assert len({tuple(a.shape for a in jax.tree.leaves(part)) for part in parts}) == 1
    assert sum(part.core.sum() for part in parts) == len(x) > SMALL.max_cells >= max(p.core.sum() for p in parts)
    assert sum((part.core & part.train).sum() for part in parts) == train.sum()
    (whole,) = blocks_of(x, graph, clusters, train, SMALL._replace(max_cells=len(x)))
    embed = jax.jit(lambda b: encoded(net, b.graph, b.x, b.clusters, 0.5, b.train))
    found = np.concatenate([np.asarray(embed(part))[part.core] for part in parts])
    order = np.lexsort(np.concatenate([part.x[part.core] for part in parts]).T)
    np.testing.assert_allclose(found[order], np.asarray(embed(whole))[np.lexsort(x.T)], atol=1e-5)


@pytest.mark.slow
def test_stripes_are_found_on_blocks_of_two_slices_and_the_seed_decides(tissue: ad.AnnData) -> None:
    x, where = jnp.asarray(tissue.obsm["X_pca"]), tissue.obsm["spatial"]
    batch = jnp.asarray((tissue.obs["slice"] == "odd").to_numpy(), jnp.int32)
    op = ops.SpatialAutoencoder(
        mixture=ops.TiedMixture(n_init=2),
        n_domains=3,
        settings=ops.SpatialSettings(n_comps=3),
        training=SMALL._replace(max_steps=100, learning_rate=0.01, prune=None, n_layers=1),
    )
    fitted, again = (op.init(x, where, None, batch, key=jax.random.key(3)) for _ in range(2))
    result = jax.jit(lambda op, *args: op(*args))(fitted, x, where, None, batch)
    assert adjusted_rand_score(tissue.obs["stripe"], np.asarray(result.labels)) > 0.8
    for a, b in zip(jax.tree.leaves(fitted), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    # What space tells of a cell is the mean of its stripe: the other variance is noise.
    held = np.asarray(fitted.history["validation"])
    stripe = tissue.obs["stripe"].astype(int).to_numpy()
    noise = sum(float(((x[stripe == i] - x[stripe == i].mean(0)) ** 2).sum()) for i in range(3))
    assert held.min() < 0.3 + 0.7 * noise / float(((x - x.mean(0)) ** 2).sum())
    assert len(fitted.pattern.owner)
    p = fitted.pattern
    joined = np.asarray(batch)[np.asarray(p.indices)[: len(x)]] == np.asarray(batch)[:, None]
    assert (joined | ~np.asarray(p.valid)[: len(x)]).all()
    assert float(fitted.loss(x, where, None, batch)) > 0


def test_a_net_is_not_trained_again_and_new_cells_are_searched(tissue: ad.AnnData) -> None:
    x, where = jnp.asarray(tissue.obsm["X_pca"]), tissue.obsm["spatial"]
    net = {name: jnp.asarray(w) for name, w in initial(np.asarray(x), SMALL, 3, np.random.default_rng(0)).items()}
    op = ops.SpatialAutoencoder(
        net=net, n_domains=2, mixture=ops.TiedMixture(n_init=1), training=SMALL._replace(prune=None)
    ).init(x, where)
    moved = op.init(x[:80], where[:80])
    assert moved.net is net
    assert (op.pattern.n_cells, moved.pattern.n_cells) == (len(x), 80)
    assert moved.mixture is op.mixture
    with pytest.raises(ValueError, match="takes 4 features, got 3"):
        op(x[:, :3])
    for settings, match in (({"n_hidden": 9}, "multiple"), ({"masked": 1.0}, "masked"), ({"n_layers": 0}, "n_layers")):
        with pytest.raises(ValueError, match=match):
            ops.SpatialAutoencoder(training=ops.SpatialTraining(**settings)).init(x, where)
    with pytest.raises(ValueError, match="needs its network"):
        ops.SpatialAutoencoder()(x, graph=placed(tissue)[1])
    with pytest.raises(ValueError, match="at least 10 cells"):
        ops.SpatialAutoencoder().init(x[:5], where[:5])


@pytest.mark.slow
def test_the_net_is_tuned_in_a_plan_and_a_saved_fit_places_new_cells(tissue: ad.AnnData, tmp_path: Path) -> None:
    adata = tissue.copy()
    plan = sd.plan(adata)
    sd.tl.spatial_domains(plan, 3, method="gat", n_comps=3, n_init=1, max_steps=20)
    loss = sd.losses.cross_entropy("spatial_domain_probabilities", "stripe")
    fitted = sd.fit(plan, loss, optimizer=optax.adam(1e-3), n_steps=10, progress=False)
    assert fitted.losses["train_after"] < fitted.losses["train_before"]
    fitted.save(tmp_path / "fit")
    new = adata[:200].copy()
    sd.Fitted.load(tmp_path / "fit").apply(new)
    assert new.obsm["X_spatial_domain"].shape == (200, 3)


@pytest.mark.slow
def test_layers_of_a_cortex_are_found(data_dir: Path) -> None:
    adata = ad.read_h5ad(data_dir / "dlpfc_151510" / "dlpfc_151510.h5ad")
    # Two fifths of the slice, across all layers.
    across = adata.obsm["spatial"][:, 1]
    adata = adata[across < np.quantile(across, 0.4)].copy()
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    sd.pp.pca(adata, n_comps=30)
    sd.tl.spatial_domains(adata, 7, method="gat", n_init=2, max_steps=40)
    known = (adata.obs["layer"].astype(str) != "NA").to_numpy()
    score = adjusted_rand_score(adata.obs["layer"][known], adata.obs["spatial_domain"][known])
    assert score > 0.35
    assert adata.uns["spatial_domain"]["held_out_error"] < 0.65
