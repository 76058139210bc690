"""Which ligands of their neighbours change cells: programs of receivers regressed on ligands times receptors."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core.counts import Matrix, matmul
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.graph import Graph
from scdiffx._core.random import as_seed
from scdiffx._core.runtime import one_blas_thread
from scdiffx.ops._communication_features import Columns, Seen, features_of, seen
from scdiffx.ops._communication_fit import CommunicationFit, CommunicationSettings, fit_all, folds, message
from scdiffx.ops._communication_net import Net, change
from scdiffx.ops._communication_test import CommunicationTest, permutation_test

__all__ = ["Communication", "CommunicationResult"]

_FEWEST_CELLS = 50


class CommunicationResult(NamedTuple):
    """`programs` of the receivers, as they are and as `predicted`; `effect`: what of the prediction neighbours add."""

    programs: Float[Array, "cells programs"]
    predicted: Float[Array, "cells programs"]
    effect: Float[Array, "cells programs"]


@operator
class Communication:
    """Regression of receivers' programs on what their neighbours send, by pairs of a ligand and a receptor.

    The feature of a pair is the receptor of a cell times the mean of the ligand over its neighbours (mass action; a
    complex has as much as its scarcest member). `ligands` and `receptors` are columns (pairs, members), `targets` the
    columns of which programs are made, None for all others. Programs are the directions of standardised target
    expression that change most with the pairs' features. They are predicted by ridge regression on a cell's own type,
    ligands and receptors, the types around it, the ligands around it, and the pairs. With `settings.attention` a
    network (GATv2, experimental) adds to this what it finds in the same neighbours; its edges carry the products.

    :meth:`test` asks of each pair whether genes change with it beyond what its ligand does to all cells.
    """

    net: Net | None = learnable(default=None)
    ligands: Int[Array, "pairs members"] | np.ndarray | None = buffer()
    receptors: Int[Array, "pairs members"] | np.ndarray | None = buffer()
    targets: Int[Array, " genes"] | np.ndarray | None = buffer(default=None)
    genes: Int[Array, " genes"] | np.ndarray | None = buffer(default=None)
    fit: CommunicationFit | None = buffer(default=None)
    n_groups: int | None = static(default=None)
    settings: CommunicationSettings = static(default=CommunicationSettings())

    def init(
        self,
        x: Matrix,
        graph: Graph,
        membership: Int[Array, " cells"] | Float[Array, "cells groups"] | None = None,
        key: Array | None = None,
    ) -> Communication:
        """Find programs, fit the models, and compare them in held-out cells."""
        if self.fit is not None:
            return self
        if x.shape[0] < _FEWEST_CELLS:
            raise ValueError(f"communication needs at least {_FEWEST_CELLS} cells, got {x.shape[0]}")
        op = self._started(membership)
        with one_blas_thread():
            found = op._seen(x, graph, membership)
            fit, net = fit_all(self.settings, x.shape[1], found, graph, 0 if key is None else as_seed(key))
        # Positions stay positions.
        fit, net = jax.tree.map(lambda a: jnp.asarray(a, None if a.dtype.kind == "i" else x.dtype), (fit, net))
        return replace(op, fit=fit, net=net)

    def __call__(
        self,
        x: Matrix,
        graph: Graph,
        membership: Int[Array, " cells"] | Float[Array, "cells groups"] | None = None,
    ) -> CommunicationResult:
        if self.fit is None:
            raise ValueError("Communication needs its programs: call `op = op.init(x, graph, membership)` first")
        # Plans store what operators hold in their own precision.
        f: CommunicationFit = jax.tree.map(
            lambda a: jnp.asarray(a, x.dtype if jnp.issubdtype(a.dtype, jnp.floating) else None), self.fit
        )
        found = features_of(self._columns(), self.n_groups or 1, x, graph, membership)
        features = (found.all() - f.centre) / f.scale
        q = found.own.shape[1]
        alone = features[:, :q] @ f.coefficients[:q] + f.intercept
        effect = features[:, q:] @ f.coefficients[q:]
        if self.net is not None:
            net = jax.tree.map(lambda a: jnp.asarray(a, x.dtype), self.net)
            read = message(f, features, found.sent, found.borne)
            effect = effect + change(net, graph.pattern, read, graph.values != 0)
        return CommunicationResult(matmul(x, jnp.asarray(f.axes)) - f.shift, alone + effect, effect)

    def test(
        self,
        x: Matrix,
        graph: Graph,
        membership: Int[Array, " cells"] | Float[Array, "cells groups"] | None = None,
        *,
        strata: np.ndarray | None = None,
        n_perms: int = 200,
        seed: int = 0,
    ) -> CommunicationTest:
        """Compare what genes change with each pair with the same after senders change places, on the host.

        Cells exchange all their ligands with others of the same group, within each of `strata` alone where these are
        given; receivers and places stay.
        """
        with one_blas_thread():
            found = self._started(membership)._seen(x, graph, membership)
        group = found.member.argmax(1)
        where = np.zeros(len(group), int) if strata is None else np.asarray(strata)
        return permutation_test(
            found.signals,
            found.y,
            found.controls,
            where * found.member.shape[1] + group,
            folds(graph, self.settings.n_folds, seed),
            n_perms=n_perms,
            seed=seed,
        )

    def _columns(self) -> Columns:
        if self.genes is None or self.ligands is None or self.receptors is None:
            raise ValueError("Communication needs its programs: call `op = op.init(x, graph, membership)` first")
        return Columns(self.genes, self.ligands, self.receptors)

    def _started(self, membership: Any) -> Communication:
        """With all columns of ligands and receptors, and the number of groups."""
        if self.ligands is None or self.receptors is None:
            raise ValueError("Communication needs the columns of ligands and receptors")
        sides = np.asarray(self.ligands), np.asarray(self.receptors)
        if sides[0].ndim != 2 or sides[1].ndim != 2 or len(sides[0]) != len(sides[1]):
            raise ValueError(f"ligands {sides[0].shape} and receptors {sides[1].shape} must be (pairs, members)")
        op = replace(self, genes=np.unique(np.concatenate([side.ravel() for side in sides])).astype(np.int32))
        if op.n_groups is not None:
            return op
        if membership is None:
            return replace(op, n_groups=1)
        return replace(op, n_groups=int(membership.shape[1] if membership.ndim == 2 else membership.max() + 1))

    def _seen(self, x: Matrix, graph: Graph, membership: Any) -> Seen:
        targets = None if self.targets is None else np.asarray(self.targets)
        return seen(self._columns(), self.n_groups or 1, targets, x, graph, membership)
