"""Every cell twice, with different molecules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scdiffx._calls import public
from scdiffx._core.random import one_rng
from scdiffx._steps import Plan
from scdiffx.pp._split_counts import split_counts

if TYPE_CHECKING:
    from anndata import AnnData


@public
def replicates(
    adata: AnnData,
    fraction: float = 0.5,
    *,
    layer: str | None = None,
    random_state: Any = None,
    rng: Any = None,
) -> AnnData:
    """Measure every cell twice: its molecules are dealt into two halves, which become two cells.

    Whatever differs between the two is counting noise, so a workflow can be judged without labels by how near it brings
    them: :func:`scdiffx.losses.replicate_consistency`. A fit on the halves is applied to whole cells by
    ``fitted.apply(adata)``: the genes are the same.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with counts.
    fraction
        Share of the molecules in the first half, between 0 and 1.
    layer
        Take the counts from this layer rather than `X`.
    random_state, rng
        Seed of the split; give one of the two. Default 0.

    Returns
    -------
    AnnData with twice the cells, all first halves before all second ones, in the order of `adata`. `X` holds the counts
    (float32), `obs` and `var` are those of `adata`, and:

    `.obs["replicate_of"]` : categorical of str
        Name of the cell.
    `.obs["replicate"]` : categorical of str
        "1" or "2".

    Raises
    ------
    TypeError
        If `adata` is a plan.
    ValueError
        If values are not whole numbers of at least 0, names of cells repeat, or `fraction` does not lie between 0
        and 1.

    References
    ----------
    Neufeld et al. (2024), Inference after latent variable estimation for single-cell RNA sequencing data; Ahlmann-Eltze
    and Huber (2023), Comparison of transformations for single-cell RNA-seq data.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> halves = sd.pp.replicates(adata)
    >>> halves.shape, list(halves.obs["replicate"].cat.categories)
    ((300, 120), ['1', '2'])
    """
    import anndata as ad
    import pandas as pd

    if isinstance(adata, Plan):
        raise TypeError("replicates cannot be part of a plan: call it on the AnnData before `sd.plan(...)`")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction!r} must lie between 0 and 1")
    if not adata.obs_names.is_unique:
        raise ValueError("names of cells repeat: call `adata.obs_names_make_unique()` first")
    bare = ad.AnnData(adata.X if layer is None else adata.layers[layer], obs=adata.obs.copy(), var=adata.var.copy())
    split_counts(bare, {"1": fraction, "2": 1 - fraction}, rng=one_rng(rng, random_state))
    halves = []
    for name in ("1", "2"):
        half = ad.AnnData(bare.layers[name], obs=adata.obs.copy(), var=adata.var.copy())
        half.obs["replicate_of"] = pd.Categorical(adata.obs_names)
        half.obs["replicate"] = pd.Categorical([name] * adata.n_obs, categories=["1", "2"])
        half.obs_names = [f"{cell}-{name}" for cell in adata.obs_names]
        halves.append(half)
    return ad.concat(halves, merge="same", join="outer")
