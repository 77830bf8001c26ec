"""Fields that clients send and that change no answer: accepted without being implemented.

`IGNORED` change none whatever their value is. `OFF` change none with the values listed, which ask for what is done
anyway; any other value is refused by name. Both are looked at only for names that the schema itself does not have.
"""

from typing import Any

# Notes of providers and frameworks that come back with an answer, or are for a cache or a log.
_NOTES = frozenset(
    {"cache_control", "id", "index", "metadata", "provider_options", "provider_specific_fields", "status"}
)  # fmt: skip

IGNORED: dict[str, frozenset[str]] = {
    "body": frozenset(
        {"metadata", "priority", "prompt_cache_key", "prompt_cache_retention", "request_id", "safety_identifier",
         "service_tier", "store", "user"}
    ),
    # An answer comes back as it was parsed, with what its framework keeps beside it; reasoning's text is read by name.
    "message": _NOTES
    | {"additional_kwargs", "annotations", "created", "created_at", "example", "model", "parsed", "reasoning_details",
       "response_metadata", "signature", "thinking_blocks", "timestamp", "usage", "usage_metadata"},
    "part": _NOTES | {"annotations", "citations", "extras", "logprobs"},
    "call": _NOTES | {"extra_content", "parsed_arguments", "signature", "thought_signature"},
    "tool": _NOTES,
    "stream_options": frozenset({"include_obfuscation"}),
}  # fmt: skip

OFF: dict[str, dict[str, tuple[Any, ...]]] = {
    "body": {
        "add_generation_prompt": (True,),
        "allowed_token_ids": ([],),
        "audio": ({},),
        "bad_words": ([],),
        "best_of": (1,),
        "clear_thinking": (True,),
        "continue_final_message": (False,),
        "documents": ([],),
        "early_stopping": (False,),
        "echo": (False,),
        "enable_thinking": (False,),  # of completions
        "extra_body": ({},),
        "function_call": ("none", "auto", {}),
        "functions": ([],),
        "ignore_eos": (False,),
        "include_reasoning": (True,),
        "include_stop_str_in_output": (False,),
        "length_penalty": (1,),
        "min_tokens": (0,),
        "modalities": (["text"],),
        "models": ([],),
        "parallel_tool_calls": (True,),
        "plugins": ([],),
        "provider": ({},),
        "reasoning": ({},),
        "response_format": ({"type": "text"}, {}),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "separate_reasoning": (True,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "stop_token_ids": ([],),
        "stream_reasoning": (True,),
        "suffix": ("",),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_a": (0,),
        "top_logprobs": (0,),
        "transforms": ([],),
        "typical_p": (1,),
        "use_beam_search": (False,),
        "verbosity": ("medium",),
        "web_search_options": ({},),
    },
    "message": {"audio": ({},), "function_call": ({},), "refusal": ("",)},
    "part": {},
    "call": {},
    "tool": {"strict": (False,), "returns": ({},), "defer_loading": (False,)},
    "stream_options": {"continuous_usage_stats": (False,)},
}
OFF_NAMES = frozenset(name for values in OFF.values() for name in values)


def changes_nothing(kind: str, name: str, value: Any) -> bool:
    """Whether an object of this kind means the same without the field."""
    return name in IGNORED[kind] or any(_same(value, off) for off in OFF[kind].get(name, ()))


def _same(value: Any, off: Any) -> bool:
    """Equal as JSON values: 1 is 1.0, and neither is true."""
    if isinstance(off, int) and not isinstance(off, bool):
        return isinstance(value, int | float) and not isinstance(value, bool) and value == off
    return type(value) is type(off) and value == off
