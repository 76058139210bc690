"""Matrices that are not in memory: the numbers of those that are, from some rows at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

import scdiffx as sd
from scdiffx._core import counts as C
from scdiffx._core import streamed
from scdiffx._core.streamed import Streamed
from scdiffx._slots import _lazy
from scdiffx.ops import _pca

da = pytest.importorskip("dask.array", reason="dask is not installed")
ROWS = 150
FORMS = ("dask", "dask small chunks", "dask dense", "backed", "backed dense", "zarr")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "PIECE_ROWS", ROWS)
    monkeypatch.setattr(_lazy, "PIECE_ROWS", ROWS)


@pytest.fixture(scope="module")
def counts() -> ad.AnnData:
    adata = sd.datasets.pbmc68k_counts()
    adata.X = adata.X.astype(np.float32)
    return adata


@pytest.fixture(scope="module")
def logged(counts: ad.AnnData) -> ad.AnnData:
    adata = counts.copy()
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    return adata


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[ad.AnnData, str], ad.AnnData]]:
    """Writes an AnnData to a file and opens it in one of the forms."""
    files = []

    def of(adata: ad.AnnData, form: str) -> ad.AnnData:
        path = tmp_path / f"{form}.h5ad"
        aside = adata.copy()
        if "dense" in form:
            aside.X = aside.X.toarray()
        if form == "zarr":
            zarr = pytest.importorskip("zarr", reason="zarr is not installed")
            aside.write_zarr(path)
            return ad.AnnData(ad.io.sparse_dataset(zarr.open(path)["X"]), aside.obs, aside.var)
        aside.write_h5ad(path)
        if form.startswith("backed"):
            files.append(ad.read_h5ad(path, backed="r"))
            return files[-1]
        files.append(h5py.File(path))
        rows = 60 if form == "dask small chunks" else 220
        lazy = ad.experimental.read_elem_lazy(files[-1]["X"], chunks=(rows, aside.n_vars))
        return ad.AnnData(lazy, aside.obs.copy(), aside.var.copy(), uns=aside.uns)

    yield of
    for file in files:
        (file.file if isinstance(file, ad.AnnData) else file).close()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The most rows that were loaded at once, and the most blocks that were in memory when another one came."""
    alive: list[Any] = []
    most, real = [0, 0], _lazy._canonical

    def watched(block: Any) -> Any:
        made = real(block).copy()
        alive[:] = [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(made))
        most[:] = max(most[0], made.shape[0]), max(most[1], len(alive))
        return made

    monkeypatch.setattr(_lazy, "_canonical", watched)
    return most


def is_lazy(adata: ad.AnnData) -> bool:
    return not isinstance(adata.X, np.ndarray) and not sp.issparse(adata.X)


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("dask")])
def test_normalised_values_are_lazy_and_those_in_memory(
    counts: ad.AnnData, logged: ad.AnnData, opened: Callable[..., ad.AnnData], form: str
) -> None:
    adata = opened(counts, form)
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    assert isinstance(adata.X, da.Array)
    assert adata.uns["log1p"] == {"base": None}
    values = adata.X.compute()
    assert values.dtype == np.float32
    assert isinstance(values, np.ndarray) == ("dense" in form)
    dense = values if "dense" in form else values.toarray()
    np.testing.assert_allclose(dense, logged.X.toarray(), rtol=1e-6, atol=0)


