"""The kernels around attention against their references, bit for bit where sums are exact; see test_kernel_fused.py.

Products come as slices of wider tensors full of NaN, as they are and as sums over parts of K.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from core.batch import Batch
from ops import formats, reference
from ops.formats import PartialSums, Quantised
from ops.reference_backend import ReferenceBackend
from support.kernel_launches import only_listed_launches

pytest.importorskip("triton")
from test_kernel import DEVICE, E4M3, INTERPRETED, guarded, poisoned, same
from test_kernel import seeded as seeded
from test_kernel_fused import DTYPES, EPS, FNUZ, FORMATS, integers, norm_weight, same_quantised, slice_of_nan, spread

from ops.gpu import around_attention, decode, fused, norm_latents
from ops.gpu.backend import GpuBackend

__all__ = ["poisoned", "seeded"]  # fixtures, for every test here

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes in numpy
PAGES = 5  # of 64 slots; the first and the last belong to somebody else


def in_parts(x: torch.Tensor, parts: int) -> torch.Tensor | PartialSums:
    """x as a slice of NaN; or as sums that add up to it exactly, if it holds small integers."""
    if parts == 1:
        return slice_of_nan(x)
    pieces = [torch.randint(-4, 5, x.shape).float() for _ in range(parts - 1)]
    return PartialSums(slice_of_nan(torch.stack((*pieces, x.float() - sum(pieces)))), x.dtype)


def inputs_of(t: int, c: int, rope: int, q: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    angle = 6 * torch.rand(t, rope // 2)
    slots = 65 + torch.randperm(3 * 64 - 2)[:t]
    slots[0:1], slots[2:3], slots[1::3] = 64, 4 * 64 - 1, -1  # the pool's first slot, its last, and none
    return {
        "kv": integers(t, c + rope).to(dtype),
        "kv_weight": norm_weight(c),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "slots": slots,
    } | ({"q": integers(t, q).to(dtype), "q_weight": norm_weight(q)} if q else {})


def pool(c: int, rope: int, dtype: torch.dtype, packed: bool) -> torch.Tensor:
    if packed:
        return torch.randint(256, (PAGES, 64, formats.packed_latent_bytes(c, rope)), dtype=torch.uint8)
    return torch.randn(PAGES, 64, c + rope).to(dtype)


def write(op: Callable[..., Any], inputs: dict[str, Any], latents: torch.Tensor, parts: int = 1, **how: Any) -> Any:
    """op into all pages but the first and the last."""
    given = {n: in_parts(x, parts) if n in ("kv", "q") else guarded(x) for n, x in inputs.items()}
    given["slots"] = torch.where(inputs["slots"] < 0, -1, inputs["slots"] - 64).to(DEVICE)
    return op(**given, eps=EPS, latents=latents[1:-1], **how)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "t, c, rope, q, parts, fp8",
    [(1, 512, 64, 1536, 4, "float32"), (5, 100, 12, 40, 1, None), (7, 132, 8, 300, 2, "ue8m0"), (20, 16, 8, 0, 1, None)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_latents(
    dtype: torch.dtype, t: int, c: int, rope: int, q: int, parts: int, fp8: Any, packed: bool
) -> None:
    inputs, latents = inputs_of(t, c, rope, q, dtype), pool(c, rope, dtype, packed)
    expected = latents.clone()
    expected_y = write(reference.norm_latents, inputs, expected, fp8=fp8)
    on_device = latents.to(DEVICE, copy=True)
    y = write(norm_latents.norm_latents, inputs, on_device, parts, fp8=fp8, dtype=E4M3)
    assert same(on_device, expected)
    untouched = torch.ones(PAGES * 64, dtype=torch.bool)
    untouched[inputs["slots"][inputs["slots"] >= 0]] = False
    assert same(on_device.flatten(0, 1).cpu()[untouched], latents.flatten(0, 1)[untouched])
    if not q:
        assert y is expected_y is None
    elif fp8:
        assert y.dtype == dtype and y.x is None and same(y.q, expected_y.q) and same(y.s, expected_y.s)
    else:
        assert y.is_contiguous() and same(y, expected_y)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_latents_of_any_numbers(dtype: torch.dtype, packed: bool) -> None:
    """Off by the norm's last bit at most: compared with what norm_kernel makes of them."""
    inputs, latents = inputs_of(4, 320, 16, 200, dtype), pool(320, 16, dtype, packed).to(DEVICE)
    inputs["kv"], inputs["q"] = spread(4, 336).to(dtype), spread(4, 200).to(dtype)
    y = write(norm_latents.norm_latents, inputs, latents, fp8="ue8m0", dtype=FNUZ)
    c_kv, q = (fused.norm(x.to(DEVICE), inputs[w].to(DEVICE), EPS)[0].cpu()
               for x, w in ((inputs["kv"][:, :320], "kv_weight"), (inputs["q"], "q_weight")))  # fmt: skip
    assert same_quantised(y, q, "ue8m0", FNUZ)
    expected = torch.cat((c_kv, reference.rotary(inputs["kv"][:, 320:], inputs["cos"], inputs["sin"])), dim=-1)
    expected = reference.pack_latents(expected, 320) if packed else expected
    kept = inputs["slots"] >= 0
    assert same(latents.flatten(0, 1).cpu()[inputs["slots"][kept]], expected[kept])


