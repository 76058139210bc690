"""Denoised counts: a transformer over genes that predicts some molecules of a cell from its others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float

from scdiffx._core import counts as C
from scdiffx._core.devices import readable
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.minibatch import SparseRows, densify, draw, host_csr, shared_size, widest
from scdiffx._core.random import as_seed
from scdiffx._log import progress_bar
from scdiffx.ops._denoise_net import HEADS, Net, Tokens, hidden, initial, log_shares

__all__ = ["Denoise", "DenoiseResult", "DenoiseTraining"]

_MIN_CELLS = 10
_MAX_TOKENS = 2_048
# The share of its molecules that a cell shows in training is drawn between these, for validation it is the third.
_SEEN = (0.4, 0.9)
_SEEN_HELD = 0.8
# Attention weights are (cells, inducing points, tokens): few cells at a time.
_CELLS_AT_ONCE = 32
_STEPS = 1_500
_WARMUP = 100


class DenoiseTraining(NamedTuple):
    """How the transformer is trained: `max_epochs` None is 1,500 gradient steps, but 10 to 300 epochs.

    The learning rate rises over 100 steps and falls to 0 as a cosine. Training stops after `patience` epochs (None:
    never) without a better likelihood on the `validation` share of the cells; the best weights are kept. In training
    a share of the genes of each cell, from 0 to `masked`, is hidden from the network.
    """

    max_epochs: int | None = None
    batch_size: int = 128
    learning_rate: float = 3e-3
    patience: int | None = 20
    validation: float = 0.1
    masked: float = 0.3
    progress: bool = False

    def epochs(self, n_cells: int) -> int:
        steps = max(1, n_cells // self.batch_size)
        return max(10, min(300, round(_STEPS / steps))) if self.max_epochs is None else self.max_epochs


class DenoiseResult(NamedTuple):
    """`denoised`: expected counts of the genes of `columns` at each cell's own depth (cells, columns)."""

    denoised: Float[Array, "cells columns"]


@operator
class Denoise:
    """A transformer over the genes of a cell, trained to predict some of the cell's molecules from the others.

    A token is a gene with a count. Learned inducing points attend to a cell's tokens and then to each other (Lee
    2019), so the cost is linear in tokens and cells; together they give the expected share of each gene, which is
    combined with the gene's own molecules as a gamma prior is with a Poisson count. `init` trains on molecules dealt
    out binomially: the network sees 40 to 90 % of a cell's, and the Poisson likelihood is that of the rest. It does
    nothing to an operator that has a `net`. Thinning leaves shares as they are, and both the depth and the relative
    counts are inputs, so the call shows the network all molecules. Training starts from the genes' mean shares.
    """

    by_cell: ClassVar[bool] = True
    net: Net | None = learnable(default=None)
    history: dict[str, Array] | None = buffer(default=None, structure=True)
    tokens: Array | None = buffer(default=None)
    columns: Array | None = buffer(default=None)
    n_tokens: int = static(default=1_024)
    n_hidden: int = static(default=32)
    n_inducing: int = static(default=16)
    training: DenoiseTraining = static(default=DenoiseTraining())

    def init(self, x: C.Matrix, key: Array | None = None) -> Denoise:
        if self.net is not None:
            return self
        self._check()
        if x.shape[0] < _MIN_CELLS:
            raise ValueError(f"training needs at least {_MIN_CELLS} cells, got {x.shape[0]}")
        seed = 0 if key is None else as_seed(key)
        csr = host_csr(x)
        if not csr.nnz:
            raise ValueError("training needs molecules, but all counts are 0")
        tokens = _token_genes(csr) if self.tokens is None else np.asarray(self.tokens)
        # Training is in float32 whatever the precision of the input: its noise is that of minibatches.
        with jax.enable_x64(False):
            net, history = _trained(self, csr, tokens, seed)
        net, history = (jax.tree.map(lambda a: jnp.asarray(a, x.dtype), tree) for tree in (net, history))
        return replace(self, net=net, history=history, tokens=jnp.asarray(tokens, jnp.int32))

    def __call__(self, x: C.Matrix) -> DenoiseResult:
        net = self._net(x)

        def expected(rows: Array) -> Array:
            share = jnp.exp(log_shares(net, self._shown(rows), rows))
            return rows.sum(1, keepdims=True) * (share if self.columns is None else share[:, self.columns])

        return DenoiseResult(C.map_rows(x, lambda block: _in_parts(expected, block)))

    def loss(self, x: C.Matrix, key: Array | None = None) -> Array:
        """What training lowers, with all genes shown: the Poisson deviance per molecule that the network did not see.

        Which molecules it sees is drawn from `key`, as in training.
        """
        net = self._net(x)
        genes = x.shape[1]

        def of_rows(rows: Array) -> Array:
            seen, rest = rows[:, :genes], rows[:, genes:]
            return jnp.stack([deviances(log_shares(net, self._shown(seen), seen), rest), rest.sum(1)], 1)

        def step(total: Array, block: Array, mask: Array) -> Array:
            return total + (_in_parts(of_rows, block) * mask[:, None]).sum(0)

        both = _dealt(x, jax.random.key(0) if key is None else key)
        total = C.fold_rows(both, step, jnp.zeros(2, x.dtype))
        return total[0] / jnp.maximum(total[1], 1)

    def _shown(self, rows: Float[Array, "cells genes"]) -> Tokens:
        """The tokens of cells: their `n_tokens` largest counts of token genes."""
        assert self.tokens is not None
        part = rows[:, self.tokens]
        if self.n_tokens >= part.shape[1]:
            return Tokens(jnp.broadcast_to(jnp.arange(part.shape[1]), part.shape), part)
        place = jax.lax.top_k(jax.lax.stop_gradient(part), self.n_tokens)[1]
        return Tokens(place, jnp.take_along_axis(part, place, 1))

    def _check(self) -> None:
        if self.n_hidden < HEADS or self.n_hidden % HEADS:
            raise ValueError(f"n_hidden={self.n_hidden} must be a multiple of {HEADS}")
        if self.n_tokens < 1 or self.n_inducing < 1:
            raise ValueError(f"n_tokens={self.n_tokens} and n_inducing={self.n_inducing} must be at least 1")
        if not 0 < self.training.validation < 1:
            raise ValueError(f"validation={self.training.validation} must be between 0 and 1")
        if not 0 <= self.training.masked < 1:
            raise ValueError(f"masked={self.training.masked} must be at least 0 and below 1")

    def _net(self, like: Any) -> Net:
        if self.net is None or self.tokens is None:
            raise ValueError("Denoise needs its network: call `op = op.init(x)` first")
        return {name: jnp.asarray(value, like.dtype) for name, value in self.net.items()}