def test_all_settings_of_normalisation(counts: ad.AnnData, opened: Callable[..., ad.AnnData]) -> None:
    settings = {"exclude_highly_expressed": True, "max_fraction": 0.1, "key_added": "factor"}
    wide = counts.copy()
    wide.X = counts.X.astype(np.int64)
    adata, double = opened(wide, "dask"), counts.copy()
    before, part = adata.X, double[:, :50].copy()
    after = sd.pp.normalize_total(adata, copy=True, **settings)
    sd.pp.normalize_total(double, **settings)
    assert adata.X is before
    np.testing.assert_allclose(after.obs["factor"], double.obs["factor"], rtol=1e-6)
    np.testing.assert_allclose(after.X.compute().toarray(), double.X.toarray(), rtol=1e-6)
    part.X = part.X.astype(np.float64)
    part.layers["lazy"] = da.from_array(part.X.toarray(), chunks=(220, 50))
    sd.pp.log1p(part, layer="lazy", base=2)
    assert part.layers["lazy"].dtype == np.float64
    np.testing.assert_allclose(part.layers["lazy"].compute(), np.log2(1 + part.X.toarray()), rtol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_genes_components_and_imputed_genes_are_those_in_memory_from_few_rows_at_once(
    logged: ad.AnnData, opened: Callable[..., ad.AnnData], form: str, loaded: list[int]
) -> None:
    adata, known = opened(logged, form), logged.copy()
    for each in (known, adata):
        sd.pp.highly_variable_genes(each, n_top_genes=200)
        sd.pp.pca(each, 10)
        each.obsm["X_fixed"] = np.array(known.obsm["X_pca"])
        sd.pp.magic(each, ["CD3D", "NKG7", "LYZ"], use_rep="X_fixed")
    assert is_lazy(adata)
    # Chunks that are larger than a piece come one by one; of small ones, as many as fit into a piece.
    assert loaded[0] == {"dask": 220, "dask dense": 220, "dask small chunks": 120}.get(form, ROWS)
    assert loaded[1] <= 2
    assert adata.var["highly_variable"].equals(known.var["highly_variable"])
    for key in ("means", "dispersions", "dispersions_norm"):
        np.testing.assert_allclose(adata.var[key], known.var[key], rtol=1e-6)
    for key in ("variance", "variance_ratio"):
        np.testing.assert_allclose(adata.uns["pca"][key], known.uns["pca"][key], rtol=1e-5)
    scale = np.abs(known.obsm["X_pca"]).max()
    np.testing.assert_allclose(adata.obsm["X_pca"], known.obsm["X_pca"], atol=1e-4 * scale)
    np.testing.assert_allclose(adata.varm["PCs"], known.varm["PCs"], atol=1e-4)
    np.testing.assert_allclose(adata.obsm["X_magic"], known.obsm["X_magic"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["dask", "backed"])
def test_genes_of_counts_in_batches(counts: ad.AnnData, opened: Callable[..., ad.AnnData], form: str) -> None:
    adata, known = opened(counts, form), counts.copy()
    for each in (adata, known):
        each.obs["batch"] = np.arange(each.n_obs) % 2
        sd.pp.highly_variable_genes(each, flavor="seurat_v3", n_top_genes=200, batch_key="batch")
    for key in ("highly_variable", "highly_variable_rank", "variances_norm", "means", "highly_variable_nbatches"):
        np.testing.assert_allclose(adata.var[key], known.var[key], rtol=1e-10)


def test_components_of_uncentred_and_weighted_genes(logged: ad.AnnData, opened: Callable[..., ad.AnnData]) -> None:
    adata = opened(logged, "dask")[:, :200]
    adata.var["gene_weight"] = weight = np.linspace(0.2, 1, adata.n_vars, dtype=np.float32)
    sd.pp.pca(adata, 10, zero_center=False)
    weighted = logged.X[:, :200].toarray().astype(np.float64) * weight
    u, s, _ = np.linalg.svd(weighted, full_matrices=False)
    scores = u[:, :10] * s[:10]
    np.testing.assert_allclose(np.abs(adata.obsm["X_pca"]), np.abs(scores), atol=3e-4 * np.abs(scores).max())
    ratio = scores.var(0) / weighted.var(0, ddof=1).sum()
    np.testing.assert_allclose(adata.uns["pca"]["variance_ratio"], ratio, rtol=1e-4)


def test_ligands_and_receptors(logged: ad.AnnData, opened: Callable[..., ad.AnnData]) -> None:
    adata, known = opened(logged, "dask"), logged.copy()
    pairs = [("CD3D", "NKG7"), ("LYZ", "CD79A")]
    tables = []
    for each in (adata, known):
        sd.tl.ligrec(each, "bulk_labels", interactions=pairs, n_perms=20)
        tables.append(each.uns["ligrec"])
    np.testing.assert_allclose(tables[0]["mean"], tables[1]["mean"], rtol=1e-6)


def test_pieces_of_all_sizes_share_one_program(counts: ad.AnnData) -> None:
    blocks = [counts.X[low : low + 90] for low in range(0, 700, 90)]
    assert len({block.nnz for block in blocks}) > 3
    matrix = Streamed(counts.shape, np.float32, 90, lambda: iter(blocks))
    traced = []

    def sums(piece: Any) -> Any:
        traced.append(piece.shape)
        return C.row_sums(piece)

    np.testing.assert_allclose(matrix.by_rows(sums), np.asarray(counts.X.sum(1)).ravel(), rtol=1e-6)
    assert traced == [(90, counts.n_vars)]


@pytest.mark.parametrize("dense", [False, True])
def test_sums_and_products_are_those_of_the_whole(logged: ad.AnnData, dense: bool) -> None:
    whole = logged.X.toarray() if dense else logged.X
    x = jnp.asarray(whole) if dense else C.Counts.from_scipy(whole)
    rows = Streamed(whole.shape, np.float32, 300, lambda: (whole[low : low + 300] for low in range(0, 700, 300)))
    rng = np.random.default_rng(0)
    by_row, by_gene = (jnp.asarray(rng.random(n), jnp.float32) for n in whole.shape)
    columns, v = jnp.asarray([5, 3, 100]), jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)

    def numbers(x: Any) -> list[Any]:
        scaled = C.scale_rows(C.scale_columns(x, by_gene), by_row)
        some = C.take_columns(C.map_values(scaled, jnp.sin), columns)
        mean, variance = C.column_moments(some)
        return [
            C.row_sums(scaled),
            C.column_sums(some, jnp.square),
            mean,
            variance,
            C.matmul(some, v),
            C.gram(some, mean),
        ]

    for ours, known in zip(numbers(rows), jax.jit(numbers)(x), strict=True):
        np.testing.assert_allclose(ours, known, rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_what_follows_components_never_reads_the_matrix(logged: ad.AnnData) -> None:
    def fail(block: Any) -> Any:
        raise AssertionError("the matrix was read")

    known = logged[:200].copy()
    sd.pp.pca(known, 10)
    lazy = da.from_array(np.zeros(known.shape, np.float32), chunks=(100, -1)).map_blocks(
        fail, dtype=np.float32, meta=np.zeros((0, 0))
    )
    adata = ad.AnnData(lazy, known.obs, known.var, obsm={"X_pca": known.obsm["X_pca"]})
    adata.obs["batch"] = np.arange(200) % 2
    for each in (adata, known):
        sd.pp.neighbors(each, 10)
        sd.tl.leiden(each)
        sd.tl.diffmap(each, 5)
        sd.tl.pseudotime(each, root=0)
    np.testing.assert_array_equal(adata.obs["dpt_pseudotime"], known.obs["dpt_pseudotime"])
    assert adata.X is lazy


def test_bad_values_are_named_and_nothing_is_written(counts: ad.AnnData, opened: Callable[..., ad.AnnData]) -> None:
    bad = counts.copy()
    bad.X.data[bad.X.indptr[640]] = -3
    for form, run, settings in (
        ("dask", sd.pp.normalize_total, {}),
        ("backed", sd.pp.highly_variable_genes, {"flavor": "seurat_v3"}),
    ):
        adata = opened(bad, form)
        before = adata.X
        with pytest.raises(ValueError, match=f"-3.0 of cell '{counts.obs_names[640]}'.*negative"):
            run(adata, **settings)
        assert list(adata.var) == list(bad.var)
        assert not adata.uns.keys() - bad.uns.keys()
        assert form == "backed" or adata.X is before


def test_what_cannot_be_streamed_says_what_to_do(
    counts: ad.AnnData, opened: Callable[..., ad.AnnData], monkeypatch: pytest.MonkeyPatch
) -> None:
    backed, lazy = opened(counts, "backed"), opened(counts, "dask")
    with pytest.raises(TypeError, match=r"in a file.*read_elem_lazy"):
        sd.pp.log1p(backed)
    with pytest.raises(TypeError, match=r"view of data in a file.*to_memory"):
        sd.pp.pca(backed[:300])
    with pytest.raises(TypeError, match=r"dask array.*to_memory"):
        sd.pp.highly_variable_genes(lazy, soft=True)
    with pytest.raises(TypeError, match=r"dask array.*to_memory"):
        sd.pp.scale(lazy)
    with pytest.raises(TypeError, match=r"not in memory.*sd\.plan"):
        sd.pp.pca(sd.plan(lazy))
    monkeypatch.setattr(_pca, "MAX_GRAM_GENES", 500)
    with pytest.raises(ValueError, match="at most 500 genes"):
        sd.pp.pca(lazy)
    lazy.X = lazy.X.rechunk((220, 100))
    with pytest.raises(ValueError, match="rechunk"):
        sd.pp.normalize_total(lazy)


def test_columns_in_a_file_are_refused(counts: ad.AnnData, tmp_path: Path) -> None:
    other = counts.copy()
    other.X = other.X.tocsc()
    other.write_h5ad(tmp_path / "csc.h5ad")
    adata = ad.read_h5ad(tmp_path / "csc.h5ad", backed="r")
    with pytest.raises(TypeError, match="CSC"):
        sd.pp.highly_variable_genes(adata)
    adata.file.close()
