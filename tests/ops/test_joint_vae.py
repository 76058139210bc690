"""The autoencoder of genes and proteins by its formulas and on planted proteins; the call is in test_contract too."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from helpers import (
    called,
    directional_fd,
    enlarged,
    largest_array,
    pbmc_counts,
    random_direction,
    tree_vdot,
)
from scdiffx import ops
from scdiffx._core.fields import replace
from scdiffx._core.minibatch import densify, draw, host_csr, widest
from scdiffx.ops import _joint_net, _vae

CELLS, GENES, PROTEINS, LATENT = 60, 40, 3, 2
BACKGROUND = [8.0, 20.0, 10.0, 15.0]


def small(**settings: Any) -> tuple[ops.JointVAE, tuple[Any, ...]]:
    """An operator whose first weights are moved so far that every term counts, and its inputs, in float64."""
    rng = np.random.default_rng(0)
    counts = pbmc_counts(CELLS, GENES).X.astype(np.float64)
    y = rng.negative_binomial(2, 0.05, (CELLS, PROTEINS)) * (rng.random((CELLS, PROTEINS)) > 0.1)
    batch = np.arange(CELLS) % 2
    op = ops.JointVAE(n_latent=LATENT, n_hidden=6, **settings)
    both = sp.hstack([counts, y], format="csr")
    net = _joint_net.initial(PROTEINS, op, both, batch, 2, rng)
    net = {name: jnp.asarray(value + 0.3 * rng.standard_normal(value.shape)) for name, value in net.items()}
    inputs = ops.Counts.from_scipy(counts), jnp.asarray(y, float), jnp.asarray(batch, jnp.int32)
    return replace(op, net=net), inputs


def test_the_mixture_is_scipys(x64: None) -> None:
    rng = np.random.default_rng(0)
    beta, fold, p = rng.lognormal(2, 1, (50, 4)), 1 + rng.lognormal(0, 2, (50, 4)), rng.uniform(0, 1, (50, 4))
    r = rng.lognormal(1, 1, (1, 4))
    y = rng.poisson(beta * np.where(rng.random((50, 4)) < p, fold, 1)).astype(float)
    there = jnp.asarray(y) > 0
    extra = jnp.where(there, _vae.coefficient(jnp.where(there, y, 1), jnp.log(r)), 0)
    logit = jnp.log(p) - jnp.log1p(-p)
    found = _joint_net.log_mixture(jnp.asarray(y), jnp.log(beta), jnp.log(fold), logit, jnp.log(r)) + extra
    parts = [np.log(w) + stats.nbinom.logpmf(y, r, r / (r + m)) for w, m in ((1 - p, beta), (p, beta * fold))]
    np.testing.assert_allclose(found, np.logaddexp(*parts), rtol=1e-9, atol=1e-9)


def test_the_divergence_of_the_background_is_the_integral(x64: None) -> None:
    op, (*_, batch) = small()
    z = jnp.asarray(np.random.default_rng(1).standard_normal((CELLS, LATENT)))
    decoded = _joint_net.decode_proteins(op.net, z, batch)
    found = _joint_net.background_divergence(op.net, decoded, batch)
    mean, std = np.asarray(decoded.background)[..., None], np.asarray(decoded.background_std)[..., None]
    prior = stats.norm(
        np.asarray(op.net["background_mean"])[batch][..., None],
        np.exp(np.asarray(op.net["background_log_std"]))[batch][..., None],
    )
    at = mean + std * np.linspace(-10, 10, 4001)
    own = stats.norm(mean, std)
    integral = np.trapezoid(own.pdf(at) * (own.logpdf(at) - prior.logpdf(at)), at, axis=-1)
    np.testing.assert_allclose(found, integral.sum(1), rtol=1e-6)


def by_hand(net: Any, x: np.ndarray, y: np.ndarray, batch: np.ndarray, noise: np.ndarray) -> float:
    """The negative bound in nats per cell, written down once more in NumPy."""
    w = {name: np.asarray(value, float) for name, value in net.items()}
    h = np.log1p(x / x.sum(1, keepdims=True) * x.shape[1]) @ w["encoder_in"]
    h += np.log1p(y) @ w["protein_in"] + w["protein_in_bias"]
    h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
    h = np.maximum(h * w["encoder_gain"] + w["encoder_bias"], 0)
    mean, log_std = np.split(h @ w["encoder_out"] + w["encoder_out_bias"], 2, axis=1)
    std = np.exp(np.clip(log_std, -6, 3))
    z = mean + std * noise[:, :LATENT]
    h = np.maximum(z @ w["decoder_in"] + w["decoder_batch"][batch], 0)
    logits = h @ w["decoder_out"] + w["gene_bias"][batch]
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    theta = np.exp(np.clip(w["log_theta"], -7, 9))
    mu = share * x.sum(1, keepdims=True)
    fit = stats.nbinom.logpmf(x, theta, theta / (theta + mu)).sum(1)
    level, log_spread, ratio, logit = np.split(h @ w["protein_out"] + w["protein_bias"][batch], 4, axis=1)
    spread = np.exp(np.clip(log_spread, -6, 3))
    beta = np.exp(level + spread * noise[:, LATENT:])
    phi = np.exp(np.clip(w["protein_log_theta"], -7, 9))
    chance = 1 / (1 + np.exp(-logit))
    low, high = (stats.nbinom.pmf(y, phi, phi / (phi + m)) for m in (beta, beta * (1 + np.exp(ratio))))
    fit += np.log((1 - chance) * low + chance * high).sum(1)
    c, d = w["background_mean"][batch], np.exp(w["background_log_std"])[batch]
    divergence = ((mean**2 + std**2 - 1) / 2 - np.log(std)).sum(1)
    divergence += (np.log(d / spread) + (spread**2 + (level - c) ** 2) / (2 * d**2) - 0.5).sum(1)
    return float((divergence - fit).mean())


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch"])
def test_the_loss_is_the_bound_by_hand(x64: None, dispersion: str) -> None:
    op, (x, y, batch) = small(dispersion=dispersion)
    # As the operator draws it.
    noise = np.asarray(jax.random.normal(jax.random.key(7), (CELLS, LATENT + PROTEINS), jnp.float64))
    dense = x.to_scipy().toarray()
    if dispersion == "gene":
        expected = by_hand(op.net, dense, np.asarray(y), np.asarray(batch), noise)
    else:
        tables = [op.net | {"log_theta": op.net["log_theta"][i]} for i in (0, 1)]
        rows = [np.flatnonzero(np.asarray(batch) == i) for i in (0, 1)]
        parts = [
            by_hand(t, dense[i], np.asarray(y)[i], np.asarray(batch)[i], noise[i])
            for t, i in zip(tables, rows, strict=True)
        ]
        expected = float(np.mean(parts))
    assert float(op.loss(x, y, batch, jax.random.key(7))) == pytest.approx(expected, rel=1e-9)
    # What training minimises is the same, on rows that stay sparse.
    both = sp.hstack([host_csr(x), host_csr(y)], format="csr")
    (rows,) = draw(both, np.arange(CELLS)[None], widest(both, CELLS))
    np.testing.assert_array_equal(densify(rows, CELLS, GENES + PROTEINS)[:, GENES:], np.asarray(y))
    key = jax.random.key(7)
    fit, divergence = _joint_net.batch_bound(op.net, rows, batch, key, "nb", training=False)
    noise = np.asarray(jax.random.normal(key, (CELLS, LATENT + PROTEINS)))
    assert float((divergence - fit).mean()) == pytest.approx(expected, rel=1e-6)


def test_the_gradient_of_the_bound_is_that_of_differences(x64: None) -> None:
    op, (x, y, batch) = small()
    key = jax.random.key(3)

    @jax.jit
    def value(net: Any, data: Any, y: Any) -> Any:
        return replace(op, net=net).loss(x.with_data(data), y, batch, key)

    # Counts of 0 are where the gamma functions are left out: they stay.
    at = (dict(op.net), x.data, y)
    gradient = jax.grad(value, argnums=(0, 1, 2))(*at)
    moves = random_direction(at, seed=4)
    moves = (moves[0], moves[1] * (x.data > 0), moves[2] * (y > 0))
    names = [(0, name) for name in op.net] + [(1, None), (2, None)]
    for place, name in names:
        step = jax.tree.map(jnp.zeros_like, at)
        if name is None:
            step = tuple(jnp.asarray(moves[i]) if i == place else s for i, s in enumerate(step))
        else:
            step[0][name] = jnp.asarray(moves[0][name])
        exact = tree_vdot(gradient, step)
        assert exact != 0, name
        numeric = directional_fd(lambda p: value(*p), at, step, steps=(1e-5, 1e-6, 1e-7))
        # A kink of the rectified units may lie within the larger steps.
        assert np.abs(numeric / exact - 1).min() < 1e-5, (place, name, numeric, exact)


def test_memory_of_the_bound_grows_with_the_cells() -> None:
    op, args = small()

    def both(op: Any, args: Any) -> Any:
        return jax.value_and_grad(lambda net: replace(op, net=net).loss(*args))(op.net)

    # So many cells that blocks of rows are not what is largest.
    few, many = (largest_array(both, *enlarged((op, args), {CELLS: n})) for n in (200_000, 400_000))
    assert 1.5 * few < many < 2.5 * few


def planted(seed: int = 0) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """Counts of genes; proteins of which two mark T cells and one a group that genes do not tell; and both truths."""
    adata = pbmc_counts(500, 150)
    rng = np.random.default_rng(seed)
    t_cells = adata.obs["cell_type"].astype(str).str.contains("CD4|CD8").to_numpy()
    group = rng.random(500) < 0.5
    on = np.stack([t_cells, ~t_cells, group, ~group], 1)
    background = np.exp(rng.normal(np.log(BACKGROUND), 0.3, on.shape))
    mean = background * np.where(on, 12.0, 1.0)
    y = rng.negative_binomial(5, 5 / (5 + mean)).astype(np.float32)
    return ops.Counts.from_scipy(adata.X), y, on, group


def test_planted_foreground_is_found_and_what_only_proteins_tell_is_in_the_latent_space() -> None:
    x, y, on, group = planted()
    training = ops.Training(max_epochs=60, batch_size=64, warmup=20, learning_rate=5e-3)
    joint = ops.JointVAE(n_latent=4, n_hidden=32, training=training).init(x, jnp.asarray(y))
    result = called(joint, x, jnp.asarray(y))
    chance = np.asarray(result.foreground)
    assert min(roc_auc_score(on[:, t], chance[:, t]) for t in range(4)) > 0.98
    assert chance[on].mean() > 0.8
    assert chance[~on].mean() < 0.2
    np.testing.assert_allclose(np.exp(joint.net["background_mean"])[0], BACKGROUND, rtol=0.15)
    # The foreground's mean is all there is where a protein is on.
    assert np.asarray(result.proteins)[on].mean() == pytest.approx(y[on].mean(), rel=0.2)
    told = cross_val_score(KNeighborsClassifier(15), np.asarray(result.latent), group, cv=5).mean()
    # Of genes alone the group is as good as a coin's.
    assert told > 0.9
    history = joint.history
    assert float(history["validation"][-1]) < float(history["validation"][0]) - 1


def test_two_levels_of_a_protein_are_found() -> None:
    rng = np.random.default_rng(0)
    on = rng.random((4000, 2)) < [0.1, 0.6]
    logs = rng.normal([2.0, 3.0], 0.4, on.shape) + np.where(on, [2.5, 2.0], 0)
    low, high, spread, share = _joint_net.two_levels(logs)
    np.testing.assert_allclose(low, [2, 3], atol=0.06)
    np.testing.assert_allclose(high, [4.5, 5], atol=0.06)
    np.testing.assert_allclose(spread, 0.4, atol=0.03)
    np.testing.assert_allclose(share, [0.1, 0.6], atol=0.03)


def test_sparse_proteins_are_the_same_and_impossible_ones_are_refused() -> None:
    op, (x, y, batch) = small()
    sparse = ops.Counts.from_scipy(sp.csr_matrix(np.asarray(y)))
    found, again = called(op, x, y, batch), called(op, x, sparse, batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    with pytest.raises(ValueError, match=r"call `op = op.init\("):
        ops.JointVAE()(x, y)
    with pytest.raises(ValueError, match=rf"\({CELLS - 1}, {PROTEINS}\).*{CELLS} cells"):
        ops.JointVAE().init(x, y[1:])
    with pytest.raises(ValueError, match="likelihood='poisson'"):
        ops.JointVAE(likelihood="poisson").init(x, y)
    assert op.init(x, y, batch) is op
