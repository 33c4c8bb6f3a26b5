"""A cluster as plain data, as a file holds it: written without what says nothing, changed by dotted paths."""

from __future__ import annotations

from typing import Any

from ..unchecked import is_dict, is_list, is_sequence


def tidy(data: dict[str, Any]) -> dict[str, Any]:
    """Without fields that say nothing, and amounts with their units."""
    if price := data.get("price"):
        price["per_device_hour"] = f"{price['per_device_hour']} {price.pop('currency')}"
    for group in data.get("groups", ()):
        group.update({k: list(v) for k, v in group.items() if is_sequence(v)})
    return _without_none(data)


def _without_none(data: Any) -> Any:
    if is_dict(data):
        return {k: _without_none(v) for k, v in data.items() if v is not None}
    return [_without_none(item) for item in data] if is_list(data) else data


def assign(data: Any, path: str, value: Any) -> None:
    """Set the figure at a full path, such as `devices.h100.memory` or `fabric.nvlink.latency`."""
    top, *rest = path.split(".")
    node = data.setdefault(top, {})
    if top == "price":
        node[rest[0]] = value
        return
    name, field, *dtype = rest if top != "fabric" else [".".join(rest[:-1]), rest[-1]]
    if top == "fabric":
        node = next(tier for tier in node if tier["tier"] == name)
    else:
        node = node[int(name)] if is_list(node) else node[name]
    if dtype:
        node[field][dtype[0]] = value
    else:
        node[field] = value
    if field == "hosts":
        node.pop("names", None)
