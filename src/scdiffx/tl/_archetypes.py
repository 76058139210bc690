from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import Obsm, Slot, Uns
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.tl._ot_trajectory import representation

if TYPE_CHECKING:
    from anndata import AnnData


@public
def archetypes(
    adata: AnnData | Plan,
    n_archetypes: int | None = None,
    *,
    use_rep: str | None = None,
    max_archetypes: int = 10,
    n_init: int = 5,
    max_iter: int = 300,
    n_bootstrap: int = 10,
    random_state: Any = None,
    key_added: str = "archetypes",
    copy: bool = False,
    rng: Any = None,
) -> AnnData | None:
    """Describe each cell as a mixture of a few extreme profiles (archetypes).

    Principal convex hull analysis: archetypes are mixtures of cells, such that mixtures of archetypes come as near to
    all cells as they can. The cost of a round of the search is linear in cells. Archetypes span what varies most:
    differences between batches count as any other.

    Parameters
    ----------
    adata
        Annotated data (cells x genes), or a plan.
    n_archetypes
        Number of archetypes, at most one more than dimensions. By default the number after which more explain little:
        where explained variance over 1 to `max_archetypes` is farthest above the line between its ends. Look at the
        curve: it often bends little.
    use_rep
        Key of `obsm` with the coordinates; default: the principal components.
    max_archetypes
        Largest number tried where `n_archetypes` is None.
    n_init
        Number of starts, of which the result with the smallest residual is kept.
    max_iter
        Largest number of rounds from each start.
    n_bootstrap
        Number of resampled sets of cells on which the stability of the archetypes is judged; 0 for none.
    random_state, rng
        Seed: an integer, a numpy generator or a JAX key; give one of the two. Default 0.
    key_added
        Name of the results; other names go before ``"_weights"`` too.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["archetype_weights" | f"{key_added}_weights"]` : float32 (cells, n_archetypes)
        Weights of the archetypes in each cell, at least 0 and summing to 1; archetypes in the order of their total
        weight, largest first.
    `adata.uns["archetypes" | key_added]` : dict
        `params`, the `positions` of the archetypes (n_archetypes, dims), the share of the variance that is `explained`;
        with `n_archetypes` None the `curve` of explained variance, for 1, 2, ... archetypes; and with `n_bootstrap` the
        `spread` (n_archetypes,): how far archetypes of resampled cells lie from these, as a share of the distance of
        these from their mean (root mean squares).

    Raises
    ------
    KeyError
        If the representation does not exist.
    ValueError
        If there are more archetypes than cells or than dimensions + 1, or a setting is not usable.

    Warns
    -----
    UserWarning
        If `max_iter` rounds were not enough.

    Notes
    -----
    In a plan derivatives pass through weights and archetypes, with the mixture of cells that each archetype is held
    between refreshes; at a refresh it is found anew, from the archetypes before it. A fitted plan searches them anew
    among the cells it is applied to.

    References
    ----------
    Mørup and Hansen (2012), Archetypal analysis for machine learning and data mining. Cutler and Breiman (1994),
    Archetypal analysis.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> sd.tl.archetypes(adata, n_archetypes=3, n_init=1, n_bootstrap=0)
    >>> adata.obsm["archetype_weights"].shape
    (700, 3)
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    limits = (("n_init", n_init, 1), ("max_iter", max_iter, 1), ("n_bootstrap", n_bootstrap, 0))
    for name, value, least in (*limits, ("max_archetypes", max_archetypes, 2)):
        if value < least:
            raise ValueError(f"{name}={value!r} must be at least {least}")
    if n_archetypes is not None and not 2 <= n_archetypes <= data.n_obs:
        raise ValueError(f"n_archetypes={n_archetypes!r} must lie between 2 and the number of cells, {data.n_obs}")
    if data.n_obs < 2:
        raise ValueError(f"archetypes need at least two cells, `adata` has {data.n_obs}")
    z = representation(adata, use_rep)
    seed = as_seed(one_rng(rng, random_state))
    params = {
        "use_rep": z.key,
        "n_init": n_init,
        "max_iter": max_iter,
        "n_bootstrap": n_bootstrap,
        "random_state": seed,
        **({"max_archetypes": max_archetypes} if n_archetypes is None else {"n_archetypes": n_archetypes}),
    }

    def notes(op: ops.Archetypes, result: ops.ArchetypesResult, args: Any) -> Mapping[Slot, Any]:
        entry = {
            "params": params,
            "positions": np.asarray(result.archetypes, np.float32),
            "explained": float(result.explained),
        }
        if op.curve is not None:
            entry["curve"] = np.asarray(op.curve, np.float64)
        if n_bootstrap:
            entry["spread"] = op.spread(np.asarray(args[0], np.float32), n_bootstrap, seed)
        return {Uns(key_added): entry}

    weights_key = "archetype_weights" if key_added == "archetypes" else f"{key_added}_weights"
    step = Step(
        "archetypes",
        ops.Archetypes(n_archetypes=n_archetypes, max_archetypes=max_archetypes, n_init=n_init, max_iter=max_iter),
        reads=(z,),
        writes=(Write(Obsm(weights_key), lambda op, result: result.weights, np.float32),),
        message="searching for archetypes",
        notes=notes,
        rng=seed,
    )
    return apply(adata, step, copy=copy)
