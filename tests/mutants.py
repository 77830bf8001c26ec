"""Breaks the program in one place at a time, in ways that ports of these models have really been broken, and sees
whether the tests notice.

    python tests/mutants.py [--only NAME …] [--jobs N] [--json FILE]

Each mutant runs the tests that ought to kill it in a copy of the source tree. "killed": one of them failed; "survived":
a test is missing; "stale": the text to replace is not there exactly once; "broken": the tests did not run. As controls
all tests named are run on unchanged copies, where they must pass. Exit status 0 if every mutant was killed.

Processes are forked from this one, which has imported the libraries but nothing of the project.
"""

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CONTROL = "control "
COPIED = ("inference", "tests", "benchmarks")  # the rest is linked
LIBRARIES = (
    "torch", "torch.distributed", "triton", "transformers.models.deepseek_v2.modeling_deepseek_v2",
    "transformers.models.deepseek_v3.modeling_deepseek_v3", "transformers.modeling_layers", "safetensors.torch",
    "tokenizers", "jinja2", "tqdm", "hypothesis", "pytest",
)  # fmt: skip


class Mutant(NamedTuple):
    """One change of one file of inference/, and the tests, in tests/, that are to fail because of it."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # pytest's node ids
    bug: str

    def apply(self, source: str) -> str:
        """The file with the bug. Raises ValueError when the text to replace is not there exactly once."""
        if (n := source.count(self.old)) != 1:
            raise ValueError(f"{self.file} has {self.old!r} {n} times, expected once")
        return source.replace(self.old, self.new)


class Outcome(NamedTuple):
    name: str
    outcome: str
    killer: str  # the test that failed first
    error: str  # of that test, its first line
    seconds: float
    log: str  # of what was not as it should be


LOGITS = "test_model.py::test_logits_are_transformers"
ROUTER = "test_model.py::test_router_chooses_what_transformers_chooses"
MTP = "test_model.py::test_mtp_logits_are_transformers"
SHARDS = "test_parallel.py::test_shards_together_are_the_whole"
RANDOM_USE = "test_scheduler.py::test_under_random_use"
COMPANY = "test_engine.py::test_same_answers_in_any_company"
NOISE = "test_sampling.py::test_noise_is_a_function_of_its_numbers"
CUTS = "test_sampling.py::test_cuts"
VERIFIED = "test_sampling.py::test_verified_tokens_are_distributed_as_sampled_ones[{}]"

MUTANTS = [Mutant(*row) for row in (
    # --- the router ---------------------------------------------------------------------------------------------------
    ("routing-group-max", "reference.py",
     "worth = grouped.topk(2, dim=-1).values.sum(dim=-1)",
     "worth = grouped.amax(dim=-1)",
     f"{ROUTER}[v3]", "V3: a group is worth its best expert instead of its two best"),
    ("routing-group-sum", "reference.py",
     "worth = grouped.amax(dim=-1)",
     "worth = grouped.topk(2, dim=-1).values.sum(dim=-1)",
     f"{ROUTER}[v2]", "V2: a group is worth its two best experts instead of its best"),
    ("routing-no-groups", "reference.py",
     'if rule.topk_method != "greedy" and rule.n_groups > 1:',
     "if False:",
     f"{ROUTER}[v3]", "experts are chosen among all groups"),
    ("routing-groups-swapped", "model.py",
     "args.topk_method, args.n_expert_groups, args.n_limited_groups,",
     "args.topk_method, args.n_limited_groups, args.n_expert_groups,",
     f"{ROUTER}[v3-256]", "n_group and topk_group change places"),
    ("routing-masked-with-zero", "reference.py",
     'choice = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)',
     "choice = grouped.masked_fill(dropped.unsqueeze(-1), 0.0).flatten(-2)",
     f"{ROUTER}[v3]", "experts of groups not kept get 0, more than a negative biased score"),
    ("routing-bias-in-weights", "reference.py",
     "weights = scores.gather(-1, ids)",
     "weights = choice.gather(-1, ids)",
     f"{ROUTER}[v3]", "the bias is added to the experts' weights, not only to the choice"),
    ("routing-bias-left-out", "reference.py",
     "choice = scores if bias is None else scores + bias",
     "choice = scores",
     f"{ROUTER}[v3]", "the bias takes no part in the choice"),
    ("routing-bias-rounded", "model.py",
     "bias = _parameter(args.n_routed_experts, dtype=torch.float32) if args.gate_bias else None",
     "bias = _parameter(args.n_routed_experts, dtype=num.dtype) if args.gate_bias else None",
     "test_model.py::test_dtypes_of_the_sensitive_parts", "the bias is kept in bfloat16"),
    ("routing-bias-before-sigmoid", "reference.py",
     'scores = logits.sigmoid() if rule.score_func == "sigmoid"',
     'scores = (logits if bias is None else logits + bias).sigmoid() if rule.score_func == "sigmoid"',
     f"{ROUTER}[v3]", "the bias is added to the logits, and so to the weights"),
    ("routing-softmax", "reference.py",
     'scores = logits.sigmoid() if rule.score_func == "sigmoid" else logits.softmax(dim=-1)',
     "scores = logits.softmax(dim=-1)",
     f"{ROUTER}[kimi-k2]", "V3's scores by softmax"),
    ("routing-sigmoid", "reference.py",
     'scores = logits.sigmoid() if rule.score_func == "sigmoid" else logits.softmax(dim=-1)',
     "scores = logits.sigmoid()",
     f"{ROUTER}[v2-lite]", "V2's scores by sigmoid"),
    ("routing-not-normalised", "reference.py",
     "weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)",
     "pass",
     f"{ROUTER}[v3]", "V3's weights are not divided by their sum"),
    ("routing-normalised", "reference.py",
     "if rule.normalise:",
     "if True:",
     f"{ROUTER}[v2]", "V2's weights are divided by their sum"),
    ("routing-normalised-over-all", "reference.py",
     "weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)",
     "weights = weights / (scores.sum(dim=-1, keepdim=True) + 1e-20)",
     f"{ROUTER}[v3]", "the weights are divided by the sum over all experts"),
    ("routing-scale-left-out", "reference.py",
     "return weights * rule.route_scale, ids",
     "return weights, ids",
     f"{ROUTER}[v3]", "routed_scaling_factor is forgotten"),
    ("routing-scale-twice", "reference.py",
     "return weights * rule.route_scale, ids",
     "return weights * rule.route_scale**2, ids",
     f"{ROUTER}[v3]", "routed_scaling_factor is applied twice"),
    ("routing-scale-normalised-only", "reference.py",
     "return weights * rule.route_scale, ids",
     "return weights * (rule.route_scale if rule.normalise else 1.0), ids",
     f"{ROUTER}[v2]", "routed_scaling_factor only where weights are normalised, as one release of V2's code had it"),
    ("routing-in-bfloat16", "ops.py",
     "return route(project_float32(x, w), bias, rule)",
     "return route(project_float32(x, w).to(x.dtype).float(), bias, rule)",
     "test_model.py::test_dtypes_of_the_sensitive_parts", "router logits are rounded to bfloat16"),

    # --- experts ------------------------------------------------------------------------------------------------------
    ("moe-shared-scaled", "model.py",
     "shared = None if self.shared_experts is None else partial(self.shared_experts, x)",
     "shared = None if self.shared_experts is None else lambda: self.shared_experts(x) * self.gate.rule.route_scale",
     f"{LOGITS}[v3]", "the shared experts are scaled as the routed ones are"),
    ("moe-shared-left-out", "ops.py",
     "if shared is not None:",
     "if False:",
     f"{LOGITS}[v3]", "the shared experts are left out"),
    ("moe-gate-and-up", "reference.py",
     "y = (F.silu(gate.float()) * up.float()).to(gate.dtype)",
     "y = (gate.float() * F.silu(up.float())).to(gate.dtype)",
     "test_fused.py::test_silu_mul", "silu is applied to up instead of gate"),
    ("moe-weights-of-others", "reference.py",
     "w = weights.flatten()[order[start : start + n]].unsqueeze(-1)",
     "w = weights[rows, 0].unsqueeze(-1)",
     f"{LOGITS}[v2]", "an expert's result is weighted by its token's first weight"),
    ("moe-sum-in-bfloat16", "reference.py",
     "out = torch.zeros_like(x, dtype=torch.float32)\n    flat = ids.flatten()",
     "out = torch.zeros_like(x, dtype=torch.bfloat16).float()\n    run = lambda e, x, run=run: run(e, x).bfloat16()\n    flat = ids.flatten()",
     f"{LOGITS}[v3]", "experts' results are rounded to bfloat16 before they are summed"),
    ("moe-first-dense-layers", "model.py",
     "Block(args, num, tp, i < args.n_dense_layers)",
     "Block(args, num, tp, i <= args.n_dense_layers)",
     f"{LOGITS}[v3]", "one dense layer too many"),
    ("moe-cpu-experts-of-others", "cpu.py",
     "tokens, factors = tokens[mine], weights.flatten()[order[mine]].unsqueeze(-1)",
     "tokens, factors = tokens[mine], weights.flatten()[mine].unsqueeze(-1)",
     "test_cpu.py::test_experts", "packed experts: weights in the order of tokens, results in that of experts"),

    # --- rotary embedding ---------------------------------------------------------------------------------------------
    ("rope-half", "reference.py",
     "pairs = x.float().unflatten(-1, (-1, 2))",
     "pairs = x.float().unflatten(-1, (2, -1)).mT",
     "test_attention.py::test_rotary_rotates_pairs", "pairs (i, i + R/2) instead of (2i, 2i + 1)"),
    ("rope-backwards", "model.py",
     "angle = positions.float().unsqueeze(-1) * self.inv_freq",
     "angle = -positions.float().unsqueeze(-1) * self.inv_freq",
     f"{LOGITS}[v3]", "angles turn the other way"),
    ("rope-wrong-query-part", "model.py",
     "q_nope, q_pe = q.unflatten(-1, (self.n_heads, -1)).split([args.qk_nope_head_dim, args.qk_rope_head_dim], dim=-1)",
     "q_pe, q_nope = q.unflatten(-1, (self.n_heads, -1)).split([args.qk_rope_head_dim, args.qk_nope_head_dim], dim=-1)",
     f"{LOGITS}[v3]", "a query's first dimensions are rotated instead of its last"),
    ("rope-wrong-key-part", "model.py",
     "c_kv, k_pe = kv.split([args.kv_lora_rank, args.qk_rope_head_dim], dim=-1)",
     "k_pe, c_kv = kv.split([args.qk_rope_head_dim, args.kv_lora_rank], dim=-1)",
     f"{LOGITS}[v3]", "the rotary key is taken from in front of the latent"),
    ("rope-key-not-rotated", "reference.py",
     "latent = torch.cat((rms_norm(c_kv, weight, eps), rotary(k_pe, cos, sin)), dim=-1)",
     "latent = torch.cat((rms_norm(c_kv, weight, eps), k_pe), dim=-1)",
     f"{LOGITS}[v3]", "keys are cached without their rotation"),
    ("rope-positions-in-bfloat16", "model.py",
     "angle = positions.float().unsqueeze(-1) * self.inv_freq",
     "angle = positions.to(self.num.dtype).float().unsqueeze(-1) * self.inv_freq",
     "test_model.py::test_dtypes_of_the_sensitive_parts", "positions beyond 256 are rounded to bfloat16"),
    ("rope-frequencies-of-head", "model.py",
     "dim, base = args.qk_rope_head_dim, args.rope_theta",
     "dim, base = args.qk_rope_head_dim, 10000.0",
     f"{LOGITS}[moonlight]", "rope_theta is not read"),
    ("yarn-left-out", "model.py",
     "if args.rope_factor == 1:",
     "if True:",
     f"{LOGITS}[v3]", "frequencies without YaRN"),
    ("yarn-by-context-limit", "model.py",
     "if args.rope_factor == 1:",
     "if args.rope_factor == 1 or args.max_seq_len <= args.original_seq_len:",
     "test_model.py::test_yarn_applies_whatever_the_context_limit", "YaRN only where the context limit exceeds the original length"),
    ("yarn-ramp-turned-round", "model.py",
     "return freqs / args.rope_factor * slowed + freqs * (1 - slowed)",
     "return freqs / args.rope_factor * (1 - slowed) + freqs * slowed",
     f"{LOGITS}[v3]", "the fast pairs are slowed instead of the slow ones"),
    ("yarn-no-ramp", "model.py",
     "slowed = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)",
     "slowed = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1).round()",
     f"{LOGITS}[v3]", "a step in place of the ramp"),
    ("yarn-betas-swapped", "model.py",
     "low = max(math.floor(pair_turning(args.beta_fast)), 0)",
     "low = max(math.floor(pair_turning(args.beta_slow)), 0)",
     f"{LOGITS}[v3]", "the ramp begins where it ends"),
    ("yarn-original-length", "model.py",
     "math.log(args.original_seq_len / (times * 2 * math.pi))",
     "math.log(args.max_seq_len / (times * 2 * math.pi))",
     f"{LOGITS}[v3]", "the ramp is placed by the extended length"),
    ("yarn-unrounded-bounds", "model.py",
     "high = min(math.ceil(pair_turning(args.beta_slow)), dim - 1)",
     "high = min(pair_turning(args.beta_slow), dim - 1)",
     f"{LOGITS}[v3]", "the ramp's end is not rounded to a pair"),
    ("yarn-zero-width", "model.py",
     "width = high - low if high > low else 0.001",
     "width = high - low",
     "test_model.py::test_a_ramp_without_width_is_a_step", "beta_fast = beta_slow divides by zero"),
    ("mscale-once", "config.py",
     "return self.qk_head_dim**-0.5 * _mscale(self.rope_factor, self.mscale_all_dim) ** 2",
     "return self.qk_head_dim**-0.5 * _mscale(self.rope_factor, self.mscale_all_dim)",
     f"{LOGITS}[v3]", "YaRN's temperature enters the softmax once instead of squared"),
    ("mscale-left-out", "config.py",
     "return self.qk_head_dim**-0.5 * _mscale(self.rope_factor, self.mscale_all_dim) ** 2",
     "return self.qk_head_dim**-0.5",
     f"{LOGITS}[v2]", "the softmax without YaRN's temperature"),
    ("mscale-not-read", "config.py",
     '"mscale_all_dim": float(rope.get("mscale_all_dim", 0.0)),',
     '"mscale_all_dim": 1.0,',
     f"{LOGITS}[v2-lite]", "V2-Lite's mscale of 0.707 taken for 1"),
    ("mscale-other-one", "config.py",
     "return self.qk_head_dim**-0.5 * _mscale(self.rope_factor, self.mscale_all_dim) ** 2",
     "return self.qk_head_dim**-0.5 * _mscale(self.rope_factor, self.mscale) ** 2",
     "test_model.py::test_two_mscales", "mscale in the softmax instead of mscale_all_dim"),
    ("mscale-in-the-angles", "config.py",
     "return _mscale(self.rope_factor, self.mscale) / _mscale(self.rope_factor, self.mscale_all_dim)",
     "return _mscale(self.rope_factor, self.mscale)",
     f"{LOGITS}[v3]", "cos and sin carry the temperature as well"),
    ("mscale-ratio-left-out", "model.py",
     "return angle.cos() * self.args.rope_multiplier, angle.sin() * self.args.rope_multiplier",
     "return angle.cos(), angle.sin()",
     "test_model.py::test_two_mscales", "cos and sin without the ratio of the two mscales"),

    # --- norms --------------------------------------------------------------------------------------------------------
    ("norm-eps", "model.py",
     "self.attn_norm = RMSNorm(args.dim, args.norm_eps, num.dtype)",
     "self.attn_norm = RMSNorm(args.dim, INNER_NORM_EPS, num.dtype)",
     f"{LOGITS}[moonlight]", "rms_norm_eps is not read"),
    ("norm-inner-eps", "model.py",
     "self.kv_norm = RMSNorm(args.kv_lora_rank, INNER_NORM_EPS, num.dtype)",
     "self.kv_norm = RMSNorm(args.kv_lora_rank, args.norm_eps, num.dtype)",
     "test_model.py::test_inner_norms_have_an_eps_of_their_own", "kv_a_layernorm takes rms_norm_eps instead of 1e-6"),
    ("norm-of-latents-left-out", "reference.py",
     "latent = torch.cat((rms_norm(c_kv, weight, eps), rotary(k_pe, cos, sin)), dim=-1)",
     "latent = torch.cat((c_kv, rotary(k_pe, cos, sin)), dim=-1)",
     f"{LOGITS}[v3]", "latents are cached without kv_a_layernorm"),
    ("norm-of-queries-left-out", "model.py",
     "q = self.wq_b(self.q_norm.add(q, None, self.wq_b.fp8)[0])",
     "q = self.wq_b(q)",
     f"{LOGITS}[v3]", "queries without q_a_layernorm"),
    ("norm-wrong-one", "model.py",
     "y, x = self.ffn_norm.add(x, self.attn(",
     "y, x = self.attn_norm.add(x, self.attn(",
     f"{LOGITS}[v3]", "the feed-forward behind the attention's norm"),
    ("norm-in-the-residual", "reference.py",
     "return quantised(y, fp8, keep) if fp8 else y, total",
     "return quantised(y, fp8, keep) if fp8 else y, y",
     f"{LOGITS}[v3]", "the residual stream goes on from behind the norm"),
    ("norm-final-left-out", "model.py",
     "return self.norm(x, delta)",
     "return x + delta",
     f"{LOGITS}[v3]", "no norm before the head"),
    ("norm-rounded-twice", "reference.py",
     "return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)",
     "return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight",
     "test_fused.py::test_norm_is_an_addition_a_norm_and_a_quantisation", "x / rms(x) is rounded before it is multiplied by the weight"),

    # --- attention ----------------------------------------------------------------------------------------------------
    ("mla-kv-b-order", "model.py",
     "w_uk, w_uv = kv_b.split([self.args.qk_nope_head_dim, self.args.v_head_dim], dim=1)",
     "w_uv, w_uk = kv_b.split([self.args.v_head_dim, self.args.qk_nope_head_dim], dim=1)",
     f"{LOGITS}[v3]", "wkv_b read as values first"),
    ("mla-kv-b-heads", "model.py",
     "kv_b = self.wkv_b.dequantised(self.dtype).unflatten(0, (self.n_heads, -1))",
     "kv_b = self.wkv_b.dequantised(self.dtype).unflatten(0, (-1, self.n_heads)).transpose(0, 1)",
     f"{LOGITS}[v3]", "wkv_b read with the heads innermost"),
    ("mla-scale-without-rope", "config.py",
     "return self.qk_head_dim**-0.5 *",
     "return self.qk_nope_head_dim**-0.5 *",
     f"{LOGITS}[v3]", "the softmax scale of the unrotated dimensions alone"),
    ("mla-mask", "reference.py",
     "hidden = torch.arange(lo, hi, device=q.device) > seen[:, None]",
     "hidden = torch.arange(lo, hi, device=q.device) > seen[:, None] + 1",
     "test_attention.py::test_every_form_at_every_row_count", "every query sees the key after it"),
    ("mla-tiles-not-rescaled", "reference.py",
     "acc = acc * kept + _heads_matmul(p, v)",
     "acc = acc + _heads_matmul(p, v)",
     "test_attention.py::test_every_form_at_every_row_count", "online softmax: earlier tiles keep their old peak"),
    ("mla-tiles-total", "reference.py",
     "total = total * kept + p.sum(dim=-1, keepdim=True)",
     "total = total + p.sum(dim=-1, keepdim=True)",
     "test_attention.py::test_every_form_at_every_row_count", "online softmax: the divisor keeps its old peak"),
    ("mla-scores-in-bfloat16", "reference.py",
     "scores = _heads_matmul(rows, k.mT) * scale",
     "scores = _heads_matmul(rows, k.mT).to(q.dtype).float() * scale",
     "test_attention.py::test_bfloat16_scores_are_float32", "scores are rounded to bfloat16 before the softmax"),
    ("mla-pages-in-a-row", "reference.py",
     "rows = latents[used].flatten(0, 1)[:length]",
     "rows = latents[first : first + len(used)].flatten(0, 1)[:length]",
     "test_attention.py::test_against_float64", "a sequence's pages are taken for neighbours"),
    ("mla-cpu-drafts-unmasked", "cpu.py",
     "if n > 1:",
     "if n > DECODE_ROWS:",
     "test_attention.py::test_decoding_sequences_together", "a draft's row sees the drafts behind it"),
    ("mla-cpu-mask", "cpu.py",
     "seen = positions.unsqueeze(1) >= torch.arange(len(latents))",
     "seen = positions.unsqueeze(1) > torch.arange(len(latents))",
     "test_attention.py::test_decoding_sequences_together", "a decoding row does not see itself"),
    ("mla-cpu-top-left-mask", "cpu.py",
     "fresh = len(q) == len(k)",
     "fresh = True",
     "test_attention.py::test_every_form_at_every_row_count", "a chunk behind cached keys is masked as if it came first"),
    ("mla-fp8-latents-scale", "reference.py",
     "c_kv = q.view(torch.float8_e4m3fn).float() * s",
     "c_kv = q.view(torch.float8_e4m3fn).float() * s[:, :1]",
     "test_kernel_attention.py::test_wide_latents", "FP8 latents: the first 128 channels' scale for all"),

    # --- the MTP module -----------------------------------------------------------------------------------------------
    ("mtp-concat-order", "model.py",
     "return self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))",
     "return self.eh_proj(torch.cat((self.hnorm(hidden), self.enorm(embedded)), dim=-1))",
     MTP, "the hidden state first, as the report writes it"),
    ("mtp-norms-swapped", "model.py",
     "return self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))",
     "return self.eh_proj(torch.cat((self.hnorm(embedded), self.enorm(hidden)), dim=-1))",
     MTP, "enorm and hnorm change places"),
    ("mtp-before-the-final-norm", "model.py",
     "x = module.combine(self.embed(batch.tokens), hidden)",
     "x = module.combine(self.embed(batch.tokens), hidden / self.norm.weight)",
     MTP, "the hidden state of before the final norm (but for its size, which hnorm takes out)"),
    ("mtp-final-norm-twice", "model.py",
     "x = module.combine(self.embed(batch.tokens), hidden)",
     "x = module.combine(self.embed(batch.tokens), self.norm(hidden))",
     MTP, "the final norm is applied once more"),
    ("mtp-main-norm", "model.py",
     "return module.norm(*module(x, None,",
     "return self.norm(*module(x, None,",
     MTP, "the main model's norm instead of shared_head.norm"),
    ("mtp-cache-layer", "model.py",
     "cache[len(self.layers) + k], cos, sin))",
     "cache[len(self.layers) + k - 1], cos, sin))",
     "test_engine.py::test_drafts_see_what_the_mtp_module_would_see_in_one_pass", "the module's latents overwrite the last layer's"),
    ("mtp-same-token", "engine.py",
     "followers = chunk.job.tokens[start + 1 : chunk.job.n_cached + 1]",
     "followers = chunk.job.tokens[start : chunk.job.n_cached]",
     "test_engine.py::test_drafts_see_what_the_mtp_module_would_see_in_one_pass", "the module gets token t with hidden state t instead of t + 1"),
    ("mtp-next-position", "engine.py",
     "packed.append((followers, start, pages))",
     "packed.append((followers, start + 1, pages))",
     "test_engine.py::test_drafts_see_what_the_mtp_module_would_see_in_one_pass", "the module's positions are shifted by one"),
    ("mtp-second-draft-position", "engine.py",
     "([job.drafts[-1]], ends[job][1] + k - 1, ends[job][2])",
     "([job.drafts[-1]], ends[job][1] + k, ends[job][2])",
     "test_engine.py::test_drafts_follow_the_module_applied_again", "drafts after the first leave out a position"),
    ("mtp-stale-state", "engine.py",
     "states = self._drafted(step, states)",
     "self._drafted(step, states)",
     "test_engine.py::test_drafts_follow_the_module_applied_again", "the second draft goes on from the first one's hidden state"),

    # --- FP8 ----------------------------------------------------------------------------------------------------------
    ("fp8-no-least-scale", "reference.py",
     "s = blocks.abs().amax(dim=-1).clamp(min=1e-4) / largest",
     "s = blocks.abs().amax(dim=-1).clamp(min=1e-12) / largest",
     "test_casts.py::test_reference_act_quant_is_the_formula", "the largest value is not clamped to 1e-4"),
    ("fp8-scale-per-token", "reference.py",
     "s = blocks.abs().amax(dim=-1).clamp(min=1e-4) / largest",
     "s = blocks.abs().amax(dim=(-2, -1), keepdim=True).squeeze(-1).expand(blocks.shape[:-1]).clamp(min=1e-4) / largest",
     "test_kernel.py::test_act_quant", "one scale a token instead of one per 128 channels"),
    ("fp8-saturation", "reference.py",
     "largest = blocks.new_tensor(torch.finfo(dtype).max)",
     "largest = blocks.new_tensor(torch.finfo(dtype).max / 2)",
     "test_casts.py::test_reference_act_quant_is_the_formula", "scales by another largest number than 448: values saturate, or bits lie idle"),
    ("fp8-ue8m0-nearest", "reference.py",
     "bits = (s.view(torch.int32) + 0x007FFFFF) & 0x7F800000",
     "bits = (s.view(torch.int32) + 0x00400000) & 0x7F800000",
     "test_casts.py::test_power_of_two_scales_are_exact", "UE8M0 rounds to the nearest power of two, so that values saturate"),
    ("fp8-ue8m0-by-logarithm", "reference.py",
     "bits = (s.view(torch.int32) + 0x007FFFFF) & 0x7F800000",
     "bits = s.log2().ceil().exp2().view(torch.int32)",
     "test_casts.py::test_power_of_two_scales_are_exact", "UE8M0 by log2 and ceil in float32: off by one next to powers of two"),
    ("fp8-ue8m0-after-division", "reference.py",
     's = round_up_to_power_of_two(s)\n    q = (blocks / s.unsqueeze(-1)).to(dtype)',
     'q, s = (blocks / s.unsqueeze(-1)).to(dtype), round_up_to_power_of_two(s)\n    else:\n        q = (blocks / s.unsqueeze(-1)).to(dtype)',
     "test_casts.py::test_reference_act_quant_is_the_formula", "the data is divided by the scale of before it was rounded"),
    ("fp8-ue8m0-not-reached", "ops.py",
     "return _fp8_gemm(*act_quant(x, w.scale_fmt), w, x.dtype)",
     "return _fp8_gemm(*act_quant(x), w, x.dtype)",
     "test_fused.py::test_linear_takes_its_input_quantised", "scale_fmt does not reach a linear"),
    ("fp8-ue8m0-fused-not-reached", "ops.py",
     'return "ue8m0" if self.scale_fmt == "ue8m0" else "float32"',
     'return "float32"',
     "test_fused.py::test_linear_takes_its_input_quantised test_fused.py::test_only_a_w8a8_weight_wants_quantised_input", "scale_fmt does not reach the fused norm"),
    ("fp8-silently-w8a16", "ops.py",
     'if w.gemm == "fp8":',
     "if False:",
     "test_fused.py::test_linear_takes_its_input_quantised", "--gemm fp8 multiplies plain activations"),
    ("fp8-sum-in-bfloat16", "reference.py",
     "out += partial * (a_s[:, k, None] * _per_row(b_s[:, k], b))",
     "out = (out + partial * (a_s[:, k, None] * _per_row(b_s[:, k], b))).bfloat16().float()",
     "test_kernel.py::test_fp8_gemm[16-576-192]", "products of 128 channels are added up in less than float32"),
    ("fp8-activation-scale-left-out", "reference.py",
     "out += partial * (a_s[:, k, None] * _per_row(b_s[:, k], b))",
     "out += partial * _per_row(b_s[:, k], b)",
     "test_kernel.py::test_fp8_gemm[16-576-192]", "activations' scales are forgotten"),
    ("fp8-scales-transposed", "reference.py",
     "scale = s[..., i : i + 1, :].repeat_interleave(BLOCK, dim=-1)[..., : w.shape[-1]]",
     "scale = s.mT.reshape(s.shape)[..., i : i + 1, :].repeat_interleave(BLOCK, dim=-1)[..., : w.shape[-1]]",
     "test_kernel.py::test_weight_dequant", "block scales are read column by column"),
    ("fp8-scale-rounded", "reference.py",
     "out[..., rows, :] = w[..., rows, :].float() * scale",
     "out[..., rows, :] = w[..., rows, :].to(dtype) * scale.to(dtype)",
     "test_cast.py::test_exact_and_complete", "scales are rounded to bfloat16 before the product"),
    ("fp8-inverse-scale", "weights.py",
     "data = data.float() * scale[down][:, across].to(target.device)",
     "data = data.float() / scale[down][:, across].to(target.device)",
     "test_weights.py::test_dequantised_while_loading", "weight_scale_inv taken for a reciprocal"),
    ("fp8-stacked-blocks", "model.py",
     "align = BLOCK_SIZE if fp8 and self.parts else 1",
     "align = 1",
     "test_model.py::test_where_stacked_projections_begin", "stacked projections share a block, and so a scale"),

    # --- text ---------------------------------------------------------------------------------------------------------
    ("text-two-bos", "tokenizer.py",
     "if self._add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:",
     "if self._add_bos and self.bos_id is not None:",
     "test_tokenizer.py::test_template_file_wins_and_bos_is_added_where_asked", "a second BOS in front of the template's"),
    ("text-no-bos", "tokenizer.py",
     "return ([] if self.bos_id is None else [self.bos_id]) + self._encode_plain(text)",
     "return self._encode_plain(text)",
     "test_tokenizer.py::test_raw_text_never_becomes_a_control_token", "raw completions without BOS"),
    ("text-becomes-control-token", "tokenizer.py",
     'text_only = raw | {"added_tokens": [], "truncation"',
     'text_only = raw | {"truncation"',
     "test_tokenizer.py::test_raw_text_never_becomes_a_control_token", "a user's <｜User｜> becomes the control token"),
    ("text-found-in-messages", "tokenizer.py",
     "if isinstance(text, str) and id(literal) not in looked_for:",
     "if isinstance(text, str):",
     "test_tokenizer.py::test_r1_shape", "what a template looks for in a message is replaced too: earlier thinking stays in the history"),
    ("text-template-blocks", "tokenizer.py",
     "trim_blocks=True, lstrip_blocks=True,",
     "trim_blocks=False, lstrip_blocks=False,",
     "test_tokenizer.py::test_template_tools_of_transformers", "line ends of the template's own blocks get into the prompt"),
    ("text-thinking-hidden", "tokenizer.py",
     "self._hidden -= {i for i in (self.think_open_id, self.think_close_id) if i is not None}",
     "self._hidden |= {i for i in (self.think_open_id, self.think_close_id) if i is not None}",
     "test_tokenizer.py::test_decode_leaves_out_control_tokens_and_keeps_thinking", "<think> is left out of the text"),
    ("text-control-tokens-shown", "tokenizer.py",
     "if token_id in self._hidden or not",
     "if not",
     "test_tokenizer.py::test_decode_leaves_out_control_tokens_and_keeps_thinking", "the end token is shown"),
    ("text-thinking-not-opened", "engine.py",
     'opened = self.opens_thinking or self.text.startswith("<think>")',
     'opened = self.text.startswith("<think>")',
     "test_answers.py::test_reasoning_is_kept_apart", "thinking that the prompt opened is taken for the answer"),
    ("text-half-characters", "tokenizer.py",
     "return self._utf8.decode(self._piece(token_id))",
     'return self._piece(token_id).decode("utf-8", "replace")',
     "test_tokenizer.py::test_every_split_of_a_character_is_held_back", "a character of several tokens is decoded token by token"),
    ("text-end-lost", "tokenizer.py",
     'return self._utf8.decode(b"", final=True)',
     'return ""',
     "test_answers.py::test_length_ends_inside_a_character", "what was held back at the end is never said"),
    ("text-shortest-token", "tokenizer.py",
     "sorted(texts, key=len, reverse=True)",
     "sorted(texts, key=len)",
     "test_tokenizer.py::test_the_longest_control_token_counts", "of two control tokens that begin alike the shorter is found"),
    ("text-one-end-token", "tokenizer.py",
     "self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(eos))",
     "self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(eos))[:1]",
     "test_tokenizer.py::test_special_ids_come_from_every_file", "of a list of end tokens only the first ends an answer"),
    ("text-byte-letters", "tokenizer.py",
     "printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]",
     "printable = [*range(0x21, 0x7F), *range(0xA1, 0x100)]",
     "test_tokenizer.py::test_round_trip_of_all_kinds", "byte letters without the gap at the soft hyphen"),
    ("text-template-html", "tokenizer.py",
     'environment.filters["tojson"] = _tojson',
     "pass",
     "test_tokenizer.py::test_template_tools_of_transformers", "tojson escapes HTML, as jinja's own does"),

    # --- sampling -----------------------------------------------------------------------------------------------------
    ("sampling-top-p-crossing", "sampling.py",
     "((before < top_p * total) | (top_p == 1))",
     "((before + ranked <= top_p * total) | (top_p == 1))",
     CUTS, "top-p leaves out the token that crosses the bound"),
    ("sampling-top-p-of-all", "sampling.py",
     "((before < top_p * total) | (top_p == 1))",
     "((before < top_p) | (top_p == 1))",
     CUTS, "top-p of everything instead of what top-k left"),
    ("sampling-top-k-one-more", "sampling.py",
     "stays = (place < top_k) &",
     "stays = (place <= top_k) &",
     CUTS, "top-k keeps one token more"),
    ("sampling-min-p-absolute", "sampling.py",
     "(ranked >= min_p * ranked[:, :1])",
     "(ranked >= min_p)",
     CUTS, "min-p against 1 instead of the likeliest token"),
    ("sampling-not-renormalised", "sampling.py",
     "return p / p.sum(dim=-1, keepdim=True)",
     "return p",
     CUTS, "after a cut probabilities do not sum to 1"),
    ("sampling-temperature", "sampling.py",
     "p = ((logits.double() - peak) / divisor).softmax(dim=-1)",
     "p = ((logits.double() - peak) * divisor).softmax(dim=-1)",
     "test_sampling.py::test_temperature", "logits are multiplied by the temperature"),
    ("sampling-temperature-zero", "sampling.py",
     "return torch.where(temperature == 0, torch.zeros_like(p).scatter_(-1, best, 1.0), p)",
     "return p",
     "test_sampling.py::test_temperature", "temperature 0 draws as temperature 1 does"),
    ("sampling-tiny-temperature", "sampling.py",
     "p = ((logits.double() - peak) / divisor).softmax(dim=-1)",
     "p = (logits.double() / divisor - peak / divisor).softmax(dim=-1)",
     "test_sampling.py::test_a_tiny_temperature_is_greedy", "a tiny temperature overflows"),
    ("sampling-draw-of-impossible", "sampling.py",
     "torch.searchsorted(cumulative, at, right=True)",
     "torch.searchsorted(cumulative, at, right=False)",
     "test_sampling.py::test_draws_at_the_borders", "noise 0 draws a first token of probability 0"),
    ("sampling-noise-of-use", "sampling.py",
     "counter = np.array([0, position, use, 0], dtype=np.uint64)",
     "counter = np.array([0, position, 0, 0], dtype=np.uint64)",
     NOISE, "a draft and its verdict use the same noise"),
    ("sampling-noise-of-position", "sampling.py",
     "counter = np.array([0, position, use, 0], dtype=np.uint64)",
     "counter = np.array([0, 0, use, 0], dtype=np.uint64)",
     NOISE, "every position of an answer uses the same noise"),
    ("sampling-noise-of-request", "sampling.py",
     "key = np.array([seed, request], dtype=np.uint64)",
     "key = np.array([seed, 0], dtype=np.uint64)",
     NOISE, "all requests use the same noise"),
    ("sampling-large-seeds", "sampling.py",
     "key = np.array([seed, request], dtype=np.uint64)",
     "key = [seed, request]",
     NOISE, "large seeds are merged by float64"),
    ("sampling-noise-of-choice", "engine.py",
     "return self.id + (self.choice << 40)",
     "return self.id",
     "test_answers.py::test_several_answers_to_one_prompt", "the n answers to a prompt are one"),
    ("sampling-residual", "sampling.py",
     "rest[n] = (p[n] - q).clamp(min=0)",
     "rest[n] = p[n]",
     VERIFIED, "a rejected draft is drawn again from p instead of max(p - q, 0)"),
    ("sampling-greedy-residual", "sampling.py",
     "rest[n, x] = 0",
     "pass",
     "test_sampling.py::test_greedy_drafts_are_lossless_for_sampled_answers_too", "a rejected draft may be drawn again"),
    ("sampling-acceptance", "sampling.py",
     "believed[n] = ask.uniform(i, ACCEPT) * (1.0 if q is None else q[x]) < p[n, x]",
     "believed[n] = ask.uniform(i, ACCEPT) < p[n, x]",
     VERIFIED, "a draft is accepted with probability p(x) instead of p(x) / q(x)"),
    ("sampling-always-accepted", "sampling.py",
     "rejected = not (accepted if ask.params.temperature else token == draft)",
     "rejected = draft is None",
     "test_sampling.py::test_greedy_verification", "drafts are not verified"),
    ("sampling-goes-on-after-rejection", "sampling.py",
     "            if rejected:\n                continue\n",
     "",
     "test_sampling.py::test_greedy_verification", "what follows a rejected draft is kept"),
    ("sampling-repetition-penalty", "sampling.py",
     "torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)",
     "values / params.repetition_penalty",
     "test_sampling.py::test_penalties", "the repetition penalty rewards negative logits"),
    ("sampling-penalties-of-prompt", "sampling.py",
     "answer = torch.tensor(list(tokens[n_prompt:]),",
     "answer = torch.tensor(list(tokens),",
     "test_sampling.py::test_penalties", "presence and frequency penalties count the prompt"),
    ("sampling-penalties-of-drafts", "sampling.py",
     "[*self.tokens, *self.draft.tokens[:n_drafts]]",
     "[*self.tokens]",
     "test_sampling.py::test_penalties_count_accepted_drafts", "penalties do not count the drafts before a row"),
    ("sampling-nan", "sampling.py",
     "return logits.amax(dim=-1).isfinite()",
     "return logits[:, 0].isfinite()",
     "test_sampling.py::test_extreme_rows", "NaN in a row goes unnoticed"),
    ("sampling-released-defaults", "sampling.py",
     'if name == "temperature" and released.get("do_sample") is False:',
     "if False:",
     "test_sampling.py::test_released_defaults", "do_sample false in generation_config.json is not read"),

    # --- the cache ----------------------------------------------------------------------------------------------------
    ("cache-hash-without-parent", "cache.py",
     "hashlib.blake2b(before + part.tobytes(), digest_size=16)",
     "hashlib.blake2b(part.tobytes(), digest_size=16)",
     "test_scheduler.py::test_a_page_is_known_by_all_that_is_before_it", "a page is known by its own tokens alone"),
    ("cache-hash-without-lookahead", "cache.py",
     "tokens[at : at + self.page_size + self.lookahead])",
     "tokens[at : at + self.page_size])",
     "test_scheduler.py::test_lookahead_keeps_pages_apart_that_end_alike", "with MTP a page's last latent depends on the next token"),
    ("cache-page-not-counted", "cache.py",
     "self._holders[page] += 1",
     "self._holders[page] = 1",
     RANDOM_USE, "a shared page has one holder"),
    ("cache-found-page-still-idle", "cache.py",
     "self._idle.pop(page, None)",
     "pass",
     RANDOM_USE, "a page that was found again can be given away"),
    ("cache-digest-of-given-page", "cache.py",
     "del self._page_of[self._digest_of.pop(page)]",
     "self._digest_of.pop(page)",
     "test_scheduler.py::test_least_recently_used_pages_go_first", "a page that was given away is still found by its old digest"),
    ("cache-most-recently-used", "cache.py",
     "page, _ = self._idle.popitem(last=False)",
     "page, _ = self._idle.popitem(last=True)",
     "test_scheduler.py::test_least_recently_used_pages_go_first", "the most recently used page goes first"),
    ("cache-beginning-goes-first", "cache.py",
     "for page in reversed(pages):",
     "for page in pages:",
     "test_scheduler.py::test_a_released_beginning_outlives_its_end", "a conversation's first page goes before those that are no use without it"),
    ("cache-full-page-not-known", "cache.py",
     "while (len(out) + 1) * self.page_size + self.lookahead <= len(tokens):",
     "while (len(out) + 1) * self.page_size + self.lookahead < len(tokens):",
     "test_scheduler.py::test_a_second_turn_runs_only_what_is_new", "page boundary: a page that is just full is not known"),
    ("cache-last-token-reused", "scheduler.py",
     "found = self.pool.find(job.digests[: (job.n_known - 1) // self.pool.page_size])",
     "found = self.pool.find(job.digests[: job.n_known // self.pool.page_size])",
     RANDOM_USE, "page boundary: a prompt of known pages alone has no token left to run"),
    ("cache-unfilled-page-known", "scheduler.py",
     "full = job.n_cached // page_size",
     "full = -(-job.n_cached // page_size)",
     RANDOM_USE, "a page that will still be written to is shared"),
    ("cache-rejected-drafts-cached", "scheduler.py",
     "job.n_cached += chunk.n + max(len(tokens) - 1, 0)",
     "job.n_cached += chunk.n + len(chunk.drafts)",
     RANDOM_USE, "latents of rejected drafts count as cached"),
    ("cache-of-failed-request", "scheduler.py",
     "failed = chunk.samples and not tokens",
     "failed = False",
     "test_engine.py::test_nan_fails_its_request_alone[64-2] test_engine.py::test_nan_fails_its_request_alone[64-0]", "others find the NaN that a failed request left"),
    ("cache-prompt-logprobs", "scheduler.py",
     "if self.reuse and not job.whole:",
     "if self.reuse:",
     "test_answers.py::test_logprobs_are_the_models", "prompt log-probabilities of reused pages are never computed"),
    ("cache-gather-one-page-less", "reference.py",
     "used = pages[: -(-length // page)].tolist()",
     "used = pages[: max(1, length // page)].tolist()",
     "test_attention.py::test_against_float64", "page boundary: the last page is not read"),

    # --- the scheduler ------------------------------------------------------------------------------------------------
    ("scheduler-oldest-preempted", "scheduler.py",
     "youngest = self.running.pop()",
     "youngest = self.running.pop(0)",
     "test_scheduler.py::test_the_youngest_is_preempted_and_resumed", "the oldest request gives its pages up"),
    ("scheduler-preempted-goes-last", "scheduler.py",
     "self.waiting.appendleft(youngest)",
     "self.waiting.append(youngest)",
     "test_scheduler.py::test_the_youngest_is_preempted_and_resumed", "a preempted request queues behind newcomers"),
    ("scheduler-budget", "scheduler.py",
     "budget -= n + len(drafts)",
     "budget -= n",
     "test_scheduler.py::test_drafts_take_their_part_of_the_budget", "drafts behind a prompt do not count"),
    ("scheduler-budget-of-decodes", "scheduler.py",
     "budget -= 1 + len(drafts)",
     "budget -= 1",
     RANDOM_USE, "drafts of decoding requests do not count"),
    ("scheduler-one-too-many", "scheduler.py",
     "while self.waiting and len(self.running) < self.max_num_seqs:",
     "while self.waiting and len(self.running) <= self.max_num_seqs:",
     RANDOM_USE, "one request more than max_num_seqs"),
    ("scheduler-drafts-past-the-end", "scheduler.py",
     "job.drafts[: max(0, job.capacity - job.n_known - 1)]",
     "job.drafts[: max(0, job.capacity - job.n_known)]",
     RANDOM_USE, "drafts run past the most tokens a request may have"),
    ("scheduler-no-room-for-drafts", "scheduler.py",
     "while (missing := self.pages_for(n_tokens + self.n_drafts) - len(job.pages)) > 0:",
     "while (missing := self.pages_for(n_tokens) - len(job.pages)) > 0:",
     RANDOM_USE, "page boundary: drafts are written past the last page"),
    ("scheduler-found-pages-kept", "scheduler.py",
     "            self.pool.release(found)\n            return False",
     "            return False",
     RANDOM_USE, "a request that is not admitted keeps the pages it found"),

    # --- the engine ---------------------------------------------------------------------------------------------------
    ("engine-stop-text-shown", "engine.py",
     "keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)",
     "keep = 0",
     "test_answers.py::test_stop_texts", "the beginning of a stop text is shown before it is complete"),
    ("engine-stop-text-first-named", "engine.py",
     "found = min((at for at in",
     "found = max((at for at in",
     "test_answers.py::test_stop_texts", "of two stop texts the one that comes later counts"),
    ("engine-after-the-end", "engine.py",
     "            if finish:\n                return tokens[: i + 1], finish\n        return tokens, None",
     "        return tokens, finish",
     "test_answers.py::test_the_stream_adds_up", "drafts accepted behind the end token are said"),
    ("engine-length", "engine.py",
     "elif job.n_known + i + 1 >= job.capacity:",
     "elif job.n_known + i + 1 > job.capacity:",
     "test_engine.py::test_the_context_limit_ends_an_answer", "one token more than the context holds"),
    ("engine-row-of-the-wrong-token", "engine.py",
     "spans.append((chunk, range(at + chunk.n - 1, at + len(chunk.tokens))))",
     "spans.append((chunk, range(at, at + len(chunk.drafts) + 1)))",
     "test_engine.py::test_greedy_is_transformers_greedy", "the next token is sampled from a chunk's first row"),
    ("engine-acceptance-overstated", "engine.py",
     "self.stats.accepted[place] += place + 1 < len(tokens)",
     "self.stats.accepted[place] += place < len(tokens)",
     "test_engine.py::test_an_adversarial_drafter_is_never_believed", "a rejected draft is counted as accepted"),
    ("engine-draft-of-earlier-step", "engine.py",
     "            request.draft = Draft()\n",
     "",
     "test_engine.py::test_greedy_speculation_is_lossless[2] test_engine.py::test_a_perfect_drafter_is_always_believed[4]", "drafts of an earlier step are verified again"),
    ("engine-mtp-rows", "engine.py",
     "rows += range(at, at + len(followers))",
     "rows += range(at + len(tokens) - len(followers), at + len(tokens))",
     "test_engine.py::test_drafts_see_what_the_mtp_module_would_see_in_one_pass", "after a rejection the module gets hidden states of rejected drafts"),
    ("engine-padding-read", "graphs.py",
     "slots += [nowhere] * fill",
     "slots += [held[0] * PAGE_SIZE if held else nowhere] * fill",
     "test_engine.py::test_recorded_steps_leave_other_pages_alone", "what fills a recorded batch up is written over real latents"),
    ("engine-rows-in-blocks", "ops.py",
     "if n % ROW_BLOCK:\n        inputs",
     "if False:\n        inputs",
     "test_engine.py::test_batch_invariant_mode_is_bitwise[dtype0]", "batch-invariant mode: the last rows' product has another shape"),
    ("engine-slot-of-another-page", "model.py",
     "slots += [pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(start, start + len(new))]",
     "slots += [pages[start // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(start, start + len(new))]",
     "test_model.py::test_a_mixed_batch_is_each_alone", "page boundary: a chunk that crosses it wraps round in its first page"),

    # --- ranks --------------------------------------------------------------------------------------------------------
    ("ranks-attention-not-reduced", "model.py",
     "return self.tp.all_reduce(self.wo(o.flatten(1)))",
     "return self.wo(o.flatten(1))",
     f"{SHARDS}[2-v3-whole]", "the attention's all-reduce is missing"),
    ("ranks-ffn-not-reduced", "model.py",
     "return x, self.tp.all_reduce(self.ffn(y))",
     "return x, self.ffn(y)",
     f"{SHARDS}[2-v3-whole]", "the feed-forward's all-reduce is missing"),
    ("ranks-reduced-twice", "model.py",
     "return x, self.tp.all_reduce(self.ffn(y))",
     "return x, self.tp.all_reduce(self.tp.all_reduce(self.ffn(y)))",
     f"{SHARDS}[2-v3-whole]", "the feed-forward is summed over the ranks twice"),
    ("ranks-residual-reduced", "model.py",
     "return x, self.tp.all_reduce(self.ffn(y))",
     "return torch.zeros_like(x), self.tp.all_reduce(x + self.ffn(y))",
     f"{SHARDS}[2-v3-whole]", "every rank adds the residual before the sum"),
    ("ranks-shared-on-each", "model.py",
     'self.shared_experts = MLP(args.dim, width, num, tp, "the shared experts\' width")',
     'self.shared_experts = MLP(args.dim, width, num, SOLO, "the shared experts\' width")',
     f"{SHARDS}[2-v3-whole]", "every rank holds, and adds, the whole shared experts"),
    ("ranks-shared-on-first", "model.py",
     "return self.experts(x, *self.gate(x.x if isinstance(x, Quantised) else x), shared)",
     "return self.experts(x, *self.gate(x.x if isinstance(x, Quantised) else x), shared if self.experts.first == 0 else None)",
     f"{SHARDS}[2-v3-whole]", "only the first rank adds its part of the shared experts"),
    ("ranks-embedding-unmasked", "model.py",
     "return self.tp.all_reduce(x * mine.unsqueeze(-1)) if self.tp.size > 1 else x",
     "return self.tp.all_reduce(x) if self.tp.size > 1 else x",
     f"{SHARDS}[2-v3-whole]", "a token of another rank adds this one's first row"),
    ("ranks-first-expert", "model.py",
     "self.first = tp.rank * n",
     "self.first = 0",
     f"{SHARDS}[2-v3-whole]", "every rank numbers its experts from 0"),
    ("ranks-expert-files", "weights.py",
     "return range(group.rank * each, (group.rank + 1) * each)",
     "return range(each)",
     f"{SHARDS}[2-v3-whole]", "every rank loads the first experts"),
    ("ranks-row-for-column", "weights.py",
     'Row("attn.wo.weight", "self_attn.o_proj.weight", ("H", "N dv"), 1, True),',
     'Row("attn.wo.weight", "self_attn.o_proj.weight", ("H", "N dv"), 0, True),',
     f"{SHARDS}[2-v3-whole]", "o_proj is cut by rows instead of columns"),
    ("ranks-same-slice", "weights.py",
     "(group.rank * (n // p), (group.rank + 1) * (n // p)) if p > 1 else (0, n)",
     "(0, n // p) if p > 1 else (0, n)",
     f"{SHARDS}[2-v3-whole]", "every rank loads the first slice"),
    ("ranks-local-experts", "reference.py",
     "start = int((flat < first).sum())",
     "start = 0",
     f"{SHARDS}[2-v3-whole]", "a rank's experts get the tokens of the first rank's"),
    ("ranks-unordered-sums", "parallel.py",
     "if not self.ordered or self.size == 2:",
     "if True:",
     "test_parallel.py::test_ordered_sums_do_not_depend_on_their_size", "batch-invariant mode: sums over four ranks in the library's order"),

    # --- loading ------------------------------------------------------------------------------------------------------
    ("weights-scale-of-shard-columns", "weights.py",
     "across = torch.arange(start, stop) // BLOCK_SIZE",
     "across = torch.arange(stop - start) // BLOCK_SIZE",
     "test_weights.py::test_dequantised_slices_need_no_whole_blocks", "a slice of columns takes scales from the first block on"),
    ("weights-scale-of-shard-rows", "weights.py",
     "down = torch.arange(row, row + len(data)) // BLOCK_SIZE",
     "down = torch.arange(row - first, row - first + len(data)) // BLOCK_SIZE",
     "test_weights.py::test_dequantised_slices_need_no_whole_blocks", "a slice of rows takes scales from the first block on"),
    ("weights-rounded-silently", "weights.py",
     "if not (exact or widened or asked or piece.scale):",
     "if False:",
     "test_weights.py::test_nothing_is_rounded_unnoticed", "the router's bias is rounded as it is loaded"),
    ("weights-negative-scales", "weights.py",
     "bad = (~(scale.isfinite() & (scale > 0))).nonzero().tolist()",
     "bad = (~scale.isfinite()).nonzero().tolist()",
     "test_weights.py::test_scales_that_are_no_scales", "scales that are zero or negative are taken"),
    ("weights-flipped-bits", "tensorfile.py",
     "if entry.crc is not None and last - first == entry.rows and crc != entry.crc:",
     "if False:",
     "test_weights.py::test_a_flipped_bit_in_any_tensor_is_found", "checksums are not compared"),
    ("weights-lost-tensors", "weights.py",
     "if unused := sorted(entries.keys() - used - optional):",
     "if unused := []:",
     "test_weights.py::test_every_parameter_is_filled_or_nothing_is", "tensors that the model has no place for are passed over"),
    ("weights-enorm-and-hnorm", "weights.py",
     'Row("enorm.weight", "enorm.weight", ("H",)),\n    Row("hnorm.weight", "hnorm.weight", ("H",)),',
     'Row("enorm.weight", "hnorm.weight", ("H",)),\n    Row("hnorm.weight", "enorm.weight", ("H",)),',
     MTP, "the table has enorm and hnorm the wrong way round"),
    ("weights-gate-and-up", "weights.py",
     'Row("w1.weight", "gate_proj.weight", ("M", "H"), 0, True),\n    Row("w2.weight", "down_proj.weight", ("H", "M"), 1, True),\n    Row("w3.weight", "up_proj.weight",',
     'Row("w1.weight", "up_proj.weight", ("M", "H"), 0, True),\n    Row("w2.weight", "down_proj.weight", ("H", "M"), 1, True),\n    Row("w3.weight", "gate_proj.weight",',
     f"{LOGITS}[v3]", "the table has gate and up of the experts the wrong way round"),

    # --- conversion ---------------------------------------------------------------------------------------------------
    ("convert-columns-of-first-rank", "convert.py",
     "start, stop = (rest[0][0] * unit, rest[0][1] * unit) if rest else (0, unit)",
     "start, stop = (0, (rest[0][1] - rest[0][0]) * unit) if rest else (0, unit)",
     "test_convert.py::test_windows_of_any_size", "every rank gets the first columns"),
    ("convert-off-by-one", "convert.py",
     "self.writer.write(self.name, window[low - row : high - row, start:stop], (low - first) * (stop - start))",
     "self.writer.write(self.name, window[max(low - row - 1, 0) : high - row - (low > row), start:stop], (low - first) * (stop - start))",
     "test_convert.py::test_windows_of_any_size", "a rank's rows begin one too early"),
    ("convert-place-in-file", "convert.py",
     "(low - first) * (stop - start))",
     "(low - row) * (stop - start))",
     "test_convert.py::test_windows_of_any_size", "a later window overwrites the first"),
    ("convert-index-before-files", "convert.py",
     'index | {"pending": True, "obsolete"',
     'index | {"pending": False, "obsolete"',
     "test_convert.py::test_killed_at_any_moment_leaves_nothing_that_loads[8]", "the index says that the files have their names before they do"),
    ("convert-not-durable", "tensorfile.py",
     "            sync(self.fd)\n            if hasattr(os, \"posix_fadvise\")",
     "            if hasattr(os, \"posix_fadvise\")",
     "test_convert.py::test_files_are_durable_before_they_take_their_names", "a file takes its name before its bytes are on the disk"),
    ("cast-scales-of-first-window", "fp8_cast_bf16.py",
     "s = scale[row // BLOCK_SIZE :][:",
     "s = scale[:",
     "test_cast.py::test_exact_and_complete", "every window of a weight takes the first rows' scales"),
    ("cast-config-still-fp8", "fp8_cast_bf16.py",
     'del config["quantization_config"]',
     "pass",
     "test_cast.py::test_exact_and_complete", "config.json of the BF16 checkpoint still says FP8"),
    ("cast-scales-kept", "fp8_cast_bf16.py",
     "if not name.endswith(SCALE):",
     "if True:",
     "test_cast.py::test_exact_and_complete", "the BF16 checkpoint still lists its scales"),

    # --- kernels, in Triton's interpreter -----------------------------------------------------------------------------
    ("kernel-fnuz-scale", "kernel.py",
     "s = tl.div_rn(amax.to(tl.float32, bitcast=True), 240.0 if FNUZ else 448.0)",
     "s = tl.div_rn(amax.to(tl.float32, bitcast=True), 448.0)",
     "test_casts.py::test_act_quant_of_every_bf16", "float8_e4m3fnuz saturates: scaled by 448, not 240"),
    ("kernel-saturation", "kernel.py",
     "code = tl.minimum(code, 0x7F if FNUZ else 0x7E)",
     "code = tl.minimum(code, 0x7F)",
     "test_casts.py::test_rounding_is_torchs_and_saturates", "numbers beyond 448 become NaN"),
    ("kernel-ties", "kernel.py",
     "((magnitude + 0x0007FFFF + ((magnitude >> 20) & 1)) >> 20)",
     "((magnitude + 0x00080000) >> 20)",
     "test_casts.py::test_rounding_is_to_nearest_with_ties_to_even", "e4m3 ties are rounded up"),
    ("kernel-subnormals", "kernel.py",
     "code = tl.where(magnitude < 0x3C800000, subnormal, normal)",
     "code = tl.where(magnitude < 0x3C800000, 0, normal)",
     "test_casts.py::test_rounding_is_torchs_and_saturates", "e4m3 subnormals become zero"),
    ("kernel-ragged-channels", "kernel.py",
     "inside = (k < channels - i * SCALE_BLOCK)[None, :]",
     "inside = (k < channels)[None, :]",
     "test_kernel.py::test_fp8_gemm[16-576-192]", "a last half block reads the next row's channels"),
    ("kernel-scale-row", "kernel.py",
     "w_s_ptr += (pid_n * BLOCK_N // SCALE_BLOCK) * k_blocks",
     "w_s_ptr += pid_n * k_blocks",
     "test_kernel.py::test_fp8_gemm[16-576-192]", "tiles narrower than 128 take other rows' scales"),
    ("kernel-one-scale", "kernel.py",
     "scale = tl.load(w_s_ptr + i)",
     "scale = tl.load(w_s_ptr)",
     "test_kernel.py::test_w8a16_gemm[16-576-192]", "the first 128 channels' scale for all"),
    ("kernel-split-scale", "kernel.py",
     "        w_s_ptr += first\n",
     "",
     "test_kernel.py::test_split_k", "a later part of K takes the first part's scales"),
    ("kernel-persistent-scales", "kernel.py",
     "scale = next_scale",
     "pass",
     "test_kernel.py::test_persistent", "specialised warps: no scales but the first are used"),
    ("kernel-dequant-scale", "kernel.py",
     "s_row = expert * tl.cdiv(N, SCALE_BLOCK) + tl.program_id(1) * ROWS // SCALE_BLOCK",
     "s_row = expert * (N // SCALE_BLOCK) + tl.program_id(1) * ROWS // SCALE_BLOCK",
     "test_kernel.py::test_weight_dequant", "ragged experts' scales are counted in whole blocks"),
    ("kernel-norm-mean", "kernel_fused.py",
     "tl.sum(tl.sum(x * x, axis=2), axis=1), H.to(tl.float32))",
     "tl.sum(tl.sum(x * x, axis=2), axis=1), x.shape[1] * x.shape[2] * 1.0 + 0 * H.to(tl.float32))",
     "test_kernel_fused.py::test_norm_is_the_reference", "the mean square is taken over the filling too"),
    ("kernel-padding-slot", "kernel_fused.py",
     "if slot >= 0:",
     "if slot >= -1:",
     "test_kernel_fused.py::test_latent_write_of_nothing_and_of_padding", "padding's latents are written in front of the pool"),
    ("kernel-silu", "kernel_fused.py",
     "tl.div_rn(gate, 1.0 + tl.exp(-gate)) * value",
     "tl.div_rn(value, 1.0 + tl.exp(-value)) * gate",
     "test_kernel_fused.py::test_silu_mul", "silu is applied to up instead of gate"),
    ("kernel-router-ties", "kernel_moe.py",
     "beaten = (there > here) | ((there == here) & earlier)",
     "beaten = there > here",
     "test_kernel_moe.py::test_router_takes_the_first_of_equals", "groups that tie are all kept"),
    ("kernel-router-bias", "kernel_moe.py",
     "weight = tl.sum(tl.where(mine, scores, 0.0), axis=1)",
     "weight = tl.sum(tl.where(mine, choice, 0.0), axis=1)",
     "test_kernel_moe.py::test_router", "the bias is added to the experts' weights"),
    ("kernel-sort-tiles", "kernel_moe.py",
     "tile = tl.sum(tl.where(bins < expert, needed, 0))",
     "tile = tl.sum(tl.where(bins < expert, counts, 0)) // block_m",
     "test_kernel_moe.py::test_sort", "tiles that are not full are not counted"),
    ("kernel-grouped-token", "kernel_moe.py",
     "x_row = a // SHARE",
     "x_row = a",
     "test_kernel_moe.py::test_every_grouped_tile", "an assignment's number is taken for its token's"),
    ("kernel-combine-others", "kernel_moe.py",
     "here = (local >= 0) & (local < n_local)",
     "here = local >= 0",
     "test_kernel_moe.py::test_combine", "rows of experts of later ranks are added"),
    ("kernel-decode-mask", "kernel_attention.py",
     "seen = tl.expand_dims(key, 1 - axis) <= tl.expand_dims(position, axis)",
     "seen = tl.expand_dims(key, 1 - axis) < high + 0 * tl.expand_dims(position, axis)",
     "test_kernel_attention.py::test_every_decode_tile", "a draft's row sees the drafts behind it"),
    ("kernel-decode-base", "kernel_attention.py",
     "batch.pages.stride(0), first, last, split_keys, at_once * n_heads, scale * LOG2_E,",
     "batch.pages.stride(0), first, last, split_keys, at_once * n_heads, scale,",
     "test_kernel_attention.py::test_every_decode_tile", "powers of two in place of e"),
    ("kernel-combine-weights", "kernel_attention.py",
     "weight = tl.exp2(tl.load(lse_ptr + place) - peak)",
     "weight = tl.exp2(tl.load(lse_ptr + place) - peak) * 0 + 1.0",
     "test_kernel_attention.py::test_splits_agree", "splits of the keys count alike"),
    ("kernel-prefill-diagonal", "kernel_attention.py",
     "middle = low + tl.maximum(seen_by_all - low, 0) // KEYS * KEYS",
     "middle = low + tl.cdiv(tl.maximum(seen_by_all - low, 0), KEYS) * KEYS",
     "test_kernel_attention.py::test_every_prefill_tile", "the tile on the diagonal is not masked"),
    ("kernel-prefill-slabs", "kernel_attention.py",
     "known = token < tl.where(low > 0, stop, 0)",
     "known = token < 0",
     "test_kernel_attention.py::test_prefill_in_slabs", "a slab forgets the slabs before it"),

    # --- configs ------------------------------------------------------------------------------------------------------
    ("config-v2-normalised", "config.py",
     'norm_topk_prob=raw.get("norm_topk_prob", not v2),',
     'norm_topk_prob=raw.get("norm_topk_prob", True),',
     "test_config.py::test_what_a_config_leaves_out", "V2's weights are normalised where the config does not say"),
    ("config-unknown-scores", "config.py",
     'self._choice("score_func", SCORE_FUNCS)',
     "pass",
     "test_config.py::test_refused_by_name", "an unknown scoring_func is taken for one of the known"),
    ("config-upstream-router", "config.py",
     'grouped = "group_limited_greedy" if facts["n_expert_groups"] > 1 else "greedy"',
     'grouped = "greedy"',
     "test_config.py::test_upstream_json_derives_what_it_lacks", "upstream's V2 config loses its groups"),
    ("config-upstream-yarn", "config.py",
     'facts.setdefault("rope_factor", 40.0)',
     'facts.setdefault("rope_factor", 1.0)',
     "test_config.py::test_upstream_json_derives_what_it_lacks", "upstream's configs have no YaRN"),
    ("config-contradiction", "config.py",
     "if getattr(given, name) != getattr(checkpoint, name)",
     "if False",
     "test_config.py::test_a_config_that_contradicts_the_checkpoint_names_the_fields", "--config may contradict the checkpoint"),
)]  # fmt: skip


class Watch:
    """A plugin that notes the first test to fail, and that nothing of the project came from anywhere but the copy."""

    def __init__(self, root: Path):
        self.root, self.first = root, ("", "")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.first[0]:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.first = report.nodeid.removeprefix("tests/"), crash.message.partition("\n")[0] if crash else ""

    def pytest_sessionfinish(self) -> None:
        for file in (self.root / "inference").glob("*.py"):
            module = sys.modules.get(file.stem)
            assert module is None or Path(module.__file__ or "") == file, f"{module} is not the copy's"


def in_copy(root: Path, mutant: Mutant | None, tests: Sequence[str]) -> None:
    """Makes a copy of the source tree, with the mutant's bug, and runs the tests in it. What came of it is left in
    outcome.json; never returns."""
    began, said = time.monotonic(), ("broken", "", "")
    log = os.open(root / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        for path in ROOT.iterdir():
            if path.name in COPIED:
                shutil.copytree(path, root / path.name, symlinks=True)
            elif not path.name.startswith("."):
                (root / path.name).symlink_to(path)
        if mutant:
            file = root / "inference" / mutant.file
            file.write_text(mutant.apply(file.read_text()))
            for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
                compiled.unlink()
        import hypothesis
        import pytest

        hypothesis.settings.register_profile("once", phases=[hypothesis.Phase.generate], database=None)  # no shrinking
        hypothesis.settings.load_profile("once")
        os.chdir(root)
        sys.path[:] = [p for p in sys.path if Path(p).resolve() != ROOT / "tests"]
        watch = Watch(root)
        options = "-x -q -n 0 -p no:cacheprovider --timeout 100 --hypothesis-seed 0".split()
        status = pytest.main(
            [*options, "--rootdir", str(root), "-c", str(root / "pyproject.toml"), *(f"tests/{t}" for t in tests)],
            plugins=[watch],
        )
        said = {0: ("survived", "", ""), 1: ("killed", *watch.first)}.get(int(status), said)
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", flush=True)
    finally:
        (root / "outcome.json").write_text(json.dumps([*said, time.monotonic() - began]))
        os._exit(0)


def run(mutants: Sequence[Mutant], jobs: int) -> Iterator[Outcome]:
    """The controls, one for each file of tests, and every mutant, as they come to an end."""
    files: dict[str, set[str]] = {}
    for test in (test for m in mutants for test in m.tests.split()):
        files.setdefault(test.partition("::")[0], set()).add(test)
    waiting: list[tuple[str, Mutant | None, list[str]]] = [(f"{CONTROL}{f}", None, sorted(t)) for f, t in files.items()]
    for mutant in mutants:
        try:
            mutant.apply((ROOT / "inference" / mutant.file).read_text())
            waiting.append((mutant.name, mutant, mutant.tests.split()))
        except ValueError as e:
            yield Outcome(mutant.name, "stale", "", "", 0.0, str(e))
    running: dict[int, tuple[str, Path]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, mutant, tests = waiting.pop(0)
                root = Path(folder).resolve() / name
                root.mkdir()
                if (pid := os.fork()) == 0:
                    in_copy(root, mutant, tests)
                running[pid] = name, root
            name, root = running.pop(os.wait()[0])
            left = root / "outcome.json"
            came_of_it = json.loads(left.read_text()) if left.exists() else ("broken", "", "", 0.0)
            yield Outcome(name, *came_of_it, (root / "log").read_text(errors="replace"))
            shutil.rmtree(root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants by name, or by how their names begin")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (default: 2)")
    parser.add_argument("--json", metavar="FILE", help="where the outcomes go, with date and machine")
    options = parser.parse_args()
    wanted = [m for m in MUTANTS if not options.only or any(m.name.startswith(name) for name in options.only)]
    if not wanted:
        parser.error("no such mutant")

    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    for name in LIBRARIES:
        importlib.import_module(name)
    began, found, bugs = time.monotonic(), [], {m.name: (m.file, m.bug) for m in wanted}
    for outcome in run(wanted, options.jobs):
        right = outcome.outcome == ("survived" if outcome.name.startswith(CONTROL) else "killed")
        found.append((outcome, right))
        print(f"{outcome.outcome:9}{outcome.name:32}{outcome.seconds:6.1f} s  {outcome.killer}", flush=True)
        if not right:
            print("    " + "\n    ".join(outcome.log.splitlines()[-40:]), flush=True)
    seconds, killed = time.monotonic() - began, sum(o.name in bugs and o.outcome == "killed" for o, _ in found)
    print(f"{killed} of {len(wanted)} mutants killed in {seconds:.0f} s")
    if options.json:
        rows = {
            o.name: {"file": bugs[o.name][0], "bug": bugs[o.name][1], "outcome": o.outcome, "killer": o.killer,
                     "error": o.error, "seconds": round(o.seconds, 1)}
            for o, _ in found if o.name in bugs
        }  # fmt: skip
        sys.path.append(str(ROOT / "benchmarks"))
        report = importlib.import_module("report")
        results = {"killed": killed, "of": len(wanted), "seconds": round(seconds, 1), "jobs": options.jobs}
        report.save(options.json, results | {"mutants": {m.name: rows[m.name] for m in wanted}})
    return int(not all(right for _, right in found))


if __name__ == "__main__":
    sys.exit(main())
