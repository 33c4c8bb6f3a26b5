"""Real text as batches of bytes: a file of the user, or this project's own sources."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .ir.errors import UsageError
from .ir.files import is_file

KINDS = ("*.py", "*.md", "*.yaml", "*.toml")
FOLDERS = ("ir", "planner", "backends", "models", "src", "tests", "docs", "benchmarks", "notebooks")


@dataclass(frozen=True)
class Text:
    """`data` are the bytes; `source` says where they come from."""

    data: np.ndarray
    source: str

    def batches(self, batch: int, seq: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Random windows: tokens[B, T] and the bytes that follow them, endlessly.

        Raises:
            UsageError: the text is shorter than one window.
        """
        if len(self.data) < seq + 2:
            raise UsageError(
                f"{self.source} has {len(self.data)} bytes, a window needs {seq + 2}.",
                fix="a longer text",
            )
        rng = np.random.default_rng(seed)
        while True:
            start = rng.integers(0, len(self.data) - seq, (batch, 1))
            window = self.data[start + np.arange(seq + 1)].astype(np.int32)
            yield {"tokens": window[:, :-1], "targets": window[:, 1:]}


def read_text(path: Path | None) -> Text:
    """The bytes of a file, or of all sources and docs of this project.

    Raises:
        UsageError: the file cannot be read.
    """
    if path is None:
        return own_sources()
    if not is_file(path) or path.stat().st_size == 0:
        raise UsageError(
            f"{path!s:.200} cannot be read.",
            where="--data",
            fix="an ordinary file that is not empty",
        )
    try:
        return Text(np.memmap(path, np.uint8, "r"), str(path))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}.", where="--data", fix="a readable file"
        ) from error


def own_sources() -> Text:
    """From the checkout where there is one, else from the installed package."""
    package = Path(__file__).resolve().parent
    root = package.parents[1]
    places = [root / name for name in FOLDERS] if (root / "pyproject.toml").is_file() else [package]
    files = sorted(
        {
            file.resolve()
            for place in places
            for kind in KINDS
            for file in place.rglob(kind)
            if "__pycache__" not in file.parts
        }
    )
    data = b"\n".join(file.read_bytes() for file in files)
    return Text(np.frombuffer(data, np.uint8), f"{len(files)} source files of meshwright")
