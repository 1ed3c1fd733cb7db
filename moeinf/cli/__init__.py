"""The `moeinf` command. One file per subcommand; parsing is typer's, tables are rich's."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

COMMANDS = {
    "run": "moeinf.cli.run",
    "chat": "moeinf.cli.chat",
    "serve": "moeinf.cli.serve",
    "info": "moeinf.cli.info",
    "plan": "moeinf.cli.plan",
    "tune": "moeinf.cli.tune",
    "pack": "moeinf.cli.pack",
    "trace": "moeinf.cli.trace",
    "simulate": "moeinf.cli.simulate",
    "report": "moeinf.cli.report",
    "top": "moeinf.cli.top",
    "doctor": "moeinf.cli.doctor",
}


def main() -> None:
    """Runs the command line. An error that a user can act on is one line without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal may lack the letters of a text, and a path need not be UTF-8.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_, **__: f"moeinf: {message}\n"
    try:
        try:
            _run()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, like head, has stopped reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        from moeinf.errors import CapacityError, UnsupportedError

        if isinstance(error, RuntimeError) and not isinstance(
            error, CapacityError | UnsupportedError
        ):
            raise
        if isinstance(error, OSError) and error.filename and error.strerror:
            sys.exit(f"moeinf: {os.fsdecode(error.filename)}: {error.strerror}")
        sys.exit(f"moeinf: {error or 'out of memory'}")
    except KeyboardInterrupt:
        sys.exit(130)


def _run() -> None:
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as error:
        sys.exit(f"moeinf: the command line needs {error.name}: pip install 'moeinf[hf]'")
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Runs Mixture-of-Experts models larger than fast memory.",
    )
    with quiet_interrupts():
        for name, module in COMMANDS.items():
            app.command(name)(importlib.import_module(module).command)
    app()


@contextmanager
def quiet_interrupts() -> Iterator[None]:
    """Ctrl-C ends the process at once, because an import can lose a KeyboardInterrupt."""
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
