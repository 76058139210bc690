"""Print what umap-learn reaches on the cells of test_parametric_umap.py: the numbers that stand there.

python tests/record_umap.py
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

from sklearn.neighbors import KNeighborsClassifier

sys.path.insert(0, str(Path(__file__).parent / "ops"))

import umap
from test_parametric_umap import kept, reduced


def main() -> None:
    whole = reduced(700)
    old, new = reduced(500), whole[500:].copy()
    types, wanted = (data.obs["cell_type"].astype(str) for data in (old, new))
    for seed in range(3):
        theirs = umap.UMAP(min_dist=0.5, random_state=seed, n_jobs=1).fit(old.obsm["X_pca"])
        placed = theirs.transform(new.obsm["X_pca"])
        score = KNeighborsClassifier(15).fit(theirs.embedding_, types).score(placed, wanted)
        found = (kept(old, theirs.embedding_), kept(new, placed), score)
        sys.stdout.write(f"umap-learn {version('umap-learn')}, seed {seed}: {found}\n")


if __name__ == "__main__":
    main()
