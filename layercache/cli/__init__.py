"""The operator's commands. ``layercache --help`` and docs/cli.md describe them; their contract does not change."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from layercache import errors
from layercache.cli._interrupt import Interrupt
from layercache.cli._output import Output, note
from layercache.cli._parser import UsageError, build_parser

__all__ = ["main"]

_CLOSED_PIPE = 141

_log = logging.getLogger("layercache")

# What to do, where the error itself does not say.
_ADVICE: tuple[tuple[type[Exception], str], ...] = (
    (errors.UnauthorizedError, "log in (docker login, skopeo login) or check the credentials for this registry"),
    (errors.DeniedError, "ask for access, or check the name"),
    (errors.UnreachableError, "check the address and the network, or try later"),
    (errors.IntegrityError, "what is damaged here is moved aside: pull again"),
    (errors.NotFoundError, "check the name; ls shows what is held"),
    (errors.InUseError, "try again when it is closed"),
    (errors.ReadOnlyError, "make the root writable or name another with --root"),
    (errors.NoSpaceError, "free some space"),
    (errors.StoreError, "check the root, or name another with --root"),
    (errors.NamespacePurgedError, "run the command again"),
    (errors.InvalidError, "see layercache --help"),
    (errors.DeadlineError, "give it more time with --timeout"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code. Prints; never raises.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 integrity, 5 partly done, 130 interrupted, 141 the
    reader of standard output is gone.
    """
    verbose = False
    notes = _Notes()
    _log.addHandler(notes)
    with Interrupt() as interrupt:
        try:
            _prepare_streams()
            try:
                args = build_parser().parse_args(argv)
            except SystemExit as done:  # --help, --version
                code = int(done.code or 0)
            else:
                verbose = args.verbose
                notes.setLevel(logging.INFO if verbose else logging.ERROR)
                code = _run(args, interrupt)
            sys.stdout.flush()
            interrupt.settle()
        except BaseException as error:  # noqa: BLE001 - the last seam: what passes here ends the process
            interrupt.settle()
            code = interrupt.code if interrupt.signal else _code(error)
            _explain(error, code, interrupted=bool(interrupt.signal), verbose=verbose)
        finally:
            _log.removeHandler(notes)
        return code


def _run(args: argparse.Namespace, interrupt: Interrupt) -> int:
    from layercache.cli._care import COMMANDS  # noqa: PLC0415 - --version and --help need none of it

    out = Output(as_json=args.json, quiet=args.quiet, no_trunc=getattr(args, "no_trunc", False))
    return COMMANDS[args.command](args, out, interrupt.cancel)


class _Notes(logging.Handler):
    """What the library reports while it works, shown with ``-v``; results and errors say the rest."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def _code(error: BaseException) -> int:
    match error:
        case BrokenPipeError():
            return _CLOSED_PIPE
        case UsageError():
            return 2
        case errors.InvalidManifestError() | errors.InvalidDescriptorError():
            return 1  # what a registry sent, not what was typed
        case errors.InvalidError():
            return 2
        case errors.NotFoundError():
            return 3
        case errors.IntegrityError():
            return 4
        case KeyboardInterrupt():
            return 130
        case _:
            return 1


def _explain(error: BaseException, code: int, *, interrupted: bool, verbose: bool) -> None:
    """Say on one line what happened and what to do, unless the user knows (a closed pipe, ``--help``)."""
    try:
        sys.stdout.flush()
    except OSError:
        # What is buffered cannot be written; without this the interpreter tries again at its end, and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if isinstance(error, BrokenPipeError) and not interrupted:
        return
    with contextlib.suppress(OSError):
        if verbose:
            traceback.print_exception(error)
        note(_line(error, code, interrupted=interrupted))


def _line(error: BaseException, code: int, *, interrupted: bool) -> str:
    if interrupted or isinstance(error, KeyboardInterrupt):
        return f"interrupted ({code}); nothing half done is visible, the same command starts over or goes on"
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, errors.LayerCacheError):
        advice = next((advice for kind, advice in _ADVICE if isinstance(error, kind)), "")
        return str(error) if error.hint or not advice else f"{error}; {advice}"
    if isinstance(error, OSError):
        return f"{error}; check the file or device it names"
    return f"unexpected {type(error).__name__}: {error}; run it again with -v and report what it prints"


def _prepare_streams() -> None:
    """Make standard streams that were closed by the caller harmless, and able to print any name."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file the store opens would be "standard output" to everything that prints.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
