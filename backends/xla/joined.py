"""How jax's loops and branches join their bodies: which operands each body takes.

    scan    one body that takes everything
    while   a condition and a turn; each takes constants of its own, then the carry
    cond    a branch takes everything but the index

A while under `vmap` has a condition per example: it goes on while one of them does, and
examples that are done stay as they are. jax writes that when it lowers; here it is in the bodies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from ...ir.attrs import Attr
from . import compat


@dataclass(frozen=True, slots=True)
class JaxprBody:
    """A closed jaxpr, and the positions of the operands that are its inputs."""

    jaxpr: Any
    takes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Joined:
    bodies: tuple[JaxprBody, ...]
    attrs: tuple[tuple[str, Attr], ...] = ()


def joined(eqn: Any) -> Joined:
    """The bodies of a scan, a while or a cond."""
    return {"scan": _scan, "while": _while, "cond": _cond}[eqn.primitive.name](eqn)


def _scan(eqn: Any) -> Joined:
    params = eqn.params
    consts, carry = compat.scan_counts(params)
    attrs = (
        ("length", int(params["length"])), ("num_carry", carry), ("num_consts", consts),
        ("reverse", bool(params["reverse"])), ("unroll", int(params["unroll"])),
    )  # fmt: skip
    return Joined((JaxprBody(params["jaxpr"], tuple(range(len(eqn.invars)))),), attrs)


def _cond(eqn: Any) -> Joined:
    given = tuple(range(1, len(eqn.invars)))
    return Joined(tuple(JaxprBody(branch, given) for branch in eqn.params["branches"]))


def _while(eqn: Any) -> Joined:
    params = eqn.params
    first, second, every = params["cond_nconsts"], params["body_nconsts"], len(eqn.invars)
    consts = first + second
    attrs = (("num_carry", every - consts), ("num_consts", consts))
    carried, own = tuple(range(consts, every)), tuple(range(first))
    whether, turn = params["cond_jaxpr"], params["body_jaxpr"]
    if not whether.out_avals[0].shape:
        return Joined(
            (JaxprBody(whether, own + carried), JaxprBody(turn, tuple(range(first, every)))), attrs
        )
    avals = [var.aval for var in eqn.invars]
    any_of_them = _traced(_any(whether), [avals[i] for i in own + carried])
    each = _traced(_while_it_lasts(whether, turn, first, consts), avals)
    return Joined(
        (JaxprBody(any_of_them, own + carried), JaxprBody(each, tuple(range(every)))), attrs
    )


def _any(whether: Any) -> Callable[..., Any]:
    return lambda *given: jnp.any(jaxpr_as_fun(whether)(*given)[0])


def _while_it_lasts(whether: Any, turn: Any, first: int, consts: int) -> Callable[..., Any]:
    def body(*given: Any) -> list[Any]:
        state = given[consts:]
        [goes_on] = jaxpr_as_fun(whether)(*given[:first], *state)
        after = jaxpr_as_fun(turn)(*given[first:])
        return [_where(goes_on, new, old) for new, old in zip(after, state, strict=True)]

    return body


def _where(goes_on: Any, new: Any, old: Any) -> Any:
    """Examples are the leading dims of everything that a condition per example decides."""
    dims = range(goes_on.ndim)
    return jax.lax.select(jax.lax.broadcast_in_dim(goes_on, jnp.shape(new), dims), new, old)


def _traced(function: Callable[..., Any], avals: Sequence[Any]) -> Any:
    return jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))
