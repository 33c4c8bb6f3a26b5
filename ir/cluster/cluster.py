"""Clusters: what there is to run on. Shorthand, presets, YAML files, this process.

    Cluster.parse("4xh100x8@ib400")    4 hosts of 8 H100 each, 400 Gb/s per device between hosts
    Cluster.load("lab.yaml")           a file, see docs/cluster.md
    Cluster.local()                    the JAX devices of this process

Inside, all figures are bytes, seconds, FLOP/s and bytes/s per device and direction.
`provenance` says of each field whether it was declared, preset, detected or measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from ..errors import ClusterError, MeshwrightError, UsageError, did_you_mean
from ..profile import MeasuredLine, Profile, load_profile
from ..unchecked import is_dict, is_mapping
from ..units import Bytes, counted, format_bandwidth, format_bytes, format_flops, format_seconds
from . import presets
from .checks import check_fabric
from .data import assign, tidy
from .file import is_path, read, translate
from .parts import DTYPES, ClusterPart, Device, DevicePrice, Group, Tier

__all__ = ["Cluster", "Device", "DevicePrice", "Group", "Origin", "Tier"]

SCHEMA = presets.SCHEMA
Origin = Literal["declared", "preset", "detected", "measured"]


class Cluster(ClusterPart):
    """Devices, hosts and fabric (closest tier first), with the origin of every figure.

    `cluster.provenance["fabric.ib400.bandwidth"]` is "preset". Ranks count through the
    groups in order, host by host. Invariants: a tier farther out joins more hosts and is
    no faster; the last one joins everything; names are unique.
    """

    schema_version: Literal["meshwright/cluster/v1"] = Field(default=SCHEMA, alias="schema")
    name: str = "cluster"
    devices: dict[str, Device] = Field(min_length=1)
    groups: tuple[Group, ...] = Field(min_length=1)
    fabric: tuple[Tier, ...] = ()
    price: DevicePrice | None = None
    measured: tuple[MeasuredLine, ...] = ()  # collectives by group layout, from a profile
    provenance: dict[str, Origin] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, data: Any) -> Any:
        return presets.expand(data) if is_mapping(data) else data

    @model_validator(mode="after")
    def _check(self) -> Self:
        for index, group in enumerate(self.groups):
            if group.device not in self.devices:
                raise ClusterError(
                    f"device `{group.device}` is not declared.",
                    where=f"groups.{index}.device",
                    fix=did_you_mean(group.device, self.devices),
                )
        check_fabric(self)
        self._trace()
        return self

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler, info: Any) -> dict[str, Any]:
        data = handler(self)
        return tidy(data) if info.mode == "json" else data

    def _trace(self) -> None:
        """Complete `provenance`: a field that was given is declared, a default is preset."""
        known = dict(_fields(self))
        for path in self.provenance:
            if path not in known:
                where = f"provenance.{path}"
                raise ClusterError(
                    f"the cluster has no field `{path}`.",
                    where=where,
                    fix=did_you_mean(path, known),
                )
        found: dict[str, Origin] = {
            p: "declared" if given else "preset" for p, given in known.items()
        }
        object.__setattr__(self, "provenance", found | self.provenance)  # before anyone sees it

    # ------------------------------------------------------------ reading

    @classmethod
    def parse(cls, text: str | Path | Mapping[str, Any] | Cluster) -> Cluster:
        """A cluster from itself, a shorthand, a file's path, a file's content as a mapping, or "local"."""
        if isinstance(text, Cluster):
            return text
        if isinstance(text, Mapping):
            return cls._checked(dict(text), {}, "cluster given as a mapping")
        if text == "local":
            return cls.local()
        if isinstance(text, Path) or is_path(text):
            return cls.load(text)
        try:
            data = presets.shorthand(text)
        except MeshwrightError as error:
            raise ClusterError.at(error, "cluster shorthand", None) from None
        return cls._checked(
            data | {"provenance": presets.all_preset(data)}, {}, f"shorthand `{text}`"
        )

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a YAML (or JSON) file. Each mistake is a ClusterError that names its line."""
        data, lines = read(Path(path))
        profile = data.pop("profile", None)
        found = cls._checked(data, lines, f"cluster spec {path}", context="file")
        if profile is None:
            return found
        return found.with_profile(load_profile(Path(path).parent / str(profile)))

    @classmethod
    def local(cls, fabric: str | None = None) -> Cluster:
        """The JAX devices of this process; `fabric` says what joins its hosts if there are several."""
        return cls._checked(presets.detect(fabric), {}, "this process")

    @classmethod
    def _checked(
        cls, data: Any, lines: Mapping[str, int], origin: str, context: str | None = None
    ) -> Cluster:
        try:
            return cls.model_validate(data, context=context)
        except ValidationError as error:
            raise translate(error, data, lines, origin, cls) from None

    # ------------------------------------------------------------ asking

    @property
    def size(self) -> int:
        """Number of devices."""
        return sum(group.hosts * group.per_host for group in self.groups)

    @property
    def hosts(self) -> int:
        return sum(group.hosts for group in self.groups)

    @property
    def uniform(self) -> bool:
        """Whether all hosts have as many devices of one kind."""
        return len({(group.device, group.per_host) for group in self.groups}) == 1

    @property
    def per_host(self) -> int:
        """Devices on each host; refused when hosts differ."""
        return self._only({group.per_host for group in self.groups}, "as many devices on each host")

    @cached_property
    def device(self) -> Device:
        """The one type of device; refused when there are several."""
        return self.devices[self._only({group.device for group in self.groups}, "equal devices")]

    @property
    def memory_per_device(self) -> Bytes:
        """What a step may use of each device: memory minus reserve."""
        return self.device.memory - self.device.reserve

    def _only(self, found: set[Any], needs: str) -> Any:
        if len(found) == 1:
            return next(iter(found))
        has = " and ".join(
            f"{counted(g.hosts, 'host')} of {g.per_host} {g.device}" for g in self.groups
        )
        raise ClusterError(
            f"this needs {needs}; cluster `{self.name}` has {has}.",
            where="groups",
            fix="`--pp auto`, which cuts a step into stages for each kind, or a file that holds one group only",
        )

    def device_at(self, rank: int) -> Device:
        """The type of one device, by its rank."""
        return self.devices[self.group_at(rank).device]

    def group_at(self, rank: int) -> Group:
        """The group of one device, by its rank."""
        return self._place_of(rank)[0]

    def host_of(self, rank: int) -> int:
        """The number of the host that one device is on, by its rank."""
        return self._place_of(rank)[1]

    def _place_of(self, rank: int) -> tuple[Group, int]:
        left, hosts = rank, 0
        for group in self.groups:
            if left < group.hosts * group.per_host:
                return group, hosts + left // group.per_host
            left, hosts = left - group.hosts * group.per_host, hosts + group.hosts
        raise UsageError(f"cluster `{self.name}` has {self.size} devices, none of rank {rank}.")

    def tier_for(self, span: int) -> Tier:
        """The closest tier that joins every block of `span` consecutive ranks.

        On 2 hosts of 8: 4 and 8 -> the tier in the host; 16 -> the one between them; also
        6, since ranks 6 to 11 lie on both hosts.
        """
        if not 1 <= span <= self.size:
            raise UsageError(f"a group of {span} devices is not part of a cluster of {self.size}.")
        if not self.fabric:
            return _loopback(self.device)
        return next(tier for tier, edges in self._edges if all(edge % span == 0 for edge in edges))

    def only(self, index: int) -> Cluster:
        """The cluster that one of the groups is by itself."""
        group, tiers = self.groups[index], list[Tier]()
        for tier in self.fabric:
            tiers.append(tier)
            if tier.hosts >= group.hosts:
                break
        data = self.model_dump(mode="json", by_alias=True, exclude={"provenance", "price"})
        data |= {
            "groups": [data["groups"][index]],
            "devices": {group.device: data["devices"][group.device]},
        }
        data |= {
            "name": f"{self.name}: {group.device}",
            "fabric": data.get("fabric", [])[: len(tiers)],
        }
        if index:  # a profile is of the first group's devices
            data.pop("measured", None)
        old = {
            path.replace(f"groups.{index}.", "groups.0."): origin
            for path, origin in self.provenance.items()
        }
        return Cluster._checked(
            data | {"provenance": self._kept(data, old)}, {}, f"cluster {self.name}"
        )

    def first(self, hosts: int) -> Cluster:
        """The first so many hosts of a cluster of one group, by themselves.

        Raises:
            ClusterError: the fabric's tiers do not divide so few.
            UsageError: it has not so many, or several groups.
        """
        if not 1 <= hosts <= self.hosts or len(self.groups) > 1:
            has = f"{counted(self.hosts, 'host')} in {counted(len(self.groups), 'group')}"
            raise UsageError(f"{hosts} hosts are no part of cluster `{self.name}`: {has}.")
        data = self.model_dump(mode="json", by_alias=True, exclude={"provenance", "price"})
        wide = (
            sum(tier.hosts < hosts for tier in self.fabric) + 1
        )  # tiers up to the one that joins them all
        data["fabric"] = data.get("fabric", [])[:wide]
        if hosts > 1 and data["fabric"] and data["fabric"][-1]["scope"] != "all":
            data["fabric"][-1]["scope"] = {"hosts": hosts}
        group = data["groups"][0] | {"hosts": hosts}
        data["groups"] = [group | ({"names": group["names"][:hosts]} if group.get("names") else {})]
        data["name"] = f"{self.name}, {counted(hosts, 'host')}"
        return Cluster._checked(data | {"provenance": self._kept(data)}, {}, f"cluster {self.name}")

    def _kept(
        self, data: Mapping[str, Any], old: Mapping[str, Any] | None = None
    ) -> dict[str, Origin]:
        """Where the fields of a part of this cluster come from."""
        known = {
            path for path, _ in _fields(Cluster._checked(dict(data), {}, f"cluster {self.name}"))
        }
        return {path: origin for path, origin in (old or self.provenance).items() if path in known}

    def tier_joining(self, first: int, end: int) -> Tier:
        """The closest tier that joins ranks `first` up to, not including, `end`."""
        if not 0 <= first < end <= self.size:
            raise UsageError(
                f"ranks {first} to {end - 1} are not part of a cluster of {self.size}."
            )
        if not self.fabric:
            return _loopback(self.device)
        return next(
            tier for tier, edges in self._edges if not any(first < edge < end for edge in edges)
        )

    @cached_property
    def _edges(self) -> list[tuple[Tier, list[int]]]:
        """Per tier, the ranks at which one of its domains ends and the next begins."""
        starts = [0]
        for group in self.groups:
            first = starts[-1]
            starts += [first + group.per_host * (host + 1) for host in range(group.hosts)]
        ends = [starts[:: int(min(tier.hosts, self.hosts))] for tier in self.fabric]
        inner = [[rank for rank in ranks if 0 < rank < self.size] for ranks in ends]
        return list(zip(self.fabric, inner, strict=True))

    def fingerprint(self) -> str:
        """sha256 of what planning depends on: names of the cluster and hosts, prices and sources aside."""
        data = self.model_dump(mode="json", exclude={"provenance", "name", "price"})
        for part in (*data["devices"].values(), *data["groups"], *data["fabric"]):
            for field in ("source", "names"):
                part.pop(field, None)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """A file that `load` reads back to an equal cluster."""
        data = self.model_dump(mode="json", by_alias=True)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)

    def with_(self, path: str, value: Any, source: Origin = "declared") -> Cluster:
        """A copy with one field changed, for what-if questions.

        with_("fabric.ib400.bandwidth", "100 GB/s"); with_("hosts", 64); with_("device.memory", "96 GiB")
        """
        data = self.model_dump(mode="json", by_alias=True)
        full = _full_path(path, self)
        leaf = full.rpartition(".")[2]
        same = DTYPES[leaf] if ".peak_flops." in full else (leaf,)  # fp8 means two dtypes
        changed = [full.removesuffix(leaf) + each for each in same]
        for each in changed:
            assign(data, each, value)
        data["provenance"] = self.provenance | dict.fromkeys(changed, source)
        if leaf == "hosts":  # the old names do not fit
            data["provenance"].pop(full.removesuffix(leaf) + "names", None)
        if leaf == "per_host" or (
            self.fabric and full.startswith(f"fabric.{self.fabric[0].name}.")
        ):
            data.pop("measured", None)  # they are of the old one, and would hide the change
        return Cluster._checked(data, {}, f"override `{path}={value}`")

    def with_profile(self, profile: Profile | str | Path) -> Cluster:
        """A copy with a machine's measured figures; those that were declared stay.

        A rate is what is reached, so its share of the peak becomes 1. Where the rate or its share
        was declared both stay: either alone would count the share twice, or not at all. Collectives
        are measured on one host: groups that cross hosts keep the fabric's prices. Element types that
        were not measured, and fused attention, keep the rates that they had.

        Raises:
            ClusterError: the profile is of another device, or of another number of emulated ones.
        """
        found = profile if isinstance(profile, Profile) else load_profile(profile)
        name = self.groups[0].device
        if len(self.devices) > 1 or not self._described_by(found):
            raise ClusterError(
                f"the profile is of `{found.device}` ({found.described}), the cluster has {', '.join(self.devices)}.",
                where="profile", fix=f"meshwright calibrate on a machine with {name}",
            )  # fmt: skip
        if self.device.kind == "cpu" and found.count != self.per_host:
            raise ClusterError(
                f"the profile is of {found.count} CPU devices on one machine, the cluster has {self.per_host} on each;"
                " what each gets depends on how many share its cores.",
                where="profile", fix=f"meshwright calibrate --devices {self.per_host}",
            )  # fmt: skip
        peaks = {f"peak_flops.{dtype}": rate for dtype, rate in found.peak_flops.items()}
        together: tuple[dict[str, float], ...] = (
            {**peaks, "efficiency": 1.0},
            {"memory_bandwidth": found.memory_bandwidth, "memory_efficiency": 1.0},
            {"launch": found.launch}, {"elementwise_flops": found.elementwise_flops},
        )  # fmt: skip
        changed = self
        for figures in together:
            if not any(self._declared(f"devices.{name}", field) for field in figures):
                for field, figure in figures.items():
                    changed = changed.with_(f"devices.{name}.{field}", figure, "measured")
        if changed.device.peak_flops != self.device.peak_flops:
            for field, figure in self.device.rates_beside(found.peak_flops).items():
                path = f"devices.{name}.{field}"
                changed = changed.with_(path, figure, self.provenance.get(path, "preset"))
        data = changed.model_dump(mode="json", by_alias=True)
        inside = min(group.per_host for group in self.groups)
        data["measured"] = [
            line.model_dump() for line in found.lines if line.size * line.stride <= inside
        ]
        return Cluster._checked(data, {}, f"profile of {found.described}")

    def _declared(self, at: str, field: str) -> bool:
        """Whether a file states a figure of a device; one peak of several is enough."""
        own = f"{at}.{field.partition('.')[0]}."
        return any(
            f"{path}.".startswith(own) and origin == "declared"
            for path, origin in self.provenance.items()
        )

    def _described_by(self, profile: Profile) -> bool:
        """Whether a profile is of this type of device, whatever a file calls it."""
        name = self.groups[0].device
        return profile.device in (
            name,
            presets.family(name),
            "cpu" if self.device.kind == "cpu" else None,
        )

    def describe(self) -> str:
        """A few lines for people; marks after a figure tell its origin unless it is preset."""
        lines = [f"{self.name}: {counted(self.size, 'device')} on {counted(self.hosts, 'host')}"]
        for index, group in enumerate(self.groups):
            lines.append(
                f"  {group.hosts} × {group.per_host} {group.device}{self._mark(f'groups.{index}.hosts')}"
            )
            lines.extend(
                f"    {line}" for line in self._describe_device(self.devices[group.device])
            )
        for tier in self.fabric:
            at, hosts = f"fabric.{tier.name}", tier.hosts
            scope = {1: "in a host", float("inf"): "all hosts"}.get(hosts, f"{hosts:.0f} hosts")
            over = (
                f", oversubscribed {tier.oversubscription:g}:1" if tier.oversubscription > 1 else ""
            )
            shape = f" {'x'.join(map(str, tier.shape))}" if tier.shape else ""
            rate = f"{format_bandwidth(tier.bandwidth)} per device each way{self._mark(f'{at}.bandwidth')}{over}"
            delay = f"{format_seconds(tier.latency)}{self._mark(f'{at}.latency')}"
            lines.append(f"  {tier.name} ({tier.kind}{shape}, {scope}): {rate}, {delay}")
        return "\n".join(lines)

    def _describe_device(self, device: Device) -> Iterator[str]:
        at = f"devices.{device.name}"
        yield (
            f"memory {format_bytes(device.memory)}{self._mark(f'{at}.memory')}, of which"
            f" {format_bytes(device.reserve)}{self._mark(f'{at}.reserve')} in reserve,"
            f" at {format_bandwidth(device.memory_bandwidth)}{self._mark(f'{at}.memory_bandwidth')}"
        )
        peaks = [
            f"{d} {format_flops(p)}{self._mark(f'{at}.peak_flops.{d}')}"
            for d, p in device.peak_flops.items()
        ]
        share = f"{device.efficiency:.0%} of it{self._mark(f'{at}.efficiency')}"
        yield f"peak {', '.join(peaks)}; {share} in large products"

    def _mark(self, path: str) -> str:
        origin = self.provenance.get(path, "preset")
        return "" if origin == "preset" else f" ({origin})"


