"""Domains of a tissue: squidpy's graphs, averages and slopes by their definition, the choice of hops, real layers."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
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


def tissue(squidpy: dict[str, np.ndarray], noise: float = 2.0) -> ad.AnnData:
    """Three stripes in the places of real cells, each with a mean of its own, under noise that hides it in a cell."""
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


def test_averages_slopes_and_votes_by_their_definition(squidpy: dict[str, np.ndarray]) -> None:
    where = squidpy["coordinates"]
    z = np.asarray(tissue(squidpy).obsm["X_pca"])
    near = neighbors_in_space(where, n_neighbors=3).toarray()
    hop = (near + np.eye(len(z))) / (near.sum(1) + 1)[:, None]
    average = 0.7 * hop @ z + 0.3 * hop @ hop @ z
    apart = where[None] - where[:, None]
    unit = apart / np.maximum(np.linalg.norm(apart, axis=2), 1e-12)[:, :, None]
    change = (average[None] - average[:, None])[..., None] * unit[:, :, None, :]
    slope = np.linalg.norm((near[..., None, None] * change).sum(1) / near.sum(1)[:, None, None], axis=2)
    features = np.concatenate([average, 0.5 * slope], 1)
    settings = ops.SpatialSettings(n_neighbors=3, n_comps=8, n_refine=2)
    op = ops.SpatialDomains(
        hops=1.3, gradient=0.5, mixture=ops.TiedMixture(n_init=2), n_domains=3, settings=settings
    ).init(jnp.asarray(z), jnp.asarray(where))
    result = called(op, jnp.asarray(z), jnp.asarray(where))
    # All components together are a rotation of the features.
    centred, found = features - features.mean(0), np.asarray(result.embedding)
    np.testing.assert_allclose(found @ found.T, centred @ centred.T, atol=1e-4)
    assert (np.diff((found**2).sum(0)) <= 0).all()
    plain = op.mixture(result.embedding)
    np.testing.assert_allclose(result.memberships, hop @ hop @ np.asarray(plain.memberships), atol=1e-3)
    np.testing.assert_array_equal(result.labels, np.asarray(result.memberships).argmax(1))


def test_hops_are_those_that_predict_held_out_cells_best(squidpy: dict[str, np.ndarray]) -> None:
    adata = tissue(squidpy)
    sd.tl.spatial_domains(adata, 3, n_init=2, n_neighbors=3)
    entry, codes = adata.uns["spatial_domain"], adata.obs["spatial_domain"].cat.codes.to_numpy()
    error = entry["held_out_error"]
    assert error.argmin() == entry["hops"] > 0
    assert adjusted_rand_score(adata.obs["stripe"], codes) > 0.6
    # The errors by their definition: held-out cells take no part, each is predicted by the mean of the others.
    z = np.asarray(adata.obsm["X_pca"], np.float64)
    z = z - z.mean(0)
    fold = np.asarray(jax.random.permutation(jax.random.key(0), np.arange(len(z)) % 5))
    near = neighbors_in_space(squidpy["coordinates"], n_neighbors=3).toarray()
    hop = (near + np.eye(len(near))) / (near.sum(1) + 1)[:, None]
    walk = np.linalg.matrix_power(hop, 3)
    total = 0.0
    for i in range(5):
        kept = (fold != i).astype(float)
        reached = walk @ kept
        predicted = walk @ (kept[:, None] * z) / np.where(reached > 0, reached, 1)[:, None]
        total += ((z - predicted)[fold == i] ** 2).sum()
    assert error[3] == pytest.approx(total / (z**2).sum(), rel=1e-4)
    assert error[0] == pytest.approx(1)


def test_squidpys_graph_is_used_where_there_is_one(squidpy: dict[str, np.ndarray]) -> None:
    adata = tissue(squidpy)
    directed = recorded(squidpy, "knn")
    adata.obsp["spatial_connectivities"] = directed
    settings = {"hops": 2.0, "n_init": 2, "batch_key": "slice", "refine": 0}
    sd.tl.spatial_domains(adata, 3, **settings)
    assert adata.uns["spatial_domain"]["params"]["connectivities_key"] == "spatial_connectivities"
    # Cells of different slices are not joined, whatever the graph says.
    even = np.arange(adata.n_obs) % 2 == 0
    near = directed.toarray() * (even[:, None] == even)
    hop = (near + np.eye(len(near))) / (near.sum(1) + 1)[:, None]
    average = hop @ hop @ adata.obsm["X_pca"]
    centred, found = average - average.mean(0), adata.obsm["X_spatial_domain"]
    np.testing.assert_allclose(found @ found.T, centred @ centred.T, atol=1e-4)
    del adata.obsm["spatial"]
    sd.tl.spatial_domains(adata, 3, key_added="again", **settings)
    assert (adata.obs["again"] == adata.obs["spatial_domain"]).all()


@pytest.mark.slow
def test_leiden_sets_the_number_of_domains(squidpy: dict[str, np.ndarray]) -> None:
    adata = tissue(squidpy)
    sd.tl.spatial_domains(adata, hops=3.0, resolution=0.3, n_neighbors=3)
    sd.pp.neighbors(adata, n_neighbors=15, use_rep="X_spatial_domain")
    sd.tl.leiden(adata, 0.3)
    count = adata.obsm["spatial_domain_probabilities"].shape[1]
    assert count == len(adata.obs["leiden"].cat.categories) > 1


@pytest.mark.slow
def test_layers_of_a_cortex_are_found(data_dir: Path) -> None:
    adata = ad.read_h5ad(data_dir / "dlpfc_151510" / "dlpfc_151510.h5ad")
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    sd.pp.pca(adata, n_comps=30)
    sd.tl.spatial_domains(adata, 7, n_init=3)
    known = (adata.obs["layer"].astype(str) != "NA").to_numpy()
    score = adjusted_rand_score(adata.obs["layer"][known], adata.obs["spatial_domain"][known])
    # Leiden without space: .34. The choice of hops and the mixture are as in benchmarks/spatial_domains.py.
    assert score > 0.5
