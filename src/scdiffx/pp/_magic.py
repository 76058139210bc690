"""Imputation by diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import Connectivities, Genes, Leading, Obsm, Slot, Uns, X, available, genes_at
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.pp._pca import default_keys

if TYPE_CHECKING:
    from anndata import AnnData


@public
def magic(
    adata: AnnData | Plan,
    genes: Sequence[str] | None = None,
    *,
    knn: int = 5,
    decay: float = 1.0,
    knn_max: int | None = None,
    t: float | str = 3,
    n_pcs: int | None = None,
    use_rep: str | None = None,
    neighbors_key: str | None = None,
    layer: str | None = None,
    key_added: str = "magic",
    random_state: Any = None,
    copy: bool = False,
    rng: Any = None,
) -> AnnData | None:
    """Smooth expression over similar cells by diffusion (MAGIC).

    Each gene is averaged with the weights of a random walk of `t` steps on the alpha-decay kernel of a representation,
    or on a neighbour graph that is there already. Equals magic-impute on the same representation. The walk is applied
    step by step to the genes asked for, so the cost is linear in cells and genes. MAGIC expects `X` normalised by
    depth and brought to square roots or logarithms.

    Parameters
    ----------
    adata
        Annotated data (cells x genes), or a plan.
    genes
        Names of the genes to impute. By default all of them, which fills a dense layer and needs the matrix in memory;
        some are also read from a dask array or a file.
    knn
        The scale of a cell's kernel is the distance to this neighbour.
    decay
        Exponent of the kernel: larger values cut it off more sharply.
    knn_max
        Largest number of neighbours a cell can have; default ``3 * knn``.
    t
        Number of steps of the walk; between whole numbers the results are interpolated. "auto" takes the first time
        from which one more step hardly changes the result (at most 20).
    n_pcs
        Use only the first `n_pcs` columns of the representation.
    use_rep
        Key of `obsm` in which neighbours are searched; default: the principal components.
    neighbors_key
        Key of `uns` of a neighbour graph to walk on ("neighbors" for scanpy's default) instead of the kernel; then
        `knn`, `decay`, `knn_max`, `n_pcs` and `use_rep` have no meaning and must be left alone.
    layer
        Impute this layer rather than `X`.
    key_added
        Name of the layer; with `genes`, of ``obsm[f"X_{key_added}"]``.
    random_state, rng
        Seed of the approximate neighbour search; give one of the two. Default 0.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.layers["magic" | key_added]` : float32 (cells, genes), dense
        Without `genes`: the imputed values, on the scale of the input.
    `adata.obsm["X_magic" | f"X_{key_added}"]` : float32 (cells, len(genes))
        With `genes`: their imputed values, in the order asked for.
    `adata.uns["magic" | key_added]` : dict
        `params`, the diffusion time `t` and, with `genes`, their names.

    Raises
    ------
    KeyError
        If a gene, the representation, the layer or the graph does not exist.
    ValueError
        If `adata` is empty, `t`, `knn`, `knn_max` or `decay` is not usable, `X` is not finite, or a graph is given
        along with settings of the kernel.

    Notes
    -----
    In a plan, `t`, the kernel's `bandwidth` and `decay`, the weight with which a cell stays where it is and a `filter`
    over walks of 0 to ``2 * t`` steps can be learned, for instance with `sd.losses.molecular_cross_validation`.

    References
    ----------
    van Dijk et al. (2018), Recovering gene interactions from single-cell data using data diffusion.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> sd.pp.magic(adata, genes=["CD3D", "LYZ"], neighbors_key="neighbors")
    >>> adata.obsm["X_magic"].shape
    (700, 2)
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    if isinstance(t, str):
        if t != "auto":
            raise ValueError(f"t={t!r} must be a number greater than 0 or 'auto'")
    elif not (math.isfinite(t) and t > 0):
        raise ValueError(f"t={t!r} must be a number greater than 0 or 'auto'")
    if not (math.isfinite(decay) and decay > 0):
        raise ValueError(f"decay={decay!r} must be greater than 0")
    if neighbors_key is not None:
        given = {"knn": knn != 5, "decay": decay != 1, "knn_max": knn_max, "n_pcs": n_pcs, "use_rep": use_rep}
        if any(given.values()):
            names = [name for name, is_given in given.items() if is_given]
            raise ValueError(f"neighbors_key={neighbors_key!r} names a graph, so {names} have no meaning")
    most = 3 * knn if knn_max is None else knn_max
    if not 1 <= knn <= most:
        raise ValueError(f"knn={knn!r} must be at least 1 and at most knn_max={knn_max!r}")
    if neighbors_key is None and 0 < data.n_obs <= most:
        raise ValueError(f"knn={knn!r}, knn_max={knn_max!r}: there are only {data.n_obs} cells")
    seed = as_seed(one_rng(rng, random_state))
    source: Slot = X(layer)
    target: Slot = X(key_added)
    if genes is not None:
        names = [genes] if isinstance(genes, str) else [str(gene) for gene in genes]
        source, target = Genes(X(layer), genes_at(data, names)), Obsm(f"X_{key_added}")
    walk = Connectivities(neighbors_key) if neighbors_key is not None else _representation(adata, use_rep, n_pcs)
    auto = isinstance(t, str)
    n_steps = 2 * math.ceil(float(t)) if isinstance(adata, Plan) and not auto else None
    params = {
        **({"neighbors_key": neighbors_key} if neighbors_key is not None else {"knn": knn, "decay": decay}),
        "t": t,
        "random_state": seed,
    }

    def notes(op: ops.Magic, result: ops.MagicResult, args: Any) -> Mapping[Slot, Any]:
        entry: dict[str, Any] = {"params": params, "t": float(result.t)}
        if genes is not None:
            entry["genes"] = np.asarray(names, dtype=object)
        return {Uns(key_added): entry}

    step = Step(
        "magic",
        ops.Magic(t=None if auto else float(t), decay=float(decay), knn=(knn, most), n_steps=n_steps),
        reads=(source, walk),
        writes=(Write(target, lambda op, result: result.imputed, np.float32),),
        message="computing MAGIC imputation",
        notes=notes,
        rng=seed,
    )
    return apply(adata, step, copy=copy)


def _representation(adata: AnnData | Plan, use_rep: str | None, n_pcs: int | None) -> Slot:
    data = adata.adata if isinstance(adata, Plan) else adata
    has: Callable[[Slot], bool] = adata.has if isinstance(adata, Plan) else lambda slot: slot.exists(adata)
    slot = Obsm(default_keys()[0] if use_rep is None else use_rep)
    if not has(slot):
        hint = "; run `sd.pp.pca` first" if use_rep is None else ""
        raise KeyError(f"{slot.key!r} is not in `adata.obsm`. Available: {available(data.obsm.keys())}{hint}")
    return slot if n_pcs is None else Leading(slot, n_pcs)
