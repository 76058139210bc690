"""What the README, the reference pages and the metadata say is there, is there."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy.sparse import csr_matrix

import scdiffx

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
REFERENCE_PAGES = ("pp", "tl", "pl", "losses", "metrics", "ops")


def listed(page: str) -> set[str]:
    """Return the names that a reference page documents."""
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text()
    return set(re.findall(r"^   (\w+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", REFERENCE_PAGES)
def test_reference_page_lists_the_public_names(page: str) -> None:
    part = importlib.import_module(f"scdiffx.{page}")
    assert listed(page) <= set(part.__all__)
    # Results stand with what returns them and constants with what takes them; a second name needs no second entry.
    documented = {id(getattr(part, name)) for name in listed(page)}
    expected = {
        name
        for name in part.__all__
        if not name.endswith("Result") and not re.fullmatch("[A-Z]+(_[A-Z]+)+|KERNELS", name)
    }
    assert not {name for name in expected if id(getattr(part, name)) not in documented}


@pytest.mark.parametrize("name", ["run-command", "test-command"])
def test_readme_has_its_two_commands(name: str) -> None:
    command = re.search(rf"<!-- {name} -->\n```bash\n(.+)\n```", README)
    assert command is not None
    assert command[1].startswith("python3 -m venv ")


def test_version_is_the_same_everywhere() -> None:
    version = scdiffx.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture
def branch() -> ad.AnnData:
    """200 cells x 2200 genes: Poisson counts whose means change along a line, observed on three days."""
    rng = np.random.default_rng(0)
    time = np.sort(rng.uniform(size=200))
    means = np.exp(rng.normal(0, 0.5, 2200) + np.outer(time, rng.normal(0, 1.5, 2200)))
    adata = ad.AnnData(csr_matrix(rng.poisson(means).astype(np.float32)))
    adata.obs["day"] = np.floor(time * 3)
    return adata


@pytest.mark.slow
def test_readme_examples_run(branch: ad.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the README leaves the number of steps to the default of 200: what they reach is not what this looks at.
    monkeypatch.setattr(scdiffx, "fit", functools.partial(scdiffx.fit, n_steps=8))
    namespace: dict[str, object] = {"adata": branch, "raw": branch.copy()}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), namespace)
    later = branch.obs["dpt_pseudotime"].groupby(branch.obs["day"]).median()
    assert later.is_monotonic_increasing
    assert branch.obsm["X_pca"].shape == (200, 10)
