"""Sampling: what is cut, what is penalised, and that drafts leave no trace in the distribution."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core.errors import UserError
from core.sampling_params import SamplingParams, params_from_generation_config
from engine.noise import ACCEPT, DRAFT, SAMPLE, Noise, uniform
from engine.penalties import penalised
from engine.sampling import is_finite, logprob, propose, verify
from engine.sampling_state import Draft, SamplingState
from ops.distributions import Columns, draw, probabilities

LIMIT = {1: 6.6, 2: 9.2, 3: 11.3, 4: 13.3, 5: 15.1, 6: 16.8, 7: 18.5, 8: 20.1, 9: 21.7, 10: 23.2, 11: 24.7}  # p = 0.01


def passes_chi_square(drawn: list[int], p: torch.Tensor) -> bool:
    """At p = 0.01, outcomes expected fewer than ten times taken together."""
    counts = torch.bincount(torch.tensor(drawn, dtype=torch.int64), minlength=len(p)).double()
    assert counts[p == 0].sum() == 0, "a token of probability 0 was drawn"
    expected = p * len(drawn)
    rare = expected < 10
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    if expected[-1] < 5:
        counts, expected = counts[:-1], expected[:-1]
    return float(((counts - expected) ** 2 / expected).sum()) < LIMIT[len(expected) - 1]


def test_drawn_frequencies():
    """Against the softmax, and a control: noise that is not uniform must fail."""
    p = (torch.randn(12, generator=torch.Generator().manual_seed(0)) * 2).double().softmax(-1)
    noise = [uniform(0, request, 3) for request in range(30_000)]
    every = p.expand(len(noise), -1).contiguous()
    assert passes_chi_square(draw(every, noise).tolist(), p)
    assert not passes_chi_square(draw(every, [u * 0.97 for u in noise]).tolist(), p)


# --- speculation -----------------------------------------------------------------------------------------------------


def unlike(seed: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (3, 9) of a target, and of a proposal that often disagrees."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(3, 9, generator=g) * 1.5
    return target, target + torch.randn(3, 9, generator=g)


def speculate(target, proposal, params, n, drafts, told=None):
    """n answers of at most drafts + 1 tokens, verified: the tokens of the first and of the second position.

    target, proposal (drafts + 1, V): logits by position, the same whatever came before. `told`: what the verifier is
    made to believe the drafts were drawn from.
    """
    first, second = [], []
    for start in range(0, n, 100):  # a hundred requests in one batch
        asks = [SamplingState(params, request, [0] * 5, 5) for request in range(start, start + 100)]
        for row in proposal[:drafts]:
            propose(row.expand(len(asks), -1), asks)
        for ask in asks if told is not None else ():
            ask.draft.q = [told] * drafts
        for made in verify(target[: drafts + 1].repeat(len(asks), 1), asks):
            first.append(made[0])
            second += made[1:2]
    return first, second


def verify_one(logits, params, tokens=(0,), n_prompt=1, draft=None, request=0):
    """One request's tokens, judged by itself."""
    [made] = verify(logits, [SamplingState(params, request, list(tokens), n_prompt, draft or Draft())])
    return made


def distribution(logits, params):
    return probabilities(penalised(logits, params, [], 0)[None], [params])[0]


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 6, "top_p": 0.9, "temperature": 1.5},
     {"logit_bias": ((0, 1.5), (4, -2.0), (7, -100.0)), "top_k": 8}],
    ids=str,
)
def test_verified_tokens_are_distributed_as_sampled_ones(how):
    """Chi-square at both positions."""
    target, proposal = unlike()
    params = SamplingParams(**{"temperature": 1.0, "seed": 20, **how})
    first, second = speculate(target, proposal, params, 8_000, drafts=2)
    assert passes_chi_square(first, distribution(target[0], params))
    assert 2000 < len(second) < 7_900
    assert passes_chi_square(second, distribution(target[1], params))


def test_greedy_drafts_are_lossless_for_sampled_answers_too():
    """A draft that was not drawn but chosen (q None) is accepted with the target's probability of it."""
    target, proposal = unlike()
    params = SamplingParams(temperature=1.0, seed=7)
    best = proposal.argmax(-1).tolist()
    asks = [SamplingState(params, i, [0], 1, Draft(best[:2], [None, None])) for i in range(8_000)]
    made = verify(target.repeat(len(asks), 1), asks)
    assert passes_chi_square([m[0] for m in made], distribution(target[0], params))


def test_a_biased_verifier_is_noticed():
    """The control: a verifier told a wrong proposal distribution must fail the test."""
    target, proposal = unlike()
    params = SamplingParams(temperature=1.0, seed=7)
    flat = torch.full((9,), 1 / 9, dtype=torch.float64)
    first, _ = speculate(target, proposal, params, 8_000, drafts=2, told=flat)
    assert not passes_chi_square(first, distribution(target[0], params))


