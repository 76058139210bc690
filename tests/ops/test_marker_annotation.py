"""Annotation by markers: CellAssign's likelihood by scipy, the maximum, planted and known types, references."""

from __future__ import annotations

from typing import Any

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy.special import logsumexp
from scipy.stats import dirichlet, nbinom, norm

import scdiffx as sd
from helpers import called, pbmc_counts
from scdiffx import ops
from scdiffx.ops import _marker_fit

# Columns of the planted matrix; the last type is that of cells of no type.
PLANTED = ((2, 5, 9), (1, 5, 7), (0, 11), ())
FOLDS = np.array([2.6, 2.2, 3.0, 2.5, 2.4, 2.8, 3.2, 2.3])
SHARES = np.array([0.4, 0.3, 0.2, 0.1])
BLOOD = {
    "B": ["CD79A", "CD79B", "MS4A1"],
    "T/NK": ["CD3D", "CD3E", "GNLY", "NKG7"],
    "Myeloid": ["LYZ", "CST3", "S100A9"],
}


def planted(n: int = 500, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts (cells, 40 genes) of the model, the types, and size factors; shape 2 at all means."""
    rng = np.random.default_rng(seed)
    types = rng.choice(4, n, p=SHARES)
    size = rng.lognormal(0, 0.3, n)
    log_mean = np.tile(rng.uniform(-1.5, 0, 40), (n, 1))
    entry = iter(FOLDS)
    for number, genes in enumerate(PLANTED):
        for gene in genes:
            log_mean[types == number, gene] += next(entry)
    mean = size[:, None] * np.exp(log_mean)
    return rng.poisson(mean * rng.gamma(2, 0.5, mean.shape)).astype(np.float32), types, size


def by_scipy(op: ops.MarkerAnnotation, x: np.ndarray, size: np.ndarray, batch: np.ndarray | None = None) -> np.ndarray:
    """Log probability of each cell and type, gene by gene, from the definition of the model."""
    columns = sorted({gene for genes in op.markers for gene in genes})
    centres, heights = (np.asarray(v, np.float64) for v in (op.fit.basis, op.dispersion))
    baseline = np.asarray(op.baseline, np.float64)[np.zeros(len(x), int) if batch is None else batch]
    folds = iter(np.asarray(op.log_folds, np.float64))
    total = np.empty((len(x), len(op.markers)))
    for number, genes in enumerate(op.markers):
        log_mean = np.log(size)[:, None] + baseline
        for gene in sorted(genes):
            log_mean[:, columns.index(gene)] += next(folds)
        mean = np.exp(log_mean)
        width = centres[1] - centres[0]
        shape = 1e-10 + (heights * np.exp(-((mean[..., None] - centres) ** 2) / (2 * width**2))).sum(-1)
        log_p = nbinom.logpmf(x[:, columns], shape, shape / (shape + mean))
        total[:, number] = log_p.sum(1) + np.log(np.asarray(op.proportions, np.float64)[number])
    return total


def priors(op: ops.MarkerAnnotation) -> float:
    """The logarithms of CellAssign's priors, with the best mean and standard deviation of the normal."""
    p, logs = np.asarray(op.proportions, np.float64), np.log(np.asarray(op.log_folds, np.float64))
    spread = max(logs.std(), op.settings.min_sd)
    return float(dirichlet.logpdf(p / p.sum(), np.full(len(p), 0.01)) + norm.logpdf(logs, logs.mean(), spread).sum())


@pytest.fixture(scope="module")
def fitted() -> tuple[ops.MarkerAnnotation, np.ndarray, np.ndarray, np.ndarray]:
    x, types, size = planted()
    op = ops.MarkerAnnotation(markers=PLANTED, settings=ops.MarkerSettings(n_starts=1))
    return op.init(jnp.asarray(x), jnp.asarray(size, jnp.float32)), x, types, size


def test_the_likelihood_is_the_models_by_scipy(fitted: Any) -> None:
    op, x, _, size = fitted
    expected = by_scipy(op, x.astype(np.float64), size)
    found = called(op, jnp.asarray(x), jnp.asarray(size, jnp.float32))
    np.testing.assert_allclose(found.log_likelihood, logsumexp(expected, axis=1), rtol=1e-5, atol=1e-4)
    posterior = np.exp(expected - logsumexp(expected, axis=1, keepdims=True))
    np.testing.assert_allclose(found.probabilities, posterior, atol=1e-4)
    np.testing.assert_allclose(float(op.fit.log_likelihood), logsumexp(expected, axis=1).sum(), rtol=1e-6)
    total = logsumexp(expected, axis=1).sum() + priors(op)
    np.testing.assert_allclose(float(op.fit.objective), total, rtol=1e-5)


def test_no_neighbouring_parameters_are_better(fitted: Any) -> None:
    op, x, _, size = fitted

    def objective(op: ops.MarkerAnnotation) -> float:
        total = by_scipy(op, x.astype(np.float64), size)
        return float(logsumexp(total, axis=1).sum() + priors(op))

    assert bool(op.fit.converged)
    best = objective(op)
    for name in ("baseline", "log_folds", "dispersion", "proportions"):
        value = np.asarray(getattr(op, name), np.float64)
        for seed in range(4):
            factor = np.exp(0.03 * np.random.default_rng(seed).standard_normal(value.shape))
            moved = value * factor / ((value * factor).sum() if name == "proportions" else 1)
            assert objective(ops.replace(op, **{name: moved})) < best + 0.01, name
    # Expectation and maximisation would not move the proportions: they are those of the posterior, less the prior.
    posterior = np.asarray(called(op, jnp.asarray(x), jnp.asarray(size, jnp.float32)).probabilities, np.float64)
    weights = posterior.sum(0) - 0.99
    np.testing.assert_allclose(op.proportions, weights / weights.sum(), atol=2e-4)


def test_planted_types_and_folds_are_found(fitted: Any) -> None:
    op, x, types, size = fitted
    found = called(op, jnp.asarray(x), jnp.asarray(size, jnp.float32))
    told = np.asarray(found.types)
    truth = np.where(types == 3, -1, types)
    assert (told == truth).mean() > 0.9
    assert (told[types == 3] == -1).mean() > 0.6
    np.testing.assert_allclose(op.log_folds, FOLDS, atol=0.5)
    np.testing.assert_allclose(op.proportions, SHARES, atol=0.06)
    chances, confidence = np.asarray(found.probabilities), np.asarray(found.confidence)
    np.testing.assert_array_equal(confidence, chances[:, :3].max(1))
    np.testing.assert_array_equal(told == -1, (confidence < 0.5) | (chances.argmax(1) == 3))
    assert float(found.unlike.mean()) == pytest.approx(0.02, abs=0.01)


@pytest.mark.slow
def test_batches_have_levels_of_their_own() -> None:
    x, types, size = planted(600, seed=3)
    batch = np.arange(600) % 2
    rng = np.random.default_rng(1)
    # In the second batch the first type's markers are everywhere ten times as frequent.
    x[:, [2, 9]] = np.where(batch[:, None] == 1, rng.poisson(10 * x[:, [2, 9]]), x[:, [2, 9]])
    truth = np.where(types == 3, -1, types)
    inputs = jnp.asarray(x), jnp.asarray(size, jnp.float32)
    new = ops.MarkerAnnotation(markers=PLANTED, settings=ops.MarkerSettings(n_starts=1, tol=1e-4))
    plain, op = new.init(*inputs), new.init(*inputs, jnp.asarray(batch, jnp.int32))
    assert op.baseline.shape == (2, 7)
    found = called(op, *inputs, jnp.asarray(batch, jnp.int32))
    expected = logsumexp(by_scipy(op, x.astype(np.float64), size, batch), axis=1)
    np.testing.assert_allclose(found.log_likelihood, expected, rtol=1e-5, atol=1e-3)
    right = (np.asarray(found.types) == truth).mean()
    assert right > 0.85
    assert right > (np.asarray(called(plain, *inputs).types) == truth).mean() + 0.03
    with pytest.raises(ValueError, match="2 batches"):
        op(*inputs)


@pytest.mark.slow
def test_starts_lead_to_one_maximum_and_subsamples_to_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, size = planted(600, seed=5)
    table = np.column_stack([x[:, [0, 1, 2, 5, 7, 9, 11]], np.log(size), np.zeros(600)]).astype(np.float64)
    settings = ops.MarkerSettings(n_starts=3, tol=1e-4)
    with jax.enable_x64(True):
        at = _marker_fit.layout(PLANTED)
        begins = _marker_fit.starts(table, 1, at, settings, np.random.default_rng(0))
        centres, best = _marker_fit.fitted(table, 1, PLANTED, settings, 0)
        ends = [_marker_fit.climb(table, begin, centres, PLANTED, settings).objective for begin in begins]
        monkeypatch.setattr(_marker_fit, "_SUBSAMPLE", 300)
        through_part = _marker_fit.fitted(table, 1, PLANTED, settings, 1)[1]
    np.testing.assert_allclose(ends, best.objective, atol=0.2)
    assert through_part.objective == pytest.approx(best.objective, abs=0.2)


@pytest.fixture(scope="module")
def blood() -> ad.AnnData:
    adata = pbmc_counts()
    names = adata.obs["cell_type"].astype(str)
    broad = names.map(lambda name: "B" if "B" in name else "T/NK" if name[:2] in ("CD4", "CD8") else None)
    adata.obs["broad"] = broad.where(~names.str.contains("NK|CD4|CD8"), "T/NK").where(
        ~names.str.contains("Mono|Dendritic"), "Myeloid"
    )
    return adata[:300].copy()


@pytest.mark.slow
def test_blood_cells_by_dictionary_table_and_reference(blood: ad.AnnData) -> None:
    adata = sd.tl.annotate(blood, mode="cellassign", markers=BLOOD, copy=True)
    told, truth = adata.obs["annotation"].astype(str), blood.obs["broad"].fillna("none").astype(str)
    known = (truth != "none").to_numpy()
    assert (told == truth)[known].mean() > 0.85
    entry, chances = adata.uns["annotation"], adata.obsm["annotation_probabilities"]
    assert list(chances) == ["B", "T|NK", "Myeloid", "unassigned"] == list(entry["log_folds"])
    assert entry["converged"]
    assert list(entry["names"]) == ["B", "T/NK", "Myeloid"]
    assert ((entry["log_folds"].loc[BLOOD["B"], "B"] >= 2) & (entry["log_folds"].loc[BLOOD["B"], "Myeloid"] == 0)).all()
    assert entry["unassigned"] == pytest.approx((told == "unassigned").mean())
    assert entry["log_likelihood"] < 0
    genes = sorted({gene for own in BLOOD.values() for gene in own})
    table = pd.DataFrame({name: [int(g in own) for g in genes] for name, own in BLOOD.items()}, index=genes)
    again = sd.tl.annotate(blood, mode="cellassign", markers=table.assign(none=0), copy=True)
    np.testing.assert_allclose(again.obsm["annotation_probabilities"], chances, atol=1e-6)
    # The same cells, with genes in another order and one that is not a marker missing.
    moved = blood[:, np.random.default_rng(0).permutation([g for g in blood.var_names if g != "FTL"])].copy()
    moved.obs["size"] = blood.obs["size"] = np.asarray(blood.X.sum(1)).ravel() / 1000
    settings = {"mode": "cellassign", "markers": BLOOD, "size_factors": "size", "copy": True}
    straight, mapped = (sd.tl.annotate(a, reference=r, **settings) for a, r in ((blood, None), (moved, blood)))
    tables = (a.obsm["annotation_probabilities"] for a in (straight, mapped))
    # Other starts can end at another of the maxima of the dispersion, which lie within a tenth of a nat.
    np.testing.assert_allclose(*tables, atol=0.03)
    assert mapped.uns["annotation"]["unlike"] == pytest.approx(0.02, abs=0.01)


@pytest.mark.slow
def test_a_reference_unlike_the_cells_is_reported(blood: ad.AnnData) -> None:
    query = blood.copy()
    counts = query.X.toarray()
    counts[:, query.var_names.get_indexer(["CD79A", "GNLY"])] = 7
    query.X = counts
    settings = {"mode": "cellassign", "markers": BLOOD, "copy": True}
    with pytest.warns(UserWarning, match=r"\d+% of the cells have less likely counts.*another batch") as caught:
        found = sd.tl.annotate(query, reference=blood, **settings)
    assert caught[0].filename == __file__
    assert found.uns["annotation"]["unlike"] > 0.3
    fewer = blood[:, [*BLOOD["B"], *BLOOD["T/NK"], *BLOOD["Myeloid"]]].copy()
    with pytest.warns(UserWarning, match=r"of the counts of `adata` are of genes that the reference lacks"):
        sd.tl.annotate(blood, reference=fewer, **settings)


@pytest.mark.slow
def test_in_a_plan_the_parameters_learn(blood: ad.AnnData) -> None:
    genes = [gene for own in BLOOD.values() for gene in own]
    table = pd.DataFrame({name: [int(gene in own) for gene in genes] for name, own in BLOOD.items()}, index=genes)
    plan = sd.plan(blood.copy())
    sd.tl.annotate(plan, mode="cellassign", markers=table, threshold=0.0)
    loss = sd.losses.cross_entropy("annotation_probabilities", "broad")
    fitted = sd.fit(plan, loss, n_steps=5, rng=0)
    found = blood.copy()
    fitted.apply(found)
    # The table has no column for cells of no type.
    assert list(found.obsm["annotation_probabilities"]) == ["B", "T|NK", "Myeloid"]
    assert set(found.obs["annotation"]) == set(BLOOD)
    assert fitted.history["train"][-1] < fitted.history["train"][0]


@pytest.mark.filterwarnings("ignore:markers")
def test_markers_that_cannot_be_name_themselves(blood: ad.AnnData) -> None:
    def refused(markers: Any, match: str, error: type[Exception] = ValueError, **kwargs: Any) -> None:
        with pytest.raises(error, match=match):
            sd.tl.annotate(blood.copy(), mode="cellassign", markers=markers, **kwargs)

    refused(None, "needs markers=")
    refused(["LYZ"], "markers is a list", TypeError)
    refused({"B": "CD79A"}, r"markers\['B'\]='CD79A' must be a list", TypeError)
    refused(BLOOD | {"NK": []}, r"no gene for \['NK'\]")
    refused(BLOOD | {"NK": ["ABSENT"]}, r"no marker of \['NK'\] is in `adata` with counts")
    refused(BLOOD | {"unassigned": ["FTL"]}, "type called 'unassigned'")
    refused(BLOOD | {"T|NK": ["FTL"]}, "differ only by '/'")
    refused(BLOOD | {"B2": BLOOD["B"][::-1]}, "markers of 'B' and 'B2' are the same")
    refused({"B": ["CD79A"]}, "name 1 types")
    table = pd.DataFrame({"B": [1, 0], "T": [0, 2]}, index=["CD79A", "CD3D"])
    refused(table, "table of 0 and 1")
    refused(table.clip(upper=1).assign(a=0, b=0), r"no gene for \['a', 'b'\]")
    refused(BLOOD, "2 cells|3 cells|too few", reference=blood[:3].copy())
    refused(BLOOD, "pass an AnnData", TypeError, reference="folder")
    refused(BLOOD, "no meaning beside a reference", reference=blood, batch_key="cell_type")


def test_missing_markers_are_named_in_warnings(blood: ad.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = blood.copy()
    silent.X[:, silent.var_names.get_indexer(["MS4A1"])] = 0
    named: dict[str, Any] = {}

    def init(self: ops.MarkerAnnotation, *args: Any, **kwargs: Any) -> Any:
        named["markers"] = self.markers
        raise RuntimeError("not needed here")

    monkeypatch.setattr(ops.MarkerAnnotation, "init", init)
    with pytest.warns(UserWarning, match="left out") as caught, pytest.raises(RuntimeError):
        sd.tl.annotate(silent, mode="cellassign", markers=BLOOD | {"CD34+": ["CD34X", "FTL"]})
    said = " ".join(str(w.message) for w in caught)
    assert "['CD34X'] are not in `adata.var_names`" in said
    assert "['MS4A1'] are without a count" in said
    assert [len(genes) for genes in named["markers"]] == [2, 4, 3, 1, 0]
