"""Weights quantised: against exact arithmetic, every value of the formats, and compressed-tensors' own code."""

import itertools
import math

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from ops.reference import weight_dequant
from ops.weight_quant import CANDIDATES, block_quant, group_quant, pack_int32

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
FINITE = E4M3[~E4M3.float().isnan()].double()


def scheme(bits: int, group_size: int) -> QuantizationScheme:
    weights = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=group_size, symmetric=True)
    return QuantizationScheme(targets=["Linear"], weights=weights)


def theirs(q: torch.Tensor, s: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """What compressed-tensors makes of our tensors, in the scales' dtype."""
    packed = {"weight_packed": pack_int32(q, bits), "weight_scale": s, "weight_shape": torch.tensor(q.shape)}
    return BaseCompressor.get_value_from_registry("pack-quantized").decompress(packed, scheme(bits, group_size))["weight"]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# FP8 in blocks ------------------------------------------------------------------------------------------------------


def nearest_e4m3(x: torch.Tensor) -> torch.Tensor:
    """x (…), float64 and at most 448 in magnitude, to the nearest e4m3 number, by trying all; a tie to the even one."""
    values = FINITE.unique()  # in order
    at = torch.searchsorted(values, x).clamp(1, len(values) - 1)
    low, high = values[at - 1], values[at]
    even = (high.float().to(torch.float8_e4m3fn).view(torch.uint8) & 1) == 0
    up = (high - x < x - low) | ((high - x == x - low) & even)
    return torch.where(up, high, low)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (5, 300), (300, 5), (256, 384)])
def test_blocks(shape, dtype):
    """Scales are float32's nearest to the largest magnitude over 448; values are the nearest to the exact quotient of
    what is stored; edges that are part of a block count for themselves alone."""
    w = normal(*shape, dtype=dtype)
    q, s = block_quant(w)
    assert (q.shape, q.dtype, s.dtype) == (w.shape, torch.float8_e4m3fn, torch.float32)
    assert s.shape == tuple(math.ceil(n / 128) for n in shape) and q.is_contiguous()
    for i, j in itertools.product(*map(range, s.shape)):
        block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        part = w[block].double()
        wanted = (part.abs().amax() / 448).float()
        ratio = s[i, j] / wanted
        assert ratio == 1 or (dtype == torch.bfloat16 and torch.equal(weight_dequant(q[block], s[i : i + 1, j : j + 1]), w[block]))
        found, exact = q[block].double(), part / wanted.double()
        off = found != nearest_e4m3(exact)  # float32's quotient may lie on a tie that the exact one misses
        near = (found - exact).abs() <= (nearest_e4m3(exact) - exact).abs() * (1 + 2**-18)
        assert near.all() and off.float().mean() < 1e-3
        assert q[block].float().abs().amax() == 448


def test_blocks_of_zeros_and_of_next_to_nothing():
    w = torch.zeros(256, 256)
    w[128:, :128] = 1e-44
    w[:128, 128:] = 3e38
    q, s = block_quant(w)
    assert s.tolist() == [[1.0, torch.tensor(3e38).div(448).item()], [2.0**-126, 1.0]]
    assert weight_dequant(q, s, torch.float32)[:128, 128:].unique().tolist() == [torch.tensor(3e38).item()]
    assert not q[:128, :128].float().any() and not q[128:, 128:].float().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_shows_in_its_scale(bad, dtype):
    w = normal(256, 256, dtype=dtype)
    w[200, 7] = bad
    assert block_quant(w)[1].isfinite().tolist() == [[True, True], [False, True]]
    bad_groups = ~group_quant(w, 4, 32)[1].isfinite()
    assert bad_groups.nonzero().tolist() == [[200, 0]]


@pytest.mark.parametrize("seed", range(4))
def test_a_cast_of_fp8_comes_back(seed):
    """All e4m3 bytes do, for any scale; the scales are gone with the cast's rounding, and those found give the cast back
    to the bit. Where nothing was rounded they come back too."""
    made = torch.Generator().manual_seed(seed)
    bits = torch.randint(256, (256, 384), generator=made, dtype=torch.uint8)
    bits[(bits & 0x7F) == 0x7F] = 0x7E
    bits[::128, ::128] = 0x7E  # 448, as in a release: a block's largest
    q = bits.view(torch.float8_e4m3fn)
    s = (torch.rand(2, 3, generator=made) + 0.5) * 2.0 ** torch.randint(-20, 5, (2, 3), generator=made)
    again, scales = block_quant(weight_dequant(q, s))
    assert torch.equal(again.view(torch.uint8) & 0x7F, bits & 0x7F) and torch.equal(again.float(), q.float())
    assert torch.equal(weight_dequant(again, scales), weight_dequant(q, s))
    assert ((scales / s - 1).abs() < 2**-8).all() and not torch.equal(scales, s)
    for powers in (True, False):  # a power of two rounds nothing in bfloat16, and no scale does in float32
        s = torch.exp2(s.log2().round()) if powers else s
        again, scales = block_quant(weight_dequant(q, s, torch.bfloat16 if powers else torch.float32))
        assert torch.equal(again.float(), q.float())
        assert (scales / s - 1).abs().max() < (2**-8 if powers else 2**-23)


# Integers in groups -------------------------------------------------------------------------------------------------


