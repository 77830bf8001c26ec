"""The attention kernels against attention written out in float64, on ragged sequences over scattered pages.

Whatever no query may see holds NaN: pages that nobody has, the tails of last pages, the workspaces beforehand (see
test_kernel.poisoned), and what lies behind every tensor.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from core.batch import DECODE_ROWS, Batch, BatchBounds
from ops import formats, reference

pytest.importorskip("triton")
from test_kernel import DEVICE, INTERPRETED, guarded, poisoned, same  # noqa: F401  (poisoned works by being here)
from triton.tools.tensor_descriptor import TensorDescriptor

from ops.gpu import attention, attention_tiles, decode, device, latents, prefill, tiles
from ops.gpu.backend import GpuBackend
from ops.reference_backend import in_row_blocks
from support.kernel_configurations import configurations

DTYPE = torch.float32 if INTERPRETED else torch.bfloat16  # compiled, the kernels multiply in bfloat16
EXACT = 2e-6 if INTERPRETED else 1e-2
SCALE = 0.37
SMALL = (3, 24, 16, 20, 48)  # N, dn, R, dv, C: no power of two but one
TINY = (1, 16, 16, 16, 32)


class Problem:
    """Ragged sequences over shuffled pages, and the answer."""

    def __init__(
        self, lengths: list[int], new: list[int], dims: tuple[int, ...] = SMALL, packed: bool = False, seed: int = 0
    ):
        g = torch.Generator().manual_seed(seed)
        self.n, dn, r, dv, c = dims
        self.lengths, self.new, self.c = lengths, new, c
        n_pages = [-(-length // 64) for length in lengths]
        order = (torch.randperm(sum(n_pages), generator=g) + 1).tolist()  # page 0, which fills up tables, is nobody's
        self.pages = [[order.pop() for _ in range(n)] for n in n_pages]
        self.latents = [torch.randn(length, c + r, generator=g) for length in lengths]
        width = formats.packed_latent_bytes(c, r) if packed else c + r
        pool = torch.full((sum(n_pages) + 2, 64, width), 0xFF if packed else math.nan)
        pool = pool.to(torch.uint8 if packed else DTYPE)
        for i, (latent, pages) in enumerate(zip(self.latents, self.pages, strict=True)):
            rows = reference.pack_latents(latent, c) if packed else latent.to(DTYPE)
            self.latents[i] = reference.unpack_latents(rows, c, torch.float32) if packed else rows
            for at, page in enumerate(pages):
                part = rows[at * 64 : at * 64 + 64]
                pool[page, : len(part)] = part
        self.pool = guarded(pool.view(torch.float8_e4m3fn)).view(torch.uint8) if packed else guarded(pool)
        self.q_nope, self.q_pe = (torch.randn(sum(new), self.n, d, generator=g).to(DTYPE) for d in (dn, r))
        self.w_uk, self.w_uv = ((torch.randn(self.n, d, c, generator=g) / c**0.5).to(DTYPE) for d in (dn, dv))

    @property
    def batch(self) -> Batch:
        batch = Batch.pack([([0] * q, n - q, p) for n, q, p in zip(self.lengths, self.new, self.pages, strict=True)])
        tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        return replace(batch, **{name: value.to(DEVICE) for name, value in tensors.items()})

    def inputs(self, batch: Batch | None = None) -> tuple[Any, ...]:
        q = torch.cat((self.q_nope, self.q_pe), dim=-1)  # q_nope is a part of a wider tensor, as in the model
        q_nope = guarded(q.index_fill(-1, torch.arange(self.q_nope.shape[-1], q.shape[-1]), math.nan))
        q_nope, q_pe = q_nope[..., : self.q_nope.shape[-1]], guarded(self.q_pe)
        return q_nope, q_pe, self.pool, batch or self.batch, guarded(self.w_uk), guarded(self.w_uv), SCALE

    def expected(self) -> torch.Tensor:
        """Every head's keys and values written out, in float64."""
        out, at = [], 0
        for n, q, latent in zip(self.lengths, self.new, self.latents, strict=True):
            c_kv, k_pe = latent.double().split([self.c, latent.shape[1] - self.c], dim=-1)
            k = torch.einsum("lc,hdc->hld", c_kv, self.w_uk.double())
            k = torch.cat((k, k_pe.expand(self.n, -1, -1)), dim=-1)
            v = torch.einsum("lc,hdc->hld", c_kv, self.w_uv.double())
            query = torch.cat((self.q_nope, self.q_pe), dim=-1)[at : at + q].double().transpose(0, 1)
            visible = torch.arange(n) <= torch.arange(n - q, n)[:, None]
            scores = (query @ k.mT * SCALE).masked_fill(~visible, -math.inf)
            out.append((scores.softmax(-1) @ v).transpose(0, 1))
            at += q
        return torch.cat(out)


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """The worst of any (token, head)'s relative errors: in a norm over all one wrong row would hide."""
    gap = (y.cpu().double() - expected).norm(dim=-1)
    return (gap / expected.norm(dim=-1)).max().item()


