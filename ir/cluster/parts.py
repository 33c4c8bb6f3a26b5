"""What a cluster is made of: devices, groups of hosts, tiers of the fabric, a price.

Files write figures with their unit (`80 GiB`, `450 GB/s`); inside they are plain
bytes, bytes/s, FLOP/s and seconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from ..errors import ClusterError, UsageError, did_you_mean
from ..unchecked import is_list, is_mapping
from ..units import (
    BytesPerSecond,
    counted,
    format_bytes,
    parse_bandwidth,
    parse_bytes,
    parse_flops,
    parse_seconds,
    spell_bandwidth,
    spell_bytes,
    spell_flops,
    spell_seconds,
)
from . import presets
from .host_lists import host_names

DTYPES = presets.DTYPES
MOST_HOSTS, MOST_PER_HOST = (
    1_000_000,
    10_000,
)  # more are a slip of the pen, and would be listed one by one


def _read_as(parse: Callable[[str], float], example: str, zero: bool = False) -> BeforeValidator:
    """A number that files write with its unit; Python may give it in the base unit."""

    def read(value: object, info: ValidationInfo) -> float:
        if isinstance(value, str):
            number = parse(value)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(
                f"`{value}` is no quantity.", fix=f"a number with its unit: `{example}`"
            )
        elif info.context == "file" or info.mode == "json":
            raise UsageError(f"`{value}` has no unit.", fix=f"a number with its unit: `{example}`")
        else:
            number = float(value)
        if not (0 <= number < float("inf")) or (number == 0 and not zero):
            least = "zero or more" if zero else "more than zero"
            raise UsageError(f"`{value}` must be {least}.", fix=f"something like `{example}`")
        return number

    return BeforeValidator(read)


def _write_as(spell: Callable[[float], str]) -> PlainSerializer:
    return PlainSerializer(spell, return_type=str, when_used="json")


def _example(text: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "examples": [text]})


Size = Annotated[
    float, _read_as(parse_bytes, "80 GiB", zero=True), _write_as(spell_bytes), _example("2 GiB")
]
Memory = Annotated[
    float, _read_as(parse_bytes, "80 GiB"), _write_as(spell_bytes), _example("80 GiB")
]
Rate = Annotated[
    float, _read_as(parse_bandwidth, "450 GB/s"), _write_as(spell_bandwidth), _example("450 GB/s")
]
Time = Annotated[
    float, _read_as(parse_seconds, "2 us", zero=True), _write_as(spell_seconds), _example("2 us")
]
Peak = Annotated[
    float, _read_as(parse_flops, "989 TFLOP/s"), _write_as(spell_flops), _example("989 TFLOP/s")
]


class ClusterPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


class Device(ClusterPart):
    """One accelerator, as a step sees it.

    Invariants: `reserve < memory`; peaks are dense, one per dtype in the graph's names.
    """

    name: str = Field(default="", exclude=True)  # the key in `devices`
    kind: Literal["cuda", "rocm", "tpu", "cpu"]
    memory: Memory
    reserve: Size = 2 * 2.0**30  # context, communication buffers, allocator slack
    peak_flops: dict[str, Peak] = Field(min_length=1, examples=[{"bf16": "989 TFLOP/s"}])
    memory_bandwidth: Rate
    launch: Time = 5e-6  # seconds per kernel, whatever its size
    efficiency: float = Field(default=0.8, gt=0, le=1)  # share of the peak that large products get
    memory_efficiency: float = Field(
        default=1.0, gt=0, le=1
    )  # share of it that streaming kernels get
    attention_efficiency: float = Field(
        default=0.4, gt=0, le=1
    )  # share of the peak in large fused attention
    units: int | None = Field(default=None, gt=0)  # multiprocessors that share a product's tiles
    elementwise_flops: Peak | None = None  # simple f32 operations/s outside the matrix units
    source: str | None = None

    @property
    def vector_flops(self) -> float:
        """Simple operations/s; if not given, half the f32 peak, which counts an FMA as two.

        A device whose f32 peak is unknown counts as 1/16 of its fastest.
        """
        if self.elementwise_flops:
            return self.elementwise_flops
        peaks = self.peak_flops
        return (peaks["f32"] if "f32" in peaks else max(peaks.values()) / 16) / 2

    def rates_beside(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Figures that say the same of what was not measured, beside peaks that are reached in full."""
        dtype = next(d for d in ("bf16", "f16", *measured) if d in measured)
        attention = self.peak_flops.get(dtype, measured[dtype]) * self.attention_efficiency
        peaks = {
            d: peak * self.efficiency for d, peak in self.peak_flops.items() if d not in measured
        }
        return {
            **{f"peak_flops.{d}": peak for d, peak in peaks.items()},
            "attention_efficiency": min(1.0, attention / measured[dtype]),
        }

    def stream_seconds(self, nbytes: Any) -> Any:
        """Seconds in which a kernel reads and writes so many bytes, a number or an array."""
        return nbytes / (self.memory_bandwidth * self.memory_efficiency)

    @field_validator("peak_flops", mode="before")
    @classmethod
    def _per_dtype(cls, value: object) -> object:
        if not is_mapping(value):
            raise UsageError(f"`{value}` has no dtype.", fix=f"`peak_flops: {{bf16: {value}}}`")
        for dtype in value:
            if dtype not in DTYPES:
                raise UsageError(f"`{dtype}` is not a dtype.", fix=did_you_mean(str(dtype), DTYPES))
        return {name: peak for dtype, peak in value.items() for name in DTYPES[dtype]}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.reserve >= self.memory:
            raise ClusterError(
                f"a reserve of {format_bytes(self.reserve)} leaves nothing of "
                f"{format_bytes(self.memory)} of memory.",
                where="reserve",
                fix="the memory to keep free for context and communication buffers, often `2 GiB`",
            )
        for dtype, peak in self.peak_flops.items():
            if dense := _dense_of(self.name, dtype, peak):
                raise ClusterError(
                    f"{spell_flops(peak)} in {dtype} is the figure with 2:4 sparsity.",
                    where=f"peak_flops.{dtype}",
                    fix=f"{spell_flops(dense)} is the dense figure",
                )
        return self


