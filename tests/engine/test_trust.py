"""Long forms of what the other tests check briefly; `make trust` runs them."""

import resource

import pytest
import torch
from test_engine import answers_alone, logits_of_mixes

from core.numerics import Numerics
from core.run_config import RunConfig
from core.sampling_params import SamplingParams
from engine.engine import Engine
from support.families import V3
from support.model_pairs import ours, random_checkpoint, tokens

pytestmark = pytest.mark.trust


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("trust"), V3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_mixes_bitwise(path, dtype):
    """Batch-invariant mode: one set of bits for each position over 1,000 random mixes of requests, chunks, reuse,
    preemption and speculation."""
    seen = logits_of_mixes(ours(path, Numerics(dtype, batch_invariant=True)), 1000, seed=2)
    assert all(len(bits) == 1 for places in seen.values() for bits in places if bits)


@pytest.mark.parametrize("mtp", [1, 2, 3, 4])
def test_five_hundred_prompts_with_drafts(path, mtp):
    """Greedy answers with drafts are those without, on 500 prompts, sixteen at a time, in float32."""
    model = ours(path)
    prompts = [tokens(1 + i % 90, V3["vocab_size"], seed=1000 + i) for i in range(500)]
    params = SamplingParams(temperature=0, max_new_tokens=20)
    engine = Engine(model, None, RunConfig(n_pages=64, max_model_len=256, max_num_seqs=16, mtp=mtp))
    assert [r.tokens for r in engine.generate(prompts, params)] == answers_alone(model, prompts, params)


def test_ten_thousand_requests_in_flat_memory(path):
    model = ours(path)
    engine = Engine(model, None, RunConfig(n_pages=20, max_model_len=256, max_num_seqs=16, mtp=1))
    params = SamplingParams(temperature=0, max_new_tokens=2)

    def thousand(seed: int) -> int:
        engine.generate([tokens(1 + i % 7, V3["vocab_size"], seed=seed * 1000 + i) for i in range(1000)], params)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    early = [thousand(seed) for seed in range(2)][-1]
    late = [thousand(seed) for seed in range(2, 10)][-1]
    assert late - early < 20_000, "peak memory grew by more than 20 MB over 8,000 requests"
    engine.scheduler.check_integrity()
    assert engine.scheduler.pool.n_available == 20 and not engine.registry.live and not engine._sequences
