"""Which genes go with an output, and which it rests on."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from scdiffx._calls import analysis
from scdiffx._core.association import correlations, mean_slopes
from scdiffx._core.counts import matmul
from scdiffx._core.random import as_seed, one_rng
from scdiffx._core.runtime import one_blas_thread
from scdiffx._log import Timer
from scdiffx._program import Program
from scdiffx._slots import Obs, Obsm, Slot, Uns, Varm, X, available, write_all
from scdiffx._steps import Plan, _cast

if TYPE_CHECKING:
    from anndata import AnnData

_METHODS = ("correlation", "sensitivity", "gradient")
_FEWEST_CELLS = 5


@analysis
def attribution(
    adata: AnnData | Plan,
    target: str,
    *,
    column: int | str | None = None,
    groupby: str | None = None,
    groups: Sequence[str] | None = None,
    method: str = "correlation",
    n_probes: int = 16,
    layer: str | None = None,
    key_added: str | None = None,
    random_state: Any = None,
    copy: bool = False,
    rng: Any = None,
) -> AnnData | None:
    """Rank genes by how they go with an output, or by how much the output rests on them; per group of cells, signed.

    The output is any number of each cell: a pseudotime, a fate, a component, the probability of a cluster.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) that holds the target, or a plan that computes it. The plan is run, and the
        results are written to its AnnData; nothing else is.
    target
        Column of `obs`, or key of `obsm`. Cells where it is not finite are left out.
    column
        Which column of an `obsm` entry: a number, or a name where it is a data frame or holds fates.
    groupby
        Column of `obs`: one ranking for each of its groups. By default one of all cells, called "all".
    groups
        Which of the groups.
    method
        "correlation" for Pearson's, CellRank's statistic of lineage drivers: which genes go with the target.
        "sensitivity" and "gradient" need a plan, and say which measurements the target rests on, see Notes.
    n_probes
        Number of products with the transposed Jacobian that a gradient is estimated from.
    layer
        Expression: this layer rather than `X`; in a plan as its last step leaves it.
    key_added
        Key of `varm` and `uns`; by default "attribution", target and column (if any), joined by underscores.
    random_state, rng
        Seed of the probes; give one of the two. Default 0.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.varm["attribution_<target>" | key_added]` : DataFrame (genes)
        For each group "<group>_value", the attribution by `method`, and "<group>_qval"; "/" in names becomes "|".
        The q-value (Benjamini-Hochberg over genes) is that of the correlation, by Fisher's transformation. With other
        methods there is "<group>_correlation" too, so that it stands beside what it belongs to.
    `adata.uns["attribution_<target>" | key_added]` : dict
        `params`, and `groups`, their names.

    Raises
    ------
    KeyError
        If the target, a column, a group or the layer does not exist.
    TypeError
        If `adata` is neither an AnnData nor a plan, or the target does not hold numbers.
    ValueError
        If `method` is unknown or needs a plan, the target does not depend on the expression, a group has fewer than
        five cells with a finite target, or a number is out of range.

    Notes
    -----
    A *gradient* is the mean over the cells of a group, of those where the gene was found, of the derivative of a cell's
    target in its own expression of the gene, estimated from random probes (exact where cells do not depend on each
    other). Neighbours, components and whatever else a plan finds once are held, and so are the steps up to the last
    that writes the expression. Gradients are not drivers: they pass through principal components, which spread the
    credit over collinear genes, and are 0 for genes that were not selected. *Sensitivity* turns the gradient w into the
    pattern cov(x, x w) / sd(x) (Haufe et al.), the change of the linearised target per standard deviation of the gene.
    Take the correlation to rank drivers, and sensitivity to see what a result rests on.

    The q-values take the target as given, and cells as independent. Where the target was computed from the same counts
    they are too small: they rank, and are no error rate.

    References
    ----------
    Lange et al. (2022), CellRank for directed single-cell fate mapping. Haufe et al. (2014), On the interpretation of
    weight vectors of linear models in multivariate neuroimaging.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> sd.tl.attribution(adata, "S_score")
    >>> list(adata.varm["attribution_S_score"])
    ['all_value', 'all_qval']
    """
    plan = adata if isinstance(adata, Plan) else None
    data: Any = adata.adata if isinstance(adata, Plan) else adata
    if method not in _METHODS:
        raise ValueError(f"method={method!r} is unknown. Available: {list(_METHODS)}")
    if method != "correlation" and plan is None:
        raise ValueError(f"method={method!r} needs a plan that computes {target!r}: pass one from `sd.plan(adata)`")
    if n_probes < 1:
        raise ValueError(f"n_probes={n_probes!r} must be at least 1")
    seed = as_seed(one_rng(rng, random_state))
    names, member = groups_of(data, groupby, groups)
    timer = Timer(f"computing attribution of {target}")
    if plan is None:
        x, y = _cast_read(X(layer), data), _target(data, target, column)
        slopes = None
    else:
        x, y, slopes = _of_plan(plan, target, column, X(layer), member, method, n_probes, seed)
    table = _table(data, x, y, member, names, method, slopes)
    key = key_added if key_added is not None else result_key("attribution", target, column)
    params = {"target": target, "method": method, "random_state": seed}
    params |= {name: v for name, v in (("column", column), ("groupby", groupby), ("layer", layer)) if v is not None}
    written = data.copy() if copy else data
    write_all(written, {Varm(key): table, Uns(key): {"params": params, "groups": np.asarray(names, dtype=object)}})
    timer.done(f"{key!r} (adata.varm)")
    return written if copy else None


def result_key(prefix: str, target: str, column: int | str | None) -> str:
    """The key for what is said of a target; files hold no slashes in keys."""
    name = target if column is None else f"{target}_{column}"
    return f"{prefix}_{name}".replace("/", "|")


def groups_of(data: AnnData, groupby: str | None, groups: Sequence[str] | None) -> tuple[list[str], np.ndarray]:
    """Names of the groups, and which cells they have (cells, groups)."""
    if groupby is None:
        if groups is not None:
            raise ValueError(f"groups={groups!r} needs `groupby=`, the column of `adata.obs` they are in")
        return ["all"], np.ones((data.n_obs, 1))
    if groupby not in data.obs:
        raise KeyError(f"groupby={groupby!r} is not in `adata.obs`. Available: {available(data.obs)}")
    labels = data.obs[groupby].astype("category").cat.remove_unused_categories()
    known = [str(name) for name in labels.cat.categories]
    chosen = known if groups is None else [str(g) for g in ([groups] if isinstance(groups, str) else groups)]
    for name in chosen:
        if name not in known:
            raise KeyError(f"{name!r} is not a group of `adata.obs[{groupby!r}]`. Available: {available(known)}")
    codes = labels.cat.codes.to_numpy()
    return chosen, (codes[:, None] == np.array([known.index(name) for name in chosen])).astype(np.float64)


def _target(data: AnnData, target: str, column: int | str | None) -> np.ndarray:
    """The target of an AnnData (cells,)."""
    if target in data.obs and column is None:
        one = data.obs[target]
        if one.dtype.kind not in "fiub":
            raise TypeError(f"target={target!r}: the column holds {one.dtype}, but a target is a number")
        return np.asarray(one, np.float64)
    if target not in data.obsm:
        places = f"obs: {available(data.obs)}, obsm: {available(data.obsm.keys())}"
        raise KeyError(f"target={target!r} is not in the AnnData; {places}")
    values: Any = data.obsm[target]
    names = data.uns.get("fate", {}).get("names", []) if target == "lineages_fwd" else getattr(values, "columns", [])
    at = column_of(target, column, values.shape[1], [str(name) for name in names])
    return np.asarray(values, np.float64)[:, at]


def column_of(target: str, column: int | str | None, size: int, names: Sequence[str]) -> int:
    """Position of a column by number or name."""
    if column is None and size == 1:
        return 0
    if isinstance(column, str) and column in names:
        return list(names).index(column)
    if isinstance(column, int) and 0 <= column < size:
        return column
    raise KeyError(
        f"column={column!r} of target={target!r}: it has {size}. Available: {available(names or range(size))}"
    )


def _cast_read(slot: Slot, data: AnnData) -> Any:
    with jax.enable_x64(True):
        return _cast(slot.read(data), jnp.float64)


def _of_plan(
    plan: Plan,
    target: str,
    column: int | str | None,
    source: X,
    member: np.ndarray,
    method: str,
    n_probes: int,
    seed: int,
) -> tuple[Any, np.ndarray, np.ndarray | None]:
    """Expression and target as the plan computes them, and the mean gradients unless only correlations are wanted."""
    slot = plan.slot(target)
    if not isinstance(slot, Obs | Obsm):
        raise KeyError(f"target={target!r} is neither a column of `obs` nor an entry of `obsm` of the plan")
    if method == "correlation":
        _, inputs, values = plan.run()
        found = inputs | values
    else:
        program, found = Program.between(plan, source, slot)
    x = found[source] if source in found else source.read(plan.adata)
    y = found.get(slot)
    if y is None:
        value = _target(plan.adata, target, column)
    else:
        at = None if y.ndim == 1 else column_of(target, column, y.shape[1], slot.columns)
        value = np.asarray(y if at is None else y[:, at], np.float64)
    slopes = None if method == "correlation" else _slopes(program, source, slot, value, at, member, n_probes, seed)
    with jax.enable_x64(True):
        return _cast(x, jnp.float64), value, slopes


def _slopes(
    program: Program,
    source: X,
    slot: Slot,
    value: np.ndarray,
    column: int | None,
    member: np.ndarray,
    n_probes: int,
    seed: int,
) -> np.ndarray:
    x = program.frozen[source]
    finite = np.isfinite(value)
    signs = probes(len(value), n_probes, seed) * finite

    @jax.jit
    def run(ops: list[Any], frozen: dict[Slot, Any], member: Any, signs: Any) -> Any:
        def outputs(x: Any) -> Any:
            y = program.evaluate(ops, {**frozen, source: x})[slot]
            return y if column is None else y[:, column]

        return mean_slopes(outputs, frozen[source], member, signs)

    double = x.dtype == np.float64
    with jax.enable_x64(True) if double else contextlib.nullcontext(), one_blas_thread():
        arrays = (jnp.asarray(a, x.dtype) for a in (member * finite[:, None], signs))
        return np.asarray(run(program.ops, program.frozen, *arrays), np.float64)


def probes(cells: int, n: int, seed: int) -> np.ndarray:
    """Random signs (n, cells)."""
    return np.random.default_rng(seed).choice([-1.0, 1.0], (n, cells))


def _table(
    data: AnnData,
    x: Any,
    y: np.ndarray,
    member: np.ndarray,
    names: list[str],
    method: str,
    slopes: np.ndarray | None,
) -> Any:
    import pandas as pd
    from scipy import stats

    finite = np.isfinite(y)
    member = member * finite[:, None]
    sizes = member.sum(0)
    for name, size in zip(names, sizes, strict=True):
        if size < _FEWEST_CELLS:
            raise ValueError(
                f"group {name!r} has {size:.0f} cells with a finite target; at least {_FEWEST_CELLS} are needed"
            )
    everyone = np.repeat(np.where(finite, y, 0)[:, None], len(names), 1)
    with jax.enable_x64(True):
        correlation = np.asarray(_correlations(x, everyone, member).value)
        pattern = None
        if method == "sensitivity":
            linear = jax.jit(matmul)(x, jnp.asarray(slopes))
            found = _correlations(x, linear, member)
            pattern = np.asarray(found.value * found.spread)
    value = {"correlation": correlation, "gradient": slopes, "sensitivity": pattern}[method]
    z = np.arctanh(np.clip(correlation, -1 + 1e-15, 1 - 1e-15)) * np.sqrt(sizes - 3)
    columns: dict[str, np.ndarray] = {}
    for i, name in enumerate(names):
        safe = name.replace("/", "|")
        columns[f"{safe}_value"] = np.asarray(value)[:, i]
        if method != "correlation":
            columns[f"{safe}_correlation"] = correlation[:, i]
        columns[f"{safe}_qval"] = stats.false_discovery_control(2 * stats.norm.sf(np.abs(z[:, i])))
    return pd.DataFrame(columns, index=data.var_names.copy())


_correlations = jax.jit(correlations)