def test_a_proposal_like_the_target_is_always_accepted():
    target = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=3)
    for request in range(200):
        ask = SamplingState(params, request, [1], 1)
        for row in target[:3]:
            propose(row[None], [ask])
        [made] = verify(target, [ask])
        assert made[:3] == ask.draft.tokens and len(made) == 4


def test_greedy_verification():
    logits = torch.tensor([[0.0, 3, 1], [2, 0, 1], [0, 1, 5]])
    greedy = SamplingParams(temperature=0)

    def made(*drafts):
        n = len(drafts) + 1
        return verify_one(logits[:n], greedy, draft=Draft(list(drafts), [None] * len(drafts)))

    assert made(1, 0) == [1, 0, 2]
    assert made(1, 2) == [1, 0]
    assert made(2, 0) == [1]


def test_penalties_count_accepted_drafts():
    """Greedy with a presence penalty: the second of two equal drafts is judged with the first already said."""
    logits = torch.tensor([[0.0, 3.0, 2.5]] * 3)
    params = SamplingParams(temperature=0, presence_penalty=1.0)
    draft = Draft([1, 1], [None, None])
    assert verify_one(logits, params, draft=draft) == [1, 2]
    plain = []
    for _ in range(3):
        plain += verify_one(logits[:1], params, [0, *plain])
    assert plain[:2] == [1, 2]


def test_a_broken_draft_head_costs_only_time():
    ask = SamplingState(SamplingParams(temperature=1.0), 0, [1], 1)
    propose(torch.full((1, 5), float("nan")), [ask])
    assert 0 <= ask.draft.tokens[0] < 5
    assert verify(torch.randn(2, 5), [ask])[0] is not None


def test_other_requests_change_nothing():
    """Greedy and sampled requests with and without drafts, penalties and cuts, one unsound: each gets in one batch what
    it gets alone."""
    g = torch.Generator().manual_seed(3)
    kinds = [
        SamplingParams(temperature=0), SamplingParams(temperature=0, presence_penalty=0.7),
        SamplingParams(temperature=1.3, seed=2), SamplingParams(temperature=0.9, top_p=0.7),
        SamplingParams(temperature=1.0, top_k=4, repetition_penalty=1.4), SamplingParams(temperature=0.8, min_p=0.2),
    ]  # fmt: skip

    def ask(n: int) -> SamplingState:
        made = SamplingState(kinds[n % len(kinds)], n, [n % 7, 3], 1)
        for row in drafted[n]:
            propose(row[None], [made])
        return made

    drafted = [torch.randn(n % 4, 11, generator=g) for n in range(90)]
    logits = [torch.randn(n % 4 + 1, 11, generator=g) for n in range(90)]
    for rows, near in zip(logits, drafted, strict=True):
        rows[:-1] = near + 0.3 * rows[:-1]
    logits[50][1, 4] = float("nan")
    together = verify(torch.cat(logits), [ask(n) for n in range(90)])
    assert together == [verify(rows, [ask(n)])[0] for n, rows in enumerate(logits)]
    assert together[50] is None and sum(made is None for made in together) == 1
    assert {len(made) for made in together if made} == {1, 2, 3, 4}


# --- the distribution ------------------------------------------------------------------------------------------------


def test_cuts():
    logits = torch.log(torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15]))

    def kept(**how):
        p = distribution(logits, SamplingParams(temperature=1, **how))
        assert p.sum().item() == pytest.approx(1)
        return {i: round(v, 4) for i, v in enumerate(p.tolist()) if v}

    assert kept(top_k=2) == {1: round(4 / 7, 4), 3: round(3 / 7, 4)}
    assert set(kept(top_p=0.69)) == {1, 3} and set(kept(top_p=0.71)) == {1, 3, 4}
    assert set(kept(top_p=1e-9)) == {1} and len(kept(top_k=99)) == 5
    assert set(kept(top_k=3, top_p=0.8)) == {1, 3}  # top-p of what top-k left: 0.7 / 0.85
    assert set(kept(min_p=0.3)) == {1, 3, 4} and set(kept(min_p=0.5)) == {1, 3} and set(kept(min_p=1.0)) == {1}
    assert kept() == {0: 0.05, 1: 0.4, 2: 0.1, 3: 0.3, 4: 0.15}


