"""The command line: the main job on data that ship with scanpy and on files, the doctor, and the packaged counts."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scdiffx as sd
from scdiffx import _doctor
from scdiffx.__main__ import main
from scdiffx._input import kind_of, prepared
from scdiffx._run import choose_root

# What scanpy's own functions would have left behind for these steps.
SCANPY_KEYS = {
    "obs": {"leiden", "dpt_pseudotime"},
    "var": {"highly_variable", "means", "dispersions", "dispersions_norm"},
    "uns": {"log1p", "hvg", "pca", "neighbors", "leiden", "diffmap_evals", "iroot"},
    "obsm": {"X_pca", "X_diffmap"},
    "varm": {"PCs"},
    "obsp": {"distances", "connectivities"},
}
# Shared by the jobs on the small file, so that they compile once.
SMALL = ("--n-top-genes", "60", "--n-comps", "9", "--n-neighbors", "8", "--no-figures")


class Done(NamedTuple):
    code: int
    out: Path
    printed: str

    @property
    def adata(self) -> ad.AnnData:
        return ad.read_h5ad(self.out / "result.h5ad")


def job(out: Path, *arguments: object) -> Done:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(["run", *map(str, arguments), "--out", str(out)])
    return Done(code, out, printed.getvalue())


@pytest.fixture(scope="module")
def counts() -> ad.AnnData:
    """700 cells x 765 genes of real counts. Not to be changed."""
    return sd.datasets.pbmc68k_counts()


@pytest.fixture(scope="module")
def default_job(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return job(tmp_path_factory.mktemp("default"))


@pytest.fixture
def small(counts: ad.AnnData, tmp_path: Path) -> Path:
    """A file with the counts of 150 cells and 120 genes."""
    path = tmp_path / "small.h5ad"
    counts[:150, :120].copy().write_h5ad(path)
    return path


def test_default_job_leaves_scanpys_keys(default_job: Done) -> None:
    assert default_job.code == 0
    adata = default_job.adata
    assert adata.shape == (700, 765)
    for where, keys in SCANPY_KEYS.items():
        assert keys <= set(getattr(adata, where)), where
    time = adata.obs["dpt_pseudotime"].to_numpy()
    assert time[adata.uns["iroot"]] == 0
    assert np.nanmax(time[np.isfinite(time)]) == 1
    assert adata.obs["leiden"].cat.categories.size > 4


def test_default_job_normalises_the_counts(default_job: Done, counts: ad.AnnData) -> None:
    adata = default_job.adata
    np.testing.assert_array_equal(adata.layers["counts"].toarray(), counts.X.toarray())
    dense = counts.X.toarray().astype(np.float64)
    total = dense.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(adata.X.toarray(), np.log1p(dense / total * np.median(total)), rtol=1e-5, atol=1e-6)


def test_default_job_result_works_in_scanpy(default_job: Done) -> None:
    import scanpy as sc

    adata = default_job.adata
    ours = adata.obs["dpt_pseudotime"].to_numpy(copy=True)
    sc.tl.diffmap(adata)
    sc.tl.dpt(adata)
    np.testing.assert_allclose(adata.obs["dpt_pseudotime"], ours, atol=2e-4)


def test_default_job_summary_says_what_was_done(default_job: Done) -> None:
    text = (default_job.out / "summary.txt").read_text()
    assert text == default_job.printed
    rows = dict(re.findall(r"^(\S[\w ]{0,14}?) {2,}(.*)$", text, re.MULTILINE))
    adata = default_job.adata
    assert rows["cells"] == "700"
    assert rows["genes"] == "765"
    assert "raw counts" in rows["matrix"]
    assert rows["clusters"].startswith(f"{adata.obs['leiden'].cat.categories.size} (Leiden")
    for name, size in adata.obs["leiden"].value_counts().items():
        assert re.search(rf"^ +{name} +{size} ", text, re.MULTILINE)
    assert rows["root"].startswith(f"{adata.obs_names[adata.uns['iroot']]} (index {adata.uns['iroot']}): arbitrary")
    assert "of 700 cells" in rows["pseudotime"]
    assert re.match(r"cpu|gpu|tpu", rows["device"])
    assert "jax " in rows["versions"]
    for step in ("normalise", "pca", "pseudotime", "total"):
        assert re.search(rf"^ +{step} +\d+\.\d$", text, re.MULTILINE)
    assert all(str(path) in text for path in default_job.out.iterdir())


def test_default_job_figures_are_drawn(default_job: Done) -> None:
    files = sorted(default_job.out.glob("*.png"))
    assert [f.name for f in files] == ["clusters.png", "pseudotime.png", "variance.png"]
    for file in files:
        pixels = matplotlib.image.imread(file)[..., :3]
        assert min(pixels.shape[:2]) > 400
        assert pixels.std() > 0.05
        assert 0.01 < (pixels.min(axis=2) < 0.9).mean() < 0.5


def test_options_are_used(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ad.read_h5ad(small).obs_names[17]
    options = [*SMALL, "--resolution", "0.3", "--seed", "3", "--root", root, "--quiet"]
    assert main(["run", str(small), "--out", str(tmp_path / "out"), *options]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["result.h5ad", "summary.txt"]
    adata = ad.read_h5ad(tmp_path / "out" / "result.h5ad")
    assert adata.var["highly_variable"].sum() == 60
    assert adata.obsm["X_pca"].shape == (150, 9)
    assert adata.uns["neighbors"]["params"]["n_neighbors"] == 8
    assert adata.uns["neighbors"]["params"]["random_state"] == 3
    assert adata.uns["leiden"]["params"]["resolution"] == 0.3
    assert adata.uns["iroot"] == 17
    assert "given by name" in (tmp_path / "out" / "summary.txt").read_text()


def test_root_group_and_layer(small: Path, tmp_path: Path) -> None:
    adata = ad.read_h5ad(small)
    adata.layers["raw"] = adata.X.copy()
    adata.X = np.full(adata.shape, -1.0, np.float32)
    adata.write_h5ad(small)
    done = job(tmp_path / "out", small, *SMALL, "--layer", "raw", "--root-group", "bulk_labels=CD19+ B")
    assert done.code == 0
    result = done.adata
    members = np.flatnonzero(result.obs["bulk_labels"] == "CD19+ B")
    points = result.obsm["X_pca"][members]
    nearest = members[np.argmin(np.square(points - points.mean(axis=0)).sum(axis=1))]
    assert result.uns["iroot"] == nearest
    assert "layers['raw'] held raw counts" in done.printed


def test_the_root_is_extreme_in_the_first_component_that_moves() -> None:
    """Of two parts: components 1 and 2 are stationary, 3 lives on the small part, 4 on the large one."""
    adata = ad.AnnData(np.zeros((9, 2), np.float32))
    part = np.repeat([0, 1], [3, 6])
    adata.obsp["connectivities"] = sp.csr_matrix((part[:, None] == part) & ~np.eye(9, dtype=bool), dtype=np.float32)
    vectors = np.zeros((9, 4))
    vectors[:3, 0] = vectors[3:, 1] = 1
    vectors[:3, 2] = [0.7, -0.7, 0.1]
    vectors[3:, 3] = [0.1, 0.2, -0.9, 0.3, 0.2, 0.1]
    adata.obsm["X_diffmap"] = vectors
    assert choose_root(adata, None) == 5


def test_names_that_repeat_and_text_of_newer_files_are_taken(small: Path, tmp_path: Path) -> None:
    adata = ad.read_h5ad(small)
    adata.obs_names = [f"cell{i // 2}" for i in range(adata.n_obs)]
    adata.obs["text"] = pd.array(["a", pd.NA] * (adata.n_obs // 2), dtype="string")
    with ad.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(small)
    done = job(tmp_path / "out", small, *SMALL)
    assert done.code == 0
    assert done.adata.obs_names.is_unique
    assert list(done.adata.obs["text"].isna()) == [False, True] * 75
    assert "obs_names were not unique" in done.printed


def matrices() -> dict[str, np.ndarray]:
    counts = np.random.default_rng(0).poisson(3.0, (30, 12)).astype(np.float32)
    counts[:, 0] += 1
    normalised = counts / counts.sum(axis=1, keepdims=True) * 1e4
    return {
        "counts": counts,
        "normalised": normalised,
        "log": np.log1p(normalised),
        "fractional": counts * 10 + 0.25,
        "scaled": counts - counts.mean(axis=0),
    }


@pytest.mark.parametrize("kind", matrices())
@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array])
def test_what_a_matrix_holds_is_recognised(kind: str, form: type) -> None:
    assert kind_of(form(matrices()[kind])) == kind


def test_known_logarithms_and_subsets_of_genes_are_recognised() -> None:
    matrix = matrices()["log"]
    assert kind_of(2 * matrix / np.log(2), logged=True) == "log"
    assert kind_of(matrix[:, :5]) == "log"
    assert kind_of(matrices()["counts"].astype(np.int64)) == "counts"


def test_scaled_values_give_way_to_raw() -> None:
    adata = ad.AnnData(matrices()["log"])
    adata.raw = adata.copy()
    adata.X = matrices()["scaled"]
    source = prepared(adata, None)
    assert source.kind == "log"
    np.testing.assert_array_equal(source.adata.X, matrices()["log"])
    assert source.held.startswith("X held scaled values (some are negative); so .raw was used, which held logarithms")


def broken(kind: str, folder: Path) -> list[str]:
    """Arguments that cannot work, with the files they need."""
    path = folder / "input.h5ad"
    adata = ad.AnnData(
        matrices()["counts"], obs=pd.DataFrame({"day": ["1"] * 30}, index=[f"cell{i}" for i in range(30)])
    )
    if kind == "unreadable":
        path.write_text("cells and genes")
    elif kind == "empty":
        ad.AnnData(np.zeros((0, 0), np.float32)).write_h5ad(path)
    elif kind == "zero":
        ad.AnnData(np.zeros((30, 12), np.float32)).write_h5ad(path)
    elif kind == "scaled":
        ad.AnnData(matrices()["scaled"]).write_h5ad(path)
    elif kind != "missing":
        adata.X[3, 4] = np.nan if kind == "nan" else 0
        adata.write_h5ad(path)
    more = {
        "layer": ["--layer", "spliced"],
        "root": ["--root", "cell30"],
        "index": ["--root", "30"],
        "group": ["--root-group", "day=2"],
        "no key": ["--root-group", "time=1"],
        "components": ["--n-comps", "13"],
        "folder": ["--out", str(path)],
    }
    return [str(path), "--out", str(folder / "out"), *more.get(kind, [])]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no file .*input.h5ad"),
        ("unreadable", "cannot be read as an h5ad file"),
        ("empty", "has 0 cells and 0 genes"),
        ("zero", "all values are 0"),
        ("scaled", r"X holds scaled values .* put them into `.raw`"),
        ("nan", "of cell 'cell3' and gene '4' is not finite"),
        ("layer", r"'spliced' is not in `adata.layers`. Available: \["),
        ("root", "--root cell30: neither a cell name nor an index below 30"),
        ("index", "--root 30: neither a cell name nor an index below 30"),
        ("group", r"--root-group day=2: no such group. Available: \['1'\]"),
        ("no key", r"'time' is not in obs. Available: \['day'\]"),
        ("components", "pca: n_comps=13 must lie between 1 and 12"),
        ("folder", "read: .*exists: .*input.h5ad"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *broken(kind, tmp_path), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"scdiffx: error: .*{message}.*\n", captured.err, re.DOTALL)
    assert not (tmp_path / "out" / "result.h5ad").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["walk"], ["run", "--n-comps", "0"], ["run", "--root", "1", "--root-group", "a=b"]]
)
def test_a_wrong_command_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m scdiffx" in capsys.readouterr().err


def test_the_module_can_be_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scdiffx", "run", str(tmp_path / "none.h5ad"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no file" in done.stderr
    assert "Traceback" not in done.stderr


def test_packaged_counts_give_back_scanpys_logarithms(counts: ad.AnnData, pbmc68k_reduced: ad.AnnData) -> None:
    dense = counts.X.toarray().astype(np.float64)
    assert (dense == np.round(dense)).all()
    assert counts.X.dtype == np.float32
    assert counts.X.has_canonical_format
    logged = np.log1p(1e4 * dense / counts.obs["n_counts"].to_numpy(np.float64)[:, None])
    np.testing.assert_allclose(logged, pbmc68k_reduced.raw.X.toarray(), atol=7.5e-4)
    assert list(counts.obs_names) == list(pbmc68k_reduced.obs_names)
    assert list(counts.var_names) == list(pbmc68k_reduced.raw.var_names)
    assert (dense.sum(axis=1) < counts.obs["n_counts"]).all()
    assert counts.obs["bulk_labels"].cat.categories.size == 10


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for compiled programs that can be written and holds 1 MiB."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "program").write_bytes(bytes(2**20))
    monkeypatch.setattr(_doctor, "cache_in_use", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_doctor_finds_no_problem_here(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor"])
    text = capsys.readouterr().out
    assert code == 0, text
    names = {line.split("  ")[0] for line in text.splitlines()}
    assert names > {"python", "jaxlib", "anndata", "scanpy", "ott-jax", "igraph", "devices", "64-bit floats", "cores"}
    assert f"{cache} (1.0 MiB, writable)" in text
    assert text.endswith("No problems found.\n")


@pytest.mark.parametrize(
    ("versions", "problem", "remedy"),
    [
        ({"pandas": "1.5.3"}, "pandas 1.5.3 does not meet >=2.2", "pip install 'pandas>=2.2'"),
        ({"optax": None}, "optax is not installed", "pip install 'optax>="),
        ({"jaxlib": "0.4.1"}, "jaxlib 0.4.1 does not fit", "pip install 'jax=="),
    ],
)
def test_doctor_finds_versions_that_do_not_fit(
    versions: dict[str, str | None],
    problem: str,
    remedy: str,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = _doctor.version_of
    monkeypatch.setattr(_doctor, "version_of", lambda name: versions[name] if name in versions else real(name))
    assert main(["doctor"]) == 1
    assert any(problem in found and remedy in cure for found, cure in sd.doctor().problems)
    assert f"PROBLEM: {sd.doctor().problems[0][0]}" in capsys.readouterr().out


def test_doctor_notes_what_is_wrong_with_others(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, versions = _doctor.version_of, {"scanpy": "1.12.1", "pynndescent": "0.7.0"}
    monkeypatch.setattr(_doctor, "version_of", lambda name: versions.get(name) or real(name))
    assert any("pip install 'pynndescent<0.7'" in note for note in sd.doctor().notes)


def test_doctor_finds_a_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doctor, "cache_in_use", lambda: cache / "program" / "below")
    report = sd.doctor()
    assert not report.ok
    assert "SCDIFFX_CACHE" in report.problems[0][1]
    monkeypatch.setattr(_doctor, "cache_in_use", lambda: None)
    assert sd.doctor().ok


@pytest.mark.parametrize("platforms", [None, "cpu"])
def test_doctor_finds_an_accelerator_that_does_not_answer(
    platforms: str | None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    monkeypatch.setattr(_doctor, "plugins", lambda: ["jax-cuda12-plugin"])
    monkeypatch.setattr(_doctor, "chosen_platforms", lambda: platforms)
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices(backend="cpu"))
    report = sd.doctor()
    assert report.ok == (platforms is not None)
    told = report.notes if platforms else [problem for problem, _ in report.problems]
    assert any("jax-cuda12-plugin is installed" in text for text in told)


@pytest.mark.parametrize(
    ("version", "bounds", "met"),
    [
        ("0.9.9", ">=0.10", False),
        ("0.10", "<=0.10.0,>=0.10.0", True),
        ("0.12.0.1", "<=0.12.0.1,>=0.11.2", True),
        ("0.12.1", "<=0.12.0.1,>=0.11.2", False),
        ("0.0.50.3", "==0.0.50.*", True),
        ("0.0.51", "==0.0.50.*", False),
        ("1.5", "!=1.5", False),
        ("2.3.1", "~=2.2", True),
        ("3.0", "~=2.2", False),
        ("0.7", "<0.7", False),
        ("5", "", True),
    ],
)
def test_versions_are_compared_by_number(version: str, bounds: str, met: bool) -> None:
    assert _doctor.satisfies(version, bounds) == met
