"""The command line: finds the subcommands, runs one, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import __version__, commands
from .errors import UserError

EXIT_USER_ERROR = 2  # as argparse's own
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the list of all options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def command_names() -> list[str]:
    """The subcommands: the modules of deeplab_kernels.commands."""
    return sorted(m.name for m in pkgutil.iter_modules(commands.__path__) if not m.name.startswith("_"))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; imports none of what they need to run."""
    parser = Parser(
        prog="deeplab_kernels",
        description="Fused atrous separable convolution, fully connected CRF and DeepLab models for PyTorch.",
        epilog="'deeplab_kernels COMMAND --help' describes a command.",
    )
    parser.add_argument("--version", action="version", version=f"deeplab_kernels {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in command_names():
        module = importlib.import_module(f"{commands.__name__}.{name}")
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def describe(error: BaseException) -> str:
    """The error as one line, without Python's "[Errno 2]"."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``argv`` (default: sys.argv) and returns the exit code: 0, the command's own, or 2 (user error), 130
    (interrupted), 141 (the reader of the output went away)."""
    args = build_parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()  # here, so that a broken pipe is caught below and not at the interpreter's end
        return int(code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more when it exits: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (UserError, ValueError, OSError, ImportError) as error:
        if args.traceback:
            raise
        print(f"deeplab_kernels {args.command}: error: {describe(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