def cut_by_sorting(logits, params):
    """The cuts written a second way: rank every token, go down the list, stop at the first that fails."""
    p = (logits.double() / params.temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[: params.top_k or None]
    total, so_far, kept = sum(p[i] for i in order), 0.0, []
    for i in order:
        if (params.top_p < 1 and so_far >= params.top_p * total) or p[i] < params.min_p * p[order[0]]:
            break
        kept.append(i)
        so_far += p[i]
    return [p[i] / so_far if i in set(kept) else 0.0 for i in range(len(p))]


@pytest.mark.parametrize("spread", [0.3, 1.0, 6.0])
@pytest.mark.parametrize(
    "how",
    [{"top_p": 0.6}, {"top_p": 0.999}, {"min_p": 0.05}, {"top_k": 40}, {"top_k": 1500, "top_p": 0.9}, {"top_k": 9, "min_p": 0.3}],
    ids=str,
)
def test_cuts_of_a_large_vocabulary(spread, how):
    """More tokens than are ranked at first; flat distributions keep thousands, steep ones a few; ties keep the first."""
    logits = (torch.randn(3, 3000, generator=torch.Generator().manual_seed(1)) * spread * 8).round() / 8
    params = SamplingParams(temperature=0.9, **how)
    found = probabilities(logits, [params] * 3)
    for row, p in zip(logits, found, strict=True):
        assert torch.allclose(p, torch.tensor(cut_by_sorting(row, params), dtype=torch.float64), rtol=1e-9, atol=1e-15)


class Operations(TorchDispatchMode):
    """Counts torch's operations that make something: each is a launch on a GPU."""

    n = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
        self.n += not is_view
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("how, most", [
    ({}, 6), ({"top_p": 0.9}, 28), ({"top_k": 5}, 34), ({"min_p": 0.1}, 27), ({"top_k": 5, "top_p": 0.9, "min_p": 0.1}, 41),
])  # fmt: skip
def test_what_no_row_asks_for_costs_no_launch(how, most):
    params = [SamplingParams(temperature=0.7, **how)] * 3
    logits = torch.randn(3, 300)
    columns = Columns.of(params, 300, logits.device)
    with Operations() as counted:
        p = probabilities(logits, params, columns)
    assert counted.n <= most
    mixed = [*params, SamplingParams(temperature=0), SamplingParams(temperature=1, top_k=3, top_p=0.5, min_p=0.2)]
    assert torch.equal(probabilities(torch.cat((logits, logits[:2])), mixed)[:3], p)


def test_temperature():
    logits = torch.tensor([1.0, 2.0, 0.0])
    hot = distribution(logits, SamplingParams(temperature=2.0))
    assert torch.allclose(hot, (logits.double() / 2).softmax(-1))
    assert distribution(logits, SamplingParams(temperature=0)).tolist() == [0, 1, 0]
    assert distribution(torch.tensor([2.0, 2.0]), SamplingParams(temperature=0)).tolist() == [1, 0]


def test_a_tiny_temperature_is_greedy():
    logits = torch.tensor([900.0, 900.5, -900.0])
    assert distribution(logits, SamplingParams(temperature=1e-308)).tolist() == [0, 1, 0]


def test_released_defaults(tmp_path):
    assert params_from_generation_config(tmp_path) == SamplingParams()
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95, "top_k": 40, "eos_token_id": 1}')
    assert params_from_generation_config(tmp_path, top_p=None) == SamplingParams(temperature=0.6, top_p=0.95, top_k=40)
    assert params_from_generation_config(tmp_path, top_p=0.5, temperature=0.0).top_p == 0.5
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false}')
    assert params_from_generation_config(tmp_path).temperature == 0
    (tmp_path / "generation_config.json").write_text('{"top_k": "many"}')
    with pytest.raises(UserError, match="top_k is 'many', expected a number"):
        params_from_generation_config(tmp_path)


def test_penalties():
    logits = torch.tensor([2.0, -2.0, 1.0, 1.0])
    tokens, n_prompt = [0, 1, 2, 2, 3], 2  # answer: 2, 2, 3
    assert penalised(logits, SamplingParams(repetition_penalty=2.0), tokens[:2], 2).tolist() == [1, -4, 1, 1]
    assert penalised(logits, SamplingParams(presence_penalty=0.5), tokens, n_prompt).tolist() == [2, -2, 0.5, 0.5]
    assert penalised(logits, SamplingParams(frequency_penalty=0.5), tokens, n_prompt).tolist() == [2, -2, 0, 0.5]
    assert logits.tolist() == [2, -2, 1, 1], "the logits were changed in place"


