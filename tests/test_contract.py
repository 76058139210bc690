"""What every operator must prove. To cover a new operator, add one case to the table: nothing else changes.

A case says how to make the operator, which real inputs it takes for a list of cells, and which of its outputs can be
compared: those whose value does not depend on an arbitrary sign, rotation or order of slots.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import (
    QUICK,
    allowed_direction,
    directional_fd,
    enlarged,
    float_leaves,
    largest_of,
    megabytes_of,
    pbmc_counts,
    random_direction,
    tree_vdot,
)
from scdiffx import ops
from scdiffx._core.counts import map_rows, matmul
from scdiffx._core.fields import fields_of_kind, learnables, replace

CELLS, GENES, DIMS = 300, 220, 10
LARGE, MANY_GENES = 50_000, 2_000


class Data(NamedTuple):
    """Real blood cells, in the forms that operators take."""

    counts: ops.Counts
    log: ops.Counts
    gene_weights: jax.Array
    coordinates: jax.Array
    graph: ops.Graph
    root: jax.Array
    batch: jax.Array


class Case(NamedTuple):
    """An operator on trial.

    `op` makes it, before `init`. `inputs` takes what it reads from :class:`Data`. `value` takes the comparable outputs
    from its result; an output of as many rows as there are cells has to follow a permutation of the cells. `learns`
    names its learnables. `budget` bounds the megabytes of intermediate results of its derivative (of its value, where
    it has no derivative) at 50,000 cells x 2,000 genes.
    """

    name: str
    op: Callable[[], Any]
    inputs: Callable[[Data], tuple[Any, ...]]
    value: Callable[[Any], Any]
    budget: float
    learns: tuple[str, ...] = ()
    differentiable: bool = True
    # What a randomised search finds depends on the order of the cells.
    equivariant: bool = True
    # What `init` reads, where that is not what the call reads.
    start: Callable[[Data], tuple[Any, ...]] | None = None


# What takes long to compile or run, and settings of operators that are tested with others too: these are slow tests.
SLOW = {
    "align_slices",
    "align_slices_overlap",
    "communication",
    "communication_gat",
    "denoise",
    "doublet_classifier",
    "dynamics",
    "fate_probabilities",
    "grn_attention",
    "grn_lasso",
    "grn_with_prior",
    "highly_variable_cutoffs",
    "joint_vae",
    "kmeans_hard",
    "ligrec_neighbors",
    "log1p_base_2",
    "logistic_annotation",
    "magic",
    "magic_on_graph",
    "marker_annotation",
    "mmd_integrate",
    "mmd_integrate_counts",
    "neighbors_cosine",
    "neighbors_gauss",
    "normalize_total_excluding",
    "ot_trajectory",
    "parametric_umap",
    "phate",
    "scale_uncentred",
    "scrublet",
    "semi_supervised_vae",
    "solo",
    "spatial_autoencoder",
    "spatial_domains",
    "steady_state",
    "switch_de",
    "tied_mixture",
    "umap",
    "vae_nb",
    "vae_zinb",
    "velocity_graph_plain",
    "wgan_integrate",
}


# Settings of operators that stand here with others too: what compiling and memory are like is proved for those.
VARIANTS = {
    "grn_lasso",
    "grn_with_prior",
    "highly_variable_cutoffs",
    "kmeans_hard",
    "log1p_base_2",
    "magic_on_graph",
    "mmd_integrate_counts",
    "neighbors_cosine",
    "neighbors_gauss",
    "normalize_total_excluding",
    "scale_uncentred",
    "vae_zinb",
    "velocity_graph_plain",
}


def of_matrix(x: ops.Counts) -> jax.Array:
    """Sums over slices of the genes: they see every value and have one row a cell."""
    columns = jnp.arange(x.shape[1])
    return matmul(x, jnp.stack([columns % 2, columns % 3], 1).astype(x.dtype))


def two_fates(d: Data) -> jax.Array:
    """The cells at both ends of the second coordinate."""
    low, high = jnp.quantile(d.coordinates[:, 1], jnp.asarray([0.25, 0.75]))
    return jnp.where(d.coordinates[:, 1] < low, 0, jnp.where(d.coordinates[:, 1] > high, 1, -1)).astype(jnp.int32)


def unspliced_too(d: Data) -> tuple[jax.Array, jax.Array]:
    """Two dense matrices of genes that depend on each other."""
    spliced = map_rows(d.log, lambda block: block)
    return spliced, 0.3 * spliced + map_rows(d.counts, jnp.sqrt)


def cosines_of(d: Data) -> ops.Directed:
    """Numbers between -1 and 1 on the edges of the graph."""
    matrix = d.graph.to_scipy()
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    z = np.asarray(d.coordinates) / 8
    matrix.data = np.tanh(z[rows, 0] - z[matrix.indices, 1])
    return ops.Directed.from_scipy(matrix)


def of_neighbors(result: ops.NeighborsResult) -> Any:
    graph = result.connectivities
    return result.distances, graph.row_sums(), graph.with_values(graph.values**2).row_sums()


CASES = [
    Case(
        "normalize_total",
        lambda: ops.NormalizeTotal(),
        lambda d: (d.counts,),
        lambda r: (of_matrix(r.x), r.factor),
        budget=1_500,
        learns=("target_sum",),
    ),
    Case(
        "normalize_total_excluding",
        lambda: ops.NormalizeTotal(target_sum=1e3, exclude_highly_expressed=True, max_fraction=0.1),
        lambda d: (d.counts,),
        lambda r: (of_matrix(r.x), r.factor),
        budget=1_500,
        learns=("target_sum",),
    ),
    Case("log1p", lambda: ops.Log1p(), lambda d: (d.counts,), of_matrix, budget=250),
    Case("log1p_base_2", lambda: ops.Log1p(base=2.0), lambda d: (d.counts,), of_matrix, budget=250),
    Case("scale", lambda: ops.Scale(max_value=2.0), lambda d: (d.log,), tuple, budget=2_500),
    Case(
        "scale_uncentred",
        lambda: ops.Scale(zero_center=False, max_value=2.9),
        lambda d: (d.log,),
        lambda r: of_matrix(r.x),
        budget=400,
    ),
    *(
        Case(
            f"highly_variable_{name}",
            functools.partial(ops.HighlyVariable, **settings),
            lambda d, form=form: (getattr(d, form),),
            tuple,
            budget=1_500,
            learns=("temperature", "shift"),
        )
        for name, form, settings in (
            ("seurat", "log", {"n_top_genes": 60}),
            ("cutoffs", "log", {}),
            ("seurat_v3", "counts", {"flavor": "seurat_v3", "n_top_genes": 60}),
        )
    ),
    Case("pca", lambda: ops.PCA(n_comps=8, anchored=False), lambda d: (d.log, d.gene_weights), tuple, budget=2_000),
    Case(
        "pca_anchored",
        lambda: ops.PCA(n_comps=8),
        lambda d: (d.log, d.gene_weights),
        tuple,
        budget=1_800,
        learns=("shift", "scale"),
    ),
    *(
        Case(
            f"neighbors_{name}",
            functools.partial(ops.Neighbors, **settings),
            lambda d: (d.coordinates,),
            of_neighbors,
            budget=150,
            learns=("bandwidth",),
        )
        for name, settings in (
            ("umap", {"n_neighbors": 15}),
            ("gauss", {"n_neighbors": 15, "method": "gauss"}),
            ("cosine", {"n_neighbors": 10, "metric": "cosine"}),
        )
    ),
    *(
        Case(
            f"vae_{name}",
            functools.partial(
                ops.VAE,
                columns=np.arange(0, GENES, 3),
                n_latent=4,
                n_hidden=16,
                training=ops.Training(max_epochs=2, batch_size=64),
                **settings,
            ),
            lambda d: (d.counts, d.batch),
            tuple,
            budget=1_800,
            learns=("net",),
            # Which cells share a minibatch depends on their order.
            equivariant=False,
        )
        for name, settings in (("nb", {}), ("zinb", {"likelihood": "zinb", "dispersion": "gene-batch"}))
    ),
    Case(
        "joint_vae",
        lambda: ops.JointVAE(
            columns=np.arange(0, GENES, 3),
            n_latent=4,
            n_hidden=16,
            training=ops.Training(max_epochs=2, batch_size=64),
        ),
        lambda d: (d.counts, d.coordinates[:, :4] ** 2, d.batch),
        tuple,
        budget=1_800,
        learns=("net",),
        # Which cells share a minibatch depends on their order.
        equivariant=False,
    ),
    Case(
        "denoise",
        lambda: ops.Denoise(
            columns=np.arange(0, GENES, 3),
            n_hidden=8,
            n_inducing=4,
            training=ops.DenoiseTraining(max_epochs=2, batch_size=64),
        ),
        lambda d: (d.counts,),
        lambda r: r.denoised,
        budget=150,
        learns=("net",),
        # Which cells share a minibatch depends on their order.
        equivariant=False,
    ),
    Case(
        "cell_weights",
        lambda: ops.CellWeights(cutoff=jnp.asarray([-0.5, 0.8, 0.1]), temperature=0.5, sides=((0, 1), (0, -1), (1, 1))),
        lambda d: (d.coordinates[:, 0], d.coordinates[:, 1]),
        lambda r: r,
        budget=20,
        learns=("cutoff", "temperature"),
    ),
    Case(
        "remove_ambient",
        lambda: ops.RemoveAmbient(level=0.1),
        lambda d: (d.counts,),
        lambda r: (of_matrix(r.corrected), r.fraction),
        budget=1_500,
        learns=("ambient", "level", "concentration"),
        start=lambda d: (d.counts, jnp.argmax(d.coordinates[:, :3], 1)),
    ),
    Case(
        "differential_distribution",
        lambda: ops.DifferentialDistribution(pairs=((0, 1), (1, -1)), temperature=0.4),
        lambda d: (d.coordinates, jax.nn.softmax(d.coordinates[:, :3], axis=1)),
        # The largest of the gaps over a grid of quantiles has kinks; the moments are smooth.
        lambda r: (r.statistic, r.mean, r.variance),
        budget=250,
        learns=("temperature",),
    ),
    Case(
        "switch_de",
        lambda: ops.SwitchDE(n_permutations=0),
        lambda d: (d.log, d.coordinates[:, 0]),
        # Time and strength of genes that hardly change are ill-conditioned: test_switch has those of clear switches.
        lambda r: r.statistic,
        budget=1_500,
    ),
    Case(
        "scrublet",
        lambda: ops.Scrublet(n_comps=8, temperature=0.1),
        lambda d: (d.counts,),
        lambda r: (r.score, r.simulated),
        budget=700,
        # Which cells are paired depends on their order.
        equivariant=False,
    ),
    Case(
        "doublet_classifier",
        lambda: ops.DoubletClassifier(n_comps=8, temperature=0.1),
        lambda d: (d.counts,),
        lambda r: (r.score, r.simulated, r.weights),
        # The values of 100,000 doublets, here of twice as many genes as the operator takes at most.
        budget=2_600,
        # Which cells are paired depends on their order.
        equivariant=False,
    ),
    Case(
        "magic",
        lambda: ops.Magic(t=2.3, n_steps=4),
        lambda d: (d.coordinates, d.coordinates),
        lambda r: (r.imputed, r.t),
        budget=150,
        learns=("t", "bandwidth", "decay", "self_weight", "filter"),
    ),
    Case(
        "magic_on_graph",
        lambda: ops.Magic(t=2.3),
        lambda d: (d.coordinates, d.graph),
        lambda r: r.imputed,
        budget=150,
        learns=("t", "self_weight", "filter"),
    ),
    *(
        Case(
            name,
            functools.partial(op, n_hidden=8, training=ops.IntegrationTraining(max_steps=3, check_every=2)),
            lambda d: (d.coordinates, d.batch),
            lambda r: r.corrected,
            budget=200,
            learns=("net",),
            # The first weights meet the cells in their order.
            equivariant=False,
        )
        for name, op in (("mmd_integrate", ops.MMDIntegrate), ("wgan_integrate", ops.WGANIntegrate))
    ),
    Case(
        "mmd_integrate_counts",
        lambda: ops.MMDIntegrate(
            n_latent=4, n_hidden=16, training=ops.IntegrationTraining(max_steps=3, check_every=2, minibatch=64)
        ),
        lambda d: (d.counts, d.batch),
        lambda r: r.corrected,
        budget=1_800,
        learns=("net",),
        # Which cells are held out and share a minibatch depends on their order.
        equivariant=False,
    ),
    *(
        Case(
            name,
            lambda settings=settings: ops.GRN(penalty=0.02, tfs=np.arange(3, 60, 7), **settings),
            lambda d: (d.log,),
            tuple,
            budget=800,
            learns=("penalty",),
        )
        for name, settings in (
            ("grn", {}),
            ("grn_lasso", {"method": "lasso", "n_subsamples": 2}),
            ("grn_with_prior", {"regulators": np.arange(GENES * 3).reshape(-1, 3) % 10 % 9 - 1}),
        )
    ),
    Case(
        "grn_attention",
        lambda: ops.AttentionGRN(
            tfs=np.arange(3, 60, 7), training=ops.GRNTraining(n_regulators=3, n_dims=2, n_steps=3, batch_size=32)
        ),
        lambda d: (d.log,),
        tuple,
        budget=800,
        learns=("net",),
        # Which cells are held out and share a minibatch depends on their order.
        equivariant=False,
    ),
    Case(
        "harmony",
        lambda: ops.Harmony(nclust=6, rounds=2),
        lambda d: (d.coordinates, d.batch),
        tuple,
        budget=100,
        learns=("theta", "sigma", "alpha"),
        # The first clusters and the order of assignment are random.
        equivariant=False,
    ),
    Case(
        "solo",
        lambda: ops.Solo(vae=ops.VAE(n_latent=4, n_hidden=16, training=ops.Training(max_epochs=2, batch_size=64))),
        lambda d: (d.counts, d.batch),
        tuple,
        budget=1_800,
        learns=("net",),
        # Which cells are added up depends on their order.
        equivariant=False,
    ),
    Case(
        "simulate",
        lambda: ops.Simulate(bcv_trend=0.5),
        lambda d: (jax.nn.softmax(d.coordinates[:, :3]), d.batch, jax.random.key(1)),
        # The gamma's derivative in its shape is right in expectation, not for the path of one key.
        lambda r: (r.library, r.expected, r.bcv),
        budget=3_000,
        learns=("mean", "factor", "batch_factor", "lib_loc", "lib_scale", "bcv", "bcv_trend"),
        # The noise of a cell depends on its place.
        equivariant=False,
        start=lambda d: (d.counts, jnp.argmax(d.coordinates[:, :3], 1), d.batch),
    ),
    Case(
        "ot_trajectory",
        lambda: ops.OTTrajectory(epsilon=0.2, tau=(0.7, 0.8), rounds=2, tol=1e-12),
        lambda d: (d.coordinates, d.batch, jnp.exp(d.coordinates[:, 0] / 10)),
        lambda r: (r.f, r.g, r.scale, r.growth, r.cost),
        budget=250,
        learns=("epsilon",),
    ),
    Case(
        "align_slices",
        lambda: ops.AlignSlices(alpha=0.2, epsilon=0.1, limits=ops.SliceLimits(30, 1e-12)),
        # One slice larger than the other, so that geometry counts.
        lambda d: (d.counts, d.coordinates[:, :2] * (1 + 0.5 * d.batch[:, None]), d.batch),
        lambda r: (r.aligned, r.rotation, r.shift, r.objective, r.plan),
        # The counts, their places and derivatives.
        budget=1_200,
        learns=("alpha", "epsilon"),
    ),
    Case(
        "align_slices_overlap",
        lambda: ops.AlignSlices(alpha=0.2, epsilon=0.1, overlap=0.7, limits=ops.SliceLimits(30, 1e-12)),
        lambda d: (d.counts, d.coordinates[:, :2] * (1 + 0.5 * d.batch[:, None]), d.batch),
        lambda r: (r.aligned, r.rotation, r.shift, r.objective, r.plan),
        budget=1_200,
        learns=("alpha", "epsilon", "overlap"),
    ),
    Case(
        "ot_transport",
        lambda: ops.OTTransport(),
        lambda d: (
            d.coordinates,
            d.batch,
            {"g": d.coordinates[:, 1], "scale": jnp.asarray([30.0]), "epsilon": jnp.asarray(0.5)},
            jax.nn.softmax(d.coordinates[:, :3]),
        ),
        lambda r: r,
        budget=150,
    ),
    Case(
        "archetypes",
        # From given archetypes: what drawn starts lead to depends on the order of the cells.
        lambda: ops.Archetypes(n_archetypes=4, archetypes=matrices()[2][:4]),
        lambda d: (d.coordinates,),
        tuple,
        budget=250,
        # Rounding decides in which round the search stops: test_archetypes has a tolerance for that.
        equivariant=False,
    ),
    *(
        Case(
            f"kmeans_{name}",
            # From given centres: what drawn ones lead to depends on the order of the cells.
            lambda settings=settings: ops.KMeans(n_clusters=4, centers=matrices()[2][:4], **settings),
            lambda d: (d.coordinates,),
            lambda r: (r.memberships, r.centers, r.inertia),
            budget=150,
            learns=("temperature",),
        )
        for name, settings in (("hard", {"temperature": 3.0}), ("soft", {"temperature": 5.0, "n_soft": 3}))
    ),
    Case(
        "tied_mixture",
        # The last digits of its parameters count in finite differences.
        lambda: ops.TiedMixture(n_components=3, n_init=2, tol=1e-13),
        lambda d: (d.coordinates[:, :4],),
        lambda r: (r.memberships, r.weights, r.means, r.covariance, r.log_likelihood),
        budget=150,
        # The starts are drawn by the order of the cells.
        equivariant=False,
    ),
    Case(
        "spatial_domains",
        lambda: ops.SpatialDomains(
            hops=1.6,
            gradient=0.7,
            mixture=ops.TiedMixture(n_init=2, tol=1e-13),
            n_domains=3,
            settings=ops.SpatialSettings(n_neighbors=3, n_comps=4),
        ),
        lambda d: (d.coordinates[:, :6], d.coordinates[:, :2], None, d.batch),
        lambda r: (r.memberships, r.embedding, r.log_likelihood),
        budget=300,
        learns=("hops", "gradient"),
        # The starts are drawn by the order of the cells.
        equivariant=False,
    ),
    Case(
        "spatial_autoencoder",
        lambda: ops.SpatialAutoencoder(
            mixture=ops.TiedMixture(n_init=2, tol=1e-13),
            n_domains=3,
            settings=ops.SpatialSettings(n_neighbors=3, n_comps=2),
            training=ops.SpatialTraining(n_hidden=8, n_layers=1, max_steps=10, prune=0.5),
        ),
        lambda d: (d.coordinates[:, :6], None, d.graph, d.batch),
        lambda r: (r.memberships, r.embedding, r.log_likelihood),
        budget=300,
        learns=("net",),
        # Which cells are hidden in training depends on their order.
        equivariant=False,
    ),
    Case(
        "logistic_annotation",
        lambda: ops.LogisticAnnotation(penalty=0.01, n_folds=2),
        lambda d: (d.log,),
        lambda r: (r.probabilities, r.confidence, r.distance),
        budget=150,
        learns=("weights", "bias", "temperature"),
        # Which cells are held out together depends on their order.
        equivariant=False,
        start=lambda d: (d.log, jnp.argmax(d.coordinates[:, :3], 1)),
    ),
    Case(
        "marker_annotation",
        lambda: ops.MarkerAnnotation(markers=((102, 103, 104), (52, 53, 65), (70, 103), ())),
        lambda d: (d.counts, None, d.batch),
        lambda r: (r.probabilities, r.confidence, r.log_likelihood),
        # The total counts of cells see every gene.
        budget=1_500,
        learns=("baseline", "log_folds", "dispersion", "proportions"),
        # Sums in another order end the climb at another step: test_marker_annotation has a tolerance for that.
        equivariant=False,
    ),
    Case(
        "semi_supervised_vae",
        lambda: ops.SemiSupervisedVAE(
            vae=ops.VAE(n_latent=3, n_hidden=8, training=ops.Training(max_epochs=2, batch_size=64)),
            training=ops.SemiSupervisedTraining(max_epochs=2, n_folds=2),
        ),
        lambda d: (d.counts,),
        lambda r: (r.probabilities, r.confidence, r.distance, r.latent),
        budget=1_800,
        learns=("net", "temperature"),
        # Which cells share a minibatch depends on their order.
        equivariant=False,
        start=lambda d: (d.counts, d.batch, jnp.argmax(d.coordinates[:, :3], 1)),
    ),
    Case(
        "moments",
        lambda: ops.Moments(power=0.4),
        lambda d: (d.coordinates, d.coordinates**2, d.graph),
        tuple,
        budget=150,
        learns=("power",),
    ),
    Case(
        "steady_state",
        lambda: ops.SteadyState(stochastic=True, power=0.4),
        lambda d: (*unspliced_too(d), d.log, d.log, d.graph),
        lambda r: (r.velocity, r.variance, r.gamma, r.ratio, r.r2),
        # Inputs, results, their derivatives and copies of these in blocks of genes: all are dense.
        budget=7_000,
        learns=("change", "power"),
    ),
    Case(
        "dynamics",
        lambda: ops.Dynamics(power=0.4, columns=tuple(range(DIMS))),
        lambda d: (d.coordinates**2 + 1, 0.3 * d.coordinates[:, ::-1] ** 2 + d.coordinates**2, d.graph),
        lambda r: (r.velocity, r.velocity_u),
        budget=300,
        learns=("change", "power"),
    ),
    Case(
        "latent_time",
        lambda: ops.LatentTime(),
        lambda d: (jnp.abs(d.coordinates) + 0.1,),
        lambda r: r.latent_time,
        budget=150,
        start=lambda d: (jnp.abs(d.coordinates) + 0.1, None, cosines_of(d), d.graph, d.graph),
    ),
    *(
        Case(
            f"velocity_graph_{name}",
            functools.partial(ops.VelocityGraph, **settings),
            lambda d: (d.coordinates, jnp.roll(d.coordinates, 1, axis=1), d.gene_weights[:DIMS]),
            lambda r: (r.cosines.row_sums(), r.cosines.row_sums(r.cosines.values**2), r.self_transition),
            budget=150,
            start=lambda d: (d.coordinates, d.coordinates, None, d.graph),
        )
        for name, settings in (
            ("plain", {"n_neighbors": 6}),
            # The root of a difference near 0 has no derivative: few differences.
            ("roots", {"sqrt_transform": True, "n_neighbors": 2, "n_recurse_neighbors": 1}),
        )
    ),
    Case(
        "velocity_embedding",
        lambda: ops.VelocityEmbedding(scale=4.0),
        lambda d: (cosines_of(d), d.coordinates[:, :3]),
        lambda r: r,
        budget=150,
        learns=("scale",),
    ),
    Case(
        "transition_matrix",
        lambda: ops.TransitionMatrix(scale=4.0, weight_connectivities=0.3),
        lambda d: (cosines_of(d), d.graph),
        lambda r: (r.T.row_sums(), r.with_values(r.values**2).row_sums()),
        budget=150,
        learns=("scale", "weight_connectivities"),
    ),
    Case(
        "diffusion_map",
        lambda: ops.DiffusionMap(n_comps=8),
        lambda d: (d.graph,),
        lambda r: (r.eigenvalues, r.eigenvectors**2),
        budget=200,
    ),
    Case(
        "pseudotime",
        lambda: ops.Pseudotime(n_dcs=6, n_comps=8),
        lambda d: (d.graph, d.root),
        lambda r: (r.pseudotime, r.distance),
        budget=200,
    ),
    Case(
        "fate_probabilities",
        lambda: ops.FateProbabilities(),
        lambda d: (d.graph, two_fates(d), d.coordinates[:, 0] / 20),
        lambda r: (r.probabilities, r.priming, r.absorbed),
        budget=300,
        learns=("b", "nu"),
    ),
    Case(
        "leiden",
        lambda: ops.Leiden(),
        lambda d: (d.graph,),
        lambda r: r.probabilities,
        budget=50,
        learns=("temperature",),
        equivariant=False,
    ),
    *(
        Case(
            name,
            lambda policy=policy: ops.LigRec(
                ligands=np.array([[102, 102], [70, 103]]),
                receptors=np.array([[52, 53], [65, 104]]),
                complex_policy=policy,
            ),
            lambda d, near=near: (d.log, jax.nn.softmax(d.coordinates[:, :3] / 4), *((d.graph,) if near else ())),
            lambda r: r.mean,
            budget=1_500,
        )
        for name, policy, near in (("ligrec", "min", False), ("ligrec_neighbors", "group_min", True))
    ),
    *(
        Case(
            name,
            lambda attention=attention: ops.Communication(
                ligands=np.array([[102, 102], [70, 103]]),
                receptors=np.array([[52, 53], [65, 104]]),
                settings=ops.CommunicationSettings(n_programs=3, attention=attention, n_hidden=8, n_steps=10),
            ),
            lambda d: (d.log, d.graph, jax.nn.softmax(d.coordinates[:, :3] / 4)),
            tuple,
            budget=1_500,
            learns=("net",) if attention else (),
            # Which cells are held out together depends on their order.
            equivariant=False,
        )
        for name, attention in (("communication", False), ("communication_gat", True))
    ),
    Case(
        "umap",
        lambda: ops.UMAP(n_epochs=5),
        lambda d: (d.graph,),
        lambda r: r.embedding,
        budget=100,
        # The coordinates have no useful derivative: that of the loss is in test_umap.
        differentiable=False,
        equivariant=False,
    ),
    Case(
        "parametric_umap",
        lambda: ops.ParametricUMAP(training=ops.ParametricUMAPTraining(n_hidden=16, n_steps=20)),
        lambda d: (d.coordinates,),
        lambda r: r.embedding,
        budget=150,
        learns=("net",),
        # Edges are drawn by their numbers.
        equivariant=False,
        start=lambda d: (d.coordinates, d.graph),
    ),
    Case(
        "phate",
        lambda: ops.PHATE(t=3, n_landmark=24, settings=ops.PHATESettings(mds="classic")),
        lambda d: (d.coordinates,),
        # The derivative of the metric layout needs thousands of steps to its minimum: it is in test_phate.
        lambda r: r.distances,
        budget=250,
        learns=("decay", "bandwidth"),
        # The clusters of the spectrum depend on the order of the cells.
        equivariant=False,
    ),
]
assert {case.name for case in CASES} >= SLOW
DIFFERENTIABLE = [case for case in CASES if case.differentiable]
LEARNING = [case for case in CASES if case.learns]
MAIN = [case for case in CASES if case.name not in VARIANTS]
in_double = pytest.mark.usefixtures("x64")


def each(cases: list[Case]) -> Any:
    slow = [case.name in SLOW for case in cases]
    marked = [pytest.param(case, marks=pytest.mark.slow) if s else case for case, s in zip(cases, slow, strict=True)]
    return pytest.mark.parametrize("case", marked, ids=lambda case: case.name)


@functools.cache
def matrices() -> tuple[Any, Any, np.ndarray]:
    counts = pbmc_counts(n_genes=GENES).X.astype(np.float64)
    log = counts.multiply(1e3 / counts.sum(1)).tocsr().log1p()
    centred = log.toarray() - log.toarray().mean(0)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    return counts, log, left[:, :DIMS] * size[:DIMS]


def data(cells: np.ndarray) -> Data:
    counts, log, coordinates = matrices()
    z = jnp.asarray(coordinates[cells])
    near = ops.Neighbors(n_neighbors=12)
    return Data(
        ops.Counts.from_scipy(counts[cells]),
        ops.Counts.from_scipy(log[cells]),
        jnp.asarray(np.random.default_rng(5).uniform(0.3, 1, GENES)),
        z,
        near.init(z)(z).connectivities,
        jnp.argmax(jnp.asarray(cells == 7)),
        jnp.asarray(cells % 2, jnp.int32),
    )


@functools.cache
def shared_data() -> Data:
    return data(np.arange(CELLS))


def prepared(case: Case, d: Data) -> tuple[Any, tuple[Any, ...]]:
    """The operator after `init`, and its inputs."""
    op, args = case.op(), case.inputs(d)
    start = args if case.start is None else case.start(d)
    return firm(op.init(*start, key=jax.random.key(0)) if hasattr(op, "init") else op), args


def firm(op: Any) -> Any:
    """The operator with arrays as learnables: Python's numbers are weakly typed, moved ones not, and compiled apart."""
    return replace(op, **{name: jax.tree.map(array, getattr(op, name)) for name in learnables(op)})


