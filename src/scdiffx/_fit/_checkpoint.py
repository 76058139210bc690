"""The state of an unfinished fit in a folder, so that another process can go on with it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Checkpoint"]


class Checkpoint:
    """Saves and restores a pytree of arrays beside a record; refuses the state of another fit."""

    def __init__(self, folder: str | Path, identity: str) -> None:
        self.folder = Path(folder)
        self.identity = hashlib.sha256(identity.encode()).hexdigest()

    def save(self, arrays: Any, record: dict[str, Any]) -> None:
        """Write both; the record, which is written last, says which arrays belong to it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(arrays))}
        name = f"state-{record['step']}.npz"
        self._replaced(name, lambda path: np.savez(path, **leaves))  # type: ignore[arg-type]
        text = json.dumps(record | {"identity": self.identity, "arrays": name})
        self._replaced("state.json", lambda path: path.write_text(text))
        for old in self.folder.glob("state-*.npz"):
            if old.name != name:
                old.unlink()

    def _replaced(self, name: str, write: Any) -> None:
        unfinished = self.folder / f"unfinished-{name}"
        write(unfinished)
        unfinished.replace(self.folder / name)

    def load(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """What was saved, in the structure of `like`; None where nothing was."""
        path = self.folder / "state.json"
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        if record.get("identity") != self.identity:
            raise ValueError(
                f"checkpoint={str(self.folder)!r} holds the state of another fit: other data, plan, loss or settings. "
                "Remove the folder, or name another"
            )
        leaves, tree = jax.tree.flatten(like)
        with np.load(self.folder / record["arrays"], allow_pickle=False) as stored:
            saved = [stored[str(i)] for i in range(len(stored.files))]
        if [np.shape(a) for a in leaves] != [a.shape for a in saved]:
            raise ValueError(f"checkpoint={str(self.folder)!r} holds arrays of other shapes: remove the folder")
        found = [jnp.asarray(a, jnp.asarray(old).dtype) for a, old in zip(saved, leaves, strict=True)]
        return jax.tree.unflatten(tree, found), record
