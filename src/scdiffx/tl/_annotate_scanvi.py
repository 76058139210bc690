"""Cell types from few labelled cells and all others, by a semi-supervised autoencoder of counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from scdiffx import ops
from scdiffx._core.fields import replace
from scdiffx._core.random import as_key
from scdiffx._log import settings, warn
from scdiffx._slots import (
    Obs,
    Obsm,
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
from scdiffx._steps import Plan, Step, Write
from scdiffx.tl._annotation_model import SUSPICIOUS, known_labels, labels_of, matched, named_types, type_writes

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["scanvi_step"]


def scanvi_step(
    adata: AnnData | Plan,
    *,
    labels_key: str | None,
    reference: Any,
    layer: str | None,
    batch_key: str | None,
    n_latent: int | None,
    max_epochs: int | None,
    threshold: float,
    n_folds: int,
    clusters: Slot | None,
    key_added: str,
    seed: int,
    params: dict[str, Any],
) -> Step:
    """The step of ``annotate(mode="scanvi")``."""
    data = adata.adata if isinstance(adata, Plan) else adata
    for name, value in {"n_latent": n_latent, "max_epochs": max_epochs}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r} must be at least 1")
    check_batch(data, batch_key)
    n_latent = 10 if n_latent is None else n_latent
    shown = settings.verbosity >= 2
    op = ops.SemiSupervisedVAE(
        vae=ops.VAE(n_latent=n_latent, training=ops.Training(max_epochs=max_epochs, progress=shown)),
        threshold=threshold,
        training=ops.SemiSupervisedTraining(n_folds=n_folds, progress=shown),
    )
    labels = None
    if reference is None:
        names, labels = known_labels(data, labels_key)
    elif isinstance(adata, Plan):
        raise ValueError(
            "mode='scanvi' takes no `reference` in a plan: its networks are trained on both together, so join the "
            "cells, with the labels of `adata` NaN"
        )
    if not isinstance(adata, Plan):
        warn_if_not_counts(matrix_of(data, layer), "annotate(mode='scanvi')")
    if reference is not None:
        op, names = _joint(op, data, reference, labels_key, layer, batch_key, seed)
    params = params | {"n_latent": n_latent} | ({} if batch_key is None else {"batch_key": batch_key})
    latent = "X_scanvi" if key_added == "annotation" else f"X_{key_added}"
    return Step(
        "annotate",
        op,
        reads=(X(layer, counts=True), None if batch_key is None else Obs(batch_key, codes=True), labels, clusters),
        writes=(
            *type_writes(key_added, names),
            Write(Obsm(latent), lambda op, result: result.latent, np.float32),
        ),
        message=f"training a semi-supervised autoencoder\n    with n_latent={n_latent}",
        notes=_notes(key_added, names, params),
        rng=seed,
    )


def _joint(
    op: ops.SemiSupervisedVAE,
    data: AnnData,
    reference: Any,
    labels_key: str | None,
    layer: str | None,
    batch_key: str | None,
    seed: int,
) -> tuple[ops.SemiSupervisedVAE, list[str]]:
    """The operator trained on the labelled cells of the reference and all of `data`, and the names of the types."""
    if not is_anndata(reference):
        raise TypeError(
            f"reference is a {type(reference).__name__}: mode='scanvi' trains on its cells: pass an AnnData"
        )
    names, codes = labels_of(reference, labels_key, "reference")
    if batch_key is not None and batch_key not in reference.obs:
        raise KeyError(f"batch_key={batch_key!r} is not in `reference.obs`. Available: {available(reference.obs)}")
    check_batch(reference, batch_key)
    parts = []
    for part in (reference, data):
        matrix = matrix_of(part, layer)
        check_counts(matrix, part.obs_names, part.var_names)
        parts.append(sp.csr_matrix(matrix))
    warn_if_not_counts(parts[0], "annotate(mode='scanvi')")
    mine, theirs = matched(list(data.var_names), list(reference.var_names), "the reference")
    known = np.flatnonzero(codes >= 0)
    both = sp.vstack([parts[0][known][:, theirs], parts[1][:, mine]]).tocsr()
    batch = _sources(reference, data, batch_key, known)
    labels = np.concatenate([codes[known], np.full(data.n_obs, -1, np.int32)])
    op = op.init(ops.Counts.from_scipy(both, np.float32), jnp.asarray(batch), labels, key=as_key(seed))
    return replace(op, genes=jnp.asarray(mine, jnp.int32)), names


def _sources(reference: AnnData, data: AnnData, batch_key: str | None, known: np.ndarray) -> np.ndarray:
    """A number for each batch of the reference and of the query: the same name in both is not the same batch."""
    if batch_key is None:
        return np.repeat(np.array([0, 1], np.int32), [len(known), data.n_obs])
    columns = [part.obs[batch_key].astype(str).to_numpy() for part in (reference, data)]
    first, second = (np.unique(column, return_inverse=True)[1] for column in (columns[0][known], columns[1]))
    return np.concatenate([first, second + first.max() + 1]).astype(np.int32)


def _notes(key: str, names: list[str], params: dict[str, Any]) -> Any:
    def notes(
        op: ops.SemiSupervisedVAE, result: ops.SemiSupervisedVAEResult, args: tuple[Any, ...]
    ) -> Mapping[Slot, Any]:
        types = np.asarray(result.types)
        query = np.ones(len(types), bool) if args[2] is None else np.asarray(args[2]) < 0
        unlike = float((np.asarray(result.distance)[query] > 1).mean())
        expected = 1 - ops.LogisticAnnotation.INSIDE
        if unlike > SUSPICIOUS * expected:
            warn(
                f"{unlike:.0%} of the cells are unlike the labelled cells of their type, where {expected:.0%} are "
                "expected: the labels may lack a type, or the cells be of another batch"
            )
        entry: dict[str, Any] = {
            "params": params,
            "names": np.asarray(names, dtype=object),
            "temperature": float(np.asarray(op.temperature)),
            "accuracy": float(np.asarray(op.around.accuracy)),
            "calibration_error": float(np.asarray(op.around.calibration_error)),
            "unlike": unlike,
            "unassigned": float((types[query] < 0).mean()),
        }
        if op.history is not None:
            entry["history"] = {name: np.asarray(values, np.float64) for name, values in op.history.items()}
        return {Obs(key): named_types(types, names), Uns(key): entry}

    return notes
