"""Plots of what scanpy does not draw: Matplotlib on the keys of an AnnData."""

from scdiffx.pl._ambient import ambient
from scdiffx.pl._doublets import doublets
from scdiffx.pl._fit import fit
from scdiffx.pl._pseudotime import pseudotime
from scdiffx.pl._velocity_stream import velocity_stream

__all__ = ["ambient", "doublets", "fit", "pseudotime", "velocity_stream"]
