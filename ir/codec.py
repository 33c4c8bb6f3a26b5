"""Graphs and plans as versioned JSON, strict on reading and whole on writing.

save_plan(plan, "plan.json")     the file appears complete or not at all
load_plan("plan.json")           refuses other versions and damaged files by name
dump_graph(graph) / load_graph(text)
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import astuple
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from .attrs import from_json, to_json
from .errors import GraphError, MeshwrightError, MismatchError, PlanError
from .files import PLAN, read_object, read_text
from .fingerprint import fingerprint
from .graph import Batch, Constant, Graph, Op, Region, TensorType
from .mistakes import in_words
from .plan import PLAN_VERSION, Plan
from .plan_checks import check_plan
from .verify import verify

GRAPH_VERSION = (
    3  # 2: dimension numbers as attributes of their own; 3: attributes in words of no framework
)
CHECKSUM = "checksum"

# ---------------------------------------------------------------- plans


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan, replacing what was there only once the new file is complete.

    Raises:
        PlanError: the folder is missing or not writable.
    """
    write_whole(Path(path), sealed(plan, indent=1))


def load_plan(path: str | Path) -> Plan:
    """Read a plan.

    Raises:
        PlanError: no file, no JSON, or fields that a plan does not have.
        MismatchError: written by a meshwright with another plan format.
    """
    place = Path(path)
    return parse_plan(read_text(place, PLAN), str(place))


def parse_plan(text: str, origin: str) -> Plan:
    """`load_plan` of text; `origin` is named in errors."""
    data = read_object(text, PLAN, origin)
    version = data.get("version")
    if version != PLAN_VERSION and "strategies" in data:
        raise MismatchError(
            f"the plan has format {version!r}, this meshwright reads format {PLAN_VERSION}.",
            origin=origin,
            fix="plan again with this version",
        )
    found = unsealed(
        Plan,
        data,
        "plan",
        origin,
        f"{PLAN.fix}, as it was written; what is to be fixed is pinned in the request",
    )
    try:
        check_plan(found)
    except PlanError as error:
        raise PlanError.at(error, None, origin) from error
    return found


# ---------------------------------------------------------------- files that are not edited by hand

T = TypeVar("T", bound=BaseModel)


def sealed(found: BaseModel, indent: int | None = None) -> str:
    """As JSON, with a digest that tells whether the file was changed since."""
    data = json.loads(found.model_dump_json())
    return json.dumps({**data, CHECKSUM: _digest(data)}, indent=indent) + "\n"


def unsealed(kind: type[T], data: dict[str, Any], what: str, origin: str, fix: str) -> T:
    """What `sealed` wrote.

    Raises:
        PlanError: the first field that is wrong, or that something was changed.
    """
    fields = {k: v for k, v in data.items() if k != CHECKSUM}
    try:
        found = kind.model_validate_json(json.dumps(fields))
    except MeshwrightError as error:
        raise PlanError.at(error, None, origin) from error
    except ValidationError as error:
        wrong, where = in_words(error)
        raise PlanError(
            f"this is no {what}: {wrong}.", where=where, origin=origin, fix=fix
        ) from error
    if data.get(CHECKSUM) != _digest(fields):
        raise PlanError(
            f"the {what} was changed or damaged after it was written.", origin=origin, fix=fix
        )
    return found


def _digest(data: dict[str, Any]) -> str:
    """Of everything in a file but the digest itself."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write a file in full or not at all: beside its place first, then moved there.

    A link stays one and its target is replaced; what is no file is refused.
    """
    place = check_writable(path)
    beside = ""
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            encoding="utf-8",
            errors="backslashreplace",
            dir=place.parent,
            prefix=_hidden(place),
            delete=False,
        ) as file:
            beside = file.name
            file.write(text)
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, place)
    except OSError as error:
        if beside:
            Path(beside).unlink(missing_ok=True)
        raise _unwritable(path, _reason(error)) from error


def check_writable(path: Path) -> Path:
    """Where a file would be written; refused before hours of work end in one that cannot be.

    Raises:
        PlanError: why it cannot be written there.
    """
    try:
        place = path.resolve()
        if place.exists() and not place.is_file():
            raise _unwritable(
                path, "it is a folder" if place.is_dir() else "it is no ordinary file"
            )
        if not place.parent.is_dir():
            raise _unwritable(path, "its folder is missing or not writable")
        with tempfile.NamedTemporaryFile(dir=place.parent, prefix=_hidden(place)):
            return place
    except MeshwrightError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a ring
        raise _unwritable(path, _reason(error)) from error