def prefilled(batch: Batch) -> Batch:
    """The same batch, every sequence of which is to go through the prefill kernel."""
    return replace(batch, decode=BatchBounds(), prefill=batch.whole)


BATCHES = [
    ([1], [1]),
    ([1, 2, 63, 64, 65, 130, 700], [1, 2, 3, 4, 5, 1, 1]),  # decode and verification
    ([64, 130, 66], [64, 70, 65]),  # fresh, behind a prefix, and one token past a tile
    ([513, 40, 1, 200], [1, 40, 1, 150]),  # all at once
]


@pytest.mark.parametrize("lengths, new", BATCHES)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "fp8"])
def test_against_float64(lengths: list[int], new: list[int], packed: bool) -> None:
    p = Problem(lengths, new, packed=packed)
    assert error(attention.mla(*p.inputs()), p.expected()) < EXACT


@pytest.mark.parametrize("lengths, new", [([1, 2, 63, 65], [1, 2, 63, 1]), ([130, 300], [130, 40])])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "fp8"])
def test_prefill_of_few_rows(lengths: list[int], new: list[int], packed: bool) -> None:
    p = Problem(lengths, new, packed=packed)
    assert error(attention.mla(*p.inputs(prefilled(p.batch))), p.expected()) < EXACT


def own(table: dict[Any, tuple[attention_tiles.AttentionTile, ...]]) -> list[attention_tiles.AttentionTile]:
    """On a GPU its own tiles, in the interpreter all of them, each once."""
    arch = None if INTERPRETED else device.architecture(torch.device(DEVICE))
    found = [tile for key, tiles in table.items() if arch is None or arch in key for tile in tiles]
    return list({(tile.rows, tile.keys, tile.swap, tile.descriptor, tile.by_group): tile for tile in found}.values())


def own_for(packed: bool) -> list[Any]:
    tables = {key: table for key, table in attention_tiles.DECODE.items() if key[1] == packed}
    name = "fp8" if packed else "plain"
    return [pytest.param(tile, packed, id=f"{name}-{tile.rows}x{tile.keys}{'-by-group' * tile.by_group}"
                         f"{'-descriptor' * tile.descriptor}{'-swap' * tile.swap}") for tile in own(tables)]  # fmt: skip


