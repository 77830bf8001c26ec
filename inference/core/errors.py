"""Errors that a user can correct, warnings, and one-line descriptions of all other errors."""

import sys
import traceback
from pathlib import Path


class UserError(Exception):
    """A mistake in a command, a prompt or a checkpoint. Commands print it as `error: …` and exit with status 2."""


class CheckpointError(UserError):
    """What is wrong with a checkpoint: the text is one line for people, the attributes are for programs."""

    def __init__(self, text: str, file: object = None, tensor: str = "", expected: object = None, found: object = None):
        super().__init__(text)
        self.file, self.tensor, self.expected, self.found = file, tensor, expected, found


class CheckWarning(CheckpointError):
    """Something about a checkpoint that is worth knowing and no fault."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no more is known")


def describe(error: BaseException) -> str:
    """One line: a UserError's text, or any other error's type and text and the place that raised it."""
    if isinstance(error, UserError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line(error)} ({Path(place.filename).name}, line {place.lineno})"


def warn(text: str) -> None:
    """Prints a warning to stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
