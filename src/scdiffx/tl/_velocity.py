from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._log import warn
from scdiffx._slots import Connectivities, Slot, Uns, Var, X, available, genes_at, matrix_of
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.tl._dynamics import dynamics_step, warn_few

if TYPE_CHECKING:
    from anndata import AnnData

MODES = ("deterministic", "stochastic", "dynamical")


@public
def velocity(
    adata: AnnData | Plan,
    vkey: str = "velocity",
    mode: str = "stochastic",
    *,
    perc: float | Sequence[float] | None = None,
    min_r2: float = 0.01,
    min_ratio: float = 0.01,
    min_likelihood: float = 1e-3,
    var_names: Sequence[str] | None = None,
    r2_adjusted: bool | None = None,
    use_highly_variable: bool = True,
    neighbors_key: str = "neighbors",
    copy: bool = False,
) -> AnnData | None:
    """Estimate RNA velocity, the change of spliced counts, from unspliced and spliced counts.

    scVelo's models, numbers and keys. The layers "Ms" and "Mu" are computed first where they are missing: the means of
    spliced and unspliced counts over each cell and its neighbours (scVelo's `pp.moments`). Before, normalise both
    layers, for instance with ``sd.pp.normalize_total(adata, layer="spliced")``, and select genes: results are dense.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with layers "spliced" and "unspliced" and a neighbour graph, or a plan.
    vkey
        Name of the layer, and beginning of the other keys.
    mode
        "deterministic": the ratio of unspliced to spliced counts in the steady state, from a regression on the extreme
        cells of each gene (La Manno 2018). "stochastic": the same ratio by generalised least squares over first and
        second moments. "dynamical": the full kinetics of each gene, which is switched on and off: rates, the time of
        the switch and times of the cells by expectation-maximisation, scVelo's `recover_dynamics` (Bergen 2020).
    perc
        Percentile beyond which cells are extreme, or a pair of which the upper one counts; default ``[5, 95]``.
    min_r2, min_ratio
        A gene is a velocity gene if its coefficient of determination and its ratio are above these.
    min_likelihood
        Dynamical model: a velocity gene has a likelihood above this.
    var_names
        Dynamical model: which genes to fit; by default those that the steady-state model fits.
    r2_adjusted
        Whether the coefficient of determination is that of a regression on all cells; by default of the extreme cells.
        The dynamical model always takes all cells.
    use_highly_variable
        Whether only genes with ``adata.var["highly_variable"]`` can be velocity genes, where that column exists.
    neighbors_key
        Key of `adata.uns` that describes the graph.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.layers["velocity" | vkey]` : float32 (cells, genes), float64 by the dynamical model
        Change of the spliced counts per splicing time.
    `adata.layers["variance_velocity" | f"variance_{vkey}"]` : float32 (cells, genes)
        Stochastic model: the same of the second moments, 0 for genes that are not velocity genes.
    `adata.layers["velocity_u" | f"{vkey}_u"]` : float64 (cells, genes)
        Dynamical model: the same of unspliced counts. Both are nan for genes that are not fitted.
    `adata.layers["Ms", "Mu"]` : float32 (cells, genes)
        The means over the neighbours, where they were missing.
    `adata.var["velocity_gamma", "velocity_qreg_ratio"]` : float32 (genes,)
        Degradation rate per splicing rate, and the ratio from the extreme cells alone.
    `adata.var["velocity_r2"]` : float64 (genes,)
        Coefficient of determination, at most 1.
    `adata.var["velocity_genes"]` : bool (genes,)
        Which genes are velocity genes.
    `adata.uns["velocity_params"]` : dict
        `mode`, `fit_offset` (False) and `perc`.
    `adata.var["fit_alpha", "fit_beta", "fit_gamma", "fit_t_", "fit_scaling"]` : float64 (genes,)
        Dynamical model, as all that follows, nan for genes that are not fitted: rates of transcription, splicing and
        degradation, the time of the switch, and by what unspliced counts are divided.
    `adata.var["fit_likelihood", "fit_variance", "fit_r2", "fit_alignment_scaling"]` : float64 (genes,)
        Likelihood and variance of the residuals, r2 of the steady state (of all genes), and by what times of the gene
        were stretched.
    `adata.var["fit_std_u", "fit_std_s", "fit_steady_u", "fit_steady_s"]` : float64 (genes,)
        Spreads of the counts, and their upper modes.
    `adata.var["fit_pval_steady", "fit_u0", "fit_s0"]` : float64 (genes,)
        P-value of two modes, and 0 for basal counts.
    `adata.layers["fit_t", "fit_tau", "fit_tau_"]` : float64 (cells, genes)
        Time of each cell, the same since the start of transcription, and since its end.
    `adata.varm["loss"]` : float64 (genes, stages)
        The loss before and after each stage of the fit: whether it came to rest.
    `adata.uns["recover_dynamics"]` : dict
        `fit_connected_states` (True), `fit_basal_transcription` (False) and `use_raw` (False).

    Raises
    ------
    KeyError
        If a gene, a layer or the graph does not exist.
    ValueError
        If the mode or a number is not usable, a layer has negative values or values that are not finite, there is no
        neighbour graph, or there are fewer than two cells.

    Notes
    -----
    In a plan, the logarithms of the steady-state ratios can be learned (`change`), and with means computed there the
    power of the graph's weights in them. Which cells are extreme is structure. In the dynamical model the logarithms of
    the three rates can be learned; the times of the cells are structure.

    References
    ----------
    La Manno et al. (2018), RNA velocity of single cells. Bergen et al. (2020), Generalizing RNA velocity to transient
    cell states through dynamical modeling.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> sd.pp.split_counts(adata, {"spliced": 0.75, "unspliced": 0.25})  # in place of measured layers
    >>> sd.pp.pca(adata, n_comps=9)
    >>> sd.pp.neighbors(adata, n_neighbors=9)
    >>> sd.tl.velocity(adata, mode="deterministic", min_r2=-1)
    >>> adata.layers["velocity"].shape, int(adata.var["velocity_genes"].sum()) > 0
    ((150, 120), True)
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown. Available: {list(MODES)}")
    perc = [5, 95] if perc is None else perc
    upper = float(perc[-1] if isinstance(perc, Sequence) else perc)
    if not 0 <= upper <= 100:
        raise ValueError(f"perc={perc!r} must lie between 0 and 100")
    if data.n_obs < 2:
        raise ValueError(f"`adata` has {data.n_obs} cell(s); velocities need at least two")
    stochastic, dynamical = mode == "stochastic", mode == "dynamical"
    if var_names is not None and not dynamical:
        raise ValueError(f"var_names has no meaning with mode={mode!r}")
    plan = adata if isinstance(adata, Plan) else Plan(data)
    present = all(plan.has(X(layer)) for layer in ("Ms", "Mu"))
    spliced, unspliced, graph = X("spliced", counts=True), X("unspliced", counts=True), Connectivities(neighbors_key)
    if stochastic or not present:
        check_layers(plan)
    if (mode != "deterministic" or not present) and not plan.has(graph):
        raise ValueError(f"Did not find `.uns[{neighbors_key!r}]`. Run `sc.pp.neighbors` first.")
    counted = Var("highly_variable")
    raw = (spliced, unspliced, graph) if stochastic else (None, None, None)
    mask = counted if use_highly_variable and plan.has(counted) else None
    if dynamical:
        names = [var_names] if isinstance(var_names, str) else var_names
        op = ops.Dynamics(
            columns=None if names is None else genes_at(data, [str(name) for name in names]),
            least=(float(min_likelihood), float(min_r2), float(min_ratio)),
            percentile=upper,
        )
        dynamics = dynamics_step(op, vkey, (X("Ms"), X("Mu"), graph, mask), data.n_vars, _parameters(vkey, mode, perc))
        return _applied(adata, dynamics, present, neighbors_key, copy)
    step = Step(
        "velocity",
        ops.SteadyState(
            percentile=upper,
            stochastic=stochastic,
            adjusted=bool(r2_adjusted),
            least=(float(min_r2), float(min_ratio)),
        ),
        reads=(X("Ms"), X("Mu"), *raw, mask),
        writes=(
            Write(X(vkey), lambda op, result: result.velocity, np.float32),
            Write(Var(f"{vkey}_gamma"), lambda op, result: result.gamma, np.float32),
            Write(Var(f"{vkey}_qreg_ratio"), lambda op, result: result.ratio, np.float32),
            Write(Var(f"{vkey}_r2"), lambda op, result: result.r2, np.float64),
            Write(Var(f"{vkey}_genes"), lambda op, result: result.genes, bool),
            *([Write(X(f"variance_{vkey}"), lambda op, result: result.variance, np.float32)] if stochastic else []),
        ),
        message=f"computing velocities ({mode})",
        notes=_parameters(vkey, mode, perc),
        check=warn_few,
    )
    return _applied(adata, step, present, neighbors_key, copy)


def _applied(adata: AnnData | Plan, step: Step, present: bool, neighbors_key: str, copy: bool) -> AnnData | None:
    """Run or record the step, after the means over neighbours where these are missing; all is written at the end."""
    if present:
        return apply(adata, step, copy=copy)
    plan = adata if isinstance(adata, Plan) else Plan(adata)
    if not isinstance(adata, Plan):
        _warn_raw(adata)
    plan.add(moments_step(neighbors_key))
    plan.add(step)
    return None if isinstance(adata, Plan) else plan.apply(copy=copy)


def check_layers(plan: Plan) -> None:
    """Raise where spliced or unspliced counts are missing."""
    for layer in ("spliced", "unspliced"):
        if not plan.has(X(layer)):
            raise KeyError(f"{layer!r} is not in `adata.layers`. Available: {available(plan.adata.layers.keys())}")


def moments_step(neighbors_key: str) -> Step:
    """The means of spliced and unspliced counts over the neighbours."""
    return Step(
        "moments",
        ops.Moments(),
        reads=(X("spliced", counts=True), X("unspliced", counts=True), Connectivities(neighbors_key)),
        writes=(
            Write(X("Ms"), lambda op, result: result.ms, np.float32),
            Write(X("Mu"), lambda op, result: result.mu, np.float32),
        ),
        message="computing moments based on connectivities",
    )


def _parameters(vkey: str, mode: str, perc: Any) -> Any:
    stored = [float(p) for p in perc] if isinstance(perc, Sequence) else float(perc)

    def notes(op: Any, result: Any, args: Any) -> Mapping[Slot, Any]:
        return {Uns(f"{vkey}_params"): {"mode": mode, "fit_offset": False, "perc": stored}}

    return notes


def _warn_raw(data: AnnData) -> None:
    """scVelo normalises layers of integers by itself; here nobody's layers are changed unasked."""
    for layer in ("spliced", "unspliced"):
        matrix = matrix_of(data, layer)
        values = np.asarray(matrix.data if hasattr(matrix, "indptr") else matrix).ravel()[:10_000]
        if values.size and (values == np.round(values)).all():
            warn(
                f"layers[{layer!r}] holds integers, but velocity expects normalised counts: run "
                f"`sd.pp.normalize_total(adata, layer={layer!r})` first."
            )
