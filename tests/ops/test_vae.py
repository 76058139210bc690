"""The count autoencoder by its formulas and on blood cells; derivatives are in test_contract, peers in the docs."""

from __future__ import annotations

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse as sp
from scipy import stats
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

import scdiffx as sd
from helpers import QUICK, called, pbmc_counts
from scdiffx import ops
from scdiffx._core.fields import replace
from scdiffx._core.minibatch import densify, draw, host_csr, widest
from scdiffx.ops import _vae

SHORT = ops.Training(max_epochs=25, batch_size=64, warmup=10)


@pytest.fixture(scope="module")
def adata() -> ad.AnnData:
    return pbmc_counts(500, 250)


@pytest.fixture(scope="module")
def x(adata: ad.AnnData) -> ops.Counts:
    return ops.Counts.from_scipy(adata.X)


@pytest.fixture(scope="module")
def trained(x: ops.Counts) -> ops.VAE:
    return ops.VAE(n_latent=5, n_hidden=32, columns=jnp.arange(250), training=SHORT).init(x)


def test_probabilities_are_scipys(x64: None) -> None:
    rng = np.random.default_rng(0)
    mu, r, p = rng.lognormal(0, 2, (40, 6)), rng.lognormal(0, 2, (1, 6)), rng.uniform(0, 1, (40, 6))
    counts = rng.poisson(mu).astype(float)
    where = jnp.asarray(counts)
    there = where > 0
    extra = jnp.where(there, _vae.coefficient(jnp.where(there, where, 1), jnp.log(r)), 0)
    found = _vae.log_kernel(where, jnp.log(mu), jnp.log(r)) + extra
    expected = stats.nbinom.logpmf(counts, r, r / (r + mu))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    inflated = _vae.log_kernel(where, jnp.log(mu), jnp.log(r), jnp.log(p) - jnp.log1p(-p)) + extra
    mixture = p * (counts == 0) + (1 - p) * np.exp(expected)
    np.testing.assert_allclose(inflated, np.log(mixture), rtol=1e-8, atol=1e-8)


def test_minibatches_are_the_rows(adata: ad.AnnData, x: ops.Counts) -> None:
    csr = host_csr(x)
    np.testing.assert_array_equal(csr.toarray(), adata.X.toarray())
    cells = np.random.default_rng(0).permutation(500)[:96].reshape(3, 32)
    for step, rows in enumerate(draw(csr, cells, widest(csr, 32))):
        np.testing.assert_array_equal(densify(rows, 32, 250), adata.X[cells[step]].toarray())


def test_training_beats_its_start_and_the_loss_is_the_bound(x: ops.Counts, trained: ops.VAE) -> None:
    # The start is the mean expression of all cells with dispersions by moments.
    history = trained.history
    assert float(history["validation"][-1]) < float(history["validation"][0]) - 5
    slow = SHORT._replace(max_epochs=1, learning_rate=1e-9)
    untrained = replace(trained, net=replace(trained, net=None, training=slow).init(x).net)
    loss = jax.jit(lambda op: op.loss(x, None, jax.random.key(3)), compiler_options=QUICK)
    after, before = float(loss(trained)), float(loss(untrained))
    assert after < before - 10
    assert after == pytest.approx(float(history["train"][-1]), rel=0.03)


def test_expression_sums_to_one_and_follows_the_counts(adata: ad.AnnData, x: ops.Counts, trained: ops.VAE) -> None:
    result = called(trained, x)
    shares = np.asarray(result.normalized)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-4)
    counts = adata.X.toarray()
    observed = counts / counts.sum(1, keepdims=True)
    top = counts.mean(0).argsort()[-30:]
    own = np.mean([np.corrcoef(shares[:, g], observed[:, g])[0, 1] for g in top])
    assert own > 0.4
    np.testing.assert_allclose(shares.mean(0)[top], observed.mean(0)[top], rtol=0.25)


