"""The command `layerrl`: a module a command, each a few lines on the public interface."""

from __future__ import annotations

import json
import os
import re
import sys
from argparse import REMAINDER, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module

import layerrl
from layerrl.errors import LayerRLError

COMMANDS = {
    "plan": "what a run takes, before anything is loaded",
    "train": "train chosen layers with a TRL trainer; save them as a delta",
    "probe": "score the layers of a model",
    "merge": "write the base with deltas in it: a whole model",
    "show": "print a delta, a report or a selection",
}
"""Commands, each the module of that name here. A new one is a file and a line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Its words; None: those of the process.

    Returns:
        The exit code: 0; 1 after an error of layerrl, whose message is on stderr, or when nobody
        reads what is printed; 130 after Ctrl-C.

    Raises:
        SystemExit: After `--help` or `--version` (code 0), or words that make no sense (code 2).
    """
    parser = ArgumentParser(
        prog="layerrl",
        description=layerrl.__doc__.splitlines()[0],  # pyright: ignore[reportOptionalMemberAccess]
        epilog="commands:\n"
        + "\n".join(f"  {name:7}{does}" for name, does in COMMANDS.items())
        + "\n\nlayerrl COMMAND --help says more.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    version = f"layerrl {layerrl.__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    parser.add_argument("arguments", nargs=REMAINDER, metavar="...", help="of the command")
    given = parser.parse_args(argv)
    # argparse takes `-1,2` and `-1=2` for options, but no word with a space in it.
    words = [re.sub(r"^(-\d+[,=])", r" \1", word) for word in given.arguments]
    try:
        _print(import_module(f"layerrl.cli.{given.command}").run(words))
    except LayerRLError as error:
        print(f"layerrl {given.command}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as `| head` leaves it
        _discard_stdout()
        return 1
    except KeyboardInterrupt:
        print(f"layerrl {given.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _print(text: str | None) -> None:
    """Print what a command returned, if anything, after all that it wrote elsewhere.

    Raises:
        LayerRLError: If stdout is closed, or cannot be written to.
        BrokenPipeError: If nobody reads it.
    """
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison] - started with `>&-`
        if text is None:
            return
        raise LayerRLError("nothing can be printed: stdout is closed")
    try:
        if text is not None:
            print(_in_encoding(text, sys.stdout.encoding or "utf-8"))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_stdout()
        raise LayerRLError(f"cannot print to stdout: {error.strerror or error}") from error


def _discard_stdout() -> None:
    """Have Python's own flush at exit succeed."""
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


def _in_encoding(text: str, encoding: str) -> str:
    """The text, with escapes of JSON, which text and JSON may hold, for what an encoding lacks."""

    def escaped(character: re.Match[str]) -> str:
        try:
            character[0].encode(encoding)
        except UnicodeEncodeError:
            return json.dumps(character[0])[1:-1]
        return character[0]

    return re.sub(r"[^\x00-\x7f]", escaped, text)
