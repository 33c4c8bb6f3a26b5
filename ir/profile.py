"""A profile: what `meshwright calibrate` measured on one machine, and what was fitted to it.

A cluster file names it (`profile: lab.json`); its figures then replace presets, marked as
measured, but not what the file declares itself. The file carries a checksum of its content.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ClusterError
from .files import MIB, FileKind, is_file, read_object, read_text
from .mistakes import in_words

SCHEMA = "meshwright/profile/v1"
FILE = FileKind("profile", 64 * MIB, "meshwright calibrate -o FILE", ClusterError)


MeasuredKind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ProductPoint(_Part):
    """A product [m, k] x [k, n] on every device at once."""

    dtype: str
    m: int = Field(gt=0)
    n: int = Field(gt=0)
    k: int = Field(gt=0)
    seconds: float = Field(gt=0)


class CopyPoint(_Part):
    """An elementwise kernel that reads and writes so many bytes together."""

    nbytes: float = Field(gt=0)
    seconds: float = Field(gt=0)


class CollectivePoint(_Part):
    """A collective over groups of `size` devices, `stride` apart; bytes of the larger local side."""

    kind: MeasuredKind
    size: int = Field(gt=1)
    stride: int = Field(gt=0)
    nbytes: float = Field(gt=0)
    seconds: float = Field(gt=0)


class MeasuredLine(_Part):
    """Seconds of a collective over one group layout: `fixed + slope * bytes`."""

    kind: str
    size: int = Field(gt=1)
    stride: int = Field(gt=0)
    fixed: float = Field(ge=0)
    slope: float = Field(ge=0)


class Fit(_Part):
    """How well one family of points is described: relative errors on points left out of the fit."""

    family: str
    points: int
    held_out: int
    median: float
    worst: float


class Profile(_Part):
    """Points and figures of one machine.

    `peak_flops` by dtype, `memory_bandwidth`, `launch` (seconds per kernel) and
    `elementwise_flops` describe one device while all are busy.
    """

    schema_version: str = Field(default=SCHEMA, alias="schema")
    device: str  # a preset's name: "cpu", "h100"
    described: str  # what the machine calls it
    count: int = Field(gt=0)
    made_with: str
    peak_flops: dict[str, float]
    memory_bandwidth: float = Field(gt=0)
    elementwise_flops: float = Field(gt=0)
    launch: float = Field(ge=0)
    lines: tuple[MeasuredLine, ...]
    fits: tuple[Fit, ...]
    products: tuple[ProductPoint, ...]
    copies: tuple[CopyPoint, ...]
    collectives: tuple[CollectivePoint, ...]

    def dump(self) -> str:
        """The text of a profile file, with its checksum."""
        data = self.model_dump(mode="json", by_alias=True)
        return json.dumps({**data, "checksum": _digest(data)}, indent=1) + "\n"


def load_profile(path: str | Path) -> Profile:
    """Read a profile.

    Raises:
        ClusterError: no such file, another version, damaged or changed by hand.
    """
    if not is_file(path) and not os.path.lexists(path):
        raise ClusterError(f"there is no profile `{path}`.", fix=FILE.fix)
    data = read_object(read_text(path, FILE), FILE, str(path))
    if data.get("schema") != SCHEMA:
        found = str(data.get("schema"))
        raise ClusterError(
            f"`{path}` is no profile of version {SCHEMA}: `{found:.60}`.",
            fix="meshwright calibrate again",
        )
    stated = data.pop("checksum", None)
    if stated != _digest(data):
        raise ClusterError(
            f"`{path}` was changed since it was measured: its checksum does not fit.",
            fix="meshwright calibrate again",
        )
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        wrong, where = in_words(error)
        raise ClusterError(
            f"`{path}` is no profile: {wrong}.", where=where, fix="meshwright calibrate again"
        ) from None


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
