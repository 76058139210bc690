"""The fit of a logistic annotation: weights, folds, temperature, and how far the cells of a type spread."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from scdiffx._core import counts as C
from scdiffx._core.minibatch import host_csr

__all__ = [
    "INSIDE",
    "PENALTIES",
    "Envelope",
    "Training",
    "compact",
    "envelope",
    "folds",
    "limits",
    "logistic",
    "rows",
    "standardised",
    "standards",
    "temperature",
    "whitened",
]

MAX_VALUE = 10.0  # standard deviations above the mean where values are cut, as CellTypist does
PENALTIES = (0.001, 0.01, 0.1, 1.0)
_DENSE = 2**26  # values; above so many, cells are made dense in blocks whenever the loss is evaluated
_VARIABLE = 2000
_COMPS = 30
INSIDE = 0.98  # share of a type's held-out cells that count as alike
_ENOUGH = 50  # cells from which a type has a limit of its own
_STEPS = 1000


class Training(NamedTuple):
    """The labelled cells, and by what their genes are standardised; where they are `dense`, they already are."""

    x: C.Matrix
    codes: np.ndarray
    mean: Float[Array, " genes"]
    sd: Float[Array, " genes"]
    variance: Float[Array, " genes"]
    dense: bool

    @property
    def n_types(self) -> int:
        return int(self.codes.max()) + 1

    def logits(self, weights: Array, bias: Array) -> Float[Array, "cells types"]:
        return _logits(*self[:1], *self[2:4], weights, self.dense) + bias

    def variable(self, genes: np.ndarray) -> np.ndarray:
        """Standardised values of some genes (cells, variable)."""
        if self.dense:
            return np.asarray(C.take_columns(self.x, jnp.asarray(genes)))
        part = C.take_columns(self.x, jnp.asarray(genes, jnp.int32))
        return np.asarray(C.map_rows(part, lambda block: standardised(block, self.mean[genes], self.sd[genes])))


class Envelope(NamedTuple):
    """Where the cells of each type lie.

    Standardised values of the `genes` times `projection` are whitened principal components; `centres` (types, comps)
    are the means of the types, and `limit` (types,) the squared distance from them that few cells exceed.
    """

    genes: Int[Array, " variable"]
    projection: Float[Array, "variable comps"]
    centres: Float[Array, "types comps"]
    limit: Float[Array, " types"]


def rows(x: C.Matrix, cells: np.ndarray) -> C.Matrix:
    """Some of the cells, in double precision: what is nearly separable is ill-conditioned."""
    if isinstance(x, C.Counts):
        return C.Counts.from_scipy(host_csr(x)[cells], np.float64)
    return jnp.asarray(np.asarray(x)[cells], jnp.float64)


def standardised(x: Array, mean: Array, sd: Array) -> Array:
    """Standard deviations above the mean, at most so many."""
    return jnp.minimum((x - mean) / sd, MAX_VALUE)


_moments = jax.jit(C.column_moments)


@jax.jit
def _dense(x: C.Matrix, mean: Array, sd: Array) -> Float[Array, "cells genes"]:
    return C.map_rows(x, lambda block: standardised(block, mean, sd))


def standards(x: C.Matrix, codes: np.ndarray) -> Training:
    """The training cells; a gene that does not vary is divided by 1."""
    n = x.shape[0]
    mean, variance = _moments(x)
    variance = variance * (n - 1) / n
    constant = variance <= (8 * jnp.finfo(x.dtype).eps * mean) ** 2
    sd = jnp.where(constant, 1, jnp.sqrt(variance))
    dense = not isinstance(x, C.Counts) or n * x.shape[1] <= _DENSE
    if dense:
        x = _dense(x, mean, sd)
    return Training(x, codes, mean, sd, jnp.where(constant, 0, variance), dense)


def compact(data: Training) -> tuple[Training, Array | None]:
    """The same regression in as many directions as there are cells, and these axes (genes, cells), if that is less.

    A ridge leaves no weight in directions without cells (Hastie and Tibshirani 2004, Efficient quadratic regularization
    for expression arrays).
    """
    cells, genes = data.x.shape
    if not data.dense or 2 * cells > genes:
        return data, None
    axes, scores = np.linalg.qr(np.asarray(data.x).T)
    return data._replace(x=jnp.asarray(scores.T)), jnp.asarray(axes)


def _logits(x: C.Matrix, mean: Array, sd: Array, weights: Array, dense: bool) -> Array:
    def of_block(block: Array) -> Array:
        return jnp.matmul(standardised(block, mean, sd), weights, precision=lax.Precision.HIGHEST)

    if dense and not isinstance(x, C.Counts):
        return jnp.matmul(x, weights, precision=lax.Precision.HIGHEST)
    return C.map_rows(x, of_block)


@partial(jax.jit, static_argnames="dense")
def _loss(
    flat: Array, x: C.Matrix, mean: Array, sd: Array, chosen: Array, ridge: Array, dense: bool
) -> tuple[Array, Array]:
    """Mean loss and its slope; `chosen` (cells, types) is one at the label of each cell that counts."""
    genes, types = x.shape[1], chosen.shape[1]

    def cost(flat: Array) -> Array:
        weights, bias = flat[: genes * types].reshape(genes, types), flat[genes * types :]
        total = -(chosen * jax.nn.log_softmax(_logits(x, mean, sd, weights, dense) + bias)).sum()
        return total / chosen.sum() + ridge * (weights**2).sum() / 2

    return jax.value_and_grad(cost)(flat)


def logistic(
    data: Training, counted: np.ndarray, penalty: float, start: tuple[Array, Array] | None = None, tol: float = 1e-4
) -> tuple[Float[Array, "genes types"], Float[Array, " types"], bool]:
    """Weights, bias, and whether L-BFGS converged to slopes of at most `tol`; cells count where `counted`."""
    from scipy.optimize import minimize

    genes, types, dtype = data.x.shape[1], data.n_types, data.x.dtype
    chosen = jnp.asarray(np.eye(types)[data.codes] * counted[:, None], dtype)
    ridge = jnp.asarray(1 / (penalty * counted.sum()), dtype)

    def on_host(flat: np.ndarray) -> tuple[float, np.ndarray]:
        at = jnp.asarray(flat, dtype)
        value, slope = _loss(at, data.x, data.mean, data.sd, chosen, ridge, dense=data.dense)
        return float(value), np.asarray(slope, np.float64)

    first = np.zeros((genes + 1) * types) if start is None else np.concatenate([np.ravel(part) for part in start])
    options = {"maxiter": _STEPS, "gtol": tol, "ftol": 0, "maxcor": 20}
    found = minimize(on_host, first.astype(np.float64), jac=True, method="L-BFGS-B", options=options)
    weights, bias = found.x[: genes * types].reshape(genes, types), found.x[genes * types :]
    # 1: out of iterations. That the line search ends at rounding is convergence.
    return jnp.asarray(weights, dtype), jnp.asarray(bias, dtype), found.status != 1


def folds(codes: np.ndarray, n_folds: int, rng: np.random.Generator) -> np.ndarray:
    """The fold of each cell; the cells of each type are dealt out evenly."""
    fold = np.empty(len(codes), int)
    for code in np.unique(codes):
        members = rng.permutation(np.flatnonzero(codes == code))
        fold[members] = np.arange(len(members)) % n_folds
    return fold


def temperature(logits: np.ndarray, codes: np.ndarray) -> tuple[float, float]:
    """What to divide logits by, from 0.05 to 20, so that the labels are most likely; and the mean loss then."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def cost(log_heat: float) -> float:
        return -float(log_softmax(logits / np.exp(log_heat), axis=1)[np.arange(len(codes)), codes].mean())

    found = minimize_scalar(cost, bounds=(-3, 3), method="bounded")
    return float(np.exp(found.x)), float(found.fun)