def array(x: Any) -> jax.Array:
    return jnp.asarray(np.asarray(x))


@functools.cache
def ready(name: str) -> tuple[Any, tuple[Any, ...]]:
    with jax.enable_x64(True):
        return prepared(next(case for case in CASES if case.name == name), shared_data())


def outputs(case: Case, op: Any, args: tuple[Any, ...]) -> list[Any]:
    return jax.tree.leaves(case.value(op(*args)))


@functools.cache
def compiled(name: str) -> Callable[..., list[Any]]:
    """:func:`outputs` of a case, compiled once for all tests."""
    case = next(case for case in CASES if case.name == name)
    return jax.jit(functools.partial(outputs, case), compiler_options=QUICK)


def parameters(op: Any) -> dict[str, Any]:
    """The learnables by name; that of a neural operator is a pytree."""
    return {name: jax.tree.map(jnp.asarray, getattr(op, name)) for name in learnables(op)}


def uneven(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.sin(1 + jnp.arange(np.prod(shape, dtype=int), dtype=jnp.int32).reshape(shape).astype(dtype) ** 2 % 1009)


weights_of = jax.jit(uneven, static_argnums=(0, 1))


def weighed(case: Case, sizes: list[float] | None = None) -> Callable[..., Any]:
    """The operator as a scalar function of its learnables and its floating inputs.

    Every output gets uneven weights, for in a plain sum wrong derivatives can cancel, and is divided by its own size,
    so that a large output does not drown the others.
    """

    def f(params: Any, floats: list[Any], op: Any, args: tuple[Any, ...]) -> Any:
        leaves = outputs(case, replace(op, **params), float_leaves(args)[1](floats))
        scale = sizes or [1.0] * len(leaves)
        return sum((x * uneven(x.shape, x.dtype)).mean() / s for x, s in zip(leaves, scale, strict=True))

    return f


@in_double
@each(DIFFERENTIABLE)
def test_derivatives_match_finite_differences(case: Case) -> None:
    op, args = ready(case.name)
    params, (floats, rebuild) = parameters(op), float_leaves(args)
    assert set(params) == set(case.learns)
    assert floats
    found = compiled(case.name)(op, args)
    # What can be is done by NumPy: JAX would compile each operation for each shape.
    sizes = [float(np.abs(np.asarray(x)).mean()) for x in found]
    weights = [np.asarray(weights_of(x.shape, x.dtype)) for x in found]

    def value(params: Any, floats: list[Any]) -> float:
        leaves = compiled(case.name)(replace(op, **params), rebuild(floats))
        return sum(float((np.asarray(x) * w).mean()) / s for x, w, s in zip(leaves, weights, sizes, strict=True))

    gradients = jax.jit(jax.grad(weighed(case, sizes), argnums=(0, 1)), compiler_options=QUICK)
    by_param, by_input = gradients(params, floats, op, args)
    trials = {}
    for i, (x, step) in enumerate(zip(floats, allowed_direction(args), strict=True)):
        trials[f"input {i}"] = (
            lambda v, i=i: value(params, [*floats[:i], v, *floats[i + 1 :]]),
            x,
            step,
            by_input[i],
        )
    for name, at in params.items():
        step = jax.tree.map(jnp.asarray, random_direction(at, seed=1))
        trials[name] = (lambda v, name=name: value(params | {name: v}, floats), at, step, by_param[name])
    for what, (function, at, step, gradient) in trials.items():
        assert all(np.isfinite(np.asarray(g)).all() for g in jax.tree.leaves(gradient)), what
        exact = tree_vdot(gradient, step)
        assert exact != 0, f"{what}: no derivative arrives"
        size = float(np.sqrt(np.mean(np.concatenate([np.ravel(x) for x in jax.tree.leaves(at)]) ** 2))) or 1.0
        # A kink within the larger step, or rounding in the smaller, spoils one of them, not both.
        numeric: list[float] = []
        for length in (1e-6 * size, 1e-7 * size):
            numeric += directional_fd(function, at, step, steps=(length,)).tolist()
            if abs(numeric[-1] / exact - 1) < 1e-5:
                break
        else:
            pytest.fail(f"{what}: {numeric} by differences, {exact} by the derivative")


@in_double
@each(LEARNING)
def test_every_learnable_changes_the_output(case: Case) -> None:
    op, args = ready(case.name)
    before = compiled(case.name)(op, args)
    for name, constraint in learnables(op).items():
        value = jax.tree.map(jnp.asarray, getattr(op, name))
        step = random_direction(value, seed=2)
        moved = jax.tree.map(lambda v, d, c=constraint: c.from_real(c.to_real(v) + 0.3 * d), value, step)
        assert all(bool(constraint.accepts(v).all()) for v in jax.tree.leaves(moved))
        after = compiled(case.name)(replace(op, **{name: moved}), args)
        assert max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(before, after, strict=True)) > 1e-3, name


