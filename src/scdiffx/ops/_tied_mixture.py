"""A mixture of Gaussians that share one covariance, with exact derivatives of its maximum-likelihood fit."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Float, Int

from scdiffx._core.fields import buffer, operator, replace, static
from scdiffx._log import warn
from scdiffx.ops._kmeans import _assigned, _lloyd, _start

__all__ = ["TiedMixture", "TiedMixtureResult"]

_RIDGE = 1e-6  # added to the covariance, in units of the variances of the dimensions
_START_TOL = 1e-3  # the starts are compared where an iteration moves their parameters by less
_START_ITER = 100  # or after so many
_KMEANS_ITER = 30  # of each start: it need not converge


class TiedMixtureResult(NamedTuple):
    """`labels` (cells,), `memberships` (cells, components), the parameters, and `log_likelihood`, mean over the cells.

    Labels are the components with the largest membership; memberships are posterior probabilities.
    """

    labels: Int[Array, " cells"]
    memberships: Float[Array, "cells components"]
    weights: Float[Array, " components"]
    means: Float[Array, "components dims"]
    covariance: Float[Array, "dims dims"]
    log_likelihood: Array


class Parameters(NamedTuple):
    """Weights, means and the covariance of the mixture."""

    weights: Float[Array, " components"]
    means: Float[Array, "components dims"]
    covariance: Float[Array, "dims dims"]


@operator
class TiedMixture:
    """Fit a Gaussian mixture with one covariance for all components (mclust's EEE) by expectation-maximisation.

    It does not depend on the scale of dimensions, nor on any linear map of them, as k-means does. `init` finds the
    parameters: the likeliest of `n_init` starts from k-means, scikit-learn's result from the same start; components are
    numbered by their cells. With parameters given it iterates from them alone, in their order. The call iterates on
    from these: at once at its end for the same cells, while for others (of a representation that is being learned, or
    new ones) components keep their numbers. Iterations end where the parameters move by less than `tol` (in standard
    deviations; None for 1e-4, in float64 1e-8). Derivatives are those of the maximum, by the implicit function theorem.
    """

    weights: Array | None = buffer(default=None)
    means: Array | None = buffer(default=None)
    covariance: Array | None = buffer(default=None)
    n_components: int = static(default=8)
    n_init: int = static(default=10)
    max_iter: int = static(default=1000)
    tol: float | None = static(default=None)

    def init(self, x: Float[Array, "cells dims"], key: Array | None = None) -> TiedMixture:
        n = x.shape[0]
        if not 1 <= self.n_components <= n:
            raise ValueError(f"n_components={self.n_components} must lie between 1 and the number of cells, {n}")
        if self.means is None:
            keys = jax.random.split(jax.random.key(0) if key is None else key, self.n_init)
            starts = (_parameters(x, _partition(x, self.n_components, key), self.n_components) for key in keys)
            runs = (_run(x, start, _START_TOL, _START_ITER) for start in starts)
            best = max(runs, key=lambda run: float(run.log_likelihood)).parameters
        else:
            best = self._held()
        return self._fitted(x, best, numbered=self.means is None)

    def from_labels(self, x: Float[Array, "cells dims"], labels: Int[Array, " cells"]) -> TiedMixture:
        """The operator after `init` from a given partition instead of k-means."""
        count = int(labels.max()) + 1
        start = _parameters(x, jnp.asarray(labels), count)
        return replace(self, n_components=count)._fitted(x, start, numbered=True)

    def _fitted(self, x: Array, start: Parameters, *, numbered: bool) -> TiedMixture:
        run = _run(x, start, self._tol(x), self.max_iter)
        if not bool(run.converged):
            warn(f"the mixture still moves after max_iter={self.max_iter} iterations: raise it")
        best = run.parameters
        if numbered:
            order = np.argsort(-np.bincount(run.labels, minlength=self.n_components), kind="stable")
            weights, means = (jnp.asarray(np.asarray(a)[order]) for a in best[:2])
            best = Parameters(weights, means, best.covariance)
        return replace(self, **best._asdict())

    def _tol(self, x: Array) -> float:
        return (1e-8 if x.dtype == jnp.float64 else 1e-4) if self.tol is None else self.tol

    def _held(self) -> Parameters:
        if self.weights is None or self.means is None or self.covariance is None:
            raise ValueError("TiedMixture needs its parameters: call `op = op.init(x)` first")
        return Parameters(self.weights, self.means, self.covariance)

    def __call__(self, x: Float[Array, "cells dims"]) -> TiedMixtureResult:
        middle, scale = _frame(lax.stop_gradient(x))
        start = _framed(jax.tree.map(lambda a: jnp.asarray(a, x.dtype), self._held()), middle, scale)
        x = (x - middle) / scale
        found = _maximum(x, start, self._tol(x), self.max_iter)
        logits, rest = _logits(x, found)
        total = (jax.nn.logsumexp(logits, axis=1) + rest).mean() - jnp.log(scale).sum()
        labels = logits.argmax(1).astype(jnp.int32)
        return TiedMixtureResult(labels, jax.nn.softmax(logits), *_unframed(found, middle, scale), total)


class _Run(NamedTuple):
    parameters: Parameters
    labels: Array
    log_likelihood: Array
    converged: Array


def _frame(x: Array) -> tuple[Array, Array]:
    """Where the data are and how wide: in this frame products neither cancel nor overflow."""
    scale = x.std(0)
    return x.mean(0), jnp.where(scale > 0, scale, 1)


def _framed(p: Parameters, middle: Array, scale: Array) -> Parameters:
    return Parameters(p.weights, (p.means - middle) / scale, p.covariance / jnp.outer(scale, scale))


def _unframed(p: Parameters, middle: Array, scale: Array) -> Parameters:
    return Parameters(p.weights, p.means * scale + middle, p.covariance * jnp.outer(scale, scale))


def _logits(x: Float[Array, "cells dims"], p: Parameters) -> tuple[Float[Array, "cells components"], Array]:
    """Logarithms of weight times density, up to what all components share, and that share, for each cell."""
    factor = jnp.linalg.cholesky(p.covariance)
    solved = cho_solve((factor, True), p.means.T)
    # The default precision of accelerators (TF32, bfloat16) would move cells.
    product = jnp.matmul(x, solved, precision=lax.Precision.HIGHEST)
    rest = (jnp.log(jnp.diag(factor)) + jnp.log(2 * jnp.pi) / 2).sum()
    square = (jax.scipy.linalg.solve_triangular(factor, x.T, lower=True) ** 2).sum(0)
    return product - (p.means.T * solved).sum(0) / 2 + jnp.log(p.weights), -square / 2 - rest


def _updated(x: Array, share: Float[Array, "cells components"]) -> Parameters:
    """The likeliest parameters given the memberships."""
    n, dims = x.shape
    size = share.sum(0) + 10 * jnp.finfo(x.dtype).eps
    means = jnp.matmul(share.T, x, precision=lax.Precision.HIGHEST) / size[:, None]
    total = jnp.matmul(x.T, x, precision=lax.Precision.HIGHEST)
    within = (total - (means.T * size) @ means) / n
    ridge = max(_RIDGE, 100 * float(jnp.finfo(x.dtype).eps))
    return Parameters(size / size.sum(), means, within + ridge * jnp.eye(dims, dtype=x.dtype))


def _step(x: Array, p: Parameters) -> Parameters:
    return _updated(x, jax.nn.softmax(_logits(x, p)[0]))


def _iterated(x: Array, start: Parameters, tol: Any, max_iter: Any) -> tuple[Parameters, Array]:
    """Iterations until no parameter moves, and whether that happened."""

    def going(state: tuple[Parameters, Array, Array]) -> Array:
        return (state[1] > tol) & (state[2] < max_iter)

    def step(state: tuple[Parameters, Array, Array]) -> tuple[Parameters, Array, Array]:
        before, _, i = state
        after = _step(x, before)
        return after, jnp.abs(ravel_pytree(after)[0] - ravel_pytree(before)[0]).max(), i + 1

    far = jnp.asarray(jnp.inf, x.dtype)
    found, moved, _ = lax.while_loop(going, step, (start, far, jnp.asarray(0)))
    return found, moved <= tol


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _maximum(x: Array, start: Parameters, tol: float, max_iter: int) -> Parameters:
    return _iterated(x, start, tol, max_iter)[0]


def _forward(x: Array, start: Parameters, tol: float, max_iter: int) -> tuple[Parameters, tuple[Array, Parameters]]:
    found = _maximum(x, start, tol, max_iter)
    return found, (x, found)


def _backward(tol: float, max_iter: int, saved: tuple[Array, Parameters], g: Parameters) -> tuple[Array, Parameters]:
    """At the maximum a step changes nothing: the adjoint is the limit of such steps, and converges as fast."""
    x, found = saved
    pull = jax.vjp(_step, x, found)[1]
    precise = 1e-13 if x.dtype == jnp.float64 else 1e-5

    def size(p: Parameters) -> Array:
        return jnp.abs(ravel_pytree(p)[0]).max()

    def going(state: tuple[Parameters, Array, Array]) -> Array:
        return (state[1] > precise * size(state[0])) & (state[2] < max_iter)

    def step(state: tuple[Parameters, Array, Array]) -> tuple[Parameters, Array, Array]:
        before, _, i = state
        after = jax.tree.map(jnp.add, g, pull(before)[1])
        return after, size(jax.tree.map(jnp.subtract, after, before)), i + 1

    adjoint, _, _ = lax.while_loop(going, step, (g, jnp.asarray(jnp.inf, x.dtype), jnp.asarray(0)))
    return pull(adjoint)[0], jax.tree.map(jnp.zeros_like, found)


_maximum.defvjp(_forward, _backward)


def _partition(x: Array, n_components: int, key: Array) -> Array:
    """The clusters of a few iterations of k-means."""
    centred = x - x.mean(0)
    start = _start(centred, n_components, key)
    return _assigned(centred, _lloyd(centred, start, _KMEANS_ITER).centers)


@partial(jax.jit, static_argnames="k")
def _parameters(x: Array, labels: Array, k: int) -> Parameters:
    middle, scale = _frame(x)
    return _unframed(_updated((x - middle) / scale, jax.nn.one_hot(labels, k, dtype=x.dtype)), middle, scale)


@jax.jit
def _run(x: Array, start: Parameters, tol: float, max_iter: int) -> _Run:
    middle, scale = _frame(x)
    start = _framed(jax.tree.map(lambda a: jnp.asarray(a, x.dtype), start), middle, scale)
    x = (x - middle) / scale
    found, converged = _iterated(x, start, tol, max_iter)
    logits, rest = _logits(x, found)
    likelihood = (jax.nn.logsumexp(logits, axis=1) + rest).mean() - jnp.log(scale).sum()
    return _Run(_unframed(found, middle, scale), logits.argmax(1), likelihood, converged)
