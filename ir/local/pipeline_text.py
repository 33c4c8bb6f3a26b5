"""Reads the text of pipelines: `parse_pipeline(str(program)) == program`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

from ..errors import GraphError
from ..lines import TEXT, Lines
from ..mesh import Mesh
from .pipeline import (
    Move,
    MoveKind,
    MovePhase,
    PassProgram,
    PipelineProgram,
    RankOp,
    RankProgram,
    Run,
    StageInput,
)
from .program import Shard
from .text import LocalReader

_HEAD = re.compile(rf"pipeline (?P<name>{TEXT}), (?P<many>\d+) microbatches")
_STAGE = re.compile(r"stage (?P<stage>\d+) on (?P<mesh>.+)")
_PASS = re.compile(r"pass of stage (?P<stage>\d+): (?P<border>.*)")
_VALUE, _NUMBER = re.compile(r"v(?P<value>\d+)"), re.compile(r"\d+")
_TOTAL = re.compile(r"v(?P<value>\d+)=(?P<how>\w+)")
_RANK = re.compile(r"rank (?P<rank>\d+) {")
_INPUT = re.compile(rf"in v(?P<value>\d+) of stage (?P<stage>\d+): (?P<shard>.+?) (?P<name>{TEXT})")
_RUN = re.compile(r"(?P<name>[a-z]+(?: \d+)+)(?: microbatch (?P<microbatch>\d+))?")
_MOVE = re.compile(
    r"(?P<kind>send|receive|copy) (?P<phase>start|forward|backward|update) (?P<values>v\d+(?: v\d+)*)"
    r" from stage (?P<sender>\d+)(?: of rank (?P<from>\d+))? to stage (?P<receiver>\d+)(?: of rank (?P<to>\d+))?"
    r"(?: microbatch (?P<microbatch>\d+))?: (?P<leaves>.+?)(?: as (?P<arrives>.+))?"
)


def parse_pipeline(text: str) -> PipelineProgram:
    """Read what a pipeline prints.

    Raises:
        GraphError: a line that is not understood, with its number.
    """
    return _Reader(text).read()


@dataclass
class _Reader(Lines):
    meshes: list[Mesh] = field(default_factory=lambda: [])  # of the stages
    many: int = 1  # microbatches

    def read(self) -> PipelineProgram:
        self.next()
        head = self.match(_HEAD, self.line)
        self.many = int(head["many"])
        passes, ranks = list[PassProgram](), list[RankProgram]()
        while self.next():
            if self.line.startswith("stage "):
                self.meshes.append(self._stage())
            elif self.line.startswith("pass "):
                passes.append(self._pass())
            else:
                ranks.append(self._rank(len(ranks)))
        name = ast.literal_eval(head["name"])
        return PipelineProgram(name, self.many, tuple(self.meshes), tuple(passes), tuple(ranks))

    def _stage(self) -> Mesh:
        found = self.match(_STAGE, self.line)
        if int(found["stage"]) != len(self.meshes):
            raise self.wrong()
        return self._local().read_mesh(found["mesh"])

    def _local(self, mesh: Mesh | None = None) -> LocalReader:
        """A reader of what stands in or behind the current line."""
        return LocalReader(self.text, self.number, self.line, mesh or Mesh(()), self.many)

    # ------------------------------------------------------------ passes

    def _pass(self) -> PassProgram:
        found = self.match(_PASS, self.line)
        border = {word: tuple(rest) for word, *rest in map(str.split, found["border"].split("; "))}
        if border.keys() - {"takes", "joins", "totals", "gives", "sends", "results"}:
            raise self.wrong()
        totals = [self.match(_TOTAL, word) for word in border.get("totals", ())]
        takes, joins, gives, sends = (
            self._values(border.get(word, ())) for word in ("takes", "joins", "gives", "sends")
        )
        results = tuple(int(self.match(_NUMBER, word)[0]) for word in border.get("results", ()))
        local = self._local()
        program = local.read()
        self.number = local.number
        return PassProgram(
            int(found["stage"]), program, takes, joins,
            tuple((int(each["value"]), each["how"]) for each in totals), gives, sends, results,
        )  # fmt: skip

    def _values(self, words: Iterable[str]) -> tuple[int, ...]:
        return tuple(int(self.match(_VALUE, word)["value"]) for word in words)

    # ------------------------------------------------------------ ranks

    def _rank(self, number: int) -> RankProgram:
        if int(self.match(_RANK, self.line)["rank"]) != number:
            raise self.wrong()
        inputs, ops = list[StageInput](), list[RankOp]()
        while self.next() and self.line != "}":
            if self.line.startswith("in "):
                inputs.append(self._input())
            elif found := _RUN.fullmatch(self.line):
                ops.append(Run(found["name"], self._number(found["microbatch"])))
            else:
                ops.append(self._move())
        if self.line != "}":
            raise self.wrong()
        return RankProgram(tuple(inputs), tuple(ops))

    def _input(self) -> StageInput:
        found = self.match(_INPUT, self.line)
        stage = int(found["stage"])
        shard = self._shard(stage, found["shard"])
        return StageInput(int(found["value"]), stage, shard, ast.literal_eval(found["name"]))

    def _move(self) -> Move:
        found = self.match(_MOVE, self.line)
        sender, receiver = int(found["sender"]), int(found["receiver"])
        kind, ends = cast(MoveKind, found["kind"]), (found["from"], found["to"])
        rank = {"send": ends[1], "receive": ends[0], "copy": None}[kind]
        if ends.count(None) != (2 if kind == "copy" else 1) or (kind != "copy" and rank is None):
            raise self.wrong()
        leaves = self._shard(sender, found["leaves"])
        arrives = self._shard(receiver, found["arrives"] or found["leaves"])
        return Move(
            kind, cast(MovePhase, found["phase"]), self._values(found["values"].split()), sender, receiver,
            self._number(rank), leaves, arrives, self._number(found["microbatch"]),
        )  # fmt: skip

    def _number(self, word: str | None) -> int | None:
        return None if word is None else int(word)

    def _shard(self, stage: int, text: str) -> Shard:
        """What a stage has of a value."""
        if stage >= len(self.meshes):
            raise self.wrong()
        shard, rest = self._local(self.meshes[stage]).read_shard(text)
        if rest:
            raise self.wrong()
        return shard

    def wrong(self) -> GraphError:
        return GraphError(
            f"`{self.line}` is no line of a pipeline.",
            where=f"line {self.number}",
            fix="`stage 0 on x=2`, `pass of stage 0: takes v1`, `rank 0 {`, `forward 0 microbatch 1`, `send ...`",
        )
