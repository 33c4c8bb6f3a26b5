"""What a frontier must be to make sense by itself: a checksum tells only that it is as it was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isfinite
from typing import Any, NoReturn, Protocol

from ...ir.errors import PlanError
from ..request import Request

PER_UNIT, PER_KIND = ("kinds", "cuts"), ("small_cuts", "names", "alike", "work")
PASSES = ("forward", "backward", "weight", "once")


class FrontierParts(Protocol):
    """The fields of a frontier that can contradict each other."""

    @property
    def request(self) -> Mapping[str, Any]: ...
    @property
    def units(self) -> Mapping[str, Sequence[Any]]: ...
    @property
    def points(self) -> Sequence[Any]: ...
    @property
    def work(self) -> Mapping[Any, Sequence[Any]]: ...


def check_frontier(frontier: FrontierParts) -> None:
    """Refuse a frontier that contradicts itself.

    Raises:
        PlanError: the first contradiction, with values and the field.
    """
    try:
        Request(**frontier.request)  # type: ignore[arg-type]
    except TypeError as error:
        _refuse("request", str(error).replace("Request.__init__() ", ""))
    _check_units(frontier.units)
    kinds = range(len(frontier.units["names"]))
    for number, point in enumerate(frontier.points):
        _check_point(f"points.{number}", point)
    for policy, rows in frontier.work.items():
        for name, kind, *seconds in rows:
            if name not in PASSES or (kind is not None and kind not in kinds):
                _refuse(f"work.{policy}", f"`{name:.40}` of kind {kind} is no work of these units")
            _amounts(f"work.{policy}", seconds)


def _check_units(units: Mapping[str, Sequence[Any]]) -> None:
    if {*units} != {*PER_UNIT, *PER_KIND}:
        _refuse(
            "units",
            f"their fields are {', '.join(units)[:200]}, not {', '.join((*PER_UNIT, *PER_KIND))}",
        )
    for names in (PER_UNIT, PER_KIND):
        if len({len(units[name]) for name in names}) > 1 or not units[names[0]]:
            _refuse(
                "units",
                f"{' and '.join(f'{len(units[name])} {name}' for name in names)} do not go together",
            )
    for name in (*PER_UNIT, "small_cuts", "alike"):
        if not all(isinstance(each, int) for each in units[name]):
            _refuse(f"units.{name}", "there is one that is no whole number")
    kinds, many = units["kinds"], len(units["names"])
    if {*kinds} - {*range(many)}:
        _refuse("units.kinds", f"a unit of a kind that is none of {many}")
    for name in ("cuts", "small_cuts"):
        if units[name][0] < 0 or any(cut >= after for cut, after in pairwise(units[name])):
            _refuse(
                f"units.{name}",
                f"units that begin at ops {', '.join(map(str, units[name][:40]))} overlap",
            )
    if not all(isinstance(name, str) for name in units["names"]):
        _refuse("units.names", "there is one that is no text")
    _amounts("units.work", units["work"])


def _check_point(where: str, point: Any) -> None:
    if point.microbatches < 1:
        _refuse(where, f"{point.microbatches} microbatches cannot be")
    if not 1 <= len(point.mesh) <= 3 or min(point.mesh) < 1:
        _refuse(where, f"a mesh of {'x'.join(map(str, point.mesh[:9]))} cannot be")
    _amounts(where, (point.passes, point.once, point.peak, point.left))
    if point.passes <= 0:
        _refuse(where, f"{point.passes} s for the passes of a microbatch cannot be")
    for tag, codes in point.strategies.items():
        if len(codes) != len(point.mesh):
            _refuse(
                f"{where}.strategies.{tag}",
                f"{len(codes)} codes for a mesh of {len(point.mesh)} axes",
            )


def _amounts(where: str, amounts: Sequence[Any]) -> None:
    for amount in amounts:
        if isinstance(amount, str) or not (isfinite(amount) and amount >= 0):
            _refuse(where, f"{amount!s:.40} is no amount")


def _refuse(where: str, what: str) -> NoReturn:
    fix = "`meshwright plan --frontier` again"
    raise PlanError(f"the frontier contradicts itself: {what}.", where=where[:200], fix=fix)
