"""The algebraically largest eigenpairs of a symmetric operator, by a block Chebyshev-Davidson iteration.

A search space grows by a narrow window of filtered *residuals* at a time and is compressed to its best Ritz vectors
when full. The polynomial filter damps the known, unwanted part of the spectrum. Because it acts on residuals,
``p(A) x - p(l) x``, and only supplies directions, it runs in float32 even when the answer is wanted in float64:
Ritz values, residuals and orthogonality alone are kept in the full precision.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from scdiffx._core.chebyshev import degree_for, filtered, noise, normalised

__all__ = ["Eigen", "dtype_of", "eigsh", "product"]

_WINDOW = 8  # columns filtered at once: wide enough for the gather kernel, narrow enough to skip what has converged
_EXTRA = 2  # windows by which the space grows before it is compressed
_PROBES = 12  # Lanczos steps that bound the spectrum
_DENSE = 256  # up to this size the dense decomposition is faster and safer

product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Eigen(NamedTuple):
    """The `k` algebraically largest eigenpairs in decreasing order, and how well they were found."""

    values: Float[Array, " k"]
    vectors: Float[Array, "n k"]
    residuals: Float[Array, " k"]
    """``||A v - l v||`` of each pair."""
    converged: Bool[Array, ""]
    """Whether every residual is within the tolerance; otherwise raise `max_steps`."""
    n_matvecs: Int[Array, ""]
    """Products of `A` with one vector."""


class _Space(NamedTuple):
    """A search space: orthonormal rows (null ones are 0) and its Rayleigh-Ritz decomposition.

    Vectors lie in rows: products of a few of them with all are three times faster than on columns. Their images under
    the operator are not kept, which would be half of the memory: a residual costs a product instead.
    """

    basis: Array
    gram: Array
    valid: Array
    size: Array
    values: Array
    rotation: Array


class _Bounds(NamedTuple):
    lower: Array
    """Safe lower bound of the spectrum."""
    cut: Array
    """First guess of where its wanted part begins."""
    upper: Array
    """Safe upper bound."""


class _State(NamedTuple):
    space: _Space
    bounds: _Bounds
    residual: Array
    """Residuals of the window to be filtered next."""
    seeds: Array
    """Windows of random vectors still to be added."""
    done: Array
    """Leading Ritz pairs known to have converged."""
    finished: Array
    steps: Array
    matvecs: Array


class _Plan(NamedTuple):
    """Sizes of one problem (static), and its tolerance (not, so that compiled code serves every tolerance)."""

    k: int
    block: int
    keep: int
    capacity: int
    tol: Array


def dtype_of(A: Any) -> Any:
    """The floating dtype of the leaves of an operator."""
    dtypes = [x.dtype for x in jax.tree.leaves(A) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)]
    if not dtypes:
        raise TypeError(f"the operator of type {type(A).__name__} holds no array of floats")
    return jnp.result_type(*dtypes)


def _lowered(A: Any) -> Any:
    """The operator with its float64 leaves in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.result_type(x) == jnp.float64 else x, A)


def eigsh(
    A: Any,
    k: int,
    *,
    start: Float[Array, "n m"] | None = None,
    tol: float | None = None,
    max_steps: int = 300,
    oversample: int = 8,
) -> Eigen:
    """The `k` algebraically largest eigenpairs of a symmetric operator; jit-able, without a derivative of its own.

    Parameters
    ----------
    A
        Symmetric operator of shape (n, n): a pytree with ``A @ V`` for dense (n, b) and ``A.shape``.
    k
        Number of eigenpairs.
    start
        Approximate eigenvectors (n, m), for instance of a nearby problem. If they are converged already (``m >= k``),
        the only work is a few products with each of them. They must be approximations of the *leading* pairs: exact
        eigenvectors from elsewhere in the spectrum would be believed.
    tol
        Bound of the residual norms relative to the largest eigenvalue in magnitude. Default: 1e-10 in float64, 5e-6 in
        float32.
    max_steps
        Filter steps, each of up to 20 products with 8 vectors, before giving up (``converged=False``).
    oversample
        Eigenpairs iterated beyond `k`, at least 8. A larger value helps if the spectrum is dense around the k-th.

    References
    ----------
    Zhou (2010), A block Chebyshev-Davidson method with inner-outer restart for large eigenvalue problems.
    """
    n = A.shape[0]
    if not 1 <= k <= n:
        raise ValueError(f"k={k} eigenpairs were asked of an operator of shape {tuple(A.shape)}; k must be in 1..{n}")
    if start is not None and (start.ndim != 2 or start.shape[0] != n):
        raise ValueError(f"start must have shape ({n}, m), got {start.shape}")
    if oversample < _WINDOW:
        raise ValueError(f"oversample={oversample} must be at least {_WINDOW}")
    tol = (1e-10 if dtype_of(A) == jnp.float64 else 5e-6) if tol is None else tol
    if start is not None and start.shape[1] >= k and n > _DENSE and not _traced(A, start):
        # The space of a search is several times larger than what a look at converged pairs takes.
        found = _confirmed(A, start[:, : k + oversample], k, tol)
        if found.converged:
            return found
    return _eigsh(A, start, k, oversample, tol, max_steps)


