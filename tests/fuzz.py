"""Fuzz the command line: `python -m tests.fuzz --count 2000 --seed 0`; `--only 17` shows one case.

Every case ends with a documented code other than 70, and 1 only where results were compared; says what, where and
what to try in the house form; takes at most 10 s of processor time and 1 GiB; and prints JSON where that is asked for.
Cases run one after another in a worker that has imported everything; some also as processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from select import select
from typing import Any

from .fuzz_cases import Case, cases, lay_out, make_valid

CODES = {0, 2, 3, 4, 5, 6, 7, 130, 141}
SECONDS, HANGS = (
    10.0,
    90.0,
)  # of the processor; of the clock, on a machine that does other things too
MOST = 2**30  # bytes at the peak
ALONE = 40  # one case in so many is run as a process of its own too
FORM = re.compile(r"^\w+Error: .+(\n  (where|from |try  )  .+(\n {9}.*)*)+", re.M)
ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "JAX_PLATFORMS": "cpu"}


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str
    seconds: float  # of the processor
    peak: int


class Worker:
    """A process that runs command lines as they come, and is started anew when one has ended it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, case: Case, folder: Path) -> Ended:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "tests.fuzz", "--worker"]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV, cwd=ROOT
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"words": case.words, "folder": str(folder)}) + "\n")
        self.process.stdin.flush()
        answer = ""
        if select([self.process.stdout], [], [], HANGS)[0]:
            answer = self.process.stdout.readline()
        if answer:
            return Ended(**json.loads(answer))
        alive = self.process.poll() is None and not self._ends()
        self.process.kill()
        code = self.process.wait()
        code = -9 if alive else code
        return Ended(
            code,
            _read(folder.parent / "out"),
            _read(folder.parent / "err"),
            HANGS if alive else 0.0,
            0,
        )

    def _ends(self) -> bool:
        assert self.process is not None
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()


def work() -> None:
    """In the worker: one case per line of stdin, in the folder that it names; what it prints goes to files beside."""
    import resource

    import jax  # noqa: F401

    from meshwright import api, cli, training  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
    for line in sys.stdin:
        given = json.loads(line)
        os.chdir(given["folder"])
        sys.argv = ["meshwright", *given["words"]]
        begin, code = _processor(), _run_main(Path(given["folder"]).parent, cli.main)
        ended = Ended(
            code, _read(Path("../out")), _read(Path("../err")), _processor() - begin, _peak()
        )
        print(json.dumps(ended.__dict__), file=answers, flush=True)


def _run_main(beside: Path, main: Any) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    kept = [os.dup(number) for number in (1, 2)]
    streams = [(beside / name).open("w", encoding="utf-8") for name in ("out", "err")]
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream.fileno(), number)
    known, paths = {*sys.modules}, [*sys.path]
    try:
        main()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, old in enumerate(kept, start=1):
            os.dup2(old, number)
            os.close(old)
        for name in {*sys.modules} - known:
            if "train" in name:
                del sys.modules[name]
        sys.path[:] = paths
    return 0


def _processor() -> float:
    found = os.times()
    return found.user + found.system + found.children_user + found.children_system


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def complaints(case: Case, ended: Ended) -> list[str]:
    """What a user should not have seen."""
    found = []
    if ended.code not in CODES:
        found.append(f"code {ended.code}")
    if "Traceback" in ended.err:
        found.append("traceback")
    if ended.code in CODES - {0, 130, 141} and not FORM.search(ended.err):
        found.append("no message in the house form")
    if ended.seconds > SECONDS:
        found.append(f"{ended.seconds:.0f} s")
    if ended.peak > MOST:
        found.append(f"{ended.peak / 2**30:.1f} GiB")
    if len(ended.err) > 20_000:
        found.append("a message without end")
    if ended.code == 0 and case.words[-2:] == ("--format", "json") and "--help" not in case.words:
        try:
            json.loads(ended.out)
        except ValueError:
            found.append("no JSON")
    return found


def alone(case: Case, folder: Path) -> Ended:
    """The case as a process of its own."""
    lay_out(case, folder)
    words = [word.encode("utf-8", "surrogateescape").replace(b"\0", b"") for word in case.words]
    begin = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "meshwright", *words],
        capture_output=True,
        cwd=folder,
        env=ENV,
        timeout=2 * HANGS,
    )
    end = os.times()
    seconds = end.children_user + end.children_system - begin.children_user - begin.children_system
    out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    return Ended(
        done.returncode, out, err, max(0.0, seconds - 5.0), 0
    )  # importing everything aside


def fuzz(
    count: int, seed: int, only: int | None = None, sample: int = ALONE, kept: Path | None = None
) -> tuple[list[str], Counter[Any]]:
    """Run the cases; what went wrong, a line each, and how many ended how by kind. `kept`: valid files, made before."""
    wrong: list[str] = []
    ends: Counter[Any] = Counter()
    worker = Worker()
    with tempfile.TemporaryDirectory() as place:
        valid, folder = kept or Path(place) / "valid", Path(place) / "case" / "here"
        if not valid.exists():
            make_valid(valid)
        for number, case in cases(valid, count if only is None else only + 1, seed):
            if only is not None and number != only:
                continue
            lay_out(case, folder)
            runs = [worker.run(case, folder)]
            if number % sample == sample - 1:
                runs.append(alone(case, folder))
            for ended in runs:
                ends[case.kind, ended.code] += 1
                for complaint in complaints(case, ended):
                    last = ended.err.strip().splitlines()
                    wrong.append(
                        f"{number} {case.kind}: {complaint}: {case.words!r:.300}: {(last or [''])[0]:.300}"
                    )
                    print(wrong[-1], flush=True)
                if only is not None:
                    print(f"{case.words}\ncode {ended.code}, {ended.seconds:.2f} s")
                    print(f"{ended.out[:3000]}\n{ended.err[:6000]}")
    worker.close()
    return wrong, ends


def report(wrong: list[str], ends: Counter[Any], seconds: float) -> str:
    codes = sorted({code for _, code in ends})
    rows = [
        "| kind | " + " | ".join(f"code {code}" for code in codes) + " |",
        "|---" * (len(codes) + 1) + "|",
    ]
    for kind in sorted({kind for kind, _ in ends}):
        rows.append(
            f"| {kind} | " + " | ".join(str(ends[kind, code] or "") for code in codes) + " |"
        )
    return "\n".join(
        [*rows, "", f"{ends.total()} runs in {seconds:.0f} s, {len(wrong)} complaints"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--valid", type=Path, help="where the valid files are kept; made if it is not there"
    )
    given = parser.parse_args()
    if given.worker:
        work()
        return
    begin = time.monotonic()
    wrong, ends = fuzz(given.count, given.seed, given.only, kept=given.valid)
    print(report(wrong, ends, time.monotonic() - begin))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
