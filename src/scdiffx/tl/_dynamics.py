"""What the dynamical model writes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scdiffx import ops
from scdiffx._log import warn
from scdiffx._slots import Slot, Uns, Var, Varm, X
from scdiffx._steps import Step, Write

_FEW_GENES = 10
_Of = Callable[[Any, Any], Any]


def dynamics_step(op: ops.Dynamics, vkey: str, reads: tuple[Slot | None, ...], n_vars: int, notes: Any) -> Step:
    """The step of the dynamical model, with scVelo's keys; genes that are not fitted are nan."""

    def full(of: _Of) -> _Of:
        def extract(op: Any, result: Any) -> Any:
            # Results of a computation in float64 are taken from it outside of its scope.
            with jax.enable_x64(True) if op.fit.t.dtype == np.float64 else contextlib.nullcontext():
                part = jnp.asarray(of(op, result))
                return jnp.full((*part.shape[:-1], n_vars), jnp.nan, part.dtype).at[..., op.fit.columns].set(part)

        return extract

    by_gene: dict[str, _Of] = {
        "alpha": lambda op, _: op.fit.rates.alpha,
        "beta": lambda op, _: op.fit.rates.beta / op.fit.rates.scaling,
        "gamma": lambda op, _: op.fit.rates.gamma,
        "t_": lambda op, _: op.fit.rates.switch,
        "scaling": lambda op, _: op.fit.rates.scaling,
        "u0": lambda op, _: jnp.zeros_like(op.fit.likelihood),
        "s0": lambda op, _: jnp.zeros_like(op.fit.likelihood),
        "alignment_scaling": lambda op, _: op.fit.alignment,
        **{name: _field(name) for name in ("std_u", "std_s", "likelihood", "pval_steady", "steady_u", "steady_s")},
        "variance": _field("variance"),
    }
    layers: dict[str, _Of] = {
        vkey: lambda _, result: result.velocity,
        f"{vkey}_u": lambda _, result: result.velocity_u,
        "fit_t": _field("t"),
        "fit_tau": _field("tau"),
        "fit_tau_": _field("tau_off"),
    }

    def noted(op: Any, result: Any, args: Any) -> Mapping[Slot, Any]:
        recovered = {"fit_connected_states": True, "fit_basal_transcription": False, "use_raw": False}
        return {**notes(op, result, args), Uns("recover_dynamics"): recovered}

    return Step(
        "velocity",
        op,
        reads=reads,
        writes=(
            *(Write(X(key), full(of), np.float64) for key, of in layers.items()),
            *(Write(Var(f"fit_{key}"), full(of), np.float64) for key, of in by_gene.items()),
            Write(Var("fit_r2"), lambda op, _: op.fit.r2, np.float64),
            Write(Var(f"{vkey}_genes"), lambda _, result: result.genes, bool),
            Write(Varm("loss"), lambda op, result: full(_field("losses"))(op, result).T, np.float64),
        ),
        message="recovering dynamics and computing velocities (dynamical)",
        notes=noted,
        check=warn_few,
        # As scVelo: in single precision ties are broken the other way in one of fifty genes.
        precise=True,
    )


def _field(name: str) -> _Of:
    return lambda op, _: getattr(op.fit, name)


def warn_few(op: Any, result: Any) -> None:
    found = int(np.asarray(result.genes).sum())
    if found < _FEW_GENES:
        warn(f"Only {found} genes are selected as velocity genes. Consider a lower `min_r2`.")
