"""Domains of a tissue: squidpy's graphs, averages and slopes by their definition, the choice of hops, real layers."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import multivariate_normal
from sklearn.metrics import adjusted_rand_score

import scdiffx as sd
from helpers import called
from scdiffx import ops
from scdiffx._core.spatial import neighbors_in_space


@pytest.fixture(scope="module")
def squidpy() -> dict[str, np.ndarray]:
    return dict(np.load(Path(__file__).parent / "spatial_squidpy.npz"))


def recorded(squidpy: dict[str, np.ndarray], name: str) -> sp.csr_matrix:
    indices, indptr = (squidpy[f"{name}_{part}"].astype(int) for part in ("indices", "indptr"))
    return sp.csr_matrix((np.ones(len(indices), np.float32), indices, indptr), shape=(len(indptr) - 1,) * 2)


def tissue(squidpy: dict[str, np.ndarray], noise: float = 0.7) -> ad.AnnData:
    """Three stripes in the places of real cells, each with a mean of its own, under noise."""
    where = squidpy["coordinates"]
    rng = np.random.default_rng(0)
    stripe = np.digitize(where[:, 1], np.quantile(where[:, 1], [0.3, 0.7]))
    means = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    z = means[stripe] + noise * rng.standard_normal((len(where), 4))
    adata = ad.AnnData(np.zeros((len(where), 1), np.float32))
    adata.obsm["spatial"], adata.obsm["X_pca"] = where, z.astype(np.float32)
    adata.obs["stripe"] = stripe
    adata.obs["slice"] = np.where(np.arange(len(where)) % 2, "odd", "even")
    return adata


def test_neighbours_are_squidpys_made_mutual(squidpy: dict[str, np.ndarray]) -> None:
    where, slices = squidpy["coordinates"], np.arange(len(squidpy["coordinates"])) % 2
    for name, settings in {
        "knn": {},
        "radius": {"radius": 1500.0},
        "knn_slices": {"batch": slices},
        "radius_slices": {"radius": 1500.0, "batch": slices},
    }.items():
        theirs = recorded(squidpy, name)
        theirs = ((theirs + theirs.T) > 0).astype(np.float32)
        assert (neighbors_in_space(where, **settings) != theirs).nnz == 0, name


def test_small_slices_and_bad_coordinates() -> None:
    graph = neighbors_in_space(np.arange(8.0).reshape(4, 2), batch=np.array([0, 0, 1, 2]))
    assert graph.nnz == 2
    for settings, match in (({"n_neighbors": 0}, "n_neighbors=0"), ({"radius": -1.0}, "radius=-1")):
        with pytest.raises(ValueError, match=match):
            neighbors_in_space(np.zeros((4, 2)), **settings)
    with pytest.raises(ValueError, match="finite"):
        neighbors_in_space(np.full((4, 2), np.nan))


def test_each_part_by_its_definition(squidpy: dict[str, np.ndarray]) -> None:
    """On squidpy's graph, which is not symmetric; cells of different slices are not joined, whatever it says."""
    adata, where = tissue(squidpy), squidpy["coordinates"]
    z = np.asarray(adata.obsm["X_pca"], np.float64)
    even = adata.obs["slice"].to_numpy() == "even"
    near = recorded(squidpy, "knn").toarray() * (even[:, None] == even)
    hop = (near + np.eye(len(z))) / (near.sum(1) + 1)[:, None]
    args = (jnp.asarray(z, jnp.float32), jnp.asarray(where), ops.Graph.from_scipy(recorded(squidpy, "knn")), even + 0)
    settings = ops.SpatialSettings(n_comps=8, n_refine=2)
    op = ops.SpatialDomains(gradient=0.5, mixture=ops.TiedMixture(n_init=2), n_domains=3, settings=settings)
    op = op.init(*args)
    # Held-out cells take no part in any average, each is predicted by that of the others.
    errors, fold = np.asarray(op.projection.errors), np.asarray(jax.random.permutation(jax.random.key(0), len(z)) % 5)
    z -= z.mean(0)
    walk, total = np.linalg.matrix_power(hop, 3), 0.0
    for i in range(5):
        kept = (fold != i).astype(float)
        reached = walk @ kept
        predicted = walk @ (kept[:, None] * z) / np.where(reached > 0, reached, 1)[:, None]
        total += ((z - predicted)[fold == i] ** 2).sum()
    assert errors[3] == pytest.approx(total / (z**2).sum(), rel=1e-4)
    assert errors[0] == pytest.approx(1)
    assert errors.argmin() == op.hops > 0
    # The vote of the neighbours, twice, on the posterior probabilities of the mixture.
    result, mixture = called(op, *args), op.mixture
    density = [multivariate_normal(m, mixture.covariance).pdf(result.embedding) for m in np.asarray(mixture.means)]
    posterior = np.stack(density, 1) * np.asarray(mixture.weights)
    posterior /= posterior.sum(1, keepdims=True)
    np.testing.assert_allclose(result.memberships, hop @ hop @ posterior, atol=2e-3)
    np.testing.assert_array_equal(result.labels, np.asarray(result.memberships).argmax(1))
    assert adjusted_rand_score(adata.obs["stripe"], np.asarray(result.labels)) > 0.6
    # Between whole numbers of hops results are interpolated.
    op = ops.replace(op, hops=op.hops - 0.3)
    result = called(op, *args)
    average = 0.3 * np.linalg.matrix_power(hop, errors.argmin() - 1) @ z
    average += 0.7 * np.linalg.matrix_power(hop, errors.argmin()) @ z
    apart = where[None] - where[:, None]
    unit = apart / np.maximum(np.linalg.norm(apart, axis=2), 1e-12)[:, :, None]
    change = (average[None] - average[:, None])[..., None] * unit[:, :, None, :]
    share = near / np.maximum(near.sum(1), 1)[:, None]
    slope = np.linalg.norm((share[..., None, None] * change).sum(1), axis=2)
    # All components together are a rotation of the features.
    features, found = np.concatenate([average, 0.5 * slope], 1), np.asarray(result.embedding, np.float64)
    expected, found = features - features.mean(0), found - found.mean(0)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-4)


