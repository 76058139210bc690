"""Operators: the mathematics without AnnData. Frozen dataclasses, pytrees, pure functions of arrays and graphs."""

from scdiffx._core.counts import Counts
from scdiffx._core.directed import Directed
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.graph import Graph, Pattern
from scdiffx.ops._align_slices import AlignSlices, AlignSlicesResult, SliceGroups, SliceLimits
from scdiffx.ops._ambient import RemoveAmbient, RemoveAmbientResult
from scdiffx.ops._annotation_fit import Envelope
from scdiffx.ops._archetypes import Archetypes, ArchetypesResult
from scdiffx.ops._cell_weights import CellWeights
from scdiffx.ops._communication import Communication, CommunicationResult
from scdiffx.ops._communication_fit import CommunicationFit, CommunicationSettings
from scdiffx.ops._communication_test import CommunicationTest
from scdiffx.ops._denoise import Denoise, DenoiseResult, DenoiseTraining
from scdiffx.ops._differential_distribution import DifferentialDistribution, DifferentialDistributionResult
from scdiffx.ops._diffusion import DiffusionMap, DiffusionMapResult, Pseudotime, PseudotimeResult, transitions
from scdiffx.ops._doublet_classifier import DoubletClassifier, DoubletClassifierResult
from scdiffx.ops._dynamics import Dynamics, DynamicsFit, DynamicsResult
from scdiffx.ops._fate_probabilities import FateProbabilities, FateProbabilitiesResult
from scdiffx.ops._grn import GRN, GRNResult
from scdiffx.ops._grn_gat import AttentionGRN, GRNTraining
from scdiffx.ops._harmony import Harmony, HarmonyResult, HarmonySettings
from scdiffx.ops._highly_variable import HighlyVariable, HighlyVariableResult
from scdiffx.ops._integration import IntegrationResult, IntegrationTraining
from scdiffx.ops._joint_vae import JointVAE, JointVAEResult
from scdiffx.ops._kmeans import KMeans, KMeansResult
from scdiffx.ops._latent_time import LatentTime, LatentTimeResult
from scdiffx.ops._leiden import Leiden, LeidenResult
from scdiffx.ops._ligrec import LigRec, LigRecResult, LigRecTest
from scdiffx.ops._logistic_annotation import LogisticAnnotation, LogisticAnnotationResult, Standards
from scdiffx.ops._magic import Magic, MagicResult
from scdiffx.ops._marker_annotation import MarkerAnnotation, MarkerAnnotationResult
from scdiffx.ops._marker_fit import MarkerFit, MarkerSettings
from scdiffx.ops._mmd_integrate import MMDIntegrate
from scdiffx.ops._moments import Moments, MomentsResult
from scdiffx.ops._neighbors import DIFFERENTIABLE_METRICS, KERNELS, Neighbors, NeighborsResult
from scdiffx.ops._normalize import Log1p, NormalizeTotal, NormalizeTotalResult, Scale, ScaleResult
from scdiffx.ops._ot_trajectory import OTTrajectory, OTTrajectoryResult, OTTransport
from scdiffx.ops._parametric_umap import ParametricUMAP, ParametricUMAPResult, ParametricUMAPTraining
from scdiffx.ops._pca import PCA, PCAResult
from scdiffx.ops._phate import PHATE, PHATEResult, PHATESettings
from scdiffx.ops._scanvi import SemiSupervisedVAE, SemiSupervisedVAEResult
from scdiffx.ops._scanvi_fit import SemiSupervisedTraining
from scdiffx.ops._scrublet import Scrublet, ScrubletResult
from scdiffx.ops._simulate import Simulate, SimulateResult
from scdiffx.ops._solo import Solo, SoloResult
from scdiffx.ops._spatial_domains import SpatialDomains, SpatialDomainsResult, SpatialSettings
from scdiffx.ops._spatial_gat import SpatialAutoencoder
from scdiffx.ops._spatial_gat_net import SpatialTraining
from scdiffx.ops._steady_state import SteadyState, SteadyStateResult
from scdiffx.ops._switch import SwitchDE, SwitchDEResult
from scdiffx.ops._terminal_states import terminal_states
from scdiffx.ops._tied_mixture import TiedMixture, TiedMixtureResult
from scdiffx.ops._transition_matrix import TransitionMatrix
from scdiffx.ops._umap import UMAP, UMAPDensity, UMAPResult, UMAPSettings
from scdiffx.ops._vae import VAE, Training, VAEResult
from scdiffx.ops._velocity_embedding import VelocityEmbedding
from scdiffx.ops._velocity_graph import VelocityGraph, VelocityGraphResult
from scdiffx.ops._wgan_integrate import WGANIntegrate

