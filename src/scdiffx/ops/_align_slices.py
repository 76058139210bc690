"""Slices of tissue in one coordinate system: fused Gromov-Wasserstein couplings, and the rigid motions they imply."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int
from scipy.spatial import cKDTree

from scdiffx._core.counts import Matrix, group_sums
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx.ops._fused_gromov import Problem, centred, couple, objective, plan, search, slackened

__all__ = ["AlignSlices", "AlignSlicesResult", "SliceGroups", "SliceLimits"]

# PASTE's pseudocount, of spots' means.
_PSEUDOCOUNT = 0.01
# Logarithm of the weight of a place that no spot fills: finite, and nothing in single precision.
_EMPTY = -60.0
# How far a coupling may be off. In single precision rounding alone moves so much mass where `epsilon` is small.
_TOL = {"float32": 2e-2, "float64": 1e-9}
_ROTATIONS = 8
# How often the couplings of all slices with the centre are found, and its expression from them.
_CENTER_ROUNDS = 5


class SliceGroups(NamedTuple):
    """What is found once: which spots are pooled, and the start of each coupling.

    `slice`: number of the slice of each spot. `group`: place of its group among ``slices x places``. `log_weight`: of
    each place, its share of the slice. `pairs`: the slices that are coupled, the one that stays first. `scale`: by what
    coordinates of a pair are divided. `start`: where each coupling starts from.
    """

    slice: Int[Array, " spots"]
    group: Int[Array, " spots"]
    log_weight: Float[Array, "slices places"]
    pairs: Int[Array, "pairs 2"]
    scale: Float[Array, " pairs"]
    start: Float[Array, "pairs dims dims"]


class SliceLimits(NamedTuple):
    """`max_spots`: of a slice, beyond which neighbours are pooled. `tol`: how far a coupling may be off. `max_iter`."""

    max_spots: int = 1000
    tol: float | None = None
    max_iter: int = 500


class AlignSlicesResult(NamedTuple):
    """Aligned coordinates, and what led to them.

    A spot at s of slice k is now at ``rotation[k] @ s + shift[k]``. `plan`: the couplings of the places of groups.
    `objective`: fused Gromov-Wasserstein of each. `steps` and `error`: of the solver. `center`: with a centre, its
    expression as shares of the genes.
    """

    aligned: Float[Array, "spots dims"]
    rotation: Float[Array, "slices dims dims"]
    shift: Float[Array, "slices dims"]
    plan: Float[Array, "pairs places places"]
    objective: Float[Array, " pairs"]
    steps: Int[Array, " pairs"]
    error: Float[Array, " pairs"]
    center: Float[Array, "places genes"] | None = None


@operator
class AlignSlices:
    """Align slices by fused Gromov-Wasserstein couplings and the rigid motions they imply (PASTE, Zeira et al. 2022).

    The objective of a pair of slices is ``(1 - alpha) <KL, P> + alpha sum (C - C')^2 P P'``: KL is the divergence of
    expression profiles (means plus a pseudocount of 0.01, as shares), C the squared distance within a slice over
    ``2 r s``, with r the root of the mean squared distance and s the distance of neighbouring spots: PASTE's distance
    in spots, but for terms of higher order in how much distances differ. All spots have equal weight.

    `init` pools neighbouring spots where a slice has more than `max_spots` (cells of a k-d tree with equal numbers of
    spots), and chooses the start of each coupling: the one with the lowest objective among rotations all around, and
    with `reflection` their mirror images. The call solves for the couplings with entropy `epsilon`, and rotates and
    shifts each slice as the coupling implies (weighted Procrustes), onto slice `reference`, or with None onto the slice
    before it. Memory is linear in the spots; couplings are at most ``max_spots x max_spots``.

    With `overlap` only this share of the mass of either slice is coupled, that which is coupled best (PASTE2, Liu et
    al. 2023): what is left out costs nothing, and motions are those of what is coupled.

    With "center" as `reference` all slices are coupled with a centre that has the places of the first slice. Its
    expression starts as that of the first slice; then couplings, and the mean over slices of what they bring to each
    place, take turns. The divergence is that of a slice's profile from the centre's, which this mean minimises.

    Derivatives of couplings and motions in expression, coordinates, `alpha` and `epsilon` are those of the stationary
    point, implicit and exact at fixed groups, starts and scales of coordinates. Compute in double precision: in single,
    couplings are off by about a hundredth of their mass.
    """

    alpha: float | Array = learnable(default=0.1, constraint="unit")
    epsilon: float | Array = learnable(default=0.002, constraint="positive")
    overlap: float | Array | None = learnable(default=None, constraint="unit")
    groups: SliceGroups | None = buffer(default=None, structure=True)
    reference: int | Literal["center"] | None = static(default=None)
    reflection: bool = static(default=False)
    limits: SliceLimits = static(default=SliceLimits())

    def init(
        self, x: Matrix, spatial: Float[Array, "spots dims"], batch: Int[Array, " spots"], key: Array | None = None
    ) -> AlignSlices:
        spots, number = np.asarray(spatial, np.float64), np.unique(np.asarray(batch), return_inverse=True)[1]
        if spots.shape[1] not in (2, 3):
            raise ValueError(f"`spatial` must have 2 or 3 dimensions, got {spots.shape[1]}")
        sizes = np.bincount(number)
        if len(sizes) < 2 or sizes.min() < 3:
            raise ValueError(f"there must be at least two slices with at least 3 spots each, got {sizes.tolist()}")
        places = min(int(sizes.max()), self.limits.max_spots)
        group = np.empty(len(spots), np.int32)
        for k in range(len(sizes)):
            here = np.flatnonzero(number == k)
            group[here] = k * places + _pooled(spots[here], places)
        share = np.bincount(group, minlength=len(sizes) * places).reshape(len(sizes), places) / sizes[:, None]
        log_weight = np.where(share > 0, np.log(np.where(share > 0, share, 1)), _EMPTY)
        pairs = self._pairs(len(sizes))
        dims = spots.shape[1]
        found = SliceGroups(
            jnp.asarray(number, jnp.int32),
            jnp.asarray(group),
            jnp.asarray(log_weight, spatial.dtype),
            jnp.asarray(pairs, jnp.int32),
            jnp.ones(len(pairs), spatial.dtype),
            jnp.zeros((len(pairs), dims, dims), spatial.dtype),
        )
        profiles, where = _means(found, x, spatial)
        scale = [_scale(*(np.asarray(where[k])[share[k] > 0] for k in pair)) for pair in pairs]
        found = found._replace(scale=jnp.asarray(scale, spatial.dtype))
        center = _shares(profiles[0]) if self.reference == "center" else None
        problems = (self._problem(found, profiles, where, i, center)[0] for i in range(len(pairs)))
        start = jnp.stack([_start(problem, self.reflection) for problem in problems])
        return replace(self, groups=found._replace(start=start))

    def _pairs(self, n_slices: int) -> list[tuple[int, int]]:
        if self.reference is None:
            return [(k, k + 1) for k in range(n_slices - 1)]
        if self.reference == "center":
            return [(0, k) for k in range(n_slices)]
        if not 0 <= self.reference < n_slices:
            raise ValueError(f"reference={self.reference} must be the number of a slice, below {n_slices}")
        return [(self.reference, k) for k in range(n_slices) if k != self.reference]

    def threshold(self, dtype: Any) -> float:
        """How far a coupling may be off."""
        return _TOL[jnp.dtype(dtype).name] if self.limits.tol is None else self.limits.tol

    def _problem(
        self, groups: SliceGroups, profiles: Array, where: Array, i: int | Array, center: Array | None = None
    ) -> tuple[Problem, Array, Array]:
        """The coupling problem of a pair, and the weighted means of its slices. With `center`, that has its place."""
        a, b = groups.pairs[i]
        log_p, log_q = groups.log_weight[a], groups.log_weight[b]
        x, x_mean = centred(where[a], log_p)
        y, y_mean = centred(where[b], log_q)
        cost = _divergence(profiles, a, b) if center is None else _from_center(profiles, b, center)
        alpha, epsilon = (jnp.asarray(v, x.dtype) for v in (self.alpha, self.epsilon))
        problem = Problem(cost, x / groups.scale[i], y / groups.scale[i], log_p, log_q, alpha, epsilon)
        if self.overlap is not None:
            problem = slackened(problem, jnp.asarray(self.overlap, x.dtype))
        return problem, x_mean, y_mean

    def __call__(
        self, x: Matrix, spatial: Float[Array, "spots dims"], batch: Int[Array, " spots"]
    ) -> AlignSlicesResult:
        groups = self.groups
        if groups is None:
            raise ValueError("AlignSlices needs its groups: call `op = op.init(x, spatial, batch)` first")
        profiles, where = _means(groups, x, spatial)

        def all_pairs(center: Array | None) -> tuple[Array, ...]:
            return lax.map(lambda i: self._coupled(groups, profiles, where, i, center), jnp.arange(len(groups.pairs)))

        center = None
        if self.reference == "center":
            again = jax.checkpoint(lambda _, center: _brought(profiles, all_pairs(center)[2], center))
            center = lax.fori_loop(0, _CENTER_ROUNDS - 1, again, _shares(profiles[0]))
        turns, shifts, p, values, steps, error = all_pairs(center)
        if center is not None:
            center = _brought(profiles, p, center)
        rotation, shift = self._composed(turns, shifts)
        aligned = jnp.einsum("sij,sj->si", rotation[groups.slice], spatial) + shift[groups.slice]
        return AlignSlicesResult(aligned, rotation, shift, p, values, steps, error, center)

    def _coupled(
        self, groups: SliceGroups, profiles: Array, where: Array, i: int | Array, center: Array | None
    ) -> tuple[Array, ...]:
        """The motion of a pair, its coupling, and what is known of that."""
        problem, x_mean, y_mean = self._problem(groups, profiles, where, i, center)
        found = couple(problem, groups.start[i], self.threshold(problem.x.dtype), self.limits.max_iter)
        p = plan(problem, found.f, found.g, found.w)
        known = objective(problem, p), found.steps, found.error
        if self.overlap is None:
            turn = rotation_of(problem.x.T @ p @ problem.y, self.reflection)
            return turn, x_mean - turn @ y_mean, p, *known
        p = p[:-1, :-1]
        turn, shift = motion_of(p, problem.x[:-1], problem.y[:-1], self.reflection)
        return turn, x_mean + groups.scale[i] * shift - turn @ y_mean, p, *known

    def _composed(self, turns: Array, shifts: Array) -> tuple[Array, Array]:
        """Motions of all slices onto the one that stays."""
        if self.reference == "center":
            return turns, shifts
        still = jnp.eye(turns.shape[1], dtype=turns.dtype), jnp.zeros(turns.shape[1], turns.dtype)
        if self.reference is not None:
            at = self.reference
            return tuple(
                jnp.concatenate([part[:at], own[None], part[at:]])
                for part, own in zip((turns, shifts), still, strict=True)
            )  # type: ignore[return-value]
        motions = [still]
        for turn, shift in zip(turns, shifts, strict=True):
            before, moved = motions[-1]
            motions.append((before @ turn, before @ shift + moved))
        return jnp.stack([turn for turn, _ in motions]), jnp.stack([shift for _, shift in motions])


@jax.custom_jvp
def _polar(w: Float[Array, "dims dims"], sign: Array) -> Float[Array, "dims dims"]:
    u, _, v = jnp.linalg.svd(w)
    return (u * jnp.ones(len(w), w.dtype).at[-1].set(sign * jnp.linalg.det(u @ v))) @ v


@_polar.defjvp
def _polar_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # JAX's derivative of the singular vectors is infinite where two singular values are equal; this one is not.
    (w, sign), (dw, _) = primals, tangents
    u, s, v = jnp.linalg.svd(w)
    flip = jnp.ones(len(w), w.dtype).at[-1].set(sign * jnp.linalg.det(u @ v))
    v = v * flip[:, None]
    s = s * flip
    inner = u.T @ dw @ v.T
    total = s[:, None] + s
    skew = (inner - inner.T) / jnp.where(jnp.eye(len(w), dtype=bool), 1, total)
    return u @ v, u @ skew @ v


def rotation_of(w: Float[Array, "dims dims"], reflection: bool) -> Float[Array, "dims dims"]:
    """The rotation R with the largest ``<R, w>``, or with `reflection` the largest of mirror images too."""
    sign = jnp.sign(jnp.linalg.det(lax.stop_gradient(w))) if reflection else jnp.ones((), w.dtype)
    return _polar(w, sign)


def motion_of(
    p: Float[Array, "n m"], x: Float[Array, "n dims"], y: Float[Array, "m dims"], reflection: bool
) -> tuple[Array, Array]:
    """The rotation R and the shift s that bring ``R @ y + s`` nearest to x, in the mean over a coupling."""
    a, b = p.sum(1) / p.sum(), p.sum(0) / p.sum()
    x_mean, y_mean = a @ x, b @ y
    turn = rotation_of((x - x_mean).T @ p @ (y - y_mean), reflection)
    return turn, x_mean - turn @ y_mean


def _pooled(spots: np.ndarray, places: int) -> np.ndarray:
    """A number from 0 to `places` - 1 for each spot: its own, or that of a cell of a k-d tree with equal numbers."""
    if len(spots) <= places:
        return np.arange(len(spots))
    label = np.empty(len(spots), np.int64)
    stack = [(np.arange(len(spots)), 0, places)]
    while stack:
        index, first, count = stack.pop()
        if count == 1:
            label[index] = first
            continue
        here = spots[index]
        axis = int(np.argmax(here.max(axis=0) - here.min(axis=0)))
        order = index[np.lexsort((*here.T, here[:, axis]))]
        left = count // 2
        cut = round(len(order) * left / count)
        stack += [(order[:cut], first, left), (order[cut:], first + left, count - left)]
    return label


def _means(groups: SliceGroups, x: Matrix, spatial: Array) -> tuple[Array, Array]:
    """Mean expression and position of each group, (slices, places, genes) and (slices, places, dims)."""
    n_slices, places = groups.log_weight.shape
    n_groups = n_slices * places
    size = jax.ops.segment_sum(jnp.ones(len(spatial), spatial.dtype), groups.group, n_groups)
    size = jnp.maximum(size, 1)[:, None]
    sums = group_sums(x, groups.group, n_groups)
    where = (jax.ops.segment_sum(spatial, groups.group, n_groups) / size).reshape(n_slices, places, -1)
    # Places that no spot fills lie in the middle, where they are in nobody's way.
    filled = groups.log_weight > _EMPTY
    middle = jnp.einsum("kp,kpd->kd", jnp.exp(groups.log_weight), where)
    where = jnp.where(filled[:, :, None], where, middle[:, None])
    return (sums / size).reshape(n_slices, places, -1).astype(spatial.dtype), where


def _shares(profiles: Float[Array, "n genes"]) -> Float[Array, "n genes"]:
    profiles = profiles + _PSEUDOCOUNT
    return profiles / profiles.sum(1, keepdims=True)


def _between(a: Float[Array, "n genes"], b: Float[Array, "m genes"]) -> Float[Array, "n m"]:
    return (a * jnp.log(a)).sum(1)[:, None] - a @ jnp.log(b).T


@jax.checkpoint
def _divergence(profiles: Float[Array, "slices n genes"], i: int | Array, j: int | Array) -> Float[Array, "n n"]:
    """Kullback-Leibler divergence of each profile of slice j from each of slice i."""
    return _between(_shares(profiles[i]), _shares(profiles[j]))


@jax.checkpoint
def _from_center(profiles: Float[Array, "slices n genes"], j: int | Array, center: Array) -> Float[Array, "n n"]:
    """What coding by the centre's profiles those of slice j costs: the divergence of the other direction."""
    return _between(_shares(profiles[j]), center).T


def _brought(
    profiles: Float[Array, "slices n genes"], plans: Float[Array, "slices n n"], center: Float[Array, "n genes"]
) -> Float[Array, "n genes"]:
    """The mean over couplings of the profiles that they bring to each place; as it was where they bring none."""
    little = jnp.finfo(center.dtype).tiny ** 0.75

    def add(state: tuple[Array, Array], both: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        of_slice, p = both
        return (state[0] + p @ _shares(of_slice), state[1] + p.sum(1)), None

    total, mass = lax.scan(add, (little * center, jnp.full(len(center), little, center.dtype)), (profiles, plans))[0]
    return total / mass[:, None]


def _scale(x: np.ndarray, y: np.ndarray) -> float:
    """The root of 2 r s: of the mean squared distance, and of the distance of neighbours, of both slices."""
    mean_square = np.mean([2 * v.var(axis=0).sum() for v in (x, y)])
    near = np.mean([np.median(cKDTree(v).query(v, k=2)[0][:, 1]) for v in (x, y)])
    if not near > 0:
        raise ValueError("at least half of the spots of a slice share their place with another: nothing can be aligned")
    return float(np.sqrt(2 * np.sqrt(mean_square) * near))


def _turns(dims: int) -> np.ndarray:
    """Rotations all around: of the plane in equal steps, or those of a cube."""
    if dims == 2:
        angle = 2 * np.pi * np.arange(_ROTATIONS) / _ROTATIONS
        return np.moveaxis(np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]), 2, 0)
    signed = (np.eye(3)[list(order)] * sign for order in permutations(range(3)) for sign in product((1, -1), repeat=3))
    return np.stack([turn for turn in signed if np.linalg.det(turn) > 0])


def _start(problem: Problem, reflection: bool) -> Array:
    """Where the coupling with the lowest objective is to start from."""
    turns = _turns(problem.x.shape[1])
    if reflection:
        turns = np.concatenate([turns, turns * np.array([-1] + [1] * (turns.shape[1] - 1))])
    spread = [jnp.exp(log_p) @ jnp.square(v).sum(1) for v, log_p in zip(problem[1:3], problem[3:5], strict=True)]
    size = jnp.sqrt(spread[0] * spread[1]) / problem.x.shape[1]
    w, values = search(problem, size * jnp.asarray(turns, problem.x.dtype))
    mirrored = jnp.linalg.det(w) < 0
    # Where no rotation is left, the best mirror image is turned as well as can be.
    values = jnp.where(mirrored & ~mirrored.all() & (not reflection), jnp.inf, values)
    return w[jnp.argmin(values)]