def test_squidpys_graph_is_used_and_leiden_sets_the_number(squidpy: dict[str, np.ndarray]) -> None:
    adata = tissue(squidpy)
    adata.obsp["spatial_connectivities"] = recorded(squidpy, "knn")
    sd.tl.spatial_domains(adata, batch_key="slice", resolution=0.3, refine=0)
    entry = adata.uns["spatial_domain"]
    assert entry["params"]["connectivities_key"] == "spatial_connectivities"
    assert entry["held_out_error"].argmin() == entry["hops"] > 0
    member, codes = adata.obsm["spatial_domain_probabilities"], adata.obs["spatial_domain"].cat.codes.to_numpy()
    assert 2 < member.shape[1] < 30
    np.testing.assert_array_equal(member.argmax(1), codes)
    assert (np.diff(np.bincount(codes)) <= 0).all()
    # A graph is enough.
    del adata.obsm["spatial"]
    sd.tl.spatial_domains(adata, batch_key="slice", resolution=0.3, refine=0, key_added="again")
    assert (adata.obs["again"] == adata.obs["spatial_domain"]).all()


@pytest.mark.slow
def test_nothing_is_averaged_where_space_tells_nothing(squidpy: dict[str, np.ndarray]) -> None:
    adata = tissue(squidpy)
    adata.obsm["spatial"] = np.random.default_rng(0).permutation(adata.obsm["spatial"])
    with pytest.warns(UserWarning, match="neighbours in space do not predict expression"):
        sd.tl.spatial_domains(adata, 3, n_neighbors=3, n_init=1)
    np.testing.assert_allclose(adata.uns["spatial_domain"]["hops"], 0.001, rtol=1e-6)


@pytest.mark.slow
def test_layers_of_a_cortex_are_found(data_dir: Path) -> None:
    adata = ad.read_h5ad(data_dir / "dlpfc_151510" / "dlpfc_151510.h5ad")
    # Half of the slice, across all layers.
    adata = adata[adata.obsm["spatial"][:, 1] < np.median(adata.obsm["spatial"][:, 1])].copy()
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    sd.pp.pca(adata, n_comps=30)
    sd.tl.spatial_domains(adata, 7, n_init=3)
    known = (adata.obs["layer"].astype(str) != "NA").to_numpy()
    score = adjusted_rand_score(adata.obs["layer"][known], adata.obs["spatial_domain"][known])
    # Leiden without space reaches .33 on the whole slice, this method .55: benchmarks/spatial_domains.py.
    assert score > 0.45
