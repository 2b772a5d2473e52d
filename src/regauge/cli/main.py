"""The entry point, and the boundary where every exception becomes one sentence and an exit code.

Exit codes: 0 done; 1 the work failed (exactness, a full disk, a bug); 2 what was asked for cannot be done as written
(usage, model, text, recipe, budget, output); 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence

import typer
from typer.main import get_command

from regauge.errors import ExactnessError, RegaugeError, printable

_USAGE: type[Exception] = typer.BadParameter.__bases__[0]  # UsageError: typer does not name it in public
INTERRUPTED = "interrupted; what was finished is kept, run the same command again to resume"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit code."""
    from regauge.cli.app import app

    if argv is None:
        _keep_stdout()
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show is replaced, never an error
            stream.reconfigure(errors="replace")
    if "--debug" in arguments:
        return _run(app, arguments)
    try:
        return _run(app, arguments)
    except _USAGE as error:
        return _usage(error)
    except ExactnessError as error:
        return _fail(str(error), 1)
    except RegaugeError as error:
        return _fail(str(error), 1 if _disk_full(error) else 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(INTERRUPTED, 130)
    except BrokenPipeError:
        return _reader_left()
    except SystemExit as ended:  # typer's way out where the reader left
        if not isinstance(ended.__context__, BrokenPipeError):
            raise
        return _reader_left()
    except OSError as error:
        return _fail(_system(error), 1)
    except MemoryError:
        return _fail("out of memory; what was finished is kept, run the same command again to resume", 1)
    except Exception as error:  # the boundary: a user sees a sentence, never a traceback
        told = " ".join(str(error).split()) or "no message"
        return _fail(f"this is a bug: {type(error).__name__}: {told[:300]}; run again with --debug for its place", 1)


def _reader_left() -> int:
    """What is left for a reader that went (`| head -1`) is dropped, or it would be complained of at exit."""
    left = getattr(sys.stdout, "wrapped", sys.stdout)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # the interpreter flushes it at exit
    with contextlib.suppress(BrokenPipeError):
        left.close()
    return 1


def _keep_stdout() -> None:
    """Keeps standard output to ourselves: libraries (HiGHS among them) leave lines there now and then, past Python,
    which would break `--json`. They go to standard error. Only where this is the process's own command line.
    """
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="replace")
    os.dup2(2, 1)
    sys.stdout = own


def _run(app: typer.Typer, arguments: list[str]) -> int:
    code = get_command(app).main(args=arguments, prog_name="regauge", standalone_mode=False)
    if code == 130:  # typer turns the exception into an exit of its own
        raise KeyboardInterrupt
    sys.stdout.flush()  # here, where a reader that left is heard of
    return code if isinstance(code, int) else 0


def _fail(sentence: str, code: int) -> int:
    print(f"regauge: {printable(sentence)}", file=sys.stderr)
    return code


def _usage(error: Exception) -> int:
    """Says what a line lacks or what is wrong in it, with the command whose help tells more; of none at all, the help.
    Returns the exit code."""
    told = str(getattr(error, "format_message", lambda: str(error))()).strip()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(told, file=sys.stderr)
        return 2
    command = str(getattr(getattr(error, "ctx", None), "command_path", ""))
    more = f"'{command} --help' its" if " " in command else "'regauge COMMAND --help' their"
    ends = "" if told.endswith(("?", "!")) else "."
    return _fail(f"{told.rstrip('.')}{ends} 'regauge --help' lists the commands, {more} options.", 2)


def _disk_full(error: BaseException | None) -> bool:
    """Whether an OutputError comes from a full disk or a limit: then the command was right and the machine was not."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__
    return False


def _system(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; make room and run the same command again to resume"
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
