"""Layouts of ranks: what they exchange, what they hold, how fast they are at most, and which is recommended."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from core.batch import Batch
from core.config import load_config, parse
from core.numerics import Numerics
from core.run_config import RunConfig
from core.stages import divide
from engine import layouts, memory, rank_memory, stage_layouts
from engine.layouts import Chip, Layout, Links, Message
from engine.rank_memory import RankSpec
from model import Transformer
from parallel.group import Group
from support.checkpoints import fp8_sizes
from support.families import FAMILIES

V3 = load_config(Path(layouts.__file__).parents[1] / "configs" / "config_671B.json")
FP8 = Numerics(torch.bfloat16, "fp8")
ONE = RankSpec(V3, FP8, mtp=True)
H200, H800 = Chip(4.8e12, 1979e12, 989e12), Chip(3.35e12, 1979e12, 989e12)
HGX_H200, HGX_H800 = Links(450e9, 50e9, 8), Links(200e9, 50e9, 8)
RUN = RunConfig(max_num_batched_tokens=512)


def layout(ranks: int, lanes: int, experts: str = "split", num: Numerics = FP8) -> Layout:
    rank = replace(ONE, ranks=ranks, lanes=lanes, num=replace(num, experts=experts))
    return Layout(rank, rank_memory.weight_bytes(rank))


@pytest.mark.parametrize(
    ("ranks", "lanes", "weights", "tokens", "sequences", "of_memory", "with_all", "within"),
    [
        (8, 1, 86.9, 656e3, 160, 6e3, 5.5e3, 0.04),
        (8, 8, 100.4, 3.89e6, 950, 35e3, 25e3, 0.23),  # where compute was added up with reading, not the longer taken
        (16, 1, 44.1, 427e3, 104, 5e3, 4e3, 0.12),
        (16, 16, 58.6, 3.91e6, 955, 44e3, 29e3, 0.05),
    ],
)  # fmt: skip
def test_the_figures_of_a_count_made_by_hand(ranks, lanes, weights, tokens, sequences, of_memory, with_all, within):
    """V3 at 4k on one node of H200 and two of H800, tensor parallel alone and in lanes of one rank, as counted for the
    design: weights, cache and sequences agree within 4 %, the bound of memory alone within 2 %, and that with compute
    and traffic within the last number, as it depends on what overlaps."""
    chip, links, size = (H200, HGX_H200, 141e9) if ranks == 8 else (H800, HGX_H800, 80e9)
    row = layouts.evaluate(layout(ranks, lanes), RUN, int(size), 4096, None, chip, links)
    assert row.weights / 1e9 == pytest.approx(weights, abs=0.05)
    assert row.tokens == pytest.approx(tokens, rel=0.04) and row.most_sequences == pytest.approx(sequences, rel=0.04)
    assert row.decode.sequences == row.most_sequences
    assert row.decode.sequences / (row.decode.read / chip.bandwidth) == pytest.approx(of_memory, rel=0.02)
    assert layouts.speed(row) == pytest.approx(with_all, rel=within)


def test_operations_of_a_token():
    """71.4 GFLOP in the linear layers and 5.0 for each thousand tokens of mean context, as the project's targets have
    them; however many ranks share them."""
    for ranks, lanes, experts in ((1, 1, "whole"), (8, 1, "split"), (8, 8, "split"), (16, 4, "whole")):
        one = layout(ranks, lanes, experts)
        tp = ranks // lanes
        shared = layouts.linear_operations(one, 8, 8 * lanes, 0) * ranks / (8 * lanes)
        low_rank = 2 * 61 * (1536 + 576) * 7168 + 2 * 58 * 256 * 7168  # q_a, kv_a and router, which all of a lane have
        assert (shared - (tp - 1) * low_rank) / 1e9 == pytest.approx(71.4, rel=0.01)
        attention = layouts.attention_operations(one.rank, 8, 1000, 61, absorbed=False) * tp / 8
        assert attention / 1e9 == pytest.approx(5.0, rel=0.01)
    head = layouts.linear_operations(layout(8, 8), 0, 0, 3) / 3
    assert head == 2 * 129280 * 7168
    assert layouts.attention_operations(layout(8, 4).rank, 2, 10, 1, absorbed=True) == 2 * 2 * 10 * 64 * (576 + 512)


# ---------------------------------------------------------------- messages


@dataclass(frozen=True)
class Recorded(Group):
    """A rank of several, alone, that writes down what it would send."""

    name: str = "tp"

    def _record(self, collective, nbytes):
        if self.size > 1:
            SENT.append((collective, self.name, nbytes))

    def all_reduce(self, x):
        self._record("all_reduce", x.nbytes)
        return x

    def all_gather(self, x):
        self._record("gather", x.nbytes)
        return torch.cat([x] * self.size, dim=-1)

    def gather(self, counts, *parts):
        self._record("gather", sum(part.nbytes for part in parts))
        return [torch.cat([part] * self.size) for part in parts]

    def scatter_sum(self, x, counts, n):
        self._record("scatter_sum", x.nbytes // self.size)
        return x[:n]


SENT: list[tuple[str, str, int]] = []


@pytest.mark.parametrize(("lanes", "tp"), [(1, 2), (2, 1), (2, 2), (4, 1), (1, 4)])
@pytest.mark.parametrize("num", [Numerics(), Numerics(torch.float32), FP8, replace(FP8, gemm="bf16"), Numerics(virtual_ranks=8)])
def test_the_model_sends_what_is_counted(num, lanes, tp):
    """A forward, its logits and a draft, in the model's order."""
    args = parse(FAMILIES["v3"] | fp8_sizes(8))
    model = Transformer(args, num, Recorded(tp - 1, tp), "cpu", dp=Recorded(lanes - 1, lanes, name="dp"))
    for parameter in model.parameters():
        parameter.data.zero_()
    model.prepare()
    batch = Batch.pack([([1] * 5, 0, [0]), ([1] * 2, 0, [1])], lane_rows=(7,) * lanes)
    cache = model.new_cache(2)
    rank = RankSpec(args, num, lanes * tp, gpu=False, mtp=True, lanes=lanes)
    for mtp in (False, True):
        SENT.clear()
        hidden = model.draft(batch, torch.zeros(7, args.dim, dtype=num.dtype), cache) if mtp else model(batch, cache)
        model.logits(hidden[:3])
        counted = list(layouts.messages(Layout(rank, {}), 7, 3, mtp))
        assert [(m.collective, m.group, m.nbytes) for m in counted] == SENT


