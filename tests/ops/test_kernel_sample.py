"""Sampling in one launch against the reference: the same token wherever the draw is not within a rounding of two.

A weight of the kernel is off by some 2**-22 of itself, and a share of a distribution by no more, so a token is right if
the uniform number lies in its part of the reference's cumulative distribution, widened by NEAR.
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from core.sampling_params import SamplingParams
from ops import distributions
from ops.distributions import Field, SamplingMetadata, fields_of, probabilities
from support.kernel_launches import only_listed_launches

pytest.importorskip("triton")
from test_kernel import DEVICE, guarded, poisoned
from test_kernel import seeded as seeded

from ops.gpu import sample
from ops.gpu.backend import GpuBackend

__all__ = ["poisoned", "seeded"]  # fixtures, for every test here

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes in numpy
NEAR = 1e-5
LEAST, GREATEST = 0.0, 1 - 2**-53
Drafts = list[tuple[int, Any]]  # of each row the next draft, -1 for none, and what it was drawn from


SMALL = dict.fromkeys(sample.TILES, (64, 8, 2, 4))  # several blocks of tokens, and a ragged one, in a small vocabulary


def choice_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.stack((logits.amax(-1).isfinite().long(), logits.argmax(-1)))


def metadata_of(
    params: list[SamplingParams], vocab: int, uniforms: Any, drafts: Drafts = (), accept: Any = 0.0
) -> SamplingMetadata:
    table = np.zeros((len(Field), len(params)))
    table[Field.ROW] = np.arange(len(params))
    table[Field.TEMPERATURE : Field.UNIFORM] = np.array([fields_of(one, vocab) for one in params]).T
    table[Field.UNIFORM], table[Field.ACCEPT] = uniforms, accept
    table[Field.DRAFT] = [x for x, _ in drafts] if drafts else -1
    return SamplingMetadata(table, params, [q for _, q in drafts])


def run(logits: torch.Tensor, metadata: SamplingMetadata, keep: bool = False) -> tuple[torch.Tensor, Any]:
    """The kernel's, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        if logits.shape[1] < 1000:
            patch.setattr(sample, "TILES", SMALL)
        found, kept = GpuBackend().sample(guarded(logits), choice_of(logits).to(DEVICE), metadata, keep)
    return found.cpu(), kept


def in_its_part(p: torch.Tensor, uniform: float, token: int) -> bool:
    """Whether a token (of possible ones) is drawn from p (V,) by a number in [0, 1)."""
    whole, end = float(p.sum()), float(p[: token + 1].sum())
    return bool(p[token] > 0) and end - float(p[token]) - NEAR * whole <= uniform * whole <= end + NEAR * whole


def assert_drawn(logits: torch.Tensor, params: list[SamplingParams], uniforms: Any) -> None:
    metadata = metadata_of(params, logits.shape[1], uniforms)
    (finite, accepted, tokens), _ = run(logits, metadata)
    assert finite.all() and not accepted.any()
    for n, (p, token) in enumerate(zip(probabilities(logits, params), tokens.tolist(), strict=True)):
        assert in_its_part(p, metadata.table[Field.UNIFORM, n], token), (n, params[n], token)


KINDS = [
    SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in itertools.product((1e-6, 0.7, 30.0), (0, 5, 37), (1.0, 0.9, 0.3), (0.0, 0.1))
] + [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, top_k=1, top_p=0.9, min_p=1.0)]


def some_uniforms(n: int) -> np.ndarray:
    """Of both ends and between."""
    return np.choose(np.random.default_rng(1).integers(4, size=n), (LEAST, GREATEST, *torch.rand(2, n).numpy()))


@pytest.mark.parametrize("vocab, steps", [(7, None), (7, 2), (150, None), (150, 2)])
def test_every_combination_is_the_reference(vocab: int, steps: int | None) -> None:
    """Ties too, where logits are multiples of 1 / steps, and tokens that a mask left out."""
    logits = torch.randn(len(KINDS), vocab) * 3
    if steps:
        logits = (logits * steps).round() / steps
    logits[torch.rand(logits.shape) < 0.2] = -torch.inf
    logits[:, 3] = 0.5
    assert_drawn(logits, KINDS, some_uniforms(len(KINDS)))


