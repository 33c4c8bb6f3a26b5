"""Units at the border: text to seconds, bytes and FLOP, and back. Inside there is nothing else.

    parse_bytes("80 GiB")        85899345920.0
    parse_bandwidth("400 Gb/s")  50000000000.0    small b is bits
    parse_seconds("2 us")        2e-06
"""

from __future__ import annotations

import re

from .errors import UsageError

_PREFIX = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_NUMBER = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(\S*)\s*$")


def parse_bytes(text: str) -> float:
    """`80 GiB`, `80 GB`, `512 MiB`; small b (bits) is refused."""
    number, unit = _split(text, "a memory size", "80 GiB")
    match = re.fullmatch(r"([kKMGTP]i?)?B", unit)
    if not match:
        raise _wrong(text, "a memory size", "80 GiB")
    return number * _scale(match[1])


def parse_bandwidth(text: str) -> float:
    """`450 GB/s`, `400 Gb/s`, `400 Gbps` (the last two are 50 GB/s)."""
    number, unit = _split(text, "a bandwidth", "450 GB/s or 400 Gb/s")
    match = re.fullmatch(r"([kKMGTP]i?)?(B/s|b/s|bps|bit/s)", unit)
    if not match:
        raise _wrong(text, "a bandwidth", "450 GB/s or 400 Gb/s")
    return number * _scale(match[1]) / (1 if match[2] == "B/s" else 8)


def parse_seconds(text: str) -> float:
    """`2 us`, `1.5 ms`, `30 s`."""
    number, unit = _split(text, "a time", "2 us")
    if unit not in _SECONDS:
        raise _wrong(text, "a time", "2 us")
    return number * _SECONDS[unit]


def parse_flops(text: str) -> float:
    """`989 TFLOP/s`, `989 TFLOPS`."""
    number, unit = _split(text, "a compute rate", "989 TFLOP/s")
    match = re.fullmatch(r"([kKMGTP])?(FLOP/s|FLOPS|FLOPs|flop/s|flops)", unit)
    if not match:
        raise _wrong(text, "a compute rate", "989 TFLOP/s")
    return number * _scale(match[1])


def _split(text: str, kind: str, example: str) -> tuple[float, str]:
    match = _NUMBER.match(text)
    if not match or not match[2]:
        raise _wrong(text, kind, example)
    return float(match[1]), match[2]


def _scale(prefix: str | None) -> float:
    return _BINARY.get(prefix or "", _PREFIX.get(prefix or "", 1.0))


def _wrong(text: str, kind: str, example: str) -> UsageError:
    return UsageError(f"{text!r} is not {kind} with its unit.", fix=f"a number and a unit, such as {example}")


def format_bytes(nbytes: float) -> str:
    """`1.50 GiB`."""
    for unit, size in (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """`12.3 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def format_flops(rate: float) -> str:
    """`989 TFLOP/s`."""
    return _decimal(rate) + "FLOP/s"


def format_bandwidth(rate: float) -> str:
    """`450 GB/s`."""
    return _decimal(rate) + "B/s"


def _decimal(rate: float) -> str:
    for prefix in "PTGMk":
        if abs(rate) >= _PREFIX[prefix]:
            return f"{rate / _PREFIX[prefix]:.4g} {prefix}"
    return f"{rate:.4g} "
