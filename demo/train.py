"""Trains the demo, a tiny DeepSeek-V3, on two CPU cores in about two hours, and writes it in the released layout.

    python demo/train.py --work build/demo-train --minutes 110        # train; the same command again resumes
    python demo/train.py --work build/demo-train --export demo/checkpoint

The network is transformers' own `DeepseekV3ForCausalLM` with its `MtpLayer`, so the weights come from an
implementation that is not ours. Parameters live twice: float32 masters, which the optimisers move, and the bfloat16
copies that compute. In the last part of the training the copies are rounded to what the FP8 checkpoint can say, so
exporting loses nothing that the network has not already learnt to do without.

Hidden matrices are moved by Muon (momentum, then the nearest orthogonal matrix by Newton-Schulz), everything else by
Adam. Experts are balanced without an auxiliary loss, as in the technical report (section 2.1.2): after each step an
expert's selection bias goes up if it had too few tokens and down if it had too many.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import MtpModel

import make_tokenizer
from evaluate import TransformersEngine, evaluate
from export import CONFIG, export, fake_quantize, is_fp8
from tasks import EOS, Conversation, Questions, render

SEED = 1
STATE = "state.safetensors"  # in the work folder
WORKERS, TOKENS = 2, 2048  # a step's gradient comes from this many rows of this many tokens, one thread each
LONG_TOKENS = 2400  # of a row with only long conversations
FUSED_FROM = 600  # segments longer than this use fused attention
SLICE = 128  # experts' slices of tokens have lengths that are multiples of this
PROMPT_WEIGHT = 0.03  # prompt tokens are mostly random; the reply's tokens weigh 1
PROMPT_SHARE = 0.1  # a prompt's whole weight is at most this share of its reply's
MTP_WEIGHT, MTP_FROM = 0.3, 0.6  # the MTP module learns on half of the steps at first, on all after this fraction
MUON_LR, ADAM_LR, EMBEDDING_LR = 0.012, 2e-3, 0.01
WARM_UP_STEPS = 100
DECAY_FROM = 0.35  # fraction of the time after which the learning rates fall linearly
FP8_FROM = 0.75  # fraction of the time after which the copies are rounded to FP8
BALANCE_SPEED = 2e-3

# From which fraction of the time on: how the kinds are mixed, and every how many steps all conversations are long.
# Finding and copying facts has to be learnt first; when it is, arithmetic and sorting need the rest of the time.
PLAN: tuple[tuple[float, dict[str, int], int], ...] = (
    (0.0, {
        "addition": 10, "subtraction": 12, "spelling": 4, "reversing": 7, "sorting": 16, "counting": 7, "lookup": 12,
        "several_codes": 18, "repeating": 6, "remembering": 2, "turns": 6, "follow_up": 10,
    }, 6),
    (0.67, {
        "addition": 16, "subtraction": 20, "spelling": 6, "reversing": 6, "sorting": 20, "counting": 9, "lookup": 6,
        "several_codes": 8, "remembering": 2, "turns": 6, "follow_up": 6,
    }, 10),
    (0.78, {
        "addition": 13, "subtraction": 18, "spelling": 5, "reversing": 6, "sorting": 30, "counting": 9, "lookup": 10,
        "several_codes": 10, "remembering": 2, "turns": 6, "follow_up": 7,
    }, 5),
    (0.86, {
        "addition": 9, "subtraction": 11, "spelling": 4, "reversing": 5, "sorting": 15, "close_sorting": 45,
        "counting": 6, "lookup": 6, "several_codes": 6, "remembering": 1, "turns": 5, "follow_up": 4,
    }, 6),
)  # fmt: skip
LONG_MIX = {"long_lookup": 4, "long_several": 6}


# -- the network ---------------------------------------------------------------------------------------------------


def ragged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention inside each segment of one packed row, or masked attention when no `lengths` are given.

    query, key: (1, heads, tokens, 128); value: (1, heads, tokens, 64). Going segment by segment skips all that a
    block-diagonal mask would only hide.
    """
    scale, lengths = options["scaling"], options.get("lengths")
    if lengths is None:
        causal = attention_mask is None and query.shape[2] > 1
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, is_causal=causal, scale=scale)
    else:
        parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        out = torch.cat([causal_attention(q, k, v, scale) for q, k, v in parts], dim=2)
    return out.transpose(1, 2), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of one segment: written out where that is cheaper in bfloat16 (up to four times, measured), else fused.

    The CPU's fused attention wants values as wide as keys, so they are padded for it.
    """
    length, width = query.shape[2], value.shape[-1]
    if length > FUSED_FROM:
        value = F.pad(value, (0, query.shape[-1] - width))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)[..., :width]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (query @ key.mT * scale).masked_fill(later, -torch.inf)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value


def split_experts(self: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The routed experts' sum: tokens sorted by expert, one slice of them per expert, rounded up in length.

    hidden: (tokens, hidden size); chosen, weights: (tokens, top k). Splitting and unbinding, whose gradients are
    plain concatenations, makes a backward pass much cheaper than indexing one expert after the other; few different
    lengths spare the matrix library from preparing a new kernel for each.
    """
    top_k = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=self.num_experts)
    padded = (counts + SLICE - 1) // SLICE * SLICE
    # Where each sorted choice lies once every expert's slice is rounded up.
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    place = torch.arange(len(order)) + shift[chosen.flatten()[order]]
    source = torch.zeros(int(padded.sum()), dtype=torch.long)
    source[place] = order // top_k
    parts = []
    inputs = hidden[source].split(padded.tolist())
    for x, gate_up, down in zip(inputs, self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True):
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        parts.append(F.linear(self.act_fn(gate) * up, down))
    back = torch.empty_like(order)
    back[order] = place
    made = torch.cat(parts)[back].view(-1, top_k, hidden.shape[1])
    return (made * weights.to(made.dtype)[..., None]).sum(1)