def _loopback(device: Device) -> Tier:
    """The fabric of a single device: its own memory."""
    return Tier(tier="none", scope="all", bandwidth=device.memory_bandwidth, latency=0.0)


def _fields(cluster: Cluster, empty: bool = False) -> Iterator[tuple[str, bool]]:
    """Dotted path of each figure, and whether it was given; those without a value only if `empty`."""
    parts: list[tuple[str, BaseModel]] = [
        (f"devices.{name}", d) for name, d in cluster.devices.items()
    ]
    parts += [(f"groups.{index}", group) for index, group in enumerate(cluster.groups)]
    parts += [(f"fabric.{tier.name}", tier) for tier in cluster.fabric]
    parts += [("price", cluster.price)] if cluster.price else []
    if empty and not cluster.price:
        yield from ((f"price.{field}", False) for field in DevicePrice.model_fields)
    for prefix, part in parts:
        for field in type(part).model_fields:
            value = getattr(part, field)
            if field in ("name", "tier", "source", "currency") or (value is None and not empty):
                continue
            given = field in part.model_fields_set
            if is_dict(value):
                yield from ((f"{prefix}.{field}.{key}", given) for key in value)
            else:
                yield f"{prefix}.{field}", given


# ---------------------------------------------------------------- paths


def _full_path(path: str, cluster: Cluster) -> str:
    """`hosts` -> `groups.0.hosts`, `device.memory` -> `devices.h100.memory`; others must exist."""
    full = path
    if path in ("hosts", "per_host") and len(cluster.groups) == 1:
        full = f"groups.0.{path}"
    if path.startswith("device.") and len(cluster.devices) == 1:
        full = f"devices.{next(iter(cluster.devices))}.{path.removeprefix('device.')}"
    known = [p for p, _ in _fields(cluster, empty=True)]
    parent, _, leaf = full.rpartition(".")
    dtype = (
        parent.endswith(".peak_flops")
        and leaf in DTYPES
        and any(p.startswith(parent) for p in known)
    )
    if full not in known and not dtype:
        raise ClusterError(
            f"cluster `{cluster.name}` has no field `{path}`.", fix=did_you_mean(full, known)
        )
    return full
