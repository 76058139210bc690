"""Doublets by SOLO on blood cells with planted doublets; derivatives are in test_contract."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.metrics import roc_auc_score

import scdiffx as sd
from helpers import called, pbmc_counts
from scdiffx import ops
from scdiffx.ops._solo import simulated

SHORT = ops.VAE(n_hidden=64, training=ops.Training(max_epochs=40, batch_size=64))


def planted(counts: sp.csr_matrix, rate: float, thinned: bool, seed: int = 0) -> tuple[sp.csr_matrix, np.ndarray]:
    """Counts with doublets among them, which are plain sums or have the depth of single cells; and which they are."""
    rng = np.random.default_rng(seed)
    n = counts.shape[0]
    k = round(rate * n / (1 - rate))
    pairs = sp.csr_matrix(counts[rng.integers(0, n, k)] + counts[rng.integers(0, n, k)]).astype(np.int64)
    if thinned:
        depth = np.asarray(counts.sum(1)).ravel()
        share = np.minimum(1, depth[rng.integers(0, n, k)] / np.asarray(pairs.sum(1)).ravel())
        pairs.data = rng.binomial(pairs.data, np.repeat(share, np.diff(pairs.indptr)))
    order = rng.permutation(n + k)
    return sp.csr_matrix(sp.vstack([counts, pairs]).tocsr()[order].astype(np.float32)), order >= n


@pytest.fixture(scope="module")
def trained() -> tuple[ops.Solo, ops.Counts, np.ndarray]:
    counts, truth = planted(pbmc_counts(500, 400).X, 0.1, thinned=True)
    x = ops.Counts.from_scipy(counts)
    return ops.Solo(vae=SHORT).init(x), x, truth


@pytest.mark.slow
def test_planted_doublets_of_single_depth_score_higher(trained: tuple[ops.Solo, ops.Counts, np.ndarray]) -> None:
    op, x, truth = trained
    result = called(op, x)
    score = np.asarray(result.score)
    assert ((score >= 0) & (score <= 1)).all()
    assert roc_auc_score(truth, score) > 0.65
    np.testing.assert_allclose(score, np.minimum(1, np.exp(np.asarray(result.evidence))), rtol=1e-5)


@pytest.mark.slow
def test_probabilities_add_up_to_what_is_expected_and_found(
    trained: tuple[ops.Solo, ops.Counts, np.ndarray],
) -> None:
    op, x, _ = trained

    def mean(rate: float) -> float:
        return float(called(ops.Solo(vae=op.vae, doublet_rate=rate).init(x), x).score.mean())

    # What is found is the same, and what is expected counts by its square root.
    assert mean(0.1) == pytest.approx(np.sqrt(2) * float(called(op, x).score.mean()), rel=1e-3)
    # What is found counts as four times less than expected at least.
    assert mean(0.9) == pytest.approx(0.45, rel=1e-3)


@pytest.mark.slow
def test_training_stops_early_at_its_best(trained: tuple[ops.Solo, ops.Counts, np.ndarray]) -> None:
    curve = np.asarray(trained[0].history["validation"])
    assert len(curve) < 60
    assert curve.min() < curve[0] - 0.02


def test_simulated_doublets_are_sums_within_a_batch() -> None:
    rng = np.random.default_rng(0)
    # Cells of the first batch have the first gene alone, those of the second the second alone.
    codes = np.repeat([0, 1], 20)
    counts = sp.csr_matrix(np.eye(2, dtype=np.float32)[codes] * rng.integers(5, 9, (40, 1)))
    made = simulated(counts, codes, 300, rng).toarray()
    assert (made.min(1) == 0).all()
    whole, thinned = made[::3].sum(1), np.delete(made, np.s_[::3], 0).sum(1)
    assert whole.min() >= 10
    assert thinned.mean() == pytest.approx(np.asarray(counts.sum(1)).mean(), rel=0.1)
    with pytest.raises(ValueError, match="two cells"):
        simulated(counts, np.r_[2, codes[1:]], 10, rng)


@pytest.mark.slow
def test_networks_are_needed_first(trained: tuple[ops.Solo, ops.Counts, np.ndarray]) -> None:
    op, x, _ = trained
    assert op.init(x) is op
    with pytest.raises(ValueError, match="init"):
        ops.Solo()(x)


@pytest.mark.slow
def test_a_fitted_plan_is_applied_with_its_autoencoder(tmp_path: Path) -> None:
    raw = pbmc_counts(200, 100)
    raw.obs["depth"] = np.asarray(raw.X.sum(1)).ravel()
    plan = sd.plan(raw)
    sd.pp.solo(plan, max_epochs=2, progress=False)
    fitted = sd.fit(plan, sd.losses.correlation("solo_score", "depth"), n_steps=2, progress=False)
    fitted.save(tmp_path / "fit")
    found = fitted.apply(raw, copy=True).obs["solo_score"]
    again = sd.Fitted.load(tmp_path / "fit").apply(raw[::2].copy(), copy=True).obs["solo_score"]
    np.testing.assert_allclose(again, found[::2], rtol=1e-4)