def test_biases():
    """Added once to each token named, before cuts and for drafts too; -100 bans, 100 selects."""
    logits = torch.tensor([[0.0, 3.0, 2.5], [0.0, 3.0, 2.5]])
    biased = SamplingParams(temperature=0, logit_bias=((1, -1.0), (0, 0.5)))
    assert penalised(logits[0], biased, [1, 1], 0).tolist() == [0.5, 2.0, 2.5] and logits[0, 1] == 3
    assert verify_one(logits, biased, draft=Draft([2], [None])) == [2, 2]
    assert verify_one(logits, biased, draft=Draft([1], [None])) == [2]
    for bias, kept in ((((1, -100.0), (2, -100.0)), 0), (((0, 100.0),), 0), (((2, 100.0),), 2)):
        p = distribution(logits[0], SamplingParams(temperature=1.0, logit_bias=bias))
        assert p[kept] > 1 - 1e-9


def test_repetition_penalty_is_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(50, generator=torch.Generator().manual_seed(2))
    tokens = [3, 3, 9, 40]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([tokens]), logits[None].clone())[0]
    assert torch.equal(penalised(logits, SamplingParams(repetition_penalty=1.3), tokens, 2), expected)


def test_extreme_rows():
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor([[0.0, nan], [inf, 0.0], [1e30, -1e30], [-inf, 3.0], [-inf, -inf]])
    assert is_finite(rows).tolist() == [False, False, True, True, False]
    for params in (SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9)):
        assert verify_one(rows[:1], params) is None and verify_one(rows[-1:], params) is None
    for row in rows[2:4]:
        for temperature in (0.0, 1.0):
            [token] = verify_one(row[None], SamplingParams(temperature=temperature))
            assert token == int(row.argmax())


def test_draws_at_the_borders():
    """The least noise and the greatest draw no token of probability 0."""
    p = torch.tensor([[0.0, 0.5, 0.5, 0.0]], dtype=torch.float64)
    assert [draw(p, [noise]).item() for noise in (0.0, 0.5, 1 - 2**-53)] == [1, 2, 2]


def test_logprobs():
    logits = torch.tensor([0.0, 2.0, 1.0])
    expected = logits.double().log_softmax(-1)
    found = logprob(logits, 0, 2)
    assert found.token == 0 and found.logprob == pytest.approx(expected[0].item())
    assert [token for token, _ in found.top] == [1, 2] and found.top[0][1] == pytest.approx(expected[1].item())
    assert logprob(logits, 1, 0).top == () and len(logprob(logits, 1, 9).top) == 3


def test_noise_made_ahead_is_the_same_noise():
    """In any order, of one to three positions at a time that go on, go back and leap, for more requests than are kept."""
    draw, noise = random.Random(0), Noise()
    noise.KEPT = 50
    requests = {(draw.getrandbits(64), draw.getrandbits(50)): draw.getrandbits(20) for _ in range(60)}
    for _ in range(40):
        chosen = draw.sample(list(requests), draw.randint(1, 40))
        for request in chosen:
            requests[request] = max(0, requests[request] + draw.choice([1, 1, 1, 3, 20, -2, 200]))
        counts = [draw.randint(1, 3) for _ in [*chosen, 0]]
        wanted = [*((*request, requests[request]) for request in chosen), (*chosen[0], 7)]  # one twice
        for use in (SAMPLE, DRAFT, ACCEPT):
            first, known = noise.ahead(wanted, counts, use)
            for (*request, position), n, at, row in zip(wanted, counts, first.tolist(), known, strict=True):
                begin = position - at
                assert row[begin : begin + n].tolist() == [uniform(*request, position + i, use) for i in range(n)]
    assert len(noise._known) < 3 * 60


def test_noise_is_a_function_of_its_numbers():
    numbers = [(s, r, p, u) for s in (0, 1, 2**64 - 1) for r in range(5) for p in range(5) for u in (SAMPLE, DRAFT, ACCEPT)]
    draws = {uniform(*n) for n in numbers}
    assert len(draws) == len(numbers) and all(0 <= d < 1 for d in draws)
    assert uniform(1, 2, 3) == uniform(1, 2, 3)


@pytest.mark.parametrize(
    "how, says",
    [
        ({"temperature": -1.0}, "temperature is -1.0, expected 0 or a positive number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0, expected above 0 and at most 1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.5}, "min_p is 1.5, expected from 0 to 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected from 0.01 to 100"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf"),
        ({"stop": ("",)}, "expected a tuple of texts, none of them empty"),
        ({"stop": "end"}, "expected a tuple of texts"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"n": 0}, "n is 0, expected at least 1"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias is ((1, 101.0),), expected token ids with numbers from -100 to 100"),
        ({"logit_bias": ((-1, 1.0),)}, "expected token ids with numbers from -100 to 100"),
    ],
)
def test_bad_parameters(how, says):
    with pytest.raises(UserError) as e:
        SamplingParams(**how)
    assert says in str(e.value)
