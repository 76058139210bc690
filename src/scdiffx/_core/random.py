"""One way from whatever a user calls a seed to a JAX key or an integer."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

__all__ = ["as_key", "as_seed", "one_rng"]


def one_rng(rng: Any, random_state: Any) -> Any:
    """The one of `rng` and scanpy's `random_state` that was given; 0 when neither was."""
    if rng is not None and random_state is not None:
        raise TypeError("pass either `rng` or `random_state`, not both")
    if rng is not None:
        return rng
    return 0 if random_state is None else random_state


def as_seed(rng: Any) -> int:
    """A 32-bit seed from None (fresh entropy), an int, a numpy Generator or RandomState, or a JAX key."""
    if rng is None:
        return int(np.random.SeedSequence().generate_state(1)[0])
    if isinstance(rng, bool | np.bool_):
        raise TypeError(f"rng={rng!r} is a bool: pass None, an int, a numpy Generator or a JAX key")
    if isinstance(rng, int | np.integer):
        if rng < 0:
            raise ValueError(f"rng={rng!r} must not be negative")
        return int(rng) % 2**32
    if isinstance(rng, np.random.Generator):
        return int(rng.integers(2**32))
    if isinstance(rng, np.random.RandomState):
        return int(rng.randint(2**32, dtype=np.uint32))
    if isinstance(rng, jax.Array):
        data = jax.random.key_data(rng) if jax.numpy.issubdtype(rng.dtype, jax.dtypes.prng_key) else rng
        return int(np.asarray(data).ravel()[-1]) % 2**32
    raise TypeError(f"rng={rng!r} is not understood: pass None, an int, a numpy Generator or a JAX key")


def as_key(rng: Any) -> jax.Array:
    """A JAX key; a key passes through unchanged."""
    if isinstance(rng, jax.Array) and jax.numpy.issubdtype(rng.dtype, jax.dtypes.prng_key):
        return rng
    return jax.random.key(as_seed(rng))
