"""Terms that need no labels: hidden entries, cells measured twice, and how many genes are used."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from scdiffx._core.counts import Counts, row_sums, rows_to_values, values_at
from scdiffx._core.fields import buffer, operator, replace, static
from scdiffx._core.section import Section
from scdiffx.losses._groups import MOST_REFERENCES, nearest_others
from scdiffx.losses._terms import TINY, deviance_per_molecule, linear_rate, masked_mean, same_shape

__all__ = ["Budget", "MaskedReconstruction", "ReplicateConsistency"]

# Squared distances below this share of the near cells' are as good as 0.
_FLOOR = 0.01


@operator
class Budget:
    """See :func:`scdiffx.losses.budget`."""

    output: str = static()
    target: str | None = static(default=None)
    size: float = static(default=100.0)

    def __call__(self, value: Array, target: Any, keep: Any) -> Array:
        return jnp.square(jax.nn.relu(jnp.abs(value).sum() / self.size - 1))


@operator
class MaskedReconstruction:
    """See :func:`scdiffx.losses.masked_reconstruction`."""

    of_matrix: ClassVar[bool] = True
    output: str = static()
    target: str | None = static(default=None)
    scale: str = static(default="linear")
    background: float = static(default=0.01)

    def __call__(self, value: Float[Array, "cells genes"], target: Any, keep: Bool[Array, " cells"]) -> Array:
        same_shape(value, target, self.output)
        if not isinstance(target, Counts):
            raise TypeError(f"the layer {self.target!r} must be sparse: its stored entries say which are hidden")
        there = target.row < target.block_rows
        rate = linear_rate(values_at(target, value), self.scale)
        share = self._shares(target, jnp.where(there, rate, 0), keep)
        # The totals of the hidden entries of a cell are given, so that only their shares are judged.
        explained = row_sums(target.with_data(jax.scipy.special.xlogy(target.data, jnp.maximum(share, TINY))))
        own = row_sums(target.with_data(jax.scipy.special.xlogy(target.data, target.data)))
        return deviance_per_molecule(own, explained, row_sums(target), keep)

    def _shares(self, target: Counts, rate: Array, keep: Array) -> Array:
        """Of each hidden entry in those of its cell, mixed with the share that the gene's mean has in them."""

        def normed(values: Array) -> Array:
            total = row_sums(target.with_data(values))
            return values * rows_to_values(target, 1 / jnp.where(total > 0, total, 1))

        kept = rows_to_values(target, keep.astype(rate.dtype))
        genes = target.shape[1]
        sums = jnp.zeros(genes, rate.dtype).at[target.column].add(rate * kept, mode="drop")
        number = jnp.zeros(genes, rate.dtype).at[target.column].add(kept, mode="drop")
        mean = sums / jnp.maximum(number, 1)
        mean = mean + mean.mean() / genes + TINY
        there = target.row < target.block_rows
        typical = normed(jnp.where(there, mean.at[target.column].get(mode="fill", fill_value=0), 0))
        share = normed(rate)
        empty = rows_to_values(target, row_sums(target.with_data(rate)) <= 0)
        return jnp.where(empty, typical, (1 - self.background) * share + self.background * typical)


@operator
class ReplicateConsistency:
    """See :func:`scdiffx.losses.replicate_consistency`.

    `twin` (cells,): the other half of each cell, -1 without one. `others` (cells, 2 n_neighbors): near and random cells
    of the other half.
    """

    of_pairs: ClassVar[bool] = True
    twin: Array | None = buffer(default=None, structure=True)
    others: Array | None = buffer(default=None, structure=True)
    output: str = static()
    target: str | None = static(default="replicate_of")
    n_neighbors: int = static(default=15)

    def init(self, value: Array, target: Array, keep: Array, key: Array | None = None) -> ReplicateConsistency:
        if value.ndim != 2:
            raise ValueError(f"{self.output!r} has shape {value.shape}: an array (cells, dims) is needed")
        twin, first = _twins(np.asarray(target))
        z = np.asarray(value)
        others = np.zeros((len(twin), 2 * self.n_neighbors), np.int32)
        rng = np.random.default_rng(0)
        for half in (first, ~first):
            # Held-out cells meet the training cells, as a new cell would.
            among = np.flatnonzero(~half & (twin >= 0) & np.asarray(keep))
            if len(among) <= 2 * self.n_neighbors:
                raise ValueError(f"{self.target!r} pairs {len(among)} training cells; n_neighbors needs twice as many")
            if len(among) > MOST_REFERENCES:
                among = np.sort(rng.choice(among, MOST_REFERENCES, replace=False))
            here = np.flatnonzero(half)
            near = nearest_others(z, here, among, twin[here], self.n_neighbors)
            distant = among[rng.integers(0, len(among), (len(here), self.n_neighbors))]
            others[here] = np.concatenate([near, distant], 1)
        return replace(self, twin=jnp.asarray(twin, jnp.int32), others=jnp.asarray(others))

    def looked_at(self) -> np.ndarray:
        """The cells that each cell is compared with (cells, some); -1 for none."""
        return np.concatenate([np.asarray(self.others), np.asarray(self.twin)[:, None]], 1)

    def within(self, section: Section) -> ReplicateConsistency:
        """The term for a section's own cells; it takes values of all cells of the section."""
        twin, others = (section.places(np.asarray(lists)[section.own]) for lists in (self.twin, self.others))
        return replace(self, twin=twin, others=others)

    def __call__(self, value: Float[Array, "cells dims"], target: Array, keep: Bool[Array, " cells"]) -> Array:
        if self.twin is None or self.others is None:
            raise ValueError("ReplicateConsistency needs its pairs: call `term = term.init(value, target, keep)` first")
        # The cells that are judged are the first; those of a section that lie around them follow.
        own = value[: len(self.twin)]

        # Differences are made again in the derivative: kept, they would be dims times as large as the distances.
        @jax.checkpoint
        def squared(other: Array) -> Array:
            return ((own - value[other]) ** 2).sum(1)

        away = jax.lax.map(squared, self.others.T).T
        apart = squared(jnp.maximum(self.twin, 0))
        scale = _FLOOR * away[:, : self.n_neighbors].mean(1)
        positive = scale > 0
        scale = jnp.where(positive, scale, 1)
        # Where all are in one place every weight is 1.
        near = 1 / (1 + jnp.where(positive, apart / scale, 0))
        far = 1 / (1 + jnp.where(positive[:, None], away / scale[:, None], 0))
        # A random cell can be the twin: it is no alternative to itself.
        far = jnp.where(self.others == self.twin[:, None], 0, far)
        surprise = jnp.log1p(far.sum(1) / near) / np.log1p(2 * self.n_neighbors)
        return masked_mean(surprise, keep & (self.twin >= 0))


def _twins(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The other cell with the same code, where there are exactly two, and which cells come first of their two."""
    order = np.argsort(codes, kind="stable")
    ranked = codes[order]
    count = np.bincount(ranked[ranked >= 0], minlength=1)
    pair = (ranked >= 0) & (count[np.maximum(ranked, 0)] == 2)
    members = order[pair].reshape(-1, 2)
    twin, first = np.full(len(codes), -1), np.ones(len(codes), bool)
    twin[members] = members[:, ::-1]
    first[members[:, 1]] = False
    return twin, first
