"""The transformer over genes by its parts and on blood cells; derivatives are in test_contract, peers in the docs."""

from __future__ import annotations

from typing import Any

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse as sp

import scdiffx as sd
from helpers import called, pbmc_counts
from scdiffx import ops
from scdiffx._core.minibatch import densify, host_csr
from scdiffx.ops import _denoise, _denoise_net

SHORT = ops.DenoiseTraining(max_epochs=20, batch_size=64)
NONE = SHORT._replace(max_epochs=0)
CELLS, GENES = 400, 200


@pytest.fixture(scope="module")
def adata() -> ad.AnnData:
    """Blood cells whose molecules are split: X has four of five, `layers["test"]` the others."""
    adata = pbmc_counts(CELLS, GENES)
    sd.pp.split_counts(adata, {"fit": 0.8, "test": 0.2})
    adata.X = adata.layers["fit"].copy()
    return adata


@pytest.fixture(scope="module")
def x(adata: ad.AnnData) -> ops.Counts:
    return ops.Counts.from_scipy(adata.X)


@pytest.fixture(scope="module")
def trained(x: ops.Counts) -> ops.Denoise:
    return ops.Denoise(training=SHORT).init(x)


@pytest.fixture(scope="module")
def untrained(x: ops.Counts) -> ops.Denoise:
    return ops.Denoise(training=NONE).init(x)


def deviance(values: Any, target: Any) -> float:
    """Poisson deviance per molecule of counts from values that are proportional to their means."""
    y = target.toarray() if sp.issparse(target) else np.asarray(target)
    rate = np.maximum(np.asarray(values, np.float64), 0)
    rate = 0.99 * rate / np.maximum(rate.sum(1, keepdims=True), 1e-12) + 0.01 / rate.shape[1]
    rate *= y.sum(1, keepdims=True) / rate.sum(1, keepdims=True)
    kernel = np.where(y > 0, y * np.log(np.maximum(y, 1) / rate), 0) - (y - rate)
    return float(2 * kernel.sum() / y.sum())


def test_inducing_points_are_attention_over_genes(x64: None) -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.0, (6, 30)).astype(float)
    net = _denoise_net.initial(sp.csr_matrix(counts), 30, 8, 5, rng)
    net = {name: np.asarray(value, np.float64) for name, value in net.items()}
    depth = counts.sum(1)
    tokens = _denoise_net.Tokens(jnp.broadcast_to(jnp.arange(30), (6, 30)), jnp.asarray(counts))
    found = _denoise_net._read({k: jnp.asarray(v) for k, v in net.items()}, tokens, jnp.asarray(depth))
    half = 4
    for cell in range(6):
        shown = np.flatnonzero(counts[cell])
        count = counts[cell, shown]
        relative = np.log1p(count * np.exp(net["log_depth"]) / depth[cell])
        features = np.stack([relative / (relative + s) for s in (0.3, 1, 3)] + [np.log1p(count)], 1)
        told = net["depth"][0] + (np.log1p(depth[cell]) - net["log_depth"]) * net["depth"][1]
        token = np.concatenate([net["gene"][shown] + features @ net["count"], told[None]])
        weight_of_token = np.append(relative, 1)
        mean = []
        for head in (slice(0, half), slice(half, 8)):
            query, key = net["inducing"] @ net["read_query"][:, head], token @ net["read_key"][:, head]
            score = query @ key.T / np.sqrt(half) + np.log(weight_of_token)
            attention = np.exp(score) / np.exp(score).sum(1, keepdims=True)
            mean.append(attention @ token @ net["read_value"][:, head])
        expected = net["inducing"] + np.concatenate(mean, 1) @ net["read_out"]
        np.testing.assert_allclose(found[cell], expected, rtol=1e-9, atol=1e-10)


def test_before_training_shares_are_those_of_the_genes(
    adata: ad.AnnData, x: ops.Counts, untrained: ops.Denoise
) -> None:
    counts = adata.X.toarray()
    depth = counts.sum(1, keepdims=True)
    firm = ops.replace(untrained, net=untrained.net | {"log_theta": jnp.full(GENES, 40.0)})
    # A tenth of the cells was held out, and half a molecule is added to each gene.
    share = counts.sum(0) / counts.sum()
    found = np.asarray(called(firm, x).denoised)
    np.testing.assert_allclose(found, found[:1] / depth[0] * depth, rtol=1e-4)
    np.testing.assert_allclose((found / depth)[0], share, rtol=0.2, atol=2e-4)
    # As it is, a gene's own molecules count a little.
    target = adata.layers["test"]
    assert deviance(called(untrained, x).denoised, target) == pytest.approx(deviance(found, target), rel=0.02)


@pytest.mark.slow
def test_expected_counts_predict_molecules_that_were_not_seen(
    adata: ad.AnnData, x: ops.Counts, trained: ops.Denoise
) -> None:
    found = np.asarray(called(trained, x).denoised)
    counts, target = adata.X.toarray(), adata.layers["test"]
    np.testing.assert_allclose(found.sum(1), counts.sum(1), rtol=1e-4)
    mean = deviance(np.tile(counts.mean(0), (CELLS, 1)), target)
    assert deviance(found, target) < 0.9 * mean
    assert deviance(found, target) < 0.9 * deviance(counts, target)
    history = trained.history
    assert float(history["validation"][int(history["kept"])]) < 0.9 * float(history["start"])


