"""A whole model on one GPU, through the engine, beside transformers on the same GPU in the same run.

    python benchmarks/model_gpu.py v2-lite --output benchmarks/results/model_v2_lite.json
    python benchmarks/model_gpu.py moonlight --output benchmarks/results/model_moonlight.json
    python benchmarks/model_gpu.py v2-lite --smoke          # shrunk, on the CPU, no timing

The shapes are the released models', the weights random: transformers draws them, writes a checkpoint (32 GB, kept in
--checkpoint if that is given), and this engine reads it; both then sit on the GPU, so it needs 80 GB. A figure is the
best of its turns, the ratio the median of the turns' ratios. Ours is timed as it serves: scheduling, packing and
sampling are in it. transformers' is its model called in a loop with a cache that grows, and argmax.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from lib import CONFIGS, report
from lib.checkpoints import write_transformers
from lib.timing import NO_TIMING, Clock, clock_for, reason
from lib.weights import fill

from checkpoint.directory import Checkpoint
from checkpoint.load import load_into
from core.config import ModelArgs, load_config
from core.numerics import Numerics
from core.run_config import RunConfig
from core.sampling_params import SamplingParams
from engine.engine import Engine
from model import Transformer

MODELS = {"v2-lite": "config_16B.json", "moonlight": "config_moonlight.json"}
SHRUNK = dict(vocab_size=512, dim=128, inter_dim=256, moe_inter_dim=64, n_layers=2, n_heads=2, n_routed_experts=8,
              n_activated_experts=2, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16,
              v_head_dim=32)  # fmt: skip


def their_config(args: ModelArgs) -> Any:
    """The transformers config of these facts."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.rope_factor > 1:
        rope |= {"rope_type": "yarn", "factor": args.rope_factor, "beta_fast": args.beta_fast,
                 "beta_slow": args.beta_slow, "original_max_position_embeddings": args.original_seq_len,
                 "mscale": args.mscale, "mscale_all_dim": args.mscale_all_dim}  # fmt: skip
    family = transformers.DeepseekV3Config if args.score_func == "sigmoid" else transformers.DeepseekV2Config
    return family(
        vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.inter_dim,
        moe_intermediate_size=args.moe_inter_dim, num_hidden_layers=args.n_layers,
        first_k_dense_replace=args.n_dense_layers, num_attention_heads=args.n_heads, num_key_value_heads=args.n_heads,
        n_routed_experts=args.n_routed_experts, n_shared_experts=args.n_shared_experts,
        num_experts_per_tok=args.n_activated_experts, n_group=args.n_expert_groups, topk_group=args.n_limited_groups,
        scoring_func=args.score_func, topk_method=args.topk_method, norm_topk_prob=args.norm_topk_prob,
        routed_scaling_factor=args.route_scale, q_lora_rank=args.q_lora_rank or None, kv_lora_rank=args.kv_lora_rank,
        qk_nope_head_dim=args.qk_nope_head_dim, qk_rope_head_dim=args.qk_rope_head_dim, v_head_dim=args.v_head_dim,
        rope_parameters=rope, max_position_embeddings=args.max_seq_len, rms_norm_eps=args.norm_eps,
    )  # fmt: skip


class Theirs:
    name = "transformers"

    def __init__(self, args: ModelArgs, clock: Clock):
        self.clock = clock
        config = their_config(args)
        name = "DeepseekV3ForCausalLM" if args.score_func == "sigmoid" else "DeepseekV2ForCausalLM"
        torch.set_default_dtype(torch.bfloat16)
        with clock.device:
            self.model = getattr(transformers, name)(config).eval()
        torch.set_default_dtype(torch.float32)
        fill(self.model)

    @torch.inference_mode()
    def answer(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float, float]:
        """The tokens, and the seconds up to the first of them and from there to the last."""
        past = transformers.DynamicCache()
        ids = torch.tensor(prompts, device=self.clock.device)
        made, marks = [], [time.perf_counter()]
        for i in range(new):
            out = self.model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1:].argmax(-1)[..., -1:]
            made.append(ids)
            if i in (0, new - 1):
                _ = ids.cpu()  # waits for the device
                marks.append(time.perf_counter())
        return torch.cat(made, dim=1).tolist(), marks[1] - marks[0], marks[-1] - marks[1]


class Ours:
    name = "ours"

    def __init__(self, path: Path, args: ModelArgs, clock: Clock, sequences: int, longest: int, step: int):
        self.clock = clock
        checkpoint = Checkpoint(path)
        assert checkpoint.args == args, f"transformers' config reads back as {checkpoint.args}"
        model = Transformer(args, Numerics(torch.bfloat16), device=clock.device, mtp=False)
        load_into(model, checkpoint, progress=False)
        run = RunConfig(
            max_model_len=longest, max_num_seqs=sequences, max_num_batched_tokens=step, prefix_reuse=False
        )  # fmt: skip
        self.engine = Engine(model.prepare(), None, run)

    def answer(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float, float]:
        params = SamplingParams(temperature=0, max_new_tokens=new, ignore_eos=True)
        began = time.perf_counter()
        requests = [self.engine.add(prompt, params, i) for i, prompt in enumerate(prompts)]
        assert not any(r.error for r in requests), requests[0].error
        while not all(r.tokens for r in requests):
            self.engine.step()
        first = time.perf_counter()
        while self.engine.busy:
            self.engine.step()
        return [r.tokens for r in requests], first - began, time.perf_counter() - first


