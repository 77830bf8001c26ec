"""Decode and prefill on a CPU, beside transformers, on one random DeepSeek-V3 of 1.7 billion parameters in bfloat16.

    python benchmarks/bench_cpu.py --output benchmarks/results/cpu.json
    python benchmarks/bench_cpu.py --checkpoint DIR --llama-bench PATH --gguf PATH

All read the same weights and take turns; a figure is the best of a side's turns, and a ratio is the median of the
turns' ratios. Logits of a short prompt are compared first: in bfloat16 the random routers choose other experts after a
rounding, and each side is about 0.4 from float32's, so this only shows that they run the same model. llama.cpp, if its
llama-bench and the checkpoint as a bfloat16 GGUF are given, runs each turn in a process of its own, timed by itself,
without loading. Weights lie in huge pages if the environment has GLIBC_TUNABLES=glibc.malloc.hugetlb=1.

    python benchmarks/bench_cpu.py --compiled --output benchmarks/results/compiled_reference.json

Instead: two layers of those widths, in bfloat16 and float32, by the backend for this CPU, by the reference, and by the
reference through torch.compile, layer by layer with dynamic shapes; and the seconds that first calls take, which for
the last compile C++.

    python benchmarks/bench_cpu.py --forms bf16 fp8 int8 int4 --checkpoint DIR --peers PEERS \
        --output benchmarks/results/cpu_forms.json

Instead: that model with its weights in these forms, DIR-fp8 and so on, which quantize.py makes where they are not,
beside llama.cpp and ik_llama.cpp at equal bits: bf16, Q8_0 and Q4_0. PEERS has, for NAME llama.cpp and ik_llama.cpp,
NAME/llama-batched-bench and NAME-bf16.gguf, NAME-Q8_0.gguf, NAME-Q4_0.gguf (by each one's convert_hf_to_gguf.py with
`head_dim` taken out of the config and the vocabulary `no_vocab`, and its llama-quantize, the last with --pure), and of
as many bits as ours Q8_0-bf16-head (--output-tensor-type bf16), Q8_0-experts and Q4_0-experts: ik_llama.cpp's by
--custom-q 'ffn_(gate|up|down)_exps=q8_0,attn_.*=bf16,ffn_(gate|up|down).weight=bf16,shexp=bf16,token_embd=bf16,
output.weight=bf16', llama.cpp's by --tensor-type for each of these. Both are built so:

  llama.cpp      cmake -B build -DCMAKE_BUILD_TYPE=Release; target llama-batched-bench
  ik_llama.cpp   the same, after letting its examples/batched-bench take random tokens as llama.cpp's does (with one
                 token everywhere all rows choose the same experts):
                 sed -i 's/common_batch_add(batch, 0,/common_batch_add(batch, std::rand() % llama_n_vocab(model),/'

For a processor's AVX2 alone: CC a script that adds -march=znver3 to what cc is given, ATEN_CPU_CAPABILITY=avx2,
ONEDNN_MAX_CPU_ISA=AVX2, and peers built with -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON.
For AVX-512 alone, without bfloat16 and a matrix unit: the same with -march=icelake-server, ATEN_CPU_CAPABILITY=avx512,
ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI, and peers built with -DGGML_NATIVE=OFF, and -march=native -mno-avx512bf16 as both
CMAKE_C_FLAGS and CMAKE_CXX_FLAGS.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers

from lib import INFERENCE, forms, report
from lib.checkpoints import write_transformers
from lib.timing import take_turns, timed

from checkpoint.directory import Checkpoint
from checkpoint.load import load_into
from core.batch import Batch
from core.config import ModelArgs
from core.numerics import Numerics
from core.run_config import PAGE_SIZE
from model import Transformer
from ops.cpu import kernels
from ops.reference_backend import ReferenceBackend

CONFIG = dict(
    vocab_size=32768, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=1024, num_hidden_layers=8,
    first_k_dense_replace=1, num_attention_heads=16, num_key_value_heads=16, n_routed_experts=32, n_shared_experts=1,
    num_experts_per_tok=4, n_group=8, topk_group=4, norm_topk_prob=True, routed_scaling_factor=2.5, q_lora_rank=768,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=163840,
    rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=40.0, original_max_position_embeddings=4096,
                         beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0),
)  # fmt: skip
SHORT, LONG, SEQUENCES = 512, 4096, 8


def make_checkpoint(path: Path) -> None:
    """Writes the random checkpoint with transformers."""
    config = transformers.DeepseekV3Config(**CONFIG)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.DeepseekV3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    write_transformers(model, path)


class Ours:
    def __init__(self, path: Path):
        checkpoint = Checkpoint(path)
        assert checkpoint.args is not None
        self.model = Transformer(checkpoint.args, mtp=False)
        load_into(self.model, checkpoint, progress=False)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.model.prepare()
        self.per_sequence = -(-(LONG + 64) // PAGE_SIZE)
        self.cache = self.model.new_cache(self.per_sequence * SEQUENCES)

    def forward(self, prompts: list[list[int]], start: int) -> list[int]:
        """The greedy next token of each sequence, given tokens that follow `start` cached ones."""
        per = self.per_sequence
        rows = [(ids, start, list(range(i * per, (i + 1) * per))) for i, ids in enumerate(prompts)]
        hidden = self.model(Batch.pack(rows), self.cache)
        ends = torch.tensor([len(ids) for ids in prompts]).cumsum(0) - 1
        self.logits = self.model.logits(hidden[ends])
        return self.logits.argmax(-1).tolist()


class Theirs:
    def __init__(self, path: Path):
        self.model = transformers.DeepseekV3ForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, local_files_only=True
        ).eval()
        self.past = transformers.DynamicCache()

    @torch.inference_mode()
    def forward(self, prompts: list[list[int]], start: int) -> list[int]:
        if start == 0:
            self.past = transformers.DynamicCache()
        out = self.model(torch.tensor(prompts), past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.logits = out.logits[:, -1].float()
        return self.logits.argmax(-1).tolist()


class Llama:
    """llama.cpp's own benchmark: one measurement a call, seconds as it reports them."""

    def __init__(self, binary: str, gguf: str, threads: int):
        self.command = [binary, "-m", gguf, "-t", str(threads), "-ngl", "0", "-r", "1", "-o", "json"]

    def seconds(self, prompt: int, new: int, depth: int = 0) -> float:
        command = [*self.command, "-p", str(prompt), "-n", str(new), "-d", str(depth)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        [row] = json.loads(done.stdout)
        return row["avg_ns"] / 1e9


def compare(name: str, tokens: int, turns: int, sides: dict[str, Callable[[], float]]) -> dict:
    """Runs the sides, "ours" and others, in turn; tokens per second of each and the ratios ours / theirs."""
    seconds, ratios = take_turns(sides, turns)
    speeds = {side: tokens / min(s) for side, s in seconds.items()}
    medians = {side: statistics.median(r) for side, r in ratios.items()}
    figures = "  ".join(f"{side} {speed:.1f}" for side, speed in speeds.items())
    print(f"{name:24} {figures} tok/s  " + ", ".join(f"{m:.2f} x {s}" for s, m in medians.items()), flush=True)
    return {"name": name, "turns": turns, "tok_s": speeds, "ratio": medians, "ratios": ratios}


def compiled_reference(dtype: torch.dtype, turns: int = 5) -> list[dict]:
    """Rows of `compare`, with the seconds that each side's first run takes. The results are compared first."""
    released = dict(architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", scoring_func="sigmoid",
                    topk_method="noaux_tc", rms_norm_eps=1e-6, hidden_act="silu")  # fmt: skip
    args = ModelArgs.from_hf(CONFIG | released | dict(num_hidden_layers=2, vocab_size=8192))
    backends = {"ours": None, "reference": ReferenceBackend(), "reference, compiled": ReferenceBackend()}
    models: dict[str, Transformer] = {}
    for side, backend in backends.items():
        torch.manual_seed(0)
        model = Transformer(args, Numerics(dtype), mtp=False, backend=backend)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.data.fill_(1)
        models[side] = model.prepare()
    for layer in models["reference, compiled"].layers:
        layer.compile(dynamic=True)
    pages = list(range(SHORT // PAGE_SIZE + 1))
    caches = {side: model.new_cache(len(pages)) for side, model in models.items()}
    ids = torch.randint(args.vocab_size, (SHORT,), generator=torch.Generator().manual_seed(1)).tolist()

    def prefill(side: str) -> torch.Tensor:
        return models[side](Batch.pack([(ids, 0, pages)]), caches[side])

    def decode(side: str) -> torch.Tensor:
        hidden = [models[side](Batch.pack([([7], SHORT + i, pages)]), caches[side]) for i in range(16)]
        return torch.cat(hidden)

    rows = []
    for what, tokens, run in ((f"prefill {SHORT}", SHORT, prefill), ("decode, 1 sequence", 16, decode)):
        first = {side: timed(partial(run, side))() for side in models}
        apart = float((run("reference, compiled") - run("reference")).norm() / run("reference").norm())
        assert apart < 0.05, f"compiled, the reference is {apart:.1e} from itself"
        name = f"{what}, {str(dtype).removeprefix('torch.')}"
        rows.append(compare(name, tokens, turns, {side: timed(partial(run, side)) for side in models}))
        rows[-1]["first_s"] = first
    return rows


def find_form(path: Path, form: str) -> Path:
    """The checkpoint in a form of weights, made where it is not."""
    if not (path / "config.json").exists():
        make_checkpoint(path)
    if form == "bf16":
        return path
    made = path.with_name(f"{path.name}-{form}")
    if not (made / "config.json").exists():
        command = [sys.executable, INFERENCE / "quantize.py", "--hf-ckpt-path", path, "--save-path", made]
        subprocess.run([*map(str, command), "--format", form], check=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="JSON file for the results")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--checkpoint", help="keep the checkpoint in this directory, or use the one there")
    parser.add_argument("--llama-bench", help="llama.cpp's llama-bench, to run beside the others; needs --gguf")
    parser.add_argument("--gguf", help="the checkpoint converted by llama.cpp, in bfloat16")
    parser.add_argument("--compiled", action="store_true", help="instead: the reference through torch.compile")
    parser.add_argument("--forms", nargs="+", choices=list(forms.BITS), help="instead: the weights in these forms")
    parser.add_argument("--peers", type=Path, help="folder with llama.cpp and ik_llama.cpp, beside --forms")
    parser.add_argument("--turns", type=int, default=3, help="of --forms (default: %(default)s)")
    args = parser.parse_args()
    if bool(args.llama_bench) != bool(args.gguf):
        parser.error("--llama-bench and --gguf go together")
    if args.threads:
        torch.set_num_threads(args.threads)
    places = {args.checkpoint: "DIR", str(args.peers): "PEERS", args.llama_bench: "llama-bench", args.gguf: "DIR.gguf"}
    words = [places.get(word, word) for word in sys.argv[1:]]  # for others, who have these elsewhere
    command = shlex.join(["python", "benchmarks/bench_cpu.py", *words])
    if args.compiled:
        from torch import _dynamo, _inductor

        _dynamo.config.recompile_limit = 64
        _inductor.config.force_disable_caches = True
        rows = []
        for dtype in (torch.bfloat16, torch.float32):
            rows += compiled_reference(dtype)
            report.save(args.output, {"threads": torch.get_num_threads(), "rows": rows})
        return
    if args.forms:
        if not args.checkpoint:
            parser.error("--forms needs --checkpoint")
        paths = {form: find_form(Path(args.checkpoint), form) for form in args.forms}
        kernels.library()  # compiled now, and not while somebody is timed
        threads = torch.get_num_threads()
        forms.measure(
            paths, args.peers, args.turns, threads, save=lambda found: report.save(args.output, found, command)
        )
        return
    llama = Llama(args.llama_bench, args.gguf, torch.get_num_threads()) if args.gguf else None
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(args.checkpoint or scratch)
        if not (path / "config.json").exists():
            make_checkpoint(path)
        ours, theirs = Ours(path), Theirs(path)
        print(f"{ours.parameters:,} parameters, {torch.get_num_threads()} threads", flush=True)
        generator = torch.Generator().manual_seed(1)

        def ids(n: int) -> list[int]:
            return torch.randint(CONFIG["vocab_size"], (n,), generator=generator).tolist()  # type: ignore[call-overload]

        prompt = [ids(64)]
        same = ours.forward(prompt, 0) == theirs.forward(prompt, 0)
        apart = float((ours.logits - theirs.logits).norm() / theirs.logits.norm())
        print(f"logits after 64 tokens are {apart:.1e} apart, the greedy token is the same: {same}", flush=True)
        assert apart < 0.8, "the sides do not run the same model"
        short, long, many = [ids(SHORT)], [ids(LONG)], [ids(64) for _ in range(SEQUENCES)]

        def decode(side: Ours | Theirs, steps: int, start: int, batch: int) -> None:
            for i in range(steps):
                side.forward([[7 + b] for b in range(batch)], start + i)
            if isinstance(side, Theirs):
                side.past.crop(-steps)

        def beside(
            run: Callable[[Ours | Theirs], object], other: Callable[[Llama], float] | None = None
        ) -> dict[str, Callable[[], float]]:
            sides = {"ours": timed(lambda: run(ours)), "transformers": timed(lambda: run(theirs))}
            return sides | ({"llama.cpp": lambda: other(llama)} if llama and other else {})

        first = beside(lambda s: s.forward(short, 0), lambda x: x.seconds(SHORT, 0))
        one = beside(lambda s: decode(s, 16, SHORT, 1), lambda x: x.seconds(0, 16, SHORT))
        fill = beside(lambda s: s.forward(many, 0))
        several = beside(lambda s: decode(s, 8, 64, SEQUENCES))
        whole = beside(lambda s: s.forward(long, 0), lambda x: x.seconds(LONG, 0))
        deep = beside(lambda s: decode(s, 4, LONG, 1), lambda x: x.seconds(0, 4, LONG))
        settings = {"threads": torch.get_num_threads(), "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES")}
        rows = []
        for name, tokens, turns, sides in (
            (f"prefill {SHORT}", SHORT, 4, first),
            ("decode, 1 sequence", 16, 4, one),
            (f"prefill {SEQUENCES} x 64", 64 * SEQUENCES, 1, fill),
            (f"decode, {SEQUENCES} sequences", 8 * SEQUENCES, 4, several),
            (f"prefill {LONG}", LONG, 3, whole),
            (f"decode at {LONG} context", 4, 3, deep),
        ):
            rows.append(compare(name, tokens, turns, sides))
            report.save(args.output, {"parameters": ours.parameters, **settings, "rows": rows}, command)


if __name__ == "__main__":
    main()
