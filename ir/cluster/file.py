"""Cluster files: reading YAML with line numbers, and mistakes told in the user's terms."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import ClusterError, MeshwrightError, did_you_mean
from ..files import LARGEST, FileKind, is_file, read_text
from ..unchecked import is_dict, is_mapping, is_sequence
from . import presets
from .parts import Device, DevicePrice, Group, Tier

PARTS: dict[str, type[BaseModel]] = {
    "devices": Device,
    "groups": Group,
    "fabric": Tier,
    "price": DevicePrice,
}


FILE = FileKind("cluster file", 256 * 1024, "a YAML file; docs/cluster.md shows one", ClusterError)
DEEPEST = 20  # levels of mappings and lists


class _Loader(yaml.SafeLoader):
    """Plain YAML: no aliases, which can stand for any amount of text; not nested without end; no endless numbers."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.Event = cast(Any, self).peek_event()  # without a type, as construct_document is
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases (`*name`) are not read", problem_mark=event.start_mark
            )
        if self.depth >= DEEPEST:
            what = f"more than {DEEPEST} levels of lists and mappings"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = super().construct_yaml_int(node) if len(node.value) <= 40 else LARGEST + 1
        if abs(number) > LARGEST:
            what = f"`{node.value:.20}` and so on is no number of anything"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def is_path(text: str) -> bool:
    return text.endswith((".yaml", ".yml", ".json", ".toml")) or "/" in text or is_file(text)


def read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Content of a file, and the line of each dotted path in it."""
    if not is_file(path) and not os.path.lexists(path):
        raise _no_file(path)
    text = read_text(path, FILE)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines = dict(_lines(node, "", str(path)))
        data = cast(Any, loader).construct_document(node) if node else None
    except yaml.YAMLError as error:
        raise _not_yaml(path, error) from None
    except ClusterError:
        raise
    except ValueError as error:  # a date that is none, a number of thousands of digits
        raise ClusterError(
            f"`{path}` holds what is no value: {error}.", fix="docs/cluster.md shows a file"
        ) from None
    if not is_dict(data):
        what = f"`{path}` holds no cluster: a mapping with `devices`, `groups` and `fabric`."
        raise ClusterError(what, fix="docs/cluster.md shows a file")
    return data, lines


def _no_file(path: Path) -> ClusterError:
    beside = islice(path.parent.glob("*.y*ml"), 1000) if os.path.isdir(path.parent) else ()
    near = did_you_mean(path.name, sorted(p.name for p in beside))
    fix = near if near.startswith("`") else f"a shorthand such as `{presets.EXAMPLES[1]}`"
    return ClusterError(f"there is no file `{path!s:.200}`.", fix=fix)


def _not_yaml(path: Path, error: yaml.YAMLError) -> ClusterError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    bracket = "'['" in problem or "']'" in problem
    return ClusterError(
        f"`{path}` is not YAML: {problem}.",
        where=f"line {mark.line + 1}, column {mark.column + 1}" if mark else None,
        fix='quotes around a pattern of hosts: `"gpu[00-31]"`'
        if bracket
        else "docs/cluster.md shows a file",
    )


def _lines(node: yaml.Node | None, path: str, file: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                what = f"`{name}` is given twice, on lines {seen[name]} and {line}."
                raise ClusterError(
                    what, where=path or None, origin=f"cluster spec {file}", fix="keep one of them"
                )
            seen[name] = line
            yield f"{path}{name}", line
            yield from _lines(value, f"{path}{name}.", file)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            plain = (
                {k.value: v.value for k, v in item.value}
                if isinstance(item, yaml.MappingNode)
                else {}
            )
            name = _item(path.removesuffix("."), index, plain)
            yield f"{path}{name}", item.start_mark.line + 1
            yield from _lines(item, f"{path}{name}.", file)


def _item(parent: str, index: int, fields: object) -> str:
    """How a list's item is called in a path: tiers by name, all else by number."""
    if parent == "fabric" and is_mapping(fields):
        return str(fields.get("tier") or fields.get("preset") or index)
    return str(index)


# ---------------------------------------------------------------- messages


def translate(
    error: ValidationError,
    data: Any,
    lines: Mapping[str, int],
    origin: str,
    whole: type[BaseModel],
) -> ClusterError:
    """The first mistake that pydantic found, in the house form; misspelled keys before missing ones."""
    found = [
        e for e in error.errors(include_url=False) if e["type"] != "too_short" or not e["input"]
    ]
    first = min(found, key=lambda each: each["type"] != "extra_forbidden")
    made = first.get("ctx", {}).get("error")
    path = _path_of(first["loc"], data)
    if isinstance(made, MeshwrightError):
        path = ".".join(filter(None, (path, made.where)))
    else:
        made = _reworded(first, path, whole)
        path = path.rpartition(".")[0] if first["type"] == "missing" else path
    line = next((lines[p] for p in _parents(path) if p in lines), None)
    where = ", ".join([f"`{path}`"] * bool(path) + [f"line {line}"] * bool(line))
    more = len({e["loc"] for e in found}) - 1
    fixed = ClusterError(
        made.what, fix=made.fix and made.fix + (f"; {more} more after this" if more else "")
    )
    return ClusterError.at(fixed, where or None, made.origin or origin)


def _reworded(first: Any, path: str, whole: type[BaseModel]) -> ClusterError:
    loc, kind, given = first["loc"], first["type"], first["input"]
    key = str(loc[-1]) if loc else "cluster"
    model = PARTS.get(str(loc[0]), whole) if len(loc) > 1 else whole
    example = model.model_json_schema()["properties"].get(key, {}).get("examples", [None])[0]
    like = f"`{key}: {example}`" if example is not None else "docs/cluster.md shows a file"
    if kind == "extra_forbidden":
        fields = [f.alias or n for n, f in model.model_fields.items() if not f.exclude]
        fields += ["preset"] if model in (Device, Tier) else []
        return ClusterError(
            f"`{key}` is not a field of a {model.__name__.lower()}.", fix=did_you_mean(key, fields)
        )
    if kind == "missing":
        return ClusterError(
            f"`{key}` is missing.", fix=f"add {like}" if example is not None else like
        )
    if kind == "literal_error":
        options = first["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return ClusterError(
            f"`{given}` is not a {key} that we know.", fix=did_you_mean(str(given), options)
        )
    message = (
        first["msg"]
        .replace("Input should", "it should")
        .replace("Field required", "it is required")
    )
    return ClusterError(f"`{key}` is `{given}`; {message}.", fix=like)


def _path_of(loc: tuple[Any, ...], data: Any) -> str:
    names: list[str] = []
    for part in loc:
        data = data[part] if _holds(data, part) else None
        names.append(_item(".".join(names), part, data) if isinstance(part, int) else str(part))
    return ".".join(names)


def _holds(data: Any, part: Any) -> bool:
    if is_sequence(data):
        return isinstance(part, int) and part < len(data)
    return is_mapping(data) and part in data


def _parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
