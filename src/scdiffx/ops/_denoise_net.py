"""The transformer of :class:`scdiffx.ops.Denoise`: learned inducing points read the genes of a cell."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["HEADS", "Net", "Tokens", "hidden", "initial", "log_shares"]

Net = dict[str, Any]
HEADS = 2
_LAYERS = 1
# The width of what joins the inducing points, in multiples of theirs.
_JOINED = 2
# Where the features of a relative count saturate.
_SATURATION = (0.3, 1.0, 3.0)
# A prior as strong as exp(7) molecules: before training a gene's own molecules hardly count.
_LOG_THETA = 7.0


class Tokens(NamedTuple):
    """The genes that a cell shows the network: their places among the token genes, and their counts, 0 in pads."""

    place: Int[Array | np.ndarray, "cells tokens"]
    counts: Float[Array | np.ndarray, "cells tokens"]


def log_shares(
    net: Net, tokens: Tokens, x: Float[Array, "cells genes"], shown: Array | None = None
) -> Float[Array, "cells genes"]:
    """Log of the expected share of each gene in the molecules of a cell with counts `x`.

    Genes at which `shown` (cells, genes) is 0 are not shown their own counts; those of `tokens` are hidden elsewhere.
    """
    depth = x.sum(1)
    z = _read(net, tokens, depth)
    for layer in range(net["attend"].shape[0]):
        z = _block(net, z, layer)
    z = _layer_norm(z, net["last_gain"], net["last_bias"])
    h = jax.nn.gelu(z.reshape(z.shape[0], -1) @ net["join"] + net["join_bias"])
    prior = jax.nn.log_softmax(h @ net["gene_out"] + net["gene_bias"])
    # The mean of a gamma distribution with this prior mean, once the gene's own molecules are seen.
    weight = jnp.exp(-net["log_theta"])
    change = jnp.log1p(x * weight) - jnp.log1p(depth[:, None] * jnp.exp(prior) * weight)
    return jax.nn.log_softmax(prior + (change if shown is None else change * shown))


def _read(net: Net, tokens: Tokens, depth: Float[Array, " cells"]) -> Float[Array, "cells inducing dims"]:
    """The inducing points of each cell: learned queries that attend to its genes.

    A token is the embedding of a gene plus that of its count. Its score carries the logarithm of the relative count:
    the weight vanishes with the count, and a gene without molecules is as good as absent. One more token, of weight 1,
    tells the depth.
    """
    typical = jnp.exp(net["log_depth"])
    relative = jnp.log1p(tokens.counts * (typical / jnp.where(depth > 0, depth, 1))[:, None])
    features = jnp.stack([relative / (relative + s) for s in _SATURATION] + [jnp.log1p(tokens.counts)], -1)
    token = net["gene"][tokens.place] + features @ net["count"]
    told = net["depth"][0] + (jnp.log1p(depth) - net["log_depth"])[:, None] * net["depth"][1]
    token = jnp.concatenate([token, told[:, None]], 1)
    relative = jnp.pad(relative, ((0, 0), (0, 1)), constant_values=1)
    query = _heads(net["inducing"] @ net["read_query"])
    key, value = (_heads(token @ net[name]) for name in ("read_key", "read_value"))
    score = jnp.einsum("hmd,nhgd->nhmg", query, key) / math.sqrt(query.shape[-1])
    weight = jnp.exp(score - jax.lax.stop_gradient(score.max(-1, keepdims=True))) * relative[:, None, None]
    mean = jnp.einsum("nhmg,nhgd->nhmd", weight, value) / weight.sum(-1, keepdims=True)
    return net["inducing"] + _joined(mean) @ net["read_out"]


def _block(net: Net, z: Float[Array, "cells inducing dims"], layer: int) -> Float[Array, "cells inducing dims"]:
    """A transformer layer over the inducing points of each cell."""
    h = _layer_norm(z, net["attend_gain"][layer], net["attend_bias"][layer])
    query, key, value = (_heads(part) for part in jnp.split(h @ net["attend"][layer], 3, axis=-1))
    score = jnp.einsum("nhad,nhbd->nhab", query, key) / math.sqrt(query.shape[-1])
    z = z + _joined(jnp.einsum("nhab,nhbd->nhad", jax.nn.softmax(score), value)) @ net["attend_out"][layer]
    h = _layer_norm(z, net["feed_gain"][layer], net["feed_bias"][layer])
    return z + jax.nn.gelu(h @ net["feed_in"][layer] + net["feed_in_bias"][layer]) @ net["feed_out"][layer]


def _heads(x: Array) -> Array:
    """(..., rows, dims) as (..., heads, rows, dims / heads)."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], HEADS, -1), -2, -3)