def test_loss_is_what_training_lowers(x: ops.Counts, trained: ops.Denoise, untrained: ops.Denoise) -> None:
    loss = jax.jit(lambda op, x, key: op.loss(x, key))
    values = [[float(loss(op, x, jax.random.key(i))) for i in range(3)] for op in (trained, untrained)]
    assert values[0][0] != values[0][1]
    assert np.mean(values[0]) < 0.9 * np.mean(values[1])
    assert np.mean(values[0]) == pytest.approx(float(trained.history["train"][-1]), rel=0.1)


def test_molecules_are_dealt_out_once(adata: ad.AnnData, x: ops.Counts, trained: ops.Denoise) -> None:
    counts = adata.X.toarray()
    key = jax.random.key(1)
    share = np.asarray(jax.random.uniform(jax.random.split(key)[0], (CELLS,), x.dtype, 0.4, 0.9))[:, None]
    for matrix in (x, jnp.asarray(counts)):
        seen, rest = np.split(host_csr(_denoise._dealt(matrix, key)).toarray(), 2, axis=1)
        np.testing.assert_allclose(seen, np.round(seen), atol=1e-5)
        np.testing.assert_allclose(seen + rest * (1 - share), counts, atol=1e-4)
        assert np.corrcoef(seen.sum(1) / counts.sum(1), share[:, 0])[0, 1] > 0.9
    run = _denoise._Run(trained, host_csr(x), np.arange(GENES), np.arange(CELLS), 0)
    batch = run.minibatch(np.arange(50), np.full(50, 0.7), GENES, np.random.default_rng(0))
    seen, rest = (np.asarray(densify(rows, 50, GENES)) for rows in (batch.seen, batch.rest))
    np.testing.assert_allclose(seen + rest * 0.3, counts[:50], atol=1e-4)
    assert seen.sum() / counts[:50].sum() == pytest.approx(0.7, abs=0.02)
    shown = np.zeros((50, GENES))
    np.add.at(shown, (np.arange(50)[:, None], batch.tokens.place), batch.tokens.counts)
    np.testing.assert_array_equal(shown, seen)


def test_lists_of_tokens_hold_the_largest_counts(adata: ad.AnnData, trained: ops.Denoise) -> None:
    few = ops.replace(trained, n_tokens=3)
    place, count = few._shown(jnp.asarray(adata.X.toarray()))
    np.testing.assert_array_equal(count, -np.sort(-adata.X.toarray(), 1)[:, :3])
    np.testing.assert_array_equal(count, np.take_along_axis(adata.X.toarray(), np.asarray(place), 1))
    row, column = adata.X.nonzero()
    listed = _denoise._listed(row, column, adata.X.data, (CELLS, 3))
    np.testing.assert_array_equal(listed.counts, count)
    short = listed.counts == 0
    np.testing.assert_array_equal(np.where(short, 0, listed.place), np.where(short, 0, place))


def test_only_the_most_variable_genes_are_tokens(monkeypatch: pytest.MonkeyPatch, adata: ad.AnnData) -> None:
    monkeypatch.setattr(_denoise, "_MAX_TOKENS", 20)
    counts = adata.X.toarray().astype(np.float64)
    excess = (counts.var(0) - counts.mean(0)) / np.maximum(counts.mean(0), 1e-12)
    np.testing.assert_array_equal(_denoise._token_genes(adata.X), np.sort(np.argsort(-excess)[:20]))


def test_hidden_genes_are_as_good_as_absent(x: ops.Counts, trained: ops.Denoise, adata: ad.AnnData) -> None:
    rows = jnp.asarray(adata.X[:40].toarray())
    tokens, shown = _denoise_net.hidden(trained._shown(rows), jnp.arange(GENES), rows.shape, 0.5, jax.random.key(0))
    share = 1 - np.asarray(shown).mean(1)
    assert share.max() < 0.65
    assert share.mean() == pytest.approx(0.25, abs=0.06)
    found = _denoise_net.log_shares(trained.net, tokens, rows, shown)
    # Any other counts in their place, as long as the depth is the same.
    other = rows * shown
    other = other.at[:, 0].add((rows.sum(1) - other.sum(1)) * (shown[:, 0] == 0))
    same = np.asarray(jnp.abs(other.sum(1) - rows.sum(1)) < 0.5)
    assert same.any()
    np.testing.assert_allclose(found[same], _denoise_net.log_shares(trained.net, tokens, other, shown)[same], atol=1e-4)


def test_a_cell_without_molecules_has_none_and_harms_nobody(adata: ad.AnnData, trained: ops.Denoise) -> None:
    counts = adata.X[:20].toarray()
    counts[3] = 0
    rows = jnp.asarray(counts)
    found, back = jax.vjp(lambda rows: trained(rows).denoised, rows)
    np.testing.assert_array_equal(found[3], 0)
    assert np.isfinite(np.asarray(back(jnp.ones_like(found))[0])).all()


