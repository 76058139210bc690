"""Plots of what scanpy does not draw: Matplotlib on the keys of an AnnData."""

from scdiffx.pl._aligned_slices import aligned_slices
from scdiffx.pl._ambient import ambient
from scdiffx.pl._archetypes import archetypes
from scdiffx.pl._attribution import attribution
from scdiffx.pl._doublets import doublets
from scdiffx.pl._fate_probabilities import fate_probabilities
from scdiffx.pl._fit import fit
from scdiffx.pl._gradients import gradients
from scdiffx.pl._grn import grn
from scdiffx.pl._ligrec import ligrec
from scdiffx.pl._ot_flow import ot_flow
from scdiffx.pl._pseudotime import pseudotime
from scdiffx.pl._spatial_domains import spatial_domains
from scdiffx.pl._switch_genes import switch_genes
from scdiffx.pl._velocity_stream import velocity_stream

__all__ = [
    "aligned_slices",
    "ambient",
    "archetypes",
    "attribution",
    "doublets",
    "fate_probabilities",
    "fit",
    "gradients",
    "grn",
    "ligrec",
    "ot_flow",
    "pseudotime",
    "spatial_domains",
    "switch_genes",
    "velocity_stream",
]
