"""The vocabulary of an operator: learnable, buffer and static fields, and the constraints on what is learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

__all__ = [
    "CONSTRAINTS",
    "Constraint",
    "buffer",
    "called",
    "fields_of_kind",
    "learnable",
    "learnables",
    "number_stays",
    "operator",
    "replace",
    "static",
]

T = TypeVar("T")


class Constraint(NamedTuple):
    """A bijection between the real line, where optimisers move, and the values an operator accepts."""

    name: str
    to_real: Callable[[jax.Array], jax.Array]
    from_real: Callable[[jax.Array], jax.Array]
    describe: str
    accepts: Callable[[jax.Array], jax.Array]


def _logit(p: jax.Array) -> jax.Array:
    # Values at the closed ends are legal settings (a weight of exactly 1), yet infinite here: step just inside.
    edge = jnp.finfo(p.dtype).eps
    p = jnp.clip(p, edge, 1 - edge)
    return jnp.log(p) - jnp.log1p(-p)


def _centred_log(p: jax.Array) -> jax.Array:
    log_p = jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))
    return log_p - log_p.mean(-1, keepdims=True)


CONSTRAINTS = {
    c.name: c
    for c in (
        Constraint("real", lambda x: x, lambda u: u, "a finite number", jnp.isfinite),
        Constraint("positive", jnp.log, jnp.exp, "greater than 0", lambda x: jnp.isfinite(x) & (x > 0)),
        Constraint("unit", _logit, jax.nn.sigmoid, "in [0, 1]", lambda x: (x >= 0) & (x <= 1)),
        Constraint(
            "simplex",
            _centred_log,
            lambda u: jax.nn.softmax(u, axis=-1),
            "non-negative and summing to 1 over the last axis",
            lambda x: (x >= 0) & (jnp.abs(x.sum(-1, keepdims=True) - 1) < 1e-4),
        ),
    )
}


def learnable(*, default: Any = dataclasses.MISSING, constraint: str = "real") -> Any:
    """A field that optimisers may change: a float, an array or a network, kept inside `constraint`."""
    if constraint not in CONSTRAINTS:
        raise ValueError(f"constraint={constraint!r} is unknown. Available: {sorted(CONSTRAINTS)}")
    return dataclasses.field(default=default, metadata={"kind": "learnable", "constraint": constraint})


def buffer(*, default: Any = None, structure: bool = False) -> Any:
    """A field estimated from data by `init` and never optimised.

    ``structure=True`` marks discrete structure (neighbour indices), found again whenever a fit refreshes and whenever
    a fitted plan meets new cells; every other buffer is estimated once and stays.
    """
    return dataclasses.field(default=default, metadata={"kind": "buffer", "structure": structure})


def static(*, default: Any = dataclasses.MISSING) -> Any:
    """A field that shapes the computation: sizes and names. Hashable, part of the compilation key."""
    return dataclasses.field(default=default, metadata={"kind": "static"})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(learnable, buffer, static))
def operator(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that JAX sees as a pytree of its learnable and buffer fields.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import scdiffx as sd
    >>> @sd.ops.operator
    ... class Power:
    ...     exponent: float = sd.ops.learnable(default=0.5, constraint="positive")
    ...     def __call__(self, x):
    ...         return x**self.exponent
    >>> Power()(jnp.asarray([1.0, 4.0])).tolist()
    [1.0, 2.0]
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    kinds = {f.name: f.metadata.get("kind") for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unmarked = [name for name, kind in kinds.items() if kind is None]
    if unmarked:
        raise TypeError(f"{cls.__name__}: fields {unmarked} must be learnable(), buffer() or static()")
    return jax.tree_util.register_dataclass(
        cls,
        data_fields=[name for name, kind in kinds.items() if kind != "static"],
        meta_fields=[name for name, kind in kinds.items() if kind == "static"],
    )


@jax.jit
def called(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The operator's result, computed as one compiled program."""
    return op(*args, **kwargs)


def number_stays(old: Any, new: Any) -> Any:
    """The new value, as a number of Python where the old one was: an array in its place would be compiled for anew."""
    return float(new) if isinstance(old, float) else new


def fields_of_kind(op: Any, kind: str) -> Iterator[dataclasses.Field[Any]]:
    """The fields of an operator (class or instance) that are "learnable", "buffer" or "static"."""
    return (f for f in dataclasses.fields(op) if f.metadata["kind"] == kind)


def structural(op: Any) -> list[str]:
    """Names of the buffers that hold discrete structure, which is found anew."""
    return [f.name for f in fields_of_kind(op, "buffer") if f.metadata["structure"]]


def learnables(op: Any) -> dict[str, Constraint]:
    """Names of the learnable fields that hold a value, with their constraints."""
    return {
        f.name: CONSTRAINTS[f.metadata["constraint"]]
        for f in fields_of_kind(op, "learnable")
        if getattr(op, f.name) is not None
    }


def replace(op: T, **changes: Any) -> T:
    """A copy of the operator with some fields changed."""
    return dataclasses.replace(op, **changes)  # type: ignore[type-var]
