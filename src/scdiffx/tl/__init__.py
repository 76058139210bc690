"""Tools: scanpy's `sc.tl`, each step a differentiable operator."""

from scdiffx.tl._diffmap import diffmap
from scdiffx.tl._leiden import leiden
from scdiffx.tl._pseudotime import dpt, pseudotime

__all__ = ["diffmap", "dpt", "leiden", "pseudotime"]
