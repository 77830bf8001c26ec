"""Any rank's shard in one process: ranks as threads (support/thread_ranks.py)."""

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from checkpoint.convert import convert
from core.batch import Batch
from core.config import ModelArgs
from core.errors import UserError
from core.numerics import Numerics
from model import Transformer
from parallel.group import MULTICAST_BYTES, ONE_SHOT_BYTES, SOLO, Group, OneShot
from parallel.startup import environment
from support.checkpoints import fp8_sizes
from support.families import FAMILIES, V3
from support.model_pairs import hidden_states, ours, random_checkpoint, relative_error, tokens
from support.rank_weights import unquantise
from support.thread_ranks import on_every_rank


@pytest.mark.parametrize("experts", ["whole", "split"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [2, 4])
def test_shards_together_are_the_whole(tmp_path, name, size, experts):
    path = random_checkpoint(tmp_path / "c", FAMILIES[name])
    whole = ours(path)
    ids = tokens(150, whole.args.vocab_size)
    expected = whole.logits(hidden_states(whole, ids, [100, 49, 1]))

    def work(group):
        model = ours(path, Numerics(torch.float32, experts=experts), group)
        return model.logits(hidden_states(model, ids, [100, 49, 1]))

    for logits in on_every_rank(size, work):
        assert relative_error(logits, expected) < 1e-5


IN_FP8 = V3 | fp8_sizes(4) | {
    "moe_intermediate_size": 512, "n_shared_experts": 1, "num_hidden_layers": 2, "num_nextn_predict_layers": 0,
    "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def fp8_folders(tmp_path_factory) -> dict[tuple[str, int], list[Path]]:
    """An FP8 checkpoint that four ranks may share in either layout: the original and a conversion, for each."""
    folder = tmp_path_factory.mktemp("fp8")
    path = random_checkpoint(folder / "c", IN_FP8, fp8=True)
    found = {}
    for experts in ("whole", "split"):
        for size in (1, 2, 4):
            convert(path, folder / f"{experts}{size}", size, experts=experts)
            found[experts, size] = [path, folder / f"{experts}{size}"]
    return found


@pytest.mark.parametrize("gemm", [None, "bf16", "fp8"])
def test_layouts_of_the_experts_in_fp8(fp8_folders, gemm):
    """One, two and four ranks, experts whole and split, from the original directory and from files converted to either:
    dequantised, and with FP8 weights under float32 activations, the numbers of one rank; with FP8 activations near,
    as a sum in another order may round one of them the other way."""
    ids = tokens(40, V3["vocab_size"])

    def work(group, folder, experts):
        model = ours(folder, Numerics(torch.float32, gemm, experts=experts), group)
        return model.logits(hidden_states(model, ids, [30, 9, 1]))

    expected = work(SOLO, fp8_folders["whole", 1][0], "whole")
    for (experts, size), folders in fp8_folders.items():
        for folder in folders:
            for logits in on_every_rank(size, partial(work, folder=folder, experts=experts)):
                assert relative_error(logits, expected) < (2e-3 if gemm == "fp8" else 1e-5)


@pytest.mark.parametrize("plain", ["self_attn", "mlp.experts", "kv_a_proj", "shared_experts"])
def test_fp8_beside_plain_weights(plain, tmp_path):
    """What is stored in BF16 stays so on every rank, and all ranks agree on what is."""
    path = random_checkpoint(tmp_path / "c", IN_FP8, fp8=True)
    unquantise(path, lambda name: plain in name)
    ids = tokens(20, V3["vocab_size"])

    def work(group, folder, experts, gemm):
        model = ours(folder, Numerics(torch.float32, gemm, experts=experts), group)
        return model.logits(hidden_states(model, ids, [12, 7, 1]))

    expected = work(SOLO, path, "whole", None)
    for size, experts in ((1, "whole"), (2, "whole"), (2, "split"), (4, "split")):
        convert(path, tmp_path / f"{experts}{size}", size, experts=experts)
        for folder in (path, tmp_path / f"{experts}{size}"):
            for logits in on_every_rank(size, partial(work, folder=folder, experts=experts, gemm="bf16")):
                assert relative_error(logits, expected) < 1e-5


def test_every_rank_works_on_every_split_expert():
    """What a rank holds of each: a quarter of the width of all, or all of the width of a quarter."""
    args = ModelArgs.from_hf(V3)
    shapes = {}
    for experts in ("whole", "split"):
        model = Transformer(args, Numerics(experts=experts), Group(3, 4), device="meta")
        held = model.layers[1].ffn.experts
        shapes[experts] = held.first, tuple(held.w13.weight.shape), tuple(held.w2.weight.shape)
    assert shapes == {"whole": (24, (8, 256, 128), (8, 128, 128)), "split": (0, (32, 64, 128), (32, 128, 32))}


def test_mtp_shards(tmp_path):
    path = random_checkpoint(tmp_path / "c", V3)
    ids = tokens(51, V3["vocab_size"])

    def work(group):
        model = ours(path, tp=group)
        cache = model.new_cache(1)
        hidden = model(Batch.pack([(ids[:-1], 0, [0])]), cache)
        return model.logits(model.draft(Batch.pack([(ids[1:], 0, [0])]), hidden, cache))

    expected = work(SOLO)
    for logits in on_every_rank(4, work):
        assert relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize("experts", ["whole", "split"])
def test_two_reductions_a_layer(tmp_path, experts):
    """Attention and feed-forward once each (routed and shared experts together), and the embedding."""
    path = random_checkpoint(tmp_path / "c", V3)

    def work(group):
        model = ours(path, Numerics(torch.float32, experts=experts), group)
        hidden_states(model, tokens(10, model.args.vocab_size))
        return group.ranks.reduced[group.rank]

    assert on_every_rank(2, work) == [1 + 2 * V3["num_hidden_layers"]] * 2


ORDERED = """
import os, sys, torch
import torch.distributed as dist
from parallel.group import Group
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=4)
row = torch.randn(256, generator=torch.Generator().manual_seed(rank))
for ordered in (False, True):
    group = Group(rank, 4, dist.group.WORLD, dist.group.WORLD, ordered=ordered)
    sums = {group.all_reduce(torch.cat((row, torch.ones(more)))).view(-1)[:256].numpy().tobytes()
            for more in (0, 100, 1000, 5000)}
    if rank == 0:
        print(len(sums))
dist.destroy_process_group()
"""


def test_ordered_sums_do_not_depend_on_their_size(tmp_path):
    """Four processes over gloo: the same rows, in buffers of other sizes, have one set of bits; and the control, without
    `ordered`, has several, so that this can fail."""
    folder = str(Path(__file__).parents[2] / "inference")
    run = [sys.executable, "-c", ORDERED]
    env = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*run, str(r), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True, env=env) for r in range(4)]
    out = [p.communicate(timeout=120)[0] for p in ranks]
    unordered, ordered = map(int, out[0].split())
    assert ordered == 1 < unordered