def _joined(x: Array) -> Array:
    """The inverse of :func:`_heads`."""
    x = jnp.moveaxis(x, -3, -2)
    return x.reshape(*x.shape[:-2], -1)


def _layer_norm(x: Array, gain: Array, bias: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gain + bias


def hidden(
    tokens: Tokens, genes: Int[Array, " tokens"], shape: tuple[int, ...], masked: float, key: Array
) -> tuple[Tokens, Float[Array, "cells genes"]]:
    """Tokens without some genes, and which genes remain: of each cell up to the share `masked` is hidden."""
    share_key, gene_key = jax.random.split(key)
    share = jax.random.uniform(share_key, (shape[0], 1), maxval=masked)
    shown = (jax.random.uniform(gene_key, shape) >= share).astype(tokens.counts.dtype)
    there = jnp.take_along_axis(shown, genes[tokens.place], 1)
    return Tokens(tokens.place, tokens.counts * there), shown


def initial(csr: Any, n_tokens: int, hidden: int, inducing: int, rng: np.random.Generator) -> Net:
    """Weights before training: the output is the genes' mean shares, whatever the cell."""
    genes, joined = csr.shape[1], _JOINED * hidden

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape) / math.sqrt(shape[-2])

    def layers(make: Any, *shape: int) -> np.ndarray:
        return np.stack([make(*shape) for _ in range(_LAYERS)])

    def ones(*shape: int) -> np.ndarray:
        return np.ones(shape)

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape)

    total = np.asarray(csr.sum(0), np.float64).ravel()
    depth = np.asarray(csr.sum(1), np.float64).ravel()
    net = {
        "gene": rng.standard_normal((n_tokens, hidden)),
        "count": rng.standard_normal((len(_SATURATION) + 1, hidden)) / 2,
        "depth": rng.standard_normal((2, hidden)) / 2,
        "log_depth": np.log([np.median(depth[depth > 0])]),
        "inducing": rng.standard_normal((inducing, hidden)),
        **{f"read_{name}": normal(hidden, hidden) for name in ("query", "key", "value", "out")},
        "attend": layers(normal, hidden, 3 * hidden),
        "attend_out": layers(normal, hidden, hidden),
        "attend_gain": layers(ones, hidden),
        "attend_bias": layers(zeros, hidden),
        "feed_gain": layers(ones, hidden),
        "feed_bias": layers(zeros, hidden),
        "feed_in": layers(normal, hidden, 4 * hidden),
        "feed_in_bias": layers(zeros, 4 * hidden),
        "feed_out": layers(normal, 4 * hidden, hidden),
        "last_gain": np.ones(hidden),
        "last_bias": np.zeros(hidden),
        "join": normal(inducing * hidden, joined),
        "join_bias": np.zeros(joined),
        "gene_out": np.zeros((joined, genes)),
        "gene_bias": np.log((total + 0.5) / (total.sum() + 0.5 * genes)),
        "log_theta": np.full(genes, _LOG_THETA),
    }
    return {name: np.asarray(value, np.float32) for name, value in net.items()}