class Group(ClusterPart):
    """Equal hosts: `hosts` of them with `per_host` devices each."""

    device: str
    hosts: int = Field(gt=0, le=MOST_HOSTS, examples=[4, "gpu[00-31]"])
    per_host: int = Field(gt=0, le=MOST_PER_HOST, examples=[8])
    names: tuple[str, ...] | None = None  # of the hosts
    host_memory: Memory | None = None
    host_link: Rate | None = None  # between one device and its host's memory

    @model_validator(mode="before")
    @classmethod
    def _named_hosts(cls, data: Any) -> Any:
        hosts = data.get("hosts") if is_mapping(data) else None
        if (isinstance(hosts, str) and not re.fullmatch("[0-9]+", hosts)) or is_list(hosts):
            names = host_names(hosts)
            return {**data, "hosts": len(names), "names": names}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.names is not None and len(self.names) != self.hosts:
            what = f"{counted(len(self.names), 'name')} for {counted(self.hosts, 'host')}."
            raise ClusterError(what, where="names", fix="one name per host, or none")
        return self


class Hosts(ClusterPart):
    """The scope of a tier that joins so many consecutive hosts: `{hosts: 4}`."""

    hosts: int = Field(gt=1)


def _scope(value: object) -> object:
    if value in ("host", "all") or isinstance(value, Hosts):
        return value
    if is_mapping(value) and list(value) == ["hosts"]:
        hosts = value["hosts"]
        if isinstance(hosts, int) and not isinstance(hosts, bool) and hosts > 1:
            return value
    raise UsageError(
        f"`{value}` is not the scope of a tier.",
        fix="`host` (the devices of one host), `{hosts: 4}` (of 4 hosts each) or `all`",
    )