def test_latents_of_nothing_and_of_padding() -> None:
    inputs, latents = inputs_of(6, 128, 8, 64, torch.bfloat16), pool(128, 8, torch.bfloat16, False).to(DEVICE)
    before = latents.clone()
    inputs["slots"] = torch.full((6,), -1)
    assert write(norm_latents.norm_latents, inputs, latents).shape == (6, 64) and same(latents, before)
    nothing = {n: x if n.endswith("weight") else x[:0] for n, x in inputs.items()}
    assert write(norm_latents.norm_latents, nothing, latents).shape == (0, 64)


def test_mistaken_pools_are_refused() -> None:
    inputs = inputs_of(2, 130, 8, 0, torch.bfloat16)
    for latents in (
        pool(130, 8, torch.float32, False),
        pool(130, 8, torch.bfloat16, True),
        pool(129, 8, torch.bfloat16, False),
    ):
        with pytest.raises(AssertionError):
            write(norm_latents.norm_latents, inputs, latents.to(DEVICE))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("t, n, dn, rope, c", [(1, 2, 128, 64, 512), (20, 3, 40, 12, 72), (70, 1, 16, 8, 200)])
def test_absorb(t: int, n: int, dn: int, rope: int, c: int, parts: int) -> None:
    """Small integers: products are exact in float32, and rounded once; the rotation has the reference's bits."""
    q, w_uk, angle = integers(t, n * (dn + rope)).bfloat16(), integers(n, dn, c).bfloat16(), 6 * torch.rand(t, rope // 2)
    given = in_parts(q, parts), guarded(w_uk), guarded(angle.cos()), guarded(angle.sin()), n, dn, c
    out, q_pe = around_attention.absorb(*given)
    q_nope, expected_pe = q.view(t, n, -1).split([dn, rope], dim=-1)
    assert same(out, torch.einsum("tnd,ndc->tnc", q_nope.double(), w_uk.double()).bfloat16())
    assert same(q_pe, reference.rotary(expected_pe, angle.cos(), angle.sin()))
    nothing, alone = around_attention.absorb(given[0], None, *given[2:])
    assert not nothing.numel() and same(alone, q_pe)


def test_absorb_of_nothing() -> None:
    out, q_pe = around_attention.absorb(torch.zeros(0, 48).bfloat16(), None, *torch.zeros(2, 0, 4), 2, 16, 32)
    assert out.shape == (0, 2, 32) and q_pe.shape == (0, 2, 8)


class Splits:
    """Splits of t tokens and n heads, as decode leaves them: some tokens have several, and not in order of place."""

    def __init__(self, t: int, n: int, c: int):
        counts = [1 + 37 * (i % 3) + i % 2 for i in range(t)]
        self.most = max(counts)
        self.partial, self.lse = torch.randn(self.most * t, n, c), 4 * torch.randn(self.most * t, n)
        self.stride = t * n  # from a token's part to its next
        self.parts = torch.tensor([[[i * n + h, k] for h in range(n)] for i, k in enumerate(counts)], dtype=torch.int32)
        weights = torch.full((self.most, t, n), float("-inf"))
        for i, k in enumerate(counts):
            weights[:k, i] = self.lse.view(self.most, t, n)[:k, i]
        p = (weights.double() * torch.log(torch.tensor(2.0).double())).softmax(0)
        self.o = torch.einsum("ptn,ptnc->tnc", p, self.partial.view(self.most, t, n, c).double())
        for i, k in enumerate(counts):  # what was not written
            self.partial.view(self.most, t, n, c)[k:, i] = torch.nan

    def on_device(self) -> tuple[torch.Tensor, ...]:
        return tuple(guarded(x) for x in (self.partial, self.lse, self.parts))


@pytest.mark.parametrize("fp8", FORMATS)
@pytest.mark.parametrize("t, n, c, dv", [(1, 3, 512, 128), (7, 2, 72, 128), (40, 1, 200, 256)])
def test_values(t: int, n: int, c: int, dv: int, fp8: Any) -> None:
    """Against float64; quantised, what act_quant makes of the result."""
    splits, w_uv = Splits(t, n, c), (torch.randn(n, dv, c) / c**0.5).bfloat16()
    plain = around_attention.Values(t, guarded(w_uv), None)
    plain.add(*splits.on_device(), 0, t, splits.stride)
    y = plain.result()
    exact = torch.einsum("tnc,nvc->tnv", splits.o, w_uv.double()).flatten(1)
    assert isinstance(y, torch.Tensor) and y.is_contiguous() and y.dtype == torch.bfloat16
    assert (y.cpu().double() - exact).norm() <= 4e-3 * exact.norm()
    if fp8:
        quantised = around_attention.Values(t, guarded(w_uv), fp8, E4M3)
        quantised.add(*splits.on_device(), 0, t, splits.stride)
        result = quantised.result()
        assert isinstance(result, Quantised) and same_quantised(result, y, fp8)


@pytest.mark.parametrize("dv", [40, 192])
def test_values_of_odd_heads_in_two_runs(dv: int) -> None:
    """Of which each adds its own tokens; heads that are no whole blocks are not quantised here."""
    assert not around_attention.makes_blocks(dv)
    w_uv, parts = torch.randn(2, dv, 64).bfloat16() / 8, (Splits(3, 2, 64), Splits(5, 2, 64))
    values = around_attention.Values(8, guarded(w_uv), None)
    values.add(*parts[0].on_device(), 0, 3, parts[0].stride)
    values.add(*parts[1].on_device(), 3, 8, parts[1].stride)
    exact = torch.einsum("tnc,nvc->tnv", torch.cat([p.o for p in parts]), w_uv.double()).flatten(1)
    assert (values.result().cpu().double() - exact).norm() <= 4e-3 * exact.norm()
    with pytest.raises(AssertionError):
        around_attention.Values(8, guarded(w_uv), "float32")


@pytest.mark.parametrize("fp8", [None, "float32"])
def test_decoding_takes_three_launches_and_no_other_product(fp8: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's mla on a batch that only decodes: what the reference makes of it, without bmm or act_quant."""
    n, dn, rope, c, dv = 2, 32, 16, 64, 128
    batch = Batch.pack([([0], 99, [2, 0]), ([0, 0], 30, [3])], DEVICE)
    q, latents = torch.randn(3, n * (dn + rope)).bfloat16(), torch.randn(4, 64, c + rope).bfloat16()
    w_uk, w_uv = torch.randn(n, dn, c).bfloat16() / 8, torch.randn(n, dv, c).bfloat16() / 8
    angle = 6 * torch.rand(3, rope // 2)
    given = [guarded(x) for x in (q, angle.cos(), angle.sin(), latents)] + [batch, guarded(w_uk), guarded(w_uv), 0.1, fp8]
    expected = ReferenceBackend().mla(*given)
    monkeypatch.setattr(torch, "bmm", None)
    monkeypatch.setattr(decode, "combine_parts_kernel", None)
    found = GpuBackend().mla(*given)
    if fp8:
        assert isinstance(found, Quantised) and isinstance(expected, Quantised)
        found, expected = (x.q.float() * x.s.repeat_interleave(128, -1) for x in (found, expected))
    assert (found.double() - expected.double()).norm() <= (4e-2 if fp8 else 1e-2) * expected.double().norm()


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter takes the rows of sm_90")
def test_launches_ask_for_listed_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    with only_listed_launches(around_attention, monkeypatch), only_listed_launches(norm_latents, monkeypatch):
        for packed, fp8, parts in ((False, None, 1), (False, "float32", 1), (True, "ue8m0", 1), (False, "float32", 2), (False, "float32", 4)):
            inputs = inputs_of(2, 512, 64, 1536, torch.bfloat16)
            for name in ("kv", "q"):
                inputs[name] = in_parts(inputs[name], parts)
            norm_latents.norm_latents(**inputs, eps=EPS, latents=pool(512, 64, torch.bfloat16, packed), fp8=fp8)
        for heads, tokens, parts in ((16, 1, 1), (16, 1, 2), (16, 65, 1), (16, 65, 2), (128, 65, 1)):
            q = in_parts(torch.zeros(tokens, heads * 192).bfloat16(), parts)
            angle = torch.zeros(tokens, 32)
            for w_uk in (torch.zeros(heads, 128, 512).bfloat16(), None):
                if w_uk is not None or parts == 1:
                    around_attention.absorb(q, w_uk, angle, angle, heads, 128, 512)
        nothing = torch.zeros(0)
        for heads, tokens, dv, fp8 in (
            (16, 1, 128, "float32"), (16, 5, 128, "float32"), (16, 32, 128, "ue8m0"), (16, 33, 128, "float32"), (128, 5, 128, None),
            (16, 4, 192, None), (20, 33, 256, "float32"),
        ):  # fmt: skip
            values = around_attention.Values(tokens, torch.zeros(heads, dv, 512).bfloat16(), fp8)
            values.add(nothing, nothing, nothing, 0, tokens, 16)
