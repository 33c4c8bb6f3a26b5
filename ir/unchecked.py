"""Data of files and users before anything in it is checked: mappings and lists, told from all else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard


def is_mapping(data: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(data, Mapping)


def is_dict(data: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(data, dict)


def is_list(data: object) -> TypeGuard[list[Any]]:
    return isinstance(data, list)


def is_sequence(data: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(data, list | tuple)
