"""Archetypes: every cell as a mixture of a few extremes, which are mixtures of cells themselves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float
from scipy.optimize import linear_sum_assignment

from scdiffx._core.fields import buffer, operator, replace, static
from scdiffx._log import warn

__all__ = ["Archetypes", "ArchetypesResult"]

_TOL = 1e-6  # the search ends where a round lowers the residual by less than this share
_MIX_STEPS = 10  # of an archetype in a round
_WEIGHT_STEPS = 20  # of the weights in a round
_FULL_STEPS = 200  # of the weights where they are wanted exactly
_EXCHANGES = 8  # rounds in which archetypes enter and leave the mixture of a cell
_RIDGE = 1e-10


class ArchetypesResult(NamedTuple):
    """`weights` (cells, archetypes) that sum to 1, `archetypes` (archetypes, dims), and `explained`.

    Explained is the share of the variance that mixtures of the archetypes leave no residual of.
    """

    weights: Float[Array, "cells archetypes"]
    archetypes: Float[Array, "archetypes dims"]
    explained: Array


@operator
class Archetypes:
    """Principal convex hull analysis (Cutler and Breiman 1994; Mørup and Hansen 2012).

    Minimises ``|x - weights @ archetypes|^2`` with ``archetypes = mix @ x``, all rows of `weights` and `mix` in the
    simplex. `init` searches from `n_init` furthest-sum starts (the first over all cells, others over random halves),
    alternating between weights (accelerated projected gradients) and mixes (pairwise Frank-Wolfe steps with exact line
    search, which move weight from one cell to another and cost one pass over the cells). Archetypes are numbered by
    their total weight. `n_archetypes` None takes the number after which more explain little: where the curve of
    explained variance over 1 to `max_archetypes` is farthest above its chord; the curve is kept as `curve`.

    The mix is structure, found anew at a refresh from the archetypes before it. Derivatives hold it: archetypes are
    fixed mixtures of cells, and weights solve the least squares in the simplex exactly, differentiated implicitly in
    cells and archetypes with the set of nonzero weights held. For `explained` that is the exact derivative of the
    whole search (where it found a minimum, changes of the mix do not matter); for weights and archetypes it leaves out
    how the mix would change.
    """

    archetypes: Array | None = buffer(default=None, structure=True)
    curve: Array | None = buffer(default=None, structure=True)
    mix: Array | None = buffer(default=None, structure=True)
    n_archetypes: int | None = static(default=None)
    max_archetypes: int = static(default=10)
    n_init: int = static(default=5)
    max_iter: int = static(default=300)

    def init(self, x: Float[Array, "cells dims"], key: Array | None = None) -> Archetypes:
        most = min(x.shape[0], x.shape[1] + 1)
        if self.n_archetypes is not None and not 2 <= self.n_archetypes <= most:
            raise ValueError(
                f"n_archetypes={self.n_archetypes} must lie between 2 and {most} for {x.shape[0]} cells in "
                f"{x.shape[1]} dimensions"
            )
        if self.n_archetypes is None and min(most, self.max_archetypes) < 2:
            raise ValueError(f"{x.shape[0]} cells in {x.shape[1]} dimensions have no two archetypes to choose from")
        middle = x.mean(0)
        host: np.ndarray = np.asarray(x - middle)
        rng = np.random.default_rng(0 if key is None else np.asarray(jax.random.key_data(key)).ravel())
        if self.archetypes is not None:
            found, curve = _search(host, [_nearest(host, np.asarray(self.archetypes - middle))], self.max_iter), None
        elif self.n_archetypes is not None:
            found, curve = self._best(host, self.n_archetypes, rng), None
        else:
            runs = [self._best(host, k, rng, most) for k in range(2, min(most, self.max_archetypes) + 1)]
            total = (host**2).sum(dtype=np.float64)
            curve = np.array([0.0, *(1 - float(run.residual) / total for run in runs)])
            found = runs[max(_elbow(curve) - 1, 0)]
        if not bool(found.converged):
            warn(f"archetypes still move after max_iter={self.max_iter} rounds: raise it")
        order = slice(None) if self.archetypes is not None else jnp.argsort(-found.weights.sum(0))
        return replace(
            self,
            archetypes=found.archetypes[order] + middle,
            mix=found.mix[order],
            curve=self.curve if curve is None else jnp.asarray(curve, x.dtype),
            n_archetypes=len(found.mix),
        )

    def _best(self, x: np.ndarray, k: int, rng: np.random.Generator, width: int | None = None) -> _Run:
        n = len(x)
        samples = [rng.permutation(n)[: n if i == 0 else max(n // 2, k)] for i in range(self.n_init)]
        width = k if width is None else min(width, self.max_archetypes)
        return _search(x, [cells[_furthest(x[cells], k)] for cells in samples], self.max_iter, width)

    def __call__(self, x: Float[Array, "cells dims"]) -> ArchetypesResult:
        if self.mix is None:
            raise ValueError("Archetypes needs its search: call `op = op.init(x)` first")
        # Weights sum to 1, so that the origin does not matter; near the data distances are most exact.
        middle = lax.stop_gradient(x.mean(0))
        x = x - middle
        archetypes = jnp.asarray(self.mix, x.dtype) @ x
        weights = _convex_weights(x, archetypes)
        total = ((x - x.mean(0)) ** 2).sum()
        explained = 1 - ((x - weights @ archetypes) ** 2).sum() / jnp.where(total > 0, total, 1)
        return ArchetypesResult(weights, archetypes + middle, explained)

    def spread(self, x: Array | np.ndarray, n_bootstrap: int, seed: int = 0) -> np.ndarray:
        """How far archetypes lie from those of resampled cells, relative to their distance from their own mean.

        Root mean squares over `n_bootstrap` samples with replacement, each searched from the archetypes at hand and
        from a start of its own, and matched to them. Near 0 is stable; above about 1 an archetype could be anywhere.
        """
        if self.archetypes is None:
            raise ValueError("Archetypes needs its search: call `op = op.init(x)` first")
        middle = np.asarray(x).mean(0)
        cells: np.ndarray = np.asarray(x) - middle
        here: np.ndarray = np.asarray(self.archetypes, cells.dtype) - middle
        rng = np.random.default_rng(seed)
        squares = np.zeros(len(here))
        for _ in range(n_bootstrap):
            sample = cells[rng.integers(len(cells), size=len(cells))]
            starts = [_nearest(sample, here), _furthest(sample, len(here))]
            there = np.asarray(_search(sample, starts, self.max_iter).archetypes)
            gap = ((here[:, None] - there) ** 2).sum(2)
            rows, columns = linear_sum_assignment(gap)
            squares[rows] += gap[rows, columns] / n_bootstrap
        size = ((here - here.mean(0)) ** 2).sum(1).mean()
        return np.asarray(np.sqrt(squares / size if size > 0 else squares))


class _Run(NamedTuple):
    mix: Array
    archetypes: Array
    weights: Array
    residual: Array
    converged: Array


def _search(x: np.ndarray, starts: list[np.ndarray], max_iter: int, width: int | None = None) -> _Run:
    """The best of searches from some cells; `width` pads them to one shape, and so to one program."""
    runs = []
    for cells in starts:
        k = len(cells)
        mix = np.zeros((k if width is None else width, len(x)), x.dtype)
        mix[np.arange(k), cells] = 1
        runs.append(_alternated(jnp.asarray(x), jnp.asarray(mix), jnp.arange(len(mix)) < k, max_iter))
    best = min(runs, key=lambda run: float(run.residual))
    k = len(starts[0])
    return best._replace(mix=best.mix[:k], archetypes=best.archetypes[:k], weights=best.weights[:, :k])


def _nearest(x: np.ndarray, points: np.ndarray) -> np.ndarray:
    return np.array([((x - point) ** 2).sum(1).argmin() for point in points])


def _furthest(x: np.ndarray, k: int) -> np.ndarray:
    """Furthest-sum: cells each farthest, in sum, from those before it; the first, any cell, is replaced at the end."""
    chosen: list[int] = [0]
    total = np.zeros(len(x))
    for _ in range(k):
        total += np.sqrt(((x - x[chosen[-1]]) ** 2).sum(1, dtype=np.float64))
        if len(chosen) == k:
            total -= np.sqrt(((x - x[chosen[0]]) ** 2).sum(1, dtype=np.float64))
        apart = total.copy()
        apart[chosen[1:] if len(chosen) == k else chosen] = -np.inf
        chosen.append(int(apart.argmax()))
    return np.array(chosen[1:])


def _elbow(curve: np.ndarray) -> int:
    """The place where a rising curve is farthest above the line between its ends."""
    return int((curve - np.linspace(curve[0], curve[-1], len(curve))).argmax())


@jax.jit
def _alternated(x: Array, mix: Array, real: Bool[Array, " archetypes"], max_iter: int) -> _Run:
    """Weights and mixes in turn, until the residual hardly falls; archetypes that are not real get no weight."""
    k = len(mix)

    total = (x**2).sum()

    def falling(residual: Array, before: Array, i: Array) -> Array:
        # Of cells that are mixtures exactly, the residual would fall for ever.
        return (i < 2) | (before - residual > _TOL * before) & (residual > _TOL * total)

    def going(state: tuple[Any, ...]) -> Array:
        return (state[-1] < max_iter) & falling(*state[-3:])

    def one(j: int, state: tuple[Any, ...]) -> tuple[Any, ...]:
        mix, z, square, product = state
        # The residual in one archetype, the others held, is its distance from this point.
        target = z[j] + (product[j] - square[j] @ z) / jnp.where(square[j, j] > 0, square[j, j], 1)
        row, point = _mixed(x, target, mix[j], z[j])
        return mix.at[j].set(row), z.at[j].set(point), square, product

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        mix, z, weights, residual, _, i = state
        weights = _descended(x, z, weights, real, _WEIGHT_STEPS)
        mix, z, _, _ = lax.fori_loop(0, k, one, (mix, z, weights.T @ weights, weights.T @ x))
        return mix, z, weights, ((x - weights @ z) ** 2).sum(), residual, i + 1

    weights = jnp.broadcast_to(real / real.sum(), (len(x), k)).astype(x.dtype)
    far = jnp.asarray(jnp.inf, x.dtype)
    state = lax.while_loop(going, step, (mix, mix @ x, weights, far, far, jnp.asarray(0)))
    mix, z, weights, *progress = state
    weights = _descended(x, z, weights, real, _FULL_STEPS)
    return _Run(mix, z, weights, ((x - weights @ z) ** 2).sum(), ~falling(*progress))


def _mixed(x: Array, target: Array, row: Array, point: Array) -> tuple[Array, Array]:
    """Pairwise Frank-Wolfe steps of ``row @ x`` towards a point: from the worst cell of the mixture to the best."""

    def step(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        row, point = state
        slope = x @ (point - target)
        into, out = slope.argmin(), jnp.where(row > 0, slope, -jnp.inf).argmax()
        way = x[into] - x[out]
        length = way @ way
        share = jnp.clip((target - point) @ way / jnp.where(length > 0, length, 1), 0, row[out])
        left = jnp.where(share < row[out], row[out] - share, 0)
        return (row.at[out].set(left).at[into].add(share), point + share * way), None

    (row, _), _ = lax.scan(step, (row, point), None, length=_MIX_STEPS)
    # Rounding adds up over many steps; a padded row is empty.
    row = row / jnp.where(row.sum() > 0, row.sum(), 1)
    return row, row @ x


def _descended(x: Array, z: Array, start: Array, real: Array, steps: int) -> Array:
    """Accelerated projected gradients for the weights (Beck and Teboulle 2009)."""
    square, product = z @ z.T, x @ z.T
    bound = jnp.linalg.norm(square)
    bound = jnp.where(bound > 0, bound, 1)

    def step(state: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        before, ahead, t = state
        new = _projected(jnp.where(real, ahead - (ahead @ square - product) / bound, -1e6))
        following = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
        return (new, new + (t - 1) / following * (new - before), following), None

    (weights, _, _), _ = lax.scan(step, (start, start, jnp.ones((), x.dtype)), None, length=steps)
    return weights


def _projected(v: Float[Array, "cells k"]) -> Float[Array, "cells k"]:
    """The nearest points of the simplex. Without a sort: the level is the largest over all leading sets of entries."""
    ahead = v[:, None, :] >= v[:, :, None]
    level = (jnp.where(ahead, v[:, None, :], 0).sum(2) - 1) / ahead.sum(2)
    return jnp.maximum(v - level.max(1, keepdims=True), 0)


def _convex_weights(x: Float[Array, "cells dims"], z: Float[Array, "k dims"]) -> Float[Array, "cells k"]:
    """The weights in the simplex with which `z` comes nearest to each cell; their nonzero places are held."""
    square, product = z @ z.T, x @ z.T
    scale = lax.stop_gradient(jnp.trace(square))
    scale = jnp.where(scale > 0, scale, 1)
    ridge = max(_RIDGE, 10 * float(jnp.finfo(x.dtype).eps))
    square, product = square / scale + ridge * jnp.eye(len(z), dtype=x.dtype), product / scale
    place = _support(*map(lax.stop_gradient, (x, z, square, product)))
    weights = jnp.maximum(_solved(square, product, place)[0], 0)
    return weights / weights.sum(1, keepdims=True)


def _support(x: Array, z: Array, square: Array, product: Array) -> Bool[Array, "cells k"]:
    """Where the weights are not 0: descent gives a guess, then places are exchanged until all conditions hold."""
    start = jnp.full(product.shape, 1 / len(z), x.dtype)
    guess = _descended(x, z, start, jnp.ones(len(z), bool), _FULL_STEPS) > 1e-3

    def going(state: tuple[Array, Array, Array]) -> Array:
        return state[1].any() & (state[2] < _EXCHANGES)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        place, _, i = state
        weights, level = _solved(square, product, place)
        short = weights @ square - product - level < 0
        new = jnp.where(place, weights > 0, short)
        return new, new != place, i + 1

    return lax.while_loop(going, step, (guess, jnp.ones_like(guess), jnp.asarray(0)))[0]


def _solved(square: Array, product: Array, place: Array) -> tuple[Array, Array]:
    """The least squares with weights that sum to 1 in the places given, and the level of the constraint."""
    n, k = place.shape
    on = place.astype(square.dtype)
    both = on[:, :, None] * on[:, None, :]
    system = jnp.zeros((n, k + 1, k + 1), square.dtype)
    system = system.at[:, :k, :k].set(both * square + jnp.eye(k, dtype=square.dtype) * (1 - on)[:, None, :])
    system = system.at[:, :k, k].set(on).at[:, k, :k].set(on)
    right = jnp.concatenate([on * product, jnp.ones((n, 1), square.dtype)], 1)
    solution = jnp.linalg.solve(system, right[..., None])[..., 0]
    return solution[:, :k], -solution[:, k:]
