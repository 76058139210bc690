"""What is known of cells and their neighbours: their types, and by pair what they send, bear and are surrounded by."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core.counts import Matrix, dense, take_columns
from scdiffx._core.graph import Graph
from scdiffx.ops._communication_models import Blocks
from scdiffx.ops._communication_test import Signals

__all__ = ["Columns", "Features", "Seen", "features_of", "seen"]

_STATE = 30  # components of ligands and receptors that stand for a cell's own state in the test
_MOST_TYPES = 100  # pairs of types, above which there is no feature for each


class Features(NamedTuple):
    """Of a cell's `own`, of the types `near`, by pair what it sent and is borne by it, and the ligands `around`."""

    own: Float[Array, "cells own"]
    near: Float[Array, "cells near"]
    sent: Float[Array, "cells pairs"]
    borne: Float[Array, "cells pairs"]
    around: Float[Array, "cells pairs"]

    def all(self) -> Float[Array, "cells features"]:
        return jnp.concatenate([self.own, self.near, self.around, self.borne * self.around], 1)


class Columns(NamedTuple):
    """Of the genes of all pairs, sorted, and of the members of their ligands and receptors."""

    genes: Int[Array | np.ndarray, " genes"]
    ligands: Int[Array | np.ndarray, "pairs members"]
    receptors: Int[Array | np.ndarray, "pairs members"]


def features_of(columns: Columns, groups: int, x: Matrix, graph: Graph, membership: Array | None) -> Features:
    """Of a complex as much is there as of its scarcest member; a cell without neighbours has nothing around it."""
    expressed = dense(take_columns(x, jnp.asarray(columns.genes)))
    places = (jnp.searchsorted(jnp.asarray(columns.genes), jnp.asarray(side)) for side in columns[1:])
    sent, borne = (functools.reduce(jnp.minimum, (expressed[:, m] for m in place.T)) for place in places)
    member = _member(membership, groups, expressed)
    degree = graph.row_sums()
    share = jnp.where(degree > 0, 1 / jnp.where(degree > 0, degree, 1), 0)[:, None]
    around, near = share * (graph @ sent), share * (graph @ member)
    if groups**2 <= _MOST_TYPES:
        near = (near[:, :, None] * member[:, None]).reshape(-1, groups**2)
    return Features(jnp.concatenate([member, expressed], 1), near, sent, borne, around)


def _member(membership: Array | None, groups: int, like: Array) -> Float[Array, "cells groups"]:
    if membership is None:
        return jnp.ones((like.shape[0], groups), like.dtype)
    if membership.ndim == 2:
        return membership.astype(like.dtype)
    return jax.nn.one_hot(membership, groups, dtype=like.dtype)


class Seen(NamedTuple):
    """Data on the host: features, signals, standardised targets `y` with their `mean` and `size`, and controls."""

    blocks: Blocks
    signals: Signals
    y: Float[np.ndarray, "cells targets"]
    mean: Float[np.ndarray, " targets"]
    size: Float[np.ndarray, " targets"]
    targets: np.ndarray
    controls: Float[np.ndarray, "cells controls"]
    member: Float[np.ndarray, "cells groups"]


_features = jax.jit(features_of, static_argnums=1)


def seen(
    columns: Columns,
    groups: int,
    targets: np.ndarray | None,
    x: Matrix,
    graph: Graph,
    membership: Any,
) -> Seen:
    f: Any = jax.tree.map(lambda a: np.asarray(a, np.float64), _features(columns, groups, x, graph, membership))
    if targets is None:
        targets = np.setdiff1d(np.arange(x.shape[1]), np.asarray(columns.genes))
    if not len(targets):
        raise ValueError("there are no genes besides ligands and receptors for neighbours to change")
    y = np.asarray(dense(take_columns(x, jnp.asarray(targets))), np.float32)
    mean, size = y.mean(0, dtype=np.float64), y.std(0, dtype=np.float64)
    size = np.where(size > 1e-6, size, np.inf)
    y = ((y - mean) / size).astype(np.float32)
    state = np.asarray(f.own[:, groups:])
    state = state - state.mean(0)
    state = state @ np.linalg.eigh(state.T @ state)[1][:, -_STATE:]
    controls = np.concatenate([np.asarray(f.own[:, :groups]), np.asarray(f.near), state], 1).astype(np.float32)
    walk = graph.to_scipy().astype(np.float32)
    degree = np.asarray(walk.sum(1)).ravel()
    walk.data /= np.repeat(np.where(degree > 0, degree, 1), np.diff(walk.indptr))
    sent, borne = (np.asarray(a, np.float32) for a in (f.sent, f.borne))
    blocks = Blocks(np.asarray(f.own), np.asarray(f.near), np.concatenate([f.around, f.borne * f.around], 1))
    member = np.asarray(f.own[:, :groups])
    return Seen(blocks, Signals(sent, borne, walk), y, mean, size, np.asarray(targets), controls, member)