def _traced(*trees: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


@partial(jax.jit, static_argnums=2)
def _confirmed(A: Any, start: Array, k: int, tol: Array) -> Eigen:
    """The best pairs of the span of `start`, which are those looked for if they have converged."""
    size = -(-start.shape[1] // _WINDOW) * _WINDOW
    plan = _Plan(k, size, size, size, tol)
    space = _begun(A, _empty(A.shape[0], size, dtype_of(A)), start)
    return _result(A, space, jnp.asarray(start.shape[1], jnp.int32), plan)


@partial(jax.jit, static_argnums=(2, 3))
def _eigsh(A: Any, start: Array | None, k: int, oversample: int, tol: Array, max_steps: Array) -> Eigen:
    block = k + oversample
    keep = block + _WINDOW
    plan = _Plan(k, block, keep, keep + _EXTRA * _WINDOW, tol)
    if A.shape[0] <= max(_DENSE, 2 * plan.capacity):
        return _dense(A, plan)
    low = _lowered(A)
    state = _started(A, start, plan)
    bounds = lax.cond(state.finished, lambda: state.bounds, lambda: _bounds(low))
    matvecs = jnp.where(state.finished, state.matvecs, state.matvecs + _PROBES)
    state = state._replace(bounds=bounds, matvecs=matvecs)

    def going(s: _State) -> Array:
        return ~s.finished & (s.steps < max_steps) & jnp.isfinite(s.space.values[0])

    def has_room(s: _State) -> Array:
        return going(s) & (s.space.size + _WINDOW <= plan.capacity)

    # Two nested loops and no branch, for a branch would copy the search space.
    def fill(s: _State) -> _State:
        s = lax.while_loop(has_room, lambda s: _step(A, low, s, plan), s)
        return s._replace(space=_compressed(s.space, plan.keep))

    state = lax.while_loop(going, fill, state)
    return _result(A, state.space, state.matvecs, plan)


def _result(A: Any, space: _Space, matvecs: Array, plan: _Plan) -> Eigen:
    k = plan.k
    rotation = space.rotation[:, :k].T
    vectors = product(rotation, space.basis)
    residuals = jnp.linalg.norm(_images(A, vectors) - vectors * space.values[:k, None], axis=1)
    residuals = jnp.where(jnp.arange(k) < space.valid.sum(), residuals, jnp.inf)
    ok = (residuals <= plan.tol * _scale(space)).all()
    return Eigen(space.values[:k], vectors.T, residuals, ok, matvecs + k)


def _dense(A: Any, plan: _Plan) -> Eigen:
    n, dtype = A.shape[0], dtype_of(A)
    matrix = A @ jnp.eye(n, dtype=dtype)
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    values, vectors = values[::-1][: plan.k], vectors[:, ::-1][:, : plan.k]
    residuals = jnp.linalg.norm(product(matrix, vectors) - vectors * values, axis=0)
    return Eigen(values, vectors, residuals, jnp.isfinite(residuals).all(), jnp.asarray(n, jnp.int32))


# ------------------------------------------------------------------------------------------------- the search space


def _scale(space: _Space) -> Array:
    return jnp.abs(jnp.where(space.valid, space.values, 0)).max()


def _empty(n: int, capacity: int, dtype: Any) -> _Space:
    long, square = jnp.zeros((capacity, n), dtype), jnp.zeros((capacity, capacity), dtype)
    row = jnp.zeros(capacity, dtype)
    return _Space(long, square, row > 0, jnp.zeros((), jnp.int32), row, square)


def _append(A: Any, space: _Space, directions: Array) -> _Space:
    """Grow the space by the part of `directions` that is new to it, and solve the projected problem."""
    new = _orthonormalised(directions, space.basis)
    put = partial(lax.dynamic_update_slice_in_dim, start_index=space.size)
    basis = put(space.basis, new, axis=0)
    cross = product(basis, _images(A, new).T)
    gram = put(put(space.gram, cross, axis=1), cross.T, axis=0)
    valid = put(space.valid, jnp.square(new).sum(1) > 0.5, axis=0)
    size = space.size + new.shape[0]
    return _ritz(space._replace(basis=basis, gram=gram, valid=valid, size=size))


def _images(A: Any, rows: Array) -> Array:
    """The products of the operator with vectors that lie in rows."""
    # Fused with the gathers of the product, the change of layout would cost three times as much as both.
    return lax.optimization_barrier(A @ lax.optimization_barrier(rows.T)).T


def _ritz(space: _Space) -> _Space:
    gram = (space.gram + space.gram.T) / 2
    # Null columns have eigenvalue 0, which may be larger than wanted ones: push them below everything else.
    largest = jnp.abs(gram).sum(1).max()
    floor = jnp.where(largest > 0, -2 * largest, -1)
    values, rotation = jnp.linalg.eigh(gram + jnp.diag(jnp.where(space.valid, 0, floor)))
    # eigh is ascending, so the valid Ritz values come first after the reversal.
    return space._replace(values=values[::-1], rotation=rotation[:, ::-1])


def _compressed(space: _Space, keep: int) -> _Space:
    """The best `keep` Ritz vectors as the new basis."""
    capacity = space.valid.shape[0]
    kept = jnp.arange(capacity) < jnp.minimum(keep, space.valid.sum())
    rotation = jnp.where(kept[:keep], space.rotation[:, :keep], 0).T
    values = jnp.where(kept, space.values, 0)
    basis = jnp.zeros_like(space.basis).at[:keep].set(product(rotation, space.basis))
    eye = jnp.eye(capacity, dtype=values.dtype)
    return _Space(basis, jnp.diag(values), kept, jnp.asarray(keep, jnp.int32), space.values, eye)


def _orthonormalised(rows: Array, basis: Array) -> Array:
    """`rows` made orthonormal among themselves and to `basis`; rows without a new direction become 0.

    The Gram matrix is decomposed and its null part cut, as a Cholesky factor of it turns to NaN in float32.
    """
    eps = jnp.finfo(rows.dtype).eps

    def sweep(turn: Array, rows: Array) -> Array:
        rows = rows - product(product(rows, basis.T), basis)
        norm = jnp.linalg.norm(rows, axis=1, keepdims=True)
        rows = jnp.where(norm > 10 * eps, rows / jnp.maximum(norm, eps), 0)
        weights, axes = jnp.linalg.eigh(product(rows, rows.T))
        # The second sweep removes what rounding left; a unit row that shrinks in it was noise.
        floor = jnp.where(turn == 0, 10 * eps, 0.1)
        return product((axes * jnp.where(weights > floor, lax.rsqrt(jnp.maximum(weights, eps)), 0)).T, rows)

    return lax.fori_loop(0, 2, sweep, normalised(rows))


# --------------------------------------------------------------------------------------------------- the iteration


def _started(A: Any, start: Array | None, plan: _Plan) -> _State:
    space, m = _empty(A.shape[0], plan.capacity, dtype_of(A)), 0
    if start is not None:
        m = min(start.shape[1], plan.block)
        space = _begun(A, space, start[:, :m])
    nothing = jnp.zeros((), dtype_of(_lowered(A)))
    zero = jnp.zeros((), jnp.int32)
    seeds = jnp.asarray(-(-(plan.block - m) // _WINDOW), jnp.int32)
    blank = jnp.zeros((_WINDOW, A.shape[0]), space.basis.dtype)
    state = _State(space, _Bounds(nothing, nothing, nothing), blank, seeds, zero, zero > 0, zero, zero + m)
    return _advance(A, state, plan) if m >= plan.k else state


def _begun(A: Any, space: _Space, start: Array) -> _Space:
    """The space with the columns of `start`, a window at a time, for copies of all at once would take memory."""
    m, width = start.shape[1], min(start.shape[1], _WINDOW)

    def window(number: Array, space: _Space) -> _Space:
        # The last window may begin in the one before: what is known already becomes null.
        columns = lax.dynamic_slice_in_dim(start, jnp.minimum(number * width, m - width), width, axis=1)
        return _append(A, space, columns.astype(space.basis.dtype).T)

    return lax.fori_loop(0, -(-m // width), window, space)


def _advance(A: Any, state: _State, plan: _Plan) -> _State:
    """Pass over the converged Ritz pairs; the residuals of the window behind them are what is filtered next."""
    space, bound = state.space, plan.tol * _scale(state.space)

    def window(carry: Any) -> Any:
        done, _, whole, _, seen = carry
        residual = _residuals(A, space, done)
        exists = done + jnp.arange(_WINDOW) < space.valid.sum()
        good = exists & (jnp.linalg.norm(residual, axis=1) <= bound)
        done = done + jnp.cumprod(good).sum().astype(done.dtype)
        # Pairs found late push earlier ones down the list: nothing counts before one pass has seen all of them.
        again = (done >= plan.k) & ~whole
        going = again | (good[0] & (done < plan.k))
        return jnp.where(again, 0, done), residual, whole | again, going, seen + _WINDOW

    first = (state.done, state.residual, state.done == 0, jnp.asarray(True), state.matvecs)
    done, residual, *_, matvecs = lax.while_loop(lambda carry: carry[3], window, first)
    return state._replace(done=done, finished=done >= plan.k, residual=residual, matvecs=matvecs)


def _residuals(A: Any, space: _Space, at: Array) -> Array:
    rotation = lax.dynamic_slice_in_dim(space.rotation, at, _WINDOW, axis=1).T
    values = lax.dynamic_slice_in_dim(space.values, at, _WINDOW)
    vectors = product(rotation, space.basis)
    return _images(A, vectors) - vectors * values[:, None]


def _step(A: Any, low: Any, state: _State, plan: _Plan) -> _State:
    """Add one window to the space: filtered noise at first, then filtered residuals."""
    space, bounds, seeding = state.space, state.bounds, state.seeds > 0
    dtype = bounds.lower.dtype
    target = lax.dynamic_slice_in_dim(space.values, state.done, _WINDOW).astype(dtype)
    ritz = jnp.stack([space.values[jnp.minimum(plan.keep, space.valid.sum()) - 1], space.values[0]]).astype(dtype)
    cut, top = jnp.where(seeding, jnp.stack([bounds.cut, bounds.upper]), ritz)
    target = jnp.where(seeding, cut, target)
    source = jnp.where(seeding, 0, normalised(state.residual)).astype(dtype).T
    seed = lax.cond(
        seeding, lambda: noise(source.shape[0], source.shape[1], state.seeds, dtype), lambda: jnp.zeros_like(source)
    )
    degree = degree_for(bounds.lower, cut, top, target[-1])
    fresh = filtered(low, seed, source, target, bounds.lower, cut, degree).T.astype(space.basis.dtype)
    state = state._replace(
        space=_append(A, space, fresh),
        steps=state.steps + 1,
        seeds=state.seeds - seeding,
        matvecs=state.matvecs + _WINDOW * degree,
    )
    return _advance(A, state, plan)


# ------------------------------------------------------------------------------------------- bounds of the spectrum


def _bounds(A: Any) -> _Bounds:
    """Bounds of the spectrum from a few Lanczos steps."""
    start = normalised(noise(A.shape[0], 1, 0, dtype_of(A)).T)
    basis = jnp.zeros((_PROBES + 1, A.shape[0]), start.dtype).at[0].set(start[0])
    projected = jnp.zeros((_PROBES + 1, _PROBES + 1), start.dtype)

    def lanczos(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        basis, projected = carry
        w = (A @ basis[j][:, None])[:, 0]
        coefficients = product(basis, w)
        w = w - product(coefficients, basis)
        w = w - product(product(basis, w), basis)
        norm = jnp.linalg.norm(w)
        basis = basis.at[j + 1].set(normalised(w[None])[0])
        return basis, projected.at[j].set(coefficients).at[j, j + 1].set(norm)

    _, projected = lax.fori_loop(0, _PROBES, lanczos, (basis, projected))
    square, leak = projected[:_PROBES, :_PROBES], projected[_PROBES - 1, _PROBES]
    ritz = jnp.linalg.eigvalsh((square + square.T) / 2)
    return _Bounds(ritz[0] - leak, ritz[-3], ritz[-1] + leak)
