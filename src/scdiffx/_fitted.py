"""What a fit returns: the parameters, how they were found, and the plan to apply them with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scdiffx._calls import replay
from scdiffx._core.fields import fields_of_kind, learnables, number_stays, replace
from scdiffx._slots import restored, tabulated
from scdiffx._steps import Plan, initialised

__all__ = ["FIT", "Fitted", "flat", "kept"]

FORMAT = 1
FIT = "Fitted.apply"  # the name of an applied fit in the history


@dataclass
class Fitted:
    """A fitted plan.

    Attributes
    ----------
    params
        The parameters by name ("step.field"), as the operators use them.
    losses
        Loss before and after: keys "train_before", "train_after", and the same with "holdout" and "test" where there
        are such cells or losses.
    adopted
        Whether the fitted parameters won on the held-out cells (without a holdout: on the training cells). If not,
        `params` are the defaults.
    history
        Lists "step", "train" and, with a holdout, "holdout".
    predictor
        The loss of a prediction of the same labels from the unfitted plan, by part, where the loss has labels.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> plan = sd.plan(adata)
    >>> sd.pp.pca(plan, n_comps=5)
    >>> loss = sd.losses.cross_entropy("X_pca", "bulk_labels")
    >>> fitted = sd.fit(plan, loss, n_steps=3, progress=False)
    >>> fitted.apply(adata)
    >>> adata.obsm["X_pca"].shape
    (700, 5)
    >>> fitted.save("fitted")
    >>> sorted(sd.Fitted.load("fitted").params)
    ['pca.scale', 'pca.shift']
    """

    calls: list[tuple[str, dict[str, Any]]]
    params: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]
    losses: dict[str, float]
    adopted: bool
    history: dict[str, list[float]]
    genes: list[str]
    predictor: dict[str, float] = field(default_factory=dict)
    _plan: Plan | None = field(default=None, repr=False)

    def plan(self, adata: Any) -> Plan:
        """The plan on an AnnData: the one it was fitted on, or a new one with the same genes."""
        if self._plan is not None and adata is self._plan.adata:
            return self._plan
        if list(adata.var_names) != self.genes:
            missing = sorted(set(self.genes) - set(adata.var_names))[:5]
            raise ValueError(
                f"`adata` must have the {len(self.genes)} genes of the fit in their order; it has {adata.n_vars}"
                + (f", without {missing}" if missing else "")
            )
        return replay(self.calls, adata)

    def apply(self, adata: Any = None, *, copy: bool = False) -> Any:
        """Run the fitted plan and write its keys, on the AnnData of the fit or on new cells with the same genes.

        What was estimated once (targets, gene means, components, thresholds) stays; neighbours are searched among the
        cells given, and soft gene weights compare their variability with the thresholds of the fit.

        Returns
        -------
        None, or the copy with ``copy=True``.
        """
        if adata is None:
            if self._plan is None:
                raise ValueError("this fit was loaded from a file: pass the AnnData to apply it to")
            adata = self._plan.adata
        target = self.plan(adata)
        names = iter([step.name for step in target.steps])

        def prepare(op: Any, args: tuple[Any, ...], key: Any) -> Any:
            name = next(names)
            return self._filled(name, initialised(self._with_networks(name, op), args, key))

        # One entry of the history: the calls alone would not give these values again.
        called = (FIT, {"calls": [list(call) for call in self.calls], "adopted": self.adopted})
        return target.apply(prepare=prepare, copy=copy, called=[called])

    def _with_networks(self, name: str, op: Any) -> Any:
        """The operator with its fitted networks, so that `init` does not train others first.

        Such an `init` does nothing, so what it would have estimated beside the networks is put in place as well.
        """
        trained: dict[str, Any] = {}
        for f in fields_of_kind(op, "learnable"):
            found = _completed(self.params, f"{name}.{f.name}", getattr(op, f.name))
            trained |= {f.name: found} if isinstance(found, dict) and getattr(op, f.name) is None else {}
        if not trained:
            return op
        rest: dict[str, Any] = {}
        for stored, kind in ((self.params, "learnable"), (self.buffers, "buffer")):
            for f in fields_of_kind(op, kind):
                found = _completed(stored, f"{name}.{f.name}", getattr(op, f.name))
                rest |= {} if found is None else {f.name: found}
        return replace(op, **rest | trained)

    def _filled(self, name: str, op: Any) -> Any:
        """The operator with the fitted parameters and the statistics of the fit."""
        changes: dict[str, Any] = {}
        for stored, fields in ((self.params, learnables(op)), (self.buffers, kept(op))):
            for f in fields:
                flat, tree = jax.tree_util.tree_flatten_with_path(getattr(op, f))
                keys = [f"{name}.{f}{jax.tree_util.keystr(path)}" for path, _ in flat]
                if all(key in stored for key in keys) and keys:
                    leaves = [_like(stored[key], old, key) for key, (_, old) in zip(keys, flat, strict=True)]
                    changes[f] = jax.tree_util.tree_unflatten(tree, leaves)
        return replace(op, **changes)

    def report(self, grid: Any = None) -> Any:
        """The losses of the fit beside those of its controls.

        Parameters
        ----------
        grid
            From `sd.grid` on the same plan, loss and split: classical settings, the best of them by the held-out part.

        Returns
        -------
        pandas.DataFrame
            A row each for the frozen defaults, the fit (whether adopted or not), the grid where given, and the direct
            predictor where the loss has labels; a column for each of "train", "holdout" and "test". Choose by the
            second, quote the third.
        """
        import pandas as pd

        parts = [name for name in ("train", "holdout", "test") if f"{name}_before" in self.losses]
        rows = {
            "frozen defaults": {name: self.losses[f"{name}_before"] for name in parts},
            f"fit ({'adopted' if self.adopted else 'not adopted'})": {
                name: self.losses[f"{name}_after"] for name in parts
            },
        }
        if grid is not None:
            rows[f"grid of {len(grid.table)}"] = grid.losses
        if self.predictor:
            rows["direct predictor"] = self.predictor
        return pd.DataFrame(rows).T.reindex(columns=parts)

    def save(self, path: str | Path) -> None:
        """Write the fit to a folder: `arrays.npz` and `fit.json`. Nothing in it is code."""
        folder = Path(path)
        record = {
            "format": FORMAT,
            "calls": self.calls,
            "losses": self.losses,
            "adopted": self.adopted,
            "history": self.history,
            "predictor": self.predictor,
        }
        try:
            text = json.dumps(record, indent=1, default=tabulated)
        except TypeError as error:
            raise ValueError(f"the plan has an argument that cannot be saved: {error}") from None
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"param/{k}": v for k, v in self.params.items()} | {f"buffer/{k}": v for k, v in self.buffers.items()}
        arrays["genes"] = np.asarray(self.genes, dtype=str)
        np.savez(folder / "arrays.npz", **arrays)  # type: ignore[arg-type]
        (folder / "fit.json").write_text(text)

    @classmethod
    def load(cls, path: str | Path) -> Fitted:
        """Read a fit that `save` wrote; `apply` it to an AnnData with the same genes."""
        folder = Path(path)
        for name in ("fit.json", "arrays.npz"):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder} holds no saved fit: {name} is missing")
        record = json.loads((folder / "fit.json").read_text(), object_hook=restored)
        if record.get("format") != FORMAT:
            raise ValueError(f"{folder} has format {record.get('format')!r}; this version reads {FORMAT}")
        with np.load(folder / "arrays.npz", allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        genes = arrays.pop("genes").tolist()
        params = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
        buffers = {k.removeprefix("buffer/"): v for k, v in arrays.items() if k.startswith("buffer/")}
        calls = [(name, dict(arguments)) for name, arguments in record["calls"]]
        losses, adopted, history = (record[name] for name in ("losses", "adopted", "history"))
        return cls(calls, params, buffers, losses, adopted, history, genes, record.get("predictor", {}))


def _completed(stored: dict[str, np.ndarray], key: str, value: Any) -> Any:
    """The value with what was stored in place of None: an array, a network, or parts of a tuple or an operator."""
    if value is None:
        if key in stored:
            return jnp.asarray(stored[key])
        start = f"{key}['"
        return {k[len(start) : -2]: jnp.asarray(v) for k, v in stored.items() if k.startswith(start)} or None
    if hasattr(value, "_fields"):
        return value._replace(**{f: _completed(stored, f"{key}.{f}", getattr(value, f)) for f in value._fields})
    if is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for kind in ("learnable", "buffer") for f in fields_of_kind(value, kind)]
        return replace(value, **{f: _completed(stored, f"{key}.{f}", getattr(value, f)) for f in fields})
    return value


def _like(saved: np.ndarray, old: Any, key: str) -> Any:
    if np.shape(old) != saved.shape:
        raise ValueError(f"the saved {key!r} has shape {saved.shape}, but this plan needs {np.shape(old)}")
    return number_stays(old, jnp.asarray(saved))


def flat(plan: Plan, ops: list[Any], names: Callable[[Any], Iterable[str]] | None = None) -> dict[str, np.ndarray]:
    """Arrays by "step.field", of buffers unless `names` says; those of a network by "step.field['name']"."""
    found = {}
    for step, op in zip(plan.steps, ops, strict=True):
        for name in (kept if names is None else names)(op):
            for path, leaf in jax.tree_util.tree_flatten_with_path(getattr(op, name))[0]:
                found[f"{step.name}.{name}{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    return found


def kept(op: Any) -> list[str]:
    """Buffers that are estimated once."""
    return [
        f.name for f in fields_of_kind(op, "buffer") if not f.metadata["structure"] and getattr(op, f.name) is not None
    ]