SHAPES = {
    "all equal": torch.full((101,), 2.5),
    "one above": torch.full((100,), -9.0).index_fill(0, torch.tensor(70), 9.0),
    "all but one left out": torch.full((100,), -torch.inf).index_fill(0, torch.tensor(70), 9.0),
    "two equal peaks": torch.full((100,), -1.0).index_fill(0, torch.tensor([30, 99]), 4.0),
    "as far as they go": torch.tensor([3e38, -3e38, 0.0, 1e38]).repeat(25),
    "zeros of both signs": torch.tensor([0.0, -0.0, -1.0, 0.0]).repeat(25),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_extreme_rows(shape: str) -> None:
    """Every way to cut them."""
    assert_drawn(SHAPES[shape].expand(len(KINDS), -1).contiguous(), KINDS, some_uniforms(len(KINDS)))


def test_tokens_are_ranked_by_logits() -> None:
    """Also where logits are of all sizes, and their probabilities, to float64, the same."""
    logits = torch.logspace(-38, 0, 100) * torch.tensor([1.0, -1.0]).repeat(50)
    for params in (SamplingParams(temperature=30.0, top_k=60), SamplingParams(temperature=30.0, top_p=0.595)):
        metadata = metadata_of([params] * 61, 100, np.linspace(0, 1, 62)[:61])
        (_, _, tokens), _ = run(logits.expand(61, -1).contiguous(), metadata)
        assert sorted(set(tokens.tolist())) == sorted(logits.topk(60).indices.tolist())


@pytest.mark.parametrize("temperature", [1e-308, 1e-30, 1e30, 1e300])
def test_temperatures_of_any_size(temperature: float) -> None:
    for values in ([1.0, 2.0, -torch.inf, 2.0, 0.0], [1.0, 2.0, -torch.inf, 2.0, 0.0, 1.0]):
        logits = torch.tensor([values]).repeat(5, 1)
        assert_drawn(logits, [SamplingParams(temperature=temperature)] * 5, np.linspace(0, 0.99, 5))


def test_rows_that_are_not_finite_end() -> None:
    """And are said to be; where they are kept, they are drawn from as if all their logits were equal."""
    bad = torch.tensor([[0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3, [math.nan] * 3, [0.0, 1.0, 2.0]])
    params = [SamplingParams(temperature=0.7, top_k=2, top_p=0.8, min_p=0.1)] * 5
    (finite, _, tokens), _ = run(bad, metadata_of(params, 3, 0.5))
    assert finite.tolist() == [0, 0, 0, 0, 1] and (tokens >= 0).all() and (tokens < 3).all()
    (_, _, tokens), kept = run(bad, metadata_of(params, 3, GREATEST), keep=True)
    assert tokens.tolist() == [1, 1, 1, 1, 2]
    assert all(q[n].cpu().tolist() == [0.5, 0.5, 0] for q, n in kept[:4])


def test_uniform_numbers_side_by_side_draw_by_the_distribution() -> None:
    """Of 200 of them each token gets its share, to a draw: exact, where chi-square would allow much."""
    logits, params = torch.randn(9) * 1.5, SamplingParams(temperature=0.8, top_k=7, top_p=0.97)
    metadata = metadata_of([params] * 200, 9, (np.arange(200) + 0.5) / 200)
    (_, _, tokens), _ = run(logits.expand(200, -1).contiguous(), metadata)
    expected = 200 * probabilities(logits[None], [params])[0]
    assert (expected > 0).sum() > 4
    assert ((torch.bincount(tokens, minlength=9) - expected).abs() <= 1 + 1e-3).all()


# --- drafts ----------------------------------------------------------------------------------------------------------

SOME = [
    SamplingParams(temperature=0.7), SamplingParams(temperature=0.7, top_p=0.9), SamplingParams(temperature=1.3, top_k=9),
    SamplingParams(temperature=1.0, min_p=0.05), SamplingParams(temperature=0.9, top_k=20, top_p=0.8, min_p=0.02),
]  # fmt: skip


def proposed(logits: torch.Tensor, params: list[SamplingParams]) -> Drafts:
    """The kernel's drafts, each with what it keeps."""
    (_, _, tokens), kept = run(logits, metadata_of(params, logits.shape[1], torch.rand(len(params)).numpy()), keep=True)
    return list(zip(tokens.tolist(), kept, strict=True))


def test_proposals_are_kept_with_what_they_were_drawn_from() -> None:
    logits = torch.randn(40, 150) * 2
    params = SOME * 8
    for p, (token, (q, n)) in zip(probabilities(logits, params), proposed(logits, params), strict=True):
        row = q[n].cpu().double()
        assert torch.equal(row > 0, p > 0) and row[token] > 0
        assert torch.allclose(row, p, rtol=NEAR, atol=1e-9) and float(row.sum()) == pytest.approx(1, abs=NEAR)


def test_drafts_are_verified_as_the_reference_does() -> None:
    """Drawn from what is near and what is far, chosen, absent, and impossible; by rows at temperature 0 as well."""
    params = [*SOME, SamplingParams(temperature=0.0)] * 13
    n = len(params)
    proposal = torch.randn(n, 150) * 2
    target = proposal + torch.randn(n, 150) * torch.tensor([0.01, 0.3, 2.0]).repeat_interleave(n // 3)[:, None]
    drafts = proposed(proposal, params)
    drafts = [(x, None) if params[i].temperature == 0 or i % 7 == 3 else (x, q) for i, (x, q) in enumerate(drafts)]
    drafts = [(-1, None) if i % 11 == 5 else draft for i, draft in enumerate(drafts)]
    target[0, drafts[0][0]] = -torch.inf
    uniforms, accept = torch.rand(2, n, dtype=torch.float64).numpy()
    (_, accepted, tokens), _ = run(target, metadata_of(params, 150, uniforms, drafts, accept))
    told = [(x, None if one is None else one[0][one[1]].cpu().double()) for x, one in drafts]
    metadata = metadata_of(params, 150, uniforms, told, accept)
    (_, expected, _), _ = distributions.sample(target, choice_of(target), metadata)
    assert torch.equal(accepted, expected) and 12 < accepted.sum() < n - 12 and not accepted[0]
    for i, p in enumerate(probabilities(target, params)):
        x, q = told[i]
        if not accepted[i]:
            certain = torch.zeros_like(p).index_fill(0, torch.tensor(max(x, 0)), float(x >= 0))
            assert in_its_part((p - (certain if q is None else q)).clamp(min=0), uniforms[i], int(tokens[i]))


def test_a_proposal_like_the_target_is_always_accepted() -> None:
    logits, params = torch.randn(25, 150) * 2, SOME * 5
    drafts = proposed(logits, params)
    (_, accepted, _), _ = run(logits, metadata_of(params, 150, 0.5, drafts, GREATEST))
    assert accepted.all()


def test_drafts_of_several_proposals() -> None:
    """As two drafts of each request have, in whatever order; the second is a token that the first was surer of."""
    logits, params = torch.randn(2, 5, 150) * 2, SOME
    logits[1, :, 3] = logits[1].amax(-1) + 0.1
    logits[0, :, 3] = 40
    first = proposed(logits[0], params)
    second = [(3, q) for _, q in proposed(logits[1], params)]
    drafts = [draft for pair in zip(first, second, strict=True) for draft in pair]
    rows = logits.transpose(0, 1).flatten(0, 1).contiguous()
    (_, accepted, _), _ = run(rows, metadata_of([p for p in params for _ in range(2)], 150, 0.5, drafts, GREATEST))
    assert accepted.all()


def test_what_is_drawn_after_a_rejection_is_what_the_proposal_lacks() -> None:
    """By uniform numbers side by side: a draft that is always rejected, its own token never drawn again."""
    target, params = torch.randn(9), SamplingParams(temperature=1.0)
    p = probabilities(target[None], [params])[0]
    q = torch.full((1, 9), 1 / 9)
    drafts: Drafts = [(int(p.argmin()), (guarded(q), 0))] * 200
    metadata = metadata_of([params] * 200, 9, (np.arange(200) + 0.5) / 200, drafts, GREATEST)
    (_, accepted, tokens), _ = run(target.expand(200, -1).contiguous(), metadata)
    rest = (p - q[0]).clamp(min=0)
    assert not accepted.any()
    assert ((torch.bincount(tokens, minlength=9) - 200 * rest / rest.sum()).abs() <= 1 + 1e-3).all()


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_other_rows_change_nothing() -> None:
    """Rows in another order, some of a wider tensor, each alone: the same tokens to the bit."""
    params = SOME * 4
    wide = torch.randn(30, 170) * 2
    uniforms = torch.rand(20).numpy()
    choice = choice_of(wide[:, :150]).to(DEVICE)
    order = torch.randperm(30)[:20]
    metadata = metadata_of(params, 150, uniforms)
    metadata.table[Field.ROW] = order.numpy()
    together, _ = GpuBackend().sample(guarded(wide)[:, :150], choice, metadata)
    rows = enumerate(order.tolist())
    alone = [run(wide[row, :150][None], metadata_of([params[n]], 150, uniforms[n]))[0] for n, row in rows]
    assert torch.equal(together.cpu(), torch.cat(alone, dim=1))


@pytest.mark.parametrize("vocab", [129_280, 163_840])
def test_vocabularies_of_released_models(vocab: int) -> None:
    logits = torch.randn(3, vocab) * 2.5
    params = [SamplingParams(temperature=0.6, top_p=0.95), SamplingParams(temperature=1.0, top_k=50), SamplingParams()]
    assert_drawn(logits, params, [0.2, 0.9, GREATEST])


def test_no_rows() -> None:
    found, _ = run(torch.randn(2, 20), metadata_of([], 20, 0.0)._replace(table=np.zeros((len(Field), 0))))
    assert found.shape == (3, 0)


def test_what_is_launched_is_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, params = torch.randn(2, 1600), SOME[:2]
    with only_listed_launches(sample, monkeypatch):
        for keep in (False, True):
            run(logits, metadata_of(params, 1600, 0.5), keep)
        run(logits, metadata_of(params, 1600, 0.5, [(1, None), (-1, None)]))
