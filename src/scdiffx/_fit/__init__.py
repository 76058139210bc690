"""Joint optimisation of plans, and what it has to be compared with."""

from __future__ import annotations

from scdiffx._fit._controls import Grid, grid
from scdiffx._fit._fit import fit
from scdiffx._fit._plan import plan

__all__ = ["Grid", "fit", "grid", "plan"]
