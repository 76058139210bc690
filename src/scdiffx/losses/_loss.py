"""A loss: terms with their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Loss"]


@dataclass(frozen=True)
class Loss:
    """A weighted sum of terms.

    Examples
    --------
    >>> import scdiffx as sd
    >>> both = sd.losses.compactness("X_pca", "leiden") + 0.1 * sd.losses.l1("gene_weight")
    >>> [(weight, term.output) for weight, term in both.terms]
    [(1.0, 'X_pca'), (0.1, 'gene_weight')]
    """

    terms: tuple[tuple[float, Any], ...]

    def __add__(self, other: Loss) -> Loss:
        if not isinstance(other, Loss):
            return NotImplemented
        return Loss(self.terms + other.terms)

    def __mul__(self, factor: float) -> Loss:
        if not isinstance(factor, int | float | np.floating):
            return NotImplemented
        return Loss(tuple((float(factor) * weight, term) for weight, term in self.terms))

    __rmul__ = __mul__
