"""Units at the border: text to seconds, bytes and FLOP, and back. Inside there is nothing else.

    parse_bytes("80 GiB")        85899345920.0
    parse_bandwidth("400 Gb/s")  50000000000.0    small b is bits
    parse_seconds("2 us")        2e-06
    parse_flops("989 TFLOP/s")   989000000000000.0

`format_*` print four digits for people. `spell_*` print the shortest text that
parses back to the very same number; files are written with them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite

from .errors import UsageError

Seconds = float
Bytes = float
Flop = float
BytesPerSecond = float
FlopPerSecond = float

_NUMBER = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)\s*(.*?)\s*")
_LONGEST = 100  # characters of a quantity; more say nothing that a float holds
_DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}


@dataclass(frozen=True)
class _Quantity:
    """A dimension: its units by name, those it is printed in, and how mistakes are answered."""

    name: str
    example: str
    units: dict[str, Fraction]
    shown: tuple[str, ...]  # large to small
    spelled: tuple[str, ...] = ()  # further ones that files may be written in

    def parse(self, text: str) -> float:
        match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
        if match is None:
            raise self._wrong(text, "is not a number with a unit")
        number, unit = match.groups()
        if unit not in self.units:
            raise self._unknown(text, number, unit)
        try:
            value = float(Fraction(number) * self.units[unit])
        except OverflowError:
            value = float("inf")
        if not isfinite(value):
            raise self._wrong(text, "is too large")
        return value

    def format(self, value: float) -> str:
        for unit in self.shown:
            if abs(value) >= self.units[unit]:
                return f"{value / float(self.units[unit]):.4g} {unit}"
        return f"{value / float(self.units[self.shown[-1]]):.4g} {self.shown[-1]}"

    def spell(self, value: float) -> str:
        """The shortest text that parses back to `value` exactly."""
        base = next(unit for unit, scale in self.units.items() if scale == 1)
        rows = [(value / float(self.units[unit]), unit) for unit in (*self.shown, *self.spelled)]
        rows.append((value, base))
        texts = [f"{number:.15g} {unit}" for number, unit in rows] + [f"{value!r} {base}"]
        exact = [text for text in texts if "e" not in text and self.parse(text) == value]
        return min(exact, key=len, default=f"{value!r} {base}")

    def _unknown(self, text: str, number: str, unit: str) -> UsageError:
        if not unit:
            return self._wrong(text, "has no unit")
        for other in _ALL:
            if other is not self and unit in other.units:
                complaint = f"is {other.name}, not {self.name}"
                return self._wrong(text, complaint, self._meant(number, unit))
        same = [f"{number} {known}" for known in self.units if known.lower() == unit.lower()]
        return self._wrong(text, f"has an unknown unit `{unit}`", same)

    def _meant(self, number: str, unit: str) -> list[str]:
        """`450 GB` for a bandwidth was probably `450 GB/s`, `80 GB/s` of memory `80 GB`."""
        rate, amount, upper = (
            unit.removesuffix("s") + "/s",
            unit.removesuffix("/s"),
            f"{unit[:-1]}B",
        )
        return [f"{number} {other}" for other in (rate, amount, upper) if other in self.units]

    def _wrong(self, text: str, complaint: str, meant: list[str] | None = None) -> UsageError:
        instead = f"write {' or '.join(f'`{m}`' for m in meant)}" if meant else None
        return UsageError(
            f"`{text:.60}` {complaint}.",
            fix=instead or f"{self.name} is written like `{self.example}`",
        )


def _units(prefixes: dict[str, int], *names: str, per: int = 1) -> dict[str, Fraction]:
    return {p + name: Fraction(scale, per) for name in names for p, scale in prefixes.items()}


_BYTES = _Quantity(
    "a size in bytes",
    "80 GiB",
    _units(_DECIMAL | _BINARY, "B"),
    ("TiB", "GiB", "MiB", "KiB", "B"),
    ("TB", "GB", "MB"),
)
_BITS = _Quantity("a size in bits", "8 Gb", _units(_DECIMAL, "b", "bit"), ("Gb", "b"))
_BANDWIDTH = _Quantity(
    "a bandwidth",
    "450 GB/s",
    _units(_DECIMAL | _BINARY, "B/s", "Bps") | _units(_DECIMAL, "b/s", "bit/s", "bps", per=8),
    ("TB/s", "GB/s", "MB/s", "kB/s", "B/s"),
)
_SECONDS = _Quantity(
    "a time",
    "2 us",
    {
        "s": Fraction(1),
        "ms": Fraction(1, 10**3),
        "us": Fraction(1, 10**6),
        "µs": Fraction(1, 10**6),  # micro sign
        "μs": Fraction(1, 10**6),  # Greek mu
        "ns": Fraction(1, 10**9),
    },
    ("s", "ms", "us", "ns"),
)
_FLOPS = _Quantity(
    "a rate of FLOP/s",
    "989 TFLOP/s",
    _units(_DECIMAL, "FLOP/s", "FLOPS", "OP/s", "OPS"),
    ("PFLOP/s", "TFLOP/s", "GFLOP/s", "MFLOP/s", "FLOP/s"),
)
_COUNT = _Quantity("a count of FLOP", "6 PFLOP", _units(_DECIMAL, "FLOP", "FLOPs"), ("FLOP",))
_ALL = (_BYTES, _BITS, _BANDWIDTH, _SECONDS, _FLOPS, _COUNT)


def counted(number: int, thing: str) -> str:
    """`counted(1, "host")` is "1 host", `counted(2, "host")` "2 hosts"."""
    return f"{number} {thing}{'s' * (number != 1)}"


def parse_count(text: str) -> int:
    """`128`: digits alone, and no more of them than a count of anything has."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise UsageError(f"`{text:.40}` is no number.", fix="a whole number")
    return int(text)


def parse_bytes(text: str) -> Bytes:
    """`80 GiB` (2^30), `80 GB` (10^9). Bits are refused."""
    return _BYTES.parse(text)


def parse_bandwidth(text: str) -> BytesPerSecond:
    """`450 GB/s`; with a small b, bits: `400 Gb/s` and `400 Gbps` are 50 GB/s."""
    return _BANDWIDTH.parse(text)


def parse_seconds(text: str) -> Seconds:
    """`2 us`, `1.5 ms`, `30 s`."""
    return _SECONDS.parse(text)


def parse_flops(text: str) -> FlopPerSecond:
    """`989 TFLOP/s`, also `989 TFLOPS`; integer rates as `1979 TOP/s`."""
    return _FLOPS.parse(text)


def format_bytes(nbytes: Bytes) -> str:
    """`1.5 GiB`."""
    return _BYTES.format(nbytes)


def format_bandwidth(rate: BytesPerSecond) -> str:
    """`450 GB/s`."""
    return _BANDWIDTH.format(rate)


def format_seconds(seconds: Seconds) -> str:
    """`12.3 ms`."""
    return _SECONDS.format(seconds)


def format_flops(rate: FlopPerSecond) -> str:
    """`989 TFLOP/s`."""
    return _FLOPS.format(rate)


def spell_bytes(nbytes: Bytes) -> str:
    """`80 GiB`, or `85520809984 B` where no unit gives the exact number."""
    return _BYTES.spell(nbytes)


def spell_bandwidth(rate: BytesPerSecond) -> str:
    return _BANDWIDTH.spell(rate)


def spell_seconds(seconds: Seconds) -> str:
    return _SECONDS.spell(seconds)


def spell_flops(rate: FlopPerSecond) -> str:
    return _FLOPS.spell(rate)
