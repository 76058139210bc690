"""Integration of batches in an embedding by soft clusters and ridge regressions (Harmony)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Bool, Float, Int

from scdiffx._core.fields import buffer, learnable, operator, replace, static

__all__ = ["Harmony", "HarmonyGroups", "HarmonyResult", "HarmonySettings"]

# The start is k-means of so many rounds, or until centroids move less than this.
_LLOYD = 25
_STILL = 1e-6
# The objective is reported for so many cells.
_SCALE = 2000
_MOST_CLUSTERS = 100
_TRIALS = 6
_CELLS_PER_CLUSTER = 30
# Rows whose distances to all centroids are held at once in k-means.
_ROWS = 8192


class HarmonyResult(NamedTuple):
    """`corrected`: the embedding without the batches (cells, dims). `centroids`: directions of unit length.

    `objective`: the clustering objective of the start and after each round, NaN past the last; `rounds`: their number.
    """

    corrected: Float[Array, "cells dims"]
    centroids: Float[Array, "clusters dims"]
    objective: Float[Array, " rounds_plus_1"]
    rounds: Array


class HarmonySettings(NamedTuple):
    """How long Harmony iterates, in what steps, and which batches it leaves out, under harmonypy's names.

    `max_iter_kmeans` is the number of clustering passes in each round. Cells are assigned in blocks of the share
    `block_size`. A batch of which less than `batch_prop_cutoff` is in a cluster is not corrected there.
    """

    max_iter_harmony: int = 10
    max_iter_kmeans: int = 4
    epsilon_harmony: float = 1e-2
    block_size: float = 0.05
    batch_prop_cutoff: float = 1e-5


class HarmonyGroups(NamedTuple):
    """The discrete start. For each cell: its cluster, its place in the order of assignment, its level.

    A level is a combination of batches that occurs, one of each column; `members` tells which, and `column` to which
    column a batch belongs.
    """

    start: Int[Array, " cells"]
    order: Int[Array, " cells"]
    level: Int[Array, " cells"]
    members: Bool[Array, "levels batches"]
    column: Int[Array, " batches"]


class _Cells(NamedTuple):
    """The cells in blocks, in the order of their assignment; pads have level -1."""

    z: Float[Array, "blocks size dims"]
    level: Int[Array, "blocks size"]


class _Model(NamedTuple):
    """What is the same in all rounds."""

    theta: Float[Array, " batches"]
    sigma: Float[Array, " clusters"]
    share: Float[Array, "batches 1"]
    size: Float[Array, "batches 1"]
    members: Float[Array, "levels batches"]
    columns: Float[Array, "columns batches"]
    scale: Array


@operator
class Harmony:
    """Remove batches from an embedding (Korsunsky et al. 2019, in the second version of the method).

    Each round assigns cells softly to clusters by their cosines, with a penalty on clusters in which their batch is
    over-represented, block by block. In every cluster a ridge regression tells the batches from the intercept; what
    the batches explain is taken off the *original* embedding, in proportion to the assignments, and the intercepts are
    the centroids of the next round. Without `lamb` the penalty of a batch in a cluster is `alpha` times the number of
    its cells that are expected there.

    `theta` and `lamb` are numbers for all batches, or arrays for each column of batches or each batch; `sigma` is a
    number, or an array for each cluster. `init` starts the clusters by k-means, and repeats rounds until the objective
    falls by less than a share `epsilon_harmony`; their number is kept in `rounds`. The call repeats that many from the
    same start in the same order, so it is a fixed smooth function of embedding and parameters: its derivative is exact,
    in memory that does not grow with the rounds' passes. ``rounds=0`` leaves the test to each call, which then has no
    reverse derivative.
    """

    theta: float | Array = learnable(default=2.0, constraint="positive")
    sigma: float | Array = learnable(default=0.1, constraint="positive")
    alpha: float | Array | None = learnable(default=0.2, constraint="positive")
    lamb: float | Array | None = learnable(default=None, constraint="positive")
    groups: HarmonyGroups | None = buffer(default=None, structure=True)
    nclust: int | None = static(default=None)
    rounds: int | None = static(default=None)
    settings: HarmonySettings = static(default=HarmonySettings())

    def init(self, z: Float[Array, "cells dims"], *batches: Int[Array, " cells"], key: Array | None = None) -> Harmony:
        n = z.shape[0]
        most = min(round(n / _CELLS_PER_CLUSTER), _MOST_CLUSTERS)
        nclust = max(most, 1) if self.nclust is None else self.nclust
        if not 1 <= nclust <= n:
            raise ValueError(f"nclust={nclust} must be at least 1 and at most {n}, the cells")
        seed = 0 if key is None else int(np.asarray(jax.random.key_data(key)).ravel()[-1])
        rng = np.random.default_rng(seed)
        level, members, column = _levels(batches)
        start = _kmeans(np.asarray(z), nclust, rng)
        groups = HarmonyGroups(start, rng.permutation(n).astype(np.int32), level, members, column)
        op = replace(self, groups=HarmonyGroups(*(jnp.asarray(a) for a in groups)), nclust=nclust)
        op._check(len(batches), len(column))
        if op.lamb is not None:
            op = replace(op, alpha=None)
        if op.rounds is None:
            found = jax.jit(lambda op, *args: op(*args).rounds)(replace(op, rounds=0), z, *batches)
            op = replace(op, rounds=int(found))
        return op

    def _check(self, columns: int, batches: int) -> None:
        if self.lamb is None and self.alpha is None:
            raise ValueError("one of `alpha` and `lamb` is needed")
        for name, sizes in (("theta", (columns, batches)), ("lamb", (columns, batches)), ("sigma", (self.nclust,))):
            shape = () if getattr(self, name) is None else np.shape(getattr(self, name))
            if shape and (len(shape) > 1 or shape[0] not in sizes):
                forms = " or ".join(str(size) for size in dict.fromkeys(sizes))
                raise ValueError(f"{name} has shape {shape}: it must be a number or {forms} of them")

    def __call__(self, z: Float[Array, "cells dims"], *batches: Int[Array, " cells"]) -> HarmonyResult:
        """Of `batches` only the number is read: `init` has read the rest."""
        g = self.groups
        if g is None or self.rounds is None or self.nclust is None or not batches:
            raise ValueError("Harmony needs its start: call `op = op.init(z, batch)` first")
        cells, model = self._cells(z, g), self._model(z, g, len(batches))
        own = jax.nn.one_hot(g.start, self.nclust, dtype=z.dtype)
        state = (cells.z, _unit(own.T @ _unit(z)))
        most = self.rounds or self.settings.max_iter_harmony
        if self.rounds:

            def again(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
                *state, first, last = jax.checkpoint(self._round)(cells, model, *state)
                return tuple(state), (first, last)

            (corrected, centroids), (first, last) = jax.lax.scan(again, state, None, length=most)
            objective = jnp.concatenate([first[:1], last])
            rounds = jnp.asarray(most)
        else:
            corrected, centroids, objective, rounds = self._until_still(cells, model, state)
        flat = corrected.reshape(-1, z.shape[1])[: z.shape[0]]
        back = jnp.zeros_like(z).at[g.order].set(flat, unique_indices=True)
        return HarmonyResult(back, centroids, objective, rounds)

    def _until_still(
        self, cells: _Cells, model: _Model, state: tuple[Array, Array]
    ) -> tuple[Array, Array, Array, Array]:
        """Rounds until the objective hardly falls, or rises."""
        most = self.settings.max_iter_harmony

        def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
            *_, objective, i = carry
            old, new = objective[i - 1], objective[i]
            still = (old - new) / jnp.abs(old) < self.settings.epsilon_harmony
            return (i < most) & ~((i > 0) & still)

        def step(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            *state, objective, i = carry
            *state, first, last = self._round(cells, model, *state)
            objective = objective.at[0].set(jnp.where(i == 0, first, objective[0])).at[i + 1].set(last)
            return *state, objective, i + 1

        objective = jnp.full(most + 1, jnp.nan, state[0].dtype)
        return jax.lax.while_loop(unfinished, step, (*state, objective, jnp.asarray(0)))

    def _cells(self, z: Array, g: HarmonyGroups) -> _Cells:
        n, dims = z.shape
        blocks = min(math.ceil(1 / self.settings.block_size), n)
        size = -(-n // blocks)
        pad = blocks * size - n
        moved = jnp.pad(z[g.order], ((0, pad), (0, 0)))
        level = jnp.pad(g.level[g.order], (0, pad), constant_values=-1)
        return _Cells(moved.reshape(blocks, size, dims), level.reshape(blocks, size))

    def _model(self, z: Array, g: HarmonyGroups, columns: int) -> _Model:
        members = g.members.astype(z.dtype)
        size = members.T @ jnp.zeros(members.shape[0], z.dtype).at[g.level].add(1)
        sigma = jnp.broadcast_to(jnp.asarray(self.sigma, z.dtype), (self.nclust or 0,))
        return _Model(
            _for_each(self.theta, g.column, z.dtype),
            sigma,
            (size / z.shape[0])[:, None],
            size[:, None],
            members,
            jax.nn.one_hot(g.column, columns, dtype=z.dtype).T,
            jnp.asarray(_SCALE / len(z), z.dtype),
        )

    def _round(self, cells: _Cells, model: _Model, corrected: Array, centroids: Array) -> tuple[Array, ...]:
        """One round: the corrected cells, the centroids, and the objective before and after the clustering."""
        levels = model.members.shape[0]
        unit = _unit(corrected)

        def log_assign(unit: Array, level: Array, penalty: Array | None) -> tuple[Array, Array, Array]:
            """Log probabilities, distances and the levels as indicators, of the cells of a block."""
            belongs = jax.nn.one_hot(level, levels, dtype=unit.dtype)
            distance = 2 * (1 - unit @ centroids.T)
            odds = -distance / model.sigma
            if penalty is not None:
                odds = odds + belongs @ penalty
            return jax.nn.log_softmax(odds), distance, belongs

        def energy(log_p: Array, distance: Array, belongs: Array) -> Array:
            return (belongs.sum(1) * (jnp.exp(log_p) * (distance + model.sigma * log_p)).sum(1)).sum()

        def first(block: tuple[Array, Array]) -> tuple[Array, Array]:
            log_p, distance, belongs = log_assign(*block, None)
            return belongs.T @ jnp.exp(log_p), energy(log_p, distance, belongs)

        def assign(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, ...]]:
            """Take a block out of the totals, assign it by what is left, and put it back."""
            unit, level, old = block
            rest = total - old
            log_p, distance, belongs = log_assign(unit, level, model.members @ _log_penalty(model, rest))
            p = jnp.exp(log_p)
            new = belongs.T @ p
            return rest + new, (new, p, energy(log_p, distance, belongs))

        @jax.checkpoint
        def one_pass(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            total, (new, *_rest) = jax.lax.scan(assign, state[0], (unit, cells.level, state[1]))
            return (total, new), None

        old, before = jax.lax.map(first, (unit, cells.level))
        total = old.sum(0)
        start = before.sum() + _diversity(model, total)
        passes = self.settings.max_iter_kmeans - 1
        (total, old), _ = jax.lax.scan(one_pass, (total, old), None, length=passes)
        total, (_, p, after) = jax.lax.scan(jax.checkpoint(assign), total, (unit, cells.level, old))
        corrected, centroids = self._correct(cells, model, total, p, centroids)
        return corrected, centroids, start * model.scale, (after.sum() + _diversity(model, total)) * model.scale

    def _correct(
        self, cells: _Cells, model: _Model, total: Array, p: Array, centroids: Array
    ) -> tuple[Array, Array]:
        """The original cells less what the batches explain in each cluster, and the intercepts."""
        levels, dims, clusters = total.shape[0], cells.z.shape[2], total.shape[1]

        def add(sums: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
            z, level, p = block
            belongs = jax.nn.one_hot(level, levels, dtype=z.dtype)
            spread = (belongs[:, :, None] * z[:, None, :]).reshape(len(z), -1)
            return sums + p.T @ spread, None

        empty = jnp.zeros((clusters, levels * dims), total.dtype)
        sums, _ = jax.lax.scan(jax.checkpoint(add), empty, (cells.z, cells.level, p))
        shift, centroids = self._ridge(model, total, sums.reshape(clusters, levels, dims), centroids)
        shift = shift.reshape(clusters, -1)

        @jax.checkpoint
        def moved(block: tuple[Array, Array, Array]) -> Array:
            z, level, p = block
            belongs = jax.nn.one_hot(level, levels, dtype=z.dtype)
            return z - ((p @ shift).reshape(len(z), levels, dims) * belongs[:, :, None]).sum(1)

        return jax.lax.map(moved, (cells.z, cells.level, p)), centroids

    def _ridge(self, model: _Model, total: Array, sums: Array, centroids: Array) -> tuple[Array, Array]:
        """For each cluster: what its batches add to the cells of each level, and the intercept's direction."""
        observed = (model.members.T @ total).T
        expected = (model.share * total.sum(0)).T
        keep = jax.lax.stop_gradient(observed) / model.size.T > self.settings.batch_prop_cutoff
        # A column of which one batch is left in a cluster says nothing there.
        several = (keep.astype(total.dtype) @ model.columns.T) > 1
        keep = (keep & (several.astype(total.dtype) @ model.columns > 0)).astype(total.dtype)
        alive = keep.sum(1) > 0
        used = (keep @ model.members.T > 0).astype(total.dtype)
        if self.lamb is None:
            penalty = self.alpha * expected
        else:
            penalty = jnp.broadcast_to(_for_each(self.lamb, self.groups.column, total.dtype), keep.shape)
        if len(model.columns) == 1:
            weight, intercept = _one_column(observed * keep, penalty, sums * keep[:, :, None], keep, alive)
        else:
            weight, intercept = _several_columns(model, total.T * used, penalty, sums * used[:, :, None], keep, alive)
        centroids = jnp.where(alive[:, None], _unit(intercept), centroids)
        return jnp.einsum("jb,kbd->kjd", model.members, weight), centroids


