"""Checkpoints that store tensors otherwise than the released ones: in float32 or float16 where those have BF16, scales
in BF16 or as exponents, FP8 weights beside plain ones."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_convert import assert_round_trip

from checkpoint.cast import cast
from checkpoint.check import check
from checkpoint.convert import convert
from checkpoint.directory import Checkpoint, choose_args
from checkpoint.table import exceptions
from core.errors import UserError
from core.numerics import FLOAT32, PLAIN, Numerics
from engine import memory, rank_memory, setup
from engine.choose_numerics import choose_numerics, describe_rounding
from engine.engine import Engine
from ops.cpu.backend import CpuBackend
from ops.reference_backend import ReferenceBackend
from parallel.group import Group
from support.checkpoints import dequantise, fp8_sizes, make_checkpoint
from support.damaged_checkpoints import KINDS, drop, edit, edit_json, files, replace, whole
from support.families import V3
from support.model_pairs import hidden_states, ours, relative_error, tokens
from support.rank_weights import FP8, assert_same, in_memory, loaded, multiplied_out, refusal, unquantise
from support.tiny_tokenizer import VOCAB_SIZE, write_tokenizer

CONFIG = V3 | fp8_sizes(2) | {
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "num_hidden_layers": 2,
    "moe_intermediate_size": 256, "n_shared_experts": 1, "vocab_size": VOCAB_SIZE,
}  # fmt: skip
BF16, F16, F32, E8M0 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e8m0fnu
IDS = tokens(40, V3["vocab_size"])


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "fp8"
    make_checkpoint(folder, CONFIG | {"quantization_config": {"scale_fmt": "ue8m0"}}, fp8=True)
    return folder


@pytest.fixture(scope="module")
def bf16(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "bf16"
    make_checkpoint(folder, CONFIG)
    return folder


@pytest.fixture
def copy(fp8, tmp_path) -> Path:
    return Path(shutil.copytree(fp8, tmp_path / "copy"))


def change(folder: Path, where: Callable[[str, torch.Tensor], bool], to: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes the tensors for which `where` says so; there must be some."""
    changed = False
    for file in files(folder):
        if names := {name for name, tensor in load_file(file).items() if where(name, tensor)}:
            edit(file, lambda tensors, names=names: tensors.update({n: to(tensors[n]) for n in names}))
            changed = True
    assert changed