@pytest.mark.slow
@in_double
@each([case for case in CASES if case.name not in SLOW])
def test_jit_equals_eager(case: Case) -> None:
    """Not of those that take long: loops that are compiled in any case, and a thousand small programs around them."""
    op, args = ready(case.name)
    for a, b in zip(outputs(case, op, args), compiled(case.name)(op, args), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


@in_double
@each(CASES)
def test_same_seed_gives_the_same_numbers(case: Case) -> None:
    first, again = ready(case.name), prepared(case, shared_data())
    assert jax.tree.structure(first) == jax.tree.structure(again)
    for a, b in zip(compiled(case.name)(*first), compiled(case.name)(*again), strict=True):
        np.testing.assert_array_equal(a, b)


@in_double
@each([case for case in CASES if case.equivariant])
def test_permuting_the_cells_permutes_the_results(case: Case) -> None:
    order = np.random.default_rng(0).permutation(CELLS)
    straight = compiled(case.name)(*ready(case.name))
    moved = compiled(case.name)(*prepared(case, shuffled_data()))
    for a, b in zip(straight, moved, strict=True):
        expected = np.asarray(a)[order] if a.ndim and a.shape[0] == CELLS else np.asarray(a)
        np.testing.assert_allclose(b, expected, rtol=1e-6, atol=1e-8 * np.abs(np.asarray(a)).max())


# Operators that look at one cell at a time, once they are initialised: minibatches of a fit rest on it.
BY_CELL = {
    "cell_weights",
    "denoise",
    "joint_vae",
    "log1p",
    "logistic_annotation",
    "mmd_integrate",
    "normalize_total",
    "parametric_umap",
    "pca_anchored",
    "scale",
    "vae_nb",
    "wgan_integrate",
}


@in_double
@each([case for case in CASES if case.name in BY_CELL])
def test_a_cell_has_the_same_result_without_the_others(case: Case) -> None:
    op, args = ready(case.name)
    assert op.by_cell
    few = np.arange(0, CELLS, 3)
    # Compiled: outside of that, each operation on fewer cells is a program of its own.
    some = compiled(case.name)(op, case.inputs(data_of_few()))
    for a, b in zip(compiled(case.name)(op, args), some, strict=True):
        if a.ndim and a.shape[0] == CELLS:
            np.testing.assert_allclose(b, np.asarray(a)[few], rtol=1e-6, atol=1e-8 * np.abs(np.asarray(a)).max())


def test_no_other_operator_claims_to_look_at_one_cell_at_a_time() -> None:
    claimed = {type(case.op()) for case in CASES if hasattr(type(case.op()), "by_cell")}
    assert claimed == {type(case.op()) for case in CASES if case.name in BY_CELL}


@functools.cache
def data_of_few() -> Data:
    return data(np.arange(0, CELLS, 3))


@functools.cache
def shuffled_data() -> Data:
    return data(np.random.default_rng(0).permutation(CELLS))


def derivative_at(case: Case, n: int) -> tuple[Callable[..., Any], Any, Any]:
    """Value and derivative of a case as one function, and the float32 shapes of its arguments for n cells."""
    # Simulated doublets are two for each cell; a time point has half of the cells.
    op, args = enlarged(
        ready(case.name), {CELLS // 2: n // 2, CELLS: n, 2 * CELLS: 2 * n, 3 * CELLS: 3 * n, GENES: MANY_GENES}
    )

    def both(op: Any, args: Any) -> Any:
        params, (floats, _) = parameters(op), float_leaves(args)
        return jax.value_and_grad(weighed(case), argnums=(0, 1))(params, floats, op, args)

    return (both if case.differentiable else functools.partial(outputs, case)), op, args


@functools.cache
def traced(name: str, n: int) -> jax.stages.Traced:
    """:func:`derivative_at` of a case as a program, traced once for all tests."""
    function, op, args = derivative_at(next(case for case in CASES if case.name == name), n)
    return jax.jit(function).trace(op, args)


@each(CASES)
def test_memory_grows_with_the_cells_and_not_their_square(case: Case) -> None:
    few, many = (largest_of(traced(case.name, n).jaxpr) for n in (LARGE // 2, LARGE))
    assert many < 2.5 * few, f"the largest array grows from {few:.3g} to {many:.3g} numbers"


@pytest.mark.slow
@each(MAIN)
def test_memory_at_50000_cells_is_within_budget(case: Case) -> None:
    needed = megabytes_of(traced(case.name, LARGE))
    assert needed < case.budget, f"{needed:.0f} MB"


@each(CASES)
def test_operator_is_a_frozen_pytree_with_hashable_statics(case: Case) -> None:
    for op in (case.op(), ready(case.name)[0]):
        leaves, structure = jax.tree.flatten(op)
        again = jax.tree.unflatten(structure, leaves)
        assert type(again) is type(op)
        assert jax.tree.structure(again) == structure
        assert hash(structure) == hash(jax.tree.structure(again))
        assert all(a is b for a, b in zip(leaves, jax.tree.leaves(again), strict=True))
        for f in fields_of_kind(op, "static"):
            assert getattr(again, f.name) == getattr(op, f.name)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(op, dataclasses.fields(op)[0].name if dataclasses.fields(op) else "field", 0)


@each(CASES)
def test_operator_keeps_to_its_vocabulary(case: Case) -> None:
    op = case.op()
    assert len(dataclasses.fields(op)) <= 8
    with pytest.raises(TypeError, match="positional"):
        type(op)(1)