def _one_column(
    mass: Array, penalty: Array, sums: Array, keep: Array, alive: Array
) -> tuple[Float[Array, "clusters batches dims"], Float[Array, "clusters dims"]]:
    """Ridge coefficients and intercepts for one column of batches, whose levels are the batches."""
    shrink = keep * penalty / (mass + penalty)
    whole = jnp.where(alive, (shrink * mass).sum(1), 1)
    intercept = (shrink[:, :, None] * sums).sum(1) / whole[:, None]
    residual = sums - mass[:, :, None] * intercept[:, None, :]
    return residual * (keep / (mass + penalty))[:, :, None], intercept


def _several_columns(
    model: _Model, mass: Array, penalty: Array, sums: Array, keep: Array, alive: Array
) -> tuple[Float[Array, "clusters batches dims"], Float[Array, "clusters dims"]]:
    """The same for several columns, of which each cell has a batch in each."""
    seen = jnp.concatenate([alive[:, None].astype(mass.dtype), keep], 1)
    design = jnp.concatenate([jnp.ones((len(model.members), 1), mass.dtype), model.members], 1)
    gram = jnp.einsum("kj,ja,jb->kab", mass, design, design) * seen[:, :, None] * seen[:, None, :]
    # What is left out becomes a row and a column of the unit matrix; the intercept has no penalty.
    ridge = jnp.concatenate([jnp.zeros((len(keep), 1), mass.dtype), penalty * keep], 1) + 1 - seen
    gram = gram + ridge[:, :, None] * jnp.eye(design.shape[1], dtype=mass.dtype)
    right = jnp.einsum("kjd,ja->kad", sums, design) * seen[:, :, None]
    weight = jnp.linalg.solve(gram, right)
    return weight[:, 1:], weight[:, 0]


