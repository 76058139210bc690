"""What PHATE finds once on the host: neighbours within the kernel's reach, landmarks and the diffusion time."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float, Int

from scdiffx._core.graph import Pattern
from scdiffx._core.knn import nearest
from scdiffx._core.runtime import one_blas_thread

__all__ = ["THRESHOLD", "PHATEStructure", "chosen_time", "entropies", "landmarks", "reach"]

THRESHOLD = 1e-4  # weights of the kernel below it are cut, as in phate
_FIRST, _LAST = 6, 36  # times (knn + 1): neighbours searched at first, and at most
_COMPONENTS = 100  # of the spectrum in which landmarks are clustered
_TIMES = 100


class PHATEStructure(NamedTuple):
    """What does not move with the coordinates.

    `pattern`: edges within the reach of the kernel. `nth` (cells,): the neighbour whose distance is the scale of a
    cell. `landmark` (cells,): the landmark of each cell, None where all cells are landmarks. `sizes` (landmarks,): the
    cells of each. `entropy` (100,): the von Neumann entropy of the powers 1 to 100 of the operator.
    """

    pattern: Pattern
    nth: Int[Array, " cells"]
    landmark: Int[Array, " cells"] | None
    sizes: Int[Array, " landmarks"]
    entropy: Float[Array, " times"]


def reach(z: np.ndarray, knn: int, decay: float, bandwidth: float, seed: int) -> tuple[np.ndarray, sp.csr_matrix]:
    """The `knn`-th neighbour of each cell, and the kernel (float64, symmetric) without its diagonal of ones."""
    n = len(z)
    k, most = min(n, _FIRST * (knn + 1)), min(n, _LAST * (knn + 1))
    while True:
        indices, distances = nearest(z, k, seed=seed)
        scale = bandwidth * np.asarray(distances[:, knn], np.float64)
        far = scale * (-math.log(THRESHOLD)) ** (1 / decay)
        if k == most or not (distances[:, -1] < far).any():
            break
        k = min(most, 3 * k)
    rows, columns = np.repeat(np.arange(n), k), indices.ravel()
    distance = np.asarray(distances, np.float64).ravel()
    apart = distance > 0
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        weight = np.where(apart, np.exp(-((distance / scale[rows]) ** decay)), 1.0)
    keep = (weight >= THRESHOLD) & (rows != columns)
    directed = sp.csr_matrix((weight[keep], (rows[keep], columns[keep])), shape=(n, n))
    kernel = ((directed + directed.T) / 2).tocsr()
    kernel.sort_indices()
    return indices[:, knn], kernel


def landmarks(kernel: sp.csr_matrix, count: int, seed: int) -> np.ndarray:
    """Clusters (cells,) of the diffusion operator's spectrum by minibatch k-means, numbered without gaps.

    graphtools' settings: 100 singular vectors of the symmetrised operator, one start, batches of 10,000.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.utils.extmath import randomized_svd

    whole = (kernel + sp.identity(kernel.shape[0], format="csr")).tocsr()
    degree = np.asarray(whole.sum(1)).ravel()
    root = sp.diags(1 / np.sqrt(degree))
    components = min(_COMPONENTS, kernel.shape[0] - 1)
    with one_blas_thread():
        _, _, vt = randomized_svd((root @ whole @ root).tocsr(), n_components=components, random_state=seed)
        spread = sp.diags(1 / degree) @ (whole @ vt.T)
        means = MiniBatchKMeans(
            count, init_size=min(3 * count, len(degree)), n_init=1, batch_size=10_000, random_state=seed
        )
        found = means.fit_predict(spread)
    return np.unique(found, return_inverse=True)[1]


def operator_of(kernel: sp.csr_matrix, landmark: np.ndarray | None) -> np.ndarray:
    """The diffusion operator between cells, or between landmarks, dense."""
    whole = (kernel + sp.identity(kernel.shape[0], format="csr")).tocsr()
    degree = np.asarray(whole.sum(1)).ravel()
    if landmark is None:
        return (sp.diags(1 / degree) @ whole).toarray()
    member = sp.csr_matrix((np.ones(len(landmark)), (np.arange(len(landmark)), landmark)))
    to_landmark = (whole @ member).tocsr()
    between = (to_landmark.T @ (sp.diags(1 / degree) @ to_landmark)).toarray()
    return between / between.sum(1, keepdims=True)


def entropies(matrix: np.ndarray) -> np.ndarray:
    """The von Neumann entropy of the singular values of the matrix to the powers 1 to 100."""
    with one_blas_thread():
        values = np.sqrt(np.maximum(np.linalg.eigvalsh(matrix.T @ matrix), 0))
    powers = values[None] ** np.arange(1, _TIMES + 1)[:, None]
    share = powers / powers.sum(1, keepdims=True) + np.finfo(float).eps
    return -(share * np.log(share)).sum(1)


def chosen_time(entropy: np.ndarray) -> int:
    """The knee of the curve: where two lines that meet at a point of it are nearest to it, by absolute errors.

    As phate counts: the time is the position in the curve, whose first value, of the first power, is at 0; and the
    second line is fitted from one point before its errors are summed.
    """
    x = np.arange(len(entropy), dtype=float)

    def error(fitted: slice, part: slice) -> float:
        line = np.polyfit(x[fitted], entropy[fitted], 1)
        return float(np.abs(np.polyval(line, x[part]) - entropy[part]).sum())

    def both(b: int) -> float:
        return error(slice(b + 1), slice(b + 1)) + error(slice(b - 1, None), slice(b, None))

    return 1 + int(np.argmin([both(b) for b in range(1, len(entropy) - 1)]))
