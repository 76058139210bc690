"""Soft quality control against the filter it softens; derivatives are in test_contract."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import scanpy as sc

import scdiffx as sd
from helpers import pbmc_counts
from scdiffx import ops

BOUNDS = {"n_genes_by_counts": (20, 60), "total_counts": (None, 150.0)}


@pytest.fixture
def adata():
    adata = pbmc_counts(300, 150)
    sc.pp.calculate_qc_metrics(adata, percent_top=None, inplace=True)
    return adata


def test_the_limit_is_the_filter(adata) -> None:
    sd.pp.cell_weights(adata, BOUNDS, temperature=1e-6)
    genes, total = adata.obs["n_genes_by_counts"], adata.obs["total_counts"]
    on_a_bound = genes.isin([20, 60]) | (total == 150)
    kept = ((genes > 20) & (genes < 60) & (total < 150)).to_numpy()
    assert 0.1 < kept.mean() < 0.9
    np.testing.assert_array_equal(adata.obs["cell_weight"][~on_a_bound], kept[~on_a_bound])


def test_weights_by_their_definition(adata) -> None:
    sd.pp.cell_weights(adata, BOUNDS, temperature=0.3, key_added="soft")
    genes, total = (adata.obs[name].to_numpy(np.float64) for name in BOUNDS)

    def factor(x: np.ndarray, cutoff: float, side: int) -> np.ndarray:
        spread = 1.4826 * np.median(np.abs(x - np.median(x)))
        return 1 / (1 + np.exp(-side * (x - cutoff) / (0.3 * spread)))

    expected = factor(genes, 20, 1) * factor(genes, 60, -1) * factor(total, 150, -1)
    np.testing.assert_allclose(adata.obs["soft"], expected, rtol=1e-4, atol=1e-7)


def test_a_metric_that_hardly_varies_has_a_spread() -> None:
    mostly = jnp.asarray([0.0] * 9 + [5.0])
    op = ops.CellWeights(cutoff=jnp.asarray([1.0, 1.0]), sides=((0, -1), (1, 1)))
    weights = op.init(mostly, 3 * jnp.ones(10))(mostly, 3 * jnp.ones(10))
    assert bool(jnp.isfinite(weights).all())
    assert float(weights[9]) < 0.01 < 0.9 < float(weights[0])


@pytest.mark.parametrize(
    ("bounds", "settings", "error", "message"),
    [
        ({"absent": (1, 2)}, {}, KeyError, "absent"),
        ({"cell_type": (1, 2)}, {}, TypeError, "numeric"),
        ({"total_counts": (5, 2)}, {}, ValueError, "below the upper"),
        ({"total_counts": (None, np.inf)}, {}, ValueError, "None for no bound"),
        ({"total_counts": (None, None)}, {}, ValueError, "no bound"),
        ({}, {}, ValueError, "no bound"),
        ({"total_counts": (1, 2)}, {"temperature": 0}, ValueError, "temperature=0"),
        ({"broken": (1, 2)}, {}, ValueError, "not finite for cell"),
    ],
)
def test_bad_bounds_name_themselves(adata, bounds, settings, error, message) -> None:
    adata.obs["broken"] = np.where(np.arange(300) == 7, np.nan, 1)
    with pytest.raises(error, match=message):
        sd.pp.cell_weights(adata, bounds, **settings)
    assert "cell_weight" not in adata.obs
