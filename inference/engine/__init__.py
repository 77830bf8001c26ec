"""Answers requests with one model, several at a time.

Between a prompt and a batch there are four representations: `Request` (a prompt and its answer, on rank 0), `Sequence`
(the same as the scheduler sees it, on every rank), `Chunk` (what one step runs of a sequence) and `Batch` (the tensors
of all chunks of a step).
"""

from core.run_config import RunConfig
from core.sampling_params import SamplingParams
from engine.engine import Engine
from engine.request import Request

__all__ = ["Engine", "Request", "RunConfig", "SamplingParams"]
