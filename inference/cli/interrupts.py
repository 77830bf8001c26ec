"""Ctrl-C before a command line has begun: torch takes a second to import, and a traceback out of it helps nobody.

Imported first by what is run as a program: from then on Ctrl-C just ends it, until `heed`.
"""

import signal
import sys
from pathlib import Path


def heed() -> None:
    """From now on Ctrl-C is a KeyboardInterrupt again, unless it is ignored altogether."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_ours(program: Path) -> bool:
    return program.suffix == ".py" and program.parent == Path(__file__).resolve().parents[1]


if _is_ours(Path(sys.argv[0]).resolve()) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
