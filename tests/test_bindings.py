"""What every public function of `sd.pp` and `sd.tl` owes the AnnData it is given: a new one adds cases to the table."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import jax
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import record_array_support
import scdiffx as sd
import test_contract
from documented import assert_documented, assert_shapes, entries
from helpers import changed, compilations, contents, pbmc_counts, same

CELLS, GENES = 150, 120


class Case(NamedTuple):
    """A call on trial.

    `source` names what the AnnData holds beforehand (see :func:`source`). `writes` are the paths that change, with
    scanpy's dtypes, and `keyed` those with ``key_added="mine"``. `matrix` says whether the call reads `X` or a layer,
    `counts` whether it must refuse negative values.
    """

    name: str
    function: str
    source: str
    writes: Mapping[str, str]
    kwargs: Mapping[str, Any] = {}
    keyed: Mapping[str, str] | None = None
    matrix: bool = False
    counts: bool = False
    slow: bool = False


HVG = {"var/highly_variable": "bool", "var/means": "float64", "uns/hvg": "mapping", "uns/hvg/flavor": "str"}
DISPERSIONS = HVG | {"var/dispersions": "float64", "var/dispersions_norm": "float32"}
VARIANCES = HVG | {
    "var/highly_variable_rank": "float32",
    "var/variances": "float64",
    "var/variances_norm": "float64",
}


def pca_keys(scores: str, loadings: str, entry: str, loadings_dtype: str = "float32") -> dict[str, str]:
    return {
        f"obsm/{scores}": "float32",
        f"varm/{loadings}": loadings_dtype,
        f"uns/{entry}": "mapping",
        f"uns/{entry}/params": "mapping",
        f"uns/{entry}/variance": "float32",
        f"uns/{entry}/variance_ratio": "float32",
    }


def graph_keys(entry: str, prefix: str = "", distances: str = "float64") -> dict[str, str]:
    return {
        f"obsp/{prefix}distances": distances,
        f"obsp/{prefix}connectivities": "float32",
        f"uns/{entry}": "mapping",
        f"uns/{entry}/connectivities_key": "str",
        f"uns/{entry}/distances_key": "str",
        f"uns/{entry}/params": "mapping",
    }


def ligrec_keys(key: str) -> dict[str, str]:
    settings = {
        "cluster_key": "str",
        "neighbors": "bool",
        "shuffle": "str",
        "batch_key": "str",
        "complex_policy": "str",
    }
    settings |= {"threshold": "float", "n_perms": "int", "random_state": "int", "interactions": "int"}
    path = f"uns/{key}_params"
    return {f"uns/{key}": "DataFrame", path: "mapping"} | {f"{path}/{name}": kind for name, kind in settings.items()}


def communication_keys(key: str) -> dict[str, str]:
    settings = {"method": "str", "neighbors": "bool", "groupby": "str", "batch_key": "str"}
    settings |= dict.fromkeys(("n_genes", "n_programs", "n_perms", "random_state", "interactions"), "int")
    scores = {f"{name}/{model}": "float" for name in ("r2", "r2_test") for model in ("own", "types", "linear")}
    path = f"uns/{key}_params"
    return {
        f"obsm/X_{key}": "float32",
        f"uns/{key}": "DataFrame",
        f"uns/{key}_groups": "DataFrame",
        path: "mapping",
        **{f"{path}/{name}": "mapping" for name in ("r2", "r2_test")},
        **{f"{path}/{name}": kind for name, kind in (settings | scores).items()},
    }


def leiden_keys(key: str) -> dict[str, str]:
    return {
        f"obs/{key}": "category",
        f"obsm/{key}_probabilities": "float32",
        f"uns/{key}": "mapping",
        f"uns/{key}/params": "mapping",
        f"uns/{key}/modularity": "float",
    }


def archetype_keys(key: str, *extra: str) -> dict[str, str]:
    return {
        f"obsm/{'archetype' if key == 'archetypes' else key}_weights": "float32",
        f"uns/{key}": "mapping",
        f"uns/{key}/params": "mapping",
        f"uns/{key}/positions": "float32",
        f"uns/{key}/explained": "float",
        **{f"uns/{key}/{name}": "float64" for name in extra},
    }


def phate_keys(key: str, entry: str) -> dict[str, str]:
    return {
        f"obsm/{key}": "float32",
        f"uns/{entry}": "mapping",
        f"uns/{entry}/params": "mapping",
        f"uns/{entry}/t": "int",
        f"uns/{entry}/entropy": "float32",
        f"uns/{entry}/stress": "float",
    }


def parametric_umap_keys(key: str) -> dict[str, str]:
    layers = ("first", "second", "third", "last")
    return {
        f"obsm/X_{key}": "float32",
        f"uns/{key}": "mapping",
        f"uns/{key}/params": "mapping",
        f"uns/{key}/net": "mapping",
        **{f"uns/{key}/net/{name}{part}": "float32" for name in layers for part in ("", "_shift")},
        f"uns/{key}/center": "float32",
        f"uns/{key}/scale": "float",
        f"uns/{key}/history": "float64",
    }


def integration_keys(name: str) -> dict[str, str]:
    checked = ("reconstruction", "discrepancy", "mixing", "conservation")
    return {
        f"obsm/X_{name}": "float32",
        **{f"uns/{name}{part}": "mapping" for part in ("", "/params", "/history")},
        **{f"uns/{name}/history/{part}": "float64" for part in checked},
        f"uns/{name}/history/kept": "int",
    }


def grn_keys(key: str, activity: str) -> dict[str, str]:
    return {
        f"obsm/{activity}": "float32",
        f"var/{key}_r2": "float32",
        f"uns/{key}": "DataFrame",
        f"uns/{key}_params": "mapping",
        f"uns/{key}_params/tfs": "object",
        f"uns/{key}_params/method": "str",
        f"uns/{key}_params/n_subsamples": "int",
        f"uns/{key}_params/penalty": "float",
        f"uns/{key}_params/random_state": "int",
        f"uns/{key}_params/prior": "bool",
    }


def attention_keys(key: str, activity: str) -> dict[str, str]:
    of_others = {f"uns/{key}_params/{name}" for name in ("penalty", "n_subsamples")}
    return {
        **{name: kind for name, kind in grn_keys(key, activity).items() if name not in of_others},
        f"var/{key}_r2_linear": "float32",
        f"uns/{key}_params/n_steps": "int",
        f"uns/{key}_params/n_regulators": "int",
    }


def kmeans_keys(key: str) -> dict[str, str]:
    return {
        f"obs/{key}": "category",
        f"obsm/{key}_probabilities": "float32",
        f"uns/{key}": "mapping",
        f"uns/{key}/params": "mapping",
        f"uns/{key}/centers": "float32",
        f"uns/{key}/inertia": "float",
        f"uns/{key}/temperature": "float",
    }


def domain_keys(key: str, found: dict[str, str] | None = None) -> dict[str, str]:
    return {
        f"obs/{key}": "category",
        f"obsm/X_{key}": "float32",
        f"obsm/{key}_probabilities": "float32",
        f"uns/{key}": "mapping",
        f"uns/{key}/params": "mapping",
        f"uns/{key}/log_likelihood": "float",
        **{f"uns/{key}/{name}": kind for name, kind in (found or {"hops": "float"}).items()},
    }


NETWORK = {"held_out_error": "float", "history": "mapping", "history/train": "float64", "history/validation": "float64"}


def annotation_keys(key: str) -> dict[str, str]:
    numbers = ("penalty", "temperature", "accuracy", "calibration_error", "unlike", "unassigned")
    return {
        f"obs/{key}": "category",
        f"obs/{key}_confidence": "float32",
        f"obsm/{key}_probabilities": "DataFrame",
        f"uns/{key}": "mapping",
        f"uns/{key}/params": "mapping",
        f"uns/{key}/names": "object",
        **{f"uns/{key}/{name}": "float" for name in numbers},
    }


def marker_keys(key: str) -> dict[str, str]:
    return {
        f"obs/{key}": "category",
        f"obs/{key}_confidence": "float32",
        f"obsm/{key}_probabilities": "DataFrame",
        f"uns/{key}": "mapping",
        f"uns/{key}/params": "mapping",
        f"uns/{key}/names": "object",
        f"uns/{key}/log_folds": "DataFrame",
        f"uns/{key}/proportions": "float64",
        f"uns/{key}/log_likelihood": "float",
        f"uns/{key}/converged": "bool",
        f"uns/{key}/unassigned": "float",
    }


def scanvi_keys(key: str, latent: str) -> dict[str, str]:
    curves = ("bound", "classification", "vae_train", "vae_validation", "vae_validation_nll")
    return {
        **{path: kind for path, kind in annotation_keys(key).items() if not path.endswith("/penalty")},
        f"obsm/{latent}": "float32",
        f"uns/{key}/history": "mapping",
        **{f"uns/{key}/history/{name}": "float64" for name in curves},
    }


def vae_keys(latent: str = "X_vae", entry: str = "vae") -> dict[str, str]:
    weights = "encoder_in encoder_gain encoder_bias encoder_out encoder_out_bias decoder_in decoder_batch decoder_out"
    curves = ("train", "validation", "validation_nll")
    return {
        f"obsm/{latent}": "float32",
        **{f"uns/{entry}{part}": "mapping" for part in ("", "/params", "/net", "/history")},
        **{f"uns/{entry}/net/{name}": "float32" for name in [*weights.split(), "gene_bias", "log_theta"]},
        **{f"uns/{entry}/history/{name}": "float64" for name in curves},
        **{f"uns/{entry}/{name}": "float" for name in curves[1:]},
    }


def joint_vae_keys(latent: str = "X_vae", entry: str = "vae", prefix: str = "vae") -> dict[str, str]:
    weights = "protein_in protein_in_bias protein_out protein_bias protein_log_theta background_mean background_log_std"
    return vae_keys(latent, entry) | {
        f"obsm/X_{prefix}_proteins": "DataFrame",
        f"obsm/{prefix}_foreground": "DataFrame",
        **{f"uns/{entry}/net/{name}": "float32" for name in weights.split()},
    }


def denoise_keys(key: str = "denoise") -> dict[str, str]:
    layers = {"attend": ("", "_out", "_gain", "_bias"), "feed": ("_gain", "_bias", "_in", "_in_bias", "_out")}
    layers |= {"read": ("_query", "_key", "_value", "_out"), "last": ("_gain", "_bias"), "join": ("", "_bias")}
    names = [f"{layer}{part}" for layer, parts in layers.items() for part in parts]
    names += ["gene", "gene_out", "gene_bias", "count", "depth", "log_depth", "log_theta", "inducing"]
    return {
        **{f"uns/{key}{part}": "mapping" for part in ("", "/params", "/net", "/history")},
        **{f"uns/{key}/net/{name}": "float32" for name in names},
        **{f"uns/{key}/history/{name}": "float64" for name in ("train", "validation")},
        **{f"uns/{key}/{name}": "float" for name in ("validation", "validation_gene_mean")},
        f"uns/{key}/tokens": "int32",
    }


def distribution_keys(key: str) -> dict[str, str]:
    return {
        f"varm/{key}": "float32",
        f"uns/{key}": "mapping",
        f"uns/{key}/params": "mapping",
        f"uns/{key}/groups": "object",
        f"uns/{key}/table": "DataFrame",
    }


FATES = {
    "obsm/lineages_fwd": "float64",
    "obs/term_states_fwd": "category",
    "obs/priming_degree_fwd": "float64",
    "uns/term_states_fwd_colors": "object",
    "uns/fate": "mapping",
    "uns/fate/params": "mapping",
    "uns/fate/names": "object",
    "uns/fate/colors": "object",
    "uns/fate/n_unreaching": "int64",
}


def switch_keys(key: str) -> dict[str, str]:
    columns = {"time": "float32", "strength": "float32", "pval": "float64", "qval": "float64"}
    uns = {f"uns/{key}": "mapping", f"uns/{key}/params": "mapping", f"uns/{key}/unconverged": "int"}
    return {f"var/{key}_{name}": dtype for name, dtype in columns.items()} | uns


def attribution_keys(key: str) -> dict[str, str]:
    return {
        f"varm/{key}": "DataFrame",
        f"uns/{key}": "mapping",
        f"uns/{key}/params": "mapping",
        f"uns/{key}/groups": "object",
    }


def magic_keys(key: str, layer: bool = True) -> dict[str, str]:
    return {
        **({f"layers/{key}": "float32"} if layer else {}),
        f"uns/{key}": "mapping",
        f"uns/{key}/params": "mapping",
        f"uns/{key}/t": "float",
    }


def ambient_keys(layer: str, prefix: str, *extra: str) -> dict[str, str]:
    return {
        f"layers/{layer}": "float32",
        f"obs/{prefix}_fraction": "float32",
        f"var/{prefix}_profile": "float32",
        **{f"uns/{prefix}{part}": "mapping" for part in ("", "/params")},
        f"uns/{prefix}/level": "float64",
        f"uns/{prefix}/concentration": "float",
        **{f"uns/{prefix}/{name}": "object" for name in extra},
    }


def coupling_keys(key: str, growth: str) -> dict[str, str]:
    arrays = dict.fromkeys(("f", "g", "scale", "cost", "error"), "float32")
    rest = {"times": "float64", "labels": "object", "iterations": "int32", "epsilon": "float", "fingerprint": "int"}
    return {
        f"obs/{growth}": "float32",
        **{f"uns/{key}{part}": "mapping" for part in ("", "/params")},
        **{f"uns/{key}/{name}": dtype for name, dtype in (arrays | rest).items()},
    }


def slice_keys(key: str, coordinates: str) -> dict[str, str]:
    arrays = dict.fromkeys(("rotation", "shift", "objective", "error"), "float64")
    rest = {"slices": "object", "pairs": "int32", "steps": "int32", "plan": "float32", "group": "int32"}
    return {
        f"obsm/{coordinates}": "float32",
        **{f"uns/{key}{part}": "mapping" for part in ("", "/params")},
        **{f"uns/{key}/{name}": dtype for name, dtype in (arrays | rest).items()},
    }


def velocity_keys(variance: bool) -> dict[str, str]:
    return {
        **{f"layers/{name}": "float32" for name in ("Ms", "Mu", "velocity")},
        **({"layers/variance_velocity": "float32"} if variance else {}),
        "var/velocity_gamma": "float32",
        "var/velocity_qreg_ratio": "float32",
        "var/velocity_r2": "float64",
        "var/velocity_genes": "bool",
        "uns/velocity_params": "mapping",
        "uns/velocity_params/mode": "str",
        "uns/velocity_params/fit_offset": "bool",
        "uns/velocity_params/perc": "list",
    }


def dynamical_keys() -> dict[str, str]:
    names = "alpha beta gamma t_ scaling u0 s0 alignment_scaling std_u std_s likelihood pval_steady steady_u steady_s"
    return {
        **{f"layers/{name}": "float32" for name in ("Ms", "Mu")},
        **{f"layers/{name}": "float64" for name in ("velocity", "velocity_u", "fit_t", "fit_tau", "fit_tau_")},
        **{f"var/fit_{name}": "float64" for name in [*names.split(), "variance", "r2"]},
        "var/velocity_genes": "bool",
        "varm/loss": "float64",
        "uns/velocity_params": "mapping",
        "uns/velocity_params/mode": "str",
        "uns/velocity_params/fit_offset": "bool",
        "uns/velocity_params/perc": "list",
        "uns/recover_dynamics": "mapping",
        **{
            f"uns/recover_dynamics/{name}": "bool"
            for name in ("fit_connected_states", "fit_basal_transcription", "use_raw")
        },
    }


SCRUBLET = {
    "obs/doublet_score": "float64",
    "obs/predicted_doublet": "bool",
    "uns/scrublet": "mapping",
    "uns/scrublet/doublet_scores_sim": "float64",
    "uns/scrublet/doublet_parents": "int64",
    "uns/scrublet/threshold": "float",
    "uns/scrublet/parameters": "mapping",
    "uns/scrublet/parameters/expected_doublet_rate": "float",
    "uns/scrublet/parameters/sim_doublet_ratio": "float",
    "uns/scrublet/parameters/n_neighbors": "int",
    "uns/scrublet/parameters/random_state": "int",
}
LIGANDS = [("ISG15", "TNFRSF4"), ("S100A8_S100A9", "CD52"), ("CD52", "ENO1")]
DIFFMAP = {"obsm/X_diffmap": "float32", "uns/diffmap_evals": "float32"}

CASES = [
    Case(
        "normalize_total",
        "pp.normalize_total",
        "counts",
        {"X": "float32"},
        {"target_sum": 1e3},
        keyed={"X": "float32", "obs/mine": "float32"},
        matrix=True,
        counts=True,
    ),
    Case(
        "log1p",
        "pp.log1p",
        "counts",
        {"X": "float32", "uns/log1p": "mapping", "uns/log1p/base": "NoneType"},
        matrix=True,
        counts=True,
    ),
    Case(
        "scale",
        "pp.scale",
        "log",
        {"X": "float32", "var/mean": "float64", "var/std": "float64"},
        {"max_value": 3},
        matrix=True,
    ),
    Case(
        "scale_uncentred",
        "pp.scale",
        "log",
        {"X": "float32", "var/mean": "float64", "var/std": "float64"},
        {"zero_center": False},
        matrix=True,
    ),
    Case("hvg", "pp.highly_variable_genes", "log", DISPERSIONS, {"n_top_genes": 40}, matrix=True, counts=True),
    Case(
        "hvg_batches",
        "pp.highly_variable_genes",
        "log",
        DISPERSIONS | {"var/highly_variable_nbatches": "int64", "var/highly_variable_intersection": "bool"},
        {"batch_key": "batch"},
        matrix=True,
        counts=True,
    ),
    Case(
        "hvg_soft",
        "pp.highly_variable_genes",
        "log",
        DISPERSIONS | {"var/gene_weight": "float32"},
        {"soft": True},
        matrix=True,
        counts=True,
    ),
    Case(
        "hvg_v3",
        "pp.highly_variable_genes",
        "counts",
        VARIANCES,
        {"flavor": "seurat_v3", "n_top_genes": 40},
        matrix=True,
        counts=True,
    ),
    Case(
        "pca",
        "pp.pca",
        "log",
        pca_keys("X_pca", "PCs", "pca"),
        {"n_comps": 9},
        keyed=pca_keys("mine", "mine", "mine"),
        matrix=True,
    ),
    Case(
        "pca_masked",
        "pp.pca",
        "selected",
        pca_keys("X_pca", "PCs", "pca", "float64"),
        {"n_comps": 9},
        matrix=True,
    ),
    Case(
        "neighbors",
        "pp.neighbors",
        "reduced",
        graph_keys("neighbors"),
        {"n_neighbors": 9},
        keyed=graph_keys("mine", "mine_"),
    ),
    Case(
        "neighbors_of_x",
        "pp.neighbors",
        "log",
        graph_keys("neighbors", distances="float32"),
        {"n_neighbors": 9, "use_rep": "X", "metric": "cosine", "method": "gauss"},
        matrix=True,
    ),
    Case(
        "vae",
        "pp.vae",
        "counts",
        vae_keys() | {"layers/vae_normalized": "float32"},
        {"genes": "all", "max_epochs": 2, "batch_key": "batch", "progress": False},
        keyed=vae_keys("mine", "mine") | {"layers/mine_normalized": "float32"},
        matrix=True,
        counts=True,
    ),
    Case(
        "vae_genes",
        "pp.vae",
        "counts",
        vae_keys() | {"obsm/X_vae_normalized": "float32"},
        {"genes": ["HES4", "TNFRSF4"], "max_epochs": 1, "n_latent": 3, "progress": False},
        keyed=vae_keys("mine", "mine") | {"obsm/X_mine_normalized": "float32"},
        matrix=True,
        counts=True,
    ),
    Case(
        "vae_proteins",
        "pp.vae",
        "stained",
        joint_vae_keys(),
        {"protein_key": "protein", "max_epochs": 1, "n_latent": 3, "progress": False},
        keyed=joint_vae_keys("mine", "mine", "mine"),
        matrix=True,
        counts=True,
        slow=True,
    ),
    Case(
        "magic",
        "pp.magic",
        "reduced",
        magic_keys("magic"),
        {"t": 2},
        keyed=magic_keys("mine"),
        matrix=True,
    ),
    Case(
        "magic_genes",
        "pp.magic",
        "graph",
        {"obsm/X_magic": "float32", "uns/magic/genes": "object", **magic_keys("magic", layer=False)},
        {"genes": ["PARK7", "HES4"], "neighbors_key": "neighbors"},
        matrix=True,
    ),
    *(
        Case(
            name,
            "pp.harmony_integrate",
            "reduced",
            {
                "obsm/X_pca_harmony": "float32",
                **{f"uns/harmony{part}": "mapping" for part in ("", "/params")},
                "uns/harmony/objective": "float64",
                "uns/harmony/n_rounds": "int",
                "uns/harmony/converged": "bool",
            },
            {"key": key},
            slow=name == "harmony_columns",
        )
        for name, key in (("harmony", "batch"), ("harmony_columns", ["batch", "cell_type"]))
    ),
    *(
        Case(
            name,
            f"pp.{name}_integrate",
            "reduced",
            integration_keys(name),
            {"key": "batch", "max_steps": 2, "n_hidden": 8, "progress": False},
            slow=True,
        )
        for name in ("mmd", "wgan")
    ),
    Case(
        "mmd_counts",
        "pp.mmd_integrate",
        "counts",
        integration_keys("mmd"),
        {"key": "batch", "basis": None, "max_steps": 2, "n_hidden": 8, "n_latent": 3, "progress": False},
        matrix=True,
        counts=True,
        slow=True,
    ),
    Case(
        "denoise",
        "pp.denoise",
        "counts",
        {"layers/denoised": "float32", **denoise_keys()},
        {"max_epochs": 1, "progress": False},
        keyed={"layers/mine": "float32", **denoise_keys("mine")},
        matrix=True,
        counts=True,
    ),
    Case(
        "denoise_genes",
        "pp.denoise",
        "counts",
        {"obsm/X_denoised": "float32", **denoise_keys()},
        {"genes": ["TNFRSF4", "HES4"], "max_epochs": 1, "progress": False},
        keyed={"obsm/X_mine": "float32", **denoise_keys("mine")},
        matrix=True,
        counts=True,
        slow=True,
    ),
    Case(
        "solo",
        "pp.solo",
        "counts",
        {
            "obs/solo_score": "float32",
            "obs/solo_predicted_doublet": "bool",
            **{f"uns/solo{part}": "mapping" for part in ("", "/params", "/history")},
            **{f"uns/solo/history/{name}": "float64" for name in ("train", "validation")},
            "uns/solo/estimated_rate": "float",
        },
        {"max_epochs": 2, "batch_key": "batch", "progress": False},
        matrix=True,
        counts=True,
    ),
    Case(
        "remove_ambient",
        "pp.remove_ambient",
        "counts",
        ambient_keys("decontaminated", "ambient", "groups"),
        {"groupby": "cell_type"},
        keyed=ambient_keys("mine", "mine", "groups"),
        matrix=True,
        counts=True,
    ),
    Case(
        "remove_ambient_clustered",
        "pp.remove_ambient",
        "counts",
        ambient_keys("decontaminated", "ambient"),
        {"contamination": 0.1},
        keyed=ambient_keys("mine", "mine"),
        matrix=True,
        counts=True,
        slow=True,
    ),
    Case(
        "cell_weights",
        "pp.cell_weights",
        "counts",
        {"obs/cell_weight": "float32"},
        {"bounds": {"quality": (0.2, None)}},
        keyed={"obs/mine": "float32"},
    ),
    Case(
        "scrublet",
        "pp.scrublet",
        "counts",
        SCRUBLET,
        {"threshold": 0.2},
        matrix=True,
        counts=True,
    ),
    Case(
        "scrublet_classifier",
        "pp.scrublet",
        "counts",
        SCRUBLET | {"uns/scrublet/parameters/method": "str"},
        {"method": "classifier"},
        matrix=True,
        counts=True,
        slow=True,
    ),
    Case(
        "mask_counts",
        "pp.mask_counts",
        "counts",
        {"layers/shown": "float32", "layers/hidden": "float32"},
        matrix=True,
        counts=True,
    ),
    Case(
        "split_counts",
        "pp.split_counts",
        "counts",
        {"layers/fit": "float32", "layers/choose": "float32", "layers/test": "float32"},
        matrix=True,
        counts=True,
    ),
    Case(
        "differential_distribution",
        "tl.differential_distribution",
        "log",
        distribution_keys("differential_distribution"),
        {"groupby": "batch"},
        keyed=distribution_keys("mine"),
        matrix=True,
    ),
    Case(
        "ot_trajectory",
        "tl.ot_trajectory",
        "timed",
        coupling_keys("ot_trajectory", "growth_rate"),
        {"time_key": "day"},
        keyed=coupling_keys("mine", "mine_growth_rate"),
    ),
    Case(
        "align_slices",
        "tl.align_slices",
        "pieces",
        slice_keys("align_slices", "spatial_aligned"),
        {"batch_key": "batch", "epsilon": 0.05},
        keyed=slice_keys("mine", "mine_aligned"),
        matrix=True,
        counts=True,
    ),
    Case(
        "ot_pull",
        "tl.ot_pull",
        "coupled",
        {"obsm/fate": "DataFrame"},
        {"groupby": "cell_type"},
        keyed={"obsm/mine": "DataFrame"},
    ),
    Case(
        "ot_push",
        "tl.ot_push",
        "coupled",
        {"obs/origin": "float32"},
        {"groupby": "quality"},
        keyed={"obs/mine": "float32"},
    ),
    Case("ot_pull_numbers", "tl.ot_pull", "coupled", {"obs/fate": "float32"}, {"groupby": "quality"}, slow=True),
    Case("ot_push_groups", "tl.ot_push", "coupled", {"obsm/origin": "DataFrame"}, {"groupby": "cell_type"}, slow=True),
    Case(
        "switch_de",
        "tl.switch_de",
        "log",
        switch_keys("switch"),
        {"pseudotime": "quality", "n_permutations": 3},
        keyed=switch_keys("mine"),
        matrix=True,
        counts=True,
    ),
    Case(
        "attribution",
        "tl.attribution",
        "log",
        attribution_keys("attribution_quality"),
        {"target": "quality", "groupby": "batch"},
        keyed=attribution_keys("mine"),
        matrix=True,
    ),
    Case("diffmap", "tl.diffmap", "graph", DIFFMAP, {"n_comps": 6}),
    Case(
        "pseudotime",
        "tl.pseudotime",
        "graph",
        DIFFMAP | {"obs/dpt_pseudotime": "float32", "uns/iroot": "int"},
        {"root": 3},
    ),
    Case("dpt", "tl.dpt", "rooted", DIFFMAP | {"obs/dpt_pseudotime": "float32"}),
    Case(
        "fate_probabilities",
        "tl.fate_probabilities",
        "graph",
        FATES,
        {"terminal_states": ["CD19+ B", "CD14+ Monocyte"], "groupby": "cell_type", "time_key": "quality"},
    ),
    Case(
        "archetypes",
        "tl.archetypes",
        "reduced",
        archetype_keys("archetypes", "curve", "spread"),
        {"max_archetypes": 4, "n_init": 1, "n_bootstrap": 2},
        keyed=archetype_keys("mine", "curve", "spread"),
    ),
    Case(
        "annotate",
        "tl.annotate",
        "labelled",
        annotation_keys("annotation"),
        {"labels_key": "known", "penalty": 0.1, "n_folds": 2},
        keyed=annotation_keys("mine"),
        matrix=True,
    ),
    Case(
        "annotate_markers",
        "tl.annotate",
        "counts",
        marker_keys("annotation"),
        {"mode": "cellassign", "markers": {"T/NK": ["GNLY", "CD8A", "CD8B"], "Monocyte": ["S100A8", "S100A9"]}},
        keyed=marker_keys("mine"),
        matrix=True,
        counts=True,
        slow=True,
    ),
    Case(
        "annotate_scanvi",
        "tl.annotate",
        "known",
        scanvi_keys("annotation", "X_scanvi"),
        {"mode": "scanvi", "labels_key": "known", "batch_key": "batch", "n_latent": 3, "max_epochs": 1, "n_folds": 2},
        keyed=scanvi_keys("mine", "X_mine"),
        matrix=True,
        counts=True,
        slow=True,
    ),
    Case(
        "grn",
        "tl.grn",
        "log",
        grn_keys("grn", "tf_activity"),
        {"tfs": ["TNFRSF4", "HES4"]},
        keyed=grn_keys("mine", "mine_activity"),
        matrix=True,
    ),
    Case(
        "grn_gat",
        "tl.grn",
        "log",
        attention_keys("grn", "tf_activity"),
        {"tfs": ["TNFRSF4", "HES4"], "method": "gat", "n_regulators": 2, "n_steps": 2},
        keyed=attention_keys("mine", "mine_activity"),
        matrix=True,
        slow=True,
    ),
    Case(
        "spatial_domains",
        "tl.spatial_domains",
        "placed",
        domain_keys("spatial_domain"),
        {"n_domains": 3, "hops": 2, "n_init": 2, "n_neighbors": 3, "batch_key": "batch"},
        keyed=domain_keys("mine"),
    ),
    Case(
        "spatial_domains_gat",
        "tl.spatial_domains",
        "placed",
        domain_keys("spatial_domain", NETWORK),
        {"n_domains": 3, "method": "gat", "max_steps": 10, "n_comps": 2, "n_init": 2, "batch_key": "batch"},
        keyed=domain_keys("mine", NETWORK),
        slow=True,
    ),
    Case("kmeans", "tl.kmeans", "reduced", kmeans_keys("kmeans"), {"n_clusters": 4}, keyed=kmeans_keys("mine")),
    Case(
        "umap",
        "tl.umap",
        "graph",
        {"obsm/X_umap": "float32", "uns/umap": "mapping", "uns/umap/params": "mapping"},
        {"maxiter": 20},
        keyed={"obsm/mine": "float32", "uns/mine": "mapping", "uns/mine/params": "mapping"},
    ),
    Case(
        "umap_densmap",
        "tl.umap",
        "graph",
        {
            "obsm/X_umap": "float32",
            "uns/umap": "mapping",
            "uns/umap/params": "mapping",
            "uns/umap/density_correlation": "float",
        },
        {"maxiter": 20, "densmap": True},
        slow=True,
    ),
    Case(
        "parametric_umap",
        "tl.parametric_umap",
        "graph",
        parametric_umap_keys("parametric_umap"),
        {"n_steps": 20, "n_hidden": 8, "progress": False},
        keyed=parametric_umap_keys("mine"),
    ),
    Case("phate", "tl.phate", "reduced", phate_keys("X_phate", "phate"), keyed=phate_keys("mine", "mine")),
    Case("leiden", "tl.leiden", "graph", leiden_keys("leiden"), keyed=leiden_keys("mine")),
    Case(
        "ligrec",
        "tl.ligrec",
        "log",
        ligrec_keys("ligrec"),
        {"cluster_key": "cell_type", "interactions": LIGANDS, "batch_key": "batch", "n_perms": 9},
        keyed=ligrec_keys("mine"),
        matrix=True,
    ),
    Case(
        "communication",
        "tl.communication",
        "log_placed",
        communication_keys("communication"),
        {"interactions": LIGANDS, "groupby": "cell_type", "batch_key": "batch", "n_programs": 2, "n_perms": 3},
        keyed=communication_keys("mine"),
        matrix=True,
    ),
    *(
        Case(
            f"velocity_{mode}",
            "tl.velocity",
            "spliced",
            velocity_keys(mode == "stochastic"),
            {"mode": mode, "min_r2": -9.0},
            slow=mode == "stochastic",
        )
        for mode in ("deterministic", "stochastic")
    ),
    Case(
        "velocity_dynamical",
        "tl.velocity",
        "spliced",
        dynamical_keys(),
        {"mode": "dynamical", "min_r2": -9.0},
        slow=True,
    ),
    Case(
        "latent_time",
        "tl.latent_time",
        "with_times",
        {f"obs/{name}": "float64" for name in ("latent_time", "velocity_pseudotime", "root_cells", "end_points")},
        {"min_likelihood": 0.01},
        slow=True,
    ),
    Case(
        "velocity_graph",
        "tl.velocity_graph",
        "moving",
        {
            "uns/velocity_graph": "float32",
            "uns/velocity_graph_neg": "float32",
            "obs/velocity_self_transition": "float32",
            "uns/velocity_params/mode_neighbors": "str",
            "uns/velocity_params/n_recurse_neighbors": "int",
        },
    ),
    Case(
        "transition_matrix",
        "tl.transition_matrix",
        "directed",
        {"obsp/velocity_transitions": "float32"},
        {"weight_connectivities": 0.2},
        keyed={"obsp/mine": "float32"},
    ),
    Case(
        "velocity_embedding",
        "tl.velocity_embedding",
        "directed",
        {"obsm/velocity_pca": "float64", "uns/velocity_params/embeddings": "list"},
        {"basis": "pca"},
    ),
]
FUNCTIONS = sorted({case.function for case in CASES})
OF_MATRIX = [case for case in CASES if case.matrix]
OF_GRAPH = [case for case in CASES if case.source in ("graph", "rooted")]


# Searches in which the host decides between short programs.
MANY_PROGRAMS = {"align_slices": 100, "velocity_dynamical": 110}


def each(cases: list[Case]) -> Any:
    marked = [pytest.param(case, marks=pytest.mark.slow) if case.slow else case for case in cases]
    return pytest.mark.parametrize("case", marked, ids=lambda case: case.name)


def function_named(name: str) -> Callable[..., Any]:
    part, attribute = name.split(".")
    return getattr(getattr(sd, part), attribute)


@functools.cache
def _source(name: str) -> ad.AnnData:
    if name == "counts":
        adata = pbmc_counts(CELLS, GENES)
        adata.obs["batch"] = np.where(np.arange(CELLS) % 3 == 0, "first", "second")
        adata.obs["quality"] = np.linspace(0, 1, CELLS)
        adata.layers["spare"] = adata.X.copy()
        return adata
    earlier, step = {
        "log": ("counts", lambda a: (sd.pp.normalize_total(a), sd.pp.log1p(a))),
        "selected": ("log", lambda a: sd.pp.highly_variable_genes(a, n_top_genes=60)),
        "reduced": ("log", lambda a: sd.pp.pca(a, n_comps=9)),
        "graph": ("reduced", lambda a: sd.pp.neighbors(a, n_neighbors=9)),
        "placed": ("reduced", lambda a: a.obsm.update(spatial=np.asarray(a.obsm["X_pca"][:, 1::-1]))),
        "log_placed": ("log", lambda a: a.obsm.update(spatial=source("reduced").obsm["X_pca"][:, :2])),
        "pieces": ("counts", lambda a: a.obsm.update(spatial=source("reduced").obsm["X_pca"][:, :2])),
        "labelled": ("log", with_known),
        "known": ("counts", with_known),
        "timed": ("reduced", lambda a: a.obs.insert(0, "day", np.arange(CELLS) % 2 * 1.5)),
        "coupled": ("timed", lambda a: sd.tl.ot_trajectory(a, "day")),
        "spliced": ("graph", with_unspliced),
        "stained": ("counts", with_proteins),
        "moving": ("spliced", lambda a: sd.tl.velocity(a, mode="deterministic", min_r2=-9.0)),
        "directed": ("moving", sd.tl.velocity_graph),
        "with_times": ("spliced", timed),
        "rooted": ("graph", lambda a: a.uns.update(iroot=3)),
    }[name]
    adata = source(earlier)
    step(adata)
    return adata


def with_known(adata: ad.AnnData) -> None:
    adata.obs.insert(0, "known", adata.obs["cell_type"].where(np.arange(CELLS) % 3 > 0))


def with_unspliced(adata: ad.AnnData) -> None:
    """Layers of spliced counts, and of unspliced ones that lag behind in some cells."""
    adata.layers["spliced"] = adata.X.copy()
    lag = sp.diags(np.linspace(0.2, 0.6, CELLS)).astype(np.float32)
    adata.layers["unspliced"] = sp.csr_matrix(lag @ adata.X, dtype=np.float32)


def with_proteins(adata: ad.AnnData) -> None:
    """Counts of three proteins, each high in some types of cells."""
    types = adata.obs["cell_type"].cat.codes.to_numpy()[:, None]
    counts = np.random.default_rng(0).poisson(np.where(types % 3 == np.arange(3), 80, 6)).astype(np.float32)
    adata.obsm["protein"] = pd.DataFrame(counts, index=adata.obs_names, columns=["CD3", "CD19", "CD14"])


def timed(adata: ad.AnnData) -> None:
    sd.tl.velocity(adata, mode="dynamical", min_r2=-9.0)
    sd.tl.velocity_graph(adata)


def source(name: str) -> ad.AnnData:
    """Blood cells with real label names such as "CD4+/CD45RO+ Memory", as the named step of a workflow leaves them."""
    return _source(name).copy()


def call(case: Case, adata: ad.AnnData, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return function_named(case.function)(adata, **{**case.kwargs, **kwargs})


@functools.cache
def _result(name: str) -> tuple[ad.AnnData, list[str]]:
    case = next(case for case in CASES if case.name == name)
    adata = source(case.source)
    with compilations() as programs:
        assert call(case, adata) is None
    return adata, programs


def result(case: Case) -> ad.AnnData:
    """The AnnData after the call; not to be written to."""
    return _result(case.name)[0]


def kind(value: Any) -> str:
    if isinstance(value, str) and value == "mapping":
        return value
    return str(value.dtype) if hasattr(value, "dtype") else type(value).__name__


def top_paths(paths: set[str]) -> set[str]:
    return {re.sub("/params/.*", "/params", path) for path in paths}


def assert_wrote(before: Mapping[str, Any], adata: ad.AnnData, expected: Mapping[str, str]) -> None:
    after = contents(adata)
    assert top_paths(changed(before, after)) - HISTORY == set(expected)
    assert_one_call_more(before, after)
    assert {path: kind(after[path]) for path in expected} == dict(expected)


HISTORY = {"uns/scdiffx", "uns/scdiffx/history"} | {
    f"uns/scdiffx/session{part}" for part in ("", "/scdiffx", "/jax", "/platform")
}


def assert_one_call_more(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Every call adds one entry to the history, the same keys for all functions."""
    assert set(after) >= HISTORY
    lines = list(after["uns/scdiffx/history"])
    assert lines[:-1] == list(before.get("uns/scdiffx/history", []))


