"""Fates: where random walks on the cell graph, directed by pseudotime, end."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scdiffx._core.chain import absorption, on_diagonal, row_normalized
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.graph import Graph, columns_to_slots, rows_to_slots
from scdiffx._core.precision import in_double
from scdiffx.ops._diffusion import counted

__all__ = ["PRIMINGS", "SCHEMES", "FateProbabilities", "FateProbabilitiesResult"]

SCHEMES = ("hard", "soft")
PRIMINGS = ("kl_divergence", "entropy")
# CellRank never keeps more than so many neighbours for being close.
_MOST_CLOSE = 30


class FateProbabilitiesResult(NamedTuple):
    """Fates of cells.

    `probabilities` (cells, fates): the chance to end in each fate, given that the walk ends in one; rows sum to 1, or
    are NaN where no fate can be reached. `priming` (cells,): how far these are from those of all cells, in [0, 1].
    `absorbed` (cells,): the chance to end in any fate. `reaches` (cells, fates): whether a fate can be reached.
    """

    probabilities: Float[Array, "cells fates"]
    priming: Float[Array, " cells"]
    absorbed: Float[Array, " cells"]
    reaches: Bool[Array, "cells fates"]
    converged: Bool[Array, ""]


@operator
class FateProbabilities:
    """Absorption probabilities of a Markov chain on the graph (as in CellRank 2, Weiler et al. 2024).

    The walk steps in proportion to the weights of the graph, which `scheme` directs along pseudotime: ``"soft"`` scales
    weights towards a cell that is earlier by dt to ``2 / (1 + exp(b dt))^(1 / nu)`` (Stassen et al. 2021; for `nu`
    other than 1 it jumps at 0, and the derivative is that of either side), ``"hard"`` removes them except for the
    `frac_to_keep` strongest of each cell (Setty et al. 2019), and with None the weights are taken as they are: for
    undirected walks, or transition matrices from elsewhere. It ends in terminal cells, numbered by fate from 0 and -1
    elsewhere. Cells without finite pseudotime have no direction.

    With `weights`, steps to cell j are ``weights[j]`` times as likely: none to a cell of weight 0 (below 1e-6), so
    that the others' fates are those of the graph without it, and its own are where it would go.

    Examples
    --------
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> z = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    >>> near = sd.ops.Neighbors(n_neighbors=8)
    >>> graph = near.init(z)(z).connectivities
    >>> ends = np.full(60, -1)
    >>> ends[[5, 9]] = 0, 1  # one terminal cell for each of two fates
    >>> op = sd.ops.FateProbabilities(scheme=None, b=None, nu=None).init(graph, ends)
    >>> op(graph, ends).probabilities.shape
    (60, 2)
    """

    b: float | Array | None = learnable(default=10.0, constraint="positive")
    nu: float | Array | None = learnable(default=0.5, constraint="positive")
    close: Array | None = buffer(default=None, structure=True)
    scheme: str | None = static(default="soft")
    frac_to_keep: float = static(default=0.3)
    priming: str = static(default="kl_divergence")
    n_fates: int | None = static(default=None)

    def init(
        self,
        graph: Graph,
        terminal: Int[Array, " cells"],
        pseudotime: Float[Array, " cells"] | None = None,
        weights: Float[Array, " cells"] | None = None,
        key: Array | None = None,
    ) -> FateProbabilities:
        op = replace(self, b=None, nu=None)
        if self.scheme == "soft":
            # Arrays of the graph's type: a fit that moves them compiles nothing anew.
            op = replace(self, b=jnp.asarray(self.b, graph.dtype), nu=jnp.asarray(self.nu, graph.dtype))
        if self.scheme == "hard":
            op = replace(op, close=jnp.asarray(_closest(_weighted(graph, weights), self.frac_to_keep)))
        return replace(op, n_fates=int(np.asarray(terminal).max()) + 1)

    def transitions(
        self,
        graph: Graph,
        pseudotime: Float[Array, " cells"] | None = None,
        weights: Float[Array, " cells"] | None = None,
    ) -> Graph:
        """The transition matrix: rows sum to 1, or are empty."""
        graph = _weighted(graph, weights)
        if self.scheme is None:
            return row_normalized(graph)
        if pseudotime is None:
            raise ValueError(f"scheme={self.scheme!r} needs pseudotime")
        p = graph.pattern
        finite = jnp.isfinite(pseudotime)
        time = jnp.where(finite, pseudotime, 0)
        known = (rows_to_slots(p, finite.astype(time.dtype)) * columns_to_slots(p, finite.astype(time.dtype))) > 0
        back = jnp.where(known, rows_to_slots(p, time) - columns_to_slots(p, time), 0)
        if self.scheme == "soft":
            if self.b is None or self.nu is None:
                raise ValueError("scheme='soft' needs numbers for b and nu")
            # 2 / (1 + exp(b dt))^(1 / nu) without overflow
            weight = 2 * jnp.exp(-jax.nn.softplus(jnp.where(back > 0, self.b * back, 0)) / self.nu)
            weight = jnp.where(back > 0, weight, 1)
        else:
            if self.close is None:
                raise ValueError("FateProbabilities needs the closest cells: call `op = op.init(...)` first")
            weight = (back <= 0) | self.close
        return row_normalized(graph.with_values((graph.values * weight).astype(graph.dtype)))

    def __call__(
        self,
        graph: Graph,
        terminal: Int[Array, " cells"],
        pseudotime: Float[Array, " cells"] | None = None,
        weights: Float[Array, " cells"] | None = None,
    ) -> FateProbabilitiesResult:
        if self.n_fates is None:
            raise ValueError("FateProbabilities needs the number of fates: call `op = op.init(...)` first")
        # Walks that are held for long make the derivative a sum of huge terms that cancel.
        return _fates(self, graph, terminal, pseudotime, weights)


def _weighted(graph: Graph, weights: Array | None) -> Graph:
    """Edges times the weights of the cells that they lead to."""
    if weights is None:
        return graph
    return graph.with_values(graph.values * columns_to_slots(graph.pattern, counted(weights)))


@in_double
def _fates(
    op: FateProbabilities, graph: Graph, terminal: Array, pseudotime: Array | None, weights: Array | None
) -> FateProbabilitiesResult:
    # Steps that stay change no fate, but hold walks so long that the system would be hard to solve.
    moving = graph.with_values(jnp.where(on_diagonal(graph.pattern), 0, graph.values))
    found = absorption(op.transitions(moving, pseudotime, weights), terminal, op.n_fates)
    defined = found.reaches.any(1)
    # Rounding leaves tiny negative numbers where the chance is tiny.
    chance = jnp.where(found.reaches, jnp.maximum(found.probabilities, 0), 0)
    absorbed = chance.sum(1)
    share = chance / jnp.where(absorbed > 0, absorbed, 1)[:, None]
    priming = _priming(share, defined, op.priming, weights)
    return FateProbabilitiesResult(
        jnp.where(defined[:, None], share, jnp.nan),
        jnp.where(defined, priming, jnp.nan),
        absorbed,
        found.reaches,
        found.converged,
    )


def _closest(graph: Graph, fraction: float) -> np.ndarray:
    """Which slots hold the strongest edges of their cell; of equal ones the later, as in CellRank."""
    p, values = graph.pattern, np.asarray(graph.values)
    columns = np.asarray(p.indices)
    rows = np.broadcast_to(p.row_of_slot()[:, None], columns.shape)
    slots = np.flatnonzero((np.asarray(p.valid) & (values != 0)).ravel())
    rows, columns, values = rows.ravel()[slots], columns.ravel()[slots], values.ravel()[slots]
    order = np.lexsort((columns, values, rows))
    degree = np.bincount(rows, minlength=p.n_cells)
    last = np.cumsum(degree)[rows[order]] - 1
    most = np.minimum(np.floor(degree * fraction), _MOST_CLOSE)[rows[order]]
    close = np.zeros(p.indices.shape, bool)
    close.reshape(-1)[slots[order]] = last - np.arange(len(order)) < most
    return close


def _priming(share: Array, defined: Array, method: str, weights: Array | None) -> Array:
    """Divergence from the average fate, or the lack of entropy, brought to [0, 1] over the cells that count."""
    seen = defined[:, None].astype(share.dtype)
    if weights is None:
        mean = (share * seen).sum(0) / jnp.maximum(seen.sum(), 1)
    else:
        defined = defined & (counted(weights) > 0)
        seen = seen * counted(weights)[:, None]
        mean = (share * seen).sum(0) / jnp.where(seen.sum() > 0, seen.sum(), 1)
    possible = share > 0
    reference = mean if method == "kl_divergence" else jnp.ones_like(mean)
    ratio = jnp.where(possible, share / jnp.where(reference > 0, reference, 1), 1)
    raw = (share * jnp.log(ratio)).sum(1)
    low, high = jnp.where(defined, raw, jnp.inf).min(), jnp.where(defined, raw, -jnp.inf).max()
    scaled = jnp.where(high > low, (raw - low) / jnp.where(high > low, high - low, 1), 0)
    return scaled if weights is None else jnp.clip(scaled, 0, 1)
