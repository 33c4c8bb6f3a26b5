"""What a fabric must be for a cluster to make sense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ..errors import ClusterError
from ..units import counted, format_bandwidth
from . import presets
from .parts import Device, Group, Tier, near


class Connected(Protocol):
    """A cluster, as far as its fabric is concerned."""

    @property
    def devices(self) -> Mapping[str, Device]: ...
    @property
    def groups(self) -> Sequence[Group]: ...
    @property
    def fabric(self) -> Sequence[Tier]: ...
    @property
    def size(self) -> int: ...
    @property
    def hosts(self) -> int: ...


def check_fabric(cluster: Connected) -> None:
    """Names, shapes, reach and order of the tiers, closest first; raises ClusterError."""
    names = [tier.name for tier in cluster.fabric]
    for tier in cluster.fabric:
        if names.count(tier.name) > 1:
            raise ClusterError(
                f"two tiers are called `{tier.name}`.", where="fabric", fix="a name for each"
            )
        _check_shape(cluster, tier)
        _check_one_way(cluster, tier)
    for closer, farther in zip(cluster.fabric, cluster.fabric[1:], strict=False):
        _check_order(closer, farther)
    if cluster.size > 1 and not (cluster.fabric and cluster.fabric[-1].hosts >= cluster.hosts):
        reach = (
            f"`{names[-1]}` reaches {cluster.fabric[-1].hosts:.0f}" if names else "there is none"
        )
        raise ClusterError(
            f"no tier connects all {counted(cluster.size, 'device')} on {counted(cluster.hosts, 'host')}; {reach}.",
            where="fabric",
            fix="a last tier with `scope: all`, such as `{preset: ib400}`",
        )


def _check_order(near: Tier, far: Tier) -> None:
    where = f"fabric.{far.name}"
    if far.hosts <= near.hosts:
        raise ClusterError(
            f"`{far.name}` joins no more hosts than `{near.name}` before it.",
            where=f"{where}.scope",
            fix="tiers closest first: `host`, then `{hosts: n}` with growing n, then `all`",
        )
    if far.effective_bandwidth > near.effective_bandwidth:
        raise ClusterError(
            f"`{far.name}` ({format_bandwidth(far.effective_bandwidth)}) is faster than "
            f"`{near.name}` ({format_bandwidth(near.effective_bandwidth)}), which is closer.",
            where=f"{where}.bandwidth",
            fix="bandwidth per device and direction; a host's adapter is shared by its devices",
        )


def _check_shape(cluster: Connected, tier: Tier) -> None:
    if tier.shape is None:
        return
    product = 1
    for dim in tier.shape:
        product *= dim
    hosts = int(min(tier.hosts, cluster.hosts))
    reach = sum(
        sorted((g.per_host for g in cluster.groups for _ in range(g.hosts)), reverse=True)[:hosts]
    )
    if product != reach:
        shape = "x".join(map(str, tier.shape))
        raise ClusterError(
            f"shape {shape} has {product} devices, tier `{tier.name}` joins {reach}.",
            where=f"fabric.{tier.name}.shape",
            fix=f"a shape whose sizes multiply to {reach}",
        )


def _check_one_way(cluster: Connected, tier: Tier) -> None:
    """Vendors quote NVLink as the sum of both directions; we count one."""
    for device in cluster.devices.values():
        inside = presets.inside_bandwidth(presets.family(device.name))
        quoted = device.kind in ("cuda", "rocm") and tier is cluster.fabric[0]
        if inside and quoted and near(tier.bandwidth, 2 * inside):
            raise ClusterError(
                f"{format_bandwidth(tier.bandwidth)} counts both directions of {device.name}'s links.",
                where=f"fabric.{tier.name}.bandwidth",
                fix=f"per direction it is {format_bandwidth(inside)}",
            )