def assert_equal(a: ad.AnnData, b: ad.AnnData, rtol: float = 0.0) -> None:
    """Whether two AnnData hold the same, whichever calls made it."""
    left, right = ({p: v for p, v in contents(x).items() if p not in HISTORY} for x in (a, b))
    assert set(left) == set(right)
    different = [path for path in left if not same(left[path], right[path], rtol=rtol)]
    assert not different


def documented_arguments(case: Case) -> dict[str, str]:
    """The arguments that name keys, given or by default, as they stand in the Returns section."""
    parameters = inspect.signature(function_named(case.function)).parameters
    given = {name: parameter.default for name, parameter in parameters.items()} | dict(case.kwargs)
    return {name: value for name, value in given.items() if isinstance(value, str)}


def test_every_public_function_has_a_case() -> None:
    public = {f"{part}.{name}" for part in ("pp", "tl") for name in getattr(sd, part).__all__}
    # Two return new cells, two take a plan only, two are a model and make one: they have tests of their own.
    apart = {"pp.replicates", "tl.simulate", "tl.ot_interpolate", "tl.uncertainty", "tl.influence"}
    apart |= {"tl.annotation_model", "tl.AnnotationModel"}
    assert public - apart == set(FUNCTIONS)


@each(CASES)
def test_only_the_documented_keys_change(case: Case) -> None:
    assert_wrote(contents(_source(case.source)), result(case), case.writes)
    function, arguments = function_named(case.function), documented_arguments(case)
    assert_documented(function, case.writes, **arguments)
    assert_shapes(function, result(case), case.writes, **arguments)
    if case.keyed is not None:
        assert_documented(function, case.keyed, **{**arguments, "key_added": "mine"})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_documented_key_is_written(name: str) -> None:
    function = function_named(name)
    # A second name of a function shares its cases.
    said = inspect.getdoc(function)
    cases = [case for case in CASES if inspect.getdoc(function_named(case.function)) == said]
    for number, entry in enumerate(entries(function, documented_arguments(cases[0]))):
        if entry.where == "X" or entry.names:
            calls = [entries(function, documented_arguments(case))[number] for case in cases]
            found = any(call.matches(path) for call, case in zip(calls, cases, strict=True) for path in case.writes)
            assert found, f"no case of {name} writes {entry.where}{list(entry.names)}"


