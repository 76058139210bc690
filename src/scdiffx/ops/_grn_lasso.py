"""The lasso of many responses on the same predictors, from their covariances alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from scdiffx._core.krylov import cg, solve

__all__ = ["descended", "lasso"]

_BLOCK = 32
_CHUNK = 128  # responses
_SWEEPS = 3
_LEAP = 30  # steps of conjugate gradients
_MAX_ROUNDS = 1000


@partial(jax.tree_util.register_dataclass, data_fields=["covariance", "active"], meta_fields=[])
class _Active:
    """The covariance of each response's active predictors, and the identity on the others: one matrix a column."""

    def __init__(self, covariance: Float[Array, "p p"], active: Bool[Array, "p q"]) -> None:
        self.covariance = covariance
        self.active = active

    @property
    def shape(self) -> tuple[int, int]:
        return self.covariance.shape[0], self.covariance.shape[1]

    @property
    def dtype(self) -> Any:
        return self.covariance.dtype

    @property
    def T(self) -> _Active:
        return _Active(self.covariance.T, self.active)

    def __matmul__(self, v: Array) -> Array:
        return jnp.where(self.active, self.covariance @ jnp.where(self.active, v, 0), v)


def lasso(
    covariance: Float[Array, "p p"],
    cross: Float[Array, "p q"],
    allowed: Bool[Array, "p q"],
    penalty: Float[Array, ""],
    start: Float[Array, "p q"] | None = None,
) -> Float[Array, "p q"]:
    """The minimum of ``w' covariance w / 2 - w' cross + penalty |w|_1`` for each response; 0 where not `allowed`.

    Coordinate descent from `start` finds which weights are not 0, and their signs. Given these the minimum solves a
    linear system, and that is what is differentiated: the derivative of the minimum wherever it has one.
    """
    first = jnp.zeros_like(cross) if start is None else start
    found = descended(*jax.tree.map(lax.stop_gradient, (covariance, cross, allowed, penalty, first)))
    active = found != 0
    right = jnp.where(active, cross - penalty * jnp.sign(found), 0)
    w = solve(_Active(covariance, active), right, x0=found, method="cg").x
    # Of predictors that are equal one may be left with a weight of rounding errors, whose sign says nothing.
    return jnp.where(w * found > 0, w, 0)


@partial(jax.jit, static_argnames="tol")
def descended(
    covariance: Array, cross: Array, allowed: Array, penalty: Array, start: Array, tol: float | None = None
) -> Float[Array, "p q"]:
    """The minimum by descent alone, until a sweep moves no weight by more than `tol`.

    A few responses at a time, which fit into the cache, and are done when they are.
    """
    p, q = cross.shape
    tol = float(jnp.finfo(cross.dtype).eps) ** 0.6 if tol is None else tol
    block = min(_BLOCK, p)
    chunk = min(_CHUNK, q)
    pad, more = -p % block, -q % chunk
    covariance = jnp.pad(covariance, ((0, pad), (0, pad)))

    def chunks(a: Array) -> Array:
        return jnp.pad(a, ((0, pad), (0, more))).reshape(p + pad, -1, chunk).transpose(1, 0, 2)

    parts = tuple(chunks(a) for a in (cross, allowed, start))
    found = lax.map(lambda part: _minimum(covariance, penalty, block, tol, *part), parts)
    return found.transpose(1, 0, 2).reshape(p + pad, -1)[:p, :q]


def _minimum(
    covariance: Array, penalty: Array, block: int, tol: float, cross: Array, allowed: Array, w: Array
) -> Array:
    """Rounds of a few sweeps over the weights and one leap of those that are not 0, until no weight moves."""

    def energy(w: Array, image: Array) -> Array:
        return (w * (0.5 * image - cross) + penalty * jnp.abs(w)).sum(0)

    def a_round(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        w, _, count = carry
        w, moved = _sweep(covariance, cross, allowed, penalty, block, w)
        w = lax.fori_loop(1, _SWEEPS, lambda _, w: _sweep(covariance, cross, allowed, penalty, block, w)[0], w)
        # Sweeps are slow where predictors are alike; the minimum at these signs is found much faster.
        active, sign = w != 0, jnp.sign(w)
        system = _Active(covariance, active)
        right = jnp.where(active, cross - penalty * sign, 0)
        far = cg(lambda v: system @ v, right, x0=w, tol=1e-12, max_steps=_LEAP).x
        far = jnp.where(active & (far * sign > 0), far, 0)
        better = energy(far, covariance @ far) < energy(w, covariance @ w)
        return jnp.where(better, far, w), moved, count + 1

    def going(carry: tuple[Array, Array, Array]) -> Array:
        return (carry[1] > tol) & (carry[2] < _MAX_ROUNDS)

    first = (w, jnp.asarray(jnp.inf, cross.dtype), jnp.zeros((), jnp.int32))
    return lax.while_loop(going, a_round, first)[0]


def _sweep(
    covariance: Array, cross: Array, allowed: Array, penalty: Array, block: int, w: Array
) -> tuple[Array, Array]:
    """Each weight set to its best in turn, and the largest move.

    Within a block of predictors the gradient is kept up to date by small products; between blocks it is computed anew
    by one large product.
    """
    size = jnp.diag(covariance)
    # A constant predictor has no covariance with anything, so that its weight is 0 whatever it is divided by.
    size = jnp.where(size > 0, size, 1)

    def visit(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        w, moved = carry
        at = i * block

        def here(a: Array) -> Array:
            return lax.dynamic_slice_in_dim(a, at, block)

        with_all, free, own_size, before = here(covariance), here(allowed), here(size), here(w)
        own = lax.dynamic_slice_in_dim(with_all, at, block, 1)

        def coordinate(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            now, gradient = carry
            pull = gradient[k] + own_size[k] * now[k]
            new = jnp.sign(pull) * jnp.maximum(jnp.abs(pull) - penalty, 0) / own_size[k]
            new = jnp.where(free[k], new, 0)
            return now.at[k].set(new), gradient - own[:, k][:, None] * (new - now[k])

        now, _ = lax.fori_loop(0, block, coordinate, (before, here(cross) - with_all @ w))
        return lax.dynamic_update_slice_in_dim(w, now, at, 0), jnp.maximum(moved, jnp.abs(now - before).max())

    return lax.fori_loop(0, cross.shape[0] // block, visit, (w, jnp.zeros((), cross.dtype)))
