"""Annotation after another AnnData: matching of genes, and checks that both were normalised alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from scdiffx import ops
from scdiffx._core.fields import replace
from scdiffx._log import warn
from scdiffx._slots import check_finite, matrix_of

if TYPE_CHECKING:
    from anndata import AnnData

_FEW = 0.5  # share of the model's genes below which their absence is reported
_ALIKE = 1.5  # ratio of typical totals up to which normalisations count as the same


def fitted_to(
    op: ops.LogisticAnnotation, reference: AnnData, codes: np.ndarray, layer: str | None, data: AnnData, seed: int
) -> ops.LogisticAnnotation:
    """The operator fitted to the labelled cells of a reference by the genes that `data` has too, in its order."""
    matrix = matrix_of(reference, layer)
    check_finite(matrix, reference.obs_names, reference.var_names)
    warn_if_counts(matrix, "reference")
    mine, theirs = matched(list(data.var_names), list(reference.var_names), "the reference")
    matrix = matrix[np.flatnonzero(codes >= 0)][:, theirs]
    compare_totals(matrix_of(data, layer)[:, mine], matrix)
    dense = not sp.issparse(matrix)
    x = jnp.asarray(matrix, jnp.float32) if dense else ops.Counts.from_scipy(matrix, np.float32)
    return placed(op.init(x, codes[codes >= 0], key=jax.random.key(seed)), mine, data.n_vars)


def matched(mine: list[str], theirs: list[str], what: str) -> tuple[np.ndarray, np.ndarray]:
    """Places of the common genes in both lists; warns where there are few, raises where there are none."""
    for names, whose in ((mine, "`adata`"), (theirs, what)):
        if len(set(names)) < len(names):
            raise ValueError(f"gene names of {whose} are not unique; call `.var_names_make_unique()` first")
    place = {name: i for i, name in enumerate(mine)}
    found = np.array([i for i, name in enumerate(theirs) if name in place], int)
    if not len(found):
        raise ValueError(
            f"`adata` and {what} have no gene in common: {mine[:3]} ... and {theirs[:3]} ... may be names of two kinds"
        )
    if len(found) < _FEW * len(theirs):
        warn(f"`adata` has {len(found)} of the {len(theirs)} genes of {what}: annotation will be less certain")
    return np.array([place[theirs[i]] for i in found], int), found


def placed(op: ops.LogisticAnnotation, at: np.ndarray, n_genes: int) -> ops.LogisticAnnotation:
    """The operator for matrices of more genes, in which its own are at these places."""
    assert op.weights is not None and op.standards is not None and op.spread is not None

    def spread_out(values: Any, otherwise: float) -> jax.Array:
        full = np.full((n_genes, *np.shape(values)[1:]), otherwise, np.float32)
        full[at] = values
        return jnp.asarray(full)

    mean, sd, *held_out = op.standards
    return replace(
        op,
        weights=spread_out(op.weights, 0),
        standards=type(op.standards)(spread_out(mean, 0), spread_out(sd, 1), *held_out),
        spread=op.spread._replace(genes=jnp.asarray(at[np.asarray(op.spread.genes)], jnp.int32)),
    )


def compare_totals(query: Any, reference: Any) -> None:
    """Warn where typical totals of the common genes differ, as they do where normalised to different targets."""
    mine, theirs = (_typical_total(matrix) for matrix in (query, reference))
    if not 1 / _ALIKE < mine / theirs < _ALIKE:
        warn(
            f"the common genes of a typical cell add up to {mine:.4g} in `adata` and {theirs:.4g} in the reference: "
            "normalise both to the same `target_sum`"
        )


def _typical_total(matrix: Any) -> float:
    totals = np.expm1(matrix).sum(1)
    return max(float(np.median(np.asarray(totals))), float(np.finfo(np.float32).tiny))


def warn_if_counts(matrix: Any, what: str) -> None:
    """Logarithms are no integers."""
    values = matrix.data if sp.issparse(matrix) else matrix
    if values.size and (values == np.rint(values)).all():
        warn(
            f"`{what}` holds integers: annotation expects logarithms, as `sd.pp.normalize_total` and `log1p` leave them"
        )
