"""Integration from counts: the likelihood by its formula, what is lowered, and what it reaches on real data."""

from __future__ import annotations

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scanpy as sc
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA

import scdiffx as sd
from conftest import _read
from helpers import directional_fd, pbmc_counts, random_direction, tree_vdot
from scdiffx import ops
from scdiffx.ops import _vae
from scdiffx.ops._integration import discrepancy, features
from scdiffx.ops._integration_models import Cells, CountsModel


@pytest.fixture(scope="module")
def adata() -> ad.AnnData:
    found = pbmc_counts(120, 60)
    found.obs["batch"] = np.where(np.arange(120) % 3, "b", "a")
    return found


@pytest.fixture(scope="module")
def model(adata: ad.AnnData) -> CountsModel:
    batch = (np.arange(120) % 3 > 0).astype(np.int32)
    return CountsModel(ops.Counts.from_scipy(adata.X), batch, 8, 3)


def test_errors_are_those_of_scipys_negative_binomial(adata: ad.AnnData, model: CountsModel) -> None:
    net = model.initial(np.random.default_rng(0))
    assert sorted([*model.held, *model.train]) == list(range(120))
    assert len(model.held) == 12
    index = np.arange(5, 35)
    h, error = jax.jit(model.forward)(net, Cells(model.rows(index), model.batch[index], None, None), None)
    np.testing.assert_allclose(h, model.codes(net)[index], atol=1e-5)
    counts = adata.X[index].toarray().astype(float)
    depth = counts.sum(1, keepdims=True)
    mean, std = (np.asarray(a, float) for a in jax.jit(_vae.encode)(net, counts.astype(np.float32)))
    hidden = np.maximum(mean @ net["decoder_in"] + net["decoder_batch"][model.batch[index]], 0)
    logits = hidden @ net["decoder_out"] + net["gene_bias"][model.batch[index]]
    mu = depth * np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    r = np.exp(net["log_theta"].astype(float))
    likelihood = stats.nbinom.logpmf(counts, r, r / (r + mu)).sum(1)
    divergence = ((mean**2 + std**2 - 1) / 2 - np.log(std)).sum(1)
    np.testing.assert_allclose(error, divergence - likelihood, rtol=1e-4)


def test_neighbours_to_keep_are_those_of_components_of_logarithms(adata: ad.AnnData, model: CountsModel) -> None:
    counts = adata.X.toarray()
    logs = np.log1p(60 * counts / np.maximum(counts.sum(1, keepdims=True), 1))
    expected = PCA(30, svd_solver="full").fit_transform(logs)
    found = model.before(np.arange(120))
    np.testing.assert_allclose(cdist(found, found), cdist(expected, expected), atol=0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivatives_of_what_is_lowered(model: CountsModel) -> None:
    net = {name: jnp.asarray(v, jnp.float64) for name, v in model.initial(np.random.default_rng(0)).items()}
    index = np.arange(0, 120, 2)
    rows = model.rows(index)
    member = np.random.default_rng(0).dirichlet(np.ones(3), 60)
    cells = Cells(rows._replace(data=np.asarray(rows.data, np.float64)), model.batch[index], member, 2.0)
    frequencies, phases = features(jax.random.key(0), 3, jnp.asarray(2.0))

    @jax.jit
    def cost(net):
        h, error = model.forward(net, cells, jax.random.key(1))
        return error.mean() + 50 * discrepancy(cells, h, 2, frequencies, phases)

    direction = random_direction(net)
    slope = tree_vdot(jax.grad(cost)(net), direction)
    assert abs(slope) > 1e-6
    np.testing.assert_allclose(directional_fd(cost, net, direction, (1e-5, 1e-6)), slope, rtol=1e-5)


@pytest.mark.slow
def test_a_plan_is_saved_with_its_networks_and_meets_new_cells(adata: ad.AnnData, tmp_path) -> None:
    plan = sd.plan(adata[:80].copy())
    settings = {"basis": None, "n_latent": 3, "n_hidden": 8, "max_steps": 2, "progress": False}
    sd.pp.wgan_integrate(plan, "batch", **settings)
    fit = sd.fit(plan, sd.losses.batch_mixing("X_wgan", "batch"), n_steps=2, progress=False)
    fit.save(tmp_path / "fit")
    new = adata[80:].copy()
    sd.Fitted.load(tmp_path / "fit").apply(new)
    net = {name.split("'")[1]: value for name, value in fit.params.items()}
    assert not any(name.startswith("critic") for name in net)
    expected = _vae.encode(net, new.X.toarray().astype(np.float32))[0]
    np.testing.assert_allclose(new.obsm["X_wgan"], expected, atol=1e-5)


@pytest.mark.parametrize("make", [ops.MMDIntegrate, ops.WGANIntegrate])
def test_refusals(model: CountsModel, make) -> None:
    with pytest.raises(ValueError, match=f"{make.__name__}.*init"):
        make(n_latent=3)(model.x, model.batch)
    with pytest.raises(ValueError, match="at least 10 cells"):
        make(n_latent=3).init(jnp.ones((4, 5)), jnp.asarray([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="two batches"):
        make(n_latent=3).init(model.x, 0 * model.batch)


@pytest.mark.slow
def test_protocols_mix_and_cell_lines_stay_apart() -> None:
    adata = _read("mixology_sc")[::4].copy()
    adata.layers["counts"] = adata.X.copy()
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=200, batch_key="batch")
    adata = adata[:, adata.var["highly_variable"]].copy()
    sc.pp.pca(adata, n_comps=20)
    sd.pp.mmd_integrate(adata, "batch", basis=None, layer="counts", max_steps=100, progress=False)
    batch, line = (adata.obs[key].to_numpy() for key in ("batch", "cell_line_demuxlet"))

    def measured(z: np.ndarray) -> tuple[float, float]:
        index = np.argsort(cdist(z, z), axis=1)[:, 1:31]
        shares = np.stack([(batch[index] == b).mean(1) for b in np.unique(batch)])
        return (1 / (shares**2).sum(0)).mean(), (line[index] == line[:, None]).mean()

    (mixed_before, kept_before), (mixed, kept) = measured(adata.obsm["X_pca"]), measured(adata.obsm["X_mmd"])
    # Three protocols: 3 at best.
    assert mixed > mixed_before + 0.3
    assert kept > 0.95 * kept_before
    history = adata.uns["mmd"]["history"]
    assert history["reconstruction"][history["kept"]] < history["reconstruction"][0]
    assert adata.obsm["X_mmd"].shape[1] == 10
