from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import Obs, Obsm, Slot, Uns, categories
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.tl._ot_trajectory import representation

if TYPE_CHECKING:
    from anndata import AnnData


@public
def kmeans(
    adata: AnnData | Plan,
    n_clusters: int = 8,
    *,
    use_rep: str | None = None,
    n_init: int = 10,
    max_iter: int = 300,
    temperature: float | None = None,
    n_soft: int = 0,
    random_state: Any = None,
    key_added: str = "kmeans",
    copy: bool = False,
    rng: Any = None,
) -> AnnData | None:
    """Cluster the cells by k-means, with memberships at a temperature.

    Lloyd's iterations from greedy k-means++ starts until no cell moves; from the same start they give scikit-learn's
    clusters. The cost of an iteration is linear in cells, clusters and dimensions.

    Parameters
    ----------
    adata
        Annotated data (cells x genes), or a plan.
    n_clusters
        Number of clusters.
    use_rep
        Key of `obsm` with the coordinates; default: the principal components.
    n_init
        Number of starts, of which the result with the smallest inertia is kept.
    max_iter
        Largest number of iterations from each start, and once more from the best result.
    temperature
        Memberships are ``softmax(-distance^2 / temperature)`` over the centres. By default twice the mean variance
        within clusters and per dimension: the posteriors of spherical Gaussians with that variance. In many
        dimensions they are nearly 0 or 1; higher values make them softer.
    n_soft
        Number of further iterations in which cells count for every cluster by their membership (soft k-means). By
        default none, and the clusters are those of k-means whatever the temperature; as it falls to 0 they are too.
    random_state, rng
        Seed: an integer, a numpy generator or a JAX key; give one of the two. Default 0.
    key_added
        Name of the results.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obs["kmeans" | key_added]` : categorical of str (cells,)
        The nearest centre: clusters "0", "1", ..., largest first (before any `n_soft` iterations).
    `adata.obsm["kmeans_probabilities" | f"{key_added}_probabilities"]` : float32 (cells, n_clusters)
        Memberships, which sum to 1; the largest is that of the cell's cluster.
    `adata.uns["kmeans" | key_added]` : dict
        `params`, the `centers` (n_clusters, dims), the `inertia` (sum of squared distances to the nearest centres) and
        the `temperature`.

    Raises
    ------
    KeyError
        If the representation does not exist.
    ValueError
        If there are fewer cells than clusters, or a setting is not usable.

    Warns
    -----
    UserWarning
        If `max_iter` iterations were not enough.

    Notes
    -----
    In a plan `temperature` can be learned, and derivatives pass through memberships and centres. The centres of the
    first call stay: wherever the cells have moved, and for new cells, iterations start from them.

    References
    ----------
    Arthur and Vassilvitskii (2007), k-means++: the advantages of careful seeding. Lloyd (1982), Least squares
    quantization in PCM.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> sd.tl.kmeans(adata, n_clusters=4)
    >>> list(adata.obs["kmeans"].cat.categories)
    ['0', '1', '2', '3']
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    for name, value, least in (("n_init", n_init, 1), ("max_iter", max_iter, 1), ("n_soft", n_soft, 0)):
        if value < least:
            raise ValueError(f"{name}={value!r} must be at least {least}")
    if not 1 <= n_clusters <= data.n_obs:
        raise ValueError(f"n_clusters={n_clusters!r} must lie between 1 and the number of cells, {data.n_obs}")
    if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature!r} must be greater than 0")
    z = representation(adata, use_rep)
    seed = as_seed(one_rng(rng, random_state))
    params = {
        "n_clusters": n_clusters,
        "use_rep": z.key,
        "n_init": n_init,
        "max_iter": max_iter,
        "n_soft": n_soft,
        "random_state": seed,
    }

    def notes(op: ops.KMeans, result: ops.KMeansResult, args: Any) -> Mapping[Slot, Any]:
        assert op.temperature is not None
        entry = {
            "params": params,
            "centers": np.asarray(result.centers, np.float32),
            "inertia": float(result.inertia),
            "temperature": float(op.temperature),
        }
        return {Obs(key_added): categories(np.asarray(result.labels)), Uns(key_added): entry}

    step = Step(
        "kmeans",
        ops.KMeans(
            temperature=None if temperature is None else float(temperature),
            n_clusters=n_clusters,
            n_init=n_init,
            max_iter=max_iter,
            n_soft=n_soft,
        ),
        reads=(z,),
        writes=(
            Write(Obs(key_added), lambda op, result: result.labels),
            Write(Obsm(f"{key_added}_probabilities"), lambda op, result: result.memberships, np.float32),
        ),
        message="running k-means",
        notes=notes,
        rng=seed,
    )
    return apply(adata, step, copy=copy)
