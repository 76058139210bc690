"""Tools: scanpy's `sc.tl`, each step a differentiable operator."""

from scdiffx.tl._differential_distribution import differential_distribution
from scdiffx.tl._diffmap import diffmap
from scdiffx.tl._latent_time import latent_time
from scdiffx.tl._leiden import leiden
from scdiffx.tl._pseudotime import dpt, pseudotime
from scdiffx.tl._simulate import simulate
from scdiffx.tl._velocity import velocity
from scdiffx.tl._velocity_embedding import velocity_embedding
from scdiffx.tl._velocity_graph import velocity_graph

__all__ = [
    "differential_distribution",
    "diffmap",
    "dpt",
    "latent_time",
    "leiden",
    "pseudotime",
    "simulate",
    "velocity",
    "velocity_embedding",
    "velocity_graph",
]
