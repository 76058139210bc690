"""RNA velocity from the full kinetics of splicing, fitted to each gene."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core.fields import buffer, called, learnable, operator, replace, static
from scdiffx._core.graph import Graph
from scdiffx.ops._dynamics_fit import Cells, Fitted, fit_genes
from scdiffx.ops._dynamics_start import Start, starting_point
from scdiffx.ops._moments import averaged, by_genes, neighbour_mean
from scdiffx.ops._splicing import Rates, at_time, solution
from scdiffx.ops._steady_state import SteadyState

__all__ = ["Dynamics", "DynamicsFit", "DynamicsResult"]

# Numbers of a block while it is fitted: it should stay in the cache.
_BLOCK = 300_000
_LONGEST = 20.0
_LEAST = 1e-6


class DynamicsFit(NamedTuple):
    """What was fitted to the genes at `columns`, on a common time scale of about 20 (hours, say).

    `t` (cells, fitted) is the time of each cell, `tau` and `tau_off` those since the start of transcription and since
    its end; all else is by gene.
    """

    columns: Int[Array, " fitted"]
    rates: Rates
    t: Float[Array, "cells fitted"]
    tau: Float[Array, "cells fitted"]
    tau_off: Float[Array, "cells fitted"]
    std_u: Float[Array, " fitted"]
    std_s: Float[Array, " fitted"]
    likelihood: Float[Array, " fitted"]
    variance: Float[Array, " fitted"]
    alignment: Float[Array, " fitted"]
    pval_steady: Float[Array, " fitted"]
    steady_u: Float[Array, " fitted"]
    steady_s: Float[Array, " fitted"]
    losses: Float[Array, "stages fitted"]
    r2: Float[Array, " genes"]


class DynamicsResult(NamedTuple):
    """`velocity` and `velocity_u` (cells, fitted): changes of both kinds of counts; `genes` (genes,): 1 if good."""

    velocity: Float[Array, "cells fitted"]
    velocity_u: Float[Array, "cells fitted"]
    genes: Float[Array, " genes"]


@operator
class Dynamics:
    """Velocity by the dynamical model (Bergen 2020; scVelo): each gene is switched on, and off again.

    `init` fits rates of transcription, splicing and degradation, the time of the switch and the times of the cells, by
    scVelo's steps of expectation and maximisation, for all genes together; the genes are those at `columns`, by
    default those that the steady-state model fits. The call gives velocities at these times, which are held constant.
    `change` (3, fitted; 0 at first) is the learnable change of the logarithms of the three rates, `power` that of
    :class:`Moments` where times are averaged over neighbours. Genes are good if likelihood and r2 are above the
    first two numbers of `least`; the steady-state model, on cells beyond the `percentile`, goes by the last two.
    """

    change: Array | None = learnable(default=None)
    power: float | Array = learnable(default=0.0)
    fit: DynamicsFit | None = buffer(default=None, structure=True)
    columns: tuple[int, ...] | None = static(default=None)
    least: tuple[float, float, float] = static(default=(1e-3, 0.01, 0.01))
    percentile: float = static(default=95.0)

    def init(self, ms: Array, mu: Array, graph: Graph, mask: Array | None = None, key: Array | None = None) -> Dynamics:
        ratio = SteadyState(adjusted=True, percentile=self.percentile, least=self.least[1:]).init(ms, mu)
        steady = called(ratio, ms, mu, mask=mask)
        columns = np.flatnonzero(np.asarray(steady.genes)) if self.columns is None else np.asarray(self.columns)
        mean = neighbour_mean(graph)
        counts = np.asarray(ms)[:, columns], np.asarray(mu)[:, columns]
        start, fitted = _fit_in_blocks(*counts, mean)
        found = np.flatnonzero(start.recoverable)
        if not len(found):
            raise ValueError("no gene has enough spliced and unspliced counts for the dynamical model")
        start, fitted = jax.tree.map(lambda x: x[..., found], (start, fitted))
        fit = _aligned(columns[found], start, fitted, mean)._replace(r2=steady.r2)
        fit = jax.tree.map(lambda x: jnp.asarray(x, ms.dtype if x.dtype.kind == "f" else None), fit)
        return replace(self, fit=fit, change=jnp.zeros((3, len(found)), ms.dtype))

    def __call__(
        self,
        ms: Float[Array, "cells genes"],
        mu: Float[Array, "cells genes"],
        graph: Graph,
        mask: Float[Array, " genes"] | None = None,
    ) -> DynamicsResult:
        f = self.fit
        if f is None or self.change is None:
            raise ValueError("Dynamics needs its fit: call `op = op.init(ms, mu, graph)` first")
        mean = neighbour_mean(graph, self.power)
        changed = f.rates._replace(
            **{
                k: getattr(f.rates, k) * jnp.exp(c)
                for k, c in zip(("alpha", "beta", "gamma"), self.change, strict=True)
            }
        )

        def block(s: Array, u: Array, tau: Array, tau_off: Array, std_u: Array, std_s: Array, *rates: Array) -> Any:
            return _velocities(s, u, tau, tau_off, (std_u, std_s), Rates(*rates), mean)

        counts = (x[:, f.columns] for x in (ms, mu))
        velocity, velocity_u = by_genes(block, *counts, f.tau, f.tau_off, f.std_u, f.std_s, *changed)
        return DynamicsResult(velocity, velocity_u, self._genes(f))

    def _genes(self, f: DynamicsFit) -> Array:
        low, high = jnp.percentile(f.rates.scaling, jnp.asarray([10.0, 90.0]))
        scaled = (f.rates.scaling > jnp.minimum(low, 0.03)) & (f.rates.scaling < jnp.maximum(high, 3))
        good = scaled & (f.likelihood > self.least[0]) & (f.r2[f.columns] > self.least[1])
        return jnp.zeros_like(f.r2).at[f.columns].set(good.astype(f.r2.dtype))


def _fit_in_blocks(ms: np.ndarray, mu: np.ndarray, mean: Any) -> tuple[Start, Fitted]:
    """Start and fit of all genes; blocks are of one width, so that they share compiled code."""
    n, genes = ms.shape
    blocks = -(-genes // max(_BLOCK // max(n, 1), 32))
    width = -(-genes // (blocks * 16)) * 16
    parts = []
    for first in range(0, genes, width):
        s, u = (x[:, first : first + width] for x in (ms, mu))
        s, u = (np.pad(x, ((0, 0), (0, width - x.shape[1])), mode="edge") for x in (s, u))
        start = starting_point(u, s)
        std_u, std_s, *rates = (jnp.asarray(x, s.dtype) for x in start[3:10])
        cells = Cells.of(jnp.asarray(u), jnp.asarray(s), jnp.asarray(start.weight), std_u, std_s, mean)
        parts.append((start, fit_genes(cells, Rates(*rates), jnp.asarray(start.upper))))
    joined: tuple[Start, Fitted] = jax.tree.map(
        lambda *x: np.concatenate([np.asarray(a) for a in x], -1)[..., :genes], *parts
    )
    return joined


def _aligned(columns: np.ndarray, start: Start, fitted: Fitted, mean: Any) -> DynamicsFit:
    """The fit with times of all genes stretched to the same total, and averaged over neighbours."""
    r = fitted.rates
    t = np.asarray(averaged(mean, jnp.asarray(fitted.t)), np.float64)
    longest = np.where(t < r.switch, t, 0).max(0) + np.where(t > r.switch, t - r.switch, 0).max(0)
    moving = 1 - (t == 0).mean(0)
    longest = longest / np.where(moving > 0, moving, 1)
    m = _LONGEST / np.where(longest > 0, longest, 1)
    rates = Rates(r.alpha / m, r.beta / m, r.gamma / m, r.scaling, r.switch * m)
    found: dict[str, Any] = {
        "columns": columns.astype(np.int32),
        "rates": rates,
        "t": t * m,
        "tau": fitted.tau[0] * m,
        "tau_off": fitted.tau[1] * m,
        "likelihood": fitted.likelihood,
        "variance": fitted.variance,
        "losses": fitted.losses,
        "alignment": m,
        "steady_u": start.steady_u * start.scaling,
        "r2": np.zeros(0),
        **{name: getattr(start, name) for name in ("std_u", "std_s", "pval_steady", "steady_s")},
    }
    return DynamicsFit(**found)


def _velocities(s: Array, u: Array, tau: Array, tau_off: Array, std: Any, r: Rates, mean: Any) -> tuple[Array, Array]:
    """Change of spliced and unspliced counts; 0 in steady states, and never below what is there."""
    scaled, std_u = u / r.scaling, std[0] / r.scaling
    end = solution(r.switch, 0.0, 0.0, r.alpha, r.beta, r.gamma)
    curves = (solution(tau_off, *end, 0.0, r.beta, r.gamma), solution(tau, 0.0, 0.0, r.alpha, r.beta, r.gamma))
    steady = ((0.0, 0.0), (r.alpha / r.beta, r.alpha / r.gamma))
    residuals = [((scaled - x) / std_u, (s - y) / std[1]) for x, y in (*curves, *steady)]
    squared = [jax.lax.stop_gradient(x**2 + y**2) for x, y in residuals]
    nearer = squared[1] < squared[0]
    distance, sign = jnp.where(nearer, squared[1], squared[0]), jnp.where(nearer, residuals[1][1], residuals[0][1])
    variance = jax.lax.stop_gradient(distance.mean(0) - (jnp.sign(sign) * jnp.sqrt(distance)).mean(0) ** 2)
    variance = jnp.where(variance > 0, variance, 1)
    exponent = jnp.stack([-0.5 * averaged(mean, d) / variance for d in squared])
    unlikely = jnp.full_like(exponent[:1], np.log(_LEAST)) + jnp.log(2 * jnp.pi * jnp.sqrt(variance))
    state = jnp.argmax(jnp.concatenate([exponent, unlikely]), axis=0)
    t = averaged(mean, jnp.where(state == 1, tau, jnp.where(state == 0, tau_off + r.switch, 0)))
    unspliced, spliced, alpha = at_time(t, r)
    moving = state < 2
    ds = jnp.where(moving, unspliced * r.beta - spliced * r.gamma, 0)
    du = jnp.where(moving, alpha - unspliced * r.beta, 0) * r.scaling
    return jnp.maximum(ds, -s), jnp.maximum(du, -u)
