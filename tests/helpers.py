"""Tools of the tests: finite differences, the size of what a JAX program holds, counts, what an AnnData holds."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy.sparse as sp
from jax.extend.core import ClosedJaxpr, Jaxpr

from scdiffx._core.counts import BLOCK_ROWS, Counts
from scdiffx._core.directed import Directed
from scdiffx._core.graph import Graph, Pattern, flip

# LLVM's optimisation takes half of the time to compile, and tests run what they compile only a few times.
QUICK = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, compiler_options=QUICK)
def called(op: Any, *args: Any) -> Any:
    """Return `op(*args)`, compiled once for all operators and inputs of one structure."""
    return op(*args)


_compiled: list[str] = []


def _listen(event: str, _: float, **said: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(said.get("fun_name", "unnamed"))


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the programs that are compiled inside, of those too that a folder of compiled programs holds."""
    found: list[str] = []
    before = len(_compiled)
    yield found
    found += _compiled[before:]


def directional_fd(
    f: Callable[[Any], Any], x: Any, direction: Any, steps: Sequence[float] = (1e-3, 1e-4, 1e-5)
) -> np.ndarray:
    """Central differences of the scalar function `f` at `x` along `direction`, one for each step.

    `x` and `direction` are arrays or pytrees of one structure. A derivative is trusted where the values agree over
    the steps: call this in float64 (the `x64` fixture), and away from points where a neighbour list changes.
    """

    def moved(a: Any, d: Any, t: float) -> Any:
        # By NumPy: JAX would compile a sum and a product for each shape.
        return jnp.asarray(np.asarray(a) + t * np.asarray(d), a.dtype) if isinstance(a, jax.Array) else a + t * d

    def at(t: float) -> float:
        return float(f(jax.tree.map(functools.partial(moved, t=t), x, direction)))

    return np.array([(at(step) - at(-step)) / (2 * step) for step in steps])


