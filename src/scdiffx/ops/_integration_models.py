"""The autoencoders that integrate batches: of an embedding, and of counts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.sparse.linalg import LinearOperator, svds

from scdiffx._core import counts as C
from scdiffx._core.minibatch import densify, draw, host_csr, widest
from scdiffx.ops import _vae

__all__ = ["Cells", "CountsModel", "EmbeddingModel", "Model", "Net", "encode", "uniform"]

Net = dict[str, Any]
_HELD_OUT = 0.1
# Components of log-normalised counts in which neighbours are found that integration should keep.
_COMPONENTS = 30


class Cells(NamedTuple):
    """Cells of a step: coordinates or counts, batches, soft clusters (cells, clusters), their mean squared distance."""

    x: Any
    batch: Any
    member: Any
    spread: Any


class Model(Protocol):
    """What the training asks of an autoencoder and its data.

    ``forward(net, cells, key)`` yields codes and the reconstruction errors of the cells; without a key, nothing in it
    is random. Progress is judged by the error and `check_weight` times the discrepancy, where :meth:`unit`, given the
    errors at the checks so far, says what the discrepancy counts, here and in training; `least` is the share by which
    that must fall to count as better. `train` are the cells to train on and `held` those that the error is judged by,
    None for the sample that all else is judged by.
    """

    scale: np.ndarray | None
    least: float
    check_weight: float
    train: np.ndarray
    held: np.ndarray | None

    @staticmethod
    def forward(net: Net, cells: Cells, key: Array | None) -> tuple[Array, Array]: ...

    def unit(self, errors: list[float]) -> float: ...

    def initial(self, rng: np.random.Generator) -> Net: ...

    def codes(self, net: Net) -> np.ndarray: ...

    def rows(self, cells: np.ndarray) -> Any: ...

    def before(self, cells: np.ndarray) -> np.ndarray: ...


def uniform(rng: np.random.Generator, n_in: int, n_out: int) -> np.ndarray:
    return (rng.uniform(-1, 1, (n_in, n_out)) * math.sqrt(3 / n_in)).astype(np.float32)


def _layer(net: Net, name: str, x: Any, batch: Any) -> Array:
    hidden = jax.nn.relu(x @ net[f"{name}_in"] + net[f"{name}_batch"][batch])
    return x + hidden @ net[f"{name}_out"] + net[f"{name}_shift"][batch]


def encode(net: Net, x: Any, batch: Any) -> Float[Array, "cells dims"]:
    """Standardised coordinates plus what a network of them and the batch adds."""
    return _layer(net, "encoder", x, batch)


class EmbeddingModel:
    """Coordinates in units of their standard deviation; the error is the squared distance to what is put back."""

    least = 0.01
    check_weight = 10.0
    held: np.ndarray | None = None

    def __init__(self, z: C.Matrix, batch: np.ndarray, hidden: int) -> None:
        given = np.asarray(z, np.float32)
        self.scale: np.ndarray | None = np.asarray(max(float(given.std()), 1e-12), np.float32)
        self.x: np.ndarray = given / self.scale
        self.batch, self.hidden = batch, hidden
        self.train = np.arange(len(batch))

    @staticmethod
    def forward(net: Net, cells: Cells, key: Array | None) -> tuple[Array, Array]:
        h = encode(net, cells.x, cells.batch)
        return h, ((_layer(net, "decoder", h, cells.batch) - cells.x) ** 2).sum(1)

    def unit(self, errors: list[float]) -> float:
        return 1.0

    def initial(self, rng: np.random.Generator) -> Net:
        """Networks that change nothing yet: what they add to their input starts at 0."""
        net: Net = {}
        dims, batches, hidden = self.x.shape[1], int(self.batch.max()) + 1, self.hidden
        for name in ("encoder", "decoder"):
            net |= {
                f"{name}_in": uniform(rng, dims, hidden),
                f"{name}_batch": uniform(rng, batches, hidden),
                f"{name}_out": np.zeros((hidden, dims), np.float32),
                f"{name}_shift": np.zeros((batches, dims), np.float32),
            }
        return net

    def codes(self, net: Net) -> np.ndarray:
        return np.asarray(encode(net, self.x, self.batch))

    def rows(self, cells: np.ndarray) -> np.ndarray:
        return self.x if len(cells) == len(self.x) else self.x[cells]

    def before(self, cells: np.ndarray) -> np.ndarray:
        return self.x[cells]


class CountsModel:
    """Counts as in :class:`VAE`, on whose bound it rests: the code is the mean of the latent vector.

    The error of a cell is its negative bound in nats. A tenth of the cells is held out, to judge it by. How much there
    is to learn depends on the depth and the genes: the discrepancy counts in units of what training has brought so far.
    """

    scale: np.ndarray | None = None
    held: np.ndarray | None
    train: np.ndarray
    least = 0.0
    check_weight = 1.0

    def __init__(self, x: C.Matrix, batch: np.ndarray, hidden: int, n_latent: int) -> None:
        if len(batch) < _vae.MIN_CELLS:
            raise ValueError(f"training needs at least {_vae.MIN_CELLS} cells, got {len(batch)}")
        self.csr, self.batch = host_csr(x), batch
        self.x = x if isinstance(x, C.Counts) and x.dtype == jnp.float32 else C.Counts.from_scipy(self.csr)
        self.vae = _vae.VAE(n_latent=n_latent, n_hidden=hidden)
        self.train = self.held = np.arange(len(batch))

    @staticmethod
    def forward(net: Net, cells: Cells, key: Array | None) -> tuple[Array, Array]:
        size, genes = len(cells.batch), net["encoder_in"].shape[0]
        x = densify(cells.x, size, genes)
        first, second = (None, None) if key is None else jax.random.split(key)
        mean, std = _vae.encode(net, x, first)
        z = mean if second is None else mean + std * jax.random.normal(second, mean.shape, mean.dtype)
        fit = _vae.reconstruction(net, x, z, cells.batch, "nb")
        return mean, _vae.prior_divergence(mean, std) - _vae.add_coefficients(net, cells.x, cells.batch, fit)

    def unit(self, errors: list[float]) -> float:
        return errors[0] - min(errors)

    def initial(self, rng: np.random.Generator) -> Net:
        """The networks of :class:`VAE` before training, of the cells that are not held out."""
        n = len(self.batch)
        held, train = np.split(rng.permutation(n), [max(1, round(_HELD_OUT * n))])
        self.held, self.train = np.sort(held), np.sort(train)
        batches = int(self.batch.max()) + 1
        return _vae.initial(self.vae, self.csr[self.train], self.batch[self.train], batches, rng)

    def codes(self, net: Net) -> np.ndarray:
        return np.asarray(_means(net, self.x))

    def rows(self, cells: np.ndarray) -> Any:
        return draw(self.csr, cells[None], widest(self.csr, len(cells)))[0]

    def before(self, cells: np.ndarray) -> np.ndarray:
        """Principal components of the logarithms of relative counts, which the encoder sees."""
        few = self.csr[cells]
        depth = np.asarray(few.sum(1)).ravel()
        logs = few.multiply((few.shape[1] / np.maximum(depth, 1))[:, None]).tocsr().log1p()
        mean = np.asarray(logs.mean(0)).ravel()
        centred = LinearOperator(
            logs.shape,
            matvec=lambda v: logs @ v - mean @ v,
            rmatvec=lambda u: logs.T @ u - mean * u.sum(),
            dtype=np.float32,
        )
        start = np.random.default_rng(0).standard_normal(min(logs.shape)).astype(np.float32)
        left, size, _ = svds(centred, min(_COMPONENTS, min(logs.shape) - 1), v0=start)
        return np.asarray(left * size, np.float32)


@jax.jit
def _means(net: Net, x: C.Counts) -> Array:
    return C.map_rows(x, lambda block: _vae.encode(net, block)[0])