@each(CASES)
def test_written_values_live_on_the_host(case: Case) -> None:
    found = contents(result(case))
    assert not [path for path, value in found.items() if isinstance(value, jax.Array)]


@each(CASES)
def test_a_first_call_compiles_few_programs(case: Case) -> None:
    """What is computed outside of compiled functions costs a program for each operation."""
    programs = _result(case.name)[1]
    assert len(programs) <= MANY_PROGRAMS.get(case.name, 70), sorted(programs)


@each(CASES)
def test_copy_leaves_the_original_alone(case: Case) -> None:
    adata = source(case.source)
    before = contents(adata)
    expected = result(case)
    with compilations() as programs:
        copied = call(case, adata, copy=True)
    assert not programs, "a second call on like data compiled anew"
    assert not changed(before, contents(adata))
    assert copied is not adata
    assert_equal(copied, expected)


@each(CASES)
def test_a_view_becomes_actual_and_its_parent_stays(case: Case) -> None:
    parent = source(case.source)
    before = contents(parent)
    # Couplings and velocity graphs are between all cells in their order. Elsewhere a view of the same size: it compiles
    # nothing anew.
    of_all = case.source in ("coupled", "directed", "with_times")
    view = parent[:, np.arange(GENES) != 2] if of_all else parent[np.arange(CELLS)[::-1]]
    alone = view.copy()
    with pytest.warns(UserWarning, match="view") as caught:
        function_named(case.function)(view, **case.kwargs)
    assert {w.filename for w in caught if "view" in str(w.message)} == {__file__}
    assert not view.is_view
    assert not changed(before, contents(parent))
    call(case, alone)
    assert_equal(view, alone)