AttentionInterface.register("ragged", ragged_attention)
AttentionMaskInterface.register("ragged", sdpa_mask)
ExpertsInterface.register("split", split_experts)


def build_model() -> tuple[DeepseekV3ForCausalLM, MtpModel]:
    """The main model and its MTP module (embedding and head shared) in bfloat16, routers' biases in float32."""
    config = DeepseekV3Config(**CONFIG)
    config._attn_implementation = "ragged"
    config._experts_implementation = "split"
    main = DeepseekV3ForCausalLM(config)
    mtp = MtpModel(main, 1)
    for model in (main, mtp):
        initialize(model)
        model.to(torch.bfloat16)
        for router in routers(model):
            router.e_score_correction_bias = router.e_score_correction_bias.float()
    main.model.embed_tokens.float()  # many tokens add to one row's gradient: bfloat16 would lose most of them
    return main, mtp


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Starting values, by fan-in; transformers leaves the experts and router of its MTP layer at zero.

    Embeddings start at 1, well above what a layer adds at first: a stream in which the layers drown the token (0.02
    is the usual start, and Muon's updates are large) did not learn to copy in 350 steps. The head starts as the
    embedding, much smaller: copying a token is then one linear map for all tokens, seldom ones included.
    """
    parameters = dict(model.named_parameters())
    for name, value in parameters.items():
        if value.dim() < 2:
            continue
        if "embed_tokens" in name:
            value.normal_(std=1.0)
        elif "lm_head" in name or "shared_head" in name:
            (embedding,) = (other for key, other in parameters.items() if "embed_tokens" in key)
            value.copy_(0.05 * embedding)
        elif "mlp.gate." in name:
            value.normal_(std=0.02)
        else:
            adds_to_stream = "o_proj" in name or "down_proj" in name
            value.normal_(std=(0.3 if adds_to_stream else 1.0) * value.shape[-1] ** -0.5)


def routers(model: nn.Module) -> list[Any]:
    """The routers of a model, first layer first."""
    return [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]


# -- data ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Conversations one after the other in a single packed row; tensors are (1, tokens)."""

    tokens: Tensor
    positions: Tensor  # from 0 in each conversation
    weights: Tensor  # how much predicting this token counts; 0 for a conversation's first token
    lengths: list[int]


class Packer:
    """Turns a stream of questions into packed rows."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer = tokenizer
        self.questions = Questions(seed, held_out=False)

    def encode(self, conversation: Conversation) -> tuple[list[int], int]:
        """The tokens of a conversation and how many of them are prompt."""
        thinking = self.questions.rng.random() < 0.7
        prompt = self.tokenizer.encode(render(conversation.messages(thinking)), add_special_tokens=False).ids
        reply = self.tokenizer.encode(conversation.last.reply + EOS, add_special_tokens=False).ids
        return prompt + reply, len(prompt)

    def batch(self, step: int, progress: float) -> Batch:
        """The next row of a step: as many conversations as fit, each of a kind drawn by the mix."""
        _, mix, long_every = max((p for p in PLAN if p[0] <= progress), key=lambda p: p[0])
        long, rng = step % long_every == 0, self.questions.rng
        mix, room = (LONG_MIX, LONG_TOKENS) if long else (mix, TOKENS)
        tokens: list[int] = []
        positions: list[int] = []
        weights: list[float] = []
        lengths: list[int] = []
        while True:
            kind = rng.choices(list(mix), weights=list(mix.values()))[0]
            size = int(min(rng.lognormvariate(6.9, 0.7), room - 100)) if long else 0
            ids, prompt = self.encode(self.questions.conversation(kind, max(200, size)))
            if len(ids) > room:
                continue
            if len(tokens) + len(ids) > room:
                break
            tokens += ids
            positions += range(len(ids))
            prompt_weight = min(PROMPT_WEIGHT, PROMPT_SHARE * (len(ids) - prompt) / prompt)
            weights += [0.0] + [prompt_weight] * (prompt - 1) + [1.0] * (len(ids) - prompt)
            lengths.append(len(ids))
        empty = room - len(tokens)  # every step has the same length, which the matrix library likes
        if empty > 0:
            tokens += [2] * empty
            positions += range(empty)
            weights += [0.0] * empty
            lengths.append(empty)
        return Batch(torch.tensor([tokens]), torch.tensor([positions]), torch.tensor([weights]), lengths)


# -- optimisers ----------------------------------------------------------------------------------------------------


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, by five quintic Newton-Schulz steps.

    matrices: (n, rows, columns). The coefficients are those of Muon (Jordan et al., 2024): singular values end up
    between about 0.7 and 1.2, which is near enough for an update.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x if wide else x.mT


class Optimizer:
    """Muon for hidden matrices, Adam for embeddings, head, norms and routers; float32 masters of both."""

    def __init__(self, modules: nn.Module, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self.parameters = dict(modules.named_parameters())
        self.masters = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self.first = {name: torch.zeros_like(m) for name, m in self.masters.items()}
        self.second = {name: torch.zeros_like(m) for name, m in self.masters.items() if not self.by_muon(name)}

    def by_muon(self, name: str) -> bool:
        """Whether Muon moves this parameter."""
        outside = ("embed_tokens", "lm_head", "mlp.gate.")
        return self.masters[name].dim() >= 2 and not any(part in name for part in outside)

    @torch.no_grad()
    def step(self, number: int, rate: float, rounded: bool) -> float:
        """One update, the learning rates times `rate`, the copies `rounded` to FP8. Returns the gradient norm."""
        gradients = {name: p.grad.float() for name, p in self.parameters.items() if p.grad is not None}
        norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
        clip = min(1.0, 1.0 / (norm + 1e-6))
        groups: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for name, gradient in gradients.items():
            master, first = self.masters[name], self.first[name]
            if self.by_muon(name):
                first.lerp_(gradient, 0.05)
                update = gradient.lerp_(first, 0.95)
                halves = 2 if "gate_up_proj" in name else 1  # gate and up are two matrices in one tensor
                shape = (-1, master.shape[-2] // halves, master.shape[-1])
                groups.setdefault(shape[1:], []).append((master.view(shape), update.view(shape)))
                continue
            second = self.second[name]
            gradient.mul_(clip)
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.05)
            step = (first / (1 - 0.9**number)) / ((second / (1 - 0.95**number)).sqrt() + 1e-10)
            master.add_(step, alpha=-rate * (EMBEDDING_LR if "embed_tokens" in name else ADAM_LR))
        for (rows, columns), members in groups.items():
            stacked = torch.cat([update for _, update in members])
            updates = torch.cat(list(self.pool.map(orthogonalize, stacked.chunk(WORKERS)))).float()
            lr = MUON_LR * rate * max(1.0, rows / columns) ** 0.5
            for (master, _), update in zip(members, updates.split([m.shape[0] for m, _ in members]), strict=True):
                master.mul_(1 - lr * 0.02).sub_(update, alpha=lr)
        self.copy(rounded)
        return norm

    @torch.no_grad()
    def copy(self, rounded: bool) -> None:
        """Refresh the computing copies from the masters."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            parameter.copy_(fake_quantize(master) if rounded and is_fp8(name) else master)
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        parts = {"masters": self.masters, "first": self.first, "second": self.second}
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a saved state."""
        for tensors, part in ((self.masters, "masters/"), (self.first, "first/"), (self.second, "second/")):
            for name in tensors:
                tensors[name] = state[part + name]


# -- training ------------------------------------------------------------------------------------------------------


class Trainer:
    """Model, optimiser and data of one run, and its file in the work folder."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(SEED)
        self.work = work
        self.tokenizer = make_tokenizer.write(work / "tokenizer")
        self.main, self.mtp = build_model()
        self.pool = ThreadPoolExecutor(WORKERS)
        self.optimizer = Optimizer(nn.ModuleDict({"main": self.main, "mtp": self.mtp}), self.pool)
        self.packer = Packer(self.tokenizer, SEED)
        self.routers = routers(self.main) + routers(self.mtp)
        self.loads: list[list[Tensor]] = [[] for _ in self.routers]
        for i, router in enumerate(self.routers):
            router.register_forward_hook(lambda _m, _i, out, i=i: self._count(i, out[2]))
        self.step, self.seconds = 0, 0.0
        self.optimizer.copy(False)
        if (work / STATE).exists():
            self.load()

    def _count(self, layer: int, chosen: Tensor) -> None:
        self.loads[layer].append(torch.bincount(chosen.flatten(), minlength=CONFIG["n_routed_experts"]).float())

    def save(self) -> None:
        """Write the run's state, whole or not at all."""
        biases = {f"bias/{i}": router.e_score_correction_bias for i, router in enumerate(self.routers)}
        facts = {"step": self.step, "seconds": self.seconds, "random": self.packer.questions.rng.getstate()}
        save_file(self.optimizer.state() | biases, self.work / "state.tmp", metadata={"facts": json.dumps(facts)})
        (self.work / "state.tmp").replace(self.work / STATE)

    def load(self) -> None:
        """Go on from a saved state."""
        with safe_open(self.work / STATE, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict)
            facts = json.loads(file.metadata()["facts"])
        self.optimizer.load(state)
        for i, router in enumerate(self.routers):
            router.e_score_correction_bias.copy_(state[f"bias/{i}"])
        self.step, self.seconds = facts["step"], facts["seconds"]
        version, numbers, pending = facts["random"]
        self.packer.questions.rng.setstate((version, tuple(numbers), pending))
        self.optimizer.copy(False)

    def losses(self, batch: Batch, with_mtp: bool) -> tuple[Tensor, Tensor]:
        """Weighted cross-entropy of the next token (main model) and of the one after it (MTP module, if asked for)."""
        embedded = self.main.model.embed_tokens(batch.tokens).to(torch.bfloat16)
        hidden = self.main.model(
            inputs_embeds=embedded, position_ids=batch.positions, use_cache=False, lengths=batch.lengths
        ).last_hidden_state
        main = weighted_loss(self.main.lm_head(hidden[:, :-1]), batch.tokens[:, 1:], batch.weights[:, 1:])
        if not with_mtp:
            return main, torch.zeros(())

        # Position t of the module sees h_t and the embedding of token t+1, and predicts token t+2. The last position
        # of a conversation sees the next one's first token; nothing attends to it and its weight is 0.
        drafted = self.mtp.layers[0](
            embedded.roll(-1, dims=1),
            hidden,
            position_embeddings=self.main.model.rotary_emb(embedded, batch.positions),
            attention_mask=None,
            position_ids=batch.positions,
            past_key_values=None,
            lengths=batch.lengths,
        )
        weights = batch.weights[:, 2:] * (batch.positions[:, 2:] >= 2)
        return main, weighted_loss(self.main.lm_head(drafted[:, :-2]), batch.tokens[:, 2:], weights)

    def train_step(self, progress: float) -> dict[str, float]:
        """One step at a given fraction of the run's time."""
        self.step += 1
        batches = [self.packer.batch(self.step, progress) for _ in range(WORKERS)]

        with_mtp = progress >= MTP_FROM or self.step % 4 < 2

        def backward(batch: Batch) -> tuple[float, float]:
            main, mtp = self.losses(batch, with_mtp)
            ((main + MTP_WEIGHT * mtp) / WORKERS).backward()
            return main.item(), mtp.item()

        results = list(self.pool.map(backward, batches))
        main, mtp = (sum(losses) / WORKERS for losses in zip(*results, strict=True))
        rate = min(1.0, self.step / WARM_UP_STEPS) * min(1.0, max(0.01, (1 - progress) / (1 - DECAY_FROM)))
        norm = self.optimizer.step(self.step, rate, rounded=progress >= FP8_FROM)
        peak = 0.0
        for router, counts in zip(self.routers, self.loads, strict=True):
            if not counts:
                continue
            load = torch.stack(counts).sum(0)
            counts.clear()
            router.e_score_correction_bias += BALANCE_SPEED * max(rate, 0.1) * torch.sign(load.mean() - load)
            peak += float(load.max() / load.mean()) / len(self.routers)
        return {"loss": main, "mtp": mtp, "norm": norm, "rate": rate, "peak_load": peak}

    def run(self, minutes: float, save_minutes: float, eval_minutes: float, max_steps: int) -> None:
        """Train until the run has lasted `minutes` in all, earlier parts of a resumed run included."""
        last, next_save, next_eval = time.time(), self.seconds + 60 * save_minutes, self.seconds + 60 * eval_minutes
        sums: Counter[str] = Counter()
        while self.seconds < 60 * minutes and self.step < max_steps:
            sums.update(self.train_step(self.seconds / (60 * minutes)))
            now = time.time()
            self.seconds, last = self.seconds + now - last, now
            if self.step % 20 == 0:
                means = " ".join(f"{name} {value / 20:.3f}" for name, value in sums.items())
                print(f"step {self.step} minute {self.seconds / 60:.1f} {means}", flush=True)
                sums.clear()
            if self.seconds >= next_save:
                self.save()
                next_save = self.seconds + 60 * save_minutes
            if self.seconds >= next_eval:
                self.report()
                now = time.time()  # questions count towards the time, so that the run ends when it should
                self.seconds, last = self.seconds + now - last, now
                next_eval = self.seconds + 60 * eval_minutes
        self.save()

    def report(self, per_kind: int = 12) -> None:
        """Ask a few held-out questions of each kind and append the score to STATUS.md."""
        torch.set_num_threads(WORKERS)
        embedding = self.main.model.embed_tokens.weight
        exact, embedding.data = embedding.data, embedding.data.bfloat16()
        result = evaluate(TransformersEngine(self.main, self.mtp, self.tokenizer, per_kind), per_kind, seed=self.step)
        embedding.data = exact
        torch.set_num_threads(1)
        for counts in self.loads:
            counts.clear()
        scores = " ".join(f"{kind} {score['right']}/{score['asked']}" for kind, score in result["kinds"].items())
        line = f"step {self.step} minute {self.seconds / 60:.1f}: {scores}, drafts {result['mtp_acceptance']:.3f}"
        with open(self.work / "STATUS.md", "a", encoding="utf-8") as file:
            file.write(f"- {line}\n")


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy under weights; logits (rows, length, vocabulary)."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the run's state and log")
    parser.add_argument("--minutes", type=float, default=110, help="length of the whole run, which sets the schedule")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--eval-minutes", type=float, default=12)
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--export", type=Path, help="do not train: write the saved state as a checkpoint here")
    args = parser.parse_args()
    torch.set_num_threads(1)  # two rows at once, one thread each, waste less than two threads on every operation
    trainer = Trainer(args.work)
    if args.export:
        export(trainer.optimizer.masters, [r.e_score_correction_bias for r in trainer.routers], args.export)
        print(json.dumps({"step": trainer.step, "minutes": trainer.seconds / 60, "to": str(args.export)}))
    else:
        trainer.run(args.minutes, args.save_minutes, args.eval_minutes, args.max_steps)


if __name__ == "__main__":
    main()
