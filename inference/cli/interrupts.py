"""Ctrl-C while a command starts. The commands call this before they import anything else."""

import signal


def end_process_on_interrupt() -> None:
    """From here on Ctrl-C ends the process at once, as if by the signal, with no traceback from the middle of an
    import; unless it is ignored, as in the background, or has a handler of its own."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
