"""An operator of one's own as a step, on an AnnData or in a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scdiffx._calls import public
from scdiffx._slots import check_shape, slot_at
from scdiffx._steps import Plan, Step, Write, apply

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["step"]


@public
def step(
    adata: AnnData | Plan,
    op: Any,
    *,
    reads: str | Sequence[str],
    writes: str | Mapping[str, str],
    name: str | None = None,
    rng: Any = 0,
    copy: bool = False,
) -> AnnData | None:
    """Run an operator of your own on an AnnData, or make it a step of a plan.

    In a plan it is a step as any other: fits move its learnables, `sd.grid` tries others in its place, and what was
    fitted is applied to new cells. Operators are code, which no file holds: such a fit cannot be saved, and
    ``plan.from_history`` asks for the call again.

    A place is "X", or one of "layers", "obs", "var", "obsm", "varm" and "obsp" with a key: "obsm/X_pca". An operator
    reads a sparse matrix as :class:`ops.Counts`, a graph as :class:`ops.Graph`, categories as codes (-1 is missing),
    and all else as an array.

    Parameters
    ----------
    adata
        Annotated data, or a plan.
    op
        An instance of a class made by ``sd.ops.operator``, whose call is pure.
    reads
        The places that the operator is called with, in order; one alone needs no list.
    writes
        The place of the result or, where that is a named tuple, places with the fields that go there.
    name
        Name of the step in a plan, and so of its parameters (``"name.field"``). Default: that of the class in lower
        case.
    rng
        Seed of the key that the operator's `init`, if it has one, is called with.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets what `writes` says.

    Raises
    ------
    TypeError
        If `op` is no operator.
    ValueError
        If a place is none, the result lacks a field, or its shape is not that of its place.
    KeyError
        If a place that is read is empty.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import scdiffx as sd
    >>> @sd.ops.operator
    ... class Power:
    ...     exponent: float = sd.ops.learnable(default=0.5, constraint="positive")
    ...
    ...     def __call__(self, x):
    ...         return jnp.abs(x) ** self.exponent
    >>> adata = sd.datasets.pbmc68k_counts()[:100].copy()
    >>> sd.pp.pca(adata, n_comps=4)
    >>> sd.step(adata, Power(), reads="obsm/X_pca", writes="obsm/X_power")
    >>> adata.obsm["X_power"].shape
    (100, 4)
    """
    if isinstance(op, type) or not (dataclasses.is_dataclass(op) and callable(op)):
        raise TypeError(f"op must be an instance of a class made by `sd.ops.operator`, got {op!r}")
    data = adata.adata if isinstance(adata, Plan) else adata
    sources = tuple(slot_at(place, "reads") for place in ([reads] if isinstance(reads, str) else reads))
    fields = {writes: None} if isinstance(writes, str) else dict(writes)
    slots = {slot_at(place, "writes"): field for place, field in fields.items()}

    def check(op: Any, result: Any) -> None:
        for slot, field in slots.items():
            check_shape(data, slot, _part(result, field))

    made = Step(
        type(op).__name__.lower() if name is None else name,
        op,
        reads=sources,
        writes=tuple(Write(slot, _taken(field)) for slot, field in slots.items()),
        check=check,
        rng=rng,
    )
    return apply(adata, made, copy=copy)


def _taken(field: str | None) -> Callable[[Any, Any], Any]:
    return lambda op, result: _part(result, field)


def _part(result: Any, field: str | None) -> Any:
    if field is None:
        return result
    if field not in (known := getattr(result, "_fields", ())):
        raise ValueError(f"writes: the result has no field {field!r}. Available: {list(known)}")
    return getattr(result, field)
