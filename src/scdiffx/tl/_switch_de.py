"""Genes that switch on or off along pseudotime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import Obs, Slot, Uns, Var, X, available
from scdiffx._steps import Plan, Step, Write, apply

if TYPE_CHECKING:
    from anndata import AnnData

_FEWEST_CELLS = 4


@public
def switch_de(
    adata: AnnData | Plan,
    pseudotime: str = "dpt_pseudotime",
    *,
    n_permutations: int = 20,
    layer: str | None = None,
    key_added: str = "switch",
    random_state: Any = None,
    copy: bool = False,
    rng: Any = None,
) -> AnnData | None:
    """Find genes that switch on or off along pseudotime, and when they do (switchDE's model).

    Fits ``level / (1 + exp(-strength (t - time)))`` to each gene, with Gaussian noise, and compares it with a constant
    by the likelihood ratio. switchDE writes ``2 mu0`` for the level.

    Parameters
    ----------
    adata
        Annotated data (cells x genes), normalised and on a logarithmic scale, or a plan.
    pseudotime
        Column of `obs` that orders the cells; numbers. Cells where it is not finite are left out.
    n_permutations
        Number of shuffled pseudotimes that calibrate the p-values, see Notes. 0 takes switchDE's chi-squared
        distribution with 2 degrees of freedom instead.
    layer
        Layer to test rather than `X`.
    key_added
        Prefix of the columns of `var`, and key of `uns`.
    random_state, rng
        Seed of the permutations; give one of the two. Default 0.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.var["switch_time" | f"{key_added}_time"]` : float32 (genes,)
        Where the gene is at half of its level, in units of pseudotime and within its range.
    `adata.var["switch_strength" | f"{key_added}_strength"]` : float32 (genes,)
        Rate of the sigmoid per unit of pseudotime: above 0 for genes that switch on, below 0 for genes that switch off,
        and 0 for genes that do not vary (whose time says nothing).
    `adata.var["switch_pval" | f"{key_added}_pval"]` : float64 (genes,)
        P-value against a constant; 1 for genes that do not vary.
    `adata.var["switch_qval" | f"{key_added}_qval"]` : float64 (genes,)
        Benjamini-Hochberg over all genes.
    `adata.uns["switch" | key_added]` : dict
        `params`, and `unconverged`: how many genes used up the steps of the search.

    Raises
    ------
    KeyError
        If the column or the layer does not exist.
    TypeError
        If the column does not hold numbers.
    ValueError
        If values are negative or not finite, fewer than four cells have a finite pseudotime or all of them the same, or
        a number is out of range.

    Notes
    -----
    Under the null hypothesis the likelihood ratio is not chi-squared with 2 degrees of freedom, since a constant gene
    has no switch time: measured on shuffled orders, that distribution is too strict for most genes (half as many
    p-values below .05 as there should be) and far too lenient for genes found in fewer than 20 cells along a continuous
    order (38 times as many below .001). So a scaled chi-squared with the mean and the variance of permuted statistics
    is used, as a function of a gene's mean in standard errors. Very small p-values extrapolate it, and those of genes
    found in fewer than 20 cells are still too frequent (four times below .001): leave such genes out.

    P-values take the pseudotime as given. Where it was computed from the same counts they are too small: genes that
    made the order follow it by construction. `sd.pp.split_counts` deals the molecules into independent layers, one for
    the order and one to test. Cells are the unit: donors are not.

    Time and strength are hardly determined for genes that change slowly or little. A time at an end of the range means
    that the gene is below or above half of its level everywhere. Where pseudotime has few distinct values, a step
    between two of them has no best strength.

    In a plan the outputs are differentiable in expression and pseudotime, by the implicit function theorem.

    References
    ----------
    Campbell and Yau (2017), switchde: inference of switch-like differential expression along single-cell trajectories.

    Examples
    --------
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> sd.pp.normalize_total(adata)
    >>> sd.pp.log1p(adata)
    >>> adata.obs["time"] = np.linspace(0, 1, 150)  # in place of a pseudotime
    >>> sd.tl.switch_de(adata, "time", n_permutations=3)
    >>> bool(adata.var["switch_qval"].between(0, 1).all())
    True
    """
    if n_permutations < 0:
        raise ValueError(f"n_permutations={n_permutations!r} must not be negative")
    seed = as_seed(one_rng(rng, random_state))
    order = Obs(pseudotime)
    if not (isinstance(adata, Plan) and adata.writes(order)):
        _check_order(adata.adata if isinstance(adata, Plan) else adata, pseudotime)
    params = {"pseudotime": pseudotime, "n_permutations": n_permutations, "random_state": seed}

    def notes(op: ops.SwitchDE, result: ops.SwitchDEResult, args: Any) -> Mapping[Slot, Any]:
        from scipy.stats import false_discovery_control

        q = false_discovery_control(np.asarray(result.pvalue, np.float64))
        missing = int((~np.asarray(result.converged)).sum())
        return {Var(f"{key_added}_qval"): q, Uns(key_added): {"params": params, "unconverged": missing}}

    step = Step(
        "switch_de",
        ops.SwitchDE(n_permutations=n_permutations),
        reads=(X(layer, counts=True), order),
        writes=(
            Write(Var(f"{key_added}_time"), lambda op, result: result.time, np.float32),
            Write(Var(f"{key_added}_strength"), lambda op, result: result.strength, np.float32),
            Write(Var(f"{key_added}_pval"), lambda op, result: result.pvalue, np.float64),
        ),
        message="fitting switches along pseudotime",
        notes=notes,
        precise=True,
        # The calibration has compiled the fit already, where there are few genes.
        compiled=False,
        rng=seed,
    )
    return apply(adata, step, copy=copy)


def _check_order(data: AnnData, key: str) -> None:
    if key not in data.obs:
        hint = "; run `sd.tl.pseudotime` first" if key == "dpt_pseudotime" else ""
        raise KeyError(f"pseudotime={key!r} is not in `adata.obs`. Available: {available(data.obs)}{hint}")
    column = data.obs[key]
    if column.dtype.kind not in "fiu":
        raise TypeError(f"pseudotime={key!r}: the column holds {column.dtype}, but pseudotime is a number")
    time = column.to_numpy(np.float64)
    finite = time[np.isfinite(time)]
    if len(finite) < _FEWEST_CELLS or np.ptp(finite) == 0:
        raise ValueError(
            f"pseudotime={key!r} has {len(finite)} finite values, {len(np.unique(finite))} of them different; "
            f"{_FEWEST_CELLS} cells and two values are needed"
        )
