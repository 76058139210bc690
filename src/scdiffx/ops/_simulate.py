"""Counts by Splatter's model: gene means, states, batches, library sizes, biological variation and dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float, Int

from scdiffx._core import counts as C
from scdiffx._core.fields import learnable, operator, replace
from scdiffx._core.minibatch import host_csr
from scdiffx.ops._simulate_estimates import estimated

__all__ = ["Simulate", "SimulateResult", "drawn_counts"]

_BLOCK_VALUES = 1 << 21
_LARGEST_SHAPE = 1e8  # of a gamma: a biological coefficient of variation of 1e-4


class SimulateResult(NamedTuple):
    """What the counts of each cell are drawn from.

    `library`: expected molecules (cells,). `expected`: the mean count given the library size (cells, genes). `bcv`: the
    biological coefficient of variation around it. `rate`: a draw from the gamma distribution with that mean and
    variation, of which the count is Poisson. `kept`: the probability that the count is not lost to dropout.
    """

    library: Float[Array, " cells"]
    expected: Float[Array, "cells genes"]
    bcv: Float[Array, "cells genes"]
    rate: Float[Array, "cells genes"]
    kept: Float[Array, "cells genes"]


class SimulateMoments(NamedTuple):
    """Mean, variance (with divisor n - 1) and share of zeros of each gene (genes,)."""

    mean: Float[Array, " genes"]
    variance: Float[Array, " genes"]
    zeros: Float[Array, " genes"]


@operator
class Simulate:
    """Splatter's model of counts (Zappia et al. 2017), up to the last draw: what each count is Poisson of.

    A cell's shares are ``mean * factor[state] * batch_factor[batch]``, normalised to sum 1, times a log-normal library
    size; rates are gamma about that with coefficient of variation ``bcv * (1 + bcv_trend / sqrt(expected))``; a count
    is lost with probability ``sigmoid(shape * (log(rate) - mid))``, with ``dropout = (mid, shape)``. Where Splatter has
    `bcv_common`, `bcv_trend` is its inverse and `bcv` carries the factor of each gene; None is 0.

    `state` are codes (cells,) of rows of `factor` (groups, or the steps of paths), or soft memberships (cells, states),
    which mix the rows. Library parameters are numbers or (batches, states). `init` estimates everything from counts.

    Noise is drawn from `key` and reparameterised: library sizes as location plus scale times noise; the gamma's shape
    implicitly (Figurnov et al. 2018), which is the derivative of what is drawn at a fixed level of probability and so
    unbiased for expectations, but not the slope of the sampler's own path for one key, which has jumps.
    """

    mean: Float[Array, " genes"] | None = learnable(default=None, constraint="positive")
    factor: Float[Array, "states genes"] | None = learnable(default=None, constraint="positive")
    batch_factor: Float[Array, "batches genes"] | None = learnable(default=None, constraint="positive")
    lib_loc: float | Array | None = learnable(default=None)
    lib_scale: float | Array | None = learnable(default=None, constraint="positive")
    bcv: Float[Array, " genes"] | None = learnable(default=None, constraint="positive")
    bcv_trend: float | Array | None = learnable(default=None, constraint="positive")
    dropout: Float[Array, " two"] | None = learnable(default=None)

    def init(
        self,
        x: C.Matrix,
        state: Int[Array, " cells"] | None = None,
        batch: Int[Array, " cells"] | None = None,
        *,
        dropout: bool = False,
        key: Array | None = None,
    ) -> Simulate:
        """Estimate what is None from counts, by moments; `dropout` asks for that too, and `key` is of no use."""
        csr = host_csr(x)
        codes = [None if c is None else np.asarray(c) for c in (state, batch)]
        found = estimated(csr, *codes, dropout=dropout)._asdict()
        del found["splatter"]
        missing = {name: value for name, value in found.items() if value is not None and getattr(self, name) is None}
        return replace(self, **{name: jnp.asarray(value, x.dtype) for name, value in missing.items()})

    def __call__(
        self,
        state: Int[Array, " cells"] | Float[Array, "cells states"],
        batch: Int[Array, " cells"] | None = None,
        key: Array | None = None,
    ) -> SimulateResult:
        def rates(library: Array, expected: Array, bcv: Array, key: Array, mask: Array) -> SimulateResult:
            # Without bounds the shape would overflow where a gene is hardly expressed or hardly varies.
            shape = jnp.clip(1 / bcv**2, 1 / _LARGEST_SHAPE, _LARGEST_SHAPE)
            rate = jax.random.gamma(key, shape) * expected / shape
            return SimulateResult(library, expected, bcv, rate, self._kept(rate))

        parts = self._by_block(rates, state, batch, key)
        return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:])[: state.shape[0]], parts)

    def moments(
        self,
        state: Int[Array, " cells"] | Float[Array, "cells states"],
        batch: Int[Array, " cells"] | None = None,
        key: Array | None = None,
    ) -> SimulateMoments:
        """Expected mean, variance and share of zeros of each gene over the cells, before dropout.

        Over the gamma and Poisson draws they are expectations, without noise; library sizes are drawn. The memory
        needed does not grow with cells times genes.
        """

        def sums(library: Array, expected: Array, bcv: Array, key: Array, mask: Array) -> Array:
            dispersion = bcv**2
            zero = jnp.exp(-jnp.log1p(dispersion * expected) / dispersion)
            second = expected + (1 + dispersion) * expected**2
            return jnp.stack([mask @ expected, mask @ second, mask @ zero])

        n = state.shape[0]
        mean, second, zero = self._by_block(sums, state, batch, key).sum(0) / n
        return SimulateMoments(mean, (second - mean**2) * n / max(n - 1, 1), zero)

    def _by_block(self, f: Callable[..., Any], state: Array, batch: Array | None, key: Array | None) -> Any:
        """``f(library, expected, bcv, key, mask)`` of blocks of cells, stacked; `mask` is 0 on pads."""
        if self.mean is None or self.lib_loc is None or self.lib_scale is None or self.bcv is None:
            raise ValueError("Simulate needs its parameters: call `op = op.init(x, state, batch)` first")
        if self.batch_factor is not None and batch is None:
            raise ValueError("the operator has batch factors: pass the `batch` of each cell")
        key = jax.random.key(0) if key is None else key
        n = state.shape[0]
        rows = min(C.BLOCK_ROWS, max(n, 1))
        blocks = -(-n // rows)
        noise = jax.random.normal(jax.random.fold_in(key, 0), (n,), jnp.asarray(self.mean).dtype)
        cells = (state, jnp.zeros(n, jnp.int32) if batch is None else batch, noise, jnp.ones_like(noise))
        padded = [jnp.pad(c, [(0, blocks * rows - n)] + [(0, 0)] * (c.ndim - 1)) for c in cells]
        parts = [c.reshape(blocks, rows, *c.shape[1:]) for c in padded]
        keys = jax.random.split(jax.random.fold_in(key, 1), blocks)
        body = jax.checkpoint(lambda part: f(*self._cells(*part[0][:3]), part[1], part[0][3]))
        return jax.lax.map(body, (parts, keys))

    def _cells(self, state: Array, batch: Array, noise: Array) -> tuple[Array, Array, Array]:
        """Library sizes, expected counts and the biological coefficient of variation."""
        mean, loc, scale, bcv = (jnp.asarray(p) for p in (self.mean, self.lib_loc, self.lib_scale, self.bcv))
        share = mean if self.factor is None else mean * _rows(jnp.asarray(self.factor), state)
        if self.batch_factor is not None:
            share = share * jnp.asarray(self.batch_factor)[batch]
        share = jnp.broadcast_to(share, (state.shape[0], mean.shape[0]))
        share = share / share.sum(1, keepdims=True)
        library = jnp.exp(_of_cells(loc, state, batch) + _of_cells(scale, state, batch) * noise).astype(mean.dtype)
        expected = share * library[:, None]
        bcv = jnp.broadcast_to(bcv.astype(mean.dtype), expected.shape)
        if self.bcv_trend is not None:
            bcv = bcv * (1 + jnp.asarray(self.bcv_trend, mean.dtype) / jnp.sqrt(expected))
        return library, expected, bcv

    def _kept(self, rate: Array) -> Array:
        if self.dropout is None:
            return jnp.ones_like(rate)
        mid, shape = jnp.asarray(self.dropout, rate.dtype)
        return jax.nn.sigmoid(-shape * (jnp.log(jnp.maximum(rate, jnp.finfo(rate.dtype).tiny)) - mid))


def _rows(table: Array, state: Array) -> Array:
    return table[state] if state.ndim == 1 else state.astype(table.dtype) @ table


def _of_cells(parameter: Array, state: Array, batch: Array) -> Array:
    """A library parameter of each cell, from a number or a table (batches, states)."""
    if parameter.ndim == 0:
        return parameter
    own = parameter[batch]
    if state.ndim == 2:
        return (own * state.astype(parameter.dtype)).sum(1)
    return jnp.take_along_axis(own, state[:, None], 1)[:, 0]


@jax.jit
def _block(op: Simulate, state: Array, batch: Array, noise: Array) -> tuple[Array, Array, Array]:
    return op._cells(state, batch, noise)


def drawn_counts(op: Simulate, state: np.ndarray, batch: np.ndarray, seed: int) -> tuple[Any, np.ndarray]:
    """Counts (cells, genes) as CSR float32, and the library sizes they were drawn with; block by block on the host.

    All draws are NumPy's, whose gamma takes a twentieth of the time of JAX's on a CPU.
    """
    n, genes = len(state), jnp.asarray(op.mean).shape[0]
    rows = max(1, min(n, _BLOCK_VALUES // genes))
    rng = np.random.default_rng([seed, 0])
    noise = rng.standard_normal(n).astype(np.float32)
    parts, library = [], []
    for start in range(0, n, rows):
        here = np.minimum(np.arange(start, start + rows), n - 1)  # the last block repeats the last cell
        made = _block(op, *(jnp.asarray(a[here]) for a in (state, batch, noise)))
        size, expected, bcv = (np.asarray(part, np.float64)[: n - start] for part in made)
        shape = np.clip(bcv**-2.0, 1 / _LARGEST_SHAPE, _LARGEST_SHAPE)
        rate = rng.standard_gamma(shape) * expected / shape
        counts = rng.poisson(rate)
        if op.dropout is not None:
            counts *= rng.random(rate.shape) < np.asarray(op._kept(jnp.asarray(rate, jnp.float32)))
        parts.append(sp.csr_matrix(counts.astype(np.float32)))
        library.append(size)
    return sp.vstack(parts, format="csr"), np.concatenate(library)
