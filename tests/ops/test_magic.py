"""MAGIC against magic-impute and against its definition; derivatives and cost are in test_contract."""

from __future__ import annotations

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.spatial.distance import cdist

import scdiffx as sd
from helpers import called, pbmc_counts
from scdiffx import ops
from scdiffx._core.fields import replace
from scdiffx.losses._terms import MolecularCrossValidation

# magic-impute 3.0.0 with graphtools 2.1.0 (numpy 1.26) on the input of `roots`: cells 0, 1, 700, 1499; t = 3, then 7.
IMPUTED = {
    3: [
        [10.664212, 3.69222, 2.160853, 0.748762, 1.103141],
        [10.724127, 4.478677, 2.267172, 4.134825, 0.628248],
        [11.433587, 4.258019, 2.638898, 3.068867, 0.762545],
        [11.783939, 3.788775, 2.31605, 4.547515, 0.838104],
    ],
    7: [
        [10.862372, 4.132225, 2.378535, 0.49821, 1.154004],
        [11.055483, 4.302317, 2.314628, 3.813075, 0.670971],
        [11.313614, 4.371503, 2.393092, 3.088563, 0.700341],
        [11.241062, 4.078183, 2.357243, 4.230652, 0.699379],
    ],
}
AUTO = 7


@pytest.fixture
def roots(_paul15: ad.AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Square roots of normalised counts of 1,500 cells, genes in order of their mean; and the 30 genes of the graph."""
    counts = sp.csr_matrix(_paul15.X[:1500]).astype(np.float64)
    scaled = (sp.diags(1e4 / np.asarray(counts.sum(1)).ravel()) @ counts).sqrt().tocsr()
    order = np.argsort(-np.asarray(scaled.mean(0)).ravel(), kind="stable")
    return scaled[:, order].toarray(), scaled[:, np.sort(order[:30])].toarray()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("t", [3, 7])
def test_values_equal_magic_impute(roots: tuple[np.ndarray, np.ndarray], t: int) -> None:
    values, z = (jnp.asarray(a) for a in roots)
    genes = values[:, jnp.asarray([0, 50, 200, 500, 1000])]
    op = ops.Magic(t=float(t)).init(genes, z)
    found = called(op, genes, z).imputed[jnp.asarray([0, 1, 700, 1499])]
    np.testing.assert_allclose(found, IMPUTED[t], rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_automatic_time_equals_magic_impute(roots: tuple[np.ndarray, np.ndarray]) -> None:
    values, z = (jnp.asarray(a) for a in roots)
    op = ops.Magic(t=None).init(values[:, :40], z)
    assert float(op.t) == AUTO
    assert op.n_steps == AUTO


def walk(z: np.ndarray, knn: int, most: int, decay: float, bandwidth: float, stay: float) -> np.ndarray:
    """The transition matrix by its definition."""
    distance = cdist(z, z)
    order = np.sort(distance, axis=1)
    weight = np.exp(-((distance / (order[:, [knn]] * bandwidth)) ** decay))
    weight[(distance > order[:, [most]]) | (weight < 1e-4)] = 0
    np.fill_diagonal(weight, 0)
    weight = (weight + weight.T) / 2 + stay * np.eye(len(z))
    return weight / weight.sum(1, keepdims=True)


@pytest.mark.usefixtures("x64")
def test_every_setting_by_its_definition() -> None:
    rng = np.random.default_rng(0)
    z, x = rng.normal(size=(120, 4)), rng.poisson(2, size=(120, 3)).astype(float)
    op = ops.Magic(t=2.3, bandwidth=0.8, decay=2.5, self_weight=0.4, knn=(4, 10), n_steps=4)
    op = op.init(jnp.asarray(x), jnp.asarray(z))
    p = walk(z, 4, 10, 2.5, 0.8, 0.4)
    powers = [np.linalg.matrix_power(p, s) @ x for s in range(5)]
    expected = 0.7 * powers[2] + 0.3 * powers[3]
    np.testing.assert_allclose(called(op, jnp.asarray(x), jnp.asarray(z)).imputed, expected, rtol=1e-9)
    # A filter changes the weights of the walks; what is left of 1 goes to the mean of the gene.
    op = replace(op, filter=jnp.asarray([0.1, 0.0, -0.2, 0.0, 0.05]))
    expected = expected + 0.1 * powers[0] - 0.2 * powers[2] + 0.05 * powers[4] + 0.05 * x.mean(0)
    np.testing.assert_allclose(called(op, jnp.asarray(x), jnp.asarray(z)).imputed, expected, rtol=1e-9)


def test_on_a_graph_and_sparse_counts() -> None:
    adata = pbmc_counts(200, 90)
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    sd.pp.pca(adata, n_comps=8)
    sd.pp.neighbors(adata, n_neighbors=8)
    sd.pp.magic(adata, t=2, neighbors_key="neighbors")
    p = adata.obsp["connectivities"].toarray() + np.eye(200)
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(adata.layers["magic"], p @ p @ adata.X.toarray(), rtol=1e-4, atol=1e-5)
    names = [adata.var_names[i] for i in (7, 2)]
    sd.pp.magic(adata, names, t=2, neighbors_key="neighbors", key_added="few")
    np.testing.assert_allclose(adata.obsm["X_few"], adata.layers["magic"][:, [7, 2]], rtol=1e-5, atol=1e-6)
    assert list(adata.uns["few"]["genes"]) == names


@pytest.mark.slow
def test_copies_of_a_cell_have_finite_values_and_derivatives() -> None:
    z = jnp.asarray(np.repeat(np.random.default_rng(0).normal(size=(12, 3)), 10, axis=0), jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).poisson(1.0, size=(120, 2)), jnp.float32)
    op = ops.Magic().init(x, z)
    value, slope = jax.value_and_grad(lambda op, z: (op(x, z).imputed ** 2).sum(), argnums=(0, 1), allow_int=True)(
        op, z
    )
    assert np.isfinite(float(value))
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(slope) if g.dtype != jax.dtypes.float0)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"t": 0}, ValueError, "t=0"),
        ({"t": "automatic"}, ValueError, "t='automatic'"),
        ({"decay": 0}, ValueError, "decay=0"),
        ({"knn": 0}, ValueError, "knn=0"),
        ({"knn": 5, "knn_max": 4}, ValueError, "knn_max=4"),
        ({"knn": 50}, ValueError, "only 60 cells"),
        ({"genes": ["absent"]}, KeyError, "absent"),
        ({"genes": []}, KeyError, "Available"),
        ({"use_rep": "X_absent"}, KeyError, "X_absent"),
        ({"neighbors_key": "neighbors", "knn": 3}, ValueError, r"\['knn'\] have no meaning"),
        ({"neighbors_key": "absent"}, ValueError, "absent"),
    ],
)
def test_bad_settings_name_themselves(settings: dict, error: type[Exception], message: str) -> None:
    adata = pbmc_counts(60, 40)
    adata.obsm["X_pca"] = np.random.default_rng(0).normal(size=(60, 5))
    with pytest.raises(error, match=message):
        sd.pp.magic(adata, **settings)
    assert not adata.layers
    assert "magic" not in adata.uns


def deviance(adata: ad.AnnData, values: np.ndarray) -> float:
    term = MolecularCrossValidation(output="magic", target="test")
    keep = jnp.ones(adata.n_obs, bool)
    return float(jax.jit(term)(jnp.asarray(values), ops.Counts.from_scipy(adata.layers["test"]), keep))


@pytest.fixture(scope="module")
def split(_paul15: ad.AnnData) -> ad.AnnData:
    """Variable genes of 1,200 cells; `X` and everything computed comes from six tenths of the molecules."""
    adata = ad.AnnData(sp.csr_matrix(_paul15.X[:1200]).astype(np.float32))
    sd.pp.split_counts(adata)
    adata.X = adata.layers["fit"].copy()
    log = adata.copy()
    sd.pp.normalize_total(log)
    sd.pp.log1p(log)
    sd.pp.highly_variable_genes(log, n_top_genes=300)
    adata = adata[:, log.var["highly_variable"].to_numpy()].copy()
    adata.layers["linear"] = adata.X.copy()
    return adata


def smooth(target) -> None:
    sd.pp.normalize_total(target, layer="linear")
    sd.pp.normalize_total(target)
    sd.pp.log1p(target)
    sd.pp.pca(target, n_comps=30)
    sd.pp.magic(target, layer="linear")


@pytest.mark.slow
def test_held_out_molecules_are_predicted_better_than_by_neighbour_means(split: ad.AnnData) -> None:
    adata = split.copy()
    smooth(adata)
    sd.pp.neighbors(adata, n_neighbors=16)
    linear = adata.layers["linear"].toarray()
    neighbour_mean = linear + (adata.obsp["distances"] > 0).toarray() @ linear
    gene_mean = np.tile((linear / linear.sum(1, keepdims=True)).mean(0), (len(linear), 1))
    found = deviance(adata, adata.layers["magic"])
    assert found < 0.97 * deviance(adata, neighbour_mean)
    assert deviance(adata, neighbour_mean) < deviance(adata, gene_mean) < deviance(adata, linear)


@pytest.mark.slow
def test_a_fit_without_labels_improves_on_the_defaults(split: ad.AnnData) -> None:
    import optax

    plan = sd.plan(split)
    smooth(plan)
    loss = sd.losses.molecular_cross_validation("magic", "choose")
    fitted = sd.fit(plan, loss, learn="magic", n_steps=12, optimizer=optax.adam(0.05), progress=False)
    default = split.copy()
    smooth(default)
    assert fitted.adopted
    before, after = (deviance(split, a.layers["magic"]) for a in (default, fitted.apply(split, copy=True)))
    assert after < before
