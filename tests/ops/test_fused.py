"""The fused ops as the model sees them: a quantised input, and each fusion against the ops it is composed of."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from core.numerics import Numerics
from ops import formats, reference
from ops.backend import has_fp8
from ops.cpu import kernels
from ops.cpu.backend import CompiledCpuBackend, CpuBackend
from ops.formats import PartialSums, Weight, columns
from ops.reference_backend import ReferenceBackend
from support.checkpoints import fp8_sizes
from support.families import FAMILIES, V3
from support.model_pairs import hidden_states, ours, random_checkpoint, relative_error, tokens

needs_compiler = pytest.mark.skipif(kernels.library() is None, reason="there is no C compiler")
BACKENDS = [ReferenceBackend(), CpuBackend(), pytest.param(CompiledCpuBackend(), marks=needs_compiler)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def fp8_weight(n: int, k: int, scale_fmt: str | None) -> Weight:
    scale = torch.rand(-(-n // 128), -(-k // 128)) + 0.5
    return Weight(torch.randn(n, k).to(torch.float8_e4m3fn), scale, "fp8", scale_fmt)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_takes_its_input_quantised(dtype: torch.dtype, scale_fmt: str | None, invariant: bool) -> None:
    w = fp8_weight(200, 320, scale_fmt)
    x = torch.randn(37, 320).to(dtype)
    ops = ReferenceBackend(invariant)
    y = ops.linear(reference.quantised(x, w.fp8), w)
    assert y.dtype == dtype and torch.equal(y, ops.linear(x, w))
    assert relative_error(y, reference.w8a16_gemm(x, w.data, w.scale)) > 1e-3  # x was rounded to e4m3


def test_only_a_w8a8_weight_wants_quantised_input() -> None:
    w = fp8_weight(128, 128, "ue8m0")
    assert w.fp8 == "ue8m0" and w._replace(scale_fmt=None).fp8 == "float32"
    for plain in (w._replace(gemm="bf16"), Weight(torch.randn(128, 128))):
        assert plain.fp8 is None
        with pytest.raises(AssertionError):
            ReferenceBackend().linear(reference.quantised(torch.randn(3, 128), "ue8m0"), plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fp8", ["float32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_is_an_addition_a_norm_and_a_quantisation(dtype: torch.dtype, fp8: str, backend: Any) -> None:
    if isinstance(backend, CompiledCpuBackend) and dtype == torch.float32:
        pytest.skip("compiled kernels take bfloat16")
    norm = backend.norm
    x, delta, weight = torch.randn(9, 200).to(dtype), torch.randn(9, 200).to(dtype), torch.randn(200)
    y, total = norm(x, weight, 1e-5, delta, fp8)
    alone = F.rms_norm((x + delta).float(), (200,), weight, 1e-5).to(dtype)
    q, s = reference.act_quant(alone, scale_fmt="ue8m0" if fp8 == "ue8m0" else None)
    assert torch.equal(total, x + delta) and torch.equal(y.x, alone) and y.dtype == dtype
    assert torch.equal(y.q.view(torch.uint8), q.view(torch.uint8)) and torch.equal(y.s, s)
    assert norm(x, weight, 1e-5, delta, fp8, keep=False)[0].x is None
    plain, same = norm(x, weight, 1e-5)
    assert same is x and not torch.equal(plain, alone)


@pytest.mark.parametrize("side", BACKENDS)
def test_silu_mul(side) -> None:
    """The halves' first columns; what fills them up is not looked at."""
    x = torch.randn(50, 2, 40).bfloat16()
    x[..., 33:] = float("nan")
    gate, up = x[..., :33].unbind(1)
    expected = (F.silu(gate.double()) * up.double()).bfloat16()
    assert torch.equal(side.silu_mul(x.flatten(1), 33), expected)
    y = side.silu_mul(x.flatten(1), 33, "ue8m0")
    q, s = reference.act_quant(expected, scale_fmt="ue8m0")
    assert torch.equal(y.q.view(torch.uint8), q.view(torch.uint8)) and torch.equal(y.s, s) and y.x is None
    with pytest.raises(AssertionError):
        side.silu_mul(x.flatten(1), 41)


