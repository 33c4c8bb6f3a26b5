"""The command line. Results go to stdout, progress and errors to stderr.

Exit codes: 0 done; 1 the sharded results differ from the unsharded ones; 2 wrong
usage, model, cluster or file; 3 nothing fits; 4 stopped before any plan was found;
5 the plan cannot run here, or belongs to something else; 6 a package is missing;
7 another process of the run has ended, or was waited for too long;
70 a defect of meshwright; 130 interrupted; 141 whoever read the results has gone.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import Any, NoReturn

import typer

from ..interrupts import heard
from ..ir.errors import (
    LoweringError,
    MeshwrightError,
    MissingDependencyError,
    ProcessError,
    UsageError,
)
from ..ir.passes.contract import dumped_passes
from ..ir.passes.order import PASSES
from ..output import ReaderGoneError, flush, silence, tolerant
from . import (  # noqa: F401  (each adds its commands to the app)
    audit,
    calibrate,
    demo,
    launch,
    lists,
    plan,
    price,
    replan,
    run,
    schedule,
    show,
    simulate,
    solve,
)
from .options import app

INTERRUPTED, CLOSED = 130, 141  # as shells count signals: 128 and SIGINT's number, SIGPIPE's
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def main() -> NoReturn:
    """Run the command line and exit with the code that belongs to the outcome."""
    code: object = 0
    tolerant()
    try:
        with heard():
            dumped_passes(each.name for each in PASSES)  # a wrong name is told whatever the command
            code = app(standalone_mode=False)
        flush()  # what help printed
    except ProcessError as error:
        from ..backends.runtime.rendezvous import leave

        leave(error)
    except MeshwrightError as error:
        _fail(error.report(), error.exit_code)
    except typer.Exit as done:
        code = done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except (ReaderGoneError, SystemExit):  # typer ends so when whoever reads its help has gone
        silence()
        sys.exit(CLOSED)
    except MemoryError as error:
        _fail(
            LoweringError(
                f"this machine has too little memory: {error or 'none is left'}."
            ).report(),
            5,
        )
    except Exception as error:
        if told := getattr(error, "format_message", None):  # of options that typer does not know
            helped = type(error).__name__ == "NoArgsIsHelpError"
            _fail(told() if helped else _usage(error), 2)
        if isinstance(error, OSError) and error.errno in FULL:  # help, which typer prints
            _fail(
                UsageError(
                    f"results cannot be printed: {error.strerror}.", fix="room where they lead"
                ).report(),
                2,
            )
        if isinstance(error, ImportError) and (missing := MissingDependencyError.of(error)):
            _fail(missing.report(), missing.exit_code)
        if os.environ.get("MESHWRIGHT_TRACEBACK"):
            raise
        _fail(_defect(error), 70)
    if code == INTERRUPTED:
        with suppress(OSError):
            print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)  # at once: XLA's threads may be in the middle of a step
    sys.exit(code if isinstance(code, int) else 0)


def _defect(error: Exception) -> str:
    """An error that no one foresaw, in the house form."""
    return MeshwrightError(
        f"meshwright failed: {type(error).__name__}: {error}.",
        fix="MESHWRIGHT_TRACEBACK=1 shows where; please report it with the command",
    ).report()


def _usage(error: Any) -> str:
    command = getattr(error.ctx, "command_path", "meshwright") if error.ctx else "meshwright"
    return UsageError(error.format_message(), fix=f"{command} --help").report()


def _fail(message: str, code: int) -> NoReturn:
    with suppress(OSError):  # nobody may be there to read it
        print(message, file=sys.stderr, flush=True)
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        os._exit(code)  # an orderly exit waits for the other processes, and they for this one
    try:
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):
        silence()
    sys.exit(code)
