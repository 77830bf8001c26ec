"""The runs that verify.py compares: this engine's, transformers', another program's, and the exact computation."""

from pathlib import Path

import torch

from core.errors import UserError
from core.sampling_params import SamplingParams
from engine.engine import Engine
from engine.request import encode
from text.tokenizer import Tokenizer
from verification.engine_trace import EngineTrace
from verification.expected import exact_run
from verification.recording import Selection
from verification.trace import Trace
from verification.trace_reading import check_shapes, read_trace
from verification.weights import Weights

NAMES = ("exact", "transformers")


def prompt_ids(path: str | Path, prompt: str | None, n: int, vocabulary: int | None = None) -> list[int]:
    """The token ids of a text, or n ids that look random and are the same everywhere. Raises UserError."""
    if prompt is None:
        if vocabulary is None:
            vocabulary = Weights(path).args.vocab_size
        return [(i * 2654435761 + 12345) % (1 << 32) % vocabulary for i in range(1, n + 1)]
    vocabulary = vocabulary or Weights(path).args.vocab_size
    ids = encode(prompt, Tokenizer(path, vocabulary), vocabulary, None)
    if not ids:
        raise UserError("the prompt is empty")
    return ids


def record_engine(engine: Engine, folder: str | Path, prompt: list[int] | None, n: int) -> None:
    """Writes the trace of an engine that answers a prompt greedily with n tokens, on every rank. The engine is closed.
    `prompt`: on rank 0."""
    with EngineTrace(engine, folder, Selection(), "this engine"):
        if engine.world.rank > 0:
            engine.serve()
            return
        assert prompt is not None
        [request] = engine.generate([prompt], SamplingParams(temperature=0, max_new_tokens=n))
        engine.close()
        if request.error:
            raise UserError(request.error)


def open_side(name: str, weights: Weights, prompt: str | None, n: int, like: Trace | None = None) -> Trace:
    """A side's trace. `like`: another side's, whose tokens it is to compute; else those of the prompt. Raises
    UserError."""
    if name not in NAMES:
        if name in ("engine", "none"):
            raise UserError(f"--against {name}: expected exact, none, transformers or a directory")
        trace = read_trace(name)
        check_shapes(trace, weights.args, name)
        return trace
    if like is None:
        tokens = [prompt_ids(weights.path, prompt, n, weights.args.vocab_size)]
    else:
        tokens = [request.tokens.tolist() for request in like.requests]
    if name == "exact":
        requests = [exact_run(weights, torch.tensor(ids)) for ids in tokens]
    else:
        from verification.transformers_run import transformers_trace

        traces = [transformers_trace(weights.path, ids) for ids in tokens]
        requests, first = [trace.requests[0] for trace in traces], traces[0]
    for i, request in enumerate(requests):
        request.name = like.requests[i].name if like else str(i)
    if name == "exact":
        return Trace(requests, program=name)
    return Trace(requests, first.numerics, first.rope_layout, first.program)
