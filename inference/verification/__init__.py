"""Compares runs of one model op by op: traces at named points, their expected values, and the first that diverges."""

from verification.recorder import Recorder, record_tokens
from verification.recording import Selection
from verification.trace import RequestTrace, RunNumerics, Trace, write_trace
from verification.trace_reading import read_trace

__all__ = [
    "Recorder", "RequestTrace", "RunNumerics", "Selection", "Trace", "read_trace", "record_tokens", "write_trace",
]  # fmt: skip
