"""Ligand-receptor interactions: how strongly pairs of cell groups express both sides, far or near."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core.counts import Counts, Matrix, transposed_product
from scdiffx._core.fields import buffer, operator, replace, static
from scdiffx._core.graph import Graph
from scdiffx.ops._ligrec_permutations import LigRecTest, permutation_test

__all__ = ["COMPLEX_POLICIES", "SHUFFLES", "LigRec", "LigRecResult", "LigRecTest"]

COMPLEX_POLICIES = ("min", "group_min")
SHUFFLES = ("all", "group")


class LigRecResult(NamedTuple):
    """Means of the interactions for each pair of a sending and a receiving group.

    `ligand` is the mean among the senders, `receptor` among the receivers, `mean` the half of their sum, and 0 where
    one side is not expressed.
    """

    mean: Float[Array, "interactions senders receivers"]
    ligand: Float[Array, "interactions senders receivers"]
    receptor: Float[Array, "interactions senders receivers"]


@operator
class LigRec:
    """The mean expression of ligands in one group of cells and receptors in another (CellPhoneDB, Efremova 2020).

    `ligands` and `receptors` hold the columns of the members of a complex; rows of fewer members repeat one of them. A
    complex is as abundant as its scarcest member: with `complex_policy` "min" the one with the least mean over all
    cells (squidpy), with "group_min" the one with the least mean in each group (CellPhoneDB).

    Groups are codes (cells,), -1 for none, or columns of a soft `membership` (cells, groups), which weighs the cells.
    With a `graph` of neighbours a cell counts in a group for every edge, in either direction, to a cell of the other
    group, by the weight of the edge: means are over pairs of neighbours. In a graph of all pairs they are those without
    a graph. Everything is differentiable in expression, memberships and weights. :meth:`test` compares with shuffled
    cells.
    """

    ligands: Int[Array, "interactions members"] | np.ndarray | None = buffer()
    receptors: Int[Array, "interactions members"] | np.ndarray | None = buffer()
    n_groups: int | None = static(default=None)
    complex_policy: str = static(default="min")

    def init(self, x: Matrix, membership: Array, graph: Graph | None = None, key: Array | None = None) -> LigRec:
        """Count the groups, where `n_groups` does not say how many there are."""
        if self.complex_policy not in COMPLEX_POLICIES:
            raise ValueError(f"complex_policy={self.complex_policy!r} is unknown. Available: {list(COMPLEX_POLICIES)}")
        sides = self._sides()
        if sides[0].ndim != 2 or sides[0].shape[0] != sides[1].shape[0] or sides[1].ndim != 2:
            raise ValueError(
                f"ligands {sides[0].shape} and receptors {sides[1].shape} must be of shape (interactions, members)"
            )
        if membership.ndim == 2:
            return replace(self, n_groups=int(membership.shape[1]))
        return self if self.n_groups is not None else replace(self, n_groups=int(membership.max()) + 1)

    def __call__(
        self,
        x: Matrix,
        membership: Int[Array, " cells"] | Float[Array, "cells groups"],
        graph: Graph | None = None,
    ) -> LigRecResult:
        ligands, receptors = self._sides()
        member = self._member(membership, x.dtype)
        means = _group_means(x, member, graph)
        if self.complex_policy == "min":
            overall = transposed_product(x, member.sum(1, keepdims=True))[:, 0]
            ligands, receptors = (_scarcest(overall, side) for side in (ligands, receptors))
        ligand, receptor = means[ligands].min(1), means[receptors].min(1)
        # Rows of `receptor` are receivers, its columns, where means depend on both groups, senders.
        ligand, receptor = (
            (ligand[:, :, None], receptor[:, None]) if graph is None else (ligand, receptor.swapaxes(1, 2))
        )
        shape = (*ligand.shape[:2], receptor.shape[2])
        ligand, receptor = jnp.broadcast_to(ligand, shape), jnp.broadcast_to(receptor, shape)
        expressed = (ligand > 0) & (receptor > 0)
        return LigRecResult(jnp.where(expressed, (ligand + receptor) / 2, 0), ligand, receptor)

    def test(
        self,
        x: Matrix,
        membership: Int[Array, " cells"] | Float[Array, "cells groups"],
        graph: Graph | None = None,
        *,
        strata: np.ndarray | None = None,
        shuffle: str = "all",
        n_perms: int = 1000,
        threshold: float = 0.01,
        seed: int = 0,
    ) -> LigRecTest:
        """Compare the means with those of shuffled cells, on the host.

        The expression of whole cells changes hands, within each of `strata` alone where these are given; labels and
        the graph stay. With `shuffle` "all" any two cells can change, with "group" those with one label (a code): means
        near another group are compared with those of the group itself.

        Tested are pairs of groups of which both express their side: a mean above 0, and at least `threshold` of the
        cells (by their weights), of every member of a complex with "group_min".
        """
        member = np.asarray(membership)
        if shuffle not in SHUFFLES:
            raise ValueError(f"shuffle={shuffle!r} is unknown. Available: {list(SHUFFLES)}")
        if shuffle == "group" and (graph is None or member.ndim == 2):
            raise ValueError("shuffle='group' needs a graph of neighbours, and groups that are codes")
        strata = np.zeros(len(member), int) if strata is None else np.asarray(strata)
        if shuffle == "group":
            strata = strata * self._counted() + member
        if member.ndim == 1:
            member = member[:, None] == np.arange(self._counted())
        ligands, receptors = self._sides()
        return permutation_test(
            x.to_scipy() if isinstance(x, Counts) else np.asarray(x),
            member.astype(np.float64),
            None if graph is None else graph.to_scipy(),
            (np.asarray(ligands), np.asarray(receptors)),
            by_group=self.complex_policy == "group_min",
            strata=strata,
            n_perms=n_perms,
            threshold=threshold,
            seed=seed,
        )

    def _sides(self) -> tuple[Any, Any]:
        if self.ligands is None or self.receptors is None:
            raise ValueError("LigRec needs the columns of ligands and receptors")
        return self.ligands, self.receptors

    def _member(self, membership: Array, dtype: Any) -> Float[Array, "cells groups"]:
        if membership.ndim == 2:
            return membership.astype(dtype)
        return jax.nn.one_hot(membership, self._counted(), dtype=dtype)

    def _counted(self) -> int:
        if self.n_groups is None:
            raise ValueError("LigRec needs the number of groups: call `op = op.init(x, membership)` first")
        return self.n_groups


def _group_means(x: Matrix, member: Float[Array, "cells groups"], graph: Graph | None) -> Array:
    """Means of the genes in the groups; with a graph (genes, groups, groups): in the first beside the second."""

    def means(weight: Float[Array, "cells groups"]) -> Float[Array, "genes groups"]:
        total = weight.sum(0)
        return transposed_product(x, weight) / jnp.where(total > 0, total, 1)

    if graph is None:
        return means(member)
    near = (graph @ member + graph.T @ member) / 2
    found = jax.lax.map(jax.checkpoint(lambda own: means(own[:, None] * near)), member.T)
    return jnp.moveaxis(found, 0, 1)


def _scarcest(overall: Float[Array, " genes"], side: Array) -> Int[Array, "interactions 1"]:
    chosen = jnp.argmin(overall[side], axis=1)
    return jnp.take_along_axis(jnp.asarray(side), chosen[:, None], axis=1)