def deviances(log_share: Float[Array, "cells genes"], x: Float[Array, "cells genes"]) -> Float[Array, " cells"]:
    """Poisson deviance of each cell's counts from shares of their total; it scales with the counts."""
    total = x.sum(1)
    own = jax.scipy.special.xlogy(x, x).sum(1) - jax.scipy.special.xlogy(total, total)
    return 2 * (own - (x * log_share).sum(1))


def _in_parts(f: Any, rows: Array) -> Array:
    """`f` on a few rows at a time, also on the way back."""
    n = rows.shape[0]
    size = min(_CELLS_AT_ONCE, n)
    parts = jnp.pad(rows, ((0, -n % size), (0, 0))).reshape(-1, size, rows.shape[1])
    found = jax.lax.map(jax.checkpoint(f), parts)
    return found.reshape(-1, *found.shape[2:])[:n]


def _dealt(x: C.Matrix, key: Array) -> C.Matrix:
    """Beside each other, molecules that the network sees, and the others, scaled to the size of the whole cell."""
    share_key, key = jax.random.split(key)
    share = jax.random.uniform(share_key, (x.shape[0],), x.dtype, *_SEEN)
    if not isinstance(x, C.Counts):
        seen = x * _kept(x, share[:, None], key)
        return jnp.concatenate([seen, (x - seen) / (1 - share[:, None])], 1)
    blocks, rows, genes = x.data.shape[0], x.block_rows, x.shape[1]
    padded = jnp.pad(share, (0, blocks * rows - x.shape[0])).reshape(blocks, rows)
    at = jnp.take_along_axis(padded, jnp.minimum(x.row, rows - 1), 1)
    seen = x.data * _kept(x.data, at, key)
    place = jnp.where(x.row < rows, x.row * 2 * genes + x.column, 2 * rows * genes)
    data = jnp.concatenate([seen, (x.data - seen) / (1 - at)], 1)
    return C.Counts(data, jnp.concatenate([place, place + genes], 1), (x.shape[0], 2 * genes), rows)