@each([case for case in CASES if "key_added" in inspect.signature(function_named(case.function)).parameters])
def test_key_added(case: Case) -> None:
    adata = source(case.source)
    if case.keyed is not None:
        before = contents(adata)
        call(case, adata, key_added="mine")
        assert_wrote(before, adata, case.keyed)
    else:
        assert any(other.keyed is not None for other in CASES if other.function == case.function)


def small_integers(case: Case) -> sp.csr_matrix:
    """A matrix whose values are the same as integers, float32 and float64, and whose exponentials are finite."""
    matrix = source("counts").X
    matrix.data = np.minimum(matrix.data, 6)
    return matrix


FORMATS: dict[str, Callable[[sp.csr_matrix], Any]] = {
    "csc_matrix": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
    "dense": lambda m: m.toarray(),
    "dense_fortran": lambda m: np.asfortranarray(m.toarray()),
    "csr_float64": lambda m: m.astype(np.float64),
    "dense_float64": lambda m: m.toarray().astype(np.float64),
    "csr_int": lambda m: m.astype(np.int32),
    "dense_int": lambda m: m.toarray().astype(np.int64),
}
# The others differ from these in what numpy and scipy make of them, and all functions read them by the same few lines.
OTHER_FORMATS = {"normalize_total", "log1p", "scale", "scale_uncentred", "hvg", "hvg_v3", "pca", "split_counts"}
FORMATTED = [
    pytest.param(
        case,
        form,
        marks=[pytest.mark.slow] if case.slow or form not in ("csc_array", "dense") else [],
        id=f"{case.name}-{form}",
    )
    for case in OF_MATRIX
    for form in FORMATS
    if form in ("csc_array", "dense") or case.name in OTHER_FORMATS
]