def test_patience_stops_early_and_keeps_the_best(x: ops.Counts) -> None:
    settings = ops.DenoiseTraining(max_epochs=60, batch_size=64, patience=2, learning_rate=0.05)
    op = ops.Denoise(training=settings).init(x)
    curve = np.asarray(op.history["validation"])
    assert len(curve) < 60
    assert int(op.history["kept"]) == curve.argmin()
    assert len(curve) == curve.argmin() + 3


def test_what_cannot_be_trained_is_refused(x: ops.Counts, trained: ops.Denoise) -> None:
    assert trained.init(x) is trained
    with pytest.raises(ValueError, match="init"):
        ops.Denoise()(x)
    with pytest.raises(ValueError, match="n_hidden=7"):
        ops.Denoise(n_hidden=7).init(x)
    with pytest.raises(ValueError, match="n_inducing=0"):
        ops.Denoise(n_inducing=0).init(x)
    with pytest.raises(ValueError, match="n_tokens=0"):
        ops.Denoise(n_tokens=0).init(x)
    with pytest.raises(ValueError, match="validation=1"):
        ops.Denoise(training=SHORT._replace(validation=1.0)).init(x)
    with pytest.raises(ValueError, match="masked=1"):
        ops.Denoise(training=SHORT._replace(masked=1.0)).init(x)
    with pytest.raises(ValueError, match="all counts are 0"):
        ops.Denoise().init(jnp.zeros((20, 5)))


@pytest.mark.slow
def test_weights_in_uns_make_the_operator_again(adata: ad.AnnData, x: ops.Counts) -> None:
    written = sd.pp.denoise(adata, max_epochs=1, progress=False, copy=True)
    entry = written.uns["denoise"]
    net = {name: jnp.asarray(value) for name, value in entry["net"].items()}
    op = ops.Denoise(net=net, tokens=jnp.asarray(entry["tokens"]))
    np.testing.assert_allclose(called(op, x).denoised, written.layers["denoised"], rtol=1e-4, atol=1e-4)
    assert entry["validation"] == min([entry["validation_gene_mean"], *entry["history"]["validation"]])


def test_log_values_are_met_with_a_warning(adata: ad.AnnData) -> None:
    logs = adata.copy()
    sd.pp.log1p(logs)
    with pytest.warns(UserWarning, match="`denoise` expects raw count data"):
        sd.pp.denoise(logs, max_epochs=1, progress=False)


@pytest.mark.slow
def test_in_a_plan_the_network_can_be_fitted_and_saved(adata: ad.AnnData, tmp_path: Any) -> None:
    part = adata[:120].copy()
    genes = list(part.var_names[part.X.toarray().sum(0).argsort()[-5:]])
    plan = sd.plan(part)
    sd.pp.denoise(plan, genes, max_epochs=2, progress=False)
    fitted = sd.fit(
        plan, sd.losses.cross_entropy("X_denoised", "cell_type"), optimizer=optax.adam(1e-3), n_steps=5, progress=False
    )
    fitted.apply()
    fitted.save(tmp_path / "fit")
    again = part.copy()
    del again.obsm["X_denoised"]
    sd.Fitted.load(tmp_path / "fit").apply(again)
    assert again.obsm["X_denoised"].shape == (120, 5)
    np.testing.assert_allclose(again.obsm["X_denoised"], part.obsm["X_denoised"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_held_out_molecules_of_bone_marrow_beat_trivial_predictors(paul15: ad.AnnData) -> None:
    """Beside the gene mean, the counts themselves and the mean of similar cells, on the same split."""
    cells = np.sort(np.random.default_rng(0).permutation(paul15.n_obs)[:800])
    adata = ad.AnnData(sp.csr_matrix(paul15.X[cells]).astype(np.float32))
    frequent = np.asarray(adata.X.sum(0)).ravel().argsort()[-300:]
    adata = adata[:, np.sort(frequent)].copy()
    sd.pp.split_counts(adata, {"fit": 0.8, "test": 0.2})
    adata.X = adata.layers["fit"].copy()
    target = adata.layers["test"]
    counts = adata.X.toarray()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    log = adata.copy()
    sd.pp.normalize_total(log)
    sd.pp.log1p(log)
    sd.pp.pca(log, n_comps=30)
    sd.pp.neighbors(log, n_neighbors=16)
    near = shares + (log.obsp["distances"] > 0).astype(float) @ shares
    sd.pp.denoise(adata, max_epochs=60, progress=False)
    found = deviance(adata.layers["denoised"], target)
    trivial = {
        "gene mean": deviance(np.tile(shares.mean(0), (len(shares), 1)), target),
        "raw": deviance(counts, target),
        "neighbours": deviance(near, target),
    }
    assert found < 0.88 * trivial["gene mean"], trivial
    assert found < 0.72 * trivial["raw"], trivial
    assert found < trivial["neighbours"], trivial
