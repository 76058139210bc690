"""What functions of `sd.pp` and `sd.tl` refuse, by a message that names it, and without a change to the AnnData."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from binding_cases import CASES, Case
from bindings import (
    CELLS,
    FUNCTIONS,
    GENES,
    OF_GRAPH,
    assert_refuses,
    call,
    each,
    function_named,
    source,
)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("wrong", [None, "adata", np.ones((3, 3)), {"X": 1}], ids=["none", "text", "array", "dict"])
def test_first_argument_must_be_an_anndata(name: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"must be an AnnData or a scdiffx plan, got {type(wrong).__name__}"):
        function_named(name)(wrong)


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
