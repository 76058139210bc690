"""Configuration of the documentation. Builds without network; warnings are meant to be errors (`sphinx-build -W`)."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version as installed_version
from pathlib import Path

HERE = Path(__file__).parent

project = "scdiffx"
author = "scdiffx developers"
copyright = author
release = version = installed_version("scdiffx")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinxcontrib.bibtex",
]

# Links to other projects need their inventories from the network: only on the documentation server.
if os.environ.get("READTHEDOCS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "anndata": ("https://anndata.readthedocs.io/en/stable", None),
        "scanpy": ("https://scanpy.readthedocs.io/en/stable", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
    }

exclude_patterns = ["_build"]
templates_path = ["_templates"]
html_theme = "sphinx_book_theme"
html_title = "scdiffx"
html_theme_options = {"show_toc_level": 2}

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"

autosummary_generate = True
autodoc_typehints = "none"  # the types stand in the parameter sections
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False
bibtex_bibfiles = ["references.bib"]


def _collect_tutorials() -> None:
    """Bring the notebooks of ../tutorials under the source folder, with an index of those that exist."""
    source, target = HERE.parent / "tutorials", HERE / "tutorials"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    index = (source / "README.md").read_text()
    # In the order in which the text names them.
    notebooks = sorted(source.glob("*.ipynb"), key=lambda n: (index.index(f"`{n.stem}`"), n.stem))
    for notebook in notebooks:
        shutil.copy(notebook, target)
    if notebooks:
        names = "\n".join(n.stem for n in notebooks)
        index += f"\n```{{toctree}}\n:maxdepth: 1\n\n{names}\n```\n"
    (target / "index.md").write_text(index)


_collect_tutorials()
