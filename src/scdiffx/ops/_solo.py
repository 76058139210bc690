"""Doublets by SOLO: a classifier of real against simulated cells in the latent space of a count autoencoder."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float

from scdiffx._core import counts as C
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.minibatch import host_csr
from scdiffx._core.random import as_seed
from scdiffx._log import progress_bar
from scdiffx.ops._vae import VAE

__all__ = ["Solo", "SoloResult"]

Net = dict[str, Any]
_RATE = 3e-3
_STEPS = 600
_STEPS_AT_ONCE = 10
_PATIENCE = 8
_HELD = 0.1
_DECAY = 1e-4
_NOT_VARYING = 1e-6
# The share of doublets that is found counts up to so many times more or less than the expected one.
_TRUST = 4


class SoloResult(NamedTuple):
    """`score`: the probability that a cell is a doublet, in [0, 1] (cells,). `evidence`: its logarithm, unbounded."""

    score: Float[Array, " cells"]
    evidence: Float[Array, " cells"]


@operator
class Solo:
    """A network on a cell's latent vector and log depth that tells simulated doublets from cells (Bernstein 2020).

    `init` trains the autoencoder (unless `vae` has weights), adds up random pairs of cells of the same batch, two of
    three sums thinned to the depth of another cell so that depth alone does not decide, and trains the classifier
    with early stopping. Its log odds are then divided by a temperature fitted on held-out cells, and moved until the
    mean probability is the share of doublets: the geometric mean of `doublet_rate`, the expected one, and twice the
    share of cells above the median of the simulated doublets, taken within a factor of four of `doublet_rate`.
    """

    net: Net | None = learnable(default=None)
    vae: VAE = buffer(default=VAE())
    history: dict[str, Array] | None = buffer(default=None, structure=True)
    n_hidden: int = static(default=16)
    doublet_ratio: float = static(default=2.0)
    doublet_rate: float = static(default=0.05)
    progress: bool = static(default=False)

    def init(self, x: C.Matrix, batch: Array | None = None, key: Array | None = None) -> Solo:
        if self.net is not None:
            return self
        seed = 0 if key is None else as_seed(key)
        # As for the autoencoder: training is in float32 whatever the precision of the input.
        with jax.enable_x64(False):
            csr = host_csr(x)
            rng = np.random.default_rng([seed, 1])
            single = C.Counts.from_scipy(csr)
            vae = self.vae.init(single, batch, key=jax.random.key(seed))
            codes = np.zeros(csr.shape[0], np.int32) if batch is None else np.asarray(batch)
            pairs = simulated(csr, codes, round(self.doublet_ratio * csr.shape[0]), rng)
            real, made = (np.asarray(_features(vae, C.Counts.from_scipy(part))) for part in (csr, pairs))
            net, history = _trained(self, real, made, rng)
        net, history, vae = (jax.tree.map(lambda a: jnp.asarray(a, x.dtype), t) for t in (net, history, vae))
        return replace(self, net=net, history=history, vae=replace(vae, history=None))

    def __call__(self, x: C.Matrix, batch: Array | None = None) -> SoloResult:
        """`batch` is of use to `init` alone."""
        if self.net is None:
            raise ValueError("Solo needs its networks: call `op = op.init(x, batch)` first")
        net = {name: jnp.asarray(value, x.dtype) for name, value in self.net.items()}
        evidence = logit(net, _features(self.vae, x)) * net["sharpness"] + net["prior"]
        return SoloResult(jnp.exp(jnp.minimum(evidence, 0)), evidence)


def simulated(csr: Any, codes: np.ndarray, n: int, rng: np.random.Generator) -> Any:
    """Sums of two different cells of one batch; two of three are thinned to the depth of another cell."""
    first = rng.integers(0, csr.shape[0], n)
    second = np.empty(n, np.int64)
    for code in np.unique(codes):
        members, own = np.flatnonzero(codes == code), codes[first] == code
        if len(members) < 2:
            raise ValueError("each batch needs at least two cells to simulate doublets from")
        place = np.searchsorted(members, first[own])
        other = (place + rng.integers(1, len(members), own.sum())) % len(members)
        second[own] = members[other]
    pairs = sp.csr_matrix(csr[first] + csr[second])
    depth = np.asarray(csr.sum(1)).ravel()
    total = np.maximum(depth[first] + depth[second], 1)
    share = np.where(np.arange(n) % 3 == 0, 1, np.minimum(1, depth[rng.integers(0, csr.shape[0], n)] / total))
    counts = np.rint(pairs.data).astype(np.int64)
    pairs.data = rng.binomial(counts, np.repeat(share, np.diff(pairs.indptr))).astype(np.float32)
    return pairs


def _features(vae: VAE, x: C.Matrix) -> Float[Array, "cells features"]:
    latent = _encode(replace(vae, columns=None, history=None), x)
    return jnp.concatenate([latent, jnp.log1p(C.row_sums(x))[:, None]], 1)


@jax.jit
def _encode(vae: VAE, x: C.Matrix) -> Array:
    return vae(x).latent


def logit(net: Net, features: Float[Array, "cells features"]) -> Float[Array, " cells"]:
    """Log odds of a simulated doublet against a cell, at their shares in training."""
    h = (features - net["centre"]) * net["inverse_spread"]
    h = jax.nn.relu(h @ net["weight_1"] + net["bias_1"])
    h = jax.nn.relu(h @ net["weight_2"] + net["bias_2"])
    return h @ net["weight_3"] + net["bias_3"]


def _initial(features: np.ndarray, hidden: int, rng: np.random.Generator) -> Net:
    spread = features.std(0)
    net: Net = {"centre": features.mean(0), "inverse_spread": 1 / np.where(spread > _NOT_VARYING, spread, 1)}
    sizes = [features.shape[1], hidden, hidden]
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes), start=1):
        net[f"weight_{i}"] = rng.standard_normal((n_in, n_out)) * math.sqrt(2 / n_in)
        net[f"bias_{i}"] = np.zeros(n_out)
    net |= {"weight_3": np.zeros(hidden), "bias_3": np.zeros(()), "sharpness": np.ones(()), "prior": np.zeros(())}
    return {name: np.asarray(value, np.float32) for name, value in net.items()}


def _optimizer() -> Any:
    import optax

    return optax.adamw(_RATE, weight_decay=_DECAY)


def _entropy(net: Net, features: Array, doublet: Array, weight: Array) -> Array:
    odds = logit(net, features)
    return (weight * (jax.nn.softplus(odds) - doublet * odds)).sum() / weight.sum()


@partial(jax.jit, donate_argnums=(0,))
def _train_steps(state: Any, fixed: Net, features: Array, doublet: Array, weight: Array) -> tuple[Any, Array]:
    import optax

    def step(state: Any, _: None) -> Any:
        moving, optimizer_state = state
        value, grads = jax.value_and_grad(lambda m: _entropy({**fixed, **m}, features, doublet, weight))(moving)
        updates, optimizer_state = _optimizer().update(grads, optimizer_state, moving)
        return (optax.apply_updates(moving, updates), optimizer_state), value

    state, values = jax.lax.scan(step, state, None, length=_STEPS_AT_ONCE)
    return state, values.mean()


def _trained(op: Solo, real: np.ndarray, made: np.ndarray, rng: np.random.Generator) -> tuple[Net, dict[str, Any]]:
    """The classifier, calibrated, and how training went."""
    features = np.concatenate([real, made]).astype(np.float32)
    doublet = np.repeat(np.array([0, 1], np.float32), [len(real), len(made)])
    held = rng.random(len(doublet)) < _HELD
    history: dict[str, list[float]] = {"train": [], "validation": []}
    net = _fit(op, features, doublet, held, history, rng)
    net = _calibrated(net, features, doublet, held, op.doublet_rate)
    return net, {name: np.asarray(values) for name, values in history.items()}


def _fit(
    op: Solo,
    features: np.ndarray,
    doublet: np.ndarray,
    held: np.ndarray,
    history: dict[str, list[float]],
    rng: np.random.Generator,
) -> Net:
    net = _initial(features[: int((doublet == 0).sum())], op.n_hidden, rng)
    fixed = {name: net.pop(name) for name in ("centre", "inverse_spread", "sharpness", "prior")}
    state: Any = (net, _optimizer().init(net))
    best, best_value, waited = net, math.inf, 0
    train, test = (~held).astype(np.float32), held.astype(np.float32)
    bar = progress_bar(_STEPS, "solo", op.progress)
    for _ in range(0, _STEPS, _STEPS_AT_ONCE):
        state, value = _train_steps(state, fixed, features, doublet, train)
        check = float(_held_entropy({**fixed, **state[0]}, features, doublet, test))
        history["train"].append(float(value))
        history["validation"].append(check)
        bar.update(_STEPS_AT_ONCE)
        waited += 1
        if check < best_value:
            # The next step reuses the memory of the weights.
            best, best_value, waited = jax.tree.map(np.array, state[0]), check, 0
        if waited >= _PATIENCE:
            break
    bar.close()
    return {**fixed, **best}


_held_entropy = jax.jit(_entropy)


def _calibrated(net: Net, features: np.ndarray, doublet: np.ndarray, held: np.ndarray, rate: float) -> Net:
    """Divide the log odds by the temperature that suits held-out cells best, and move them to the cells' own share.

    The cells that the simulated doublets are compared with hold doublets too. So the odds are densities of doublets
    over those of *all* cells, and times the share of doublets they are the probability itself, not its odds. For the
    same reason training cannot tell the share: every share under which no probability is above 1 explains the cells.
    Half of the doublets must lie above the median of the simulated ones, though, and few other cells do.
    """
    from scipy.optimize import brentq, minimize_scalar

    odds = np.asarray(logit(net, jnp.asarray(features)), np.float64)
    odds_held, doublet_held = odds[held], doublet[held]

    def cost(log_sharpness: float) -> float:
        scaled = math.exp(log_sharpness) * odds_held
        return float((np.logaddexp(0, scaled) - doublet_held * scaled).mean())

    sharpness = math.exp(minimize_scalar(cost, bounds=(-2, 2), method="bounded").x)
    real, made = sharpness * odds[doublet == 0], sharpness * odds[doublet == 1]
    found = min(1.0, 2 * float((real > np.median(made)).mean()))
    share = math.sqrt(rate * min(max(found, rate / _TRUST), rate * _TRUST))

    def missing(prior: float) -> float:
        return float(np.exp(np.minimum(real + prior, 0)).mean()) - share

    prior = brentq(missing, math.log(share) - real.max() - 1, 1 - real.min())
    return {**net, "sharpness": np.float32(sharpness), "prior": np.float32(prior)}
