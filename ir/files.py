"""Files of users, read in bounded time and memory: ordinary files alone, of a size that such a file has.

read_bytes(path, PLAN)   the content, at most so many bytes; a folder, a pipe or a device is refused unopened
read_text(path, PLAN)    as UTF-8
read_object(text, ...)   a JSON object: no name twice, no NaN, no number that no float or count holds
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from .errors import MeshwrightError, PlanError, UsageError
from .unchecked import is_dict
from .units import format_bytes

MIB = 2**20
LARGEST = 2**63 - 1  # a whole number; no count, size or seed is larger
MOST_UNPACKED = 200  # times the packed size: 30 is usual for JSON


@dataclass(frozen=True)
class FileKind:
    """What a file is, the most that one holds, what to try instead, and the class of errors about it."""

    name: str
    most: int
    fix: str
    error: type[MeshwrightError] = UsageError


PLAN = FileKind("plan", 64 * MIB, "a file from `meshwright plan -o`", PlanError)


def is_file(path: str | Path) -> bool:
    """Whether it is an ordinary file; what can be no path at all is none."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def read_bytes(path: str | Path, kind: FileKind) -> bytes:
    """The content of an ordinary file.

    Raises:
        MeshwrightError: of the kind's class: what it is instead, or why it cannot be read.
    """
    try:
        _check(os.stat(path).st_mode, path, kind)
        number = os.open(
            path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        )  # a pipe without a writer would block
        with os.fdopen(number, "rb") as file:
            found = os.fstat(number)
            _check(found.st_mode, path, kind)
            data = file.read(kind.most + 1) if found.st_size <= kind.most else b""
    except (OSError, ValueError) as error:
        if isinstance(error, MeshwrightError):
            raise
        raise _refused(path, kind, str(getattr(error, "strerror", None) or error)) from error
    if max(len(data), found.st_size) > kind.most:
        raise _refused(path, kind, f"it has more than {format_bytes(kind.most)}")
    return data


def read_text(path: str | Path, kind: FileKind) -> str:
    """The content of an ordinary file of text in UTF-8.

    Raises:
        MeshwrightError: as `read_bytes`, or what is no text in it.
    """
    try:
        text = read_bytes(path, kind).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is no UTF-8 ({error.reason})"
        raise _refused(path, kind, why) from error
    if (at := text.find("\0")) >= 0:
        raise _refused(path, kind, f"it is no text: character {at} is NUL")
    return text


def unpacked(data: bytes, path: str | Path, kind: FileKind) -> bytes:
    """What gzip packed, or the data itself where it did not.

    Raises:
        MeshwrightError: damaged, or more than such a file holds.
    """
    if data[:2] != b"\x1f\x8b":
        return data
    most = min(kind.most, MOST_UNPACKED * len(data))
    try:
        unpacker = zlib.decompressobj(wbits=31)
        found = unpacker.decompress(data, most + 1)
    except zlib.error as error:
        raise _refused(path, kind, f"it is damaged: {error}") from error
    if len(found) > most or unpacker.unconsumed_tail:
        raise _refused(path, kind, f"it unpacks to more than {format_bytes(most)}")
    if not unpacker.eof:
        raise _refused(path, kind, "it is damaged: it ends early")
    return found


def read_object(text: str, kind: FileKind, origin: str) -> dict[str, Any]:
    """The fields of a JSON object.

    Raises:
        MeshwrightError: of the class given: no JSON, or what JSON leaves open (a name twice, NaN, endless numbers).
    """
    try:
        data = json.loads(
            text,
            object_pairs_hook=_once,
            parse_constant=_no_constant,
            parse_int=_whole,
            parse_float=_real,
        )
    except (ValueError, RecursionError) as wrong:
        raise kind.error(f"this is no JSON: {wrong}.", origin=origin, fix=kind.fix) from wrong
    if not is_dict(data):
        raise kind.error(f"this is no {kind.name}.", origin=origin, fix=kind.fix)
    return data


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = [*pairs]
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"`{name:.60}` is given twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _whole(text: str) -> int:
    if len(text) > 20 or abs(number := int(text)) > LARGEST:
        raise ValueError(f"{text:.20} and so on is no number of anything")
    return number


def _real(text: str) -> float:
    if not isfinite(number := float(text)):
        raise ValueError(f"{text:.20} is no finite number")
    return number


def _check(mode: int, path: str | Path, kind: FileKind) -> None:
    if not stat.S_ISREG(mode):
        raise _refused(path, kind, f"it is {_name_of(mode)}, no ordinary file")


def _name_of(mode: int) -> str:
    named = (
        (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
    )  # fmt: skip
    return next((name for asks, name in named if asks(mode)), "something else")


def _refused(path: str | Path, kind: FileKind, why: str) -> MeshwrightError:
    return kind.error(f"the {kind.name} {_short(path)} cannot be read: {why}.", fix=kind.fix)


def _short(path: str | Path) -> str:
    text = str(path)
    return text if len(text) <= 120 else f"{text[:60]}...{text[-30:]}"
