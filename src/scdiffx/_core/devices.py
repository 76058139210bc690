"""Work that is split over the devices of a mesh: JAX's own, set by `jax.set_mesh`, with an axis called "cells".

Nothing here sends anything. A loop over blocks becomes one loop for each device, by a leading axis of as many parts as
there are devices; which device holds which part is said by JAX's shardings, and XLA's partitioner does the rest.
Without a mesh each of these functions leaves its argument as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

__all__ = ["AXIS", "divisible", "in_parts", "n_parts", "padded", "place", "readable", "spread", "whole"]

AXIS = "cells"
T = TypeVar("T")


def n_parts() -> int:
    """How many devices share the cells: the size of the axis of the mesh in the context, 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if AXIS not in mesh.axis_names:
        return 1
    kind = mesh.axis_types[mesh.axis_names.index(AXIS)]
    if kind == AxisType.Explicit:
        raise ValueError(
            f"the axis {AXIS!r} of the mesh is Explicit, and scdiffx leaves partitioning to XLA: make the mesh with "
            f"`jax.make_mesh(({mesh.shape[AXIS]},), ({AXIS!r},), axis_types=(jax.sharding.AxisType.Auto,))`"
        )
    # Inside a `jax.shard_map` over the axis the caller has split the work already.
    return 1 if kind == AxisType.Manual else int(mesh.shape[AXIS])


def divisible(n: int) -> int:
    """`n`, rounded up to a multiple of the number of parts."""
    return -(-n // n_parts()) * n_parts()


def padded(x: Array, axis: int = 0, fill: Any = 0) -> Array:
    """The array with as much appended as makes its axis divisible."""
    more = divisible(x.shape[axis]) - x.shape[axis]
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)], constant_values=fill) if more else x


def spread(x: Array, axis: int = 0) -> Array:
    """Each device holds its part of a divisible axis."""
    return x if n_parts() == 1 else jax.lax.with_sharding_constraint(x, PartitionSpec(*(None,) * axis, AXIS))


def whole(x: Array) -> Array:
    """Each device holds all of the array."""
    return x if n_parts() == 1 else jax.lax.with_sharding_constraint(x, PartitionSpec())


def place(x: Any) -> Any:
    """Put a host array on the devices, by its first axis where that is divisible; outside of compiled code."""
    if n_parts() == 1 or x.shape[0] % n_parts():
        return x
    return jax.device_put(x, PartitionSpec(AXIS))


def readable(tree: Any) -> Any:
    """The arrays, those of which other hosts hold parts as whole host arrays: all processes have to ask for them."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        from jax.experimental.multihost_utils import process_allgather

        return process_allgather(x, tiled=True)

    return tree if jax.process_count() == 1 else jax.tree.map(leaf, tree)


def in_parts(f: Callable[[Any], T], tree: Any) -> T:
    """``f`` of each device's part of the first axis of all arrays, which must be divisible; results are stacked."""

    def split(a: Array) -> Array:
        return spread(a.reshape(n_parts(), -1, *a.shape[1:]))

    return jax.vmap(f)(jax.tree.map(split, tree))
