"""scikit-learn's interface to the neighbour search, beside scikit-learn's own transformer."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.base import clone
from sklearn.neighbors import KNeighborsTransformer as Theirs
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import scdiffx as sd
from scdiffx._core.knn import nearest_among


@pytest.fixture(scope="module")
def pcs(_pbmc68k_reduced: ad.AnnData) -> np.ndarray:
    """Principal components of blood cells, (700, 50) float32."""
    return np.asarray(_pbmc68k_reduced.obsm["X_pca"])


def assert_same_graph(ours: sp.csr_matrix, theirs: sp.csr_matrix) -> None:
    assert ours.shape == theirs.shape
    assert np.array_equal(ours.indptr, theirs.indptr)
    assert np.array_equal(ours.indices, theirs.indices)
    np.testing.assert_allclose(ours.data, theirs.data, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["distance", "connectivity"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "manhattan"])
def test_it_equals_that_of_scikit_learn(pcs: np.ndarray, mode: str, metric: str) -> None:
    old, new = pcs[:500].astype(np.float64), pcs[500:].astype(np.float64)
    ours = sd.KNeighborsTransformer(n_neighbors=9, mode=mode, metric=metric).fit(old)
    theirs = Theirs(n_neighbors=9, mode=mode, metric=metric).fit(old)
    assert_same_graph(ours.transform(old), theirs.transform(old))
    assert_same_graph(ours.transform(new), theirs.transform(new))
    assert ours.transform(old).indices[:: 9 + (mode == "distance")].tolist() == list(range(500))
    assert_same_graph(ours.fit_transform(old), ours.transform(old))
    assert ours.transform(old).dtype == np.float64


def test_scanpy_makes_the_same_graph_with_it(pbmc68k_reduced: ad.AnnData) -> None:
    import scanpy as sc

    # In float32, scikit-learn gives cells larger distances to themselves than the tolerance.
    pbmc68k_reduced.obsm["X_pca"] = pbmc68k_reduced.obsm["X_pca"].astype(np.float64)
    ours, theirs, by_us = pbmc68k_reduced, pbmc68k_reduced.copy(), pbmc68k_reduced.copy()
    sc.pp.neighbors(ours, transformer=sd.KNeighborsTransformer(n_neighbors=12), method="gauss")
    sc.pp.neighbors(theirs, transformer=Theirs(n_neighbors=12), method="gauss")
    assert ours.uns["neighbors"]["params"] == theirs.uns["neighbors"]["params"]
    for key in ("distances", "connectivities"):
        assert abs(ours.obsp[key] - theirs.obsp[key]).max() < 1e-5
    sd.pp.neighbors(by_us, 12, transformer=sd.KNeighborsTransformer(n_neighbors=12))
    assert abs(by_us.obsp["distances"] - sd.pp.neighbors(by_us, 12, copy=True).obsp["distances"]).max() < 1e-5


@pytest.mark.slow
def test_scanpy_makes_its_default_weights_with_it(pbmc68k_reduced: ad.AnnData) -> None:
    import scanpy as sc

    ours, default = pbmc68k_reduced, pbmc68k_reduced.copy()
    sc.pp.neighbors(ours, transformer=sd.KNeighborsTransformer(n_neighbors=12))
    sc.pp.neighbors(default, n_neighbors=12)
    # scikit-learn's own transformer does not: UMAP takes the rounding in its distances of cells to themselves for the
    # nearest neighbour.
    assert abs(ours.obsp["connectivities"] - default.obsp["connectivities"]).max() < 1e-4


def test_it_is_an_estimator(pcs: np.ndarray) -> None:
    made = sd.KNeighborsTransformer(n_neighbors=4, algorithm="exact", random_state=3)
    parameters = {"n_neighbors": 4, "mode": "distance", "metric": "euclidean", "algorithm": "exact", "random_state": 3}
    assert made.get_params() == parameters
    assert clone(made).set_params(n_neighbors=6).get_params() == parameters | {"n_neighbors": 6}
    piped = make_pipeline(StandardScaler(), sd.KNeighborsTransformer(n_neighbors=4)).fit_transform(pcs)
    assert_same_graph(piped, make_pipeline(StandardScaler(), Theirs(n_neighbors=4)).fit_transform(pcs))


def test_far_from_the_origin_and_among_copies(pcs: np.ndarray) -> None:
    old = np.concatenate([pcs[:300], pcs[:20]]).astype(np.float64) + 1e5
    new = pcs[:40] + 1e5
    ids, distances = nearest_among(new.astype(np.float64), old, 6, dtype=np.float64)
    every = np.sqrt(((new.astype(np.float64)[:, None] - old[None]) ** 2).sum(axis=2))
    order = np.lexsort((np.broadcast_to(np.arange(320), every.shape), every))[:, :6]
    assert np.array_equal(ids, order)
    np.testing.assert_allclose(distances, np.take_along_axis(every, order, axis=1), rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"n_neighbors": 0}, "n_neighbors=0"),
        ({"n_neighbors": 20}, "n_neighbors=20 needs at least 21 cells.*20"),
        ({"mode": "graph"}, r"mode='graph'.*'connectivity'"),
        ({"algorithm": "tree"}, r"algorithm='tree'.*'approximate'"),
        ({"metric": "best"}, r"metric='best'.*'cosine'"),
    ],
)
def test_bad_settings_name_themselves(pcs: np.ndarray, settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        sd.KNeighborsTransformer(**settings).fit_transform(pcs[:20])


def test_bad_data_name_themselves(pcs: np.ndarray) -> None:
    with pytest.raises(TypeError, match=r"[Ss]parse"):
        sd.KNeighborsTransformer().fit(sp.csr_matrix(pcs))
    with pytest.raises(ValueError, match=r"3 features.*50 features"):
        sd.KNeighborsTransformer().fit(pcs).transform(pcs[:, :3])
    with pytest.raises(ValueError, match="NaN"):
        sd.KNeighborsTransformer().fit(np.where(pcs > 1, np.nan, pcs))
    with pytest.raises(ValueError, match=r"3 features.*50"):
        nearest_among(pcs[:, :3], pcs, 4)
