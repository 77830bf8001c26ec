"""The engine on a GPU: recorded and eager steps, drafts and both GEMMs answer alike. `make gpu` runs it; elsewhere it skips."""

from pathlib import Path

import pytest
import torch

from core.sampling_params import SamplingParams
from engine.engine import Engine
from engine.request import Request
from support.engine_runs import sums

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
GREEDY = SamplingParams(temperature=0, max_new_tokens=60)
WAYS = [{"eager": True}, {}, {"mtp": 1}, {"gemm": "bf16"}, {"mtp": 1, "gemm": "bf16"}]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def answers(**run: object) -> list[Request]:
    engine = Engine.from_pretrained(DEMO, device="cuda", max_model_len=512, **run)
    try:
        return engine.generate(sums(6), GREEDY)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What the reference's numbers give on a CPU."""
    engine = Engine.from_pretrained(DEMO, device="cpu", max_model_len=512)
    return [request.text for request in engine.generate(sums(6), GREEDY)]


@pytest.mark.parametrize("run", WAYS, ids=[" ".join(map(str, way.items())) or "recorded" for way in WAYS])
def test_the_demo_answers_alike(run: dict[str, object], expected: list[str]) -> None:
    found = answers(**run)
    assert [request.error for request in found] == [None] * len(found)
    assert [request.text for request in found] == expected