def compare(
    name: str, prompts: list[list[int]], new: int, turns: int, sides: Sequence[Ours | Theirs], clock: Clock
) -> dict[str, Any]:
    """Both sides in turn, after a warm-up of each; with one new token the prompt is timed, with more the others."""
    row: dict[str, Any] = {"name": name, "sequences": len(prompts), "prompt": len(prompts[0]), "new": new}
    tokens = len(prompts) * (len(prompts[0]) if new == 1 else new - 1)
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    answers: dict[str, list[list[int]]] = {}
    for turn in range(turns + 1):
        for side in sides if turn % 2 else reversed(sides):
            if f"{side.name}_refused" in row:
                continue
            try:
                answers[side.name], prefill, decode = side.answer(prompts, new)
            except Exception as e:
                row[f"{side.name}_refused"] = reason(e)
                continue
            if turn:
                seconds[side.name].append((prefill if new == 1 else decode) if clock.timing else 1.0)
    for side_name, taken in seconds.items():
        if taken:
            row[f"{side_name}_tok_s"] = tokens / min(taken)
    if all(len(taken) == turns for taken in seconds.values()):
        a, b = seconds.values()
        row["ratio"] = statistics.median(theirs / ours for ours, theirs in zip(a, b, strict=True))
        both = zip(*answers.values(), strict=True)
        row["same_first_token"] = sum(x[0] == y[0] for x, y in both)
    if not clock.timing:
        row["no_timing"] = True
    return row


def table(found: dict[str, Any]) -> str:
    """The results, as they are saved, in Markdown."""

    def figure(row: dict[str, Any], key: str, form: str) -> str:
        if key not in row:
            return "refused" if key.replace("tok_s", "refused") in row else "–"
        return "(none)" if "no_timing" in row else format(row[key], form)

    columns = [("ours_tok_s", ".1f"), ("transformers_tok_s", ".1f"), ("ratio", ".2f")]
    lines = [[row["name"], *(figure(row, *column) for column in columns)] for row in found["rows"]]
    return report.table([found["model"], "this engine, tok/s", "transformers, tok/s", "ratio"], lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], metavar="B")
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 4096], metavar="T")
    parser.add_argument("--prompt", type=int, default=512, help="tokens before those that are decoded")
    parser.add_argument("--new", type=int, default=65, help="tokens of a sequence that is decoded")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--checkpoint", help="keep the checkpoint in this directory")
    parser.add_argument("--peak", type=float, default=1979, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, no timing")
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    args = load_config(CONFIGS / MODELS[options.model])
    if options.smoke:
        args = replace(args, **SHRUNK)  # type: ignore[arg-type]
        options.batches, options.prefill, options.prompt, options.new, options.turns = [2], [24], 16, 3, 1
    clock = clock_for(options.smoke, options.peak)
    if clock is None:
        return 2
    print(f"{clock.name}\n" if clock.timing else NO_TIMING + "\n")
    torch.manual_seed(0)
    theirs = Theirs(args, clock)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(options.checkpoint or scratch)
        write_transformers(theirs.model, path)
        longest = max(options.prompt + options.new, *options.prefill) + 1
        ours = Ours(path, args, clock, max(options.batches), longest, max(options.prefill))
    parameters = sum(p.numel() for p in theirs.model.parameters())
    print(f"{options.model}: {parameters:,} parameters", flush=True)
    draw = torch.Generator().manual_seed(1)

    def prompts(b: int, n: int) -> list[list[int]]:
        return torch.randint(args.vocab_size, (b, n), generator=draw).tolist()

    found: dict[str, Any] = {"model": options.model, "parameters": parameters, "rows": []}
    found |= {} if clock.timing else {"no_timing": NO_TIMING}
    cases = [(f"prefill {n}", prompts(1, n), 1) for n in options.prefill]
    cases += [(f"decode, {b} at a time", prompts(b, options.prompt), options.new) for b in options.batches]
    for name, given, new in cases:
        row = compare(name, given, new, options.turns, [ours, theirs], clock)
        found["rows"].append(row)
        print(row if clock.timing else f"{name}: (no timing)", flush=True)
        report.save(options.output, found)
    print("\n" + table(found))
    summary = {"benchmark": "model", "model": options.model, "rows": len(found["rows"])}
    print(json.dumps(summary | ({} if clock.timing else {"no_timing": True})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
