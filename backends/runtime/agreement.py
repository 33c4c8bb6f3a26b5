"""What all processes of a run must have alike, compared before it matters.

    agree(store, "the command line", lambda: {"--seed": "0", "--steps": "10"})

Each process says what it has through a store of texts, which works before devices are looked for and between
unlike versions. Every process hears all of them, so all refuse, with the values and whose they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import count
from threading import Timer
from time import monotonic
from typing import Any

from ...ir.errors import MeshwrightError, MismatchError, ProcessError
from ...ir.plan import Plan
from .devices import KeyValueStore
from .rendezvous import deadline_seconds, ended, late, leave

LONGEST = 60  # characters of a value in a message
TOLD = 4  # differences in one message
READ = 10.0  # seconds that the coordinator gives the others to read before it ends

_turns = count()
_refused: list[MeshwrightError] = []


def refused() -> MeshwrightError | None:
    """Why this process is ending, if the processes did not agree: a framework may abort
    those that lose the coordinator."""
    return _refused[-1] if _refused else None


def agree(store: KeyValueStore | None, what: str, facts: Callable[[], Mapping[str, str]]) -> None:
    """Go on only if all processes say the same; every process calls it, and alone it does nothing.

    Args:
        store: by which the processes hear each other; None where the process is alone.
        what: what the facts are of: "the command line".
        facts: give them by name, as text that a user can read; not asked where the process is alone.

    Raises:
        MismatchError: what differs, in which processes, with the values.
        ProcessError: a process did not say anything in time.
    """
    if store is None or store.process_count == 1:
        return
    text = json.dumps({**facts()})
    turn = f"meshwright/{next(_turns)}"
    marks = _everyone(store, f"{turn}/digest", what, sha256(text.encode()).hexdigest())
    if len(set(marks)) == 1:
        return
    said = [json.loads(each) for each in _everyone(store, f"{turn}/facts", what, text)]
    error = _difference(what, said, store.process)
    _refused.append(error)
    _part(store, f"{turn}/read")
    raise error


def _everyone(store: KeyValueStore, key: str, what: str, text: str) -> list[str]:
    """What each process says, in their order."""
    seconds, process = deadline_seconds(), 0
    compared, begin = f"the comparison of {what}", monotonic()
    try:
        store.put(f"{key}/{store.process}", text)
        said = []
        for process in range(store.process_count):
            left = max(0.001, min(seconds - (monotonic() - begin), 1e6))
            said.append(store.get(f"{key}/{process}", left))
        return said
    except TimeoutError as error:
        raise late(compared, f"process {process}", seconds, store) from error
    except ConnectionError as error:
        raise ended(compared, f"process {process}", error, store) from error


def _part(store: KeyValueStore, key: str) -> None:
    """Say that all was read; the first process waits for that, as with it ends the store that others read from."""
    try:
        store.put(f"{key}/{store.process}", "")
        for process in range(1, store.process_count if store.process == 0 else 0):
            store.get(f"{key}/{process}", READ)
    except (TimeoutError, ConnectionError):
        return  # the other has ended, which is what this one is about to do


def _difference(what: str, said: Sequence[Mapping[str, str]], process: int) -> MismatchError:
    names = list(dict.fromkeys(name for each in said for name in each))
    rows = [(name, [each.get(name, "not there") for each in said]) for name in names]
    unlike = [f"{name} is {_by_process(values)}" for name, values in rows if len(set(values)) > 1]
    more = f"; and {len(unlike) - TOLD} more" if len(unlike) > TOLD else ""
    return MismatchError(
        f"{unlike[0] if unlike else f'the order of {what} is not the same'}.",
        where=f"process {process} of {len(said)}", origin="; ".join(unlike[1:TOLD]) + more or None,
        fix=f"the same for all processes: {what} must be alike in each",
    )  # fmt: skip


def _by_process(values: Sequence[str]) -> str:
    """`0 in process 0, 1 in processes 1 and 2`."""
    holders: dict[str, list[int]] = {}
    for process, value in enumerate(values):
        holders.setdefault(value, []).append(process)
    return ", ".join(
        f"{value or 'nothing'} in {_processes(held)}" for value, held in holders.items()
    )


def _processes(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"process {numbers[0]}"
    if len(numbers) > 4:
        return f"process {numbers[0]} and {len(numbers) - 1} others"
    return f"processes {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


@contextmanager
def watched(seconds: float, error: Callable[[], ProcessError]) -> Iterator[None]:
    """End this process with an error if what is inside takes longer: it waits where Python cannot raise."""
    timer = Timer(seconds, lambda: leave(error()))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ---------------------------------------------------------------- facts


def decisions(plan: Plan) -> dict[str, str]:
    """A plan, field by field."""
    return {
        f"the plan's {name}": short(value) for name, value in plan.model_dump(mode="json").items()
    }


def short(value: Any) -> str:
    """A value as it is, or its beginning and a digest where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]}... (digest {sha256(text.encode()).hexdigest()[:12]})"
