"""Integration of batches in an embedding by soft clusters and ridge regressions (Harmony)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scdiffx._core.fields import buffer, learnable, learnables, operator, replace, static
from scdiffx._core.random import as_seed
from scdiffx._core.runtime import one_blas_thread
from scdiffx.ops._harmony_start import directions, levels

__all__ = ["Harmony", "HarmonyGroups", "HarmonyResult", "HarmonySettings"]

# The objective is reported for so many cells.
_SCALE = 2000
# Cells of a level are taken together in runs of so many.
_RUN = 128
_MOST_CLUSTERS = 100
_CELLS_PER_CLUSTER = 30


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
    """The cells in blocks, in the order of their assignment, and again in runs of one level.

    Pads of the blocks have level -1; `place` is where the cells of a run are in the blocks, and past these for pads.
    Runs make the regressions' cost independent of the number of levels.
    """

    z: Float[Array, "blocks size dims"]
    level: Int[Array, "blocks size"]
    run_z: Float[Array, "runs length dims"]
    run_level: Int[Array, " runs"]
    place: Int[Array, "runs length"]


class _Model(NamedTuple):
    """What is the same in all rounds. The ridge penalty is `alpha` times the expected cells, plus `lamb`."""

    theta: Float[Array, " batches"]
    sigma: Float[Array, " clusters"]
    alpha: Array
    lamb: Float[Array, " batches"]
    size: Float[Array, "batches 1"]
    share: Float[Array, "batches 1"]
    members: Float[Array, "levels batches"]
    columns: Float[Array, "columns batches"]
    scale: Array


class _State(NamedTuple):
    """What a round changes."""

    corrected: Float[Array, "blocks size dims"]
    centroids: Float[Array, "clusters dims"]


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
    same start in the same order, so it is a fixed smooth function of embedding and parameters, and its derivative is
    exact. It takes the memory of a few assignments of all cells, and of one embedding for each round. ``rounds=0``
    leaves the test to each call, which then has no reverse derivative.
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
        seed = 0 if key is None else as_seed(key)
        rng = np.random.default_rng(seed)
        level, members, column = levels(batches)
        with one_blas_thread():
            start = directions(np.asarray(z), nclust, rng)
        parts = (start, rng.permutation(n).astype(np.int32), level, members, column)
        op = replace(self, groups=HarmonyGroups(*(jnp.asarray(a) for a in parts)), nclust=nclust)
        op._check(len(batches), len(column))
        if op.lamb is not None:
            op = replace(op, alpha=None)
        numbers = {name: jnp.asarray(getattr(op, name), z.dtype) for name in learnables(op)}
        op = replace(op, **numbers)
        if op.rounds is None:
            op = replace(op, rounds=int(_rounds(replace(op, rounds=0), z, *batches)))
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
        state = _State(cells.z, _unit(own.T @ _unit(z)))
        if self.rounds:
            again = jax.checkpoint(partial(_round, self.settings, cells, model))
            state, (first, last) = jax.lax.scan(lambda state, _: again(state), state, None, length=self.rounds)
            objective, rounds = jnp.concatenate([first[:1], last]), jnp.asarray(self.rounds)
        else:
            state, objective, rounds = _until_still(self.settings, cells, model, state)
        flat = state.corrected.reshape(-1, z.shape[1])[: z.shape[0]]
        corrected = jnp.zeros_like(z).at[g.order].set(flat, unique_indices=True)
        return HarmonyResult(corrected, state.centroids, objective, rounds)

    def _cells(self, z: Array, g: HarmonyGroups) -> _Cells:
        n, dims = z.shape
        blocks = min(math.ceil(1 / self.settings.block_size), n)
        size = -(-n // blocks)
        pad = blocks * size - n
        moved = jnp.pad(z[g.order], ((0, pad), (0, 0)))
        level = jnp.pad(g.level[g.order], (0, pad), constant_values=-1)
        run_level, place = _runs(level, n, g.members.shape[0])
        run_z = moved.at[place].get(mode="fill", fill_value=0)
        return _Cells(moved.reshape(blocks, size, dims), level.reshape(blocks, size), run_z, run_level, place)

    def _model(self, z: Array, g: HarmonyGroups, columns: int) -> _Model:
        members = g.members.astype(z.dtype)
        size = members.T @ jnp.zeros(members.shape[0], z.dtype).at[g.level].add(1)
        return _Model(
            theta=_for_each(self.theta, g.column, z.dtype),
            sigma=jnp.broadcast_to(jnp.asarray(self.sigma, z.dtype), (self.nclust or 0,)),
            alpha=jnp.asarray(0 if self.alpha is None else self.alpha, z.dtype),
            lamb=_for_each(0 if self.lamb is None else self.lamb, g.column, z.dtype),
            size=size[:, None],
            share=(size / z.shape[0])[:, None],
            members=members,
            columns=jax.nn.one_hot(g.column, columns, dtype=z.dtype).T,
            scale=jnp.asarray(_SCALE / z.shape[0], z.dtype),
        )


@partial(jax.jit, static_argnums=(1, 2), inline=True)
def _runs(level: Int[Array, " padded"], n: int, levels: int) -> tuple[Int[Array, " runs"], Int[Array, "runs length"]]:
    """The level of each run, past the last where there is none, and the places of its cells."""
    order = jnp.argsort(level)
    count = jnp.zeros(levels, jnp.int32).at[level].add(jnp.where(level < 0, 0, 1))
    start = len(level) - n + jnp.cumsum(count) - count
    runs = -(-count // _RUN)
    last = jnp.cumsum(runs)
    slot = jnp.arange(-(-n // _RUN) + levels)
    run_level = jnp.searchsorted(last, slot, side="right")
    own = jnp.minimum(run_level, levels - 1)
    row = (slot - (last - runs)[own])[:, None] * _RUN + jnp.arange(_RUN)
    there = (run_level < levels)[:, None] & (row < count[own][:, None])
    place = order[jnp.where(there, start[own][:, None] + row, 0)]
    # Pads differ, so that no two places are the same.
    return run_level, jnp.where(there, place, len(level) + jnp.arange(place.size).reshape(place.shape))


@jax.jit
def _rounds(op: Harmony, *args: Array) -> Array:
    return op(*args).rounds


def _until_still(
    settings: HarmonySettings, cells: _Cells, model: _Model, state: _State
) -> tuple[_State, Float[Array, " rounds_plus_1"], Array]:
    """Rounds until the objective hardly falls, or rises."""
    most = settings.max_iter_harmony

    def unfinished(carry: tuple[_State, Array, Array]) -> Array:
        _, objective, i = carry
        old, new = objective[i - 1], objective[i]
        still = (old - new) / jnp.abs(old) < settings.epsilon_harmony
        return (i < most) & ((i == 0) | ~still)

    def step(carry: tuple[_State, Array, Array]) -> tuple[_State, Array, Array]:
        state, objective, i = carry
        state, (first, last) = _round(settings, cells, model, state)
        objective = objective.at[0].set(jnp.where(i == 0, first, objective[0])).at[i + 1].set(last)
        return state, objective, i + 1

    objective = jnp.full(most + 1, jnp.nan, cells.z.dtype)
    return jax.lax.while_loop(unfinished, step, (state, objective, jnp.asarray(0)))


def _round(
    settings: HarmonySettings, cells: _Cells, model: _Model, state: _State
) -> tuple[_State, tuple[Array, Array]]:
    """One round of clustering and correction, and the objective before and after the clustering.

    A block's assignments are a function of what the other blocks have put into each cluster: only these totals matter
    from pass to pass, and the assignments of the last pass for the correction.
    """
    (levels, _), clusters = model.members.shape, len(state.centroids)
    unit = _unit(state.corrected)

    def assign(carry: tuple[Array, Array], block: tuple[Array, Array, Array]) -> tuple[Any, tuple[Array, ...]]:
        """Take a block out of the totals, assign its cells by what is left, and put it back."""
        total, weight = carry
        unit, level, old = block
        rest = total - old
        belongs = jax.nn.one_hot(level, levels, dtype=unit.dtype)
        distance = 2 * (1 - unit @ state.centroids.T)
        penalty = belongs @ (model.members @ (weight * _log_penalty(model, rest)))
        odds = penalty - distance / model.sigma
        odds = odds - jax.lax.stop_gradient(odds.max(1, keepdims=True))
        # One exponential for both, where softmax and log_softmax would take three.
        p = jnp.exp(odds)
        whole = p.sum(1, keepdims=True)
        p, log_p = p / whole, odds - jnp.log(whole)
        energy = (p * (distance + model.sigma * log_p)).sum(1) @ belongs.sum(1)
        new = belongs.T @ p
        return (rest + new, weight), (new, p, energy)

    @jax.checkpoint
    def one_pass(carry: tuple[Array, Array, Array], weight: Array) -> tuple[tuple[Array, Array, Array], Array]:
        total, old, _ = carry
        (total, _), (new, p, energy) = jax.lax.scan(assign, (total, weight), (unit, cells.level, old))
        return (total, new, p), energy.sum() + _diversity(model, total)

    # The first pass is without a penalty, as nothing is assigned yet.
    dtype, blocks = unit.dtype, len(unit)
    empty = jnp.zeros((levels, clusters), dtype)
    carry = (empty, jnp.zeros((blocks, levels, clusters), dtype), jnp.zeros((*cells.level.shape, clusters), dtype))
    weights = jnp.ones(settings.max_iter_kmeans + 1, dtype).at[0].set(0)
    (total, _, p), objective = jax.lax.scan(one_pass, carry, weights)
    state = _corrected(settings.batch_prop_cutoff, cells, model, total, p, state.centroids)
    return state, (objective[0] * model.scale, objective[-1] * model.scale)


def _corrected(cutoff: float, cells: _Cells, model: _Model, total: Array, p: Array, centroids: Array) -> _State:
    """The original cells less what the batches explain in each cluster, and the intercepts."""
    levels, shape = len(total), cells.z.shape
    by_run = p.reshape(-1, p.shape[-1]).at[cells.place].get(mode="fill", fill_value=0)
    sums = jax.ops.segment_sum(
        jnp.einsum("rck,rcd->rkd", by_run, cells.run_z), cells.run_level, levels, indices_are_sorted=True
    )
    shift, centroids = _ridge(cutoff, model, total, sums, centroids)
    own = shift.at[cells.run_level].get(mode="fill", fill_value=0)
    moved = cells.run_z - jnp.einsum("rck,rkd->rcd", by_run, own)
    flat = jnp.zeros((shape[0] * shape[1], shape[2]), p.dtype)
    flat = flat.at[cells.place].set(moved, mode="drop", unique_indices=True)
    return _State(flat.reshape(shape), centroids)


def _ridge(
    cutoff: float, model: _Model, total: Array, sums: Float[Array, "levels clusters dims"], centroids: Array
) -> tuple[Float[Array, "levels clusters dims"], Float[Array, "clusters dims"]]:
    """For each cluster: what its batches add to the cells of each level, and the intercept's direction."""
    dtype = total.dtype
    observed = (model.members.T @ total).T
    keep = jax.lax.stop_gradient(observed) / model.size.T > cutoff
    # A column of which one batch is left in a cluster says nothing there.
    several = (keep.astype(dtype) @ model.columns.T) > 1
    keep = (keep & (several.astype(dtype) @ model.columns > 0)).astype(dtype)
    alive = keep.sum(1) > 0
    used = (keep @ model.members.T > 0).astype(dtype)
    expected = (model.share * total.sum(0)).T
    penalty = model.alpha * expected + model.lamb
    mass, sums = total.T * used, sums.transpose(1, 0, 2) * used[:, :, None]
    if len(model.columns) == 1:
        weight, intercept = _one_column(mass, penalty, sums, keep, alive)
    else:
        weight, intercept = _several_columns(model, mass, penalty, sums, keep, alive)
    centroids = jnp.where(alive[:, None], _unit(intercept), centroids)
    return jnp.einsum("jb,kbd->jkd", model.members, weight), centroids


def _one_column(
    mass: Array, penalty: Array, sums: Array, keep: Array, alive: Array
) -> tuple[Float[Array, "clusters batches dims"], Float[Array, "clusters dims"]]:
    """Ridge coefficients and intercepts for one column of batches, whose levels are the batches."""
    # An empty cluster has neither mass nor penalty.
    inverse = keep / jnp.where(keep > 0, mass + penalty, 1)
    shrink = penalty * inverse
    whole = jnp.where(alive, (shrink * mass).sum(1), 1)
    intercept = (shrink[:, :, None] * sums).sum(1) / whole[:, None]
    residual = sums - mass[:, :, None] * intercept[:, None, :]
    return residual * inverse[:, :, None], intercept


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


def _for_each(value: float | Array, column: Array, dtype: np.dtype) -> Float[Array, " batches"]:
    """A number for each batch, from one for all, for each column or for each batch."""
    value = jnp.asarray(value, dtype)
    if value.ndim and value.shape != column.shape:
        return value[column]
    return jnp.broadcast_to(value, column.shape)
