"""Weights of 8 and 4 bits in every form in Triton: against float64 products of what their bits stand for.

As in test_kernel.py: interpreted without a GPU, outputs NaN beforehand, inputs followed by NaN. test_kernel_moe.py has
the grouped products of two forms, tile by tile.
"""

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from core.numerics import Form, Numerics
from model import Linear
from ops import reference
from ops.formats import Weight
from ops.reference_backend import ReferenceBackend
from support.quantised_weights import FORMS, exact, random_weight

pytest.importorskip("triton")
from test_kernel import DEVICE, PRECISE_BF16, error, guarded, poisoned, reached, same, seeded

from ops.gpu import gemm, moe, quantisation
from ops.gpu.backend import GpuBackend
from ops.gpu.tiles import Tile

__all__ = ["poisoned", "seeded"]  # fixtures, for every test here

OPS = GpuBackend()
ALL = FORMS | {"int4 groups of 64": Form("int4", (1, 64), torch.float32)}
GROUPED = [name for name, form in ALL.items() if form.block[0] == 1]
INT4 = [name for name, form in ALL.items() if form.kind == "int4"]
SHORT = {"int8 groups of 32", "int4 groups of 128", "int4 groups of 32, zero points"}  # one of each kind of loop


def label(value: object) -> str:
    return str(value).replace(", ", "-").replace(" ", "-")


def made(name: str, *shape: int, seed: int = 0) -> tuple[Weight, torch.Tensor]:
    """A weight in the layout of the kernels, followed by NaN, and what it stands for."""
    w = random_weight(ALL[name], *shape, seed=seed)
    meant, s, z = exact(w), w.scale, w.zero
    assert s is not None
    w = OPS.pack_weight(w._replace(data=guarded(w.data), scale=guarded(s), zero=None if z is None else guarded(z)))
    return w, meant


