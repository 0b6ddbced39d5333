"""The command line: what commands there are, and how they fail. Each is a file in `vramkit.commands`.

Heavy libraries are imported by the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from vramkit import __version__
from vramkit.commands.batch import batch
from vramkit.commands.decode import decode
from vramkit.commands.demo import demo
from vramkit.commands.doctor import doctor
from vramkit.commands.plan import plan
from vramkit.commands.ranks import is_later_rank
from vramkit.commands.run import run
from vramkit.commands.verify import verify
from vramkit.errors import VramkitError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
# What typer raises for wrong arguments; it brings its own click or uses the installed one, by version.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    help="Run PyTorch models that are larger than the memory of the device that computes them.",
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (demo, plan, run, batch, decode, verify, doctor):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; errors of the user's making are one line on stderr."""
    try:
        status = app(args=None if arguments is None else list(arguments), prog_name="vramkit", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except _UsageError as error:
        if is_later_rank():  # each has the same arguments
            return 2
        return _fail(f"error: {error.format_message()}", 2)  # type: ignore[attr-defined]
    except (VramkitError, OSError, RuntimeError) as error:
        if any(
            kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__
        ):  # torch's, which is not imported here
            error = VramkitError(
                "the device memory is not enough; try --offload leaf, --slots 1, --quantize or --vae-tiling"
            )
        elif not isinstance(error, (VramkitError, OSError)):
            raise
        return _fail(f"error: {error}", 1)
    if status == INTERRUPTED:  # typer may have turned Ctrl-C into this status by itself
        return _fail("interrupted", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)  # noqa: T201 - one line, whatever the message was
    return status


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"vramkit {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    *,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