def wider(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """To values of that dtype that bfloat16 does not hold."""
    return lambda tensor: (tensor.float() * 1.005).to(dtype)


def faults(folder: Path) -> list[str]:
    """What check_checkpoint finds in files, tensors and values but for rounded biases; there is no tokenizer here."""
    text = ("tokenizer", "chat template", "generation config")
    said = [str(f.problem).replace(f"{folder}/", "") for f in check(folder).findings if f.check not in text]
    return [line for line in said if "they were rounded when they were saved" not in line]


# ---------------------------------------------------------------- plain tensors

KINDS_OF_TENSORS: dict[str, Callable[[str], bool]] = {
    "norms": lambda name: name.endswith("norm.weight"),
    "biases": lambda name: name.endswith("bias"),
    "routers": lambda name: name.endswith("mlp.gate.weight"),
    "head": lambda name: name.endswith("head.weight"),
    "embedding": lambda name: name.endswith("embed_tokens.weight"),
}
FORMS = {
    "wide": dict.fromkeys(KINDS_OF_TENSORS, F32),
    "half": dict.fromkeys(KINDS_OF_TENSORS, F16),
    "each other": {"norms": F32, "biases": BF16, "routers": F16, "head": F32, "embedding": F16},
}


def store(folder: Path, form: dict[str, torch.dtype]) -> None:
    for kind, dtype in form.items():
        change(folder, lambda name, _, kind=kind: KINDS_OF_TENSORS[kind](name), wider(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_plain_tensors_in_other_dtypes(fp8, form, tmp_path, capsys):
    """Loaded by every kind of run from the directory, its conversion and its cast, each with the stored bytes; only an
    embedding is rounded, to what a bfloat16 run makes of its rows."""
    source = Path(shutil.copytree(fp8, tmp_path / "source"))
    store(source, FORMS[form])
    convert(source, tmp_path / "converted", 2)
    cast(source, tmp_path / "cast", "cpu")
    assert_round_trip(source, tmp_path / "converted", 2, 2, 4, "split")
    tensors = whole(source)
    assert_same(whole(tmp_path / "cast"), multiplied_out(tensors, BF16, cast=True))
    for num in (FP8, Numerics(), Numerics(F32)):
        wanted = in_memory(multiplied_out(tensors, num.dtype, fp8=num.gemm is not None), 1, 2, CONFIG, "split")
        num = dataclasses.replace(num, experts="split")
        for folder in (source, tmp_path / "converted"):
            assert_same(loaded(folder, num, Group(1, 2)), wanted)
    assert_same(loaded(tmp_path / "cast", Numerics(experts="split"), Group(1, 2)),
                in_memory(multiplied_out(whole(tmp_path / "cast"), BF16), 1, 2, CONFIG, "split"))  # fmt: skip
    bias = FORMS[form]["biases"]
    warned = f"e_score_correction_bias and its like are {'BF16' if bias == BF16 else 'F16'}, not float32"
    assert (warned in capsys.readouterr().err) == (bias != F32)
    assert faults(source) == faults(tmp_path / "converted") == faults(tmp_path / "cast") == []


def test_in_float32_as_if_widened_beforehand(bf16, tmp_path):
    """Bit for bit; and not as if any of them were rounded."""

    def logits(name: str, more: Callable[[Path], None]) -> torch.Tensor:
        folder = Path(shutil.copytree(bf16, tmp_path / name))
        store(folder, FORMS["each other"] | {"biases": F16})
        more(folder)
        model = ours(folder)
        return model.logits(hidden_states(model, IDS))

    stored = logits("stored", lambda _: None)
    assert torch.equal(stored, logits("widened", lambda c: change(c, lambda name, t: True, lambda t: t.float())))
    for kind, where in KINDS_OF_TENSORS.items():
        rounded = logits(kind, lambda c, w=where: change(c, lambda name, _: w(name), lambda t: t.bfloat16().to(t.dtype)))
        assert torch.equal(rounded, stored) == (kind == "biases"), kind  # they only choose


BACKENDS = {"compiled": None, "torch": CpuBackend(), "reference": ReferenceBackend(), "invariant": None}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, F16])
def test_norm_router_and_head_are_exact_in_a_bfloat16_run(bf16, dtype, backend, tmp_path):
    """In each backend, from bfloat16 activations: what float64 makes of the stored values, to float32's rounding."""
    shutil.copytree(bf16, tmp_path / "c")
    store(tmp_path / "c", {"norms": dtype, "routers": dtype, "head": dtype})
    num = Numerics(batch_invariant=backend == "invariant")
    model, stored = ours(tmp_path / "c", num, backend=BACKENDS[backend]), whole(tmp_path / "c")
    x = torch.randn(50, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    rms = (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    exact = (x.double() * rms * stored["model.norm.weight"].double()).bfloat16()
    assert (model.norm(x) != exact).float().mean() < 0.01  # half of them, if the weight were rounded
    exact = x.double() @ stored["lm_head.weight"].double().T
    assert relative_error(model.logits(x), exact) < 1e-6
    gate, router = model.layers[1].ffn.gate, "model.layers.1.mlp.gate."
    logits = x.double() @ stored[router + "weight"].double().T
    weights, ids = model.ops.route(logits.float(), stored[router + "e_score_correction_bias"], gate.rule)
    found = gate(x)
    assert torch.equal(found[1], ids) and relative_error(found[0], weights) < 1e-6
    if model.ops.batch_invariant:
        assert torch.equal(model.logits(x[7:8]), model.logits(x)[7:8]) and torch.equal(gate(x[7:8])[0], found[0][7:8])


def test_a_float32_embedding_in_a_bfloat16_run(bf16, tmp_path):
    """As if its rows were rounded when they are looked up, which is what the run would do; a head that is tied to it
    keeps them."""
    for name, tied in (("wide", False), ("tied", True)):
        shutil.copytree(bf16, tmp_path / name)
        store(tmp_path / name, {"embedding": F32})
        if tied:
            edit_json(tmp_path / name / "config.json", lambda raw: raw.update(tie_word_embeddings=True))
            drop(tmp_path / name, lambda n: n == "lm_head.weight" or ".layers.2." in n)
    wide, tied = ours(tmp_path / "wide", Numerics()), ours(tmp_path / "tied", Numerics())
    stored = whole(tmp_path / "tied")["model.embed_tokens.weight"]
    assert choose_args(Checkpoint(tmp_path / "wide"), None).dtype == "bf16"
    assert wide.embed.weight.dtype == BF16 and tied.embed.weight.dtype == F32
    ids = torch.tensor(IDS)
    assert torch.equal(wide.embed(ids), stored[ids].bfloat16()) and torch.equal(tied.embed(ids), stored[ids].bfloat16())
    x = torch.randn(9, 192).bfloat16()
    assert relative_error(tied.logits(x), x.double() @ stored.double().T) < 1e-6


def test_a_tied_head_in_another_dtype(bf16, tmp_path):
    """Equal in value it may be there; otherwise it is not the embedding."""
    shutil.copytree(bf16, tmp_path / "c")
    edit_json(tmp_path / "c" / "config.json", lambda raw: raw.update(tie_word_embeddings=True))
    embedding = whole(tmp_path / "c")["model.embed_tokens.weight"]
    replace(tmp_path / "c", "lm_head.weight", lambda _: embedding.float())
    change(tmp_path / "c", lambda name, t: name.endswith("shared_head.head.weight"), lambda _: embedding.clone())
    assert torch.equal(loaded(tmp_path / "c", Numerics())["embed.weight"].float(), embedding.float())
    checkpoint = Checkpoint(tmp_path / "c")
    assert exceptions(checkpoint.expected(choose_args(checkpoint, None)), Numerics()) == (("head", FLOAT32),)
    assert faults(tmp_path / "c") == []
    replace(tmp_path / "c", "model.embed_tokens.weight", lambda t: t.float())
    checkpoint = Checkpoint(tmp_path / "c")
    assert exceptions(checkpoint.expected(choose_args(checkpoint, None)), Numerics()) == (("head", FLOAT32),)
    replace(tmp_path / "c", "lm_head.weight", lambda t: t.half() * 1.01)
    said = refusal(tmp_path / "c", Numerics())
    assert "lm_head.weight: expected the values of " in said and said in faults(tmp_path / "c")


# ---------------------------------------------------------------- whole checkpoints


@pytest.mark.parametrize(
    ("stored", "said"), [(F32, "bfloat16"), (F32, "float16"), (F16, "float16"), (F16, "bfloat16"), (BF16, "float32")]
)
def test_the_files_decide_what_is_computed_in(bf16, stored, said, tmp_path, capsys):
    """Whatever config.json says. --dtype bfloat16 rounds what bfloat16 does not hold, and says so."""
    folder = Path(shutil.copytree(bf16, tmp_path / "c"))
    change(folder, lambda name, t: not name.endswith("bias"), wider(stored))
    edit_json(folder / "config.json", lambda raw: raw.update(torch_dtype=said))
    checkpoint = Checkpoint(folder)
    args = choose_args(checkpoint, None)
    specs, cpu = checkpoint.expected(args), torch.device("cpu")
    assert args.dtype == {F32: "fp32", F16: "fp16", BF16: "bf16"}[stored]
    num, _ = choose_numerics(args, cpu, "auto", "auto", specs=specs)
    assert num == Numerics(BF16 if stored == BF16 else F32) and not [*describe_rounding(specs, num)]
    num, _ = choose_numerics(args, cpu, "bfloat16", "auto", specs=specs)
    assert num.dtype == BF16 and ("head" in dict(num.exceptions)) == (stored != BF16)
    name = str(stored).removeprefix("torch.")
    says = f"weights stored in {name} are rounded to bfloat16; --dtype float32 computes exactly"
    assert [*describe_rounding(specs, num)] == ([says] if stored != BF16 else [])
    tensors = whole(folder)
    for dtype in (BF16, F32):
        assert_same(loaded(folder, Numerics(dtype)), in_memory(multiplied_out(tensors, dtype), 0, 1, CONFIG))
    convert(folder, tmp_path / "converted", 2)
    assert choose_args(Checkpoint(tmp_path / "converted"), None).dtype == args.dtype
    assert faults(folder) == faults(tmp_path / "converted") == []
    write_tokenizer(folder)
    Engine.from_pretrained(folder, dtype="bfloat16", n_pages=4, max_model_len=64, max_num_seqs=1, device="cpu")
    assert (f"warning: {says}\n" in capsys.readouterr().err) == (stored != BF16)


# ---------------------------------------------------------------- scales


@pytest.mark.parametrize("dtype", [BF16, E8M0])
def test_scales_in_other_dtypes(copy, fp8, dtype, tmp_path):
    """All of them powers of two: the same bits in memory as from float32, a conversion with the stored bytes, the same
    cast. As transformers 5 writes V3.1's, with F8_E8M0."""
    change(copy, lambda name, t: name.endswith("_scale_inv"), lambda t: t.to(dtype))
    convert(copy, tmp_path / "converted", 2)
    assert_round_trip(copy, tmp_path / "converted", 2, 2, 4, "split")
    for num in (FP8, Numerics(F32)):
        num = dataclasses.replace(num, experts="split")
        wanted = loaded(fp8, num, Group(1, 2))
        assert_same(loaded(copy, num, Group(1, 2)), wanted)
        assert_same(loaded(tmp_path / "converted", num, Group(1, 2)), wanted)
    for folder, target in ((copy, "a"), (fp8, "b")):
        cast(folder, tmp_path / target, "cpu")
    assert_same(whole(tmp_path / "a"), whole(tmp_path / "b"))
    assert faults(copy) == faults(tmp_path / "converted") == []


def test_every_exponent(copy, tmp_path):
    """An E8M0 byte means 2^(byte - 127): 0 is no zero, and the last is NaN. From 247 on weights would overflow."""
    from checkpoint.reading import Reader, read_header

    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    shape = whole(copy)[name].shape
    exponents = torch.tensor([0, 1, 127, 246], dtype=torch.uint8)
    assert shape.numel() >= len(exponents)
    change(copy, lambda n, t: n.endswith("_scale_inv"), lambda t: t.to(E8M0))
    every = exponents.repeat(shape.numel())[: shape.numel()].view(shape)
    replace(copy, name, lambda _: every.view(E8M0))
    wanted = torch.tensor([2.0**-127, 2.0**-126, 1, 2.0**119])
    expected = wanted.repeat(shape.numel())[: shape.numel()].view(shape)
    assert torch.equal(loaded(copy, FP8)["layers.0.attn.wo.scale"], expected)
    assert faults(copy) == []
    q = whole(copy)[name.removesuffix("_scale_inv")]
    small = every == 0
    exact = dequantise(q, expected)
    found = loaded(copy, Numerics(F32))["layers.0.attn.wo.weight"]
    assert small.any() and torch.equal(found, exact)
    file = replace(copy, name, lambda t: torch.where(every == 127, 255, every).to(torch.uint8).view(E8M0))
    at = (every == 127).nonzero()[0].tolist()
    said = f"{file}: {name}: expected finite, positive scales, found nan at {at}"
    assert refusal(copy) == said
    assert faults(copy) == [said]
    for action in (lambda: convert(copy, tmp_path / "a", 1), lambda: cast(copy, tmp_path / "b", "cpu")):
        with pytest.raises(UserError, match="expected finite, positive scales, found nan"):
            action()
    held = {e.name: e for path in files(copy) for e in read_header(path)[1].values()}[name]
    with Reader() as reader:
        assert reader.read(held).dtype == E8M0


def test_scale_formats_of_a_config(copy, fp8):
    """transformers 5 writes "float" for V3, whose activations' scales are any float32."""
    for written, means in (("ue8m0", "ue8m0"), ("float", None), (None, None)):
        edit_json(copy / "config.json", lambda raw, w=written: raw["quantization_config"].update(scale_fmt=w))
        args = choose_args(Checkpoint(copy), None)
        assert (args.dtype, args.scale_fmt) == ("fp8", means)
        assert choose_numerics(args, torch.device("cpu"), "auto", "fp8")[0].scale_fmt == means
    assert_same(loaded(copy, FP8), loaded(fp8, FP8))


# ---------------------------------------------------------------- FP8 beside plain weights

MIXED: dict[str, tuple[Callable[[str], bool], tuple[str, ...], bool]] = {  # weights, what is not FP8, some dequantised
    # a width that is no whole number of blocks, as quantisers leave it: 576 rows, here 192
    "latents": (lambda n: "kv_a_proj" in n, ("layers.0.attn.wqkv_a", "layers.1.attn.wqkv_a", "mtp.0.attn.wqkv_a"), True),
    "routed experts": (lambda n: ".mlp.experts." in n, ("layers.1.ffn.experts", "mtp.0.ffn.experts"), False),
    "all but routed experts": (lambda n: ".mlp.experts." not in n,
                               ("layers.0.attn.wkv_b", "layers.0.attn.wo", "layers.0.attn.wq_b", "layers.0.attn.wqkv_a",
                                "layers.0.ffn.w13", "layers.0.ffn.w2", "layers.1.attn.wkv_b", "layers.1.attn.wo",
                                "layers.1.attn.wq_b", "layers.1.attn.wqkv_a", "layers.1.ffn.shared_experts.w13",
                                "layers.1.ffn.shared_experts.w2", "mtp.0.attn.wkv_b", "mtp.0.attn.wo", "mtp.0.attn.wq_b",
                                "mtp.0.attn.wqkv_a", "mtp.0.ffn.shared_experts.w13", "mtp.0.ffn.shared_experts.w2"), False),
    "one expert's half": (lambda n: "layers.1.mlp.experts.3.up_proj" in n, ("layers.1.ffn.experts",), True),
    "down projections": (lambda n: "down_proj" in n,
                         ("layers.0.ffn.w2", "layers.1.ffn.experts", "layers.1.ffn.shared_experts.w2", "mtp.0.ffn.experts",
                          "mtp.0.ffn.shared_experts.w2"), True),
}  # fmt: skip


@pytest.fixture(params=MIXED)
def mixed(request, copy) -> tuple[Path, tuple[str, ...], bool]:
    where, modules, some = MIXED[request.param]
    unquantise(copy, where)
    names = [n.removesuffix(".weight") for n in whole(copy) if where(n) and n.endswith("proj.weight")]
    edit_json(copy / "config.json", lambda raw: raw["quantization_config"].update(modules_to_not_convert=names))
    return copy, modules, some


def kept(tensors: dict[str, torch.Tensor], modules: tuple[str, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors as a run keeps them that keeps FP8: without it in these modules of the model."""
    from support.rank_weights import our_name

    stacked = {"wq_a": "wqkv_a", "wkv_a": "wqkv_a", "w1": "w13", "w3": "w13"}

    def is_plain(hf: str) -> bool:
        name = our_name(hf, CONFIG["num_hidden_layers"])
        before, routed, _ = name.partition(".experts.")
        owner = before + ".experts" if routed else name.rpartition(".")[0]
        path, _, last = owner.rpartition(".")
        return f"{path}.{stacked.get(last, last)}" in modules

    plain = {n for n in tensors if is_plain(n)}
    done = multiplied_out({n: t for n, t in tensors.items() if n in plain}, dtype)
    return {n: done.get(n, t) for n, t in tensors.items() if n not in plain or n in done}


def test_fp8_beside_plain_weights(mixed, tmp_path):
    """Loaded on one rank and on two, from the directory and its conversion; cast."""
    folder, modules, _ = mixed
    checkpoint, tensors = Checkpoint(folder), whole(folder)
    assert checkpoint.args is not None and checkpoint.quantised
    assert exceptions(checkpoint.expected(checkpoint.args), FP8) == tuple((module, PLAIN) for module in sorted(modules))
    assert exceptions(checkpoint.expected(checkpoint.args), Numerics()) == ()
    convert(folder, tmp_path / "split", 2)
    assert_round_trip(folder, tmp_path / "split", 2, 2, 4, "split")
    for num in (FP8, Numerics()):
        held = kept(tensors, modules, BF16) if num.gemm else multiplied_out(tensors, BF16)
        assert_same(loaded(folder, num), in_memory(held, 0, 1, CONFIG))
        wanted = in_memory(held, 1, 2, CONFIG, "split")
        for path in (folder, tmp_path / "split"):
            assert_same(loaded(path, dataclasses.replace(num, experts="split"), Group(1, 2)), wanted)
    assert faults(folder) == faults(tmp_path / "split") == []
    cast(folder, tmp_path / "cast", "cpu")
    assert_same(whole(tmp_path / "cast"), multiplied_out(tensors, BF16, cast=True))


def test_fp8_beside_plain_weights_computes_the_same(mixed):
    """Under float32 activations W8A16 equals exact dequantisation; W8A8 is near it, but for a
    token whose experts are others; batch-invariant, chunks are bits."""
    folder, modules, _ = mixed
    exact = ours(folder)
    expected = exact.logits(hidden_states(exact, IDS))
    for gemm, near in (("bf16", 1e-5), ("fp8", 0.6)):
        model = ours(folder, Numerics(F32, gemm, "ue8m0"))
        logits = model.logits(hidden_states(model, IDS, [30, 9, 1]))
        assert relative_error(logits, expected) < near
        plain = [n for n, m in model.named_modules() if getattr(m, "scale", 1) is None and n not in ("head", "mtp.0.eh_proj")]
        assert {n.removesuffix(".w13").removesuffix(".w2") if ".experts." in n else n for n in plain} == {
            n for n in modules if not n.endswith("wkv_b")}  # fmt: skip
    model = ours(folder, Numerics(BF16, "fp8", "ue8m0", batch_invariant=True))
    assert torch.equal(hidden_states(model, IDS, [30, 9, 1]), hidden_states(model, IDS))


def test_a_run_says_what_is_not_fp8(mixed):
    folder, modules, some = mixed
    checkpoint = Checkpoint(folder)
    args = choose_args(checkpoint, None)
    num, says = choose_numerics(args, torch.device("cuda"), "auto", "auto", True, checkpoint.expected(args))
    assert num.gemm == "fp8" and num.exceptions == tuple((module, PLAIN) for module in sorted(modules))
    assert says.startswith("numerics: W8A8 (FP8 weights and activations) on cuda; ")
    assert f"; {len(modules)} projections in bfloat16, as they are stored (" in says and ("dequantised" in says) == some
    cpu = torch.device("cpu")
    num, says = choose_numerics(args, cpu, "auto", "dequantised", specs=checkpoint.expected(args))
    assert says == "numerics: bfloat16, FP8 weights dequantised once at load, on cpu"


def test_the_plan_counts_what_is_not_fp8(mixed, capsys):
    """plan.py from the headers alone, the bytes that a model has."""
    import plan

    folder, _, _ = mixed
    for options in (["--device", "cuda"], ["--device", "cuda", "--tp", "2"], ["--device", "cpu", "--gemm", "fp8"]):
        [rank], _, _ = plan.describe(plan.parse(["--ckpt-path", str(folder), *options]))
        model = ours(folder, rank.num, Group(0, rank.ranks)) if not rank.gpu else None
        found = plan.plan(plan.parse(["--ckpt-path", str(folder), *options]))
        assert sum(found["rank"]["weights"].values()) == sum(rank_memory.weight_bytes(rank).values())
        if model is not None:
            assert setup.rank_of(model) == rank


def test_float32_projections_beside_fp8(copy):
    """FP8 kernels take bfloat16: there they are rounded, and a warning says so; --dtype float32 keeps them."""
    unquantise(copy, lambda n: "o_proj" in n, F32)
    change(copy, lambda name, t: "o_proj" in name, wider(F32))
    checkpoint = Checkpoint(copy)
    args = choose_args(checkpoint, None)
    specs = checkpoint.expected(args)
    for device, dtype in (("cuda", "auto"), ("cpu", "auto"), ("cpu", "bfloat16"), ("cpu", "float32")):
        num, _ = choose_numerics(args, torch.device(device), dtype, "auto", True, specs)
        assert num.dtype == (F32 if dtype == "float32" else BF16)
        assert len([*describe_rounding(specs, num)]) == (dtype != "float32")
    tensors = whole(copy)
    assert_same(loaded(copy, Numerics(F32)), in_memory(multiplied_out(tensors, F32), 0, 1, CONFIG))


def test_half_of_a_pair(copy):
    """An FP8 weight without scales, and scales without an FP8 weight, are refused in a mixed checkpoint too."""
    unquantise(copy, lambda n: "shared_experts" in n)
    name = "model.layers.1.self_attn.o_proj.weight"
    drop(copy, lambda n: n == name + "_scale_inv")
    assert refusal(copy) == f"DIR: {name}_scale_inv is missing: an FP8 weight without its scale (F32 2x2)"
    KINDS["weight in BF16"].damage(copy)
    loaded(copy, FP8)  # it is plain now


def test_ranks_need_whole_blocks_only_of_fp8(tmp_path):
    """A width that several ranks cannot share in whole blocks, in projections that are stored plain."""
    sizes = {"num_attention_heads": 4, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24,
             "intermediate_size": 512, "moe_intermediate_size": 512}  # fmt: skip
    make_checkpoint(tmp_path / "c", CONFIG | sizes, fp8=True)
    assert refusal(tmp_path / "c", FP8, Group(0, 4)).startswith("self_attn.q_b_proj has 192 rows, which 4 ranks")
    unquantise(tmp_path / "c", lambda n: ".self_attn." in n)
    for experts in ("whole", "split"):
        convert(tmp_path / "c", tmp_path / experts, 4, experts=experts)
        num = dataclasses.replace(FP8, experts=experts)
        assert_same(loaded(tmp_path / "c", num, Group(3, 4)), loaded(tmp_path / experts, num, Group(3, 4)))


def test_plain_experts_are_split_in_any_width(copy):
    """By default, in a checkpoint whose other weights are FP8."""
    checkpoint = Checkpoint(copy)
    args = dataclasses.replace(checkpoint.args, n_heads=8)
    assert checkpoint.partition(args, 4).reason.endswith("share their width of 256 in whole 128-wide FP8 blocks")
    unquantise(copy, MIXED["routed experts"][0])
    checkpoint = Checkpoint(copy)
    assert checkpoint.partition(args, 4).reason == "experts: split, a rank has 64 of each one's width of 256"
    num = dataclasses.replace(FP8, exceptions=exceptions(checkpoint.expected(args), FP8))
    other = memory.with_ranks(rank_memory.RankSpec(args, num, 2, mtp=True), 4)
    assert other.experts == "split" and "moe" not in str(memory.partition_error(other))


def test_which_experts_are_plain_is_the_same_on_all_ranks(copy, tmp_path):
    """Ranks that hold whole experts agree on a layer's form, though each has read its own files alone."""
    unquantise(copy, lambda n: "layers.1.mlp.experts.3." in n)
    convert(copy, tmp_path / "c", 2, experts="whole")
    held = [loaded(tmp_path / "c", FP8, Group(rank, 2)) for rank in range(2)]
    assert [h["layers.1.ffn.experts.w13.weight"].dtype for h in held] == [BF16, BF16]
    assert json.loads((tmp_path / "c" / "model-mp2.index.json").read_text())["experts"] == "whole"
