"""What tests of engines over lanes, stages and recorded graphs share: prompts, parameters, a stand-in for CUDA graphs."""

import random
from collections.abc import Callable
from typing import Any

import torch

from core.sampling_params import SamplingParams
from engine.engine import Engine
from engine.request import Request
from support.families import V3
from support.model_pairs import tokens

VOCABULARY = V3["vocab_size"]


def questions(n: int, seed: int = 0, most: int = 150) -> list[list[int]]:
    """Prompts of 1 to `most` tokens."""
    draw = random.Random(seed)
    return [tokens(draw.randint(1, most), VOCABULARY, seed * 1000 + i) for i in range(n)]


def greedy(n: int = 12, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_new_tokens=n, **more)


def sums(n: int) -> list[list[dict[str, str]]]:
    """Questions that the demo answers."""
    return [[{"role": "user", "content": f"What is {a} + {a + 281}?"}] for a in range(300, 300 + 12 * n, 12)]


def come_and_go(engine: Engine, prompts: list[list[int]], draw: random.Random) -> list[Request]:
    """The requests of all prompts, added, and some cancelled, at random moments. Nothing may be lost at any."""
    waiting, requests = list(enumerate(prompts)), []
    while waiting or engine.busy:
        for _ in range(min(draw.choice((0, 0, 1, 4)), len(waiting))):
            i, prompt = waiting.pop()
            requests.append(engine.add(prompt, greedy(10), i))
        if requests and draw.random() < 0.3:
            engine.cancel(draw.choice(requests))
        engine.step()
        for scheduler in engine.microbatches.schedulers:
            scheduler.check_integrity()
    return requests


class Recorder:
    """Stands in for CUDA's capture: "replays" by running again what was recorded, on whatever its buffers then hold."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.recorded += 1
        run()  # as a capture would

        def replay() -> torch.Tensor:
            self.replayed += 1
            return run()

        return replay


class Recorders(list[Recorder]):
    """A recorder for each rank that asks for one."""

    def make(self) -> Recorder:
        self.append(Recorder())
        return self[-1]
