"""The model against transformers' own DeepseekV3 and DeepseekV2, and against itself in every other way of running it."""

import dataclasses

import pytest
import torch
import transformers

from core.batch import Batch
from core.config import ModelArgs
from core.numerics import Numerics
from core.run_config import PAGE_SIZE
from model import Linear, Transformer, yarn_frequencies
from ops.reference_backend import ReferenceBackend
from support.checkpoints import fp8_sizes
from support.families import FAMILIES, V3
from support.model_pairs import hidden_states, ours, random_checkpoint, relative_error, their_mtp, theirs, tokens


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])


@torch.no_grad()
def test_logits_are_transformers(checkpoint):
    """1,000 tokens, far past YaRN's original length, whole and in chunks; the greedy token at every position."""
    model, hf_model = ours(checkpoint), theirs(checkpoint)
    ids = tokens(1000, model.args.vocab_size)
    expected = hf_model(torch.tensor([ids])).logits[0]
    whole = model.logits(hidden_states(model, ids))
    chunked = model.logits(hidden_states(model, ids, [1, 1, 7, 64, 200, 1, 300, 426]))
    assert relative_error(whole, expected) < 1e-5
    assert relative_error(chunked, expected) < 1e-5
    assert torch.equal(whole.argmax(-1), expected.argmax(-1))
    assert torch.equal(chunked.argmax(-1), expected.argmax(-1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_what_a_cpu_computes(checkpoint):
    """In float32: norms, SwiGLU, cache write, router and experts by their kernels."""
    on_cpu, on_gpu = ours(checkpoint), ours(checkpoint, device="cuda")
    ids = tokens(100, on_cpu.args.vocab_size)
    expected = hidden_states(on_cpu, ids, [1, 70, 29])
    assert relative_error(hidden_states(on_gpu, ids, [1, 70, 29]).cpu(), expected) < 1e-4


@torch.no_grad()
def test_router_chooses_what_transformers_chooses(checkpoint):
    """The same experts for every token of a layer's input, not only logits near enough."""
    model, hf_model = ours(checkpoint), theirs(checkpoint)
    x = torch.randn(500, model.args.dim, generator=torch.Generator().manual_seed(3))
    i = model.args.n_dense_layers
    _, their_weights, their_ids = hf_model.model.layers[i].mlp.gate(x)
    dense = torch.zeros(500, model.args.n_routed_experts)
    gate = model.layers[i].ffn.gate
    for gate.ops in (model.ops, ReferenceBackend()):
        weights, ids = gate(x)
        assert relative_error(dense.scatter(1, ids, weights), dense.scatter(1, their_ids, their_weights)) < 1e-6


@torch.no_grad()
def test_two_mscales(tmp_path):
    """No release has two that differ; then the softmax takes one of them, and the angles their ratio."""
    rope = {**V3["rope_scaling"], "mscale": 1.0, "mscale_all_dim": 0.5}
    path = random_checkpoint(tmp_path / "c", V3 | {"rope_scaling": rope, "num_nextn_predict_layers": 0})
    model, hf_model = ours(path), theirs(path)
    ids = tokens(100, model.args.vocab_size)
    assert relative_error(model.logits(hidden_states(model, ids)), hf_model(torch.tensor([ids])).logits[0]) < 1e-5


@torch.no_grad()
def test_inner_norms_have_an_eps_of_their_own(tmp_path):
    """Shown by inputs so small that it matters."""
    path = random_checkpoint(tmp_path / "c", V3 | {"rms_norm_eps": 1e-5, "num_nextn_predict_layers": 0})
    model, hf_model = ours(path), theirs(path)
    for layer, other in zip(model.layers, hf_model.model.layers, strict=True):
        layer.attn.wqkv_a.weight.mul_(0.01)
        other.self_attn.q_a_proj.weight.mul_(0.01)
        other.self_attn.kv_a_proj_with_mqa.weight.mul_(0.01)
    ids = tokens(100, model.args.vocab_size)
    assert relative_error(model.logits(hidden_states(model, ids)), hf_model(torch.tensor([ids])).logits[0]) < 1e-5


def test_yarn_applies_whatever_the_context_limit():
    args = ModelArgs.from_hf(V3)
    short = dataclasses.replace(args, max_seq_len=args.original_seq_len // 2)
    assert torch.equal(yarn_frequencies(short), yarn_frequencies(args))


def test_a_ramp_without_width_is_a_step():
    """One pair before it, the others behind: nothing is divided by zero."""
    args = dataclasses.replace(ModelArgs.from_hf(V3), beta_fast=18.0, beta_slow=18.0)
    plain = yarn_frequencies(dataclasses.replace(args, rope_factor=1.0))
    assert torch.equal(yarn_frequencies(args), torch.cat((plain[:1], plain[1:] / 40)))


@torch.no_grad()
def test_a_checkpoint_that_transformers_saved(tmp_path, capsys):
    """As transformers 5 writes it, in bfloat16: rope_parameters, one file, and the routers' biases rounded to BF16."""
    saved = tmp_path / "saved"
    theirs(random_checkpoint(tmp_path / "c", V3)).bfloat16().save_pretrained(saved)
    model, hf_model = ours(saved), theirs(saved)
    ids = tokens(100, model.args.vocab_size)
    assert relative_error(model.logits(hidden_states(model, ids)), hf_model(torch.tensor([ids])).logits[0]) < 1e-5
    assert "BF16, not float32: they were rounded when they were saved" in capsys.readouterr().err


@torch.no_grad()
def test_the_text_model_of_kimi_k25(tmp_path):
    """What transformers' class of the multimodal model computes of text alone, from the files that it saves."""
    text = theirs(random_checkpoint(tmp_path / "c", FAMILIES["kimi-k2"]))
    config = transformers.Kimi_K25Config(
        text_config={**text.config.to_dict(), "model_type": "deepseek_v3"}, projection_hidden_size=16,
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        tie_word_embeddings=False,
    )  # fmt: skip
    hf_model = transformers.Kimi_K25ForConditionalGeneration(config).float().eval()
    hf_model.model.language_model.load_state_dict(text.model.state_dict())
    hf_model.lm_head.load_state_dict(text.lm_head.state_dict())
    hf_model.save_pretrained(tmp_path / "saved")
    model, ids = ours(tmp_path / "saved"), tokens(200, 256)
    expected = hf_model(torch.tensor([ids])).logits[0]
    assert relative_error(model.logits(hidden_states(model, ids)), expected) < 1e-5


@pytest.mark.parametrize("family", ["v3", "gigachat3"])
@torch.no_grad()
def test_mtp_logits_are_transformers(tmp_path, family):
    path = random_checkpoint(tmp_path / "c", FAMILIES[family])
    model, hf_model = ours(path), theirs(path)
    ids = tokens(300, model.args.vocab_size)
    hidden = hidden_states(model, ids[:-1])
    inputs = torch.tensor([ids])
    their_hidden = hf_model.model(inputs[:, :-1]).last_hidden_state
    module = their_mtp(hf_model, path)
    if not hasattr(module, "forward_layer"):
        pytest.skip("before 5.20 transformers' MTP module has no forward of one layer")
    positions = torch.arange(len(ids) - 1)[None]
    expected = hf_model.lm_head(module.forward_layer(0, their_hidden, positions, None, input_ids=inputs[:, 1:]))[0]

    n_pages = -(-len(ids) // PAGE_SIZE)
    cache = model.new_cache(n_pages)
    whole = Batch.pack([(ids[1:], 0, list(range(n_pages)))])
    assert relative_error(model.logits(model.draft(whole, hidden, cache)), expected) < 1e-5
    cache = model.new_cache(n_pages)
    parts = [Batch.pack([(ids[1:][a:b], a, list(range(n_pages)))]) for a, b in [(0, 5), (5, 200), (200, 299)]]
    split = torch.cat([model.draft(p, hidden[p.positions], cache) for p in parts])
    assert relative_error(model.logits(split), expected) < 1e-5


def test_a_mixed_batch_is_each_alone(tmp_path):
    """Prompts, chunks and single tokens of five sequences in one forward, their pages interleaved."""
    model = ours(random_checkpoint(tmp_path / "c", V3))
    lengths = [1, 63, 64, 65, 400]
    prompts = [tokens(n + 1, model.args.vocab_size, seed=n) for n in lengths]
    pages = [[b + 5 * p for p in range(7)] for b in range(5)]
    cache = model.new_cache(35)
    first = [(ids[: n // 2], 0, p) for ids, n, p in zip(prompts, lengths, pages, strict=True) if n // 2]
    model(Batch.pack(first), cache)
    rest = [(ids[n // 2 : n], n // 2, p) for ids, n, p in zip(prompts, lengths, pages, strict=True)]
    second = model(Batch.pack(rest), cache)
    third = model(Batch.pack([(ids[n:], n, p) for ids, n, p in zip(prompts, lengths, pages, strict=True)]), cache)
    at = 0
    for b, (ids, n) in enumerate(zip(prompts, lengths, strict=True)):
        alone = hidden_states(model, ids)
        took = n - n // 2
        assert relative_error(second[at : at + took], alone[n // 2 : n]) < 1e-5
        assert relative_error(third[b], alone[n]) < 1e-5
        at += took


def test_logits_do_not_depend_on_what_else_the_pages_hold(tmp_path):
    """Stale latents of an earlier owner, even NaN, behind a sequence's end are never read."""
    model = ours(random_checkpoint(tmp_path / "c", V3))
    ids = tokens(70, model.args.vocab_size)
    clean = hidden_states(model, ids)
    cache = model.new_cache(3).fill_(float("nan"))
    assert torch.equal(model(Batch.pack([(ids, 0, [2, 0])]), cache), hidden_states(model, ids, [70]))
    assert torch.isfinite(clean).all()


def test_dtypes_of_the_sensitive_parts(tmp_path):
    model = ours(random_checkpoint(tmp_path / "c", V3), Numerics(torch.bfloat16))
    gate = model.layers[1].ffn.gate
    assert gate.bias.dtype == torch.float32
    weights, _ = gate(torch.randn(3, model.args.dim, dtype=torch.bfloat16))
    assert weights.dtype == torch.float32
    hidden = hidden_states(model, tokens(5, model.args.vocab_size))
    assert hidden.dtype == torch.bfloat16
    logits = model.logits(hidden)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float()), "logits were rounded to bfloat16"
    exact = ours(tmp_path / "c")
    x = torch.randn(50, model.args.dim).bfloat16()
    assert relative_error(gate(x)[0], exact.layers[1].ffn.gate(x.float())[0]) < 1e-6, "the router was rounded"
    positions = torch.tensor([257, 1001, 100_003])
    assert all(map(torch.equal, model.angles(positions), exact.angles(positions))), "positions were rounded"


@pytest.mark.parametrize("gemm", ["fp8", "bf16"])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_fp8_modes_stay_near_exact_dequantisation(tmp_path, gemm, scale_fmt):
    """One layer, so that no expert flips far downstream: W8A16 in float32 activations is exact, W8A8 is not but near."""
    quantisation = {"scale_fmt": scale_fmt} if scale_fmt else {}
    config = V3 | dict(fp8_sizes(1), num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0,
                    quantization_config=quantisation)  # fmt: skip
    path = random_checkpoint(tmp_path / "c", config, fp8=True)
    exact = ours(path)
    ids = tokens(40, exact.args.vocab_size)
    expected = hidden_states(exact, ids)
    error = relative_error(hidden_states(ours(path, Numerics(torch.float32, gemm, scale_fmt)), ids), expected)
    if gemm == "bf16":
        assert error < 1e-5
    else:
        assert 1e-3 < error < 0.12  # e4m3 has 3 bits of mantissa: about 2.5 % a product, over six in a row


def test_ragged_stacked_projections_in_fp8(tmp_path):
    """On one rank no width need be whole blocks: W8A16 under float32 activations equals exact dequantisation."""
    ragged = {"moe_intermediate_size": 96, "intermediate_size": 200, "kv_lora_rank": 144, "num_hidden_layers": 2}
    for changes in ({}, {"q_lora_rank": None}):
        path = random_checkpoint(tmp_path / f"c{len(changes)}", V3 | fp8_sizes(1) | ragged | changes, fp8=True)
        exact, kept = ours(path), ours(path, Numerics(torch.float32, "bf16"))
        ids = tokens(40, exact.args.vocab_size)
        assert relative_error(hidden_states(kept, ids), hidden_states(exact, ids)) < 1e-5


def test_where_stacked_projections_begin():
    """Plain weights lie one after the other; FP8 ones begin at whole blocks, and equal ones are equally far apart."""
    fp8 = Numerics(gemm="fp8")
    for parts, num, starts, rows in (
        ({"wq_a": 1536, "wkv_a": 576}, fp8, (0, 1536), 2112),
        ({"wq_a": 160, "wkv_a": 192}, fp8, (0, 256), 448),
        ({"wq_a": 160, "wkv_a": 192}, Numerics(), (0, 160), 352),
        ({"w1": 2048, "w3": 2048}, fp8, (0, 2048), 4096),
        ({"w1": 96, "w3": 96}, fp8, (0, 128), 256),
        ({"w1": 96, "w3": 96}, Numerics(), (0, 96), 192),
        (576, fp8, (0,), 576),
    ):
        linear = Linear(256, parts, num, ReferenceBackend())
        assert (linear.starts, linear.weight.shape[0]) == (starts, rows)
        assert linear.scale is None or linear.scale.shape == (-(-rows // 128), 2)
        if linear.parts:
            ends = [columns[0, [0, -1]].tolist() for columns in linear.split(torch.arange(rows)[None])]
            assert ends == [[at, at + n - 1] for at, n in zip(starts, linear.parts.values(), strict=True)]


def test_ue8m0_reaches_every_quantised_linear(tmp_path):
    config = V3 | dict(fp8_sizes(1), quantization_config={"scale_fmt": "ue8m0"})
    path = random_checkpoint(tmp_path / "c", config, fp8=True)
    args = ModelArgs.from_hf({**config, "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0"}})
    assert args.scale_fmt == "ue8m0"
    model = ours(path, Numerics(torch.bfloat16, "fp8", "ue8m0"))
    linears = [m for m in model.modules() if type(m).__name__ == "Linear" and m.scale is not None]
    assert len(linears) > 20 and all(m.w.scale_fmt == "ue8m0" and m.w.gemm == "fp8" for m in linears)


def test_a_second_model_changes_nothing_in_the_first(tmp_path):
    a = ours(random_checkpoint(tmp_path / "a", V3))
    ids = tokens(20, a.args.vocab_size)
    before = hidden_states(a, ids)
    config = V3 | dict(fp8_sizes(1), quantization_config={"scale_fmt": "ue8m0"}, num_hidden_layers=1)
    ours(random_checkpoint(tmp_path / "b", config, fp8=True), Numerics(torch.bfloat16, "fp8", "ue8m0"))
    assert torch.equal(hidden_states(a, ids), before)


class Recorder(ReferenceBackend):
    """The reference, and the names of the ops that were asked of it."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __getattribute__(self, name):
        if not name.startswith("_") and callable(getattr(ReferenceBackend, name, None)):
            self.called.add(name)
        return super().__getattribute__(name)


def test_two_models_compute_each_by_its_own_backend(tmp_path):
    """In one process, on the same weights, in turn: each gives the bits that it gives alone."""
    path = random_checkpoint(tmp_path / "c", V3)
    ids = tokens(40, V3["vocab_size"])
    recorder = Recorder()
    kinds = [(Numerics(), None), (Numerics(), recorder), (Numerics(batch_invariant=True), None), (Numerics(torch.float32), None)]
    alone = [hidden_states(ours(path, num, backend=backend), ids, [30, 10]) for num, backend in kinds]
    assert recorder.called >= {"pack_weight", "pack_float32_weight", "linear", "norm", "router", "experts", "norm_latents", "mla"}
    models = [ours(path, num, backend=backend) for num, backend in kinds]
    assert len({id(model.ops) for model in models}) == len(models)
    for model, expected in zip(models * 2, alone * 2, strict=True):
        recorder.called.clear()
        assert torch.equal(hidden_states(model, ids, [30, 10]), expected)
        assert bool(recorder.called) == (model.ops is recorder)
    assert not any(torch.equal(a, b) for i, a in enumerate(alone) for b in alone[:i])


def test_full_size_shapes_on_the_meta_device():
    """The 671B model builds at TP 1, 8 and 16, with as many parameters as the report says: 671B, and 14B with MTP."""
    from core.config import load_config

    args = dataclasses.replace(load_config("configs/config_671B.json"), n_mtp_layers=1)
    num = Numerics(torch.bfloat16, "fp8")
    main = Transformer(args, num, device="meta", mtp=False)
    weights = sum(p.numel() for n, p in main.named_parameters() if not n.endswith(".scale"))
    assert round(weights / 1e9) == 671
    from parallel.group import Group

    for ranks in (8, 16):
        shard = Transformer(args, num, Group(ranks - 1, ranks), device="meta")
        assert shard.layers[5].ffn.experts.first == 256 // ranks * (ranks - 1)
        split = Transformer(args, dataclasses.replace(num, experts="split"), Group(ranks - 1, ranks), device="meta")
        experts = split.layers[5].ffn.experts
        assert experts.first == 0 and experts.w13.weight.shape == (256, 4096 // ranks, 7168)
        assert experts.w2.weight.shape == (256, 7168, 2048 // ranks)
        assert split.layers[5].attn.wqkv_a.weight.shape == (2112, 7168)
        assert shard.layers[5].attn.n_heads == 128 // ranks