def by_trying(w: torch.Tensor, bits: int) -> tuple[list[int], float]:
    """A group (n), quantised with Python's own numbers: the values and the scale."""
    half, numbers = 1 << (bits - 1), w.double().tolist()
    best: tuple[float, list[int], float] | None = None
    for i in range(CANDIDATES):
        s = (w.abs().amax() / (half - 1 + i / 2)).bfloat16().item()
        q = [max(-half, min(half - 1, round(x / s))) for x in numbers]  # round is half to even
        error = sum((x - s * n) ** 2 for x, n in zip(numbers, q, strict=True))
        if best is None or error < best[0] * (1 - 1e-6):
            best = (error, q, s)
    assert best
    return best[1], best[2]


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 128), (8, 128), (8, 32)])
def test_groups(bits, group_size):
    w = normal(6, 3 * group_size, seed=bits)
    q, s = group_quant(w, bits, group_size)
    assert (q.shape, q.dtype, s.shape, s.dtype) == (w.shape, torch.int8, (6, 3), torch.bfloat16)
    for i, j in itertools.product(range(6), range(3)):
        group = slice(j * group_size, (j + 1) * group_size)
        assert (q[i, group].tolist(), s[i, j].item()) == by_trying(w[i, group].float(), bits), (i, j)


@pytest.mark.parametrize("bits", [4, 8])
def test_it_does_not_matter_how_large_weights_are(bits):
    """Squares of errors neither vanish nor overflow."""
    w = normal(4, 256).float()
    q, s = group_quant(w, bits, 32)
    for exponent in (-100, -60, 60, 100):
        other, scales = group_quant(w * 2.0**exponent, bits, 32)
        assert torch.equal(other, q) and torch.equal(scales.double(), s.double() * 2.0**exponent)


def test_groups_of_zeros_and_of_next_to_nothing():
    w = torch.zeros(1, 96)
    w[0, 32:64] = 1e-44
    w[0, 64:] = -3e38
    q, s = group_quant(w, 4, 32)
    assert s[0, :2].tolist() == [1.0, 2.0**-126] and s.isfinite().all()
    assert not q[0, :64].any() and ((q[0, 64:] * s[0, 2].double() / -3e38 - 1).abs() < 0.01).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_chunks_do_not_show(bits, monkeypatch):
    w = normal(50, 256)
    wanted = group_quant(w, bits, 32)
    monkeypatch.setattr("ops.weight_quant.CHUNK", 1000)
    assert all(torch.equal(a, b) for a, b in zip(group_quant(w, bits, 32), wanted, strict=True))


@pytest.mark.parametrize(("bits", "group_size", "gain"), [(4, 32, 0.87), (4, 128, 0.86), (8, 128, 0.98)])
@pytest.mark.parametrize("heavy", [False, True])
def test_the_search_gains(bits, group_size, gain, heavy):
    """Squared error beside that of the usual scale, max / (2^(bits-1) - 1/2), with compressed-tensors' rounding."""
    w = normal(512, 512, dtype=torch.float32)
    w = (w * normal(512, 512, seed=1).abs().float().pow(0.5) if heavy else w).bfloat16()
    groups = w.unflatten(1, (-1, group_size))
    usual = (groups.float().abs().amax(-1) / ((1 << (bits - 1)) - 0.5)).bfloat16()
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    state = compressor.compress({"weight": w.float(), "weight_scale": usual.float()}, scheme(bits, group_size))
    plain = compressor.decompress(state, scheme(bits, group_size))["weight"]
    q, s = group_quant(w, bits, group_size)
    ours = theirs(q, s.float(), bits, group_size)
    assert (ours - w).square().sum() < gain * (plain - w).square().sum()


# As compressed-tensors has them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_every_value_in_every_place(bits):
    """Packed and unpacked by compressed-tensors: each value that there is, at each place of an int32."""
    n = 1 << bits
    q = (torch.arange(n)[:, None] + torch.arange(32)[None] * 37) % n - n // 2
    q = q.to(torch.int8)
    packed = pack_int32(q, bits)
    assert packed.shape == (n, bits) and packed.dtype == torch.int32
    words = packed.to(torch.int64) & 0xFFFFFFFF
    per = 32 // bits
    for k in range(32):
        assert torch.equal((words[:, k // per] >> (bits * (k % per)) & (n - 1)) - n // 2, q[:, k].long())
    assert torch.equal(theirs(q, torch.ones(n, 1), bits, 32), q.float())


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 128), (8, 128)])
def test_compressed_tensors_agrees(bits, group_size):
    """With our scales its compressor packs the same bytes, and what it reads of ours is q times s."""
    w = normal(64, 512)
    q, s = group_quant(w, bits, group_size)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    state = compressor.compress({"weight": w.float(), "weight_scale": s.float()}, scheme(bits, group_size))
    assert torch.equal(state["weight_packed"], pack_int32(q, bits)) and state["weight_shape"].tolist() == [64, 512]
    exact = (q.double().unflatten(1, (-1, group_size)) * s.double()[..., None]).flatten(1)
    assert torch.equal(theirs(q, s.float(), bits, group_size).double(), exact)
    assert torch.equal(theirs(q, s, bits, group_size).double(), exact.bfloat16().double())
