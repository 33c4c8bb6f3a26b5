"""Lists of hosts as people and slurm write them.

gpu[00-02,7]            gpu00 gpu01 gpu02 gpu7
n[1-2]-ib,login1        n1-ib n2-ib login1
rack[1-2]node[03,05]    rack1node03 rack1node05 rack2node03 rack2node05
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any

from ..errors import UsageError

MOST = 100_000  # hosts in one list
PART = re.compile(r"(?:\[[^\[\]]*\]|[^,\s\[\]])+")
PIECE = re.compile(r"\[[^\[\]]*\]|[^\[\]]+")
NAME = re.compile(r"[A-Za-z0-9._+-]+")
SPAN = re.compile(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*")


def hosts_in(text: str) -> Iterator[str]:
    """The hosts of a list, one after another; brackets hold numbers and spans, whose zeros in front are kept.

    Raises:
        UsageError: no such list, or more hosts than any cluster has.
    """
    parts = PART.findall(text)
    if not parts or PART.sub("", text).strip(", \t\r\n"):
        raise _pattern(text)
    for part in parts:
        pieces = [_numbers(piece, text) for piece in PIECE.findall(part)]
        if prod(map(len, pieces)) > MOST:
            raise UsageError(
                f"`{text:.60}` names more than {MOST} hosts.", fix="the hosts of one cluster"
            )
        yield from map("".join, product(*pieces))


def host_names(hosts: str | list[Any]) -> tuple[str, ...]:
    """All hosts of a list, or of a list of lists; each once.

    Raises:
        UsageError: no such list, a host that is named twice, or too many.
    """
    names: list[str] = []
    for text in hosts if isinstance(hosts, list) else [hosts]:
        for name in hosts_in(str(text)):
            if re.fullmatch(r"[-+]?[\d.]+", name):
                raise UsageError(
                    f"`{name}` is neither a number of hosts nor a name.",
                    where="hosts",
                    fix="1 or more, or gpu[00-31]",
                )
            names.append(name)
            if len(names) > MOST:
                raise UsageError(
                    f"`hosts` names more than {MOST} hosts.",
                    where="hosts",
                    fix="those of one cluster",
                )
    if not names:
        raise _pattern(str(hosts))
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UsageError(f"host `{name}` is named twice in `{hosts!s:.60}`.", fix="each host once")
    return tuple(names)


def _numbers(piece: str, whole: str) -> list[str]:
    """What a piece of a name may be: itself, or the numbers in its brackets."""
    if not piece.startswith("["):
        if not NAME.fullmatch(piece):
            raise _pattern(whole)
        return [piece]
    found: list[str] = []
    for span in piece[1:-1].split(","):
        ends = SPAN.fullmatch(span)
        if ends is None or not 0 <= (count := int(ends[2] or ends[1]) - int(ends[1])) < MOST:
            raise _pattern(whole)
        found += [f"{int(ends[1]) + k:0{len(ends[1])}d}" for k in range(count + 1)]
        if len(found) > MOST:
            raise _pattern(whole)
    return found


def _pattern(text: str) -> UsageError:
    return UsageError(
        f"`{text:.60}` is not a pattern of hosts.", fix='a count such as 32, or `"gpu[00-31]"`'
    )