def _hidden(place: Path) -> str:
    """How the file beside it is called, which grows by some characters more."""
    return f".{place.name[:40]}."


def _unwritable(path: Path, why: str) -> PlanError:
    return PlanError(f"{path!s:.200} cannot be written: {why}.", fix="a path in a writable folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


# ---------------------------------------------------------------- graphs


def dump_graph(graph: Graph) -> str:
    """A graph as JSON text with its version and fingerprint."""
    return json.dumps(
        {
            "version": GRAPH_VERSION,
            "fingerprint": fingerprint(graph),
            "types": [[value, kind.dtype, kind.shape] for value, kind in graph.types.items()],
            "inputs": graph.inputs,
            "constants": [[c.value, to_json(c.data)] for c in graph.constants],
            "ops": [_op_out(op) for op in graph.ops],
            "outputs": graph.outputs,
            "input_names": graph.input_names,
            "output_names": graph.output_names,
            "state": graph.state,
            "donated": sorted(graph.donated),
            "input_tags": graph.input_tags,
            "input_counts": graph.input_counts,
            "batch": graph.batch and [*astuple(graph.batch)],
        },
        allow_nan=False,
    )


def load_graph(text: str) -> Graph:
    """Read what `dump_graph` wrote, and verify it.

    Raises:
        GraphError: no such JSON, a broken invariant, or a content that is not
            the one its fingerprint names.
    """
    try:
        data = json.loads(text)
        if data["version"] != GRAPH_VERSION:
            what = f"the graph has format {data['version']!r}, this reads {GRAPH_VERSION}."
            raise GraphError(what, fix="capture the step again")
        graph = _graph_in(data)
        verify(graph)
        known = fingerprint(graph) == data["fingerprint"]
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        if isinstance(error, GraphError):
            raise
        raise GraphError(f"this is no graph: {type(error).__name__}: {error!s:.200}.") from error
    if not known:
        raise GraphError("the graph is not the one its fingerprint names.", fix="capture it again")
    return graph


def _graph_in(data: dict[str, Any]) -> Graph:
    return Graph(
        types={value: TensorType(dtype, tuple(shape)) for value, dtype, shape in data["types"]},
        inputs=tuple(data["inputs"]),
        ops=tuple(_op_in(op) for op in data["ops"]),
        outputs=tuple(data["outputs"]),
        constants=tuple(Constant(value, _number_in(number)) for value, number in data["constants"]),
        input_names=tuple(data["input_names"]),
        output_names=tuple(data["output_names"]),
        state=tuple((a, b) for a, b in data["state"]),
        donated=frozenset(data["donated"]),
        input_tags=tuple(data["input_tags"]),
        input_counts=tuple(data["input_counts"]),
        batch=_batch_in(data.get("batch")),
    )


def _batch_in(data: Any) -> Batch | None:
    if data is None:
        return None
    dims, evidence, doubt, *statistics = data
    return Batch(
        tuple((int(position), int(dim)) for position, dim in dims),
        str(evidence),
        str(doubt),
        *statistics,
    )


def _op_out(op: Op) -> dict[str, Any]:
    """Fields at their defaults are left out."""
    found: dict[str, Any] = {"kind": op.kind, "in": op.inputs, "out": op.outputs}
    if op.attrs:
        found["attrs"] = {name: to_json(value) for name, value in op.attrs}
    if op.regions:
        found["regions"] = [
            {"in": r.inputs, "ops": [_op_out(inner) for inner in r.ops], "out": r.outputs}
            for r in op.regions
        ]
    if op.where:
        found["where"] = op.where
    if op.tag:
        found["tag"], found["count"] = op.tag, op.count
    return found


def _op_in(data: dict[str, Any]) -> Op:
    regions = [
        Region(tuple(r["in"]), tuple(map(_op_in, r["ops"])), tuple(r["out"]))
        for r in data.get("regions", ())
    ]
    return Op(
        kind=data["kind"],
        inputs=tuple(data["in"]),
        outputs=tuple(data["out"]),
        attrs=tuple((name, from_json(value)) for name, value in data.get("attrs", {}).items()),
        regions=tuple(regions),
        where=data.get("where", ""),
        tag=data.get("tag", ""),
        count=data.get("count", 1),
    )


def _number_in(data: Any) -> bool | int | float | str:
    found = from_json(data)
    if found is None or isinstance(found, tuple):
        raise ValueError(f"{data} is no constant")
    return float(found) if isinstance(found, float) else found