def test_neighbours_in_the_latent_space_share_labels(adata: ad.AnnData, x: ops.Counts, trained: ops.VAE) -> None:
    labels = adata.obs["cell_type"].astype(str).to_numpy()
    knn = KNeighborsClassifier(15)
    latent = np.asarray(trained(x).latent)
    depth = np.log(np.asarray(adata.X.sum(1)))
    score, trivial = (cross_val_score(knn, z, labels, cv=5).mean() for z in (latent, depth))
    assert score > trivial + 0.15


@pytest.mark.slow
def test_a_batch_effect_stays_out_of_the_latent_space(adata: ad.AnnData) -> None:
    rng = np.random.default_rng(0)
    n, genes = 300, 120
    batch = rng.integers(0, 2, n)
    counts = adata.X[:n, :genes].toarray()
    shifted = rng.poisson(counts * np.where(batch[:, None] == 1, rng.lognormal(0, 1, (1, genes)), 1))
    x = ops.Counts.from_scipy(sp.csr_matrix(shifted.astype(np.float32)))

    def foreign(given: np.ndarray) -> float:
        codes = jnp.asarray(given, jnp.int32)
        z = called(ops.VAE(n_latent=5, n_hidden=32, training=SHORT).init(x, codes), x, codes).latent
        near = NearestNeighbors(n_neighbors=15).fit(z).kneighbors(return_distance=False)
        return float((batch[near] != batch[:, None]).mean())

    # Batches that are not those of the cells explain as little as none, and are the same program.
    assert foreign(batch) > foreign(rng.permutation(batch)) + 0.1


def test_patience_stops_early_and_keeps_the_best(x: ops.Counts) -> None:
    settings = ops.Training(max_epochs=60, batch_size=64, warmup=1, patience=3, learning_rate=0.02)
    op = ops.VAE(n_latent=5, n_hidden=32, training=settings).init(x)
    curve = np.asarray(op.history["validation"])
    assert len(curve) < 60
    assert int(op.history["kept"]) == curve.argmin()
    assert len(curve) == curve.argmin() + 4


def test_an_operator_with_weights_is_not_trained_again(x: ops.Counts, trained: ops.VAE) -> None:
    assert trained.init(x) is trained
    with pytest.raises(ValueError, match="init"):
        ops.VAE()(x)


def test_weights_in_uns_make_the_operator_again(adata: ad.AnnData, x: ops.Counts) -> None:
    sd.pp.vae(adata, n_latent=4, max_epochs=1, progress=False)
    net = {name: jnp.asarray(value) for name, value in adata.uns["vae"]["net"].items()}
    np.testing.assert_allclose(ops.VAE(n_latent=4, net=net)(x).latent, adata.obsm["X_vae"], atol=1e-5)


def test_log_values_are_met_with_a_warning(adata: ad.AnnData) -> None:
    logs = adata.copy()
    logs.X = logs.X.log1p()
    with pytest.warns(UserWarning, match="expects raw count data"):
        # Of the size of the test above, whose compiled code it shares.
        sd.pp.vae(logs, n_latent=4, max_epochs=1, progress=False)


@pytest.mark.slow
def test_in_a_plan_the_encoder_can_be_fitted_and_saved(adata: ad.AnnData, tmp_path: object) -> None:
    part = adata[:150, :60].copy()
    plan = sd.plan(part)
    sd.pp.vae(plan, n_latent=4, max_epochs=2, progress=False)
    fitted = sd.fit(
        plan, sd.losses.cross_entropy("X_vae", "cell_type"), optimizer=optax.adam(1e-3), n_steps=8, progress=False
    )
    assert fitted.adopted
    assert fitted.losses["train_after"] < fitted.losses["train_before"]
    fitted.apply()
    fitted.save(tmp_path / "fit")
    again = part.copy()
    del again.obsm["X_vae"]
    sd.Fitted.load(tmp_path / "fit").apply(again)
    np.testing.assert_allclose(again.obsm["X_vae"], part.obsm["X_vae"], atol=1e-5)
