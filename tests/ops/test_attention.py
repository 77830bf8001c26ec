"""MLA's forms against attention written out in float64, and against each other."""

import pytest
import torch

from core.batch import Batch
from core.numerics import Numerics
from ops import reference
from ops.cpu import attention, kernels
from ops.cpu.backend import CompiledCpuBackend, CpuBackend
from ops.reference_backend import ReferenceBackend
from support.families import V3
from support.model_pairs import hidden_states, ours, random_checkpoint, relative_error, tokens

N, DN, R, DV, C = 5, 24, 16, 20, 48
SCALE = 0.37


def problem(lengths: list[int], new: list[int], seed: int = 0):
    """Ragged sequences over shuffled pages, and the answer: every head's keys and values written out, in float64."""
    g = torch.Generator().manual_seed(seed)
    n_pages = [-(-n // 64) for n in lengths]
    order = torch.randperm(sum(n_pages), generator=g).tolist()
    pages = [[order.pop() for _ in range(n)] for n in n_pages]
    batch = Batch.pack([([0] * q, n - q, p) for n, q, p in zip(lengths, new, pages, strict=True)])
    latents = torch.randn(sum(n_pages), 64, C + R, generator=g)
    total = sum(new)
    q_nope, q_pe = (torch.randn(total, N, d, generator=g) for d in (DN, R))
    w_uk, w_uv = (torch.randn(N, d, C, generator=g) / C**0.5 for d in (DN, DV))
    expected, at = [], 0
    for n, q, p in zip(lengths, new, pages, strict=True):
        flat = latents[p].flatten(0, 1)[:n].double()
        k = torch.einsum("lc,hdc->hld", flat[:, :C], w_uk.double())
        k = torch.cat((k, flat[:, C:].expand(N, -1, -1)), dim=-1)
        v = torch.einsum("lc,hdc->hld", flat[:, :C], w_uv.double())
        query = torch.cat((q_nope, q_pe), dim=-1)[at : at + q].double().transpose(0, 1)
        visible = torch.arange(n) <= torch.arange(n - q, n)[:, None]
        scores = (query @ k.mT * SCALE).masked_fill(~visible, float("-inf"))
        expected.append((scores.softmax(-1) @ v).transpose(0, 1))
        at += q
    return (q_nope, q_pe, latents, batch, w_uk, w_uv, SCALE), torch.cat(expected)


SIDES = [reference.mla, CpuBackend()._attend]
SHAPES = [
    ([1], [1]),
    ([64, 65, 128, 300], [1, 1, 1, 1]),  # decode
    ([130, 700], [130, 700]),  # fresh prompts
    ([600, 1200], [90, 333]),  # chunks behind a prefix
    ([513, 40, 1, 700], [1, 40, 1, 200]),  # all at once
]


@pytest.mark.parametrize("lengths, new", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_against_float64(lengths, new, side):
    inputs, expected = problem(lengths, new)
    assert relative_error(side(*inputs), expected) < 2e-6


@pytest.mark.parametrize("sizes", [(128, 64, 192), (192, 64, 256), (24, 8, 40)])
@pytest.mark.parametrize("side", SIDES)
def test_values_wider_than_keys(sizes, side, monkeypatch):
    """GigaChat3's heads, GLM-4.7-Flash's, and values wider than keys with their rotary part: decode and prefill."""
    for name, size in zip(("DN", "R", "DV"), sizes, strict=True):
        monkeypatch.setitem(globals(), name, size)
    inputs, expected = problem([513, 40, 700], [1, 40, 200])
    assert relative_error(side(*inputs), expected) < 2e-6


@pytest.mark.parametrize("form", [reference.mla_absorbed, reference.mla_expanded, attention.mla_expanded])
@pytest.mark.parametrize("lengths, new", [([600], [90]), ([1100], [1]), ([300], [300])])
def test_every_form_at_every_row_count(form, lengths, new):
    """The forms agree whatever number of rows would choose between them."""
    (q_nope, q_pe, latents, batch, w_uk, w_uv, scale), expected = problem(lengths, new)
    cached = reference.gather(latents, batch.pages[0], lengths[0])
    out = form(q_nope, q_pe, cached, batch.positions, w_uk, w_uv, scale)
    assert relative_error(out, expected) < 2e-6


def test_bounded_tiles(monkeypatch):
    """Small tiles of rows and keys, and keys too many to expand at once, change nothing."""
    inputs, expected = problem([700], [300])
    monkeypatch.setattr(reference, "SCORE_TILE", 7 * N * 100)
    monkeypatch.setattr(reference, "KEY_TILE", 100)
    monkeypatch.setattr(attention, "EXPANDED_BYTES", 0)
    for side in SIDES:
        assert relative_error(side(*inputs), expected) < 2e-6


def test_bfloat16_scores_are_float32():
    """bf16 inputs cost their own rounding and no more: the error is that of rounding inputs and output."""
    inputs, _ = problem([400], [400])
    rounded = [x.bfloat16() if isinstance(x, torch.Tensor) else x for x in inputs]
    exact = reference.mla(*[x.float() if isinstance(x, torch.Tensor) else x for x in rounded])
    for side in SIDES:
        assert relative_error(side(*rounded), exact) < 6e-3


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("new", [[1, 1, 1], [16, 1, 5], [1, 17, 3], [200, 1, 250], [2, 2, 2]])
def test_decoding_sequences_together(new, threads, monkeypatch):
    """Whatever share of the batch decodes, one row or several, and however the heads are shared out."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs, expected = problem([300, 517, 250], new)
    assert relative_error(CpuBackend()._attend(*inputs), expected) < 2e-6
    monkeypatch.setitem(globals(), "N", 6)  # divides by the threads
    inputs, expected = problem([300, 517, 250], new, seed=1)
    assert relative_error(CpuBackend()._attend(*inputs), expected) < 2e-6


needs_compiler = pytest.mark.skipif(kernels.library() is None, reason="there is no C compiler")


@pytest.mark.parametrize("backend", [pytest.param(CompiledCpuBackend, marks=needs_compiler), CpuBackend])
@pytest.mark.parametrize("new", [[1, 1], [4, 1], [300, 200], [100, 2]])
def test_bfloat16_attention(new, backend):
    """With a compiler and without one."""
    inputs, _ = problem([300, 200], new)
    rounded = [x.bfloat16() if isinstance(x, torch.Tensor) else x for x in inputs]
    exact = reference.mla(*[x.float() if isinstance(x, torch.Tensor) else x for x in rounded])
    out = backend()._attend(*rounded)
    assert out.dtype == torch.bfloat16 and relative_error(out, exact) < 6e-3


def test_the_model_on_the_attention_kernels(tmp_path):
    """A prompt, its continuation and single tokens, through every layer. On a GPU in bfloat16, as compiled kernels
    multiply it, and without routed experts, for others may be chosen after a rounding."""
    kernels = pytest.importorskip("ops.gpu.attention")
    gpu, ids = torch.cuda.is_available(), tokens(75, V3["vocab_size"])
    config = V3 | {"first_k_dense_replace": V3["num_hidden_layers"], "num_nextn_predict_layers": 0} if gpu else V3
    num = Numerics(torch.bfloat16 if gpu else torch.float32)
    path, device = random_checkpoint(tmp_path, config), "cuda" if gpu else "cpu"
    expected = hidden_states(ours(path, num, device=device, backend=ReferenceBackend()), ids)
    mixed = ReferenceBackend()
    mixed._attend = kernels.mla
    model = ours(path, num, device=device, backend=None if gpu else mixed)
    assert relative_error(hidden_states(model, ids, [66, 7, 1, 1]), expected) < (5e-2 if gpu else 1e-5)


def test_the_threshold_is_where_the_costs_cross():
    w_uk, w_uv = torch.empty(16, 128, 512, device="meta"), torch.empty(16, 128, 512, device="meta")
    assert reference.absorbed_rows(w_uk, w_uv, 64) == 170


def test_neighbouring_pages_are_not_copied():
    latents = torch.randn(6, 64, 8)
    view = reference.gather(latents, torch.tensor([2, 3, 4, 0]), 150)
    assert view.data_ptr() == latents[2].data_ptr() and torch.equal(view, latents[2:5].flatten(0, 1)[:150])
    copy = reference.gather(latents, torch.tensor([4, 2, 0]), 150)
    assert torch.equal(copy, latents[[4, 2, 0]].flatten(0, 1)[:150])


def test_rotary_rotates_pairs():
    x, angle = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0.5, 2.0]])
    turned = torch.view_as_complex(x.view(1, 2, 2)) * torch.polar(torch.ones(1, 2), angle)
    assert torch.allclose(reference.rotary(x, angle.cos(), angle.sin()), torch.view_as_real(turned).flatten(1))
