"""The quantised ops: the reference against float64, and each Triton kernel against the reference, on ragged shapes.

Without a GPU the kernels run in Triton's interpreter. Outputs are filled with NaN beforehand, inputs are followed by
NaN, and every block has a scale of its own size, so that an element not written, a read past the end and a wrong
scale all show. Errors are measured per element, against the sum of its products' magnitudes: in a norm over all
elements the blocks with large scales would hide the others.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import UserError
from ops import reference
from support.kernel_launches import only_listed_launches
from support.quantised_weights import FORMS, random_weight

pytest.importorskip("triton")
from triton.runtime import interpreter

from ops.gpu import device, gemm, quantisation, tiles
from ops.gpu.backend import GpuBackend
from ops.gpu.tiles import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = device.interpreted()
E4M3 = torch.float8_e4m3fn
# Hopper's FP8 tensor core aligns the products of an instruction to the largest and keeps 13 bits of their fractions
# (DeepSeek-V3's report, section 3.5.2): of the sum of magnitudes a block of 128 loses up to 4 cuts of 2**-13, 4.9e-4.
# Simulated over random blocks it is 1.9e-4 where bits are cut towards zero and 5.9e-4 where they are cut downwards.
PRECISE = 1e-6 if INTERPRETED else 2e-3
PRECISE_BF16 = 1e-6 if INTERPRETED else 1e-5  # and cut, rather than round, what they add in float32
BLOCK = 128
SHAPES = [(100, 576), (576, 192), (260, 100), (128, 128)]  # (N, K); 576 = 4.5 blocks


TAIL = 1 << 17  # elements: more than a tile's worth of rows
POISON = -(1 << 30)  # what stands for NaN among integers


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """torch.empty gives NaN (integers: POISON, bytes: 0x80), and a tail of it behind that nobody may write, nor an interpreted kernel read."""
    tails: list[torch.Tensor] = []
    plain = torch.empty

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        buffer = plain(shape.numel() + TAIL, dtype=dtype, device=device)
        if buffer.element_size() == 1:
            buffer.view(torch.uint8).fill_(0x7F if dtype == E4M3 else 0x80)
        else:
            buffer.fill_(math.nan if buffer.is_floating_point() else POISON)
        tails.append(buffer[shape.numel() :])
        return buffer[: shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    if INTERPRETED:
        monkeypatch.setattr(interpreter, "_interpreter", Sentry(interpreter._interpreter, tails))
    yield tails
    assert all(is_untouched(tail) for tail in tails)


def is_untouched(tail: torch.Tensor) -> bool:
    poison = -128 if tail.dtype == torch.int8 else 0x80 if tail.dtype == torch.uint8 else POISON
    return bool((tail.float().isnan() if tail.is_floating_point() else tail == poison).all())


class Sentry:
    """Stands before the interpreter's memory and refuses any address that lies in one of the tails."""

    def __init__(self, memory: Any, tails: list[torch.Tensor]) -> None:
        self.memory, self.tails = memory, tails

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def load(self, addresses: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        self.check(addresses, mask)
        return self.memory.load(addresses, mask, other, dtype)

    def store(self, addresses: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        self.check(addresses, mask)
        self.memory.store(addresses, value, mask)

    def check(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        used = addresses[np.broadcast_to(np.asarray(mask).astype(bool), addresses.shape)]  # masks may be integers
        for tail in self.tails:
            start = tail.data_ptr()
            assert not ((used >= start) & (used < start + tail.nbytes)).any(), "out of bounds"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bfloat16, torch.float32, E4M3])
def test_a_tail_shows_what_was_written(poisoned: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Of every type that a kernel gets, bytes of descriptors among them."""
    torch.empty(3, 5, dtype=dtype, device=DEVICE)
    tail = poisoned[-1]
    before = tail[7:8].clone()
    assert tail.dtype == dtype and is_untouched(tail)
    tail[7:8] = torch.ones(1, device=DEVICE).to(dtype)
    assert not is_untouched(tail)
    tail[7:8] = before


def guarded(t: torch.Tensor) -> torch.Tensor:
    """The same tensor on the device, followed in memory by NaN."""
    copy = torch.empty(t.shape, dtype=t.dtype, device=DEVICE)
    copy.copy_(t)
    return copy


def scales(*shape: int) -> torch.Tensor:
    """Between 1/64 and 64, no two alike."""
    return torch.exp2(torch.rand(*shape) * 12 - 6)


def weights(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    *experts, n, k = shape
    return torch.randn(shape).to(E4M3), scales(*experts, -(-n // BLOCK), -(-k // BLOCK))


def activations(m: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(m, k).to(E4M3), scales(m, -(-k // BLOCK))


def wide(s: torch.Tensor, shape: torch.Size, rows: int) -> torch.Tensor:
    """Scales spread over the elements they are for, float64, by an index per element."""
    row = torch.arange(shape[-2]) // rows
    column = torch.arange(shape[-1]) // BLOCK
    return s.double()[..., row[:, None], column[None, :]]


def error(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    """The worst error of y against x w^T, both float64, relative to the sum of the magnitudes of what is added."""
    return ((y.cpu().double() - x @ w.T).abs() / (x.abs() @ w.abs().T)).max().item()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert a.dtype == b.dtype and a.shape == b.shape
    return torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# act_quant and weight_dequant: bit for bit


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("shape", [(1, 128), (3, 100), (33, 576), (2, 5, 192), (130, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_act_quant(shape: tuple[int, ...], dtype: torch.dtype, scale_fmt: str | None) -> None:
    x = torch.randn(shape) * torch.exp2(torch.randint(-12, 12, (*shape[:-1], 1)))
    x = (x * torch.exp2(torch.arange(shape[-1]) // BLOCK)).to(dtype)
    q, s = quantisation.act_quant(guarded(x), scale_fmt=scale_fmt, dtype=E4M3)
    expected_q, expected_s = reference.act_quant(x, scale_fmt=scale_fmt)
    assert q.is_contiguous() and same(q, expected_q)
    assert s.is_contiguous() and same(s, expected_s)
    assert ((expected_q.double() * wide(expected_s, expected_q.shape, 1) - x.double()).abs() <= x.abs() / 15).all()


def test_act_quant_of_a_view_and_of_nothing() -> None:
    x = guarded(torch.randn(6, 256).bfloat16())
    assert same(quantisation.act_quant(x[:, 64:192], dtype=E4M3)[0], quantisation.act_quant(x[:, 64:192].clone(), dtype=E4M3)[0])
    assert same(quantisation.act_quant(x, 64, dtype=E4M3)[0], reference.act_quant(x.cpu(), 64)[0])
    q, s = quantisation.act_quant(x[:0])
    assert q.shape == (0, 256) and s.shape == (0, 2)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (3, 130, 260)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_dequant(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w, s = weights(*shape)
    expected = (w.double() * wide(s, w.shape, BLOCK)).float().to(dtype)  # 4 by 24 bits: exact in float64
    assert same(reference.weight_dequant(w, s, dtype), expected)
    assert same(quantisation.weight_dequant(guarded(w), guarded(s), dtype), expected)


# The GEMMs

needs_fp8 = pytest.mark.skipif(
    not INTERPRETED and not device.has_fp8(torch.device(DEVICE)), reason="this GPU has no FP8 tensor cores"
)


@needs_fp8
@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("m", [1, 3, 16, 33, 130])
def test_fp8_gemm(m: int, n: int, k: int) -> None:
    a, a_s = activations(m, k)
    b, b_s = weights(n, k)
    exact = a.double() * wide(a_s, a.shape, 1), b.double() * wide(b_s, b.shape, BLOCK)
    assert error(reference.fp8_gemm(a, a_s, b, b_s, torch.float32), *exact) < 1e-6
    on_device = [guarded(t) for t in (a, a_s, b, b_s)]
    y = gemm.fp8_gemm(*on_device, torch.float32)
    assert y.shape == (m, n) and error(y, *exact) < PRECISE
    assert same(gemm.fp8_gemm(*on_device), y.bfloat16())
    assert same(reference.fp8_gemm(a, a_s, b, b_s), reference.fp8_gemm(a, a_s, b, b_s, torch.float32).bfloat16())


@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("m", [1, 3, 16, 33, 130])
def test_w8a16_gemm(m: int, n: int, k: int) -> None:
    x = (torch.randn(m, k) * torch.exp2(torch.randint(-6, 6, (m, k)))).bfloat16()
    b, b_s = weights(n, k)
    exact = x.double(), b.double() * wide(b_s, b.shape, BLOCK)
    assert error(reference.w8a16_gemm(x, b, b_s, torch.float32), *exact) < 1e-6
    on_device = [guarded(t) for t in (x, b, b_s)]
    y = gemm.w8a16_gemm(*on_device, torch.float32)
    assert y.shape == (m, n) and error(y, *exact) < PRECISE_BF16
    assert same(gemm.w8a16_gemm(*on_device), y.bfloat16())
    assert same(reference.w8a16_gemm(x, b, b_s), reference.w8a16_gemm(x, b, b_s, torch.float32).bfloat16())


def reached(op: str) -> list[Any]:
    """The tiles that `choose` can return, split ones too: on a GPU its own, in the interpreter those of all."""
    own = device.architecture(torch.device(DEVICE))
    found = [tile for name, arch, tile in tiles.reachable() if name == op and (INTERPRETED or arch == own)]
    return [pytest.param(t, id=str(t)) for t in {str(t.constexprs()): t for t in found}.values()]


@pytest.mark.parametrize("tile", reached("fp8_gemm"))
def test_every_fp8_tile(tile: Tile) -> None:
    """Two row tiles and five column tiles, the last of each ragged, over two and a half blocks of channels."""
    m, n, k = tile.block_m + 5, 4 * tile.block_n + 28, 320
    a, a_s = activations(m, k)
    b, b_s = weights(n, k)
    y = gemm.gemm(*[guarded(t) for t in (a, a_s, b, b_s)], torch.float32, tile)
    assert error(y, a.double() * wide(a_s, a.shape, 1), b.double() * wide(b_s, b.shape, BLOCK)) < PRECISE


@pytest.mark.parametrize("tile", reached("w8a16_gemm"))
def test_every_w8a16_tile(tile: Tile) -> None:
    m, n, k = tile.block_m + 5, 4 * tile.block_n + 28, 320
    x = torch.randn(m, k).bfloat16()
    b, b_s = weights(n, k)
    y = gemm.gemm(guarded(x), None, guarded(b), guarded(b_s), torch.float32, tile)
    assert error(y, x.double(), b.double() * wide(b_s, b.shape, BLOCK)) < PRECISE_BF16


def test_programs_cover_every_tile_once() -> None:
    """More row tiles than share a group, and a last group that is not full."""
    tile = Tile(math.inf, 16, 16, False, 4, 2)
    m, n = (tiles.GROUP_M + 3) * 16, 48
    x = torch.randn(m, 32).bfloat16()
    b, b_s = weights(n, 32)
    y = gemm.gemm(guarded(x), None, guarded(b), guarded(b_s), torch.float32, tile)
    assert error(y, x.double(), b.double() * wide(b_s, b.shape, BLOCK)) < PRECISE_BF16


@needs_fp8
@pytest.mark.parametrize("split", tiles.SPLITS[1:])
def test_split_k(split: int) -> None:
    """Parts of 9 blocks of channels, the last half full: uneven parts, and with 8 and 16 some that are empty."""
    m, n, k = 3, 60, 1088
    a, a_s = activations(m, k)
    b, b_s = weights(n, k)
    exact = a.double() * wide(a_s, a.shape, 1), b.double() * wide(b_s, b.shape, BLOCK)
    on_device = [guarded(t) for t in (a, a_s, b, b_s)]
    tile = Tile(math.inf, 16, 64, True, 4, 2, split=split)
    y = gemm.gemm(*on_device, torch.float32, tile)
    assert error(y, *exact) < PRECISE
    assert same(gemm.gemm(*on_device, torch.bfloat16, tile), y.bfloat16())


def test_partial_sums_are_added_in_order() -> None:
    """1e8 - 1e8 + 1 is 1 in this order only, and a float32 sum in another would show."""
    parts = torch.tensor([1e8, -1e8, 1.0, 2.0]).reshape(4, 1, 1).expand(4, 3, 700).contiguous()
    out = torch.empty(3, 700, dtype=torch.float32, device=DEVICE)
    gemm.sum_splits_kernel[(3,)](guarded(parts), out, 3, 700, PARTS=4, SUMS=1024)
    assert (out == 3).all()


persistent = Tile(math.inf, 128, 128, False, 4, 4, persistent=1, specialised=True)


@needs_fp8
@pytest.mark.parametrize("m, n, k", [(1, 576, 144), (130, 136, 576), (300, 260, 128)])
@pytest.mark.parametrize("sms, specialised", [(2, True), (132, True), (2, False)])
def test_persistent(
    m: int, n: int, k: int, sms: int, specialised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer programs than tiles and with more; every edge ragged."""
    tile = Tile(math.inf, 128, 128, False, 4 if specialised else 8, 4, persistent=1, specialised=specialised)
    own = device.architecture(torch.device(DEVICE))
    if own not in ("sm_90", "sm_100"):
        pytest.skip("this GPU has no tensor memory accelerator")
    monkeypatch.setitem(tiles.SM_COUNT, own, sms)
    a, a_s = activations(m, k)
    b, b_s = weights(n, k)
    exact = a.double() * wide(a_s, a.shape, 1), b.double() * wide(b_s, b.shape, BLOCK)
    on_device = [guarded(t) for t in (a, a_s, b, b_s)]
    y = gemm.gemm(*on_device, torch.float32, tile)
    assert error(y, *exact) < PRECISE
    assert same(gemm.gemm(*on_device, torch.bfloat16, tile), y.bfloat16())


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter takes the rows of sm_90")
def test_the_allocator_keeps_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays with Triton until the next launch: activations in it would be kept as long, or in a graph's memory."""
    monkeypatch.setattr(gemm, "gemm_persistent_kernel", {(1,): lambda *_args, **_options: None})
    given: list[Callable[..., torch.Tensor]] = []
    monkeypatch.setattr(gemm.triton, "set_allocator", given.append)
    gemm.gemm(*activations(128, 128), *weights(128, 128), torch.bfloat16, persistent)
    assert [cell.cell_contents for cell in given[0].__closure__ or ()] == [torch.device("cpu")]


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter takes the rows of sm_90")
@pytest.mark.parametrize("n, k, offset", [(100, 128, 0), (128, 100, 0), (128, 128, 8)])
def test_what_tma_cannot_take_goes_another_way(n: int, k: int, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 rows of 200 bytes, FP8 rows of 100, and a matrix that begins at half of 16 bytes."""
    monkeypatch.setattr(gemm, "gemm_persistent_kernel", None)
    (a, a_s), (b, b_s) = activations(20, k), weights(n, k)
    shifted = guarded(torch.cat((torch.zeros(offset), a.float().flatten())).to(E4M3))[offset:].view(20, k)
    y = gemm.gemm(shifted, guarded(a_s), guarded(b), guarded(b_s), torch.bfloat16, persistent)
    exact = a.double() * wide(a_s, a.shape, 1), b.double() * wide(b_s, b.shape, BLOCK)
    assert error(y, *exact) < 2**-8


@needs_fp8
@pytest.mark.parametrize("tile", [Tile(math.inf, 16, 64, True, 4, 2, split=4), persistent], ids=str)
def test_with_one_tile_a_row_does_not_depend_on_the_others(tile: Tile) -> None:
    m = tile.block_m + 10
    a, a_s = (guarded(t) for t in activations(m, 576))
    b, b_s = (guarded(t) for t in weights(64, 576))
    together = gemm.gemm(a, a_s, b, b_s, torch.float32, tile)
    for rows in (slice(0, 1), slice(7, m - 6), slice(m - 3, m)):
        alone = gemm.gemm(a[rows].contiguous(), a_s[rows].contiguous(), b, b_s, torch.float32, tile)
        assert same(alone, together[rows])


@pytest.mark.parametrize("n, k", [(576, 1040), (260, 100)])
def test_a_row_s_bits_do_not_depend_on_how_many_there_are(n: int, k: int) -> None:
    """By the tile for 16 rows, K split or not: of 70 rows, of 17 of them, and alone."""
    b, b_s = (guarded(t) for t in weights(n, k))
    x = torch.randn(70, k).bfloat16().to(DEVICE)
    a, a_s = quantisation.act_quant(x)
    fp8 = INTERPRETED or device.has_fp8(torch.device(DEVICE))

    def products(rows: slice) -> list[torch.Tensor]:
        """The products of these rows, in every form there is."""
        plain = gemm.w8a16_gemm(guarded(x[rows]), b, b_s, torch.float32, as_for=16)
        if not fp8:
            return [plain]
        return [plain, gemm.fp8_gemm(guarded(a[rows]), guarded(a_s[rows]), b, b_s, torch.float32, as_for=16)]

    together = products(slice(0, 70))
    for rows in (slice(3, 20), slice(5, 6)):
        assert all(same(some, whole[rows]) for some, whole in zip(products(rows), together, strict=True))


def test_no_tokens() -> None:
    b, b_s = (t.to(DEVICE) for t in weights(200, 192))
    x = torch.zeros(0, 192, dtype=torch.bfloat16, device=DEVICE)
    assert gemm.w8a16_gemm(x, b, b_s).shape == (0, 200)


def test_nan_stays_in_its_row_and_column() -> None:
    x, (b, b_s) = torch.randn(20, 192).bfloat16(), weights(200, 192)
    x[3, 100] = math.nan
    b.view(torch.uint8)[150, 130] = 0xFF
    expected = torch.zeros(20, 200, dtype=torch.bool)
    expected[3], expected[:, 150] = True, True
    for y in (gemm.w8a16_gemm(guarded(x), guarded(b), guarded(b_s)), reference.w8a16_gemm(x, b, b_s)):
        assert torch.equal(y.isnan().cpu(), expected)


def test_mistaken_shapes_are_refused() -> None:
    x, (b, b_s) = torch.randn(4, 192).bfloat16(), weights(200, 192)
    for product in (gemm.w8a16_gemm, reference.w8a16_gemm):
        with pytest.raises(AssertionError):
            product(x, b, b_s[:1])
    for dequant in (quantisation.weight_dequant, reference.weight_dequant):
        with pytest.raises(AssertionError):
            dequant(b, b_s.T.contiguous()[:, :1])


# The tables


@pytest.mark.parametrize(
    "capability, row",
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_89"),
    ],
)
def test_architectures(capability: tuple[int, int], row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device.architecture.__wrapped__(torch.device("cuda")) == row


def test_unserved_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match=r"^Tesla T4 \(sm_75\) is none of the GPUs served"):
        device.architecture.__wrapped__(torch.device("cuda"))


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter takes the rows of sm_90")
def test_launches_ask_for_listed_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = GpuBackend()
    with only_listed_launches(gemm, monkeypatch), only_listed_launches(quantisation, monkeypatch):
        for n, k in ((8192, 128), (100, 1024), (100, 2048), (100, 4096), (100, 8192)):  # parts: 1, 2, 4, 8, 16
            b, b_s = torch.zeros(n, k, dtype=E4M3), torch.zeros(-(-n // BLOCK), -(-k // BLOCK))
            quantisation.weight_dequant(b, b_s)
            packed = [ops.pack_weight(random_weight(form, n, k)) for form in FORMS.values() if form.block[0] == 1]
            for m in (1, 16, 17, 32, 33, 64, 65, 256, 257, 5000):
                x = torch.zeros(m, k, dtype=torch.bfloat16)
                q, s = quantisation.act_quant(x)
                quantisation.act_quant(x, scale_fmt="ue8m0")
                gemm.fp8_gemm(q, s, b, b_s)
                gemm.w8a16_gemm(x, b, b_s)
                for w in packed:
                    ops.linear(x, w)
