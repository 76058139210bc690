"""MuData and SpatialData in place of an AnnData: the same results in the same places, and errors that help."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from sklearn.metrics import adjusted_rand_score

import scdiffx as sd
from helpers import changed, contents, pbmc_counts, same

CELLS = 120
LIGANDS = [("CD52", "TNFRSF1B"), ("STMN1", "FGR")]


def parts() -> tuple[ad.AnnData, ad.AnnData]:
    """Two modalities of the same cells: some genes, and a few others that stand for proteins."""
    whole = pbmc_counts(CELLS, 80)
    return whole[:, :60].copy(), whole[:, 60:].copy()


def mudata_of_parts() -> Any:
    mudata = pytest.importorskip("mudata", reason="the tests of MuData need mudata")
    rna, protein = parts()
    mdata = mudata.MuData({"rna": rna, "protein": protein})
    z = np.log1p(np.hstack([part.X.toarray()[:, :6] for part in (rna, protein)]))
    mdata.obsm["X_pca"] = z.astype(np.float32)
    mdata.obs["batch"] = pd.Categorical(np.where(np.arange(CELLS) % 3 == 0, "one", "two"))
    mdata.obs["day"] = np.arange(CELLS) % 2 * 1.5
    mdata.obs["type"] = pd.Categorical(rna.obs["cell_type"])
    mdata.obs["known"] = mdata.obs["type"].where(np.arange(CELLS) % 3 > 0)
    mdata.uns["iroot"] = 3
    sd.pp.neighbors(mdata, 10, use_rep="X_pca")
    return mdata


def plain(mdata: Any) -> ad.AnnData:
    """An AnnData with what the MuData has for all its cells."""
    axes = {name: dict(getattr(mdata, name)) for name in ("obsm", "obsp", "uns")}
    axes["obsm"] = {key: value for key, value in axes["obsm"].items() if key not in mdata.mod}
    return ad.AnnData(obs=mdata.obs.copy(), **axes)


def assert_equal(mdata: Any, adata: ad.AnnData) -> None:
    found, expected = contents(plain(mdata)), contents(adata)
    assert set(found) == set(expected)
    assert not [path for path in found if not same(found[path], expected[path])]


def quiet(function: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return function(*args, **kwargs)


OF_CELLS = [
    ("pp.neighbors", {"use_rep": "X_pca", "key_added": "mine"}),
    ("tl.leiden", {}),
    ("tl.pseudotime", {}),
    ("tl.kmeans", {"n_clusters": 3}),
]
OF_CELLS_SLOW = [
    ("tl.umap", {"maxiter": 20}),
    ("pp.harmony_integrate", {"key": "batch"}),
]


def named(path: str) -> Any:
    part, name = path.split(".")
    return getattr(getattr(sd, part), name)


def check_of_cells(name: str, kwargs: dict[str, Any]) -> None:
    mdata = mudata_of_parts()
    alone = plain(mdata)
    modalities = {key: contents(part) for key, part in mdata.mod.items()}
    before = contents(plain(mdata))
    assert quiet(named(name), mdata, **kwargs) is None
    assert set(contents(plain(mdata))) > set(before)
    quiet(named(name), alone, **kwargs)
    assert_equal(mdata, alone)
    for key, part in mdata.mod.items():
        found = contents(part)
        assert all(same(found[path], modalities[key][path]) for path in modalities[key])


@pytest.mark.parametrize(("name", "kwargs"), OF_CELLS, ids=[name for name, _ in OF_CELLS])
def test_a_mudata_gives_what_an_anndata_of_its_cells_gives(name: str, kwargs: dict[str, Any]) -> None:
    check_of_cells(name, kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kwargs"), OF_CELLS_SLOW, ids=[name for name, _ in OF_CELLS_SLOW])
def test_so_do_others(name: str, kwargs: dict[str, Any]) -> None:
    check_of_cells(name, kwargs)


def test_copy_views_and_files_of_a_mudata(tmp_path: Path) -> None:
    mudata = pytest.importorskip("mudata", reason="the tests of MuData need mudata")
    mdata = mudata_of_parts()
    copied = sd.tl.kmeans(mdata, 3, copy=True)
    assert type(copied) is type(mdata)
    assert "kmeans" in copied.obs
    assert "kmeans" not in mdata.obs
    assert copied["rna"] is not mdata["rna"]
    view = mdata[np.arange(CELLS)[::-1]]
    with pytest.warns(UserWarning, match="view of a MuData"):
        sd.tl.kmeans(view, 3)
    assert not view.is_view
    assert "kmeans" not in mdata.obs
    alone = plain(mdata[np.arange(CELLS)[::-1]])
    sd.tl.kmeans(alone, 3)
    assert list(view.obs["kmeans"]) == list(alone.obs["kmeans"])
    copied.write(tmp_path / "cells.h5mu")
    assert_equal(mudata.read(tmp_path / "cells.h5mu"), plain(copied))


OF_GENES = {
    "pp.denoise": {},
    "pp.highly_variable_genes": {},
    "pp.log1p": {},
    "pp.magic": {},
    "pp.neighbors": {},
    "pp.normalize_total": {},
    "pp.pca": {},
    "pp.remove_ambient": {},
    "pp.replicates": {},
    "pp.scale": {},
    "pp.scrublet": {},
    "pp.solo": {},
    "pp.split_counts": {},
    "pp.vae": {},
    "tl.annotate": {"labels_key": "known"},
    "tl.attribution": {"target": "day"},
    "tl.communication": {"interactions": [("A", "B")]},
    "tl.differential_distribution": {"groupby": "batch"},
    "tl.grn": {"tfs": ["A"]},
    "tl.ligrec": {"cluster_key": "batch", "interactions": [("A", "B")]},
    "tl.simulate": {},
    "tl.switch_de": {"pseudotime": "day"},
    "tl.velocity": {},
}


def test_what_reads_genes_asks_for_a_modality() -> None:
    mdata = mudata_of_parts()
    before = contents(plain(mdata))
    for name, kwargs in OF_GENES.items():
        with pytest.raises(TypeError, match=r"mdata\['rna'\].*\['rna', 'protein'\].*'X_pca'") as caught:
            named(name)(mdata, **kwargs)
        assert f"`{name.split('.')[1]}`" in str(caught.value)
    found = contents(plain(mdata))
    assert set(found) == set(before)
    assert all(same(found[path], before[path]) for path in before)
    with pytest.raises(TypeError, match="got MuData: pass one of its modalities"):
        sd.plan(mdata)
    with pytest.raises(ValueError, match="table_key='table'"):
        sd.tl.spatial_domains(mdata, table_key="table")


SHORT = {"modalities": ("rna", "protein"), "n_latent": 3, "max_epochs": 1, "progress": False}
OF_BOTH = {"X_vae", "X_vae_proteins", "vae_foreground"}


def held(mdata: Any) -> dict[str, dict[str, Any]]:
    return {"": contents(plain(mdata))} | {name: contents(part) for name, part in mdata.mod.items()}


def untouched(before: dict[str, Any], mdata: Any) -> bool:
    return not any(changed(before[name], after) for name, after in held(mdata).items())


def test_genes_and_proteins_of_a_mudata_have_one_latent_space(tmp_path: Path) -> None:
    mudata = pytest.importorskip("mudata", reason="the tests of MuData need mudata")
    mdata = mudata_of_parts()
    before = held(mdata)
    copied = sd.pp.vae(mdata, **SHORT, batch_key="batch", genes="all", copy=True)
    assert untouched(before, mdata)
    assert sd.pp.vae(mdata, **SHORT, batch_key="batch", genes="all") is None
    assert_equal(mdata, plain(copied))
    after = held(mdata)
    assert {path for path in changed(before[""], after[""]) if path.startswith("obsm")} == {
        f"obsm/{k}" for k in OF_BOTH
    }
    assert changed(before["rna"], after["rna"]) == {"layers/vae_normalized"}
    assert not changed(before["protein"], after["protein"])
    shares = mdata["rna"].layers["vae_normalized"]
    np.testing.assert_allclose(shares.sum(1), 1e4, rtol=1e-3)
    # The same as of one AnnData with the proteins in `obsm`.
    rna, protein = parts()
    rna.obs["batch"] = mdata.obs["batch"]
    rna.obsm["protein"] = protein.to_df()
    alone = {key: value for key, value in SHORT.items() if key != "modalities"}
    sd.pp.vae(rna, **alone, protein_key="protein", batch_key="batch", genes="all")
    for key in OF_BOTH:
        assert same(mdata.obsm[key], rna.obsm[key]), key
    assert same(shares, rna.layers["vae_normalized"])
    assert list(mdata.obsm["vae_foreground"]) == list(protein.var_names)
    assert mdata.obsm["vae_foreground"].to_numpy().min() > 0
    mdata.write(tmp_path / "cells.h5mu")
    assert_equal(mudata.read(tmp_path / "cells.h5mu"), plain(mdata))


@pytest.mark.slow
def test_modalities_in_another_order_and_layers() -> None:
    mudata = pytest.importorskip("mudata", reason="the tests of MuData need mudata")
    rna, protein = parts()
    order = np.random.default_rng(0).permutation(CELLS)
    for part in (rna, protein):
        part.layers["counts"] = part.X.copy()
        part.X = part.X.log1p()
    straight = mudata.MuData({"rna": rna, "protein": protein})
    mixed = mudata.MuData({"rna": rna.copy(), "protein": protein[order].copy()})
    assert list(mixed.obs_names) == list(rna.obs_names)
    # Genes and proteins change places: now the modality in another order is the one that gets a layer.
    settings = SHORT | {"layer": "counts", "genes": "all"}
    for modalities, name in ((("rna", "protein"), "rna"), (("protein", "rna"), "protein")):
        for mdata in (straight, mixed):
            sd.pp.vae(mdata, **settings | {"modalities": modalities})
        assert same(straight.obsm["X_vae"], mixed.obsm["X_vae"])
        found = mixed[name][list(straight[name].obs_names)].layers["vae_normalized"]
        assert same(np.asarray(found), straight[name].layers["vae_normalized"])


OF_TWO: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"modalities": ("rna", "prot")}, KeyError, r"'prot' is not in the MuData.*'rna', 'protein'"),
    ({"modalities": "rna"}, ValueError, r"modalities='rna' must be two names.*'protein'"),
    ({"modalities": ("rna",)}, ValueError, "must be two names"),
    ({"protein_key": "X_pca"}, ValueError, r"either modalities=.*protein_key='X_pca'"),
    ({"layer": "absent"}, KeyError, r"layer='absent' is not in `mdata\['rna'\].layers`"),
    ({"layer": "half"}, KeyError, r"layer='half' is not in `mdata\['protein'\].layers`.*both modalities"),
    ({"layer": "bad"}, ValueError, "-1.0 of cell .* is negative"),
    ({"batch_key": "absent"}, KeyError, r"batch_key='absent'.*'batch'"),
    ({"genes": ["absent"]}, KeyError, "'absent'"),
    ({"key_added": "rna"}, ValueError, "key_added='rna' is the name of a modality"),
    ({"likelihood": "poisson"}, ValueError, "likelihood='poisson'"),
]


def test_a_failed_call_on_two_modalities_says_why_and_changes_nothing() -> None:
    mdata = mudata_of_parts()
    for name, part in mdata.mod.items():
        part.layers["bad"] = part.X.copy()
        if name == "protein":
            part.layers["bad"].data[7] = -1
    mdata["rna"].layers["half"] = mdata["rna"].X.copy()
    before = held(mdata)
    for wrong, error, match in OF_TWO:
        with pytest.raises(error, match=match):
            sd.pp.vae(mdata, **SHORT | wrong)
        assert untouched(before, mdata), wrong
    with pytest.raises(TypeError, match=r"mdata\['rna'\]") as caught:
        sd.pp.vae(mdata)
    assert "modalities=" in caught.value.__notes__[0]


def test_both_modalities_need_all_cells() -> None:
    mudata = pytest.importorskip("mudata", reason="the tests of MuData need mudata")
    rna, protein = parts()
    mdata = mudata.MuData({"rna": rna, "protein": protein[:100].copy()})
    before = held(mdata)
    with pytest.raises(ValueError, match=r"'protein' has 100 of the 120 cells.*intersect_obs"):
        sd.pp.vae(mdata, **SHORT)
    assert untouched(before, mdata)


@pytest.mark.slow
def test_clusters_of_muons_joint_graph(data_dir: Path) -> None:
    mu = pytest.importorskip("muon", reason="the joint graph of two modalities is muon's")
    whole = ad.read_h5ad(data_dir / "cite_cbmc" / "cite_cbmc.h5ad")[:300].copy()
    rna = ad.AnnData(whole.X, obs=whole.obs[["label"]].copy())
    protein = ad.AnnData(whole.obsm["protein"], obs=whole.obs[[]].copy())
    sc.pp.normalize_total(rna)
    sc.pp.log1p(rna)
    for part, n_comps in ((rna, 20), (protein, 8)):
        sc.pp.pca(part, n_comps=n_comps)
        sc.pp.neighbors(part)
    mdata = mu.MuData({"rna": rna, "protein": protein})
    quiet(mu.pp.neighbors, mdata)
    joint = mdata.obsp["connectivities"].copy()
    for adata in (mdata, alone := plain(mdata)):
        sd.tl.leiden(adata)
        sd.tl.diffmap(adata)
        sd.tl.umap(adata, maxiter=50)
    assert_equal(mdata, alone)
    assert (mdata.obsp["connectivities"] != joint).nnz == 0
    # The graph is muon's own, not that of one of the modalities.
    for part in (rna, protein):
        sd.tl.leiden(part)
        assert adjusted_rand_score(part.obs["leiden"], mdata.obs["leiden"]) < 0.99


def placed() -> ad.AnnData:
    """Cells at places, as the table of a SpatialData."""
    adata = pbmc_counts(CELLS, 60)
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    sd.pp.pca(adata, n_comps=8)
    adata.obsm["spatial"] = np.asarray(adata.obsm["X_pca"][:, :2], np.float64)
    adata.obs["slice"] = np.where(np.arange(CELLS) < CELLS // 2, "one", "two")
    return adata


def sdata_of(**tables: ad.AnnData) -> Any:
    spatialdata = pytest.importorskip("spatialdata", reason="the tests of SpatialData need spatialdata")
    image = spatialdata.models.Image2DModel.parse(np.zeros((1, 8, 8), np.uint8), dims=("c", "y", "x"))
    parsed = {name: spatialdata.models.TableModel.parse(adata) for name, adata in tables.items()}
    return spatialdata.SpatialData(images={"slide": image}, tables=parsed)


def test_a_table_gives_what_it_gives_alone() -> None:
    kwargs = {"cluster_key": "slice", "interactions": LIGANDS, "n_perms": 20, "neighbors": True}
    alone = placed()
    sdata = sdata_of(table=alone.copy(), other=alone[:10].copy())
    table = sdata.tables["table"]
    before, other = contents(table), contents(sdata.tables["other"])
    copied = quiet(sd.tl.ligrec, sdata, **kwargs, table_key="table", copy=True)
    assert not changed(before, contents(table))
    assert copied.images["slide"] is sdata.images["slide"]
    assert quiet(sd.tl.ligrec, sdata, **kwargs, table_key="table") is None
    assert sdata.tables["table"] is table
    quiet(sd.tl.ligrec, alone, **kwargs)
    assert changed(before, contents(table))
    for found in (table, copied.tables["table"]):
        assert not changed(contents(alone), contents(found))
    assert not changed(other, contents(sdata.tables["other"]))


def test_the_functions_on_tissue_can_name_a_table() -> None:
    named = {
        name
        for name in sd.tl.__all__
        if inspect.isfunction(function := getattr(sd.tl, name))
        and "table_key" in inspect.signature(function).parameters
    }
    assert named == {"spatial_domains", "align_slices", "ligrec", "communication"}


def test_which_table_of_a_spatialdata() -> None:
    sdata = sdata_of(cells=placed(), bins=placed()[:50].copy())
    with pytest.raises(ValueError, match=r"2 tables: say which one, with `table_key=`.*\['cells', 'bins'\]"):
        sd.tl.spatial_domains(sdata, 3)
    with pytest.raises(ValueError, match=r"2 tables.*pass `sdata.tables"):
        sd.tl.kmeans(sdata, 3)
    with pytest.raises(KeyError, match=r"table_key='spots'.*\['cells', 'bins'\]"):
        sd.tl.spatial_domains(sdata, 3, table_key="spots")
    with pytest.raises(TypeError, match="got SpatialData: pass one of its tables"):
        sd.plan(sdata)
    for not_one in (placed(), sd.plan(placed())):
        with pytest.raises(ValueError, match="table_key='cells' names a table of a SpatialData"):
            sd.tl.spatial_domains(not_one, 3, table_key="cells")


def test_coordinates_of_a_spatialdata_are_those_of_its_table() -> None:
    adata = placed()
    del adata.obsm["spatial"]
    with pytest.raises(KeyError, match=r"sdata.tables\['cells'\].obsm\['spatial'\].*get_centroids"):
        sd.tl.spatial_domains(sdata_of(cells=adata), 3)


def test_any_function_takes_the_only_table_and_files_keep_it(tmp_path: Path) -> None:
    spatialdata = pytest.importorskip("spatialdata", reason="the tests of SpatialData need spatialdata")
    sdata, alone = sdata_of(cells=placed()), placed()
    for data in (sdata, alone):
        sd.tl.kmeans(data, 3)
        sd.tl.spatial_domains(data, 3, hops=2.0, n_init=2)
    sdata.write(tmp_path / "sample.zarr")
    again = spatialdata.read_zarr(tmp_path / "sample.zarr")
    assert not changed(contents(alone), contents(again.tables["cells"]))
