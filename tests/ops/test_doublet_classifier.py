"""The doublet classifier: its features, its fit and planted doublets; derivatives and cost are in test_contract."""

from __future__ import annotations

import functools

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors

import scdiffx as sd
from conftest import _read
from helpers import QUICK, called, directional_fd, pbmc_counts, random_direction
from scdiffx import ops
from scdiffx._core.fields import replace
from scdiffx.ops._co_expression import co_expression, log_upper_tail
from scdiffx.ops._doublet_classifier import fitted

CELLS, GENES = 200, 150


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    return pbmc_counts(CELLS, GENES).X.toarray().astype(np.float64)


@pytest.fixture(scope="module")
def ready(counts: np.ndarray) -> tuple[ops.DoubletClassifier, ops.Counts, ops.DoubletClassifierResult]:
    with jax.enable_x64(True):
        x = ops.Counts.from_scipy(sp.csr_matrix(counts))
        op = ops.DoubletClassifier(n_comps=8, rate=0.1).init(x)
        return op, x, called(op, x)


def with_doublets(op: ops.DoubletClassifier, counts: np.ndarray) -> np.ndarray:
    """The variable genes' counts of the cells and of the doublets, from the recipe."""
    share, genes = op.simulation.share, np.asarray(op.reference.genes)
    position, data = np.asarray(share.position), np.asarray(share.data)
    kept = np.zeros((share.data.shape[0] * share.block_rows, len(genes)))
    block, slot = np.nonzero(data)
    at = position[block, slot]
    kept[block * share.block_rows + at // len(genes), at % len(genes)] = data[block, slot]
    first, second = np.asarray(op.parents).T
    sums = (counts[first] + counts[second])[:, genes]
    return np.concatenate([counts[:, genes], kept[: len(sums)] * sums])


def standardised(features: np.ndarray) -> np.ndarray:
    return (features - features.mean(0)) / features.std(0)


@pytest.mark.slow
def test_features_agree_with_their_definitions(ready: tuple, counts: np.ndarray) -> None:
    op, _, result = ready
    n, made = CELLS, with_doublets(op, counts)
    # All genes vary, so the variable genes are all that there are, and the doublets are known in full.
    assert made.shape == (3 * n, GENES)
    np.testing.assert_allclose(made, np.rint(made), atol=1e-9)
    depth = made.sum(1)
    log = np.log1p(made * np.median(depth[:n]) / depth[:, None])
    components = np.linalg.svd(log[:n] - log[:n].mean(0), full_matrices=False)[2][:8]
    z = (log - log[:n].mean(0)) @ components.T
    z *= np.sign((z * np.asarray(result.coordinates)).sum(0))
    np.testing.assert_allclose(result.coordinates, z, atol=1e-5)

    present = (made > 0).astype(float)
    share = present[:n].mean(0)
    surprise = np.zeros((GENES, GENES))
    for i in range(GENES):
        exactly_one = (present[:n, [i]] != present[:n]).sum(0)
        surprise[i] = -binom.logsf(exactly_one - 1, n, share[i] * (1 - share) + share * (1 - share[i]))
    np.fill_diagonal(surprise, 0)
    cxds = np.einsum("ng,gh,nh->n", present, surprise, present)

    k = round(0.5 * np.sqrt(n)) * 3
    order = NearestNeighbors(n_neighbors=k + 1).fit(z).kneighbors(z)
    distance, near = (a[:, 1:] for a in order)
    doublet = near >= n
    near_features = []
    for size in (round(k / 8), round(k / 4), round(k / 2), k):
        found = doublet[:, :size].sum(1)
        near_features.append(np.log((found + 1) / (size - found + 1)))
    weight = np.exp(-((distance / distance[:, [(k + 1) // 2 - 1]]) ** 2))
    found, total = (weight * doublet).sum(1), weight.sum(1)
    near_features.append(np.log((found + 1) / (total - found + 1)))

    columns = [np.log1p(depth), np.log1p(present.sum(1)), np.log1p(cxds), *near_features]
    expected = standardised(np.column_stack([*columns, z]))
    np.testing.assert_allclose(result.features, expected, atol=2e-5)


@pytest.mark.slow
def test_every_other_doublet_has_the_depth_of_a_cell(ready: tuple, counts: np.ndarray) -> None:
    op = ready[0]
    depth, (first, second) = counts.sum(1), np.asarray(op.parents).T
    assert (first != second).all()
    made = with_doublets(op, counts)[CELLS:].sum(1)
    np.testing.assert_allclose(made[::2], (depth[first] + depth[second])[::2])
    np.testing.assert_allclose(made, np.asarray(op.simulation.kept) * (depth[first] + depth[second]))
    assert made[1::2].mean() == pytest.approx(np.minimum(depth.mean(), made[::2].mean()), rel=0.1)


def test_the_tail_of_the_binomial_is_right_where_it_underflows() -> None:
    n, p = 400, np.array([0.3, 0.3, 0.02])
    observed = np.array([150.0, 0.0, 20.0])
    np.testing.assert_allclose(log_upper_tail(observed, n, p), binom.logsf(observed - 1, n, p), rtol=1e-10)
    # P(X = n) = p^n; the second is a sum of exact fractions.
    far = np.array([5000.0, 4000.0])
    from fractions import Fraction
    from math import comb, log

    q, exact = Fraction(1, 100), Fraction(0)
    for k in range(4000, 5001):
        exact += comb(5000, k) * q**k * (1 - q) ** (5000 - k) if k < 4030 else 0
    numerator, denominator = exact.numerator, exact.denominator
    expected = [5000 * np.log(0.01), log(numerator) - log(denominator)]
    np.testing.assert_allclose(log_upper_tail(far, 5000, np.array([0.01, 0.01])), expected, rtol=1e-10)


def test_the_genes_of_the_pairs_are_those_whose_presence_varies_most() -> None:
    rng = np.random.default_rng(0)
    frequency = np.r_[np.full(500, 0.5), np.full(100, 0.95)][rng.permutation(600)]
    x = ops.Counts.from_scipy(sp.csr_matrix((rng.random((300, 600)) < frequency).astype(np.float32)))
    genes, surprise = co_expression(x)
    np.testing.assert_array_equal(genes, np.flatnonzero(frequency == 0.5))
    assert surprise.shape == (500, 500)
    assert not np.diag(surprise).any()


@pytest.mark.slow
def test_the_fit_is_that_of_scikit_learn(ready: tuple) -> None:
    op, _, result = ready
    doublet = np.arange(3 * CELLS) >= CELLS
    counted = np.r_[np.asarray(op.simulation.singlet), np.ones(2 * CELLS, bool)]
    assert (~counted).sum() == round(0.1 * CELLS)
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000)
    features = np.asarray(result.features)
    theirs.fit(features[counted], doublet[counted])
    np.testing.assert_allclose(result.weights[:-1], theirs.coef_[0], atol=1e-5)
    np.testing.assert_allclose(result.weights[-1], theirs.intercept_[0], atol=1e-5)
    # The odds are those of the fit times those expected over those in training.
    prior = np.log(0.1 / 0.9) - np.log(2 * CELLS / (CELLS - round(0.1 * CELLS)))
    odds = theirs.decision_function(features) + prior
    np.testing.assert_allclose(result.log_odds, odds[:CELLS], atol=1e-4)
    np.testing.assert_allclose(np.r_[result.score, result.simulated], 1 / (1 + np.exp(-odds)), atol=1e-5)
    # Those left out are not just any cells: they look like doublets to the last fit too.
    assert np.median(odds[:CELLS][~counted[:CELLS]]) > np.quantile(odds[:CELLS], 0.9)


@pytest.mark.usefixtures("x64")
def test_the_fit_has_the_derivative_of_its_solution() -> None:
    rng = np.random.default_rng(0)
    features, singlet = jnp.asarray(rng.standard_normal((90, 4))), jnp.asarray(rng.random(40) < 0.8)
    features = features.at[40:, 0].add(1)
    direction = jnp.asarray(random_direction(np.asarray(features)))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def found(f: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.value_and_grad(lambda f: (fitted(f, singlet, 0.5) * jnp.arange(1.0, 6.0)).sum())(f)

    numeric = directional_fd(lambda f: found(f)[0], features, direction)
    np.testing.assert_allclose((found(features)[1] * direction).sum(), numeric[1], rtol=1e-7)


def test_separable_classes_have_a_finite_fit() -> None:
    features = jnp.r_[jnp.full(20, -1.0), jnp.full(20, 1.0)][:, None].astype(jnp.float32)
    solve = jax.jit(lambda f: fitted(f, jnp.ones(20, bool), 1.0), compiler_options=QUICK)
    weights = np.asarray(solve(features))
    theirs = LogisticRegression(C=1.0, tol=1e-10).fit(features, np.arange(40) >= 20)
    np.testing.assert_allclose(weights, [theirs.coef_[0, 0], 0], atol=1e-4)


@pytest.mark.slow
def test_soft_votes_count_at_a_small_temperature(ready: tuple) -> None:
    op, x, counted = ready
    with jax.enable_x64(True):
        soft = replace(op, temperature=1e-7).init(x)
        np.testing.assert_array_equal(soft.parents, op.parents)
        same = np.isclose(called(soft, x).features, counted.features, atol=1e-6).all(1)
    # Only where the next neighbour is as far as the last voter do the two differ.
    assert same.mean() > 0.95


@pytest.mark.slow
def test_planted_doublets_are_found_better_than_by_neighbours() -> None:
    counts = sp.csr_matrix(_read("pbmc_4271").X)[:1500].astype(np.float32)
    rng = np.random.default_rng(0)
    order = rng.permutation(counts.shape[0])
    first, second, rest = order[:100], order[100:200], order[200:]
    made = sp.csr_matrix(counts[first] + counts[second])
    depth = np.asarray(counts[order[200:300]].sum(1)).ravel() / np.asarray(made.sum(1)).ravel()
    made.data = rng.binomial(made.data.astype(int), np.repeat(np.minimum(depth, 1), np.diff(made.indptr)))
    adata = ad.AnnData(sp.vstack([counts[rest], made]).tocsr().astype(np.float32))
    truth = np.r_[np.zeros(len(rest)), np.ones(100)]
    neighbours = sd.pp.scrublet(adata, threshold=0.3, copy=True).obs["doublet_score"]
    sd.pp.scrublet(adata, method="classifier", expected_doublet_rate=0.07)
    score = adata.obs["doublet_score"]
    assert roc_auc_score(truth, np.asarray(adata.X.sum(1)).ravel()) < 0.6
    assert roc_auc_score(truth, score) > max(0.83, roc_auc_score(truth, neighbours) + 0.05)
    assert average_precision_score(truth, score) > average_precision_score(truth, neighbours) + 0.05
    # As many are expected as there are, and cells are called where doublets are likelier.
    assert score.between(0, 1).all()
    assert score.sum() == pytest.approx(100, rel=0.4)
    np.testing.assert_array_equal(adata.obs["predicted_doublet"], score > 0.5)
    assert truth[adata.obs["predicted_doublet"]].mean() > 0.4


@pytest.mark.slow
def test_batches_and_a_given_threshold() -> None:
    # The first batch has the counts of the second with the genes reversed: other cells, for the same compiled code.
    alone = pbmc_counts(100, 80)
    rows = np.repeat(np.arange(100), 2)
    adata = ad.AnnData(sp.csr_matrix(alone.X[rows]))
    adata.obs["batch"] = np.where(np.arange(200) % 2 == 0, "a", "b")
    adata.X[::2] = alone.X[:, ::-1]
    for data, batch_key in ((adata, "batch"), (alone, None)):
        sd.pp.scrublet(data, method="classifier", batch_key=batch_key, threshold=0.2)
    own = adata.obs["batch"] == "b"
    np.testing.assert_allclose(adata.obs["doublet_score"][own], alone.obs["doublet_score"])
    assert np.abs(adata.obs["doublet_score"][~own].to_numpy() - alone.obs["doublet_score"].to_numpy()).max() > 0.01
    assert alone.uns["scrublet"]["threshold"] == 0.2
    assert adata.uns["scrublet"]["batches"]["b"]["parameters"]["method"] == "classifier"


@pytest.mark.slow
def test_a_dense_matrix_gives_the_same(ready: tuple, counts: np.ndarray) -> None:
    op, _, result = ready
    with jax.enable_x64(True):
        x = jnp.asarray(counts)
        np.testing.assert_allclose(called(op.init(x), x).score, result.score, atol=1e-8)


def test_errors_name_what_is_wrong(counts: np.ndarray) -> None:
    x = ops.Counts.from_scipy(sp.csr_matrix(counts[:50].astype(np.float32)))
    with pytest.raises(ValueError, match="init"):
        ops.DoubletClassifier()(x)
    with pytest.raises(ValueError, match=r"doublet_ratio=0\.01"):
        ops.DoubletClassifier(doublet_ratio=0.01).init(x)
    with pytest.raises(ValueError, match="0 variable genes"):
        ops.DoubletClassifier().init(ops.Counts.from_scipy(sp.csr_matrix(np.ones((20, 5), np.float32))))
    adata = pbmc_counts(60, 40)
    with pytest.raises(ValueError, match=r"method='vote' is unknown.*classifier.*knn"):
        sd.pp.scrublet(adata, method="vote")
    assert "doublet_score" not in adata.obs
