"""How one request is answered: its sampling parameters, and their defaults from a checkpoint."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.answer_format import AnswerFormat
from core.errors import UserError
from core.files import read_json


@dataclass(frozen=True)
class SamplingParams:
    """How one request is answered; the defaults leave every option but the temperature off. Names are the field's.

    repetition_penalty divides (multiplies, if negative) the logits of tokens in prompt and answer (CTRL, arXiv
    1909.05858, section 4.1); presence_penalty and frequency_penalty are subtracted for tokens in the answer, once and
    per occurrence. logit_bias is added, and tokens that answer_format does not allow are left out. top_k, top_p and
    min_p then cut the distribution in this order; min_p drops tokens less likely than that part of the likeliest.
    """

    max_new_tokens: int = 200  # 0, where prompt_logprobs are asked for: the prompt is scored and not gone on with
    temperature: float = 0.2  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()  # texts that end the answer, themselves left out
    stop_token_ids: tuple[int, ...] = ()  # beside the end tokens
    ignore_eos: bool = False
    logprobs: int | None = None  # of each token made, with this many of the likeliest beside it
    prompt_logprobs: int | None = None
    n: int = 1  # answers to each prompt
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit), each id once
    answer_format: AnswerFormat | None = None  # what the answer is held to; needs a tokenizer

    def __post_init__(self) -> None:
        for name, ok, wanted in (
            ("max_new_tokens", self.max_new_tokens >= (self.prompt_logprobs is None), "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or a positive number"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or a positive integer"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("seed", 0 <= self.seed < 2**64, "from 0 to 2^64 - 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            ("presence_penalty", abs(self.presence_penalty) <= 100, "from -100 to 100"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 100, "from -100 to 100"),
            ("stop", all(isinstance(s, str) and s for s in self.stop) and not isinstance(self.stop, str),
             "a tuple of texts, none of them empty"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "None or at least 0"),
            ("prompt_logprobs", self.prompt_logprobs is None or self.prompt_logprobs >= 0, "None or at least 0"),
            ("n", self.n >= 1, "at least 1"),
            ("logit_bias", all(t >= 0 and abs(bias) <= 100 for t, bias in self.logit_bias),
             "token ids with numbers from -100 to 100"),
        ):  # fmt: skip
            if not ok:
                raise UserError(f"{name} is {getattr(self, name)}, expected {wanted}")
        if self.answer_format is not None:
            for name in ("stop", "stop_token_ids", "ignore_eos"):
                if getattr(self, name):
                    raise UserError(f"{name} cannot be combined with a format that the answer is held to: it would end "
                                    "the answer elsewhere")  # fmt: skip

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or biases change the logits."""
        penalises = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalises or bool(self.logit_bias)

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> "SamplingParams":
        """From what `dataclasses.asdict` makes of some, through JSON."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said.items()}
        fields["logit_bias"] = tuple((token, bias) for token, bias in said["logit_bias"])
        if said["answer_format"] is not None:
            fields["answer_format"] = AnswerFormat.from_json(said["answer_format"])
        return cls(**fields)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UserError for a token id that is not below vocab_size."""
        if (beyond := next((token for token, _ in self.logit_bias if token >= vocab_size), None)) is not None:
            raise UserError(f"logit_bias: token id {beyond} is not in the vocabulary of {vocab_size}")


def params_from_generation_config(folder: Path, **given: Any) -> SamplingParams:
    """Parameters from `given` and, for those that are missing or None there, from the checkpoint's
    generation_config.json if it has one: temperature, top_p, top_k, min_p, repetition_penalty, and do_sample false as
    temperature 0.

    Raises UserError for a value out of range, or one in the file that is not a number.
    """
    path = folder / "generation_config.json"
    released = read_json(path) if path.is_file() else {}
    chosen = {name: value for name, value in given.items() if value is not None}
    written: dict[str, Any] = {}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        value = released.get(name)
        if name == "temperature" and released.get("do_sample") is False:
            value = 0.0
        if name in chosen or value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"{path}: {name} is {value!r}, expected a number")
        if not math.isfinite(value):
            raise UserError(f"{path}: {name} is {value!r}, expected a number")
        written[name] = int(value) if name == "top_k" else float(value)
    try:
        SamplingParams(**written)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    return SamplingParams(**written, **chosen)