def _kept(x: Array, share: Array, key: Array) -> Array:
    """Which part of each count a binomial draw keeps; what was drawn has no derivative."""
    x = jax.lax.stop_gradient(x)
    return jnp.where(x > 0, jax.random.binomial(key, jnp.floor(x), share, dtype=x.dtype) / jnp.where(x > 0, x, 1), 0)


def _token_genes(csr: Any) -> np.ndarray:
    """The genes that become tokens: those whose counts vary most beyond sampling, where there are too many."""
    n, genes = csr.shape
    if genes <= _MAX_TOKENS:
        return np.arange(genes)
    mean = np.asarray(csr.sum(0), np.float64).ravel() / n
    square = np.asarray(csr.multiply(csr).sum(0), np.float64).ravel() / n
    # The excess of the variance over a Poisson's, as a share of the mean: high for variable and frequent genes.
    excess = (square - mean**2 - mean) / np.where(mean > 0, mean, 1)
    return np.sort(np.argsort(-excess, kind="stable")[:_MAX_TOKENS])


def _optimizer() -> Any:
    import optax

    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


class _Minibatch(NamedTuple):
    """Cells in training: their tokens, the molecules that the network sees and the others, scaled."""

    tokens: Tokens
    seen: SparseRows
    rest: SparseRows


@partial(jax.jit, static_argnames=("masked",), donate_argnums=(0,))
def _train_step(
    state: Any, batch: _Minibatch, tokens: Array, rate: Array, seed: Array, *, masked: float
) -> tuple[Any, Array]:
    """One gradient step; returns the state and the deviance per molecule."""
    net, optimizer_state = state
    size, genes = batch.tokens.place.shape[0], net["gene_bias"].shape[0]
    x, rest = (densify(rows, size, genes) for rows in (batch.seen, batch.rest))
    shown_tokens, shown = hidden(batch.tokens, tokens, x.shape, masked, jax.random.key(seed))

    def cost(net: Net) -> Array:
        return deviances(log_shares(net, shown_tokens, x, shown), rest).sum() / jnp.maximum(rest.sum(), 1)

    value, grads = jax.value_and_grad(cost)(net)
    steps, optimizer_state = _optimizer().update(grads, optimizer_state)
    # The strengths of the priors lie orders of magnitude apart; the depth that is typical is known.
    factors = {name: {"log_theta": 10.0, "log_depth": 0.0}.get(name, 1.0) for name in net}
    return ({name: net[name] - factors[name] * rate * steps[name] for name in net}, optimizer_state), value


@jax.jit
def _evaluate(net: Net, batch: _Minibatch) -> tuple[Array, Array]:
    """Deviance and number of molecules of each cell."""
    size, genes = batch.tokens.place.shape[0], net["gene_bias"].shape[0]
    x, rest = (densify(rows, size, genes) for rows in (batch.seen, batch.rest))
    return deviances(log_shares(net, batch.tokens, x), rest), rest.sum(1)


