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

import reference
from errors import UserError

pytest.importorskip("triton")
from triton.runtime import interpreter

import kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = kernel.INTERPRETED.value
E4M3 = torch.float8_e4m3fn
PRECISE = 1e-6 if INTERPRETED else 5e-4  # FP8 tensor cores add up the 128 products of a block in about 14 bits
PRECISE_BF16 = 1e-6 if INTERPRETED else 1e-5  # and cut, rather than round, what they add in float32
BLOCK = 128
SHAPES = [(100, 576), (576, 192), (260, 100), (128, 128)]  # (N, K); 576 = 4.5 blocks


TAIL = 1 << 17  # elements: more than a tile's worth of rows
POISON = -(1 << 30)  # what stands for NaN among integers


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives NaN (integers: POISON), and a tail of it behind that nobody may write, nor an interpreted kernel read."""
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
    yield
    assert all((tail.float().isnan() if tail.is_floating_point() else tail == POISON).all() for tail in tails)


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
        used = addresses[np.broadcast_to(mask, addresses.shape)]
        for tail in self.tails:
            start = tail.data_ptr()
            assert not ((used >= start) & (used < start + tail.nbytes)).any(), "out of bounds"


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
    q, s = kernel.act_quant(guarded(x), scale_fmt=scale_fmt, dtype=E4M3)
    expected_q, expected_s = reference.act_quant(x, scale_fmt=scale_fmt)
    assert q.is_contiguous() and same(q, expected_q)
    assert s.is_contiguous() and same(s, expected_s)
    assert ((expected_q.double() * wide(expected_s, expected_q.shape, 1) - x.double()).abs() <= x.abs() / 15).all()


def test_act_quant_of_a_view_and_of_nothing() -> None:
    x = guarded(torch.randn(6, 256).bfloat16())
    assert same(kernel.act_quant(x[:, 64:192], dtype=E4M3)[0], kernel.act_quant(x[:, 64:192].clone(), dtype=E4M3)[0])
    assert same(kernel.act_quant(x, 64, dtype=E4M3)[0], reference.act_quant(x.cpu(), 64)[0])
    q, s = kernel.act_quant(x[:0])
    assert q.shape == (0, 256) and s.shape == (0, 2)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (3, 130, 260)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_dequant(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w, s = weights(*shape)
    expected = (w.double() * wide(s, w.shape, BLOCK)).float().to(dtype)  # 4 by 24 bits: exact in float64
    assert same(reference.weight_dequant(w, s, dtype), expected)
    assert same(kernel.weight_dequant(guarded(w), guarded(s), dtype), expected)


# The GEMMs

needs_fp8 = pytest.mark.skipif(
    not INTERPRETED and not kernel.has_fp8(torch.device(DEVICE)), reason="this GPU has no FP8 tensor cores"
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
    y = kernel.fp8_gemm(*on_device, torch.float32)
    assert y.shape == (m, n) and error(y, *exact) < PRECISE
    assert same(kernel.fp8_gemm(*on_device), y.bfloat16())
    assert same(reference.fp8_gemm(a, a_s, b, b_s), reference.fp8_gemm(a, a_s, b, b_s, torch.float32).bfloat16())


@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("m", [1, 3, 16, 33, 130])
def test_w8a16_gemm(m: int, n: int, k: int) -> None:
    x = (torch.randn(m, k) * torch.exp2(torch.randint(-6, 6, (m, k)))).bfloat16()
    b, b_s = weights(n, k)
    exact = x.double(), b.double() * wide(b_s, b.shape, BLOCK)
    assert error(reference.w8a16_gemm(x, b, b_s, torch.float32), *exact) < 1e-6
    on_device = [guarded(t) for t in (x, b, b_s)]
    y = kernel.w8a16_gemm(*on_device, torch.float32)
    assert y.shape == (m, n) and error(y, *exact) < PRECISE_BF16
    assert same(kernel.w8a16_gemm(*on_device), y.bfloat16())
    assert same(reference.w8a16_gemm(x, b, b_s), reference.w8a16_gemm(x, b, b_s, torch.float32).bfloat16())


def tiles(tables: dict[str, tuple[kernel.Tile, ...]]) -> list[kernel.Tile]:
    """On a GPU its own, in the interpreter all of them."""
    archs = tables if INTERPRETED else [a for a in tables if a == kernel.architecture(torch.device(DEVICE))]
    return list({str(tile.constexprs()): tile for arch in archs for tile in tables[arch]}.values())


@pytest.mark.parametrize("tile", tiles(kernel.W8A8), ids=str)
def test_every_fp8_tile(tile: kernel.Tile) -> None:
    """Two row tiles and five column tiles, the last of each ragged, over two and a half blocks of channels."""
    m, n, k = tile.block_m + 5, 4 * tile.block_n + 28, 320
    a, a_s = activations(m, k)
    b, b_s = weights(n, k)
    y = kernel.gemm(*[guarded(t) for t in (a, a_s, b, b_s)], torch.float32, tile)
    assert error(y, a.double() * wide(a_s, a.shape, 1), b.double() * wide(b_s, b.shape, BLOCK)) < PRECISE


@pytest.mark.parametrize("tile", tiles(kernel.W8A16), ids=str)
def test_every_w8a16_tile(tile: kernel.Tile) -> None:
    m, n, k = tile.block_m + 5, 4 * tile.block_n + 28, 320
    x = torch.randn(m, k).bfloat16()
    b, b_s = weights(n, k)
    y = kernel.gemm(guarded(x), None, guarded(b), guarded(b_s), torch.float32, tile)
    assert error(y, x.double(), b.double() * wide(b_s, b.shape, BLOCK)) < PRECISE_BF16


def test_programs_cover_every_tile_once() -> None:
    """More row tiles than share a group, and a last group that is not full."""
    tile = kernel.Tile(math.inf, 16, 16, False, 4, 2)
    m, n = (kernel.GROUP_M + 3) * 16, 48
    x = torch.randn(m, 32).bfloat16()
    b, b_s = weights(n, 32)
    y = kernel.gemm(guarded(x), None, guarded(b), guarded(b_s), torch.float32, tile)
    assert error(y, x.double(), b.double() * wide(b_s, b.shape, BLOCK)) < PRECISE_BF16


def test_no_tokens() -> None:
    b, b_s = (t.to(DEVICE) for t in weights(200, 192))
    x = torch.zeros(0, 192, dtype=torch.bfloat16, device=DEVICE)
    assert kernel.w8a16_gemm(x, b, b_s).shape == (0, 200)


def test_nan_stays_in_its_row_and_column() -> None:
    x, (b, b_s) = torch.randn(20, 192).bfloat16(), weights(200, 192)
    x[3, 100] = math.nan
    b.view(torch.uint8)[150, 130] = 0xFF
    expected = torch.zeros(20, 200, dtype=torch.bool)
    expected[3], expected[:, 150] = True, True
    for y in (kernel.w8a16_gemm(guarded(x), guarded(b), guarded(b_s)), reference.w8a16_gemm(x, b, b_s)):
        assert torch.equal(y.isnan().cpu(), expected)


def test_mistaken_shapes_are_refused() -> None:
    x, (b, b_s) = torch.randn(4, 192).bfloat16(), weights(200, 192)
    for gemm in (kernel.w8a16_gemm, reference.w8a16_gemm):
        with pytest.raises(AssertionError):
            gemm(x, b, b_s[:1])
    for dequant in (kernel.weight_dequant, reference.weight_dequant):
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
    assert kernel.architecture.__wrapped__(torch.device("cuda")) == row


def test_unserved_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match=r"^Tesla T4 \(sm_75\) is none of the GPUs served"):
        kernel.architecture.__wrapped__(torch.device("cuda"))


@pytest.mark.parametrize("tables", [kernel.W8A8, kernel.W8A16], ids=["W8A8", "W8A16"])
def test_tables_serve_every_m(tables: dict[str, tuple[kernel.Tile, ...]]) -> None:
    for table in tables.values():
        bounds = [tile.up_to for tile in table]
        assert bounds == sorted(set(bounds)) and bounds[-1] == math.inf
        assert all(BLOCK % tile.block_n == 0 for tile in table)  # one weight scale to a tile
        assert all(m <= kernel.tile_for(table, m).up_to for m in (1, 16, 17, 128, 1000, 1 << 20))


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter takes the rows of sm_90")
def test_launches_ask_for_listed_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Recorder:
        def __init__(self, name: str, arg_names: list[str]) -> None:
            self.name, self.arg_names = name, arg_names

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                constant = {n: a for n, a in zip(self.arg_names, args, strict=False) if a is None}
                asked.append((self.name, constant | kwargs))

            return launch

    listed = [(c.kernel.fn.__name__, c.constexprs | c.options) for c in kernel.configurations() if c.target == "sm_90"]
    for name in ("act_quant_kernel", "weight_dequant_kernel", "gemm_kernel"):
        monkeypatch.setattr(kernel, name, Recorder(name, getattr(kernel, name).arg_names))
    b, b_s = weights(128, 128)
    kernel.weight_dequant(b, b_s)
    for m in (1, 16, 17, 32, 33, 64, 65, 256, 257, 5000):
        x = torch.zeros(m, 128, dtype=torch.bfloat16)
        q, s = kernel.act_quant(x)
        kernel.act_quant(x, scale_fmt="ue8m0")
        kernel.fp8_gemm(q, s, b, b_s)
        kernel.w8a16_gemm(x, b, b_s)
    assert all(request in listed for request in asked)
    assert all(configuration in asked for configuration in listed)