@pytest.mark.parametrize("num", [Numerics(torch.float32), FP8])
def test_a_stage_sends_what_is_counted(num):
    """In three stages of two ranks: the first alone embeds, the last alone has logits and drafts."""
    args = parse(FAMILIES["v3"] | fp8_sizes(8))
    for stage in divide(args, 3, mtp=True):
        model = Transformer(args, num, Recorded(1, 2), "cpu", stage=stage)
        for parameter in model.parameters():
            parameter.data.zero_()
        model.prepare()
        batch, cache = Batch.pack([([1] * 5, 0, [0]), ([1] * 2, 0, [1])]), model.new_cache(2)
        rank = RankSpec(args, num, 2, gpu=False, mtp=True, stage=stage)
        state = torch.zeros(7, args.dim, dtype=num.dtype)
        for mtp in (False, True)[: 1 + stage.is_last]:
            SENT.clear()
            hidden = model.draft(batch, state, cache) if mtp else model(batch, cache, state)
            assert not stage_layouts.boundary_bytes(rank, 7) or stage_layouts.boundary_bytes(rank, 7) == hidden.nbytes
            if stage.is_last:
                model.logits(hidden[:3])
            counted = list(layouts.messages(Layout(rank, {}), 7, 3, mtp))
            assert [(m.collective, m.group, m.nbytes) for m in counted] == SENT


