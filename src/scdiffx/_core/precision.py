"""Functions that need double precision inside computations in single precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["in_double"]


def _cast(tree: Any, old: Any, new: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(new) if getattr(x, "dtype", None) == old else x, tree)


def in_double(f: Callable[..., Any]) -> Callable[..., Any]:
    """The function computed in float64, as are its derivatives; float32 arguments give float32 results.

    For ill-conditioned functions of what single precision knows well enough. All arguments are pytrees of arrays.
    """

    @jax.custom_vjp
    def wrapped(*args: Any) -> Any:
        with jax.enable_x64(True):
            return _cast(f(*_cast(args, jnp.float32, jnp.float64)), jnp.float64, jnp.float32)

    def forward(*args: Any) -> Any:
        with jax.enable_x64(True):
            result, pull = jax.vjp(f, *_cast(args, jnp.float32, jnp.float64))
            return _cast(result, jnp.float64, jnp.float32), pull

    def backward(pull: Any, cotangent: Any) -> Any:
        with jax.enable_x64(True):
            return _cast(pull(_cast(cotangent, jnp.float32, jnp.float64)), jnp.float64, jnp.float32)

    wrapped.defvjp(forward, backward)

    @functools.wraps(f)
    def call(*args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        single = any(getattr(x, "dtype", None) == jnp.float32 for x in leaves)
        return wrapped(*args) if single else f(*args)

    return call
