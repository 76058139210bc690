"""Tools: scanpy's `sc.tl`, each step a differentiable operator."""

from scdiffx.tl._differential_distribution import differential_distribution
from scdiffx.tl._diffmap import diffmap
from scdiffx.tl._leiden import leiden
from scdiffx.tl._pseudotime import dpt, pseudotime
from scdiffx.tl._simulate import simulate
from scdiffx.tl._velocity import velocity

__all__ = ["differential_distribution", "diffmap", "dpt", "leiden", "pseudotime", "simulate", "velocity"]