def pipeline(n: int, ranks: int = 8, num: Numerics = FP8) -> list[RankSpec]:
    rank = replace(ONE, ranks=ranks, num=replace(num, experts="split"))
    return stage_layouts.on_stages(rank, divide(V3, n, mtp=True))


def test_stages_share_what_one_computes():
    """Operations, reads and bytes of all stages are those of one: nothing is counted twice or left out."""
    one, stages = layout(8, 1), [Layout(rank, rank_memory.weight_bytes(rank)) for rank in pipeline(3)]
    for count in (
        lambda x: layouts.linear_operations(x, 8, 8, 8), lambda x: layouts.linear_operations(x, 8, 8, 8, mtp=True),
        lambda x: len(list(layouts.messages(x, 8, 8))), lambda x: rank_memory.latent_bytes(x.rank),
        lambda x: layouts.decode_bound(x, 8, 4096, 1, H200, HGX_H200).sent,
        lambda x: layouts.decode_bound(x, 8, 4096, 1, H200, HGX_H200).attention,
        lambda x: layouts.prefill_bound(x, 512, 4096, H200, HGX_H200).attention,
        lambda x: rank_memory.decode_reads(x.rank, 8, 4096, 1, x.weights).weights,
    ):  # fmt: skip
        assert sum(map(count, stages)) == pytest.approx(count(one), rel=1e-6)
    twice = rank_memory.weight_bytes(stages[-1].rank)[False, "embedding"]  # which the MTP module embeds with
    assert sum(sum(s.weights.values()) for s in stages) == sum(one.weights.values()) + twice


def test_a_pipeline_s_bound():
    """As many microbatches as stages take the slowest stage's time each, and the boundary's; one takes all stages'. It
    wins where a slow network joins the nodes, and its memory is that of the stage with the least room."""
    slow, run = Links(450e9, 1e9, 8), replace(RUN, pp=2)
    ranks = pipeline(2)
    stages = [Layout(rank, rank_memory.weight_bytes(rank)) for rank in ranks]
    row = stage_layouts.evaluate(ranks, run, int(141e9), 4096, 100, H200, slow)
    singles = [layouts.decode_bound(x, 50, 4096, 0, H200, slow) for x in stages]
    given = 50 * 7168 * 2
    assert row.decode.exchange == pytest.approx(2 * max((b.seconds, b.exchange) for b in (
        singles[0]._replace(exchange=singles[0].exchange + given / 1e9), singles[1]))[1])
    assert row.decode.seconds == pytest.approx(2 * max(singles[0].seconds + given / 1e9, singles[1].seconds))
    assert row.decode.sequences == 100 and row.most_sequences > 300
    single = stage_layouts.evaluate(ranks, run, int(141e9), 4096, 1, H200, slow)
    assert single.decode.seconds == pytest.approx(
        sum(layouts.decode_bound(x, 1, 4096, 0, H200, slow).seconds for x in stages) + 7168 * 2 / 1e9
    )
    flat = layouts.evaluate(layout(16, 1), RUN, int(141e9), 4096, 100, H200, slow)
    assert layouts.speed(row) > 2 * layouts.speed(flat)
    best, why = layouts.recommend([flat, row], 100)
    assert best is row and "times those of --dp 1: a rank exchanges for" in why
    assert layouts.recommend([flat, row], 100)[0].name == "--pp 2"
    least = min(memory.pages_that_fit(r, replace(run, max_model_len=4096, max_num_seqs=row.most_sequences),
                int(141e9) - sum(rank_memory.weight_bytes(r).values())) for r in ranks)  # fmt: skip
    assert row.tokens == least // 2 * 2 * 64
    assert stage_layouts.evaluate(ranks, run, int(30e9), 4096, 100, H200, slow).decode is None
    near, far = (
        stage_layouts.evaluate(pipeline(2, 4), run, int(141e9), 4096, 100, H200, slow._replace(ranks_per_node=n)).decode
        for n in (8, 4)
    )
    assert near.exchange < far.exchange


