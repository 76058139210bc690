"""Tools: scanpy's `sc.tl`, each step a differentiable operator."""

from scdiffx.tl._align_slices import align_slices
from scdiffx.tl._annotate import annotate
from scdiffx.tl._annotation_model import AnnotationModel, annotation_model
from scdiffx.tl._archetypes import archetypes
from scdiffx.tl._attribution import attribution
from scdiffx.tl._communication import communication
from scdiffx.tl._differential_distribution import differential_distribution
from scdiffx.tl._diffmap import diffmap
from scdiffx.tl._fate_probabilities import fate_probabilities
from scdiffx.tl._grn import grn
from scdiffx.tl._influence import influence
from scdiffx.tl._kmeans import kmeans
from scdiffx.tl._latent_time import latent_time
from scdiffx.tl._leiden import leiden
from scdiffx.tl._ligrec import ligrec
from scdiffx.tl._ot_trajectory import ot_trajectory
from scdiffx.tl._ot_transport import ot_interpolate, ot_pull, ot_push
from scdiffx.tl._parametric_umap import parametric_umap
from scdiffx.tl._phate import phate
from scdiffx.tl._pseudotime import dpt, pseudotime
from scdiffx.tl._simulate import simulate
from scdiffx.tl._spatial_domains import spatial_domains
from scdiffx.tl._switch_de import switch_de
from scdiffx.tl._transition_matrix import transition_matrix
from scdiffx.tl._umap import umap
from scdiffx.tl._uncertainty import uncertainty
from scdiffx.tl._velocity import velocity
from scdiffx.tl._velocity_embedding import velocity_embedding
from scdiffx.tl._velocity_graph import velocity_graph

__all__ = [
    "AnnotationModel",
    "align_slices",
    "annotate",
    "annotation_model",
    "archetypes",
    "attribution",
    "communication",
    "differential_distribution",
    "diffmap",
    "dpt",
    "fate_probabilities",
    "grn",
    "influence",
    "kmeans",
    "latent_time",
    "leiden",
    "ligrec",
    "ot_interpolate",
    "ot_pull",
    "ot_push",
    "ot_trajectory",
    "parametric_umap",
    "phate",
    "pseudotime",
    "simulate",
    "spatial_domains",
    "switch_de",
    "transition_matrix",
    "umap",
    "uncertainty",
    "velocity",
    "velocity_embedding",
    "velocity_graph",
]