def _log_penalty(model: _Model, total: Float[Array, "levels clusters"]) -> Float[Array, "batches clusters"]:
    """How much the batches of each cell count for or against a cluster: over-represented ones against it."""
    observed, expected = model.members.T @ total, model.share * total.sum(0)
    return model.theta[:, None] * (jnp.log(2 * expected + 1) - jnp.log(observed + expected + 1))


def _diversity(model: _Model, total: Float[Array, "levels clusters"]) -> Array:
    observed = model.members.T @ total
    return -(observed * model.sigma * _log_penalty(model, total)).sum()


def _unit(x: Array) -> Array:
    """Rows of length 1; rows of zeros stay."""
    squared = (x**2).sum(-1, keepdims=True)
    return x * jnp.where(squared > 0, jax.lax.rsqrt(jnp.where(squared > 0, squared, 1)), 0)


def _for_each(value: float | Array | None, column: Array, dtype: np.dtype) -> Float[Array, " batches"]:
    """A number for each batch, from one for all, for each column or for each batch."""
    value = jnp.asarray(value, dtype)
    if value.ndim and value.shape != column.shape:
        return value[column]
    return jnp.broadcast_to(value, column.shape)


def _levels(batches: tuple[Array, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The combination of batches of each cell, the batches of each combination, and the column of each batch."""
    if not batches:
        raise ValueError("Harmony needs the batch of each cell: `op.init(z, batch)`")
    codes, column, first = [], [], 0
    for i, batch in enumerate(batches):
        names, code = np.unique(np.asarray(batch), return_inverse=True)
        codes.append(code.ravel() + first)
        column += [i] * len(names)
        first += len(names)
    combined, level = np.unique(np.stack(codes, 1), axis=0, return_inverse=True)
    members = np.zeros((len(combined), first), bool)
    members[np.arange(len(combined))[:, None], combined] = True
    return level.ravel().astype(np.int32), members, np.asarray(column, np.int32)


def _kmeans(z: np.ndarray, nclust: int, rng: np.random.Generator) -> np.ndarray:
    """Clusters of the directions of the cells by k-means from a k-means++ start."""
    length = np.linalg.norm(z, axis=1, keepdims=True)
    unit = (z / np.where(length > 0, length, 1)).astype(z.dtype)
    centroids = np.empty((nclust, z.shape[1]), z.dtype)
    near = np.ones(len(z))
    for k in range(nclust):
        # The best of a few random candidates, as in scikit-learn: starts differ less.
        sums = np.cumsum(near if near.sum() > 0 else np.ones(len(z)))
        drawn = np.searchsorted(sums, rng.random(_TRIALS if k else 1) * sums[-1], "right")
        chosen = unit[np.minimum(drawn, len(z) - 1)]
        apart = np.maximum(2 - 2 * (unit @ chosen.T), 0) * (length > 0) + (length == 0)
        apart = np.minimum(near[:, None], apart) if k else apart
        best = apart.sum(0).argmin()
        centroids[k], near = chosen[best], apart[:, best]
    for _ in range(_LLOYD):
        label = _nearest_centroid(unit, centroids)
        count = np.bincount(label, minlength=nclust)
        own = sp.csr_matrix((np.ones(len(z), z.dtype), label, np.arange(len(z) + 1)), shape=(len(z), nclust))
        moved = np.where(count[:, None] > 0, (own.T @ unit) / np.maximum(count, 1)[:, None], centroids)
        change = np.linalg.norm(moved - centroids)
        centroids = moved.astype(z.dtype)
        if change < _STILL:
            break
    return _nearest_centroid(unit, centroids)


def _nearest_centroid(unit: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    half = (centroids**2).sum(1) / 2
    parts = [
        np.argmax(unit[i : i + _ROWS] @ centroids.T - half, axis=1).astype(np.int32) for i in range(0, len(unit), _ROWS)
    ]
    return np.concatenate(parts)