def random_direction(x: Any, seed: int = 0) -> Any:
    """Return standard normal numbers in the structure, the shapes and the dtypes of `x`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.standard_normal(np.shape(a)).astype(np.asarray(a).dtype), x)


def tree_vdot(a: Any, b: Any) -> float:
    """Return the inner product of two pytrees: a gradient and the direction it is compared along."""
    return float(sum(jax.tree.leaves(jax.tree.map(lambda x, y: np.vdot(np.asarray(x), np.asarray(y)), a, b))))


def largest_array(fn: Callable[..., Any], *args: Any) -> int:
    """Return the number of elements of the largest array that `fn(*args)` makes, in loops and branches too."""
    return largest_of(jax.make_jaxpr(fn)(*args))


def largest_of(closed: ClosedJaxpr) -> int:
    """The same of a program that has been traced."""
    return max((_size(v) for jaxpr in _walk(closed.jaxpr) for eqn in jaxpr.eqns for v in eqn.outvars), default=0)


def _walk(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    yield jaxpr
    for eqn in jaxpr.eqns:
        for inner in _jaxprs(list(eqn.params.values())):
            yield from _walk(inner)


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _jaxprs(item)


def _size(var: Any) -> int:
    return prod(getattr(var.aval, "shape", ()))


def float_leaves(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The floating arrays of a pytree, and the function that puts others in their places."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, x in enumerate(leaves) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]

    def rebuild(values: list[Any]) -> Any:
        new = list(leaves)
        for i, value in zip(places, values, strict=True):
            new[i] = value
        return jax.tree.unflatten(structure, new)

    return [leaves[i] for i in places], rebuild


def allowed_direction(x: Any, seed: int = 0) -> list[Any]:
    """A random direction for `float_leaves(x)` that keeps graphs symmetric and pads at 0."""
    rng = np.random.default_rng(seed)

    def one(part: Any) -> Any:
        if isinstance(part, Graph):
            step = jnp.asarray(rng.standard_normal(part.values.shape), part.dtype) * part.pattern.valid
            return part.with_values(step + flip(part.pattern, step))
        if isinstance(part, Counts):
            real = part.row < part.block_rows
            return part.with_data(jnp.where(real, jnp.asarray(rng.standard_normal(part.data.shape), part.dtype), 0))
        return jnp.asarray(rng.standard_normal(np.shape(part)), jnp.result_type(part)) if _floats(part) else part

    return float_leaves(jax.tree.map(one, x, is_leaf=_is_matrix))[0]


def _floats(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.floating))


def _is_matrix(x: Any) -> bool:
    return isinstance(x, Graph | Counts | Pattern)


def enlarged(tree: Any, sizes: Mapping[int, int], dtype: Any = np.float32) -> Any:
    """The shapes of `tree` with every axis of length `a` lengthened to `sizes[a]`; nothing is computed or stored.

    Graphs keep their width and their rows per cell, count matrices their density; arrays along the rows of a graph grow
    with it.
    """
    parts = [part for part in jax.tree.leaves(tree, is_leaf=_grows) if isinstance(part, Graph | Pattern | Directed)]
    patterns = [part.pattern if isinstance(part, Graph) else part for part in parts]
    lengths = {len(p.indices): _rows(p, sizes) for p in patterns} | dict(sizes)

    def shape(dims: Sequence[int], like: Any) -> jax.ShapeDtypeStruct:
        kind = jnp.result_type(like)
        kind = dtype if jnp.issubdtype(kind, jnp.floating) else np.int32 if kind == np.int64 else kind
        return jax.ShapeDtypeStruct(tuple(lengths.get(d, d) for d in dims), kind)

    def one(part: Any) -> Any:
        if isinstance(part, Graph):
            pattern = one(part.pattern)
            return Graph(pattern, jax.ShapeDtypeStruct(pattern.indices.shape, dtype))
        if isinstance(part, Pattern):
            n = part.n_cells
            rows, width = _rows(part, sizes), part.indices.shape[1]
            overflow = rows - sizes.get(n, n)
            as_int = jax.ShapeDtypeStruct((rows, width), np.int32)
            owner = jax.ShapeDtypeStruct((overflow,), np.int32)
            order = jax.ShapeDtypeStruct((sizes.get(n, n),), np.int32)
            return Pattern(as_int, as_int, owner, jax.ShapeDtypeStruct((rows, width), bool), order)
        if isinstance(part, Directed):
            arrays = (part.indices, part.owner, part.valid, part.values)
            return Directed(*(shape(a.shape, a) for a in arrays), sizes.get(part.n_cells, part.n_cells))
        if isinstance(part, Counts):
            n, genes = (sizes.get(d, d) for d in part.shape)
            stored = part.data.size * genes // (part.shape[0] * part.shape[1]) * BLOCK_ROWS
            blocks = (-(-n // BLOCK_ROWS), stored)
            return Counts(shape(blocks, part.data), shape(blocks, part.position), (n, genes), BLOCK_ROWS)
        return shape(np.shape(part), part)

    return jax.tree.map(one, tree, is_leaf=_grows)


def _grows(x: Any) -> bool:
    return _is_matrix(x) or isinstance(x, Directed)


def _rows(p: Pattern | Directed, sizes: Mapping[int, int]) -> int:
    """How many rows of slots a pattern of so many more cells has."""
    n = p.n_cells
    if isinstance(p, Directed):
        return -(-len(p.indices) * sizes.get(n, n) // (64 * n)) * 64
    return sizes.get(n, n) + round((len(p.indices) - n) * sizes.get(n, n) / n)


def megabytes_of(traced: jax.stages.Traced) -> float:
    """What XLA will allocate for intermediate results when it runs a program that has been traced."""
    compiled = traced.lower().compile(compiler_options=QUICK)
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def permuted(part: Any, order: np.ndarray) -> Any:
    """A graph or a count matrix with its cells in another order."""
    if isinstance(part, Graph):
        return Graph.from_scipy(part.to_scipy()[order][:, order], part.dtype)
    return part[order]


@functools.cache
def _pbmc_counts() -> ad.AnnData:
    import scanpy as sc

    source = sc.datasets.pbmc68k_reduced()
    values = sp.csr_matrix(source.raw.X, copy=True).astype(np.float64)
    np.expm1(values.data, out=values.data)
    # The smallest value of a cell is what normalisation made of one molecule.
    molecule = np.array([values.data[a:b].min() for a, b in zip(values.indptr[:-1], values.indptr[1:], strict=True)])
    counts = values.data / np.repeat(molecule, np.diff(values.indptr))
    values.data = np.round(counts)
    # The logarithms were stored with three decimals.
    assert np.abs(counts / values.data - 1).max() < 2e-3
    obs = pd.DataFrame({"cell_type": source.obs["bulk_labels"]}, index=source.obs_names)
    return ad.AnnData(values.astype(np.float32), obs=obs, var=pd.DataFrame(index=source.var_names))


def pbmc_counts(n_cells: int = 700, n_genes: int = 765) -> ad.AnnData:
    """Molecule counts of blood cells, at most 700 x 765, from the data that scanpy brings along; a fresh copy."""
    return _pbmc_counts()[:n_cells, :n_genes].copy()


def contents(adata: ad.AnnData) -> dict[str, Any]:
    """Everything an AnnData holds, by path ("obs/x", "uns/a/b"), as copies that later writes cannot reach."""
    found: dict[str, Any] = {"X": _copied(adata.X)}
    for where in ("obs", "var"):
        frame = getattr(adata, where)
        found[f"{where}_names"] = np.array(frame.index)
        found |= {f"{where}/{key}": frame[key].copy() for key in frame}
    for where in ("layers", "obsm", "varm", "obsp", "varp"):
        found |= {f"{where}/{key}": _copied(value) for key, value in getattr(adata, where).items() if key is not None}
    found |= dict(_nested("uns", adata.uns))
    return found


def _copied(x: Any) -> Any:
    return x.copy() if hasattr(x, "copy") else x


def _nested(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield path, "mapping"
        for key, inner in value.items():
            yield from _nested(f"{path}/{key}", inner)
    else:
        yield path, _copied(value)


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """The paths that were added, removed or given other values."""
    return {
        key for key in {*before, *after} if key not in before or key not in after or not same(before[key], after[key])
    }


def same(a: Any, b: Any, rtol: float = 0, atol: float = 0) -> bool:
    """Whether two values are equal in kind, dtype, shape and, up to the tolerances, numbers."""
    if sp.issparse(a) or sp.issparse(b):
        if type(a) is not type(b) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not np.isfinite(a.data).all() or not np.isfinite(b.data).all():
            return same(a.toarray(), b.toarray(), rtol, atol)
        difference = abs(a - b)
        return bool((difference.data <= atol + rtol * abs(a).max()).all()) if difference.nnz else True
    if isinstance(a, pd.DataFrame):
        return isinstance(b, pd.DataFrame) and list(a) == list(b) and all(same(a[c], b[c], rtol, atol) for c in a)
    if isinstance(a, pd.Series):
        if not isinstance(b, pd.Series) or a.dtype != b.dtype:
            return False
        a, b = (np.asarray(s.astype(str) if s.dtype.kind not in "fiub" else s) for s in (a, b))
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        a, b = np.asarray(a), np.asarray(b)
        if {a.dtype.kind, b.dtype.kind} <= set("OUT"):  # text: files decide in which of its dtypes it comes back
            return a.shape == b.shape and list(map(str, a.ravel())) == list(map(str, b.ravel()))
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if a.dtype.kind == "f":
            return bool(np.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True))
        return bool((a == b).all())
    return bool(a == b) and (type(a) is type(b) or {type(a), type(b)} <= {int, float, str, np.str_, bool, np.bool_})
