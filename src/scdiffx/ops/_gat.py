"""A layer of graph attention, GATv2 (Brody, Alon, Yahav 2022), over a fixed pattern of edges."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from scdiffx._core.graph import Pattern, columns_to_slots, row_sums, rows_to_slots

__all__ = ["Attended", "attend", "initial_attention"]

_SLOPE = 0.2


class Attended(NamedTuple):
    """`value`: what each cell receives, by head. `weights`: of its edges; `own`: of itself; they sum to 1."""

    value: Float[Array, "cells heads dims"]
    weights: Float[Array, "rows width heads"]
    own: Float[Array, "cells heads"]


def attend(
    net: dict[str, Any],
    p: Pattern,
    x: Float[Array, "cells features"],
    edges: Float[Array, "rows width edge_features"] | None = None,
    present: Bool[Array, "rows width"] | None = None,
    heard: Bool[Array, " cells"] | None = None,
) -> Attended:
    """Each cell's mean over its neighbours and itself, by weights that depend on both ends and on the edge.

    The score of the edge from j to i is ``a . leaky_relu(x_i receive + x_j send + edge_ij via)``. `present` leaves
    edges out; a cell without neighbours receives itself. Cells that are not `heard` send nothing, not even to
    themselves; where nobody is heard 0 is received.
    """
    heads, dims = net["attend"].shape
    receive, send = ((x @ net[name]).reshape(-1, heads, dims) for name in ("receive", "send"))
    sent = columns_to_slots(p, send)
    joint = rows_to_slots(p, receive) + sent
    if edges is not None:
        joint = joint + (edges @ net["via"]).reshape(*edges.shape[:2], heads, dims)
    there = jnp.asarray(p.valid) if present is None else p.valid & present
    own = _scores(net, receive + send)
    if heard is not None:
        there, own = there & heard[p.indices], jnp.where(heard[:, None], own, -jnp.inf)
    score = jnp.where(there[..., None], _scores(net, joint), -jnp.inf)
    top = jax.lax.stop_gradient(_row_max(p, score, own))
    top = jnp.where(jnp.isfinite(top), top, 0)
    # A pad row belongs to no cell: its largest score is 0 here, and its weights are 0.
    weight, own = jnp.exp(score - rows_to_slots(p, top)), jnp.exp(own - top)
    total = row_sums(p, weight) + own
    total = jnp.where(total > 0, total, 1)
    weight, own = weight * rows_to_slots(p, 1 / total), own / total
    return Attended(row_sums(p, weight[..., None] * sent) + own[..., None] * send, weight, own)


def _scores(net: dict[str, Any], joint: Float[Array, "... heads dims"]) -> Float[Array, "... heads"]:
    return (jax.nn.leaky_relu(joint, _SLOPE) * net["attend"]).sum(-1)


def _row_max(p: Pattern, score: Array, own: Array) -> Array:
    most = score.max(1)
    return jnp.maximum(most[: p.n_cells].at[p.owner].max(most[p.n_cells :], mode="drop"), own)


def initial_attention(
    features: int, heads: int, dims: int, rng: np.random.Generator, edge_features: int = 0
) -> dict[str, np.ndarray]:
    """Weights before training: scores are small, so that a cell receives about the mean of its neighbourhood."""

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / math.sqrt(shape[0])).astype(np.float32)

    net = {"receive": normal(features, heads * dims), "send": normal(features, heads * dims)}
    net["attend"] = (0.1 * rng.standard_normal((heads, dims)) / math.sqrt(dims)).astype(np.float32)
    if edge_features:
        net["via"] = normal(edge_features, heads * dims)
    return net