@functools.cache
def result_of_integers(name: str) -> dict[str, Any]:
    case = next(case for case in CASES if case.name == name)
    adata = source(case.source)
    adata.X = small_integers(case)
    call(case, adata)
    return contents(adata)


@pytest.mark.parametrize(("case", "form"), FORMATTED)
def test_every_matrix_format_gives_the_same(case: Case, form: str) -> None:
    expected = result_of_integers(case.name)
    adata = source(case.source)
    adata.X = given = FORMATS[form](small_integers(case))
    call(case, adata)
    found = contents(adata)
    for path in case.writes:
        a, b = (x[path].toarray() if sp.issparse(x[path]) else x[path] for x in (expected, found))
        if kind(a).startswith("float"):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=2e-5 * np.nanmax(np.abs(a)), err_msg=path)
        elif isinstance(a, pd.DataFrame):
            ranked = "gene" in a
            rows = [table.sort_values(["group", "gene"], ignore_index=True) if ranked else table for table in (a, b)]
            pd.testing.assert_frame_equal(*rows, rtol=1e-3, atol=1e-5)
        else:
            assert same(a, b), path
    if "X" in case.writes and case.name != "scale":
        assert type(found["X"]) is type(given)
        assert found["X"].dtype == (given.dtype if given.dtype.kind == "f" else np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["csc_array", "dense", "dask"])
def test_velocity_reads_layers_of_every_format(form: str) -> None:
    adata = source("spliced")
    case = next(case for case in CASES if case.name == "velocity_deterministic")
    for layer in ("spliced", "unspliced"):
        if form == "dask":
            array = pytest.importorskip("dask.array", reason="dask is not installed")
            adata.layers[layer] = array.from_array(adata.layers[layer].toarray())
        else:
            adata.layers[layer] = FORMATS[form](adata.layers[layer])
    if form == "dask":
        with pytest.raises(TypeError, match="dask"):
            call(case, adata)
    else:
        call(case, adata)
        np.testing.assert_allclose(adata.layers["velocity"], result(case).layers["velocity"], rtol=1e-4, atol=1e-6)


@each(CASES)
def test_what_is_written_can_be_changed(case: Case) -> None:
    adata = result(case)
    values = [adata.X, *adata.layers.values(), *adata.obsm.values(), *adata.varm.values(), *adata.obsp.values()]
    values += [
        value for key in case.writes if key.startswith("uns/") and (value := at_path(adata.uns, key)) is not None
    ]
    for value in values:
        for part in (value.data, value.indices, value.indptr) if sp.issparse(value) else (value,):
            assert not isinstance(part, np.ndarray) or part.flags.writeable


def at_path(uns: Any, path: str) -> Any:
    return functools.reduce(lambda part, key: part[key], path.split("/")[1:], uns)


@each([case for case in OF_MATRIX if "layer" in inspect.signature(function_named(case.function)).parameters])
def test_layer(case: Case) -> None:
    plain, layered = source(case.source), source(case.source)
    layered.layers["here"] = plain.X.copy()
    layered.X = sp.csr_matrix(plain.shape, dtype=np.float32)
    before = contents(layered)
    call(case, layered, layer="here")
    written = {"layers/here" if path == "X" else path: value for path, value in case.writes.items()}
    assert_wrote(before, layered, written)
    found, expected = contents(layered), contents(result(case))
    for path in case.writes:
        if "/params" not in path:
            assert same(found["layers/here" if path == "X" else path], expected[path]), path


@each(CASES)
@pytest.mark.parametrize("form", ["h5ad", pytest.param("zarr", marks=pytest.mark.slow)])
def test_round_trip_through_files(case: Case, form: str, tmp_path: Path) -> None:
    written = result(case).copy()
    path = tmp_path / f"written.{form}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(written, f"write_{form}")(path)
        back = getattr(ad, f"read_{form}")(path)
    assert any("/" in name for name in back.obs["cell_type"].cat.categories)
    left, right = contents(written), contents(back)
    assert set(left) == set(right)
    for path in case.writes:
        assert same(left[path], right[path]), path


def poisoned(case: Case, value: float, form: str) -> tuple[ad.AnnData, str]:
    """The source with one impossible value, and the words of the error that names its place."""
    adata = source(case.source)
    adata.X = FORMATS.get(form, sp.csr_matrix)(adata.X)
    cell, gene = 4, int(adata.X[[4]].nonzero()[1][3])
    if sp.issparse(adata.X):
        matrix = adata.X.tolil()
        matrix[cell, gene] = value
        adata.X = FORMATS.get(form, sp.csr_matrix)(matrix.tocsr())
    else:
        adata.X[cell, gene] = value
    return adata, re.escape(f"cell {adata.obs_names[cell]!r} and gene {adata.var_names[gene]!r}")


def assert_refuses(
    case: Case, adata: ad.AnnData, error: type[Exception], match: str | None = None, **kwargs: Any
) -> None:
    before = contents(adata)
    with pytest.raises(error, match=match):
        call(case, adata, **kwargs)
    assert not changed(before, contents(adata))


