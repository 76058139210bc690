"""Preprocessing: scanpy's `sc.pp`, each step a differentiable operator."""

from scdiffx.pp._ambient import remove_ambient
from scdiffx.pp._cell_weights import cell_weights
from scdiffx.pp._denoise import denoise
from scdiffx.pp._harmony import harmony_integrate
from scdiffx.pp._highly_variable import highly_variable_genes
from scdiffx.pp._integrate import mmd_integrate, wgan_integrate
from scdiffx.pp._magic import magic
from scdiffx.pp._mask_counts import mask_counts
from scdiffx.pp._neighbors import neighbors
from scdiffx.pp._normalize import log1p, normalize_total, scale
from scdiffx.pp._pca import pca
from scdiffx.pp._replicates import replicates
from scdiffx.pp._scrublet import scrublet
from scdiffx.pp._solo import solo
from scdiffx.pp._split_counts import split_counts
from scdiffx.pp._vae import vae

__all__ = [
    "cell_weights",
    "denoise",
    "harmony_integrate",
    "highly_variable_genes",
    "log1p",
    "magic",
    "mask_counts",
    "mmd_integrate",
    "neighbors",
    "normalize_total",
    "pca",
    "remove_ambient",
    "replicates",
    "scale",
    "scrublet",
    "solo",
    "split_counts",
    "vae",
    "wgan_integrate",
]