@pytest.mark.parametrize("tile, packed", [*own_for(False), *own_for(True)])
def test_every_decode_tile(tile: attention_tiles.AttentionTile, packed: bool) -> None:
    """Rows of one sequence in two tiles and more, and pages in three runs."""
    p = Problem([150, 40], [1 + tile.rows // 5, 3], (6, 16, 16, 16, 32), packed)
    batch = p.batch
    q = guarded(torch.einsum("tnd,ndc->tnc", p.q_nope, p.w_uk))
    o = decode.decode(q, guarded(p.q_pe), p.pool, batch, batch.whole, SCALE, programs=3, tile=tile)
    assert error(torch.einsum("tnc,nvc->tnv", o.cpu(), p.w_uv), p.expected()) < EXACT


@pytest.mark.parametrize("tile", own(attention_tiles.PREFILL), ids=str)
def test_every_prefill_tile(tile: attention_tiles.AttentionTile) -> None:
    p = Problem([tile.rows + 70, 40], [tile.rows + 5, 3])
    out = torch.empty(sum(p.new), p.n, 20, dtype=DTYPE, device=DEVICE)
    inputs = p.inputs(prefilled(p.batch))
    prefill.prefill(*inputs, out, tile)
    assert error(out, p.expected()) < EXACT


@pytest.mark.parametrize(
    "dims, wide",
    [(TINY, False), ((2, 128, 64, 192, 64), True), ((1, 192, 64, 256, 64), True)],
    ids=["tiny", "gigachat3", "glm-4.7-flash"],
)
def test_wide_heads_have_tiles_of_their_own(dims: tuple[int, ...], wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values as wide as those of two released models, one row and many."""
    tables: list[Any] = []
    monkeypatch.setattr(prefill, "tile_for", lambda table, rows: tables.append(table) or tiles.tile_for(table, rows))
    monkeypatch.setitem(globals(), "SCALE", (dims[1] + dims[2]) ** -0.5)  # as in a model: scores of about 1
    p = Problem([70, 130], [1, 66], dims)
    assert error(attention.mla(*p.inputs()), p.expected()) < EXACT
    assert tables[-1] is attention_tiles.PREFILL[device.architecture(torch.device(DEVICE)), wide]


@pytest.mark.parametrize("n_heads", [16, 128])
def test_heads_of_v3(n_heads: int) -> None:
    p = Problem([70, 3], [1, 1], (n_heads, 16, 16, 16, 32))
    assert error(attention.mla(*p.inputs()), p.expected()) < EXACT


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "fp8"])
def test_wide_latents(packed: bool) -> None:
    """More columns than one scale covers, or one program combines."""
    p = Problem([70, 3], [2, 3], (2, 16, 16, 16, 160), packed)
    assert error(attention.mla(*p.inputs()), p.expected()) < EXACT
    assert error(attention.mla(*p.inputs(prefilled(p.batch))), p.expected()) < EXACT


def test_runs_agree() -> None:
    p = Problem([700, 65, 1], [3, 1, 1], TINY)
    batch = p.batch
    q = guarded(torch.einsum("tnd,ndc->tnc", p.q_nope, p.w_uk))

    def shared_by(programs: int) -> torch.Tensor:
        return decode.decode(q, guarded(p.q_pe), p.pool, batch, batch.decode, SCALE, programs=programs)

    whole = shared_by(1)
    for programs in (2, 5, 14):
        assert error(shared_by(programs), whole.cpu().double()) < EXACT / 2
    assert not same(shared_by(14), whole)  # or nothing was split


def test_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace that holds the parts of two tokens."""
    p = Problem([300, 1, 130], [2, 1, 5])
    inputs = p.inputs()
    whole = attention.mla(*inputs)
    monkeypatch.setattr(decode, "SPLIT_BYTES", 12 * p.n * 2 * p.c * 4 + 1)  # two tokens' five pages each
    batch = p.batch
    assert error(attention.mla(*p.inputs(batch)), whole.cpu().double()) < EXACT / 2
    assert [key[1:3] for key in batch.memo] == [(0, 2), (2, 4), (4, 6), (6, 8)]


@pytest.mark.parametrize("keys", [64, 100, 231])
def test_prefill_in_slabs(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs that end anywhere in a sequence, and hold several of them."""
    p = Problem([200, 20, 150, 90], [130, 20, 66, 1], (2, 24, 16, 20, 48))
    inputs = p.inputs(prefilled(p.batch))
    monkeypatch.setattr(prefill, "SLAB_BYTES", keys * (2 * (24 + 20) + 48 + 16) * p.q_nope.itemsize)
    assert error(attention.mla(*inputs), p.expected()) < EXACT


def test_bounds_may_be_above_what_is() -> None:
    for new in ([1, 2, 1], [70, 80, 66]):
        p = Problem([100, 90, 66], new)
        batch = p.batch
        name = "decode" if batch.decode.n else "prefill"
        bounds = replace(batch.whole, longest_q=2 * max(new), longest_kv=2048, total_kv=3000)
        assert error(attention.mla(*p.inputs(replace(batch, **{name: bounds}))), p.expected()) < EXACT


# How decode shares its work


Segment = tuple[int, int, int, int, int]  # sequence, tile of its rows, first page, pages, number


def planned(lengths: list[int], new: list[int], programs: int, fixed: int = 0, longest: int = 0) -> list[list[Segment]]:
    """The segments of each run, as plan_runs_kernel plans them; 6 heads in tiles of 16 rows."""
    runs, segments = decode.count_runs(
        BatchBounds(len(new), sum(new), max(new), longest or max(lengths), len(new) * longest or sum(lengths)),
        sum(new), 6, 16, 64, programs, fixed,
    )  # fmt: skip
    assert runs <= programs or fixed
    bounds = torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32)
    given = guarded(torch.tensor(lengths, dtype=torch.int32)), guarded(bounds)
    table = torch.empty(runs, 2, dtype=torch.int32, device=DEVICE)
    rows = torch.empty(segments, 5, dtype=torch.int32, device=DEVICE)
    decode.plan_runs_kernel[(len(new),)](*given, table, rows, runs, 0, sum(new), fixed, 6, 16, 64)
    found = []
    for begin, end in table.tolist():
        assert 0 <= begin <= end <= segments
        found.append(
            [
                (s, tile, low, high - low, begin + i)
                for i, (s, tile, low, high, _) in enumerate(rows[begin:end].tolist())
            ]
        )
    parts = Counter((s, tile) for run in found for s, tile, *_ in run)
    assert all(rows[place, 4] == parts[s, tile] for run in found for s, tile, *_, place in run)
    return found


def pages_of(lengths: list[int], new: list[int]) -> int:
    return sum(-(-n // 64) * -(-q * 6 // 16) for n, q in zip(lengths, new, strict=True))


@pytest.mark.parametrize("fixed", [0, 8])
@pytest.mark.parametrize("programs", [3, 264, 100_000])
def test_every_page_is_in_one_run(fixed: int, programs: int) -> None:
    """With more sequences than are looked at at a time, of one tile of rows and of two."""
    g = torch.Generator().manual_seed(programs)
    lengths = torch.randint(1, 4_000, (150,), generator=g).tolist()
    new = torch.randint(1, 5, (150,), generator=g).tolist()
    found = planned(lengths, new, programs, fixed)
    segments = [one for run in found for one in run]
    pages = [(s, tile, page + i) for s, tile, page, n, _ in segments for i in range(n)]
    counts = [(-(-n // 64), -(-q * 6 // 16)) for n, q in zip(lengths, new, strict=True)]
    assert pages == [(s, tile, i) for s, (n, tiles) in enumerate(counts) for tile in range(tiles) for i in range(n)]
    assert {tiles for _, tiles in counts} == {1, 2}
    places = [place for *_, place in segments]
    assert len(set(places)) == len(places)
    for one, after in itertools.pairwise(segments):
        assert after[4] == one[4] + 1 or after[:2] != one[:2]  # combine_parts_kernel goes from one to the next
    shares = [sum(n for *_, n, _ in run) for run in found]
    if fixed:
        assert all(len(run) <= 1 for run in found) and all(page % 8 == 0 and n <= 8 for _, _, page, n, _ in segments)
    else:
        assert max(shares) - min(shares) <= 1


MIXED_LENGTHS = torch.randint(1024, 8192, (64,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("lengths", [[4096] * 34, [4096] * 48, [4096] * 128, MIXED_LENGTHS, [131_072]],
                         ids=["34x4k", "48x4k", "128x4k", "mixed", "1x128k"])  # fmt: skip
def test_the_multiprocessors_finish_together(lengths: list[int]) -> None:
    """Pages read over what the busiest of 132 multiprocessors, of two programs each, would let all read in its time; in
    a graph recorded for long sequences too."""
    for longest in (0, 163_840):
        shares = [sum(n for *_, n, _ in run) for run in planned(lengths, [1] * len(lengths), 264, longest=longest)]
        busiest = max(sum(shares[i::132]) for i in range(132))
        assert sum(shares) / (132 * busiest) >= 0.9
        assert sum(shares) / (264 * max(shares)) >= 0.9


MIXED = [4096, 1, 65, 64, 700, 63]


@pytest.mark.parametrize(
    "lengths, packed",
    [([1], False), ([63], True), ([64], False), ([65], True), ([4096], False), (MIXED, False)]
    + [pytest.param(n, True, marks=pytest.mark.trust) for n in ([4096], MIXED)],
)
def test_a_table_much_wider_than_needed(lengths: list[int], packed: bool) -> None:
    """As where a graph for long contexts is used for short ones: the bits are those of the batch by itself."""
    p = Problem(lengths, [min(3, n) for n in lengths], TINY, packed)
    batch = p.batch
    wide = torch.full((len(lengths), 2560), 1 << 20, dtype=torch.int32)
    wide[:, : batch.pages.shape[1]] = batch.pages.cpu()
    few = replace(batch.decode, longest_kv=163_840, total_kv=len(lengths) * 163_840)
    recorded = replace(batch, pages=wide.to(DEVICE), decode=few)
    out = attention.mla(*p.inputs(recorded))
    assert error(out, p.expected()) < EXACT
    assert same(attention.mla(*p.inputs(batch)), out)
    together = in_mode(p, recorded)
    assert error(together, p.expected()) < EXACT and same(in_mode(p, batch), together)
    assert same(part(p, 0, 0, p.new[0]), together[: p.new[0]])


# Batch-invariant mode


def in_mode(p: Problem, batch: Batch) -> torch.Tensor:
    return attention.mla(*p.inputs(batch), by_rows=in_row_blocks)


def part(p: Problem, i: int, lo: int, hi: int) -> torch.Tensor:
    """New tokens [lo, hi) of sequence i by themselves, as if those before them had come in an earlier chunk."""
    at, start = sum(p.new[:i]), p.lengths[i] - p.new[i]
    batch = Batch.pack([([0] * (hi - lo), start + lo, p.pages[i])], DEVICE)
    alone = Problem.__new__(Problem)
    vars(alone).update(vars(p))
    alone.q_nope, alone.q_pe = p.q_nope[at + lo : at + hi], p.q_pe[at + lo : at + hi]
    return in_mode(alone, batch)


def test_bits_are_independent_of_batch_composition(own_sums: None) -> None:
    p = Problem([600, 1, 100], [3, 1, 70], TINY)
    together = in_mode(p, p.batch)
    assert error(together, p.expected()) < EXACT
    at = 0
    for i, q in enumerate(p.new):
        assert same(part(p, i, 0, q), together[at : at + q])
        at += q


def test_the_same_bits_at_every_cut(own_sums: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With three splits, and a workspace for seven tokens."""
    monkeypatch.setattr(decode, "FIXED_SPLIT", 64)
    p = Problem([131], [20], TINY)
    monkeypatch.setattr(decode, "SPLIT_BYTES", 3 * p.n * p.c * 4 * 7)
    whole = in_mode(p, p.batch)
    for cut in (1, 16, 19):
        assert same(torch.cat((part(p, 0, 0, cut), part(p, 0, cut, 20))), whole)


def test_without_the_mode_bits_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decode.SM_COUNT, device.architecture(torch.device(DEVICE)), 4)
    p = Problem([600, 130], [3, 1], TINY)
    alone = Problem([600], [3], TINY)
    vars(alone).update(pool=p.pool, pages=p.pages[:1], q_nope=p.q_nope[:3], q_pe=p.q_pe[:3])
    assert not same(attention.mla(*alone.inputs()), attention.mla(*p.inputs())[:3])


# What the host does


@pytest.mark.parametrize("invariant", [False, True])
def test_the_backend_s_mla(invariant: bool) -> None:
    """bfloat16 through the GPU's backend, against the reference."""
    p = Problem([300, 1, 100], [1, 1, 70], TINY)
    inputs = [x.to(DEVICE, torch.bfloat16) if isinstance(x, torch.Tensor) else x for x in p.inputs()]
    q_nope, q_pe, *others = inputs
    cos = torch.ones(len(q_pe), q_pe.shape[-1] // 2, device=DEVICE)  # what is given is rotated
    out = GpuBackend(invariant).mla(torch.cat((q_nope, q_pe), dim=-1).flatten(1), cos, cos * 0, *others)
    assert isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16
    assert error(out.view_as(p.expected()), p.expected()) < 3e-2


def test_batches_know_their_bounds() -> None:
    sequences = [(1, 70), (DECODE_ROWS, 0), (3, 300), (DECODE_ROWS + 1, 5), (2, 9)]
    batch = Batch.pack([([0] * q, start, list(range(6))) for q, start in sequences])
    assert batch.decode == BatchBounds(3, DECODE_ROWS + 4, DECODE_ROWS, 303, 71 + DECODE_ROWS + 303)
    assert batch.prefill == BatchBounds(2, DECODE_ROWS + 3, DECODE_ROWS + 1, DECODE_ROWS + 6, DECODE_ROWS + 6 + 11)
    assert batch.whole == BatchBounds(
        5, 2 * DECODE_ROWS + 7, DECODE_ROWS + 1, 303, 71 + DECODE_ROWS + 303 + DECODE_ROWS + 17
    )
    assert Batch.pack([([0], 0, [0])]).prefill == BatchBounds()


class Recorder:
    """Stands in for a kernel: writes down what a launch asks for, by Triton's types."""

    def __init__(self, kernel: Any, asked: list[Any]) -> None:
        self.name, self.arg_names, self.asked = kernel.fn.__name__, kernel.arg_names, asked

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(0 < g < limit for g, limit in zip(grid, (1 << 31, 1 << 16, 1 << 16), strict=False)), grid

        def launch(*args: Any, **kwargs: Any) -> None:
            types = {}
            for name, value in zip(self.arg_names, args, strict=False):
                if value is None:
                    kwargs[name] = None
                elif isinstance(value, TensorDescriptor):
                    block = ", ".join(map(str, value.block_shape))
                    types[name] = f"tensordesc<{NAMES[value.base.dtype][1:]}[{block}]>"
                elif isinstance(value, torch.Tensor):
                    types[name] = NAMES[value.dtype]
                    assert value.is_contiguous() or name in ("q_ptr", "pages_ptr")
                    aligned = value.storage_offset() * value.itemsize % 16 == 0
                    assert aligned or name in UNALIGNED, name
                else:
                    assert -(1 << 31) <= value < 1 << 31
            self.asked.append((self.name, kwargs, types))

        return launch


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter takes the rows of sm_90")
class TestLaunches:
    """With V3's dimensions, on tensors without data: any question to the device would be an error."""

    @pytest.fixture
    def poisoned(self) -> None:
        """Nothing to poison."""

    @pytest.fixture
    def launched(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
        asked: list[tuple[str, dict[str, Any]]] = []

        for module in (decode, prefill, latents):
            monkeypatch.setattr(module, "architecture", lambda device: "sm_90")
        monkeypatch.setattr(latents, "INTERPRETED", latents.tl.constexpr(False))
        for name in LAUNCHED:
            module = decode if hasattr(decode, name) else prefill
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), asked))
        return asked

    def run(self, n_heads: int, sequences: list[tuple[int, int]], packed: bool = False, fixed: bool = False) -> None:
        lengths = [(q, start + q) for q, start in sequences]
        n_few = next((i for i, (q, _) in enumerate(lengths) if q > DECODE_ROWS), len(lengths))
        few, many = BatchBounds.of(lengths[:n_few]), BatchBounds.of(lengths[n_few:])
        t, b, pages = few.tokens + many.tokens, len(lengths), -(-max(kv for _, kv in lengths) // 64)

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device="meta")

        numbers = [empty(t, dtype=torch.int64) for _ in range(3)]
        tables = [empty(*shape, dtype=torch.int32) for shape in ((b + 1,), (b,), (b, pages))]
        pool = empty(9, 64, 656, dtype=torch.uint8) if packed else empty(9, 64, 576)
        q_nope, q_pe = empty(t, n_heads, 192)[..., :128], empty(t, n_heads, 64)
        w_uk, w_uv = empty(n_heads, 128, 512), empty(n_heads, 128, 512)
        by_rows = in_row_blocks if fixed else None
        out = attention.mla(q_nope, q_pe, pool, Batch(*numbers, *tables, few, many), w_uk, w_uv, 0.1, by_rows)
        assert out.shape == (t, n_heads, 128) and out.is_contiguous()

    @pytest.mark.parametrize("n_heads", [16, 128])
    @pytest.mark.parametrize("packed", [False, True], ids=["bf16", "fp8"])
    def test_launches_ask_for_listed_configurations(
        self, n_heads: int, packed: bool, launched: list[tuple[str, dict[str, Any], dict[str, str]]]
    ) -> None:
        self.run(n_heads, [(1, 5)] * 200, packed)  # one split
        self.run(n_heads, [(1, 131_000), (5, 3), (2000, 0), (100, 70_000)], packed)
        self.run(n_heads, [(2, 131_000)], packed)
        self.run(n_heads, [(3, 600), (40, 0)], packed, fixed=True)
        assert {name for name, *_ in launched} == LAUNCHED - (
            {"decode_fp8_kernel"} if not packed or n_heads > 32 else set()
        )
        listed: dict[str, list[tuple[dict[str, Any], dict[str, str]]]] = {}
        for c in configurations(attention):
            if c.target == "sm_90":
                kernel = c.kernel.name if isinstance(c.kernel, Recorder) else c.kernel.fn.__name__
                listed.setdefault(kernel, []).append((c.constexprs | c.options, c.types))
        for name, constants, types in launched:
            if name == "combine_parts_kernel":
                constants["N"] = 128  # it only divides by it
            assert any(constants == known and all(of[n] == types[n] for n in types) for known, of in listed[name]), (
                name,
                constants,
                types,
            )

    def test_a_long_prompt_stays_within_its_workspace(
        self, launched: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The last 2,048 tokens of 131,072, with the heads of one rank of eight and with all."""
        taken = 0
        plain = torch.empty

        def empty(*size: Any, **kwargs: Any) -> torch.Tensor:
            nonlocal taken
            t = plain(*size, **kwargs)
            taken += t.nbytes if kwargs.keys() == {"dtype", "device"} else 0  # others are torch's own
            return t

        monkeypatch.setattr(torch, "empty", empty)
        for n_heads, slabs in ((16, 2), (128, 9)):
            taken = 0
            launched.clear()
            self.run(n_heads, [(2048, 131_072 - 2048)])
            rest = 2048 * n_heads * (128 * (2 + 4) + 4)  # the output, and what is carried from slab to slab
            assert prefill.SLAB_BYTES * 0.9 < taken - rest <= prefill.SLAB_BYTES
            assert [name for name, *_ in launched] == ["gather_kernel", "prefill_kernel"] * slabs
            taken = 0
            self.run(n_heads, [(1, 131_071)] * 128)
            assert taken <= decode.SPLIT_BYTES * 1.1 + 128 * n_heads * (1024 * 2 + 128 * 2)
            taken = 0
            self.run(n_heads, [(300, 131_000)], fixed=True)
            assert taken <= decode.SPLIT_BYTES * 1.1 + 300 * n_heads * (1024 * 2 + 128 * 2)


NAMES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
}
UNALIGNED = ("bounds_ptr", "lengths_ptr", "pages_ptr", "positions_ptr")  # parts of a batch's tables
LAUNCHED = {
    "plan_runs_kernel",
    "decode_kernel",
    "decode_fp8_kernel",
    "combine_parts_kernel",
    "gather_kernel",
    "prefill_kernel",
}
