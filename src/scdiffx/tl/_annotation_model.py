"""Models of annotation: made of labelled cells, kept in files, matched to the genes of other cells."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from scdiffx import ops
from scdiffx._core.fields import replace
from scdiffx._core.random import as_seed, one_rng
from scdiffx._log import warn
from scdiffx._slots import Labels, Obs, Obsm, available, check_finite, is_anndata, matrix_of
from scdiffx._steps import Plan, Write

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "SUSPICIOUS",
    "UNASSIGNED",
    "AnnotationModel",
    "annotation_model",
    "file_names",
    "known_labels",
    "labels_of",
    "named_types",
    "reference_model",
    "type_writes",
    "warn_if_counts",
]

FORMAT = 1
UNASSIGNED = "unassigned"
# A share of unlike cells so many times the expected one is not by chance: another batch or an unseen type.
SUSPICIOUS = 3
_FILES = ("annotation.json", "arrays.npz")
_FEW = 0.5  # share of the model's genes below which their absence is reported
_ALIKE = 1.5  # ratio of mean totals up to which normalisations count as the same


@dataclass(frozen=True)
class AnnotationModel:
    """What :func:`annotate` knows of labelled cells, to annotate others later.

    Attributes
    ----------
    op
        The fitted operator.
    names
        The types.
    genes
        The genes, in the order of the operator's.
    level
        Mean normalised value of each gene among the labelled cells, no logarithm (genes,).

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> model = sd.tl.annotation_model(adata, "phase", penalty=0.1, n_folds=2)
    >>> model.save("phases")
    >>> sd.tl.AnnotationModel.load("phases").names
    ['G1', 'G2M', 'S']
    """

    op: ops.LogisticAnnotation
    names: list[str]
    genes: list[str]
    level: np.ndarray

    def save(self, path: str | Path) -> None:
        """Write the model to a folder: `arrays.npz` and `annotation.json`. Nothing in it is code."""
        folder = Path(path)
        record = {"format": FORMAT, "names": self.names, "penalty": self.op.penalty, "n_folds": self.op.n_folds}
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.asarray(value) for name, value in _arrays(self.op).items()}
        arrays |= {"level": self.level, "genes": np.asarray(self.genes, dtype=str)}
        np.savez(folder / _FILES[1], **arrays)  # type: ignore[arg-type]
        (folder / _FILES[0]).write_text(json.dumps(record, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> AnnotationModel:
        """Read a model that `save` wrote."""
        folder = Path(path)
        for name in _FILES:
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder} holds no saved annotation model: {name} is missing")
        record = json.loads((folder / _FILES[0]).read_text())
        if record.get("format") != FORMAT:
            raise ValueError(f"{folder} has format {record.get('format')!r}; this version reads {FORMAT}")
        with np.load(folder / _FILES[1], allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        genes, names = arrays.pop("genes").tolist(), [str(name) for name in record["names"]]
        _check_arrays(arrays, len(genes), len(names), str(folder))
        level = arrays.pop("level")
        held = {name: jnp.asarray(value) for name, value in arrays.items()}
        op = ops.LogisticAnnotation(
            weights=held["weights"],
            bias=held["bias"],
            temperature=held["temperature"],
            standards=ops.Standards(*(held[name] for name in ops.Standards._fields)),
            spread=ops.Envelope(*(held[f"spread_{name}"] for name in ops.Envelope._fields)),
            penalty=float(record["penalty"]),
            n_folds=int(record["n_folds"]),
        )
        return cls(op, names, genes, level)


def _arrays(op: ops.LogisticAnnotation) -> dict[str, Any]:
    assert op.standards is not None and op.spread is not None
    learned = {name: getattr(op, name) for name in ("weights", "bias", "temperature")}
    return learned | op.standards._asdict() | {f"spread_{k}": v for k, v in op.spread._asdict().items()}


def _check_arrays(arrays: dict[str, np.ndarray], genes: int, types: int, where: str) -> None:
    projection = arrays.get("spread_projection", np.zeros((0, 0)))
    variable, comps = projection.shape if projection.ndim == 2 else (-1, -1)
    shapes: dict[str, tuple[int, ...]] = {
        "weights": (genes, types),
        "bias": (types,),
        **dict.fromkeys(("mean", "sd", "level"), (genes,)),
        **dict.fromkeys(("temperature", "accuracy", "calibration_error"), ()),
        "spread_genes": (variable,),
        "spread_projection": (variable, comps),
        "spread_centres": (types, comps),
        "spread_limit": (types,),
    }
    if set(arrays) != set(shapes):
        raise ValueError(f"{where}: the saved model holds {sorted(arrays)}, but needs {sorted(shapes)}")
    for name, shape in shapes.items():
        value, kind = arrays[name], "i" if name == "spread_genes" else "f"
        if value.shape != shape or value.dtype.kind != kind:
            raise ValueError(
                f"{where}: the saved {name!r} has shape {value.shape} and dtype {value.dtype}, but {genes} genes and "
                f"{types} types need {shape} and {'integers' if kind == 'i' else 'floats'}"
            )
        if name != "spread_limit" and not np.isfinite(value).all():
            raise ValueError(f"{where}: the saved {name!r} is not finite")
    at = arrays["spread_genes"]
    if len(at) and not (at.min() >= 0 and at.max() < genes):
        raise ValueError(f"{where}: the saved 'spread_genes' are no places among {genes} genes")
    if not ((arrays["sd"] > 0).all() and arrays["temperature"] > 0):
        raise ValueError(f"{where}: the saved 'sd' and 'temperature' must be greater than 0")


def annotation_model(
    reference: AnnData,
    labels_key: str,
    *,
    layer: str | None = None,
    penalty: float | None = None,
    n_folds: int = 3,
    random_state: Any = None,
    rng: Any = None,
) -> AnnotationModel:
    """Make the model of :func:`annotate` from labelled cells, to be saved, or used for several queries.

    Parameters
    ----------
    reference
        Annotated data (cells x genes) with logarithms of normalised values.
    labels_key
        Column of `obs` with the types; cells where it is missing do not count.
    layer
        Layer with the values, instead of `X`.
    penalty, n_folds, random_state, rng
        As in :func:`annotate`.

    Returns
    -------
    AnnotationModel
        Pass it to :func:`annotate` as `reference`, or the folder to which its `save` wrote it. Genes that a query does
        not have then count as average; a model that is made of `reference` itself is fitted without them.

    Raises
    ------
    KeyError
        If a column or layer does not exist.
    TypeError
        If `reference` is no AnnData.
    ValueError
        If there are fewer than two types, or a setting is not usable.

    Examples
    --------
    >>> import anndata as ad
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> cells = ad.AnnData(np.kron(np.eye(2), np.ones((20, 3))) + np.random.default_rng(0).random((40, 6)))
    >>> cells.obs["type"] = ["T"] * 20 + ["B"] * 20
    >>> sd.tl.annotation_model(cells, "type").names
    ['B', 'T']
    """
    if not is_anndata(reference):
        raise TypeError(f"`reference` must be an AnnData, got {type(reference).__name__}")
    check_fit(penalty, n_folds)
    op = ops.LogisticAnnotation(penalty=penalty, n_folds=n_folds)
    return _made(op, reference, labels_key, layer, None, as_seed(one_rng(rng, random_state)))


def check_fit(penalty: float | None, n_folds: int) -> None:
    """Raise on settings of a fit that cannot be."""
    if penalty is not None and not (penalty > 0 and np.isfinite(penalty)):
        raise ValueError(f"penalty={penalty!r} must be greater than 0")
    if n_folds < 2:
        raise ValueError(f"n_folds={n_folds!r} must be at least 2")


def _made(
    op: ops.LogisticAnnotation, reference: AnnData, labels_key: str | None, layer: str | None, genes: Any, seed: int
) -> AnnotationModel:
    """The model of a reference, by all of its genes or those at given places."""
    names, codes = labels_of(reference, labels_key, "reference")
    matrix = matrix_of(reference, layer)
    check_finite(matrix, reference.obs_names, reference.var_names)
    warn_if_counts(matrix, "reference")
    genes = np.arange(reference.n_vars) if genes is None else genes
    matrix = matrix[np.flatnonzero(codes >= 0)][:, genes]
    x = ops.Counts.from_scipy(matrix, np.float32) if sp.issparse(matrix) else jnp.asarray(matrix, jnp.float32)
    op = op.init(x, codes[codes >= 0], key=jax.random.key(seed))
    return AnnotationModel(op, names, list(reference.var_names[genes]), _level(matrix))


def reference_model(
    op: ops.LogisticAnnotation,
    reference: Any,
    labels_key: str | None,
    layer: str | None,
    adata: AnnData | Plan,
    seed: int,
) -> tuple[ops.LogisticAnnotation, list[str]]:
    """The operator of a reference or model for the genes of `adata` in their order, and the names of the types."""
    data = adata.adata if isinstance(adata, Plan) else adata
    if is_anndata(reference):
        if reference.n_vars == 0:
            raise ValueError("`reference` is empty: it has no genes")
        at = matched(list(data.var_names), list(reference.var_names), "the reference")[1]
        model = _made(op, reference, labels_key, layer, at, seed)
    elif labels_key is not None:
        raise ValueError(f"labels_key={labels_key!r} has no meaning beside a model, which has its labels")
    elif isinstance(reference, AnnotationModel):
        model = reference
    elif isinstance(reference, str | Path):
        model = AnnotationModel.load(reference)
    else:
        raise TypeError(f"reference is a {type(reference).__name__}: pass an AnnData, an AnnotationModel or its folder")
    mine, theirs = matched(list(data.var_names), model.genes, "the model", quiet=is_anndata(reference))
    if not isinstance(adata, Plan):  # what a plan will make of the matrix is not there yet
        _compare_totals(matrix_of(data, layer)[:, mine], float(model.level[theirs].sum()))
    return placed(replace(model.op, threshold=op.threshold), mine, theirs, data.n_vars), model.names


def labels_of(data: AnnData, labels_key: str | None, what: str) -> tuple[list[str], np.ndarray]:
    """The names of the types, sorted, and the number of each cell's; -1 where the label is missing."""
    if labels_key is None:
        raise ValueError(f"pass labels_key=, the column of `{what}.obs` with the types. It has {available(data.obs)}")
    if labels_key not in data.obs:
        raise KeyError(f"labels_key={labels_key!r} is not in `{what}.obs`. Available: {available(data.obs)}")
    column = data.obs[labels_key]
    missing = column.isna().to_numpy()
    text = column.astype(str).to_numpy(object)
    names = sorted(set(text[~missing]))
    if len(names) < 2:
        raise ValueError(f"labels_key={labels_key!r} names {len(names)} types in `{what}.obs`; at least two are needed")
    if UNASSIGNED in names:
        raise ValueError(f"labels_key={labels_key!r} has the type {UNASSIGNED!r}: set the label of such cells to NaN")
    if len(set(file_names(names))) < len(names):
        raise ValueError(
            f"labels_key={labels_key!r}: two types differ only by '/' for '|', which files cannot tell apart"
        )
    number = {name: i for i, name in enumerate(names)}
    return names, np.array([-1 if gone else number[t] for t, gone in zip(text, missing, strict=True)], np.int32)