def test_the_most_sequences_of_a_pipeline():
    """Each microbatch has an equal part of the pages: one sequence more would not find its own."""
    rank, run = pipeline(3)[0], replace(RUN, pp=3, max_model_len=4096)
    free = int(20e9)
    most = memory.sequences_that_fit(rank, run, free)
    for n, fits in ((most, True), (most + 1, False)):
        pages = memory.pages_that_fit(rank, replace(run, max_num_seqs=n), free)
        assert (pages // 3 // 64 >= -(-n // 3)) is fits
    assert most % 3 == 0 and most > 30


def test_messages_of_lanes():
    """Between lanes a layer sends FP8 values, their scales, and each of the chosen experts' weight and id; and gets
    sums of bfloat16 back. A dense layer has no experts; a lane of one rank sums nothing."""
    found = list(layouts.messages(layout(8, 8), 10, 5))
    assert {m.group for m in found} == {"dp"} and len(found) == 2 * 61
    state = 10 * 7168 * 2
    assert found[:2] == [
        Message("gather", "gather", "dp", 10 * (7168 + 56 * 4)),
        Message("scatter_sum", "scatter_sum", "dp", state),
    ]
    assert found[-2].nbytes == 10 * (7168 + 56 * 4 + 8 * (4 + 8))
    plain = layout(8, 8, num=Numerics())
    assert layouts.row_bytes(plain.rank, True) == 2 * 7168 + 96
    mixed = list(layouts.messages(layout(8, 2), 10, 5))
    assert [m.what for m in mixed[:5]] == ["embedding", "attention", "gather", "scatter_sum", "feed-forward"]
    assert mixed[-1] == Message("logits", "gather", "tp", 5 * 129280 // 4 * 4)
    assert len(list(layouts.messages(layout(1, 1), 10, 5))) == 0
    assert sum(map(len, (layouts.layer_messages(layout(8, 2), 10, e) for e in (True, False)))) == 8
    one = layout(8, 8)
    alone = replace(one, rank=replace(one.rank, num=replace(one.rank.num, mlps_in_lane=True)))
    assert len(list(layouts.messages(alone, 10, 5))) == 2 * 58


def test_bytes_and_seconds_of_a_message():
    links, n = Links(100.0, 10.0, 4), 1000
    reduce, gather, scatter = (Message("", kind, "tp", n) for kind in ("all_reduce", "gather", "scatter_sum"))

    def of(message: Message, ranks: int, lanes: int) -> tuple[float, float]:
        rank = replace(ONE, ranks=ranks, lanes=lanes)
        return layouts.sent(rank, message), layouts.seconds(rank, message, links)

    assert of(reduce, 4, 1) == (1500, pytest.approx(15))
    assert of(gather, 4, 1) == of(scatter, 4, 1) == (3000, 30)
    # two nodes: a sum's halves, each rank a quarter; a gather crosses once and is spread within; scatter_sum goes direct
    assert of(reduce, 8, 1) == (1750, pytest.approx(15 + 250 / 10))
    assert of(gather, 8, 1) == (7000, pytest.approx(6000 / 100 + 1000 / 10))
    assert of(scatter, 8, 1) == (7000, pytest.approx(3000 / 100 + 4000 / 10))
    # lanes of two ranks: two of a column's four are in each node
    column = scatter._replace(group="dp")
    assert of(column, 8, 4) == (3000, pytest.approx(1000 / 100 + 2000 / 10))
    assert of(column, 8, 2) == (1000, pytest.approx(1000 / 10))  # a lane fills a node
    assert of(reduce, 8, 4)[1] == pytest.approx(1000 / 100)


# ---------------------------------------------------------------- choice


def rows(concurrency: int | None, ranks: int = 8, size: float = 141e9) -> list[layouts.Row]:
    found = (x for x in layouts.layouts(ONE, ranks) if isinstance(x, Layout))
    return [layouts.evaluate(x, RUN, int(size), 4096, concurrency, H200, HGX_H200) for x in found]


def test_every_layout_that_divides():
    found = list(layouts.layouts(ONE, 8))
    assert [(x.rank.lanes, x.rank.tp, x.rank.experts) for x in found] == [
        (lanes, 8 // lanes, experts) for lanes in (1, 2, 4, 8) for experts in ("split", "whole")
    ]
    assert [(x.rank.lanes, x.rank.experts) for x in layouts.layouts(ONE, 8, "whole")] == [
        (n, "whole") for n in (1, 2, 4, 8)
    ]
    refused, *many = layouts.layouts(ONE, 32)  # whose MLPs 32 ranks cannot share, and a lane's can
    assert refused == (1, "ffn.w1 has 18432 rows, which 32 ranks cannot share in whole 128-wide FP8 blocks")
    assert [(x.rank.lanes, x.rank.experts, x.mlps_in_lane) for x in many] == [
        (lanes, "whole", True) for lanes in (2, 4, 8, 16, 32)
    ]


def test_what_is_recommended():
    """One sequence wants all ranks to share the attention; many want lanes, as only these hold them; and of equal
    layouts the one whose ranks are equally busy."""
    best, why = layouts.recommend(rows(1), 1)
    assert (best.layout.rank.lanes, best.layout.rank.experts) == (1, "split")
    assert why.endswith("those of --dp 2: a rank reads 6.1 GB a step, not 7.8")
    best, why = layouts.recommend(rows(900), 900)
    assert (best.layout.rank.lanes, best.layout.rank.experts) == (8, "split")
    assert why.startswith("at most 29,") and why.endswith("those of --dp 1, whose memory holds 163 of 900 sequences")
    assert layouts.speed(best) == max(map(layouts.speed, rows(900)))
    assert layouts.recommend(rows(1, size=80e9), 1) is None
    [only] = [row for row in rows(1) if row.layout.rank.lanes == 8 and row.layout.rank.experts == "whole"]
    assert layouts.recommend([only], 1) == (only, "the only layout that fits")
    slower = only._replace(decode=only.decode._replace(exchange=1.0))
    other = rows(1)[0]
    faster = other._replace(decode=only.decode)
    assert layouts.recommend([slower, faster], 1)[0] is faster


def test_the_most_sequences_fit_and_no_more():
    for row in rows(None):
        rank, lane = row.layout.rank, row.most_sequences // row.layout.rank.lanes
        free = int(141e9) - row.weights
        pages = [
            memory.pages_that_fit(rank, replace(RUN, max_model_len=4096, max_num_seqs=n), free)
            for n in (lane, lane + 1)
        ]
        assert pages[0] >= lane * 64 and pages[1] < (lane + 1) * 64
        assert row.tokens == pages[0] * 64 * rank.lanes
    assert [row.decode.sequences for row in rows(200)] == [163, 163, *[200] * 6]


def test_drafts_and_prompts_are_counted():
    plain, drafts = (layouts.decode_bound(layout(8, 8), 80, 4096, k, H200, HGX_H200) for k in (0, 1))
    assert (plain.tokens, drafts.tokens) == (80, 160) and drafts.read > plain.read
    assert drafts.sent == pytest.approx(plain.sent * 2 * 123 / 122, rel=0.01)  # twice the rows, in one more layer
    short, long = (layouts.prefill_bound(layout(8, 8), 2048, length, H200, HGX_H200) for length in (1024, 4096))
    assert short.linear == pytest.approx(long.linear, rel=0.01) and long.attention == pytest.approx(4 * short.attention)
    assert long.tokens == 8 * 2048 and long.sent == pytest.approx(61 * long.sent_layer, rel=0.01)
