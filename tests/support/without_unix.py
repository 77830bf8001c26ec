"""generate.py as on a system that is no Unix, as far as that can be had on one: without_unix.py FLAGS…

Modules and functions that Windows' Python lacks are not there, and neither are Linux's /proc and /sys.
"""

import builtins
import io
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODULES = ("fcntl", "grp", "pty", "pwd", "readline", "resource", "termios", "tty")
FUNCTIONS = (
    "O_CLOEXEC", "O_DIRECTORY", "O_NONBLOCK", "fork", "geteuid", "getuid", "killpg", "posix_fadvise", "pread", "preadv",
    "sched_getaffinity", "set_blocking", "setsid", "statvfs", "sysconf",
)  # fmt: skip
SIGNALS = ("SIGCONT", "SIGHUP", "SIGKILL", "SIGSTOP", "SIGTSTP")


def hiding(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return function(path, *args, **kwargs)

    return call


for name in MODULES:
    sys.modules[name] = None  # type: ignore[assignment]
for place, names in ((os, FUNCTIONS), (signal, SIGNALS)):
    for name in names:
        if hasattr(place, name):
            delattr(place, name)
builtins.open = io.open = hiding(open)
os.open, os.stat = hiding(os.open), hiding(os.stat)

script = Path(__file__).parents[2] / "inference" / "generate.py"
sys.argv[0] = str(script)
sys.path.insert(0, str(script.parent))
runpy.run_path(str(script), run_name="__main__")
