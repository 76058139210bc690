"""The keys that functions of `sd.pp` and `sd.tl` write, with their dtypes: what the table of their cases is made of."""

from __future__ import annotations

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