def product(x: torch.Tensor, w: Weight, tile: Tile, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    assert w.scale is not None
    return gemm.gemm(guarded(x), None, w.data, w.scale, dtype, tile, w.block, w.zero)


def chosen(w: Weight, rows: int, k: int, as_for: int | None = None) -> Tile:
    """The tile that the op itself takes."""
    op = "w8a16_gemm" if w.block == reference.BLOCK else "w4a16_gemm"
    return gemm._choose(op, torch.empty(rows, k, device=DEVICE), w.data, as_for)


# The order of packed weights


def test_words_hold_nibbles_in_the_order_of_the_kernels() -> None:
    """Of channel k = 16 t + 8 h + 2 q + e, word q has nibble 4 e + 2 t + h, said here channel by channel."""
    w = torch.randint(256, (2, 3, 48), dtype=torch.uint8)
    before, words = w.clone(), quantisation.interleave(w)
    assert words.dtype == torch.int32 and words.shape == (2, 3, 12) and words.data_ptr() == w.data_ptr()
    for k in range(96):
        stored = before[..., k // 2] >> 4 * (k % 2) & 15
        unit, t, h, q, e = k // 32, k // 16 % 2, k // 8 % 2, k // 2 % 4, k % 2
        assert torch.equal(words[..., 4 * unit + q] >> 4 * (4 * e + 2 * t + h) & 15, stored.int()), k
    assert torch.equal(quantisation.natural(words), before)


def test_packing_takes_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randint(256, (3, 5, 32), dtype=torch.uint8)
    whole = quantisation.interleave(w.clone())
    monkeypatch.setattr(quantisation, "AT_A_TIME", 70)
    assert torch.equal(quantisation.interleave(w), whole)


@pytest.mark.parametrize("name", GROUPED, ids=label)
def test_packing_is_in_place(name: str) -> None:
    """Nothing is held twice, and scales are what they were, by their indices."""
    w = random_weight(ALL[name], 2, 20, 256)
    scale, zero = w.scale.clone(), None if w.zero is None else w.zero.clone()
    packed = OPS.pack_weight(w)
    for before, after in ((w.data, packed.data), (w.scale, packed.scale), (w.zero, packed.zero)):
        assert (before is None) == (after is None)
        assert before is None or (before.data_ptr() == after.data_ptr() and before.nbytes == after.nbytes)
    assert torch.equal(packed.scale, scale) and packed.scale.mT.is_contiguous()
    assert zero is None or (torch.equal(packed.zero, zero) and packed.zero.mT.is_contiguous())


@pytest.mark.parametrize("zeros", [False, True])
def test_every_nibble_with_every_zero_point(zeros: bool) -> None:
    """Row n's zero point is n; one-hot tokens pick each channel out."""
    nibbles = torch.arange(32).expand(16, 32) % 16
    data = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    zero = torch.arange(16, dtype=torch.uint8).view(16, 1) if zeros else None
    w = OPS.pack_weight(Weight(guarded(data), guarded(torch.ones(16, 1)), block=(1, 32), zero=zero))
    y = product(torch.eye(32).bfloat16(), w, chosen(w, 32, 32))
    assert torch.equal(y.cpu().T, (nibbles - (torch.arange(16)[:, None] if zeros else 8)).float())


# Dense


@pytest.mark.parametrize(
    "name, n, groups, rows",
    [(name, *shape) for name in ALL for shape in ((1, 1, 1), (100, 3, 17), (40, 2, 70))] + [("int4 groups of 32", 72, 9, 3)],
    ids=label,
)
def test_a_product(name: str, n: int, groups: int, rows: int) -> None:
    """By the tile that is chosen; the smallest there can be, and channels that are no whole number of 128."""
    k = groups * ALL[name].block[1]
    w, meant = made(name, n, k)
    x = (torch.randn(rows, k) * torch.exp2(torch.randint(-6, 6, (rows, k)))).bfloat16()
    y = product(x, w, chosen(w, rows, k))
    assert y.shape == (rows, n) and error(y, x.double(), meant) < PRECISE_BF16
    assert same(OPS.linear(guarded(x), w), y.bfloat16())


@pytest.mark.parametrize("tile", reached("w4a16_gemm"))
def test_every_tile(tile: Tile) -> None:
    """Two row tiles and two column tiles, the last of each ragged, over a block of channels and one group."""
    w, meant = made("int4 groups of 32, zero points", tile.block_n + 28, 160)
    x = torch.randn(tile.block_m + 5, 160).bfloat16()
    assert error(product(x, w, tile), x.double(), meant) < PRECISE_BF16


@pytest.mark.parametrize("split", [2, 4])
@pytest.mark.parametrize("name", sorted(SHORT), ids=label)
def test_split_k(name: str, split: int) -> None:
    """Parts of five blocks of channels, or of four and a group: uneven, and the last of four parts is empty."""
    k = 544 if ALL[name].block[1] == 32 else 640
    w, meant = made(name, 40, k)
    x = torch.randn(3, k).bfloat16()
    tile = replace(chosen(w, 3, k), split=split)
    y = product(x, w, tile)
    assert error(y, x.double(), meant) < PRECISE_BF16
    assert same(product(x, w, tile, torch.bfloat16), y.bfloat16())


@pytest.mark.parametrize("name", sorted(SHORT), ids=label)
def test_a_row_s_bits_do_not_depend_on_how_many_there_are(name: str) -> None:
    ops, k = GpuBackend(batch_invariant=True), 512
    w, _ = made(name, 40, k)
    x = torch.randn(20, k).bfloat16().to(DEVICE)
    together = ops.linear(x, w)
    assert chosen(w, 20, k, 16) == chosen(w, 1, k) and chosen(w, 20, k) != chosen(w, 1, k)
    for rows in (slice(3, 20), slice(5, 6)):
        assert same(ops.linear(guarded(x[rows]), w), together[rows])


def test_no_tokens() -> None:
    w, _ = made("int4 groups of 32", 40, 96)
    assert OPS.linear(torch.zeros(0, 96, dtype=torch.bfloat16, device=DEVICE), w).shape == (0, 40)


def test_nan_stays_in_its_row_and_column() -> None:
    """Of a token, and of a group's scale."""
    w = random_weight(ALL["int4 groups of 32"], 40, 96)
    x = torch.randn(20, 96).bfloat16()
    x[3, 50], w.scale[30, 1] = math.nan, math.nan
    expected = torch.zeros(20, 40, dtype=torch.bool)
    expected[3], expected[:, 30] = True, True
    packed = OPS.pack_weight(w._replace(data=guarded(w.data), scale=guarded(w.scale)))
    assert torch.equal(OPS.linear(guarded(x), packed).isnan().cpu(), expected)


# What the kernels do not multiply


@pytest.mark.parametrize("name", [*GROUPED, "int8 blocks"], ids=label)
def test_float32_activations_are_multiplied_as_the_reference_does(name: str) -> None:
    w, meant = made(name, 40, 128)
    x = torch.randn(5, 128)
    assert error(OPS.linear(x.to(DEVICE), w), x.double(), meant) < PRECISE_BF16


@pytest.mark.parametrize("kind, group, k", [("int4", 16, 256), ("int4", 256, 256), ("int8", 32, 80)])
def test_other_groups_are_multiplied_as_the_reference_does(kind: Literal["int4", "int8"], group: int, k: int) -> None:
    """Smaller and larger ones, and a last one that is not whole."""
    w = random_weight(Form(kind, (1, group), torch.bfloat16), 40, k)
    x, meant = torch.randn(5, k).bfloat16(), exact(w)
    packed = OPS.pack_weight(w)
    assert packed.data is w.data and packed.scale is w.scale
    y = OPS.linear(x, packed)
    assert same(y, ReferenceBackend().linear(x, w))
    assert ((y.double() - x.double() @ meant.T).abs() <= (x.double().abs() @ meant.abs().T) / 256).all()


def test_mistaken_shapes_are_refused() -> None:
    w, _ = made("int4 groups of 32, zero points", 40, 128)
    x, tile = torch.randn(4, 128).bfloat16(), chosen(w, 4, 128)
    for wrong in (
        w._replace(scale=w.scale[:, 1:]),
        w._replace(zero=w.zero[1:]),
        w._replace(data=w.data[:, 4:].contiguous()),
        w._replace(block=(1, 48)),
    ):
        with pytest.raises(AssertionError):
            product(x, wrong, tile)


def test_a_projection_of_the_model_is_prepared() -> None:
    """Data, scales and zero points in the layout of the kernels; before, it dequantises as it was stored."""
    w = random_weight(ALL["int4 groups of 32, zero points"], 80, 96)
    meant, x = exact(w), torch.randn(3, 96).bfloat16()
    num = Numerics(torch.bfloat16, "bf16", projections=ALL["int4 groups of 32, zero points"])
    linear = Linear(96, {"w1": 40, "w3": 40}, num, OPS)
    for parameter, stored in ((linear.weight, w.data), (linear.scale, w.scale), (linear.zero, w.zero)):
        parameter.copy_(stored)
    assert torch.equal(linear.dequantised(torch.float32).cpu(), meant.float())
    linear.prepare()
    assert linear.w.data.dtype == torch.int32 and linear.w.scale.mT.is_contiguous()
    assert ((linear(x.to(DEVICE)).cpu().double() - x.double() @ meant.T).abs() <= (x.double().abs() @ meant.abs().T) / 256).all()


# Experts


def experts_exactly(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, first: int, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The layer in float64; what is between the two products is rounded to bfloat16, as it is everywhere."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for weight, e in zip(weights[t].double(), ids[t].tolist(), strict=True):
            if first <= e < first + len(up):
                gate_up = (up[e - first] @ x[t].double()).bfloat16()
                gate, value = gate_up.float().chunk(2)
                out[t] += weight * (down[e - first] @ (F.silu(gate) * value).bfloat16().double()).bfloat16().double()
    return out


@pytest.mark.parametrize(
    "name, first, n_local, h, inter",
    [(name, 2, 2, 256, 128) for name in ALL if name != "fp8"] + [("int4 groups of 32, zero points", 0, 5, 160, 32)],
    ids=label,
)
def test_experts(name: str, first: int, n_local: int, h: int, inter: int) -> None:
    """Some of the experts, and all of them with a share of their inner width."""
    tokens = 6
    (w13, up), (w2, down) = made(name, n_local, 2 * inter, h), made(name, n_local, h, inter, seed=1)
    x, weights, ids = torch.randn(tokens, h).bfloat16(), torch.rand(tokens, 2), torch.rand(tokens, 5).topk(2).indices
    here = guarded(x), guarded(weights), guarded(ids), first
    found = OPS.experts(*here, w13, w2, inter, n_experts=5)
    expected = experts_exactly(x, weights, ids, first, up, down)
    assert found.dtype == torch.bfloat16 and expected.norm() > 0
    assert (found.cpu().double() - expected).norm() < 5e-3 * expected.norm()


def test_experts_in_float32_are_as_the_reference_s() -> None:
    h, inter = 64, 32
    (w13, up), (w2, down) = (made("int4 groups of 32", 3, *shape) for shape in ((2 * inter, h), (h, inter)))
    x, weights, ids = torch.randn(4, h), torch.rand(4, 2), torch.rand(4, 3).topk(2).indices
    found = OPS.experts(x.to(DEVICE), weights.to(DEVICE), ids.to(DEVICE), 0, w13, w2, inter)
    expected = experts_exactly(x, weights, ids, 0, up, down)
    assert (found.cpu().double() - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("name", INT4, ids=label)
def test_a_weight_is_reached_by_its_expert(name: str) -> None:
    """Each expert of a stack that was packed, on its own: scales keep their order."""
    w, meant = made(name, 3, 40, 128)
    x = torch.randn(2, 128).bfloat16()
    for e in range(3):
        y = OPS.linear(guarded(x), w.expert(e))
        assert ((y.cpu().double() - x.double() @ meant[e].T).abs() <= (x.double().abs() @ meant[e].abs().T) / 256).all()


def test_grouped_tiles_are_those_of_the_form() -> None:
    """Blocks of 128 x 128 by the tiles of FP8, groups by tiles with room for a scale for each row."""
    device = torch.device(DEVICE)
    own = moe.architecture(device)
    for name in ALL:
        table = moe.tiles.GROUPED_W8A16 if ALL[name].block == reference.BLOCK else moe.tiles.GROUPED_W4A16
        assert moe.grouped_tiles(made(name, 2, 4, 128)[0], device) is table[own]