class StandIn(OneShot):
    """A sum of two equal ranks through memory of their own, without GPUs."""

    def __init__(self):
        self.buffer, self.name, self.most, self.calls = torch.empty(1 << 20, dtype=torch.uint8), "pair", ONE_SHOT_BYTES, []

    def _sum(self, buffer, x, op, name, out):
        assert buffer.shape == x.shape and buffer.dtype == x.dtype and (op, name) == ("sum", "pair")
        self.calls.append("one shot")
        return torch.mul(buffer.copy_(x), 2, out=out)

    def _multicast(self, buffer, op, name):
        self.calls.append("multicast")
        return buffer.mul_(2)


@pytest.mark.parametrize(
    "n, most, ordered, taken",
    [
        (8, ONE_SHOT_BYTES, False, "one shot"),
        (7, ONE_SHOT_BYTES, False, None),
        (8, ONE_SHOT_BYTES, True, None),
        (ONE_SHOT_BYTES // 2, ONE_SHOT_BYTES, False, "one shot"),
        (ONE_SHOT_BYTES // 2 + 8, ONE_SHOT_BYTES, False, None),
        (ONE_SHOT_BYTES // 2 + 8, 1 << 20, False, "multicast"),
        ((1 << 19) + 8, 1 << 20, False, None),
    ],
)
def test_small_sums_take_one_shot(monkeypatch, n, most, ordered, taken):
    """In bfloat16: whole 16-byte pieces up to the limit; larger ones by multicast where there is one; others, and ordered
    sums, go the long way."""
    long_way = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, group: long_way.append(x))
    group = Group(0, 2, one_shot=(one := StandIn()), ordered=ordered)
    one.most = most
    x = torch.ones(n, dtype=torch.bfloat16)
    y = group.all_reduce(x)
    assert one.calls == [taken] * bool(taken) and len(long_way) == (not taken)
    assert y.shape == x.shape and y.dtype == x.dtype and bool((y == (2 if taken else 1)).all())


def test_one_shot_calls_operators_that_torch_has():
    """In one launch: the copy into the shared memory is the operator's."""
    schema = torch.ops.symm_mem.one_shot_all_reduce_copy_out.default._schema
    assert [a.name for a in schema.arguments] == ["symm_buffer", "local_input", "reduce_op", "group_name", "out"]
    schema = torch.ops.symm_mem.multimem_all_reduce_.default._schema
    assert [a.name for a in schema.arguments] == ["input", "reduce_op", "group_name"]


class Failing(OneShot):
    """Of three ranks; rank 1 fails at one step, or has no multicast."""

    def __init__(self, group, fails):
        self.group, self.fails = group, fails
        if (group.rank, fails) == (1, "memory"):
            raise RuntimeError("out of memory")

    def meet(self):
        met = self.group.gather_ints(torch.tensor(int((self.group.rank, self.fails) != (1, "address"))))
        if not met.all():
            raise ValueError("no address")
        return (self.group.rank, self.fails) != (1, "multicast")

    def check(self, group, n):
        self.group.gather_ints(torch.tensor(n))
        return (group.rank, self.fails) != (1, {8: "sum"}.get(n, "large sum"))


@pytest.mark.parametrize(
    "fails, most",
    [
        ("memory", None),
        ("address", None),
        ("sum", None),
        ("multicast", ONE_SHOT_BYTES),
        ("large sum", ONE_SHOT_BYTES),
        ("", MULTICAST_BYTES),
    ],
)
def test_ranks_agree_on_one_shot_step_by_step(monkeypatch, fails, most):
    """Where one gives up, no other waits for it in the next step."""
    monkeypatch.setattr(Failing, "most", ONE_SHOT_BYTES, raising=False)
    found = on_every_rank(3, lambda group: Failing.create(group, fails))
    assert [one and one.most for one in found] == [most] * 3


def test_one_shot_is_left_out_where_it_is_not_offered():
    """A group that is none, or no GPU: None, and NCCL goes on."""
    assert on_every_rank(2, lambda group: OneShot.create(group, torch.device("cpu"))) == [None, None]


@pytest.mark.parametrize(
    "size, says",
    [(3, "vocab_size 256 does not divide by 3 ranks (it does by 1, 2, 4, 8, 16, 32)"), (8, "n_heads 4 does not divide by 8 ranks")],
)
def test_sizes_that_do_not_divide(size, says):
    with pytest.raises(UserError) as e:
        Transformer(ModelArgs.from_hf(V3), tp=Group(0, size), device="meta")
    assert says in str(e.value)


def test_interrupted_while_parting_still_leaves_with_a_line(monkeypatch):
    group, left = Group(), []

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Group, "barrier", interrupted)
    monkeypatch.setattr(os, "_exit", left.append)
    with pytest.raises(KeyboardInterrupt):
        group.shutdown()
    leaving = threading.Thread(target=group.process.abort, args=("interrupted", 130), daemon=True)
    leaving.start()
    leaving.join(20)
    assert left == [130]


def test_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert environment() == (0, 1, 0, 1)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(UserError, match="RANK is 4 but WORLD_SIZE is 1"):
        environment()
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UserError, match="not made of numbers"):
        environment()
