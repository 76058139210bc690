"""The package's neighbour search behind scikit-learn's interface."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from scdiffx._core.knn import METHODS, nearest, nearest_among
from scdiffx._core.random import as_seed
from scdiffx._core.runtime import ensure_cache

__all__ = ["KNeighborsTransformer"]

_MODES = ("distance", "connectivity")


class KNeighborsTransformer(TransformerMixin, BaseEstimator):
    """Nearest neighbours as scikit-learn's `KNeighborsTransformer` gives them, by the search of `sd.pp.neighbors`.

    For ``sc.pp.neighbors(adata, transformer=sd.KNeighborsTransformer(n_neighbors=15))``, and wherever scikit-learn
    takes a transformer of neighbours, such as in front of `TSNE(metric="precomputed")`. The search is exact up to
    20,000 cells (300,000 on an accelerator) and by k-means leaves above.

    Parameters
    ----------
    n_neighbors
        Neighbours of each cell, the cell itself not counted.
    mode
        "distance", or "connectivity": ones, and `n_neighbors` entries a row, the cell itself counted.
    metric
        "euclidean", "sqeuclidean", "cosine", "correlation", or another metric of scikit-learn (searched by it).
    algorithm
        "auto", "exact" or "approximate" (not for metrics that scikit-learn searches).
    random_state
        Seed of the approximate search; None is 0.

    Attributes
    ----------
    n_samples_fit_ : int
        Cells seen by `fit`.
    n_features_in_ : int
        Features seen by `fit`.
    feature_names_in_ : array (features,)
        Their names, where the data were a data frame with names.

    Notes
    -----
    Needs scikit-learn 1.6 or newer.
    """

    def __init__(
        self,
        *,
        n_neighbors: int = 5,
        mode: str = "distance",
        metric: str = "euclidean",
        algorithm: str = "auto",
        random_state: Any = None,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.mode = mode
        self.metric = metric
        self.algorithm = algorithm
        self.random_state = random_state

    def fit(self, X: Any, y: None = None) -> KNeighborsTransformer:
        """Keep the cells to search among.

        Parameters
        ----------
        X
            Dense matrix (cells, features), finite.
        y
            Not used; scikit-learn's convention.

        Returns
        -------
        The transformer itself.

        Raises
        ------
        ValueError
            If a setting is not usable, `X` is not a finite matrix, or it has too few cells for `n_neighbors`.
        TypeError
            If `X` is sparse.
        """
        if self.mode not in _MODES:
            raise ValueError(f"mode={self.mode!r} is unknown. Available: {list(_MODES)}")
        if self.algorithm not in METHODS:
            raise ValueError(f"algorithm={self.algorithm!r} is unknown. Available: {list(METHODS)}")
        if int(self.n_neighbors) != self.n_neighbors or self.n_neighbors < 1:
            raise ValueError(f"n_neighbors={self.n_neighbors!r} must be a whole number of at least 1")
        kept = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=2)
        if self._width > len(kept):
            raise ValueError(
                f"n_neighbors={self.n_neighbors} needs at least {self._width} cells, but n_samples = {len(kept)}"
            )
        self._cells = kept
        self.n_samples_fit_ = self._n_features_out = len(kept)
        return self

    def transform(self, X: Any) -> sp.csr_matrix:
        """Find the nearest of the cells of `fit` for each row.

        Parameters
        ----------
        X
            Dense matrix (rows, features), finite. For the cells of `fit` themselves the first entry of each row is the
            cell, at distance 0; others are always searched exactly.

        Returns
        -------
        csr_matrix (rows, cells), of the dtype of `X`
            `n_neighbors` + 1 distances a row (with ``mode="connectivity"`` `n_neighbors` ones), nearest first.

        Raises
        ------
        ValueError
            If `X` is not a finite matrix with the features of `fit`, or `metric` is unknown.
        TypeError
            If `X` is sparse.
        """
        check_is_fitted(self)
        x = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        ensure_cache()
        if x.shape == self._cells.shape and np.array_equal(x, self._cells):
            seed = 0 if self.random_state is None else as_seed(self.random_state)
            found = nearest(x, self._width, metric=self.metric, method=self.algorithm, seed=seed, dtype=x.dtype)
        else:
            found = nearest_among(x, self._cells, self._width, metric=self.metric, dtype=x.dtype)
        ids, distances = found
        values = distances if self.mode == "distance" else np.ones_like(distances)
        starts = np.arange(0, ids.size + 1, self._width)
        return sp.csr_matrix((values.ravel(), ids.ravel(), starts), shape=(len(x), self.n_samples_fit_))

    @property
    def _width(self) -> int:
        return int(self.n_neighbors) + (self.mode == "distance")

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_cells")