__all__ = [
    "DIFFERENTIABLE_METRICS",
    "GRN",
    "KERNELS",
    "PCA",
    "PHATE",
    "UMAP",
    "VAE",
    "AlignSlices",
    "AlignSlicesResult",
    "Archetypes",
    "ArchetypesResult",
    "AttentionGRN",
    "CellWeights",
    "Communication",
    "CommunicationFit",
    "CommunicationResult",
    "CommunicationSettings",
    "CommunicationTest",
    "Counts",
    "Denoise",
    "DenoiseResult",
    "DenoiseTraining",
    "DifferentialDistribution",
    "DifferentialDistributionResult",
    "DiffusionMap",
    "DiffusionMapResult",
    "Directed",
    "DoubletClassifier",
    "DoubletClassifierResult",
    "Dynamics",
    "DynamicsFit",
    "DynamicsResult",
    "Envelope",
    "FateProbabilities",
    "FateProbabilitiesResult",
    "GRNResult",
    "GRNTraining",
    "Graph",
    "Harmony",
    "HarmonyResult",
    "HarmonySettings",
    "HighlyVariable",
    "HighlyVariableResult",
    "IntegrationResult",
    "IntegrationTraining",
    "JointVAE",
    "JointVAEResult",
    "KMeans",
    "KMeansResult",
    "LatentTime",
    "LatentTimeResult",
    "Leiden",
    "LeidenResult",
    "LigRec",
    "LigRecResult",
    "LigRecTest",
    "Log1p",
    "LogisticAnnotation",
    "LogisticAnnotationResult",
    "MMDIntegrate",
    "Magic",
    "MagicResult",
    "MarkerAnnotation",
    "MarkerAnnotationResult",
    "MarkerFit",
    "MarkerSettings",
    "Moments",
    "MomentsResult",
    "Neighbors",
    "NeighborsResult",
    "NormalizeTotal",
    "NormalizeTotalResult",
    "OTTrajectory",
    "OTTrajectoryResult",
    "OTTransport",
    "PCAResult",
    "PHATEResult",
    "PHATESettings",
    "ParametricUMAP",
    "ParametricUMAPResult",
    "ParametricUMAPTraining",
    "Pattern",
    "Pseudotime",
    "PseudotimeResult",
    "RemoveAmbient",
    "RemoveAmbientResult",
    "Scale",
    "ScaleResult",
    "Scrublet",
    "ScrubletResult",
    "SemiSupervisedTraining",
    "SemiSupervisedVAE",
    "SemiSupervisedVAEResult",
    "Simulate",
    "SimulateResult",
    "SliceGroups",
    "SliceLimits",
    "Solo",
    "SoloResult",
    "SpatialAutoencoder",
    "SpatialDomains",
    "SpatialDomainsResult",
    "SpatialSettings",
    "SpatialTraining",
    "Standards",
    "SteadyState",
    "SteadyStateResult",
    "SwitchDE",
    "SwitchDEResult",
    "TiedMixture",
    "TiedMixtureResult",
    "Training",
    "TransitionMatrix",
    "UMAPDensity",
    "UMAPResult",
    "UMAPSettings",
    "VAEResult",
    "VelocityEmbedding",
    "VelocityGraph",
    "VelocityGraphResult",
    "WGANIntegrate",
    "buffer",
    "learnable",
    "operator",
    "replace",
    "static",
    "terminal_states",
    "transitions",
]
