"""The table of `run.py`: each public function, the input it gets, what a user would call instead, and what is judged.

To add a function, add a line to `CASES`; code of a peer that does not fit in one goes into `peers.py`. A function that
has no peer is measured alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import peers
import scores

Call = Callable[[Any], dict[str, Any]]
EPOCHS, TYPES = 10, 8
MARKERS = {"B": ["CD79A", "MS4A1", "CD79B"], "MNP": ["LYZ", "S100A8", "CST3"], "NK": ["GNLY", "NKG7", "KLRD1"],
           "T_CD4": ["CD3D", "IL7R", "TRAC"], "T_CD8": ["CD3D", "CD8A", "CD8B"]}  # fmt: skip


class Side(NamedTuple):
    """A tool on trial: its name in the package index, the modules that have to be there, the call, and its limit."""

    package: str
    modules: tuple[str, ...]
    call: Call
    # Above so many cells it is not run: what it would need is known not to fit.
    most: int = 10**9


class Case(NamedTuple):
    name: str
    input: str
    ours: Call
    peers: tuple[Side, ...] = ()
    score: scores.Score = scores.nothing
    agree: scores.Agreement = scores.none
    most: int = 10**9


def x(adata: Any) -> dict[str, Any]:
    return {"x": adata.X}


def kept(where: str, key: str, name: str, kind: Any = None) -> Call:
    """What the call has written, under the name that the scores read."""

    def get(adata: Any) -> dict[str, Any]:
        value = getattr(adata, where)[key]
        return {name: value.to_numpy(kind) if hasattr(value, "to_numpy") else value}

    return get


def of(module: str, path: str, get: Call, *args: Any, **settings: Any) -> Call:
    def call(adata: Any) -> dict[str, Any]:
        operator.attrgetter(path)(import_module(module))(adata, *args, **settings)
        return get(adata)

    return call


def ours(path: str, get: Call, *args: Any, **settings: Any) -> Call:
    return of("scdiffx", path, get, *args, **settings)


def scanpy(path: str, get: Call, *args: Any, **settings: Any) -> tuple[Side]:
    return (Side("scanpy", ("scanpy",), of("scanpy", path, get, *args, **settings)),)


def both(path: str, get: Call, *args: Any, **settings: Any) -> dict[str, Any]:
    """The same call of scdiffx and scanpy."""
    return {"ours": ours(path, get, *args, **settings), "peers": scanpy(path, get, *args, **settings)}


def peer(package: str, call: Callable[..., Any], *modules: str, most: int = 10**9, **settings: Any) -> Side:
    return Side(package, modules or (package.replace("-", "_"),), lambda adata: call(adata, **settings), most)


def some_genes(adata: Any) -> dict[str, Any]:
    return {"x": adata.layers["magic"][:, :200]}


def archetypes(adata: Any) -> dict[str, Any]:
    return {"weights": adata.obsm["archetype_weights"], "positions": adata.uns["archetypes"]["positions"]}


def kmeans(adata: Any) -> dict[str, Any]:
    """Of five seeds: one start in six finds the best clusters of these cells, on both sides, and one seed is luck."""
    import scdiffx as sd

    runs = []
    for seed in range(5):
        sd.tl.kmeans(adata, TYPES, n_init=5, random_state=seed)
        runs.append(adata.obs["kmeans"].to_numpy(str))
    return {"runs": runs, "labels": runs[0]}


def transported(adata: Any) -> dict[str, Any]:
    """Fates of the earlier cells."""
    import scdiffx as sd

    sd.tl.ot_trajectory(adata, "day", tau=1.0)
    sd.tl.ot_pull(adata, "label")
    earlier = (adata.obs["day"] == 0).to_numpy()
    # A type that no later cell has would have no column.
    fate = adata.obsm["fate"].reindex(columns=list(adata.obs["label"].cat.categories), fill_value=0.0)
    return {"x": fate.to_numpy()[earlier]}


def fates(adata: Any) -> dict[str, Any]:
    import scdiffx as sd

    sd.tl.fate_probabilities(adata, list(adata.obs["terminal"].cat.categories), "terminal")
    return {"z": adata.obsm["lineages_fwd"]}


def drivers(adata: Any) -> dict[str, Any]:
    import scdiffx as sd

    sd.tl.attribution(adata, "lineages_fwd", column=0)
    return {"x": adata.varm["attribution_lineages_fwd_0"].iloc[:, 0].to_numpy()}


def in_pairs(adata: Any, n: int = 200) -> Any:
    import pandas as pd

    return pd.DataFrame({"source": adata.var_names[:n:2], "target": adata.var_names[1:n:2]})


def ligrec(adata: Any) -> dict[str, Any]:
    import scdiffx as sd

    sd.tl.ligrec(adata, "label", in_pairs(adata), n_perms=200)
    found = adata.uns["ligrec"].set_index(["ligand", "receptor", "source", "target"])
    return {"x": found["mean"], "p": found["pvalue"]}


def squidpy_ligrec(adata: Any) -> dict[str, Any]:
    return peers.squidpy_ligrec(adata, in_pairs(adata), 200)


def communication(adata: Any) -> dict[str, Any]:
    import scdiffx as sd

    pairs = in_pairs(adata, 40)
    sd.tl.communication(adata, list(zip(pairs["source"], pairs["target"], strict=True)), groupby="label", n_perms=20)
    return {}


def regulation(adata: Any) -> dict[str, Any]:
    import numpy as np

    import scdiffx as sd

    factors = np.unique(np.asarray(adata.uns["edges"])[:, 0])
    sd.tl.grn(adata, list(adata.var_names[factors]), n_edges=len(factors) * adata.n_vars)
    table, weight = adata.uns["grn"], np.zeros((adata.n_vars, adata.n_vars))
    at = [adata.var_names.get_indexer(table[name].astype(str)) for name in ("tf", "target")]
    weight[tuple(at)] = table["weight"].abs()
    return {"x": weight[factors]}


def distributions(adata: Any) -> dict[str, Any]:
    import scdiffx as sd

    group = str(adata.obs["label"].cat.categories[0])
    adata = adata[:, :500].copy()
    sd.tl.differential_distribution(adata, "label", groups=[group])
    table = adata.uns["differential_distribution"]["table"].set_index("gene")
    return {"x": table.loc[adata.var_names, "statistic"].to_numpy()}


def of_plan(function: str, **settings: Any) -> Call:
    """A function of a plan from counts to components."""

    def call(adata: Any) -> dict[str, Any]:
        import scdiffx as sd

        plan = sd.plan(adata)
        sd.pp.normalize_total(plan)
        sd.pp.log1p(plan)
        sd.pp.pca(plan, n_comps=10)
        getattr(sd.tl, function)(plan, "X_pca", column=0, **settings)
        return {}

    return call


def returns(path: str, *args: Any, **settings: Any) -> Call:
    return ours(path, lambda adata: {}, *args, **settings)


def cell_weights(adata: Any) -> dict[str, Any]:
    import scdiffx as sd

    adata.obs["total"] = adata.X.sum(1).A1
    sd.pp.cell_weights(adata, {"total": (500, None)})
    return {}


def embedding(key: str) -> Call:
    return kept("obsm", key, "z")


PSEUDOTIME = kept("obs", "dpt_pseudotime", "x")
LEIDEN = kept("obs", "leiden", "labels", str)
TRAIN = {"max_epochs": EPOCHS, "progress": False}

CASES = (
    Case("pp.normalize_total", "counts", **both("pp.normalize_total", x, target_sum=1e4), agree=scores.difference),
    Case("pp.log1p", "counts", **both("pp.log1p", x), agree=scores.difference),
    Case("pp.scale", "logged", **both("pp.scale", x, max_value=10), agree=scores.difference),
    Case(
        "pp.highly_variable_genes", "logged",
        **both("pp.highly_variable_genes", kept("var", "highly_variable", "x"), n_top_genes=500), agree=scores.overlap,
    ),
    Case(
        "pp.pca", "logged", **both("pp.pca", embedding("X_pca"), n_comps=50),
        score=scores.explained, agree=scores.columns,
    ),
    Case(
        "pp.neighbors", "components",
        **both("pp.neighbors", kept("obsp", "distances", "distances"), n_neighbors=15), score=scores.recall,
    ),
    Case("pp.cell_weights", "counts", cell_weights),
    Case("pp.mask_counts", "counts", returns("pp.mask_counts")),
    Case("pp.split_counts", "counts", returns("pp.split_counts")),
    Case("pp.replicates", "counts", returns("pp.replicates")),
    Case(
        "pp.remove_ambient", "soup",
        lambda adata: ours("pp.remove_ambient", kept("layers", "decontaminated", "x"),
                           empty_profile=adata.var["soup"].to_numpy(), groupby="label")(adata),
        (peer("SoupX's formulas", peers.soupx, "numpy"),), scores.cleaned,
    ),
    Case(
        "pp.scrublet", "doublets", ours("pp.scrublet", kept("obs", "doublet_score", "score")),
        scanpy("pp.scrublet", kept("obs", "doublet_score", "score"), threshold=0.25, verbose=False), scores.doublets,
    ),
    Case(
        "pp.solo", "doublets", ours("pp.solo", kept("obs", "solo_score", "score"), **TRAIN),
        (peer("scvi-tools", peers.scvi_solo, "scvi", epochs=EPOCHS),), scores.doublets, most=20_000,
    ),
    Case(
        "pp.vae", "counts", ours("pp.vae", embedding("X_vae"), **TRAIN),
        (peer("scvi-tools", peers.scvi, "scvi", epochs=EPOCHS),), scores.label_accuracy, most=50_000,
    ),
    Case(
        "pp.magic", "components", ours("pp.magic", some_genes),
        (peer("magic-impute", peers.magic_impute, "magic"),), agree=scores.correlation,
    ),
    Case("pp.denoise", "counts", returns("pp.denoise", max_epochs=2, progress=False), most=20_000),
    Case(
        "pp.harmony_integrate", "components", ours("pp.harmony_integrate", embedding("X_pca_harmony"), "batch"),
        (peer("harmonypy", peers.harmonypy),), scores.mixing, scores.columns,
    ),
    *(
        Case(
            f"pp.{name}_integrate", "components",
            ours(f"pp.{name}_integrate", embedding(f"X_{name}"), "batch", max_steps=500, progress=False),
            (peer("harmonypy", peers.harmonypy),), scores.mixing, most=50_000,
        )
        for name in ("mmd", "wgan")
    ),
    Case("tl.umap", "graph", **both("tl.umap", embedding("X_umap"), random_state=0), score=scores.layout),
    Case(
        "tl.parametric_umap", "graph",
        ours("tl.parametric_umap", embedding("X_parametric_umap"), progress=False),
        (peer("umap-learn", peers.parametric_umap, "umap", "tensorflow"),), scores.layout, most=50_000,
    ),
    Case(
        "tl.phate", "components", ours("tl.phate", embedding("X_phate")), (peer("phate", peers.phate),),
        scores.label_accuracy, scores.columns,
    ),
    Case(
        "tl.diffmap", "graph", **both("tl.diffmap", embedding("X_diffmap")),
        score=scores.label_accuracy, agree=scores.columns,
    ),
    Case(
        "tl.kmeans", "components", kmeans, (peer("scikit-learn", peers.scikit_kmeans, "sklearn", k=TYPES, n_init=5),),
        scores.inertia, scores.same_labels,
    ),
    Case(
        "tl.leiden", "graph", ours("tl.leiden", LEIDEN, n_iterations=2),
        scanpy("tl.leiden", LEIDEN, flavor="igraph", n_iterations=2, directed=False),
        scores.partition, scores.same_labels,
    ),
    Case(
        "tl.archetypes", "components", ours("tl.archetypes", archetypes, 4, n_init=2, n_bootstrap=0),
        (peer("partipy", peers.partipy, k=4, n_init=2, most=20_000),), scores.hull,
    ),
    # The peers leave no cell unassigned.
    Case(
        "tl.annotate (celltypist)", "half known",
        ours("tl.annotate", kept("obs", "annotation", "labels", str), labels_key="known", threshold=0.0),
        (peer("celltypist", peers.celltypist),), scores.annotated,
    ),
    Case(
        "tl.annotate (cellassign)", "named genes",
        ours("tl.annotate", kept("obs", "annotation", "labels", str), "cellassign", markers=MARKERS, layer="counts",
             threshold=0.0),
        (peer("scvi-tools", peers.cellassign, "scvi", markers=MARKERS, epochs=100),), scores.annotated, most=50_000,
    ),
    Case(
        "tl.annotate (scanvi)", "half known",
        ours("tl.annotate", kept("obs", "annotation", "labels", str), "scanvi", labels_key="known", layer="counts",
             max_epochs=EPOCHS, threshold=0.0),
        (peer("scvi-tools", peers.scvi_scanvi, "scvi", epochs=EPOCHS),), scores.annotated, most=20_000,
    ),
    Case(
        "tl.pseudotime", "graph", ours("tl.pseudotime", PSEUDOTIME),
        (Side("scanpy", ("scanpy",), peers.scanpy_dpt), peer("palantir", peers.palantir)),
        agree=scores.rank_correlation,
    ),
    Case(
        "tl.fate_probabilities", "trajectory", fates,
        (peer("cellrank", peers.cellrank_fates, most=20_000),), agree=scores.columns,
    ),
    Case(
        "tl.ot_trajectory", "trajectory", transported,
        (peer("POT", peers.pot_sinkhorn, "ot", most=20_000), peer("ott-jax", peers.ott_sinkhorn, "ott", most=20_000)),
        agree=scores.correlation, most=50_000,
    ),
    *(
        Case(
            f"tl.velocity ({mode})", data, ours("tl.velocity", kept("layers", "velocity", "x"), mode=mode),
            (peer("scvelo", peers.scvelo_velocity, mode=mode),), agree=scores.correlation, most=most,
        )
        for mode, data, most in (
            ("deterministic", "rna", 50_000), ("stochastic", "rna", 50_000), ("dynamical", "few genes", 3_000),
        )
    ),
    Case(
        "tl.velocity_graph", "velocities", ours("tl.velocity_graph", kept("uns", "velocity_graph", "x")),
        (peer("scvelo", peers.scvelo_graph),), agree=scores.difference, most=50_000,
    ),
    Case(
        "tl.transition_matrix", "cosines", ours("tl.transition_matrix", kept("obsp", "velocity_transitions", "x")),
        (peer("scvelo", peers.scvelo_transitions),), agree=scores.difference, most=50_000,
    ),
    Case(
        "tl.velocity_embedding", "cosines",
        ours("tl.velocity_embedding", kept("obsm", "velocity_pca", "x"), basis="pca"),
        (peer("scvelo", peers.scvelo_embedding),), agree=scores.correlation, most=50_000,
    ),
    Case(
        "tl.latent_time", "dynamics", ours("tl.latent_time", kept("obs", "latent_time", "x")),
        (peer("scvelo", peers.scvelo_latent_time),), agree=scores.rank_correlation, most=3_000,
    ),
    Case(
        "tl.ligrec", "named genes", ligrec, (Side("squidpy", ("squidpy",), squidpy_ligrec),),
        agree=scores.pairs,
    ),
    Case("tl.communication", "tissue", communication, most=20_000),
    Case(
        "tl.grn", "network", regulation,
        (peer("GENIE3 by scikit-learn", peers.genie3, "sklearn", trees=50, most=3_000),), scores.edges,
    ),
    Case(
        "tl.spatial_domains", "tissue", ours("tl.spatial_domains", kept("obs", "spatial_domain", "labels", str), 7),
        (peer("scikit-learn", peers.scikit_domains, "sklearn", k=7),), scores.clusters,
    ),
    Case(
        "tl.align_slices", "slices", ours("tl.align_slices", embedding("spatial_aligned"), "slice"),
        (peer("POT", peers.pot_slices, "ot", most=3_000),), scores.aligned, most=20_000,
    ),
    Case("tl.switch_de", "trajectory", returns("tl.switch_de"), most=50_000),
    Case(
        "tl.differential_distribution", "logged", distributions,
        (peer("scipy", peers.scipy_distances, "scipy", genes=500),), agree=scores.correlation,
    ),
    Case("tl.simulate", "counts", returns("tl.simulate", groupby="label"), most=50_000),
    Case("tl.attribution", "fates", drivers, (peer("cellrank", peers.cellrank_drivers),), agree=scores.correlation),
    Case("tl.influence", "counts", of_plan("influence"), most=20_000),
    Case("tl.uncertainty", "counts", of_plan("uncertainty", n_replicates=5, progress=False), most=50_000),
)  # fmt: skip
# What the quick question is about; `--core` runs these.
CORE = ("normalize_total", "log1p", "highly_variable_genes", "pca", "neighbors", "harmony_integrate", "magic",
        "scrublet", "umap", "diffmap", "leiden", "pseudotime")  # fmt: skip
# Public names without a case of their own: called inside of another's, the same function, or what it returns.
WITH_ANOTHER = {"tl.AnnotationModel", "tl.annotation_model", "tl.dpt", "tl.ot_interpolate", "tl.ot_pull", "tl.ot_push"}


def chosen(only: list[str] | None) -> list[Case]:
    """The cases of these functions: "tl.annotate (scanvi)", or all of "tl.annotate" or of "annotate"."""
    if only is None:
        return list(CASES)
    exact = {case.name for case in CASES}
    names = {case.name: {case.name} for case in CASES}
    for name, known in names.items():
        function = name.split(" ")[0]
        known |= {function} - exact | {function.partition(".")[2]}
    if unknown := [name for name in only if not any(name in known for known in names.values())]:
        raise SystemExit(f"no case is called {', '.join(unknown)}. There are: {', '.join(names)}")
    return [case for case in CASES if names[case.name] & set(only)]
