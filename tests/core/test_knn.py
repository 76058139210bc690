"""Nearest neighbours against scikit-learn's brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA

from scdiffx._core import knn_leaf
from scdiffx._core.knn import METRICS, nearest

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def assert_is_nearest(x: np.ndarray, ids: np.ndarray, distances: np.ndarray, k: int, metric: str = "euclidean") -> None:
    """Right distances to the listed cells, and none of the others nearer: ties may be broken in any way."""
    truth = cdist(x.astype(np.float64), x.astype(np.float64), metric=metric)
    np.fill_diagonal(truth, 0)
    n = len(x)
    assert ids.shape == distances.shape == (n, k)
    assert ids.dtype == np.int32
    assert distances.dtype == np.float32
    np.testing.assert_array_equal(ids[:, 0], np.arange(n))
    np.testing.assert_array_equal(distances[:, 0], 0)
    assert all(len(set(row)) == k for row in ids.tolist())
    assert (np.diff(distances, axis=1) >= 0).all()
    np.testing.assert_allclose(distances, np.take_along_axis(truth, ids, axis=1), rtol=1e-5, atol=1e-7)
    np.fill_diagonal(truth, -1)
    best = np.maximum(np.sort(truth, axis=1)[:, :k], 0)
    np.testing.assert_allclose(distances, best, rtol=1e-5, atol=1e-7)


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    hits = sum(len(np.intersect1d(a[1:], b[1:])) for a, b in zip(found, truth, strict=True))
    return hits / truth[:, 1:].size


@pytest.fixture(scope="module")
def paul15_pca() -> np.ndarray:
    path = DATA / "paul15" / "paul15.h5ad"
    if not path.exists():
        pytest.skip("the data folder ../shared/data is absent")
    counts = pytest.importorskip("anndata").read_h5ad(path).X
    counts = np.asarray(counts.todense() if hasattr(counts, "todense") else counts, dtype=np.float64)
    counts = counts / counts.sum(axis=1, keepdims=True) * 1e4
    return PCA(50, random_state=0).fit_transform(np.log1p(counts))


@pytest.fixture(scope="module")
def noisy_clusters() -> np.ndarray:
    """12,000 cells like principal components of expression: few strong axes, branches, noise in 40 dimensions."""
    rng = np.random.default_rng(0)
    corners = rng.normal(scale=4, size=(8, 10))
    a, b = rng.integers(0, 8, (2, 12_000))
    t = rng.random((12_000, 1))
    x = rng.normal(scale=0.7, size=(12_000, 40))
    x[:, :10] += t * corners[a] + (1 - t) * corners[(a + b % 2) % 8]
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def clusters_exact(noisy_clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return nearest(noisy_clusters, 15, method="exact")


@pytest.mark.parametrize("metric", METRICS)
def test_exact_on_real_data(paul15_pca: np.ndarray, metric: str) -> None:
    assert_is_nearest(paul15_pca, *nearest(paul15_pca, 15, metric=metric), 15, metric)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "d", "k"), [(1, 3, 1), (2, 1, 2), (37, 2, 37), (300, 1, 5), (700, 120, 40)])
def test_exact_on_random_data(n: int, d: int, k: int, dtype: type) -> None:
    x = np.random.default_rng(n).normal(size=(n, d)).astype(dtype)
    assert_is_nearest(x, *nearest(x, k, method="exact"), k)


def test_sklearn_agrees(paul15_pca: np.ndarray) -> None:
    from sklearn.neighbors import NearestNeighbors

    expected, listed = NearestNeighbors(n_neighbors=15, algorithm="brute").fit(paul15_pca).kneighbors(paul15_pca)
    ids, distances = nearest(paul15_pca, 15, method="exact")
    # Its distance of a cell to itself is about 1e-6, not 0.
    np.testing.assert_allclose(distances[:, 1:], expected[:, 1:], rtol=1e-5)
    np.testing.assert_array_equal(np.sort(ids, axis=1), np.sort(listed, axis=1))


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e18])
def test_scale_of_the_data_is_irrelevant(scale: float) -> None:
    x = np.random.default_rng(1).normal(size=(600, 8)).astype(np.float32)
    ids, distances = nearest(x * np.float32(scale), 6)
    expected_ids, expected = nearest(x, 6)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(distances, expected * scale, rtol=1e-5)


def test_near_duplicates_far_from_the_centre() -> None:
    # Pairs 1e-4 apart at distance 1,000 from the centre: |x|^2 + |y|^2 - 2 x.y in float32 errs by about 0.1 there.
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(30, 20))
    centres *= 1000 / np.linalg.norm(centres, axis=1, keepdims=True)
    x = np.repeat(centres, 40, axis=0) + rng.normal(scale=1e-4, size=(1200, 20))
    assert_is_nearest(x, *nearest(x, 10, method="exact"), 10)


@pytest.mark.parametrize("metric", METRICS)
def test_all_cells_equal(metric: str) -> None:
    x = np.tile(np.arange(4.0), (400, 1))
    ids, distances = nearest(x, 9, metric=metric)
    np.testing.assert_array_equal(ids[:, 0], np.arange(400))
    assert all(len(set(row)) == 9 for row in ids.tolist())
    np.testing.assert_array_equal(distances, 0)


@pytest.mark.parametrize(("method", "n"), [("exact", 3_000), ("approximate", 10_000)])
def test_many_copies_of_few_cells(method: str, n: int) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(60, 5))[rng.integers(0, 60, n)].astype(np.float32)
    ids, distances = nearest(x, 12, method=method)
    np.testing.assert_array_equal(ids[:, 0], np.arange(n))
    assert all(len(set(row)) == 12 for row in ids.tolist())
    np.testing.assert_array_equal(distances, 0)


def test_integer_grid_has_exact_ties() -> None:
    x = np.stack(np.meshgrid(np.arange(25), np.arange(25)), axis=-1).reshape(-1, 2)
    assert_is_nearest(x, *nearest(x, 7), 7)


@pytest.mark.parametrize("metric", ["cosine", "correlation"])
def test_zero_rows(metric: str) -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(200, 6))
    x[:3] = 0 if metric == "cosine" else np.array([[0.0], [0.1], [7.3]])
    ids, distances = nearest(x, 5, metric=metric)
    np.testing.assert_array_equal(np.sort(ids[:3, :3], axis=1), np.tile([0, 1, 2], (3, 1)))
    np.testing.assert_allclose(distances[:3], np.tile([0, 0, 0, 1, 1], (3, 1)), atol=1e-7)
    assert_is_nearest(x[3:], *nearest(x[3:], 5, metric=metric), 5, metric)


@pytest.mark.parametrize("metric", ["manhattan", "chebyshev"])
def test_other_metrics_come_from_sklearn(metric: str) -> None:
    x = np.random.default_rng(5).normal(size=(300, 4))
    x[10:30] = x[10]
    ids, distances = nearest(x, 8, metric=metric)
    assert_is_nearest(x, ids, distances, 8, "cityblock" if metric == "manhattan" else metric)


def assert_lists_real_distances(x: np.ndarray, found: np.ndarray, distances: np.ndarray) -> None:
    np.testing.assert_array_equal(found[:, 0], np.arange(len(found)))
    assert all(len(set(row)) == found.shape[1] for row in found.tolist())
    own = np.linalg.norm((x[found] - x[:, None]).astype(np.float64), axis=2)
    np.testing.assert_allclose(distances, own, rtol=1e-5, atol=1e-7)
    assert (np.diff(distances, axis=1) >= 0).all()


def test_approximate_recall(
    noisy_clusters: np.ndarray, clusters_exact: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Data this small would be searched exactly: the budget is set so that leaves are used.
    monkeypatch.setattr(knn_leaf, "budget", lambda n, k: 9_000)
    # None would mean that the exact search is about to be compared with itself.
    assert knn_leaf.leaf_candidates(noisy_clusters / 100, 15, 17, 0) is not None
    found, distances = nearest(noisy_clusters, 15, method="approximate")
    assert recall(found, clusters_exact[0]) >= 0.99
    assert_lists_real_distances(noisy_clusters, found, distances)


def test_fewer_visited_cells_lose_few_neighbours(
    noisy_clusters: np.ndarray, clusters_exact: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A sixth of the cells is visited; were they chosen at random, recall would be 0.17.
    monkeypatch.setattr(knn_leaf, "budget", lambda n, k: 2_000)
    first, distances = nearest(noisy_clusters, 15, method="approximate", seed=1)
    again, _ = nearest(noisy_clusters, 15, method="approximate", seed=1)
    other, _ = nearest(noisy_clusters, 15, method="approximate", seed=2)
    assert 0.8 <= recall(first, clusters_exact[0]) < 1
    assert_lists_real_distances(noisy_clusters, first, distances)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_small_data_are_searched_exactly_also_as_approximate(paul15_pca: np.ndarray) -> None:
    forced = nearest(paul15_pca, 15, method="approximate")
    np.testing.assert_array_equal(forced, nearest(paul15_pca, 15, method="exact"))


def test_exact_is_permutation_equivariant(paul15_pca: np.ndarray) -> None:
    order = np.random.default_rng(7).permutation(len(paul15_pca))
    ids, distances = nearest(paul15_pca, 15)
    moved_ids, moved = nearest(paul15_pca[order], 15)
    np.testing.assert_array_equal(order[moved_ids], ids[order])
    np.testing.assert_array_equal(moved, distances[order])


def test_leaves_hold_every_cell_once() -> None:
    x = np.random.default_rng(8).normal(size=(1003, 3)).astype(np.float32)
    leaves = knn_leaf._leaves(x, 3, np.random.default_rng(0))
    assert leaves.shape == (8, 128)
    np.testing.assert_array_equal(np.sort(leaves.ravel()), np.arange(1024))


@pytest.mark.parametrize("groups", [1, 4, 32])
def test_smallest_is_a_partial_sort(groups: int) -> None:
    values = np.random.default_rng(9).integers(0, 50, (20, 1024)).astype(np.float32)
    lowest, column = map(np.asarray, knn_leaf.smallest(values, 12, groups))
    np.testing.assert_array_equal(lowest, np.sort(values, axis=1)[:, :12])
    np.testing.assert_array_equal(np.take_along_axis(values, column, axis=1), lowest)
    assert all(len(set(row)) == 12 for row in column.tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 11}, "k=11 must be .* number of cells, 10"),
        ({"k": 0}, "k=0 must be"),
        ({"k": 2.5}, "k=2.5 must be"),
        ({"x": np.zeros(10)}, "matrix"),
        ({"x": np.zeros((0, 3))}, "matrix"),
        ({"x": np.full((10, 2), "a")}, "real numbers"),
        ({"x": np.array([[0.0], [np.nan], [np.inf]])}, "2 cells hold NaN or infinity, the first is cell 1"),
        ({"metric": "nonsense"}, "metric='nonsense' is unknown. Available: .*euclidean"),
        ({"metric": "precomputed"}, "metric='precomputed' is unknown"),
        ({"method": "magic"}, "method='magic' is unknown. Available: .*exact"),
        ({"metric": "chebyshev", "method": "approximate"}, "method='approximate' is available for the metrics"),
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    arguments = {"x": np.zeros((10, 2)), "k": 3, "metric": "euclidean", "method": "auto"} | change
    with pytest.raises(ValueError, match=message):
        nearest(arguments["x"], arguments["k"], metric=arguments["metric"], method=arguments["method"])