def known_labels(data: AnnData, labels_key: str | None) -> tuple[list[str], Labels]:
    """As :func:`labels_of`, of cells that are annotated from each other: some must be without a label."""
    names, codes = labels_of(data, labels_key, "adata")
    if (codes >= 0).all():
        raise ValueError(
            f"every cell has a label in labels_key={labels_key!r}: pass `reference=`, or set the labels of the cells "
            "to annotate to NaN"
        )
    return names, Labels(codes)


def file_names(names: Iterable[str]) -> list[str]:
    """The names as files can hold them."""
    return [name.replace("/", "|") for name in names]


def type_writes(key: str, names: Iterable[str]) -> tuple[Write, ...]:
    """What every mode writes of its result: types, confidence, and probabilities in the order of the names."""
    return (
        Write(Obs(key), lambda op, result: result.types),
        Write(Obs(f"{key}_confidence"), lambda op, result: result.confidence, np.float32),
        Write(
            Obsm(f"{key}_probabilities", tuple(file_names(names)), frame=True),
            lambda op, result: result.probabilities,
            np.float32,
        ),
    )


def named_types(types: np.ndarray, names: list[str]) -> Any:
    """The types as categories, of which the last is that of unassigned cells (-1)."""
    import pandas as pd

    return pd.Categorical.from_codes(np.where(types < 0, len(names), types), [*names, UNASSIGNED])


