"""Krylov solvers for blocks of right-hand sides, and linear solves with an implicit adjoint.

Every column converges, stalls and stops on its own; a stopped column is frozen, so one hard right-hand side does not
spoil the others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from scdiffx._core.eigsh import dtype_of

__all__ = ["Solution", "cg", "solve"]

Apply = Callable[[Array], Array]

_RESTART = 30  # Krylov dimension of one GMRES cycle


class Solution(NamedTuple):
    """The solution of linear systems, one a column, and how well each was solved."""

    x: Float[Array, "n ..."]
    residuals: Float[Array, " columns"]
    """``||b - A x|| / ||b||`` (0 where b is 0)."""
    converged: Bool[Array, ""]
    n_steps: Int[Array, ""]
    """Products of the operator with the block."""


class _Options(NamedTuple):
    method: str
    tol: float
    max_steps: int


def _dots(a: Array, b: Array) -> Array:
    return (a * b).sum(0)


def _ratio(a: Array, b: Array, where: Array) -> Array:
    """a / b in the live columns, 0 in the others."""
    return jnp.where(where, a / jnp.where(where, b, 1), 0)


def _relative(r: Array, b: Array) -> Array:
    norm = jnp.linalg.norm(b, axis=0)
    return _ratio(jnp.linalg.norm(r, axis=0), norm, norm > 0)


# ----------------------------------------------------------------------------------------------- conjugate gradients


def cg(
    apply: Apply, b: Float[Array, "n q"], *, x0: Array | None = None, tol: float | Array, max_steps: int | Array
) -> Solution:
    """Solve ``apply(X) = b`` by conjugate gradients, for an operator that is positive definite in every column.

    `apply` may differ between columns (a shift for each, say), but must not mix them. A column along which the
    operator turns out not to be positive stops where it is.
    """
    x = jnp.zeros_like(b) if x0 is None else x0
    r = b if x0 is None else b - apply(x0)
    bound = tol**2 * _dots(b, b)

    def going(carry: Any) -> Array:
        return carry[4].any() & (carry[5] < max_steps)

    def step(carry: Any) -> Any:
        x, r, p, rr, live, count = carry
        image = apply(p)
        curvature = _dots(p, image)
        live = live & (curvature > 0)
        alpha = _ratio(rr, curvature, live)
        x, r = x + alpha * p, r - alpha * image
        new = _dots(r, r)
        p = jnp.where(live, r + _ratio(new, rr, live) * p, p)
        return x, r, p, new, live & (new > bound), count + 1

    rr = _dots(r, r)
    x, r, _, _, _, count = lax.while_loop(going, step, (x, r, r, rr, rr > bound, jnp.zeros((), jnp.int32)))
    residuals = _relative(r, b)
    return Solution(x, residuals, (residuals <= tol).all(), count)


# ----------------------------------------------------------------------------------- one round of a nonsymmetric method
# A round takes a right-hand side and returns a correction that reduces it; `_refined` checks it and asks again.


def _bicgstab(apply: Apply, b: Array, tol: Array, max_steps: Array) -> tuple[Array, Array]:
    floor = jnp.finfo(b.dtype).eps ** 2

    def going(carry: Any) -> Array:
        return carry[4].any() & (carry[5] < max_steps)

    def step(carry: Any) -> Any:
        x, r, p, rho, live, count = carry
        v = apply(p)
        rv = _dots(b, v)
        alpha = _ratio(rho, rv, live & (jnp.abs(rv) > floor * bb))
        s = r - alpha * v
        t = apply(s)
        tt = _dots(t, t)
        omega = _ratio(_dots(t, s), tt, live & (tt > 0))
        x, r = x + alpha * p + omega * s, s - omega * t
        new = _dots(b, r)
        # Breakdown (the shadow residual is orthogonal to the residual): stop, the next round starts afresh.
        sound = live & (jnp.abs(new) > floor * bb) & (alpha != 0) & (omega != 0)
        beta = _ratio(new * alpha, rho * omega, sound)
        p = jnp.where(sound, r + beta * (p - omega * v), p)
        return x, r, p, new, sound & (_dots(r, r) > tol**2 * bb), count + 2

    bb = _dots(b, b)
    first = (jnp.zeros_like(b), b, b, bb, bb > 0, jnp.zeros((), jnp.int32))
    x, *_, count = lax.while_loop(going, step, first)
    return x, count


def _gmres(apply: Apply, b: Array, tol: Array, max_steps: Array) -> tuple[Array, Array]:
    del tol, max_steps  # one cycle is the unit of work
    norm = jnp.linalg.norm(b, axis=0)
    basis = jnp.zeros((_RESTART + 1, *b.shape), b.dtype).at[0].set(_ratio(b, norm, norm > 0))
    hessenberg = jnp.zeros((b.shape[1], _RESTART + 1, _RESTART), b.dtype)

    def arnoldi(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        basis, hessenberg = carry
        w = apply(basis[j])
        before = jnp.linalg.norm(w, axis=0)
        coefficients = jnp.zeros((_RESTART + 1, b.shape[1]), b.dtype)
        for _ in range(2):
            part = (basis * w).sum(1)
            w, coefficients = w - (basis * part[:, None]).sum(0), coefficients + part
        length = jnp.linalg.norm(w, axis=0)
        length = jnp.where(length > 10 * jnp.finfo(b.dtype).eps * before, length, 0)
        basis = basis.at[j + 1].set(_ratio(w, length, length > 0))
        return basis, hessenberg.at[:, :, j].set(coefficients.at[j + 1].add(length).T)

    basis, hessenberg = lax.fori_loop(0, _RESTART, arnoldi, (basis, hessenberg))
    target = jnp.zeros((b.shape[1], _RESTART + 1), b.dtype).at[:, 0].set(norm)
    y = jax.vmap(lambda h, t: jnp.linalg.lstsq(h, t)[0])(hessenberg, target)
    return (basis[:-1] * y.T[:, None]).sum(0), jnp.asarray(_RESTART, jnp.int32)


def _cg_round(apply: Apply, b: Array, tol: Array, max_steps: Array) -> tuple[Array, Array]:
    solution = cg(apply, b, tol=tol, max_steps=max_steps)
    return solution.x, solution.n_steps


_ROUNDS = {"bicgstab": _bicgstab, "gmres": _gmres, "cg": _cg_round}


def _refined(apply: Apply, b: Array, x: Array, options: _Options) -> Solution:
    """Rounds of corrections from the true residual, until it is small enough or no longer shrinks.

    The recurrences of a round drift from the true residual by rounding; starting again from it removes the drift.
    """
    solve_round = _ROUNDS[options.method]
    eps, size = jnp.finfo(b.dtype).eps, jnp.linalg.norm(b, axis=0)
    r = b - apply(x)
    error = _relative(r, b)
    # Rounding in A x alone leaves a residual of eps |A| |x|; the norm of A is judged by what it does to b.
    gain = _relative(apply(b), b).max()

    def wanted(x: Array, error: Array) -> Array:
        length = jnp.linalg.norm(x, axis=0)
        return error > jnp.maximum(options.tol, 4 * eps * gain * _ratio(length, size, size > 0))

    def going(carry: Any) -> Array:
        x, _, error, shrinking, count = carry
        return (wanted(x, error) & shrinking).any() & (count < options.max_steps)

    def body(carry: Any) -> Any:
        x, r, error, shrinking, count = carry
        live = wanted(x, error) & shrinking
        # A round gains at most what its precision can tell apart; columns that are done take no part (b = 0).
        goal = jnp.maximum(0.3 * options.tol / error.max(), jnp.sqrt(eps))
        step, used = solve_round(apply, jnp.where(live, r, 0), goal, options.max_steps - count)
        new_x = x + step
        new_r = b - apply(new_x)
        new_error = _relative(new_r, b)
        better = live & (new_error < error)
        x, r = jnp.where(better, new_x, x), jnp.where(better, new_r, r)
        return x, r, jnp.where(better, new_error, error), better & (new_error < 0.9 * error), count + used + 1

    first = (x, r, error, jnp.ones_like(error, bool), jnp.full((), 2, jnp.int32))
    x, _, error, _, count = lax.while_loop(going, body, first)
    return Solution(x, error, ~(wanted(x, error) | jnp.isnan(error)).any(), count)


# ----------------------------------------------------------------------------------------------------- the linear solve


def solve(
    A: Any,
    b: Float[Array, "n ..."],
    *,
    x0: Float[Array, "n ..."] | None = None,
    method: str = "bicgstab",
    tol: float | None = None,
    max_steps: int = 2000,
) -> Solution:
    """Solve ``A x = b``, with the derivative of the solution (not of the iteration) in `A` and `b`.

    Parameters
    ----------
    A
        Operator of shape (n, n), not necessarily symmetric: a pytree with ``A @ V`` for dense (n, q) and ``A.T``.
    b
        Right-hand sides, (n,) or (n, q).
    x0
        First guess, of the shape of `b`; it has no derivative. A solution costs two products.
    method
        ``"bicgstab"``, ``"gmres"`` (robust, stores 31 blocks), or ``"cg"`` where `A` is symmetric positive definite.
    tol
        Relative residual wanted. Default: 1e-10 in float64, 1e-6 in float32. The iteration also ends when rounding
        stops further progress; `converged` tells.
    max_steps
        Most products of `A` with the block.

    Returns
    -------
    A `Solution`; only its ``x`` carries a derivative. The adjoint is solved by the same method to the same tolerance.
    """
    if method not in _ROUNDS:
        raise ValueError(f"method={method!r} is unknown. Available: {sorted(_ROUNDS)}")
    if b.ndim not in (1, 2) or b.shape[0] != A.shape[0]:
        raise ValueError(f"b must have shape ({A.shape[0]},) or ({A.shape[0]}, q), got {b.shape}")
    if x0 is not None and x0.shape != b.shape:
        raise ValueError(f"x0 must have the shape of b, {b.shape}, got {x0.shape}")
    dtype = jnp.result_type(dtype_of(A), b.dtype)
    tol = (1e-10 if dtype == jnp.float64 else 1e-6) if tol is None else tol
    columns = b.reshape(b.shape[0], -1).astype(dtype)
    guess = jnp.zeros_like(columns) if x0 is None else lax.stop_gradient(x0).reshape(columns.shape).astype(dtype)
    solution = _solve(_Options(method, tol, max_steps), A, columns, guess)
    rest = jax.tree.map(lax.stop_gradient, solution[1:])
    return Solution(solution.x.reshape(b.shape), *rest)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(options: _Options, A: Any, b: Array, x0: Array) -> Solution:
    return _forward(options, A, b, x0)


@partial(jax.jit, static_argnums=0)
def _forward(options: _Options, A: Any, b: Array, x0: Array) -> Solution:
    return _refined(lambda v: A @ v, b, x0, options)


def _solve_fwd(options: _Options, A: Any, b: Array, x0: Array) -> tuple[Solution, tuple[Any, Array]]:
    solution = _forward(options, A, b, x0)
    return solution, (A, solution.x)


def _solve_bwd(options: _Options, saved: tuple[Any, Array], cotangent: Solution) -> tuple[Any, Array, Array]:
    return _adjoint(options, *saved, cotangent.x)


@partial(jax.jit, static_argnums=0)
def _adjoint(options: _Options, A: Any, x: Array, x_bar: Array) -> tuple[Any, Array, Array]:
    transpose = A.T
    dual = _refined(lambda v: transpose @ v, x_bar, jnp.zeros_like(x), options).x
    pull = jax.vjp(lambda op: op @ x, A)[1]
    return pull(-dual)[0], dual, jnp.zeros_like(x)


_solve.defvjp(_solve_fwd, _solve_bwd)