class _Run:
    """One training: the data, and how minibatches are made of them."""

    def __init__(self, op: Denoise, csr: Any, tokens: np.ndarray, train: np.ndarray, seed: int) -> None:
        self.csr, self.tokens = csr, tokens
        self.masked, self.seed = op.training.masked, seed
        self.place = np.full(csr.shape[1], -1)
        self.place[tokens] = np.arange(len(tokens))
        self.size = shared_size(min(op.training.batch_size, len(train)))
        self.spare = train[: self.size]
        self.width = widest(csr, self.size)
        # Pads cost as much as tokens, and few cells show three quarters of their genes in training: lists are that
        # long for nine of ten cells, and the largest counts of the others fill them.
        degree = np.diff(csr[:, tokens].indptr)
        most = min(op.n_tokens, len(tokens))
        self.length, self.full_length = (
            min(most, 16 * math.ceil((length + 1) / 16)) for length in (0.75 * np.quantile(degree, 0.9), degree.max())
        )

    def minibatch(self, cells: np.ndarray, share: np.ndarray, length: int, rng: np.random.Generator) -> _Minibatch:
        """The molecules of some cells, dealt out: a share is seen, in lists of at most `length` token genes."""
        part = sp.csr_matrix(self.csr[cells])
        row = np.repeat(np.arange(len(cells)), np.diff(part.indptr))
        kept = rng.binomial(np.floor(part.data).astype(np.int64), share[row]).astype(np.float32)
        seen, rest = part.copy(), part.copy()
        seen.data, rest.data = kept, ((part.data - kept) / (1 - share[row])).astype(np.float32)
        order = np.arange(len(cells))[None]
        seen_rows, rest_rows = (draw(matrix, order, self.width)[0] for matrix in (seen, rest))
        tokens = _listed(row, self.place[part.indices], kept, (len(cells), length))
        return _Minibatch(tokens, seen_rows, rest_rows)

    def epoch(self, state: Any, cells: np.ndarray, rate: Any, rng: np.random.Generator) -> tuple[Any, float]:
        """One pass over the cells, less a rest that fills no minibatch; and the mean deviance per molecule."""
        values = []
        for part in cells[: len(cells) // self.size * self.size].reshape(-1, self.size):
            batch = self.minibatch(part, rng.uniform(*_SEEN, len(part)), self.length, rng)
            numbers = (np.float32(next(rate)), np.uint32(rng.integers(2**32)))
            state, value = _train_step(state, batch, self.tokens, *numbers, masked=self.masked)
            values.append(value)
        return state, float(np.mean(values))

    def evaluate(self, net: Net, cells: np.ndarray) -> float:
        """Deviance per molecule of the cells that were held out; the same molecules each time."""
        rng = np.random.default_rng([self.seed, 2])
        n, found = len(cells), []
        for part in np.concatenate([cells, self.spare[: -n % self.size]]).reshape(-1, self.size):
            share = np.full(len(part), _SEEN_HELD)
            found.append(_evaluate(net, self.minibatch(part, share, self.full_length, rng)))
        deviance, molecules = (np.concatenate([readable(f[i]) for f in found])[:n].sum() for i in (0, 1))
        return float(deviance / max(molecules, 1))


def _listed(row: np.ndarray, place: np.ndarray, count: np.ndarray, shape: tuple[int, int]) -> Tokens:
    """The largest counts of token genes of each cell, in lists of one length."""
    there = (place >= 0) & (count > 0)
    row, place, count = row[there], place[there], count[there]
    order = np.lexsort((-count, row))
    row, place, count = row[order], place[order], count[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    listed = rank < shape[1]
    tokens = Tokens(np.zeros(shape, np.int32), np.zeros(shape, np.float32))
    tokens.place[row[listed], rank[listed]] = place[listed]
    tokens.counts[row[listed], rank[listed]] = count[listed]
    return tokens


def _rates(highest: float, steps: int) -> Iterator[float]:
    for step in range(steps):
        yield highest * min(1, (step + 1) / _WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2


def _trained(op: Denoise, csr: Any, tokens: np.ndarray, seed: int) -> tuple[Net, dict[str, Any]]:
    """Train on the cells that are not held out; returns the best weights and how training went."""
    settings = op.training
    rng = np.random.default_rng([seed, 1])
    held, train = np.split(rng.permutation(csr.shape[0]), [max(1, round(settings.validation * csr.shape[0]))])
    run = _Run(op, csr, tokens, train, seed)
    net = initial(csr[train], len(tokens), op.n_hidden, op.n_inducing, rng)
    best, best_epoch = net, -1
    start = run.evaluate(net, held)
    state = (jax.tree.map(jnp.asarray, net), _optimizer().init(net))
    epochs = settings.epochs(len(train))
    rates = _rates(settings.learning_rate, epochs * (len(train) // run.size))
    history: dict[str, list[float]] = {"train": [], "validation": []}
    bar = progress_bar(epochs, "denoise", settings.progress)
    for epoch in range(epochs):
        state, value = run.epoch(state, rng.permutation(train), rates, rng)
        check = run.evaluate(state[0], held)
        if not math.isfinite(check):
            raise FloatingPointError(f"the likelihood is not finite after epoch {epoch}: lower the learning rate")
        if check < min([start, *history["validation"]]):
            # The next step reuses the memory of the weights.
            best, best_epoch = jax.tree.map(np.array, state[0]), epoch
        history["train"].append(value)
        history["validation"].append(check)
        bar.set_postfix({"validation": f"{check:.4f}"}, refresh=False)
        bar.update()
        if settings.patience is not None and epoch - max(best_epoch, 0) >= settings.patience:
            break
    bar.close()
    kept = {"kept": np.asarray(best_epoch), "start": np.asarray(start)}
    return best, {name: np.asarray(values) for name, values in history.items()} | kept