def _shape(value: object) -> object:
    if isinstance(value, str):
        if not re.fullmatch(r"0*[1-9][0-9]{0,6}(x0*[1-9][0-9]{0,6}){0,7}", value.lower()):
            raise UsageError(
                f"`{value:.60}` is not a shape.", fix="sizes joined by x, like `4x4x8`"
            )
        return tuple(map(int, value.lower().split("x")))
    return value


class Tier(ClusterPart):
    """One level of the fabric: what joins the devices of a host, of some hosts, or all.

    `bandwidth` is what one device can send into the tier while it receives as much:
    over a switch or a ring of several links, all its links together; over a torus or a
    mesh (a torus that does not wrap), what a ring along one dimension gets; over `full`
    (a link per pair), all its links together, of which a group of n uses n - 1.
    """

    tier: str  # its name
    scope: Annotated[Literal["host", "all"] | Hosts, BeforeValidator(_scope)]
    kind: Literal["switch", "ring", "torus", "mesh", "full"] = "switch"
    bandwidth: Rate
    latency: Time = 5e-6  # seconds per message
    efficiency: float = Field(
        default=1.0, gt=0, le=1
    )  # share of the bandwidth that collectives get
    nvls: float | None = Field(default=None, gt=0, le=1)  # the switch reduces, at this share of it
    oversubscription: float = Field(default=1.0, ge=1)  # 2: half the bandwidth when all send
    rails: int = Field(default=1, gt=0)  # separate networks, one per device position in the host
    shape: Annotated[tuple[int, ...] | None, BeforeValidator(_shape)] = None  # of a torus or mesh
    source: str | None = None

    @property
    def name(self) -> str:
        return self.tier

    @property
    def hosts(self) -> float:
        """How many hosts it joins; infinite for `all`."""
        if isinstance(self.scope, Hosts):
            return self.scope.hosts
        return 1 if self.scope == "host" else float("inf")

    @property
    def effective_bandwidth(self) -> BytesPerSecond:
        """Bandwidth per device and direction when every device sends at once."""
        return self.bandwidth / self.oversubscription

    @property
    def achieved(self) -> BytesPerSecond:
        """What a large collective gets of it."""
        return self.effective_bandwidth * self.efficiency


class DevicePrice(ClusterPart):
    """`per_device_hour: 2.49 USD`."""

    per_device_hour: float = Field(ge=0)
    currency: str = Field(default="USD", pattern="[A-Z]{3}")
    spot: bool = False

    @model_validator(mode="before")
    @classmethod
    def _amount(cls, data: Any) -> Any:
        price = data.get("per_device_hour") if is_mapping(data) else None
        if isinstance(price, str):
            amount, currency = _money(price)
            return {**data, "per_device_hour": amount, "currency": currency}
        return data


def _dense_of(name: str, dtype: str, peak: float) -> float | None:
    """The dense figure when `peak` is the sparse one of this device (of any, if it is unknown)."""
    kind = presets.family(name)
    facts = presets.hardware()["devices"]
    tables = [facts[kind]] if kind else list(facts.values())
    given = [
        (d, parse_flops(p))
        for t in tables
        if t["kind"] in ("cuda", "rocm")
        for d, p in t["peak_flops"].items()
    ]
    dense = [p for d, p in given if dtype in DTYPES[d] and d not in ("f32", "f64")]
    if any(near(peak, p) for p in dense):
        return None
    return next((p for p in dense if near(peak, 2 * p)), None)


def near(a: float, b: float) -> bool:
    return abs(a - b) <= 0.01 * b


def _money(text: str) -> tuple[float, str]:
    number, _, currency = text.strip().partition(" ")
    try:
        return float(number), currency.strip() or "?"
    except ValueError:
        raise UsageError(
            f"`{text}` is no price.", fix="an amount and a currency, like `2.49 USD`"
        ) from None
