"""The `moeinf` command. One file per subcommand; parsing is typer's, tables are rich's."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "run": "moeinf.cli.run",
    "info": "moeinf.cli.info",
    "simulate": "moeinf.cli.simulate",
    "report": "moeinf.cli.report",
    "doctor": "moeinf.cli.doctor",
}


def main() -> None:
    """Runs the command line; errors a user can act on end in one line, without a traceback."""
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as error:
        sys.exit(f"moeinf: the command line needs {error.name}: pip install 'moeinf[hf]'")
    from moeinf.errors import CapacityError, UnsupportedError

    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Runs Mixture-of-Experts models larger than fast memory.",
    )
    for name, module in COMMANDS.items():
        app.command(name)(importlib.import_module(module).command)
    try:
        app()
    except (ValueError, OSError, ImportError, CapacityError, UnsupportedError) as error:
        sys.exit(f"moeinf: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