@pytest.mark.parametrize("ops", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_norm_latents_are_two_norms_a_rotation_and_a_copy(packed: bool, ops: ReferenceBackend) -> None:
    kv, q, q_weight = torch.randn(4, 108).bfloat16(), torch.randn(4, 40).bfloat16(), torch.randn(40)
    weight, cos, sin, slots = (
        torch.randn(100),
        torch.randn(4, 4),
        torch.randn(4, 4),
        torch.tensor([70, -1, 3, 0]),
    )
    latents = torch.zeros(2, 64, formats.packed_latent_bytes(100, 8), dtype=torch.uint8)
    latents = latents if packed else torch.zeros(2, 64, 108, dtype=torch.bfloat16)
    y = ops.norm_latents(kv, weight, 1e-6, cos, sin, slots, latents, q, q_weight)
    assert torch.equal(y, ops.norm(q, q_weight, 1e-6)[0])
    c_kv, k_pe = kv[:, :100], kv[:, 100:]
    latent = torch.cat((ops.norm(c_kv, weight, 1e-6)[0], reference.rotary(k_pe, cos, sin)), dim=-1)
    latent = reference.pack_latents(latent, 100) if packed else latent
    expected = torch.zeros_like(latents)
    expected[1, 6], expected[0, 3], expected[0, 0] = latent[0], latent[2], latent[3]
    assert torch.equal(latents, expected)
    z = ops.norm_latents(kv, weight, 1e-6, cos, sin, slots, latents, q, q_weight, "ue8m0")
    assert torch.equal(z.q.view(torch.uint8), reference.act_quant(y, scale_fmt="ue8m0")[0].view(torch.uint8))
    assert z.x is None and ops.norm_latents(kv, weight, 1e-6, cos, sin, slots, latents) is None


def test_partial_sums_are_added_in_their_order() -> None:
    """In float32, and rounded once."""
    parts = torch.randn(3, 5, 40)
    y = PartialSums(parts, torch.bfloat16)
    assert torch.equal(reference.summed(y), (parts[0] + parts[1] + parts[2]).bfloat16())
    assert torch.equal(reference.summed(columns(y, 3, 7)), reference.summed(y)[:, 3:10])
    whole = parts[0]
    assert reference.summed(whole) is whole and torch.equal(columns(whole, 3, 7), whole[:, 3:10])


@pytest.mark.parametrize(
    "config, num",
    [
        (V3, Numerics(torch.float32)),
        (FAMILIES["v2-lite"], Numerics(torch.float32, fp8_latents=True)),
        (V3 | dict(fp8_sizes(1), quantization_config={"scale_fmt": "ue8m0"}), Numerics(torch.float32, "fp8", "ue8m0")),
    ],
    ids=["V3", "V2-Lite, FP8 latents", "V3 in W8A8"],
)
def test_a_model_by_the_kernels(config: dict, num: Numerics, tmp_path: Path) -> None:
    """Every call the model makes, with its own strides and columns. On a GPU the other ops are kernels too, and its FP8
    products add up in fewer bits than the reference's."""
    pytest.importorskip("triton")
    from ops.gpu import fused, norm_latents

    gpu = torch.cuda.is_available()
    if gpu and num.gemm == "fp8" and not has_fp8(torch.device("cuda")):
        pytest.skip("this GPU has no FP8 tensor cores")
    path = random_checkpoint(tmp_path / "c", config, fp8=num.gemm is not None)
    device = "cuda" if gpu else "cpu"
    plain = ours(path, num, device=device, backend=ReferenceBackend())
    mixed = ReferenceBackend()
    mixed.norm, mixed.silu_mul, mixed.norm_latents = fused.norm, fused.silu_mul, norm_latents.norm_latents
    model = ours(path, num, device=device, backend=None if gpu else mixed)
    ids = tokens(8, model.args.vocab_size)
    limit = 1e-5 if not gpu else 1e-4 if num.gemm is None else 0.1
    assert relative_error(hidden_states(model, ids, [7, 1]), hidden_states(plain, ids, [7, 1])) < limit
