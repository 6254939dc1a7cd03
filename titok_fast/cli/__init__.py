"""The titok-fast command."""

import sys
import warnings
from typing import Any

import typer
from PIL import Image

from titok_fast.cli.common import errors, say
from titok_fast.cli.convert import convert
from titok_fast.cli.generate import generate
from titok_fast.cli.info import info
from titok_fast.cli.kernels import kernels
from titok_fast.cli.pictures import inspect, reconstruct
from titok_fast.cli.profile import profile
from titok_fast.cli.tokens import decode, encode
from titok_fast.cli.train import train

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Image tokenizers on fused kernels: images to tokens and back.",
)
for command in (
    encode, decode, reconstruct, inspect, generate, train, convert, profile, kernels, info
):  # fmt: skip
    app.command()(command)


UsageError: Any = typer.BadParameter.__base__  # click's, which newer versions of typer contain


def main() -> None:
    """Run the command; what the user can mend is one line on stderr, not a traceback."""
    # They are read all the same. Not where they are: a filter is no thread's own.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        arguments = sys.argv[1:] or ["--help"]
        sys.exit(app(arguments, prog_name="titok-fast", standalone_mode=False))
    except typer.Abort:
        sys.exit(1)
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "titok-fast"
        reason = f"{error.format_message()} ('{command} --help' lists what is allowed)"
    except (ArithmeticError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error)
    say(f"error: {' '.join(reason.split())}", errors, style="bold red")
    sys.exit(2)
