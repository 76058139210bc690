"""Cell types from marker genes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from scdiffx import ops
from scdiffx._core.fields import replace
from scdiffx._log import warn
from scdiffx._slots import (
    Obs,
    Single,
    Slot,
    Uns,
    X,
    available,
    check_batch,
    check_counts,
    is_anndata,
    matrix_of,
    warn_if_not_counts,
)
from scdiffx._steps import Plan, Step
from scdiffx.tl._annotation_model import SUSPICIOUS, UNASSIGNED, file_names, matched, named_types, type_writes

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["marker_step"]

_WHAT = "annotate(mode='cellassign')"
_STRAY = 0.05  # share of a query's counts in genes that the reference lacks from which size factors are off


def marker_step(
    adata: AnnData | Plan,
    *,
    markers: Any,
    reference: Any,
    layer: str | None,
    batch_key: str | None,
    size_factors: str | None,
    threshold: float,
    clusters: Slot | None,
    key_added: str,
    seed: int,
    params: dict[str, Any],
) -> Step:
    """The step of ``annotate(mode="cellassign")``."""
    data = adata.adata if isinstance(adata, Plan) else adata
    table = _table(markers)
    check_batch(data, batch_key)
    _check_sizes(data, size_factors, "adata")
    if not isinstance(adata, Plan):
        warn_if_not_counts(matrix_of(data, layer), _WHAT)
    if reference is None:
        counted = None if isinstance(adata, Plan) else matrix_of(data, layer)
        table = _present(table, data.var_names, counted, "adata")
    else:
        if batch_key is not None:
            raise ValueError(
                f"batch_key={batch_key!r} has no meaning beside a reference: of other batches nothing is known"
            )
        table = _present(table, data.var_names, None, "adata")
    op = ops.MarkerAnnotation(markers=_columns(table, data.var_names), threshold=threshold)
    if reference is not None:
        op, table = _of_reference(op, table, reference, adata, layer, size_factors, seed)
    params = params | ({} if batch_key is None else {"batch_key": batch_key})
    params |= {} if size_factors is None else {"size_factors": size_factors}
    return Step(
        "annotate",
        op,
        reads=(
            X(layer, counts=True),
            None if size_factors is None else Single(Obs(size_factors)),
            None if batch_key is None else Obs(batch_key, codes=True),
            clusters,
        ),
        writes=type_writes(key_added, table),
        message="annotating cells by their markers",
        notes=_notes(key_added, table, data.var_names, params, mapped=reference is not None),
        rng=seed,
    )


def _table(markers: Any) -> dict[str, list[str]]:
    """The markers of each type; that of no type, which has none, comes last and is called "unassigned"."""
    if markers is None:
        raise ValueError("mode='cellassign' needs markers=: a dictionary {type: [genes]} or a table, genes x types")
    if hasattr(markers, "columns") and hasattr(markers, "to_numpy"):
        found, unknown = _of_frame(markers)
    elif isinstance(markers, Mapping):
        found, unknown = {}, True
        for name, genes in markers.items():
            if isinstance(genes, str):
                raise TypeError(f"markers[{name!r}]={genes!r} must be a list of genes")
            found[str(name)] = list(dict.fromkeys(str(gene) for gene in genes))
        empty = [name for name, genes in found.items() if not genes]
        if empty:
            raise ValueError(f"markers name no gene for {empty}. Cells of no type need no entry in a dictionary")
    else:
        raise TypeError(f"markers is a {type(markers).__name__}: pass a dictionary {{type: [genes]}} or a DataFrame")
    if UNASSIGNED in found:
        raise ValueError(f"markers have genes for a type called {UNASSIGNED!r}: give it another name")
    if len(set(file_names(found))) < len(found):
        raise ValueError("two types of markers differ only by '/' for '|', which files cannot tell apart")
    return found | ({UNASSIGNED: []} if unknown else {})


def _of_frame(frame: Any) -> tuple[dict[str, list[str]], bool]:
    values = frame.to_numpy()
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise ValueError("markers must be a table of 0 and 1, genes x types, with the genes as its index")
    for what, names in (("genes", frame.index), ("types", frame.columns)):
        if not names.is_unique:
            raise ValueError(f"markers name {what} twice: {list(names[names.duplicated()])}")
    genes = frame.index.astype(str).to_numpy()
    found = {str(name): list(genes[values[:, i] == 1]) for i, name in enumerate(frame.columns)}
    empty = [name for name, own in found.items() if not own]
    if len(empty) > 1:
        raise ValueError(f"markers have no gene for {empty}: one column may be empty, that of cells of no type")
    return {name: own for name, own in found.items() if own}, bool(empty)


def _present(table: dict[str, list[str]], genes: Any, matrix: Any, what: str) -> dict[str, list[str]]:
    """The table without markers that are not there or, where a matrix is given, have no counts."""
    if not genes.is_unique:
        raise ValueError(f"gene names of `{what}` are not unique; call `.var_names_make_unique()` first")
    named = list(dict.fromkeys(gene for own in table.values() for gene in own))
    kept = {gene for gene in named if gene in genes}
    absent = [gene for gene in named if gene not in kept]
    silent: list[str] = []
    if matrix is not None and kept:
        at = sorted(kept)
        totals = np.asarray(matrix[:, genes.get_indexer(at)].sum(0)).ravel()
        silent = [gene for gene, total in zip(at, totals, strict=True) if total == 0]
        kept -= set(silent)
    lost = [name for name, own in table.items() if own and not kept & set(own)]
    if lost:
        raise ValueError(f"no marker of {lost} is in `{what}` with counts; its genes are {available(genes)}")
    for missing, why in ((absent, f"not in `{what}.var_names`"), (silent, f"without a count in `{what}`")):
        if missing:
            warn(f"markers {missing} are {why} and are left out")
    place = {gene: int(at) for gene, at in zip(named, genes.get_indexer(named), strict=True)}
    left = {name: sorted((gene for gene in own if gene in kept), key=place.__getitem__) for name, own in table.items()}
    _check_different(left)
    return left


def _check_different(table: dict[str, list[str]]) -> None:
    if sum(bool(own) for own in table.values()) < 2:
        raise ValueError(f"markers name {sum(bool(own) for own in table.values())} types; at least two are needed")
    seen: dict[frozenset[str], str] = {}
    for name, own in table.items():
        other = seen.setdefault(frozenset(own), name)
        if other != name:
            raise ValueError(f"markers of {other!r} and {name!r} are the same: {own}")


def _columns(table: dict[str, list[str]], genes: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i) for i in genes.get_indexer(own)) for own in table.values())


def _check_sizes(data: AnnData, size_factors: str | None, what: str) -> None:
    if size_factors is None:
        return
    if size_factors not in data.obs:
        raise KeyError(f"size_factors={size_factors!r} is not in `{what}.obs`. Available: {available(data.obs)}")
    column = data.obs[size_factors]
    if column.dtype.kind not in "fiu" or not (np.isfinite(column) & (column > 0)).all():
        raise ValueError(f"size_factors={size_factors!r} must be numbers greater than 0 for all cells of `{what}`")


def _of_reference(
    op: ops.MarkerAnnotation,
    table: dict[str, list[str]],
    reference: Any,
    adata: AnnData | Plan,
    layer: str | None,
    size_factors: str | None,
    seed: int,
) -> tuple[ops.MarkerAnnotation, dict[str, list[str]]]:
    """The operator fitted to the cells of the reference, by the genes of both, for the columns of `adata`."""
    if not is_anndata(reference):
        raise TypeError(f"reference is a {type(reference).__name__}: with mode='cellassign' pass an AnnData")
    data = adata.adata if isinstance(adata, Plan) else adata
    _check_sizes(reference, size_factors, "reference")
    matrix = matrix_of(reference, layer)
    check_counts(matrix, reference.obs_names, reference.var_names)
    warn_if_not_counts(matrix, f"the reference of {_WHAT}")
    kept = _present(table, reference.var_names, matrix, "reference")
    table = {name: [gene for gene in own if gene in kept[name]] for name, own in table.items()}
    mine, theirs = matched(list(data.var_names), list(reference.var_names), "the reference")
    # In the order of `adata`: then the fitted arrays are in the order of its columns.
    mine, theirs = np.sort(mine), theirs[np.argsort(mine)]
    if not isinstance(adata, Plan) and size_factors is None:
        counts = np.asarray(matrix_of(data, layer).sum(0), np.float64).ravel()
        stray = 1 - counts[mine].sum() / max(counts.sum(), 1)
        if stray > _STRAY:
            warn(
                f"{stray:.0%} of the counts of `adata` are of genes that the reference lacks: total counts are not "
                "comparable; keep the genes of both, or pass size_factors="
            )
    matrix = matrix[:, theirs]
    x = ops.Counts.from_scipy(matrix, np.float32) if sp.issparse(matrix) else jnp.asarray(matrix, jnp.float32)
    size = None if size_factors is None else jnp.asarray(reference.obs[size_factors].to_numpy(np.float32))
    op = replace(op, markers=_columns(table, reference.var_names[theirs])).init(x, size, key=jax.random.key(seed))
    return replace(op, markers=_columns(table, data.var_names)), table


def _folds(table: dict[str, list[str]], op: ops.MarkerAnnotation, genes: Any) -> Any:
    """Log folds as a table of genes and types, 0 where the gene is no marker of the type."""
    import pandas as pd

    named = sorted({gene for own in table.values() for gene in own}, key=list(genes).index)
    frame = pd.DataFrame(0.0, index=named, columns=file_names(table))
    left = iter(np.asarray(op.log_folds, np.float64))
    for name, own in zip(frame, table.values(), strict=True):
        for gene in own:
            frame.loc[gene, name] = next(left)
    return frame


def _notes(key: str, table: dict[str, list[str]], genes: Any, params: dict[str, Any], mapped: bool) -> Any:
    names = [name for name, own in table.items() if own]

    def notes(op: ops.MarkerAnnotation, result: ops.MarkerAnnotationResult, args: Any) -> Mapping[Slot, Any]:
        assert op.fit is not None and op.log_folds is not None and op.proportions is not None
        types = np.asarray(result.types)
        entry = {
            "params": params,
            "names": np.asarray(names, dtype=object),
            "log_folds": _folds(table, op, genes),
            "proportions": np.asarray(op.proportions, np.float64),
            "log_likelihood": float(np.asarray(result.log_likelihood, np.float64).sum()),
            "converged": bool(op.fit.converged),
            "unassigned": float((types < 0).mean()),
        }
        if mapped:
            unlike = entry["unlike"] = float(np.asarray(result.unlike).mean())
            expected = 1 - ops.MarkerAnnotation.INSIDE
            if unlike > SUSPICIOUS * expected:
                warn(
                    f"{unlike:.0%} of the cells have less likely counts than the reference's of their depth, where "
                    f"{expected:.0%} are expected: the reference may lack a type, or be of another batch"
                )
        return {Obs(key): named_types(types, names), Uns(key): entry}

    return notes
