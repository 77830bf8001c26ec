"""A captured forward computes on other values what it would have computed unrecorded, or is refused."""

from dataclasses import replace

import pytest
import torch

from core.batch import Batch, BatchBounds
from core.run_config import PAGE_SIZE
from ops.cpu import captured_calls, kernels
from ops.cpu.captured_calls import CapturedCalls, Scratch, UncapturableError

needs_compiler = pytest.mark.skipif(kernels.library() is None, reason="there is no C compiler")


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(4, 6)
    y[1:] = x[1:] * 2
    y[:, 1].add_(1)
    return y


COMPUTED = {
    "views of inputs": lambda x: x.unflatten(1, (2, 3)).transpose(0, 1)[1],
    "views of results": lambda x: (x + 1).unflatten(1, (2, 3)).split([1, 2], dim=2)[1] * 3,
    "what is there already": lambda x: x.contiguous().float().exp(),
    "a copy": lambda x: x.transpose(0, 1).contiguous() - x.T.clone(),
    "several results": lambda x: torch.cat([*x.topk(2), *x.sort(dim=-1).values.chunk(2, dim=-1)], dim=-1),
    "in place": in_place,
    "into a result": lambda x: torch.add(x, 1, out=torch.empty_like(x)),
    "by position": lambda x: x[torch.tensor([3, 0]), x[:2].argmax(dim=-1)],
    "no input": lambda x: torch.arange(6) + x.new_full((1,), 2.0) * torch.ones(4, 6),
}


@pytest.mark.parametrize("name", list(COMPUTED))
def test_what_torch_computes(name):
    """Three times over, since what a replay leaves must not be in the way of the next."""
    x = torch.randn(4, 6)
    with CapturedCalls(Scratch()).active() as calls:
        out = COMPUTED[name](x)
    for _ in range(3):
        x.copy_(torch.randn(4, 6))
        with torch.inference_mode():
            calls.replay()
        assert torch.equal(out, COMPUTED[name](x))


@needs_compiler
def test_what_c_computes():
    """Kernels between torch's ops, which work in the memory of one another."""
    w, norm = kernels.pack(torch.randn(40, 64).bfloat16()), torch.rand(64)
    x = torch.randn(3, 64).bfloat16()

    def compute() -> torch.Tensor:
        y, total = kernels.norm(x, norm, 1e-6, x)
        product = kernels.linear(y + total, w, torch.bfloat16)
        return kernels.linear(kernels.silu_mul(product, 20).repeat(1, 4)[:, :64], w, torch.float32)

    scratch = Scratch()
    with CapturedCalls(scratch).active() as calls:
        out = compute()
    for _ in range(3):
        x.copy_(torch.randn(3, 64))
        with torch.inference_mode():
            scratch.take(1).zero_()  # nobody may count on it
            calls.replay()
        assert torch.equal(out, compute())


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.bincount(x.abs().long().flatten()),
        lambda x: x.long().unique(),
        lambda x: x.repeat_interleave(x.abs().long()[0], dim=1),
        lambda x: torch.where(x > 0),
        lambda x: torch.argwhere(x),
    ],
)
def test_what_depends_on_values_is_refused(reads):
    """Another value would make another shape or another branch."""
    with pytest.raises(UncapturableError), CapturedCalls(Scratch()).active():
        reads(torch.randn(4, 6))


def test_a_weight_that_is_dequantised_each_time_is_refused(monkeypatch):
    """It would be kept for each shape; a view of it is not."""
    weight = torch.randn(64, 64)
    monkeypatch.setattr(captured_calls, "LARGEST", weight.nbytes - 1)
    with CapturedCalls(Scratch()).active() as calls:
        weight.T.unflatten(0, (8, 8))
        calls.scratch.take(2 * weight.nbytes)
    with pytest.raises(UncapturableError, match="16384 bytes"), CapturedCalls(Scratch()).active():
        weight * 2


@needs_compiler
def test_nothing_is_recorded_outside():
    """Neither before, nor after, nor when it fails; in another capture only its own."""
    x, norm = torch.randn(1, 64).bfloat16(), torch.rand(64)
    outer = CapturedCalls(Scratch())
    with pytest.raises(UncapturableError), outer.active():
        x.tolist()
    kernels.norm(x, norm, 1e-6)
    x + 1
    assert not outer._calls
    with outer.active():
        kernels.norm(x, norm, 1e-6)
    kernels.norm(x, norm, 1e-6)
    assert len(outer._calls) == 1


def test_scratch_grows_and_keeps_what_was_taken():
    scratch = Scratch()
    first = scratch.take(100)
    assert scratch.take(50).data_ptr() == first.data_ptr()
    assert len(scratch.take(1000)) == 1000 and len(first) == 100


@needs_compiler
def test_attention_has_room_for_the_longest():
    """What it works in is as large as the batch's bounds say, whatever the lengths were when it was recorded."""
    taken = []

    class Measured(Scratch):
        def take(self, nbytes):
            taken.append(nbytes)
            return super().take(nbytes)

    n, dn, dv, c, r, pages = 4, 32, 24, 64, 16, 40
    w_uk, w_uv = torch.randn(n, dn, c).bfloat16(), torch.randn(n, dv, c).bfloat16()
    latents = torch.randn(pages, PAGE_SIZE, c + r).bfloat16()
    longest = pages * PAGE_SIZE
    for length in (1, longest):
        step = Batch.pack([([0], length - 1, list(range(pages)))])
        batch = replace(step, decode=BatchBounds(1, 1, 1, longest, longest))
        out = torch.empty(1, n, dv, dtype=torch.bfloat16)
        with CapturedCalls(Measured()).active():
            kernels.mla(
                torch.randn(1, n, dn).bfloat16(), torch.randn(1, n, r).bfloat16(), latents, batch, w_uk, w_uv, 0.1, 8, out
            )
    assert len(taken) == 2 and taken[0] == taken[1]