def envelope(data: Training, fold: np.ndarray, n_folds: int) -> Envelope:
    """Centres and spread of the types in principal components, and limits from the cells of each fold."""
    variance = np.asarray(data.variance)
    genes = np.sort(np.argsort(-variance, kind="stable")[:_VARIABLE])
    values = data.variable(genes).astype(np.float32)
    square = np.zeros(len(fold))
    # One product for the components with and without each fold.
    grams = [values[fold == number].T @ values[fold == number] for number in range(n_folds)]
    whole = sum(grams[1:], start=grams[0])
    for number, gram in enumerate(grams):
        held = fold == number
        projection, centres = whitened(values[~held], whole - gram, data.codes[~held], data.n_types)
        square[held] = ((values[held] @ projection - centres[data.codes[held]]) ** 2).sum(1)
    projection, centres = whitened(values, whole, data.codes, data.n_types)
    parts = (projection, centres, limits(square, data.codes, data.n_types))
    return Envelope(jnp.asarray(genes, jnp.int32), *(jnp.asarray(part, data.x.dtype) for part in parts))


def limits(square: np.ndarray, codes: np.ndarray, n_types: int) -> np.ndarray:
    """For each type the squared distance that few held-out cells exceed; that of all where it has few cells."""
    # A type of one cell has no centre in the folds without it, and says nothing about its spread.
    seen = np.isfinite(square)
    if not seen.any():
        return np.full(n_types, np.inf)
    limits = np.full(n_types, np.quantile(square[seen], INSIDE))
    for code in range(n_types):
        own = square[seen & (codes == code)]
        if len(own) >= _ENOUGH:
            limits[code] = np.quantile(own, INSIDE)
    return limits


def whitened(values: np.ndarray, gram: np.ndarray, codes: np.ndarray, n_types: int) -> tuple[np.ndarray, np.ndarray]:
    """A projection in which cells have unit covariance around the means of their types; and these means."""
    comps = max(1, min(_COMPS, values.shape[1], len(values) - n_types - 1))
    scores = values @ (axes := _leading(gram, comps))
    member = np.eye(n_types, dtype=values.dtype)[codes]
    sizes = member.sum(0)
    with np.errstate(invalid="ignore"):
        means = member.T @ scores / sizes[:, None]
    gaps = (scores - means[codes]).astype(np.float64)
    within = gaps.T @ gaps / max(len(values) - n_types, 1)
    size, turn = np.linalg.eigh(within)
    whiten = turn / np.sqrt(np.maximum(size, 1e-6 * max(size[-1], 1e-12)))
    return axes @ whiten, means @ whiten


def _leading(gram: np.ndarray, comps: int) -> np.ndarray:
    """The eigenvectors of the largest eigenvalues."""
    from scipy.sparse.linalg import eigsh

    if comps >= len(gram) // 4:
        return np.linalg.eigh(gram)[1][:, -comps:]
    return np.asarray(eigsh(gram, comps, v0=np.ones(len(gram), gram.dtype))[1])
