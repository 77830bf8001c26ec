"""The CPU's forms against float64 and against the reference, whichever of them this processor would choose."""

import pytest
import torch

from core.numerics import Numerics
from ops import reference
from ops.cpu import kernels
from ops.cpu.backend import CompiledCpuBackend, CpuBackend
from ops.formats import Weight
from ops.reference_backend import ReferenceBackend
from support.families import V3
from support.model_pairs import hidden_states, ours, random_checkpoint, relative_error, tokens

needs_compiler = pytest.mark.skipif(kernels.library() is None, reason="there is no C compiler")


@pytest.fixture(params=[pytest.param(CompiledCpuBackend, marks=needs_compiler), CpuBackend])
def backend(request):
    """With the compiled kernels, or as where nothing can be compiled."""
    return request.param()


def compiled(backend):
    return isinstance(backend, CompiledCpuBackend)


@pytest.mark.parametrize("rows", [1, 3, 8, 16, 70])
@pytest.mark.parametrize("n, k", [(96, 160), (1, 1), (67, 515), (130, 33)])
def test_linear(backend, rows, n, k):
    w, x = torch.randn(n, k).bfloat16(), torch.randn(rows, k).bfloat16()
    packed = backend.pack_weight(Weight(w))
    assert isinstance(packed.data, kernels.Packed) == compiled(backend)
    y = backend.linear(x, packed)
    assert y.dtype == torch.bfloat16 and y.shape == (rows, n)
    expected = x.double() @ w.double().T
    assert relative_error(y, expected) < 4e-3
    if compiled(backend):  # one rounding, at the end
        error = (y.double() - expected).abs()
        assert (error <= expected.abs() * 2**-8 + (x.double().abs() @ w.double().abs().T) * 1e-6).all()


def test_stacks(backend):
    stack, x = torch.randn(3, 96, 160).bfloat16(), torch.randn(5, 160).bfloat16()
    packed = backend.pack_weight(Weight(stack.clone()))
    assert len(packed.data) == 3
    for e in range(3):
        y = backend.linear(x, packed.expert(e))
        assert relative_error(y, x.double() @ stack[e].double().T) < 4e-3


def test_nan_stays_in_its_channel(backend):
    poisoned = torch.randn(8, 8).bfloat16()
    poisoned[1, 2] = float("nan")
    y = backend.linear(torch.ones(1, 8).bfloat16(), backend.pack_weight(Weight(poisoned)))
    assert y[0].isnan().tolist() == [False, True] + [False] * 6


def test_what_stays_plain(backend):
    """FP8 weights, and any weights where nothing is compiled; float32 weights of float32 products."""
    fp8 = Weight(torch.randn(8, 8).to(torch.float8_e4m3fn), torch.ones(1, 1), "fp8")
    assert backend.pack_weight(fp8) is fp8
    plain = Weight(torch.randn(8, 8))
    assert CpuBackend().pack_weight(plain) is plain
    assert CpuBackend().pack_float32_weight(plain.data) is plain.data


def test_float32_products_are_not_rounded(backend):
    x, w = torch.randn(5, 300).bfloat16(), torch.randn(70, 300).bfloat16()
    for ops in (backend, ReferenceBackend()):
        y = ops.project_float32(x, ops.pack_float32_weight(w))
        assert y.dtype == torch.float32 and relative_error(y, x.double() @ w.double().T) < 2e-6


@pytest.mark.parametrize("rows, first, n_local", [(1, 0, 8), (7, 0, 8), (90, 0, 8), (7, 2, 3), (1, 6, 2), (3, 0, 1)])
def test_experts(backend, rows, first, n_local):
    """One token or many, all experts or this rank's, experts nobody chose: the reference's sum in float64."""
    h, inter, k = 72, 40, 3
    g = torch.Generator().manual_seed(rows)
    w13, w2 = torch.randn(8, 2 * inter, h, generator=g), torch.randn(8, h, inter, generator=g)
    w13, w2 = w13[first : first + n_local].bfloat16() / 8, w2[first : first + n_local].bfloat16() / 8
    x = torch.randn(rows, h, generator=g).bfloat16()
    ids = torch.stack([torch.randperm(8, generator=g)[:k] for _ in range(rows)])
    weights = torch.rand(rows, k, generator=g)
    expected = torch.zeros(rows, h, dtype=torch.float64)
    for t in range(rows):
        for e, weight in zip((ids[t] - first).tolist(), weights[t].double(), strict=True):
            if 0 <= e < n_local:
                gate, up = (w13[e].double() @ x[t].double()).chunk(2)
                expected[t] += weight * (w2[e].double() @ (torch.nn.functional.silu(gate) * up))
    packed = [backend.pack_weight(Weight(w.clone())) for w in (w13, w2)]
    extra = torch.randn(rows, h, generator=g).bfloat16()
    out = backend.experts(x, weights, ids, first, *packed, inter, lambda: extra)
    assert out.dtype == torch.bfloat16
    assert ((out.double() - (expected + extra)).norm() <= 1e-2 * (expected.norm() + extra.norm())).all()
    steady = type(backend)(batch_invariant=True).experts(x, weights, ids, first, *packed, inter, lambda: extra)
    assert relative_error(steady, expected + extra) < 1e-2
    if not ((ids >= first) & (ids < first + n_local)).any():
        assert torch.equal(out, extra)


def test_packing_changes_no_more_than_bfloat16_does(backend, tmp_path):
    """The whole model in bfloat16, packed and by the reference, each beside float32."""
    path = random_checkpoint(tmp_path / "c", V3)
    ids = tokens(60, V3["vocab_size"])
    exact = hidden_states(ours(path), ids, [50, 9, 1])
    packed, plain = (
        hidden_states(ours(path, Numerics(torch.bfloat16), backend=ops), ids, [50, 9, 1])
        for ops in (backend, ReferenceBackend())
    )
    assert relative_error(packed, exact) < 1.5 * relative_error(plain, exact)


def test_silu_mul(backend):
    """Gate and up stacked, each with three columns of filling behind it."""
    gate_up = torch.randn(50, 2 * 36).bfloat16()
    gate, up = gate_up[:, :33], gate_up[:, 36:69]
    expected = (torch.nn.functional.silu(gate.double()) * up.double()).bfloat16()
    for side in (reference, backend):
        assert torch.equal(side.silu_mul(gate_up, 33), expected)
