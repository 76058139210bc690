"""Kolmogorov-Smirnov tests against scipy, and what they find in interferon-treated cells."""

from __future__ import annotations

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats

import scdiffx as sd
from conftest import _read
from helpers import called, pbmc_counts
from scdiffx import ops
from scdiffx._core.fields import replace


@pytest.fixture(scope="module")
def treated() -> ad.AnnData:
    """Control and interferon-treated cells, normalised, logarithms of the genes that are not rare."""
    adata = _read("ifnb_2k")
    adata.X = sp.csr_matrix(adata.X).astype(np.float32)
    sd.pp.normalize_total(adata, target_sum=1e4)
    sd.pp.log1p(adata)
    return adata[:, np.asarray(adata.X.mean(0)).ravel() > 0.1].copy()


@pytest.fixture(scope="module")
def result(treated: ad.AnnData) -> ad.AnnData:
    adata = treated.copy()
    sd.tl.differential_distribution(adata, "condition")
    return adata


def test_statistics_and_p_values_equal_scipys(result: ad.AnnData) -> None:
    table = result.uns["differential_distribution"]["table"]
    labels = result.obs["condition"].astype(str)
    group = table["group"].cat.categories[0]
    one = table[table["group"] == group].set_index("gene")
    cells = (labels == group).to_numpy()
    for i in range(0, result.n_vars, 97):
        x = result.X[:, [i]].toarray()[:, 0]
        expected = stats.ks_2samp(x[cells], x[~cells], method="asymp")
        found = one.loc[result.var_names[i]]
        assert found["statistic"] == pytest.approx(expected.statistic, abs=1e-6)
        assert found["pvalue"] == pytest.approx(expected.pvalue, rel=1e-3, abs=1e-12)
        assert found["mean_group"] == pytest.approx(x[cells].mean(), rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(one["qvalue"], stats.false_discovery_control(one["pvalue"]), rtol=1e-12)


def test_interferon_genes_are_on_top(result: ad.AnnData) -> None:
    table = result.uns["differential_distribution"]["table"]
    first = table[table["group"] == table["group"].iloc[0]]
    assert set(first["gene"][:8]) >= {"ISG15", "IFI6", "IFIT3", "IFIT1", "LY6E", "MX1"}
    assert (first["qvalue"][:8] < 1e-10).all()
    assert set(first["pattern"][:8]) <= {"shift", "both"}


@pytest.mark.slow
def test_permuted_labels_find_nothing(treated: ad.AnnData) -> None:
    adata = treated.copy()
    adata.obs["shuffled"] = np.random.default_rng(0).permutation(adata.obs["condition"].astype(str))
    sd.tl.differential_distribution(adata, "shuffled")
    table = adata.uns["differential_distribution"]["table"]
    pvalue = table["pvalue"][table["group"] == table["group"].iloc[0]]
    assert len(pvalue) > 500
    # Conservative on data with ties: never more small p-values than their level.
    for level in (0.01, 0.05, 0.2):
        assert (pvalue < level).mean() <= level + 3 * np.sqrt(level / len(pvalue))
    assert set(table["pattern"]) == {"none"}


def test_p_values_are_uniform_without_ties() -> None:
    rng = np.random.default_rng(0)
    adata = ad.AnnData(rng.normal(size=(400, 1000)).astype(np.float32))
    adata.obs["group"] = np.where(np.arange(400) % 2 == 0, "a", "b")
    sd.tl.differential_distribution(adata, "group", groups=["a"])
    table = adata.uns["differential_distribution"]["table"]
    assert stats.kstest(table["pvalue"], "uniform").statistic < 0.08


def test_planted_patterns_are_named() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(400, 40)), rng.normal(size=(400, 40))
    b[:, :10] += 1
    b[:, 10:20] *= 3
    b[:, 20:30] = 2 * b[:, 20:30] + 1.5
    adata = ad.AnnData(np.vstack([a, b]).astype(np.float32))
    adata.obs["group"] = np.repeat(["a", "b"], 400)
    sd.tl.differential_distribution(adata, "group", groups="b", reference="a")
    table = adata.uns["differential_distribution"]["table"].set_index("gene")
    found = table.loc[adata.var_names, "pattern"].astype(str).to_numpy()
    expected = np.repeat(["shift", "scale", "both", "none"], 10)
    assert (found == expected).mean() >= 0.9


def test_soft_memberships_and_soft_steps() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(300, 5)) + np.arange(300)[:, None] / 200, jnp.float32)
    codes = jnp.asarray(np.arange(300) // 150, jnp.int32)
    op = ops.DifferentialDistribution(pairs=((0, 1), (1, -1)))
    exact = called(op, x, codes).statistic
    np.testing.assert_allclose(exact[0], exact[1], atol=1e-6)
    np.testing.assert_allclose(called(op, x, jax.nn.one_hot(codes, 2)).statistic, exact, atol=1e-6)
    errors = [
        float(jnp.abs(called(replace(op, temperature=t), x, codes).statistic - exact).max()) for t in (0.5, 0.1, 1e-3)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 2 / 64
    slope = jax.grad(lambda x: op(x, codes).statistic.sum())(x)
    assert not np.asarray(slope).any()


def test_a_gene_that_does_not_vary_is_no_finding() -> None:
    adata = ad.AnnData(np.ones((20, 3), np.float32))
    adata.obs["group"] = np.repeat(["a", "b"], 10)
    sd.tl.differential_distribution(adata, "group")
    table = adata.uns["differential_distribution"]["table"]
    assert (table["pvalue"] == 1).all()
    assert (table["statistic"] == 0).all()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"groupby": "absent"}, KeyError, "absent"),
        ({"groups": ["no such"]}, KeyError, "no such"),
        ({"reference": "no such"}, KeyError, "no such"),
        ({"groupby": "one"}, ValueError, "two are needed"),
        ({"groupby": "lonely"}, ValueError, "at least two cells"),
        ({"groups": ["a"], "reference": "a"}, ValueError, "nothing to compare"),
        ({"alpha": 0}, ValueError, "alpha=0"),
        ({"temperature": 0}, ValueError, "temperature=0"),
    ],
)
def test_bad_settings_name_themselves(settings: dict, error: type[Exception], message: str) -> None:
    adata = pbmc_counts(40, 30)
    adata.obs["half"] = np.repeat(["a", "b"], 20)
    adata.obs["one"] = "a"
    adata.obs["lonely"] = np.where(np.arange(40) == 0, "a", "b")
    with pytest.raises(error, match=message):
        sd.tl.differential_distribution(adata, **({"groupby": "half"} | settings))
    assert not adata.varm
