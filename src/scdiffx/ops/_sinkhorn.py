"""Entropic transport by ott-jax. Importing this module loads ott, so operators import it where they use it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ott.geometry import pointcloud
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

from scdiffx._core import transport
from scdiffx._core.krylov import cg

__all__ = ["Potentials", "Settings", "potentials"]

# ott looks at the marginals after so many iterations, which costs as much as one more.
_INNER = 10


class Settings(NamedTuple):
    """`tau`: how firmly the marginals of rows and of columns are held, 1 exactly. `tol`: of the marginals, in L1."""

    tau: tuple[float, float]
    tol: float
    max_iter: int


class Potentials(NamedTuple):
    """Dual potentials, the number of iterations, and how far the last of them was from a solution."""

    f: Float[Array, " n"]
    g: Float[Array, " m"]
    iterations: Array
    error: Array


@jax.tree_util.register_pytree_node_class
class _Blocks(pointcloud.PointCloud):
    """ott's point cloud with squared Euclidean cost, whose products are ours: blocks of rows, each one product."""

    def apply_lse_kernel(
        self, f: Array, g: Array, eps: Any, vec: Array | None = None, axis: int = 0
    ) -> tuple[Array, Array]:
        x, y, h = (self.x, self.y, g) if axis == 1 else (self.y, self.x, f)
        return eps * transport.log_sums(x, y, h, eps), jnp.ones(())


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def potentials(
    x: Float[Array, "n dims"],
    y: Float[Array, "m dims"],
    log_a: Float[Array, " n"],
    log_b: Float[Array, " m"],
    epsilon: Array,
    f: Float[Array, " n"],
    g: Float[Array, " m"],
    settings: Settings,
) -> Potentials:
    """Potentials of the coupling with cost ``|x - y|^2``, by Sinkhorn's iterations from `f` and `g`.

    They are differentiated implicitly, as ott does it; but its own derivative keeps every block of the cost, and it
    solves a system whose condition number is the square of that of the symmetric one here.
    """
    (tau_a, tau_b), tol, max_iter = settings
    geometry = _Blocks(x, y, epsilon=epsilon)
    problem = linear_problem.LinearProblem(geometry, jnp.exp(log_a), jnp.exp(log_b), tau_a=tau_a, tau_b=tau_b)
    solver = sinkhorn.Sinkhorn(
        threshold=tol,
        max_iterations=max_iter,
        inner_iterations=_INNER,
        recenter_potentials=tau_a < 1 and tau_b < 1,
    )
    out = solver(problem, init=(f, g))
    errors = jnp.asarray(out.errors)
    last = jnp.maximum((errors != -1).sum() - 1, 0)
    f, g = out.potentials
    return Potentials(f, g, jnp.minimum((last + 1) * _INNER, max_iter), errors[last])


def _forward(*args: Any) -> tuple[Potentials, Any]:
    result = potentials(*args)
    return result, (*args[:5], result.f, result.g)


def _residual(inputs: tuple[Any, ...], f: Array, g: Array, tau: tuple[float, float]) -> tuple[Array, Array]:
    """What is 0 at a solution: the potentials less what an iteration makes of them."""
    x, y, log_a, log_b, epsilon = inputs
    rows = f - tau[0] * epsilon * (log_a - transport.log_sums(x, y, g, epsilon))
    columns = g - tau[1] * epsilon * (log_b - transport.log_sums(y, x, f, epsilon))
    return rows, columns


def _backward(settings: Settings, saved: Any, cotangent: Potentials) -> tuple[Any, ...]:
    """The adjoint of the fixed point: one symmetric positive system in the n unknowns, solved by conjugate gradients.

    With A the coupling over the square roots of its marginals, the system is ``1 - tau_a tau_b A A^T``, whose
    eigenvalues lie within ``1 - tau_a tau_b`` and 1.
    """
    x, y, _, _, epsilon, f, g = saved
    tau_a, tau_b = settings.tau
    log_r = f / epsilon + transport.log_sums(x, y, g, epsilon)
    log_c = g / epsilon + transport.log_sums(y, x, f, epsilon)
    f_half, g_half = f - epsilon * log_r / 2, g - epsilon * log_c / 2

    def forth(v: Array) -> Array:
        return transport.apply(x, y, f_half, g_half, epsilon, v)

    def back(v: Array) -> Array:
        return transport.apply(y, x, g_half, f_half, epsilon, v)

    from_f = (cotangent.f * jnp.exp(-log_r / 2))[:, None]
    from_g = (cotangent.g * jnp.exp(-log_c / 2))[:, None]
    right = from_f - tau_b * forth(from_g)
    null = jnp.exp(log_r / 2)[:, None]
    # Balanced potentials are known up to a constant, along which nothing that depends on the coupling changes.
    free = float(tau_a * tau_b == 1) * null / jnp.linalg.norm(null)
    right = right - free * (free * right).sum()
    tol = 1e-6 if right.dtype == jnp.float32 else 1e-13
    p = cg(lambda v: v - tau_a * tau_b * forth(back(v)), right, tol=tol, max_steps=500).x
    q = from_g - tau_a * back(p)
    adjoint = -p[:, 0] * jnp.exp(log_r / 2), -q[:, 0] * jnp.exp(log_c / 2)
    pull = jax.vjp(lambda *inputs: _residual(inputs, f, g, settings.tau), *saved[:5])[1]
    return *pull(adjoint), jnp.zeros_like(f), jnp.zeros_like(g)


potentials.defvjp(_forward, _backward)