@each(OF_MATRIX)
@pytest.mark.parametrize("form", ["csr", "csc_matrix", "dense"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(case: Case, form: str, value: float) -> None:
    adata, where = poisoned(case, value, form)
    assert_refuses(case, adata, ValueError, f"{value}.*{where}.*not finite")


@each([case for case in OF_MATRIX if case.counts])
@pytest.mark.parametrize("form", ["csr", "dense"])
def test_negative_counts_are_refused(case: Case, form: str) -> None:
    adata, where = poisoned(case, -1, form)
    assert_refuses(case, adata, ValueError, f"-1.*{where}.*negative")


@each(CASES)
@pytest.mark.parametrize("axis", ["cells", "genes"])
def test_empty_data_are_refused(case: Case, axis: str) -> None:
    if axis == "genes" and not case.matrix:
        pytest.skip("reads no matrix")
    adata = source(case.source)
    adata = (adata[:0] if axis == "cells" else adata[:, :0]).copy()
    assert_refuses(case, adata, ValueError)


@each(CASES)
def test_one_cell_is_refused_or_has_a_finite_result(case: Case) -> None:
    adata = source(case.source)[:1].copy()
    if case.function in ("pp.normalize_total", "pp.log1p", "pp.scale", "pp.split_counts", "pp.mask_counts"):
        call(case, adata)
        matrix = adata.X.toarray() if sp.issparse(adata.X) else adata.X
        assert np.isfinite(matrix).all()
    elif case.function == "tl.leiden":
        call(case, adata)
        assert list(adata.obs["leiden"]) == ["0"]
    elif case.function == "pp.cell_weights":
        call(case, adata)
        assert np.isfinite(adata.obs["cell_weight"]).all()
    elif case.name == "remove_ambient":
        call(case, adata)
        assert adata.obs["ambient_fraction"].tolist() == [0]
    elif case.name == "magic_genes":
        call(case, adata)
        assert np.isfinite(adata.obsm["X_magic"]).all()
    else:
        adata.uns["iroot"] = 0
        assert_refuses(case, adata, ValueError, **({"root": 0} if "root" in case.kwargs else {}))


@each([case for case in OF_MATRIX if "layer" in inspect.signature(function_named(case.function)).parameters])
def test_unknown_layer(case: Case) -> None:
    assert_refuses(case, source(case.source), KeyError, r"'absent'.*Available: \['spare'\]", layer="absent")


@each(OF_MATRIX)
def test_missing_matrix(case: Case) -> None:
    adata = source(case.source)
    adata.X = None
    assert_refuses(case, adata, ValueError, "None")


# What these read passes in blocks of rows (tests/test_out_of_core.py); all others need the matrix in memory.
STREAMED = ("hvg", "hvg_batches", "hvg_v3", "pca", "pca_masked", "magic_genes", "ligrec")
REWRITTEN = ("normalize_total", "log1p")


@each([case for case in OF_MATRIX if case.name not in STREAMED])
def test_backed_data_are_refused(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "backed.h5ad"
    source(case.source).write_h5ad(path)
    adata = ad.read_h5ad(path, backed="r")
    before = {where: list(getattr(adata, where)) for where in ("obs", "var", "obsm", "varm", "obsp", "uns", "layers")}
    with pytest.raises(TypeError, match="in a file"):
        call(case, adata)
    assert before == {where: list(getattr(adata, where)) for where in before}
    adata.file.close()


@each([case for case in OF_MATRIX if case.name not in STREAMED + REWRITTEN])
def test_dask_is_refused(case: Case) -> None:
    array = pytest.importorskip("dask.array", reason="dask is not installed")
    adata = source(case.source)
    adata.X = array.from_array(adata.X.toarray())
    with pytest.raises(TypeError, match="to_memory"):
        call(case, adata)


@each(OF_GRAPH)
def test_missing_graph(case: Case) -> None:
    adata = source(case.source)
    assert_refuses(case, adata, ValueError, r"'absent'.*Run `sc.pp.neighbors` first", neighbors_key="absent")
    del adata.obsp["connectivities"]
    assert_refuses(case, adata, KeyError, r"'connectivities'.*Available: \['distances'\]")
    del adata.uns["neighbors"]
    assert_refuses(case, adata, ValueError, "Run `sc.pp.neighbors` first")


@each(OF_GRAPH)
def test_graph_that_is_not_finite(case: Case) -> None:
    adata = source(case.source)
    adata.obsp["connectivities"].data[5] = np.nan
    assert_refuses(case, adata, ValueError, "not finite")


@each([case for case in CASES if "rng" in inspect.signature(function_named(case.function)).parameters])
def test_seeds(case: Case) -> None:
    adata = source(case.source)
    assert_refuses(case, adata, TypeError, "not both", rng=0, random_state=0)
    assert_refuses(case, adata, TypeError, "rng='seed'", rng="seed")
    assert_refuses(case, adata, ValueError, "negative", random_state=-1)
    seeds = [{"rng": 7}, {"random_state": 7}, {"rng": jax.random.key(7)}]
    copies = [call(case, adata, copy=True, **seed) for seed in seeds]
    for other in copies[1:]:
        assert_equal(copies[0], other)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("wrong", [None, "adata", np.ones((3, 3)), {"X": 1}], ids=["none", "text", "array", "dict"])
def test_first_argument_must_be_an_anndata(name: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"must be an AnnData or a scdiffx plan, got {type(wrong).__name__}"):
        function_named(name)(wrong)


REFUSED = [
    ("normalize_total", {"target_sum": 0}, ValueError, "target_sum=0"),
    ("normalize_total", {"max_fraction": 1.5}, ValueError, "max_fraction=1.5"),
    ("log1p", {"base": -2}, ValueError, "base=-2"),
    ("log1p", {"base": 1}, ValueError, "base=1"),
    ("scale", {"max_value": 0}, ValueError, "max_value=0"),
    ("hvg", {"flavor": "best"}, ValueError, r"flavor='best'.*'seurat_v3'"),
    ("hvg", {"batch_key": "absent"}, KeyError, r"'absent'.*'batch'"),
    ("hvg", {"n_top_genes": 0}, ValueError, "n_top_genes=0"),
    ("hvg", {"n_bins": 0}, ValueError, "n_bins=0"),
    ("hvg_soft", {"batch_key": "absent"}, KeyError, r"'absent'.*'batch'"),
    ("hvg_v3", {"span": 2.0}, ValueError, "span=2"),
    ("hvg_v3", {"batch_key": "index"}, ValueError, "two cells"),
    ("pca", {"n_comps": 121}, ValueError, "n_comps=121.*120"),
    ("pca", {"n_comps": 0}, ValueError, "n_comps=0"),
    ("pca", {"mask_var": "absent"}, KeyError, "'absent'"),
    ("pca", {"svd_solver": "magic"}, ValueError, "svd_solver='magic'"),
    ("pca_masked", {"n_comps": 61}, ValueError, "n_comps=61.*60"),
    ("neighbors", {"n_neighbors": CELLS + 1}, ValueError, f"n_neighbors={CELLS + 1}.*{CELLS}"),
    ("neighbors", {"n_neighbors": 1}, ValueError, "n_neighbors=1"),
    ("neighbors", {"method": "best"}, ValueError, r"method='best'.*'gauss'"),
    ("neighbors", {"transformer": "sklearn"}, TypeError, "transformer='sklearn'"),
    ("neighbors", {"metric": "best"}, ValueError, r"metric='best'.*'cosine'"),
    ("neighbors", {"use_rep": "X_absent"}, KeyError, r"'X_absent'.*'X_pca'"),
    ("neighbors", {"n_pcs": 10}, ValueError, "10 dimensions.*9"),
    ("vae", {"likelihood": "poisson"}, ValueError, r"likelihood='poisson'.*'zinb'"),
    ("vae", {"dispersion": "cell"}, ValueError, r"dispersion='cell'.*'gene-batch'"),
    ("vae", {"batch_key": "absent"}, KeyError, r"'absent'.*'batch'"),
    ("vae", {"batch_key": "partial"}, ValueError, "missing for 1 of"),
    ("vae", {"genes": ["absent"]}, KeyError, "'absent'"),
    ("vae", {"genes": "some"}, ValueError, "genes='some'"),
    ("vae", {"n_latent": 0}, ValueError, "n_latent=0"),
    ("vae", {"max_epochs": 0}, ValueError, "max_epochs=0"),
    ("vae", {"patience": 0}, ValueError, "patience=0"),
    ("vae", {"library_size": 0}, ValueError, "library_size=0"),
    ("vae_proteins", {"protein_key": "absent"}, KeyError, r"protein_key='absent'.*'protein'"),
    ("vae_proteins", {"protein_key": "negative"}, ValueError, "-1.0 of cell .* and protein 0 is negative"),
    ("vae_proteins", {"modalities": ("rna", "prot")}, ValueError, r"either modalities=.*protein_key='protein'"),
    ("vae", {"modalities": ("rna", "prot")}, ValueError, r"parts of a MuData.*pass protein_key=.*'negative'"),
    ("vae_proteins", {"likelihood": "poisson"}, ValueError, r"likelihood='poisson'.*'zinb'"),
    ("mmd", {"key": "absent"}, KeyError, r"key='absent'.*'batch'"),
    ("mmd", {"key": "partial"}, ValueError, "key='partial' is missing for 1 of"),
    ("mmd", {"key": "only"}, ValueError, "all cells are of one batch"),
    ("mmd", {"basis": "X_absent"}, KeyError, r"basis='X_absent'.*'X_pca'"),
    ("mmd", {"weight": 0}, ValueError, "weight=0"),
    ("mmd", {"n_hidden": 0}, ValueError, "n_hidden=0"),
    ("mmd", {"layer": "counts"}, ValueError, r"layer='counts'.*basis=None.*'X_pca'"),
    ("mmd", {"n_latent": 3}, ValueError, "n_latent=3.*basis=None"),
    ("mmd_counts", {"n_latent": 0}, ValueError, "n_latent=0"),
    ("mmd_counts", {"key": "absent"}, KeyError, r"key='absent'.*'batch'"),
    ("wgan", {"max_steps": 0}, ValueError, "max_steps=0"),
    ("wgan", {"patience": 0}, ValueError, "patience=0"),
    ("harmony", {"key": "absent"}, KeyError, r"key='absent'.*'batch'"),
    ("harmony", {"key": ["batch", "partial"]}, ValueError, "key='partial' is missing for 1 of"),
    ("harmony", {"key": []}, ValueError, "there must be a column"),
    ("harmony", {"key": "only"}, ValueError, "all cells are of one batch"),
    ("harmony", {"basis": "X_absent"}, KeyError, r"basis='X_absent'.*'X_pca'"),
    ("harmony", {"theta": 0}, ValueError, "theta=0"),
    ("harmony", {"theta": [1.0, 2.0, 3.0]}, ValueError, r"theta has shape \(3,\).*1 or 2"),
    ("harmony", {"lamb": -1.0}, ValueError, "lamb=-1"),
    ("harmony", {"sigma": [0.1, 0.2]}, ValueError, "sigma has shape"),
    ("harmony", {"alpha": np.nan}, ValueError, "alpha=nan"),
    ("harmony", {"nclust": CELLS + 1}, ValueError, f"nclust={CELLS + 1}.*{CELLS} cells"),
    ("harmony", {"max_iter_harmony": 0}, ValueError, "max_iter_harmony=0"),
    ("harmony", {"max_iter_kmeans": 0}, ValueError, "max_iter_kmeans=0"),
    ("harmony", {"epsilon_harmony": np.inf}, ValueError, "epsilon_harmony=inf"),
    ("harmony", {"block_size": 0}, ValueError, "block_size=0"),
    ("harmony", {"batch_prop_cutoff": 1}, ValueError, "batch_prop_cutoff=1"),
    ("denoise", {"genes": ["absent"]}, KeyError, r"'absent'.*Available"),
    ("denoise", {"genes": []}, KeyError, "Available"),
    ("denoise", {"max_epochs": 0}, ValueError, "max_epochs=0"),
    ("denoise", {"patience": 0}, ValueError, "patience=0"),
    ("solo", {"doublet_rate": 1.0}, ValueError, "doublet_rate=1"),
    ("solo", {"threshold": 0.0}, ValueError, "threshold=0"),
    ("solo", {"doublet_ratio": 0}, ValueError, "doublet_ratio=0"),
    ("solo", {"n_latent": 0}, ValueError, "n_latent=0"),
    ("solo", {"batch_key": "index"}, ValueError, "at least two cells"),
    ("remove_ambient", {"groupby": "absent"}, KeyError, r"groupby='absent'.*'batch'"),
    ("remove_ambient", {"groupby": "partial"}, ValueError, "missing for 1 of"),
    ("remove_ambient", {"contamination": 1.0}, ValueError, "contamination=1"),
    ("remove_ambient", {"empty_profile": np.ones(3)}, ValueError, r"\(3,\).*120 genes"),
    ("remove_ambient", {"empty_profile": np.zeros(GENES)}, ValueError, "sum above 0"),
    ("remove_ambient", {"empty_profile": np.full(GENES, np.nan)}, ValueError, "numbers of at least 0"),
    ("remove_ambient", {"empty_profile": "soup"}, TypeError, "is a str"),
    ("ot_trajectory", {"time_key": "absent"}, KeyError, r"time_key='absent'.*'cell_type'"),
    ("ot_trajectory", {"time_key": "index"}, ValueError, "150 different values for 150 cells"),
    ("ot_trajectory", {"time_key": "partial"}, ValueError, "1 cells is missing"),
    ("ot_trajectory", {"time_key": "endless"}, ValueError, "finite"),
    ("ot_trajectory", {"epsilon": 0}, ValueError, "epsilon=0"),
    ("ot_trajectory", {"tau": (0.5, 1.2)}, ValueError, r"tau=\(0.5, 1.2\)"),
    ("ot_trajectory", {"tau": 0}, ValueError, r"tau=\(0, 0\)"),
    ("ot_trajectory", {"growth_iters": 0}, ValueError, "growth_iters=0"),
    ("ot_trajectory", {"max_iter": 0}, ValueError, "max_iter=0"),
    ("ot_trajectory", {"time_unit": -1}, ValueError, "time_unit=-1"),
    ("ot_trajectory", {"scale_cost": "max"}, ValueError, r"scale_cost='max'.*'median'"),
    ("ot_trajectory", {"scale_cost": -1.0}, ValueError, "scale_cost=-1"),
    ("ot_trajectory", {"use_rep": "X_absent"}, KeyError, r"use_rep='X_absent'.*'X_pca'"),
    ("ot_trajectory", {"layer": "spare"}, ValueError, "layer='spare'"),
    ("ot_trajectory", {"growth": "absent"}, KeyError, "growth='absent'"),
    ("ot_trajectory", {"growth": "cell_type"}, TypeError, "growth='cell_type'.*numbers"),
    ("ot_trajectory", {"growth": "index"}, ValueError, "growth='index'.*greater than 0"),
    ("ot_trajectory", {"growth": 2}, TypeError, "growth is a int"),
    ("ot_trajectory", {"growth": {"birth": ["HES4"]}}, ValueError, "'proliferation'"),
    ("ot_trajectory", {"growth": {"proliferation": ["absent"]}}, KeyError, "'absent'"),
    ("align_slices", {"batch_key": "absent"}, KeyError, r"batch_key='absent'.*'batch'"),
    ("align_slices", {"batch_key": "partial"}, ValueError, "missing for 1 of"),
    ("align_slices", {"batch_key": "only"}, ValueError, "batch_key='only'.*at least two slices.*has 1 with"),
    ("align_slices", {"batch_key": "index"}, ValueError, "batch_key='index'.*150 with 1 or more"),
    ("align_slices", {"reference": "third"}, KeyError, r"reference='third'.*'first'"),
    ("align_slices", {"spatial_key": "absent"}, KeyError, r"spatial_key='absent'.*'spatial'"),
    ("align_slices", {"alpha": 0}, ValueError, "alpha=0"),
    ("align_slices", {"overlap": 0}, ValueError, "overlap=0"),
    ("align_slices", {"epsilon": 0}, ValueError, "epsilon=0"),
    ("align_slices", {"max_spots": 2}, ValueError, "max_spots=2"),
    ("align_slices", {"max_iter": 0}, ValueError, "max_iter=0"),
    ("ot_pull", {"groupby": "absent"}, KeyError, r"groupby='absent'.*'batch'"),
    ("ot_pull", {"groupby": "missing"}, ValueError, "groupby='missing'.*1 cells"),
    ("ot_pull", {"key": "absent"}, KeyError, "key='absent'.*run `ot_trajectory` first"),
    ("ot_pull", {"key": "pca"}, ValueError, "does not hold couplings"),
    ("ot_push", {"time": 0.5}, ValueError, r"time=0.5.*\[0.0, 1.5\]"),
    ("switch_de", {"pseudotime": "absent"}, KeyError, r"pseudotime='absent'.*'quality'"),
    ("switch_de", {"pseudotime": "cell_type"}, TypeError, "pseudotime='cell_type'"),
    ("switch_de", {"n_permutations": -1}, ValueError, "n_permutations=-1"),
    ("attribution", {"target": "absent"}, KeyError, r"target='absent'.*'quality'"),
    ("attribution", {"method": "best"}, ValueError, r"method='best'.*'gradient'"),
    ("attribution", {"groupby": "index"}, ValueError, "at least 5"),
    ("diffmap", {"n_comps": 2}, ValueError, "n_comps=2"),
    ("pseudotime", {"root": None}, ValueError, "iroot"),
    ("pseudotime", {"root": CELLS}, ValueError, f"root={CELLS}"),
    ("pseudotime", {"root": -1}, ValueError, "root=-1"),
    ("pseudotime", {"root": "nobody"}, ValueError, "root='nobody'"),
    ("pseudotime", {"n_dcs": 0}, ValueError, "n_dcs=0"),
    ("fate_probabilities", {"terminal_states": ["absent"]}, KeyError, r"'absent'.*'cell_type'.*Available.*CD19"),
    ("fate_probabilities", {"terminal_states": []}, ValueError, "there must be a state"),
    ("fate_probabilities", {"terminal_states": {"end": []}}, ValueError, "'end' has no cells"),
    ("fate_probabilities", {"terminal_states": {"end": ["nobody"]}}, KeyError, r"'end'.*'nobody'"),
    ("fate_probabilities", {"groupby": None}, ValueError, "pass `groupby=`"),
    ("fate_probabilities", {"groupby": "absent"}, KeyError, r"groupby='absent'.*'batch'"),
    ("fate_probabilities", {"groupby": "batch", "terminal_states": ["first", "second"]}, ValueError, "outside of all"),
    ("fate_probabilities", {"time_key": "absent"}, KeyError, r"time_key='absent'.*'quality'"),
    ("fate_probabilities", {"time_key": "batch"}, TypeError, "time_key='batch'.*not numbers"),
    ("fate_probabilities", {"time_key": "partial"}, ValueError, "NaN for 1 cells"),
    ("fate_probabilities", {"threshold_scheme": "best"}, ValueError, r"threshold_scheme='best'.*'hard'"),
    ("fate_probabilities", {"frac_to_keep": 2}, ValueError, "frac_to_keep=2"),
    ("fate_probabilities", {"b": 0}, ValueError, "b=0"),
    ("fate_probabilities", {"nu": -1}, ValueError, "nu=-1"),
    ("fate_probabilities", {"priming": "best"}, ValueError, r"priming='best'.*'entropy'"),
    ("fate_probabilities", {"transition_key": "connectivities"}, ValueError, r"\['time_key'\] have no meaning"),
    ("fate_probabilities", {"terminal_states": None, "threshold_scheme": None}, ValueError, "gather nowhere"),
    ("archetypes", {"n_archetypes": 1}, ValueError, f"n_archetypes=1.*{CELLS}"),
    ("archetypes", {"n_archetypes": 11}, ValueError, "n_archetypes=11.*10 for 150 cells in 9 dimensions"),
    ("archetypes", {"max_archetypes": 1}, ValueError, "max_archetypes=1"),
    ("archetypes", {"n_init": 0}, ValueError, "n_init=0"),
    ("archetypes", {"max_iter": 0}, ValueError, "max_iter=0"),
    ("archetypes", {"n_bootstrap": -1}, ValueError, "n_bootstrap=-1"),
    ("archetypes", {"use_rep": "X_absent"}, KeyError, r"use_rep='X_absent'.*'X_pca'"),
    ("umap", {"min_dist": 1.5}, ValueError, "min_dist=1.5.*spread=1"),
    ("umap", {"densmap": True, "dens_lambda": 0.0}, ValueError, "dens_lambda=0"),
    ("umap", {"densmap": True, "dens_frac": 1.5}, ValueError, "dens_frac=1.5"),
    ("umap", {"spread": 0.0}, ValueError, "spread=0"),
    ("umap", {"gamma": -1.0}, ValueError, "gamma=-1"),
    ("umap", {"maxiter": 0}, ValueError, "maxiter=0"),
    ("umap", {"n_components": 0}, ValueError, "n_components=0"),
    ("umap", {"negative_sample_rate": 0}, ValueError, "negative_sample_rate=0"),
    ("umap", {"init_pos": "absent"}, KeyError, r"'absent'.*'spectral'.*'X_pca'"),
    ("umap", {"init_pos": "paga"}, ValueError, "paga"),
    ("umap", {"init_pos": "X_pca"}, ValueError, rf"\({CELLS}, 9\).*\({CELLS}, 2\)"),
    ("annotate", {"mode": "best"}, ValueError, r"mode='best'.*'celltypist', 'cellassign', 'scanvi'"),
    ("annotate", {"n_latent": 5}, ValueError, r"n_latent=5.*mode='celltypist'.*'scanvi'"),
    ("annotate", {"max_epochs": 5}, ValueError, r"max_epochs=5.*mode='celltypist'"),
    ("annotate", {"batch_key": "batch"}, ValueError, r"batch_key='batch'.*mode='celltypist'"),
    ("annotate_scanvi", {"penalty": 0.1}, ValueError, r"penalty=0.1.*mode='scanvi'"),
    ("annotate_scanvi", {"n_latent": 0}, ValueError, "n_latent=0"),
    ("annotate_scanvi", {"max_epochs": 0}, ValueError, "max_epochs=0"),
    ("annotate_scanvi", {"batch_key": "absent"}, KeyError, r"'absent'.*'batch'"),
    ("annotate_scanvi", {"labels_key": "cell_type"}, ValueError, "every cell has a label.*reference="),
    ("annotate", {"labels_key": None}, ValueError, "pass labels_key=.*'known'"),
    ("annotate", {"labels_key": "absent"}, KeyError, r"'absent'.*'known'"),
    ("annotate", {"labels_key": "cell_type"}, ValueError, "every cell has a label.*reference="),
    ("annotate", {"labels_key": "only"}, ValueError, "'only' names 1 types"),
    ("annotate", {"penalty": 0.0}, ValueError, "penalty=0"),
    ("annotate", {"threshold": 1.5}, ValueError, "threshold=1.5"),
    ("annotate", {"n_folds": 1}, ValueError, "n_folds=1"),
    ("annotate", {"over_clustering": "batch"}, ValueError, "'batch' has no meaning without majority_voting"),
    ("annotate", {"majority_voting": True, "over_clustering": "absent"}, KeyError, "'absent'.*'batch'"),
    ("annotate", {"majority_voting": True, "over_clustering": "missing"}, ValueError, "missing for some"),
    ("annotate", {"majority_voting": True}, ValueError, "Run `sc.pp.neighbors` first"),
    ("parametric_umap", {"min_dist": 1.5}, ValueError, "min_dist=1.5.*spread=1"),
    ("parametric_umap", {"learning_rate": 0.0}, ValueError, "learning_rate=0"),
    ("parametric_umap", {"gamma": -1.0}, ValueError, "gamma=-1"),
    ("parametric_umap", {"n_steps": 0}, ValueError, "n_steps=0"),
    ("parametric_umap", {"use_rep": "X_absent"}, KeyError, r"use_rep='X_absent'.*'X_pca'"),
    (
        "annotate",
        {"markers": {"B": ["CD8A"]}},
        ValueError,
        r"markers=.*no meaning with mode='celltypist'.*'cellassign'",
    ),
    ("annotate", {"size_factors": "quality"}, ValueError, "size_factors='quality' has no meaning"),
    ("annotate_markers", {"labels_key": "cell_type"}, ValueError, "labels_key='cell_type' has no meaning"),
    ("annotate_markers", {"penalty": 1.0}, ValueError, "penalty=1.0 has no meaning"),
    ("annotate_markers", {"n_folds": 5}, ValueError, "n_folds=5 has no meaning"),
    ("annotate_markers", {"markers": None}, ValueError, "needs markers="),
    ("annotate_markers", {"batch_key": "absent"}, KeyError, "batch_key='absent'.*'batch'"),
    ("annotate_markers", {"batch_key": "missing"}, ValueError, "'missing'.*missing for 1 of"),
    ("annotate_markers", {"size_factors": "absent"}, KeyError, "size_factors='absent'.*'quality'"),
    (
        "annotate_markers",
        {"size_factors": "quality"},
        ValueError,
        "size_factors='quality' must be numbers greater than 0",
    ),
    ("annotate_markers", {"reference": "folder"}, TypeError, "reference is a str.*pass an AnnData"),
    ("phate", {"n_components": 0}, ValueError, "n_components=0"),
    ("phate", {"k": CELLS}, ValueError, f"k={CELLS}.*{CELLS - 1}"),
    ("phate", {"decay": 0.0}, ValueError, "decay=0"),
    ("phate", {"n_landmark": 2}, ValueError, "n_landmark=2.*n_components=2"),
    ("phate", {"t": 0}, ValueError, "t=0.*auto"),
    ("phate", {"t": "best"}, ValueError, "t='best'"),
    ("phate", {"gamma": 2.0}, ValueError, "gamma=2"),
    ("phate", {"mds": "nonmetric"}, ValueError, "mds='nonmetric'.*'classic'"),
    ("phate", {"use_rep": "X_absent"}, KeyError, r"use_rep='X_absent'.*'X_pca'"),
    ("grn", {"tfs": None}, ValueError, "tfs=None needs a prior"),
    ("grn", {"tfs": "HES4"}, ValueError, "tfs='HES4' is one name"),
    ("grn", {"tfs": ["absent"]}, KeyError, "none of tfs.*Available"),
    ("grn", {"prior": pd.DataFrame({"a": ["HES4"]})}, KeyError, "'target'.*'a'"),
    ("grn", {"prior": pd.DataFrame({"tf": ["HES4"], "target": ["absent"]})}, KeyError, "no edge"),
    ("grn", {"penalty": 0.0}, ValueError, "penalty=0"),
    ("grn", {"n_edges": 0}, ValueError, "n_edges=0"),
    ("grn", {"method": "forest"}, ValueError, "method='forest'.*'lasso'"),
    ("grn", {"method": "lasso", "n_subsamples": 5}, ValueError, "n_subsamples=5"),
    ("grn", {"n_subsamples": 4}, ValueError, "n_subsamples=4.*'lasso'"),
    ("grn", {"method": "gat", "penalty": 0.1}, ValueError, "penalty=0.1.*'lasso'"),
    ("grn", {"method": "gat", "n_steps": 0}, ValueError, "n_steps=0"),
    ("grn", {"method": "gat", "n_regulators": 0}, ValueError, "n_regulators=0"),
    ("ligrec", {"cluster_key": "absent"}, KeyError, r"cluster_key='absent'.*'cell_type'"),
    ("ligrec", {"cluster_key": "quality"}, TypeError, "cluster_key='quality'.*fractional"),
    ("ligrec", {"cluster_key": "only"}, ValueError, "cluster_key='only' has 1 group"),
    ("ligrec", {"cluster_key": "negative"}, ValueError, "cluster_key='negative'.*at least 0"),
    ("ligrec", {"interactions": [("absent", "CD52")]}, KeyError, r"\('absent', 'CD52'\).*'HES4'"),
    ("ligrec", {"interactions": []}, ValueError, "there is none"),
    ("ligrec", {"interactions": ["CD52"]}, TypeError, "'CD52' is not a pair"),
    ("ligrec", {"interactions": "cellphonedb"}, TypeError, "interactions is a str"),
    ("ligrec", {"interactions": pd.DataFrame({"genes": ["CD52"]})}, KeyError, r"'genes'.*'ligand', 'receptor'"),
    ("ligrec", {"neighbors": True}, KeyError, r"neighbors=True needs .*'spatial'"),
    ("ligrec", {"neighbors": "absent"}, KeyError, "neighbors='absent'"),
    ("ligrec", {"shuffle": "cells"}, ValueError, r"shuffle='cells'.*'group'"),
    ("ligrec", {"shuffle": "group"}, ValueError, "needs neighbors="),
    ("ligrec", {"batch_key": "absent"}, KeyError, r"batch_key='absent'.*'batch'"),
    ("ligrec", {"complex_policy": "all"}, ValueError, r"complex_policy='all'.*'group_min'"),
    ("ligrec", {"threshold": 1.5}, ValueError, "threshold=1.5"),
    ("ligrec", {"threshold": 1.0}, ValueError, "threshold=1.0 of cells"),
    ("ligrec", {"n_perms": 0}, ValueError, "n_perms=0"),
    ("ligrec", {"batch_key": "partial"}, ValueError, "missing for 1 of"),
    ("communication", {"method": "net"}, ValueError, r"method='net'.*'linear', 'gat'"),
    ("communication", {"groupby": "absent"}, KeyError, r"groupby='absent'.*'cell_type'"),
    ("communication", {"groupby": "quality"}, TypeError, "groupby='quality'.*fractional"),
    ("communication", {"groupby": "missing"}, ValueError, "groupby='missing' is missing for 1 of"),
    ("communication", {"interactions": [("absent", "CD52")]}, KeyError, r"\('absent', 'CD52'\).*'HES4'"),
    ("communication", {"neighbors": "absent"}, KeyError, "neighbors='absent'"),
    ("communication", {"neighbors": False}, ValueError, "neighbors=False"),
    ("communication", {"batch_key": "absent"}, KeyError, "batch_key='absent'"),
    ("communication", {"targets": ["absent"]}, KeyError, "none of targets.*'HES4'"),
    ("communication", {"targets": "HES4"}, TypeError, "targets='HES4' is one name"),
    ("communication", {"targets": ["CD52"]}, ValueError, "no genes besides ligands"),
    ("communication", {"n_genes": 0}, ValueError, "n_genes=0"),
    ("communication", {"n_programs": 0}, ValueError, "n_programs=0"),
    ("communication", {"n_perms": 0}, ValueError, "n_perms=0"),
    ("spatial_domains", {"n_domains": 0}, ValueError, "n_domains=0"),
    ("spatial_domains", {"method": "stagate"}, ValueError, r"method='stagate'.*'smooth', 'gat'"),
    ("spatial_domains", {"method": "gat", "n_domains": 2, "hops": 2.0}, ValueError, "hops=2.0 has no meaning"),
    ("spatial_domains", {"prune": 0.2}, ValueError, "prune=0.2 has no meaning with method='smooth'"),
    ("spatial_domains", {"spatial_key": "absent"}, KeyError, r"spatial_key='absent'.*'spatial'"),
    ("spatial_domains", {"n_neighbors": 0}, ValueError, "n_neighbors=0"),
    ("spatial_domains", {"n_neighbors": 3, "radius": 2.0}, ValueError, "either n_neighbors=3 or radius=2.0"),
    ("spatial_domains", {"radius": -1.0}, ValueError, "radius=-1.0"),
    ("spatial_domains", {"hops": 0.0}, ValueError, "hops=0.0"),
    ("spatial_domains", {"gradient": np.inf}, ValueError, "gradient=inf"),
    ("spatial_domains", {"refine": -1}, ValueError, "refine=-1"),
    ("spatial_domains", {"n_comps": 0}, ValueError, "n_comps=0"),
    ("spatial_domains", {"batch_key": "absent"}, KeyError, "batch_key='absent'"),
    ("spatial_domains", {"use_rep": "X_absent"}, KeyError, r"use_rep='X_absent'.*'X_pca'"),
    ("kmeans", {"n_clusters": 0}, ValueError, "n_clusters=0"),
    ("kmeans", {"n_clusters": CELLS + 1}, ValueError, f"n_clusters={CELLS + 1}.*{CELLS}"),
    ("kmeans", {"n_init": 0}, ValueError, "n_init=0"),
    ("kmeans", {"max_iter": 0}, ValueError, "max_iter=0"),
    ("kmeans", {"n_soft": -1}, ValueError, "n_soft=-1"),
    ("kmeans", {"temperature": 0.0}, ValueError, "temperature=0"),
    ("kmeans", {"use_rep": "X_absent"}, KeyError, r"use_rep='X_absent'.*'X_pca'"),
    ("leiden", {"resolution": -1}, ValueError, "resolution=-1"),
    ("leiden", {"temperature": 0}, ValueError, "temperature=0"),
    ("velocity_deterministic", {"var_names": ["HES4"]}, ValueError, "var_names has no meaning"),
    ("velocity_deterministic", {"mode": "dynamical", "var_names": ["absent"]}, KeyError, "'absent'"),
    ("velocity_graph", {"n_neighbors": 0}, ValueError, "n_neighbors=0"),
    ("velocity_graph", {"n_recurse_neighbors": 0}, ValueError, "n_recurse_neighbors=0"),
    ("velocity_graph", {"vkey": "absent"}, KeyError, r"'absent'.*'velocity'.*run `sd.tl.velocity` first"),
    ("velocity_graph", {"xkey": "absent"}, KeyError, r"'absent'.*'Ms'"),
    ("velocity_graph", {"neighbors_key": "absent"}, ValueError, "Run `sc.pp.neighbors` first"),
    ("transition_matrix", {"scale": 0}, ValueError, "scale=0"),
    ("transition_matrix", {"weight_connectivities": 1.5}, ValueError, "weight_connectivities=1.5"),
    ("transition_matrix", {"vkey": "absent"}, KeyError, "'absent_graph'.*run `sd.tl.velocity_graph` first"),
    ("transition_matrix", {"neighbors_key": "absent"}, ValueError, r"'absent'.*Run `sc.pp.neighbors` first"),
    ("velocity_embedding", {"scale": 0}, ValueError, "scale=0"),
    ("velocity_embedding", {"basis": "tsne"}, KeyError, r"basis='tsne'.*'X_pca'"),
    ("velocity_embedding", {"vkey": "absent"}, KeyError, "'absent_graph'.*run `sd.tl.velocity_graph` first"),
    ("velocity_deterministic", {"mode": "best"}, ValueError, r"mode='best'.*'stochastic'"),
    ("velocity_deterministic", {"perc": [5, 101]}, ValueError, r"perc=\[5, 101\]"),
    ("velocity_stochastic", {"neighbors_key": "absent"}, ValueError, r"'absent'.*Run `sc.pp.neighbors` first"),
]


@pytest.mark.parametrize(("name", "kwargs", "error", "match"), REFUSED, ids=lambda x: str(x).replace(" ", ""))
def test_impossible_settings_are_refused(name: str, kwargs: Any, error: type[Exception], match: str) -> None:
    case = next(case for case in CASES if case.name == name)
    adata = source(case.source)
    adata.obs["index"] = np.arange(CELLS)
    adata.obs["only"] = "one"
    adata.obsm["negative"] = np.full((CELLS, 2), -1.0)
    adata.obs["partial"] = np.where(np.arange(CELLS) == 3, np.nan, 1)
    adata.obs["missing"] = pd.Categorical(np.where(np.arange(CELLS) == CELLS - 1, None, "a"))
    adata.obs["endless"] = np.where(np.arange(CELLS) == 3, np.inf, 1)
    assert_refuses(case, adata, error, match, **kwargs)


def test_a_fallback_to_pca_that_fails_later_changes_nothing() -> None:
    case = next(case for case in CASES if case.name == "neighbors")
    assert_refuses(case, source("log"), ValueError, "metric='best'", metric="best")


def test_neighbors_falls_back_to_pca_once() -> None:
    adata, by_hand = source("log"), source("log")
    with pytest.warns(UserWarning, match="Falling back to preprocessing") as caught:
        sd.pp.neighbors(adata, n_neighbors=9)
    assert caught[0].filename == __file__
    sd.pp.pca(by_hand)
    sd.pp.neighbors(by_hand, n_neighbors=9)
    assert_equal(adata, by_hand)
    view = source("log")[:100]
    with pytest.warns(UserWarning, match="view|Falling") as caught:
        sd.pp.neighbors(view, n_neighbors=9)
    assert {w.filename for w in caught} == {__file__}


def test_root_by_name_by_number_and_by_iroot_agree() -> None:
    adata = source("graph")
    results = [sd.tl.pseudotime(adata, root=root, copy=True) for root in (3, adata.obs_names[3], np.int64(3))]
    adata.uns["iroot"] = np.int64(3)
    results.append(sd.tl.dpt(adata, copy=True))
    for other in results[1:]:
        assert same(results[0].obs["dpt_pseudotime"], other.obs["dpt_pseudotime"])
        assert other.uns["iroot"] == 3


def test_warnings_that_scanpy_gives() -> None:
    adata = source("counts")
    adata.X[5] = 0
    adata.X.eliminate_zeros()
    with pytest.warns(UserWarning, match="Some cells have zero counts") as caught:
        sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    with pytest.warns(UserWarning, match="already log-transformed") as again:
        sd.pp.log1p(adata, copy=True)
    with pytest.warns(UserWarning, match="expects raw count data") as counts:
        sd.pp.highly_variable_genes(adata, flavor="seurat_v3", copy=True)
    with pytest.warns(UserWarning, match="densifies") as dense:
        sd.pp.scale(adata)
    assert {w.filename for r in (caught, again, counts, dense) for w in r} == {__file__}


def test_subset_keeps_the_selected_genes() -> None:
    whole, part = source("log"), source("log")
    sd.pp.highly_variable_genes(whole, n_top_genes=40)
    sd.pp.highly_variable_genes(part, n_top_genes=40, subset=True)
    assert list(part.var_names) == list(whole.var_names[whole.var["highly_variable"]])
    assert same(part.X, whole.X[:, whole.var["highly_variable"].to_numpy()])


def test_array_support_has_the_rows_of_quick_cases() -> None:
    quick = [case for case in CASES if not case.slow]
    found = record_array_support.rows(quick, sys.modules[__name__], test_contract)
    assert set(found) <= set(record_array_support.PAGE.read_text().splitlines())


@pytest.mark.slow
def test_the_page_on_array_support_is_up_to_date() -> None:
    assert record_array_support.PAGE.read_text() == record_array_support.page(sys.modules[__name__], test_contract)
