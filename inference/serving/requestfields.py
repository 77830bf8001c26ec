"""The fields of an OpenAI request by name: what they are called here, and which change nothing.

One table for the .jsonl files of generate.py and for server.py. A field that would change the answer and is not
implemented is refused: to leave it out silently would be to answer something else.
"""

from collections.abc import Collection
from typing import Any

from core.errors import UserError

NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
INTEGERS = {"top_k": "top_k", "n": "n", "seed": "seed", "max_tokens": "max_new_tokens",
            "max_completion_tokens": "max_new_tokens"}  # fmt: skip
WITHOUT_EFFECT = {"model", "user", "metadata", "store", "stream", "stream_options", "service_tier",
                  "safety_identifier", "prompt_cache_key"}  # fmt: skip
OFF: dict[str, tuple] = {  # what is not implemented, with the values that do not ask for it
    "best_of": (1,), "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,), "response_format": ({"type": "text"},), "modalities": (["text"],), "suffix": ("",),
}  # fmt: skip


def effective(body: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """What of a request has an effect: its fields but for null ones, those that never have any and those that are off.
    `known` are the fields that the caller reads. Raises UserError that names a field which is not supported."""
    left: dict[str, Any] = {}
    for name, value in body.items():
        if value is None:
            continue
        if name in known:
            left[name] = value
        elif name in OFF:
            if not any(type(value) is type(off) and value == off for off in OFF[name]):
                raise UserError(f"{name} is not supported with the value {shown(value)}")
        elif name not in WITHOUT_EFFECT:
            raise UserError(f"{shown(name)[1:-1]} is not supported")
    return left


def sampling(values: dict[str, Any]) -> dict[str, Any]:
    """SamplingParams' fields from a request's numbers, of the right type each and none of them None."""
    fields = {name: float(values[name]) for name in NUMBERS if name in values}
    return fields | {INTEGERS[name]: values[name] for name in INTEGERS if name in values}  # the newer max_… comes last


def shown(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} … ({len(text)} characters)"
