"""Flags of the command lines. Those of the engine are made from the fields of core/run_config.RunConfig."""

import argparse
import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any, NoReturn, get_args

from core import PROGRAM_VERSION
from core.errors import UserError
from core.run_config import RunConfig
from parallel import launcher

SERVER_FLAGS = ("max_num_mixed_tokens",)  # for requests that come while others are answered
ENGINE_FLAGS = tuple(f.name for f in fields(RunConfig) if "help" in f.metadata and f.name not in SERVER_FLAGS)


class Parser(argparse.ArgumentParser):
    """Raises UserError for wrong use; only rank 0 prints."""

    def __init__(self, description: str | None) -> None:
        """The description is shown as it is written."""
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")

    def _print_message(self, message: str, file: Any = None) -> None:
        if launcher.is_first():
            with output_errors():
                print(message, end="", file=file, flush=True)


class OutputError(Exception):
    """Standard output cannot be written to; the text says why."""


@contextlib.contextmanager
def output_errors() -> Iterator[None]:
    """Around what a command prints: a full device is an OutputError, which ends the command with one line. That nobody
    reads the output any more stays BrokenPipeError; an error that names a file is not about the output."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as e:
        if e.filename is not None:
            raise
        raise OutputError(e.strerror or str(e)) from None


def add_checkpoint_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--ckpt-path", required=True, metavar="DIR", help="checkpoint: Hugging Face's, or converted by convert.py")
    add("--config", metavar="FILE", help="the model's config, where the checkpoint has no config.json")


def add_engine_flags(parser: Parser, *more: str) -> None:
    """Those of RunConfig that every command has which runs a model, `more` of them, and --version."""
    add_run_flags(parser, (*ENGINE_FLAGS, *more))
    parser.add_argument("--version", action="version", version=f"{parser.prog} {PROGRAM_VERSION}")


def add_run_flags(parser: Parser, names: Iterable[str]) -> None:
    """Flags for these fields of RunConfig."""
    by_name = {f.name: f for f in fields(RunConfig)}
    for name in names:
        f, flag = by_name[name], "--" + name.replace("_", "-")
        help, metavar = f.metadata["help"], f.metadata["metavar"]
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=help)
        elif metavar is None:
            parser.add_argument(flag, choices=get_args(f.type), default=f.default, help=help)
        else:
            parser.add_argument(flag, type=TYPES[metavar], default=f.default, metavar=metavar, help=help)


def run_config(options: argparse.Namespace) -> RunConfig:
    """The fields that the flags describe; the others have their defaults. Raises UserError."""
    return RunConfig(**{f.name: getattr(options, f.name) for f in fields(RunConfig) if f.name in options})


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def positive_number(unit: str = "", below: float = 1e6) -> Callable[[str], float]:
    """A flag's type: a number above 0. `unit` is named where it is not."""

    def number(text: str) -> float:
        if not 0 < (value := float(text)) < below:
            raise argparse.ArgumentTypeError(f"{text} is not a positive number{unit and f' of {unit}'}")
        return value

    return number


def seconds(text: str) -> float:
    if not 1 <= (value := float(text)) <= 7 * 86400:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 second to a week")
    return value


def device(text: str) -> str:
    """As torch writes devices; whether there is one is asked once torch is imported."""
    if not re.fullmatch(r"[a-z_]+(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like cpu, cuda or cuda:1")
    return text


TYPES: dict[str, Callable[[str], Any]] = {
    "N": positive, "K": int, "GIB": positive_number("GiB"), "S": seconds, "DEVICE": device, "LAYERS": str,
}  # fmt: skip
