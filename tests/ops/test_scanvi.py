"""The semi-supervised autoencoder on blood cells: bound, training, labels; derivatives of the call: test_contract."""

from __future__ import annotations

import functools
from pathlib import Path

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import special, stats
from sklearn.metrics import f1_score

import scdiffx as sd
from helpers import QUICK, called, directional_fd, pbmc_counts, random_direction, tree_vdot
from scdiffx import ops
from scdiffx._core.fields import replace
from scdiffx.ops import _scanvi_fit, _scanvi_net, _vae
from scdiffx.tl._annotate_scanvi import _sources

CELLS, GENES, LATENT, HIDDEN, TYPES = 12, 30, 3, 5, 4
SHORT = ops.VAE(
    n_latent=5, n_hidden=32, training=ops.Training(max_epochs=15, batch_size=64, learning_rate=5e-3, warmup=10)
)
LABELLED = ops.SemiSupervisedTraining(max_epochs=6, n_folds=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def adata() -> ad.AnnData:
    return pbmc_counts(500, 250)


@pytest.fixture(scope="module")
def labels(adata: ad.AnnData) -> tuple[np.ndarray, np.ndarray]:
    """The types of the cells as numbers, and the labels that are known: a tenth, at least two of each type."""
    types = adata.obs["cell_type"].cat.remove_unused_categories().cat.codes.to_numpy(np.int32)
    known = np.full(len(types), -1, np.int32)
    for code in np.unique(types):
        members = np.flatnonzero(types == code)
        known[members[: max(2, len(members) // 10)]] = code
    return types, known


@pytest.fixture(scope="module")
def trained(adata: ad.AnnData, labels: tuple[np.ndarray, np.ndarray]) -> ops.SemiSupervisedVAE:
    x = ops.Counts.from_scipy(adata.X)
    return ops.SemiSupervisedVAE(vae=SHORT, training=LABELLED).init(x, None, labels[1], key=jax.random.key(0))


bound = jax.jit(_scanvi_net.bound, static_argnums=(5,), compiler_options=QUICK)


@functools.cache
def weights(likelihood: str = "nb", batches: int = 2) -> dict[str, np.ndarray]:
    """Random networks of all parts, in double precision."""
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(1.5, (CELLS, GENES)).astype(np.float32))
    vae = ops.VAE(n_latent=LATENT, n_hidden=HIDDEN, likelihood=likelihood)
    codes = np.arange(CELLS) % batches
    net = _vae.initial(vae, counts, codes, batches, rng) | _scanvi_net.initial(LATENT, HIDDEN, TYPES, rng)
    return {name: value + 0.3 * rng.normal(size=value.shape) for name, value in net.items()}


def example() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "x": rng.poisson(1.5, (CELLS, GENES)).astype(float),
        "batch": np.arange(CELLS) % 2,
        "label": np.where(np.arange(CELLS) % 3 == 0, np.arange(CELLS) % TYPES, -1),
        "first": rng.normal(size=(CELLS, LATENT)),
        "second": rng.normal(size=(CELLS, TYPES, LATENT)),
    }


def normed(h: np.ndarray, gain: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5) * gain + bias


def reference(net: dict[str, np.ndarray], d: dict[str, np.ndarray], likelihood: str) -> np.ndarray:
    """The bound of each cell by scipy's distributions, one cell and one type at a time."""
    found = []
    for x, b, y, e1, e2 in zip(*d.values(), strict=True):
        h = np.maximum(
            normed(np.log1p(x * GENES / x.sum()) @ net["encoder_in"], net["encoder_gain"], net["encoder_bias"]), 0
        )
        mean, log_std = np.split(h @ net["encoder_out"] + net["encoder_out_bias"], 2)
        log_std = np.clip(log_std, -6, 3)
        z1 = mean + np.exp(log_std) * e1
        rate = special.softmax(
            np.maximum(z1 @ net["decoder_in"] + net["decoder_batch"][b], 0) @ net["decoder_out"] + net["gene_bias"][b]
        )
        r = np.exp(np.clip(net["log_theta"][0], -7, 9))
        log_p = stats.nbinom.logpmf(x, r, r / (r + rate * x.sum()))
        if likelihood == "zinb":
            off = special.expit(z1 @ net["dropout"] + net["dropout_bias"])
            log_p = np.log(off * (x == 0) + (1 - off) * np.exp(log_p))
        h = np.maximum(normed(z1 @ net["classifier_in"], net["classifier_gain"], net["classifier_bias"]), 0)
        chance = special.softmax(h @ net["classifier_out"] + net["classifier_out_bias"])
        chance = chance if y < 0 else np.eye(TYPES)[y]
        value = log_p.sum() - stats.norm.logpdf(z1, mean, np.exp(log_std)).sum()
        for k in range(TYPES):
            h = np.maximum(z1 @ net["inner_in"] + net["inner_type"][k], 0)
            m2, s2 = np.split(h @ net["inner_out"] + net["inner_out_bias"], 2)
            s2 = np.clip(s2, -6, 3)
            h = np.maximum((m2 + np.exp(s2) * e2[k]) @ net["outer_in"] + net["outer_type"][k], 0)
            m1, s1 = np.split(h @ net["outer_out"] + net["outer_out_bias"], 2)
            divergence = (np.exp(2 * s2) + m2**2 - 1 - 2 * s2).sum() / 2
            value += chance[k] * (stats.norm.logpdf(z1, m1, np.exp(np.clip(s1, -6, 3))).sum() - divergence)
        found.append(value - stats.entropy(chance, np.full(TYPES, 1 / TYPES)))
    return np.array(found)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_the_bound_is_that_of_its_distributions(likelihood: str) -> None:
    d, net = example(), weights(likelihood)
    x = jnp.asarray(d["x"])
    fit, divergence = bound(net, x, d["batch"], d["label"], (d["first"], d["second"]), likelihood)
    extra = jnp.where(x > 0, _vae.coefficient(jnp.where(x > 0, x, 1), _vae.log_theta(net, d["batch"])), 0).sum(1)
    expected = reference(net, d, likelihood)
    np.testing.assert_allclose(fit + extra - divergence, expected, rtol=1e-5)
    # Labels matter, and so does every type of a cell without one.
    assert np.abs(reference(net, d | {"label": np.full(CELLS, -1)}, likelihood) - expected)[::3].min() > 1e-3


@pytest.mark.usefixtures("x64")
def test_at_the_start_the_bound_is_the_autoencoders() -> None:
    d = example()
    net = weights() | _scanvi_net.initial(LATENT, HIDDEN, TYPES, np.random.default_rng(2))
    noise = jnp.asarray(d["first"]), jnp.asarray(d["second"])
    fit, divergence = bound(net, d["x"], d["batch"], np.full(CELLS, -1), noise, "nb")
    plain_fit, _ = _vae.bound(net, d["x"], d["batch"], noise[0], "nb")
    mean, std = _vae.encode(net, d["x"])
    z = np.asarray(mean + std * noise[0])
    plain = (stats.norm.logpdf(z, mean, std) - stats.norm.logpdf(z)).sum(1)
    np.testing.assert_allclose(fit, plain_fit, rtol=1e-10)
    np.testing.assert_allclose(divergence, plain, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivatives_of_the_loss_match_finite_differences() -> None:
    d = example()
    x = ops.Counts.from_scipy(sp.csr_matrix(d["x"]))
    op = ops.SemiSupervisedVAE(net=weights(), temperature=1.0)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(net: dict[str, jax.Array], values: jax.Array) -> tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]:
        def value(net: dict[str, jax.Array], values: jax.Array) -> jax.Array:
            return replace(op, net=net).loss(x.with_data(values), d["batch"], d["label"])

        return jax.value_and_grad(value, argnums=(0, 1))(net, values)

    net = {name: jnp.asarray(value) for name, value in weights().items()}
    by_net, by_counts = both(net, x.data)[1]
    for name in net:
        step = jnp.asarray(random_direction(net[name], seed=3))
        exact = tree_vdot(by_net[name], step)
        assert exact != 0, name
        numeric = directional_fd(lambda v, n=name: both(net | {n: v}, x.data)[0], net[name], step, steps=(1e-5, 1e-6))
        assert np.abs(numeric / exact - 1).min() < 1e-5, name
    step = jnp.where(x.data > 0, jnp.asarray(random_direction(x.data, seed=3)), 0)
    numeric = directional_fd(lambda v: both(net, v)[0], x.data, step, steps=(1e-5, 1e-6))
    assert np.abs(numeric / tree_vdot(by_counts, step) - 1).min() < 1e-5
    # The classification loss counts as it should.
    alone = replace(op, training=ops.SemiSupervisedTraining(classification_weight=0.0))
    entropy = _scanvi_net.entropy(net, jnp.asarray(d["x"]), d["label"])[d["label"] >= 0].mean()
    assert float(both(net, x.data)[0]) == pytest.approx(float(alone.loss(x, d["batch"], d["label"]) + 50 * entropy))


@pytest.mark.slow
def test_few_labels_name_the_other_cells(
    adata: ad.AnnData, labels: tuple[np.ndarray, np.ndarray], trained: ops.SemiSupervisedVAE
) -> None:
    types, known = labels
    x = ops.Counts.from_scipy(adata.X)
    result = called(trained, x, None, known)
    query = known < 0
    told = np.asarray(result.probabilities).argmax(1)
    score = f1_score(types[query], told[query], average="macro")
    rng = np.random.default_rng(0)
    assert score > f1_score(types[query], rng.permutation(told[query]), average="macro") + 0.3
    np.testing.assert_array_equal(np.asarray(result.types)[~query], known[~query])
    np.testing.assert_array_equal(np.asarray(result.confidence)[~query], 1)
    np.testing.assert_allclose(np.asarray(result.probabilities).sum(1), 1, rtol=1e-5)
    assert (np.asarray(result.types)[query] == np.where(np.asarray(result.confidence) < 0.5, -1, told)[query]).all()
    sharper = called(replace(trained, temperature=trained.temperature / 4), x, None, known)
    assert float(sharper.probabilities.max(1).mean()) > float(result.probabilities.max(1).mean()) + 0.01
    assert trained.history["bound"][-1] < trained.history["bound"][0]
    assert trained.history["classification"][-1] < 0.5 * trained.history["classification"][0]


@pytest.mark.slow
def test_clusters_vote(
    trained: ops.SemiSupervisedVAE, adata: ad.AnnData, labels: tuple[np.ndarray, np.ndarray]
) -> None:
    result = called(trained, ops.Counts.from_scipy(adata.X), None, labels[1], np.zeros(500, np.int32))
    assert len(np.unique(np.asarray(result.types)[labels[1] < 0])) == 1
    np.testing.assert_array_equal(np.asarray(result.types)[labels[1] >= 0], labels[1][labels[1] >= 0])


@pytest.mark.slow
def test_genes_apart_are_not_seen(trained: ops.SemiSupervisedVAE, adata: ad.AnnData) -> None:
    order = np.random.default_rng(0).permutation(250)
    wider = sp.hstack([adata.X[:, np.argsort(order)], np.ones((500, 50), np.float32)]).tocsr()
    found = called(replace(trained, genes=jnp.asarray(order, jnp.int32)), ops.Counts.from_scipy(wider))
    np.testing.assert_allclose(found.latent, called(trained, ops.Counts.from_scipy(adata.X)).latent, atol=1e-4)


def test_the_temperature_suits_held_out_cells() -> None:
    rng = np.random.default_rng(0)
    codes = np.r_[rng.integers(0, 3, 4000), 3]
    logits = rng.normal(0, 1.5, (4001, 4))
    logits[:, 3] = -20
    codes[:-1] = [rng.choice(3, p=special.softmax(row[:3])) for row in logits[:-1]]
    square = np.linspace(0, 1, 4001)
    heat, limit, accuracy, error = _scanvi_fit.checked(3 * logits, square, codes)
    np.testing.assert_allclose(limit, 0.98, atol=0.02)
    assert heat == pytest.approx(3, rel=0.1)
    assert error < 0.04
    assert accuracy == pytest.approx((logits[:-1].argmax(1) == codes[:-1]).mean(), abs=1e-9)
    with pytest.warns(UserWarning, match="19 labelled cells can be held out, and 20 are needed"):
        heat, limit, accuracy, _ = _scanvi_fit.checked(logits[:19], square[:19], np.zeros(19, int))
    assert heat == 1
    assert np.isposinf(limit).all()
    assert np.isnan(accuracy)


def test_each_label_is_drawn_as_often_as_allowed() -> None:
    cells = _scanvi_fit.Cells(None, np.zeros(100, int), np.r_[np.zeros(60, int), np.ones(10, int), np.full(30, -1)])
    drawn = _scanvi_fit._cycled(cells, 20, 90, np.random.default_rng(0))
    times = np.bincount(drawn, minlength=100)
    assert times[70:].sum() == 0
    assert (times[times > 0] == 3).all()
    assert (times[:60] > 0).sum() == 20
    assert (times[60:70] > 0).all()


@pytest.mark.slow
def test_what_is_missing_is_said(adata: ad.AnnData, trained: ops.SemiSupervisedVAE) -> None:
    x = ops.Counts.from_scipy(adata.X)
    assert trained.init(x) is trained
    with pytest.raises(ValueError, match=r"init\(x, batch, labels\)"):
        ops.SemiSupervisedVAE()(x)
    with pytest.raises(ValueError, match="needs labels"):
        ops.SemiSupervisedVAE().init(x)
    with pytest.raises(ValueError, match="without gaps"):
        ops.SemiSupervisedVAE().init(x, None, np.where(np.arange(500) < 9, 1, -1))


def test_the_same_name_in_reference_and_query_is_not_the_same_batch() -> None:
    reference = ad.AnnData(np.ones((3, 2)), obs=pd.DataFrame({"day": ["a", "b", "a"]}, index=list("xyz")))
    query = ad.AnnData(np.ones((2, 2)), obs=pd.DataFrame({"day": ["b", "a"]}, index=list("uv")))
    np.testing.assert_array_equal(_sources(reference, query, "day", np.array([0, 1])), [0, 1, 3, 2])
    np.testing.assert_array_equal(_sources(reference, query, None, np.array([0, 2])), [0, 0, 1, 1])


@pytest.fixture(scope="module")
def joined(adata: ad.AnnData) -> tuple[ad.AnnData, ad.AnnData, ad.AnnData]:
    """A reference with some labels, a query with fewer genes in another order, and what a user would join them to."""
    order = np.random.default_rng(0).permutation(250)[:200]
    reference, query = adata[:300].copy(), adata[300:, order].copy()
    reference.obs["type"] = reference.obs["cell_type"].where(np.arange(300) % 4 > 0)
    labelled = reference[reference.obs["type"].notna().to_numpy()]
    both = ad.concat([labelled, query[:, reference.var_names[np.sort(order)]]], label="source", keys=["1", "2"])
    both.obs["type"] = [*labelled.obs["type"].astype(str), *[None] * 200]
    return reference, query, both


SETTINGS = {"mode": "scanvi", "labels_key": "type", "n_latent": 4, "max_epochs": 1, "rng": 5}


@pytest.mark.slow
def test_a_reference_is_joined_with_the_query(joined: tuple[ad.AnnData, ad.AnnData, ad.AnnData]) -> None:
    reference, query, both = joined
    found = sd.tl.annotate(query, reference=reference, copy=True, **SETTINGS)
    expected = sd.tl.annotate(both, batch_key="source", copy=True, **SETTINGS)[-200:]
    assert found.n_obs == 200
    assert list(found.uns["annotation"]["names"]) == list(expected.uns["annotation"]["names"])
    for key in ("X_scanvi", "annotation_probabilities"):
        np.testing.assert_allclose(np.asarray(found.obsm[key]), np.asarray(expected.obsm[key]), atol=1e-4)
    # One label of each type: nothing can be held out.
    few = both.copy()
    few.obs["type"] = few.obs["type"].where(~few.obs["type"].duplicated())
    with pytest.warns(UserWarning, match="0 labelled cells can be held out"):
        sd.tl.annotate(few, batch_key="source", **SETTINGS)
    assert few.uns["annotation"]["unlike"] == 0
    assert np.isfinite(few.obs["annotation_confidence"]).all()
    with pytest.raises(TypeError, match="reference is a str"):
        sd.tl.annotate(query, mode="scanvi", labels_key="type", reference="folder")


@pytest.mark.slow
def test_in_a_plan_it_can_be_fitted_and_saved(
    joined: tuple[ad.AnnData, ad.AnnData, ad.AnnData], tmp_path: Path
) -> None:
    part, again = joined[2].copy(), joined[2].copy()
    plan = sd.plan(part)
    sd.tl.annotate(plan, batch_key="source", **SETTINGS)
    loss = sd.losses.cross_entropy("X_scanvi", "type")
    fitted = sd.fit(plan, loss, optimizer=optax.adam(1e-3), n_steps=6, progress=False)
    assert fitted.losses["train_after"] < fitted.losses["train_before"]
    fitted.apply()
    fitted.save(tmp_path / "fit")
    sd.Fitted.load(tmp_path / "fit").apply(again)
    np.testing.assert_allclose(again.obsm["X_scanvi"], part.obsm["X_scanvi"], atol=1e-5)
    assert (again.obs["annotation"].astype(str) == part.obs["annotation"].astype(str)).all()
    with pytest.raises(ValueError, match="no `reference` in a plan"):
        sd.tl.annotate(sd.plan(part), reference=joined[0], **SETTINGS)
