"""What is not linear in a coupling whose marginals are free, for squared distances: a square of few of its moments.

With n = |x|^2, m = |y|^2 and u = n - m, the Gromov-Wasserstein term of a coupling P of mass s is, with E for sums over
P and any origin of x and y,

    2 s E[u^2] + 2 E[u]^2 + 4 |E[x x^T]|^2 + 4 |E[y y^T]|^2 - 8 |E[x y^T]|^2 - 8 E[u x] E[x] + 8 E[u y] E[y]

and each product of two moments is a difference of squares. The squares that are added are convex in P and those taken
off concave. Each feature is a sum of products of a monomial of x and one of y, so that nothing is larger than P.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

__all__ = ["Lift", "bend", "bend_of", "energy", "lifted", "moments", "products", "sizes", "surface"]

# By how many times the largest cost points that stand for what is left out are kept apart.
_APART = 1e3


class Lift(NamedTuple):
    """Monomials of either side, and what is linear in the coupling. The last point of each side is no point."""

    a: Float[Array, "n monomials"]
    b: Float[Array, "m monomials"]
    base: Float[Array, "n m"]


@functools.cache
def _form(dims: int) -> tuple[np.ndarray, np.ndarray]:
    """Features by products of monomials (features, monomials, monomials), and the curvature of each moment's square.

    Monomials: 1, |x|^2, x, |x|^2 x and x x^T. Features: x y^T; u, x x^T, y y^T; then u x + x, u x - x, the same of y.
    """
    d, last = dims, 2 + 2 * dims
    count = last + d * d
    one, norm, plain, cubic, square = 0, 1, 2, 2 + d, last
    features: list[tuple[int, list[tuple[int, int, int]]]] = []
    features += [(-16, [(plain + i, plain + j, 1)]) for i in range(d) for j in range(d)]
    features.append((4, [(norm, one, 1), (one, norm, -1)]))
    features += [(8, [(square + i, one, 1)]) for i in range(d * d)]
    features += [(8, [(one, square + i, 1)]) for i in range(d * d)]
    for sign in (1, -1):
        of_x = [[(cubic + i, one, 1), (plain + i, norm, -1), (plain + i, one, sign)] for i in range(d)]
        of_y = [[(norm, plain + i, 1), (one, cubic + i, -1), (one, plain + i, sign)] for i in range(d)]
        features += [(-4 * sign, terms) for terms in of_x] + [(4 * sign, terms) for terms in of_y]
    tensor = np.zeros((len(features), count, count))
    for k, (_, terms) in enumerate(features):
        for i, j, factor in terms:
            tensor[k, i, j] = factor
    return tensor, np.array([curvature for curvature, _ in features], np.float64)


def _tensor(lift: Lift) -> Array:
    return jnp.asarray(_form(_dims(lift))[0], lift.a.dtype)


def _dims(lift: Lift) -> int:
    return round(np.sqrt(lift.a.shape[1] - 1)) - 1


def bend_of(dims: int) -> Float[np.ndarray, " features"]:
    """Minus the curvature of each moment's square: positive where that is concave."""
    return -_form(dims)[1]


def bend(lift: Lift) -> Float[Array, " features"]:
    """The same as an array of the computation."""
    return jnp.asarray(bend_of(_dims(lift)), lift.a.dtype)


def lifted(cost: Array, x: Array, y: Array, alpha: Array, share: Array) -> Lift:
    """The terms of a problem, with a point more on each side that takes what is left out and costs nothing."""
    a, b = _monomials(x), _monomials(y)
    u = a[:, 1][:, None] - b[:, 1]
    base = (1 - alpha) * cost + 2 * alpha * share * u**2
    apart = _APART * (1 + lax.stop_gradient(jnp.abs(base).max()))
    base = jnp.pad(base, ((0, 1), (0, 1))).at[-1, -1].set(apart)
    a, b = (jnp.pad(v, ((0, 1), (0, 0))) for v in (a, b))
    return Lift(a, b, base)


def _monomials(x: Float[Array, "n dims"]) -> Float[Array, "n monomials"]:
    norm = jnp.square(x).sum(1, keepdims=True)
    square = (x[:, :, None] * x[:, None]).reshape(len(x), -1)
    return jnp.concatenate([jnp.ones_like(norm), norm, x, norm * x, square], axis=1)


def moments(lift: Lift, inner: Float[Array, "monomials monomials"]) -> Float[Array, " features"]:
    """The moments of a coupling P from ``a^T P b``."""
    return jnp.einsum("kab,ab->k", _tensor(lift), inner)


def surface(lift: Lift, w: Float[Array, " features"]) -> Float[Array, "n m"]:
    """The derivative in the coupling of what is not linear in it, where moments are `w`."""
    return -lift.a @ jnp.einsum("kab,k->ab", _tensor(lift), bend(lift) * w) @ lift.b.T


def energy(lift: Lift, w: Float[Array, " features"]) -> Array:
    """What is not linear in the coupling."""
    return -(bend(lift) * w**2).sum() / 2


def sizes(lift: Lift, p: Array, q: Array) -> Float[Array, " features"]:
    """A bound of each moment, from the spread of monomials."""
    of_a, of_b = (jnp.sqrt(weight @ v**2) for weight, v in ((p, lift.a), (q, lift.b)))
    return jnp.einsum("kab,a,b->k", jnp.abs(_tensor(lift)), of_a, of_b)


def products(lift: Lift, p: Float[Array, "n m"]) -> tuple[Array, Array, Array]:
    """Sums over the coupling of features by rows, by columns, and of their products."""
    a, b, tensor = lift.a, lift.b, _tensor(lift)
    (n, c), m = a.shape, len(b)
    rows = jnp.einsum("ia,ib,kab->ik", a, p @ b, tensor, optimize=True)
    columns = jnp.einsum("jb,ja,kab->jk", b, p.T @ a, tensor, optimize=True)
    aa = (a[:, :, None] * a[:, None]).reshape(n, c * c)
    bb = (b[:, :, None] * b[:, None]).reshape(m, c * c)
    inner = (aa.T @ (p @ bb)).reshape(c, c, c, c)
    return rows, columns, jnp.einsum("kab,lcd,acbd->kl", tensor, tensor, inner, optimize=True)