def matched(mine: list[str], theirs: list[str], what: str, quiet: bool = False) -> tuple[np.ndarray, np.ndarray]:
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
    if len(found) < _FEW * len(theirs) and not quiet:
        warn(f"`adata` has {len(found)} of the {len(theirs)} genes of {what}: annotation will be less certain")
    return np.array([place[theirs[i]] for i in found], int), found


def placed(op: ops.LogisticAnnotation, at: np.ndarray, own: np.ndarray, n_genes: int) -> ops.LogisticAnnotation:
    """The operator for matrices of `n_genes` genes, where of its genes those that are there, `own`, are at `at`."""
    assert op.weights is not None and op.standards is not None and op.spread is not None

    def spread_out(values: Any, otherwise: float) -> jax.Array:
        full = np.full((n_genes, *np.shape(values)[1:]), otherwise, np.float32)
        full[at] = np.asarray(values)[own]
        return jnp.asarray(full)

    mean, sd, *held_out = op.standards
    place = np.full(op.weights.shape[0], -1)
    place[own] = at
    places = place[np.asarray(op.spread.genes)]
    kept = places >= 0
    return replace(
        op,
        weights=spread_out(op.weights, 0),
        standards=type(op.standards)(spread_out(mean, 0), spread_out(sd, 1), *held_out),
        spread=op.spread._replace(
            genes=jnp.asarray(places[kept], jnp.int32), projection=jnp.asarray(np.asarray(op.spread.projection)[kept])
        ),
    )


def _level(matrix: Any) -> np.ndarray:
    # Counts in place of logarithms are the user's mistake, who is told so: not a numerical accident.
    with np.errstate(over="ignore"):
        return np.asarray(np.expm1(matrix).mean(0), np.float32).ravel()


def _compare_totals(query: Any, theirs: float) -> None:
    """Warn where mean totals of the common genes differ, as they do where normalised to different targets."""
    mine, least = float(_level(query).sum()), float(np.finfo(np.float32).tiny)
    if not 1 / _ALIKE < max(mine, least) / max(theirs, least) < _ALIKE:
        warn(
            f"the common genes of a cell add up to {mine:.4g} on average in `adata` and {theirs:.4g} in the reference: "
            "normalise both to the same `target_sum`"
        )


def warn_if_counts(matrix: Any, what: str) -> None:
    """Logarithms are no integers."""
    values = matrix.data if sp.issparse(matrix) else matrix
    if values.size and (values == np.rint(values)).all():
        warn(
            f"`{what}` holds integers: annotation expects logarithms, as `sd.pp.normalize_total` and `log1p` leave them"
        )
