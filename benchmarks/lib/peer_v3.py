"""The V3 repository's own code as a contestant, in a process of its own: started by lib.peers.Peer, never by hand.

    python benchmarks/lib/peer_v3.py DIR DEVICE        # DIR: its `inference` folder

Its folder comes first on the path, so that `kernel` and `model` are its modules here and not ours. Nothing in them is
changed on disk. Where a part of its model is timed, what surrounds that part is replaced by stand-ins that hand over
prepared tensors; where a rank of several is timed, torch.distributed by one that copies.

A request is a line of JSON on stdin, the answer a line on stdout: `build` and `ready` and `time` for a kernel,
`slice` and `step` for a whole rank.
"""

import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

ROOT, DEVICE = Path(sys.argv[1]), torch.device(sys.argv[2])
sys.path[:0] = [str(ROOT), str(Path(__file__).parents[1])]
from lib.timing import Clock, GpuClock, NoClock, Run, Timed, reason, relative_error
from lib.weights import fill

import kernel_gpu

Built = tuple[Run, Callable[[Any], torch.Tensor], torch.Tensor]  # the call, what of its result is compared, with what


@contextmanager
def as_its_model_runs() -> Iterator[None]:
    """Its code takes types from torch's default, which its own scripts set to bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


class Hands(nn.Module):
    """A stand-in for a layer: gives what it was last given, whatever its input."""

    given: Any = None

    def forward(self, *_: Any) -> Any:
        return self.given


class Ranks(types.ModuleType):
    """torch.distributed as rank 0 of `size` sees it, every message copied once and sent nowhere."""

    def __init__(self, size: int):
        super().__init__("ranks")
        self.size = size

    def is_initialized(self) -> bool:
        return self.size > 1

    def get_world_size(self) -> int:
        return self.size

    def get_rank(self) -> int:
        return 0

    def all_reduce(self, x: torch.Tensor) -> None:
        x.copy_(x.clone())

    def all_gather(self, parts: list[torch.Tensor], x: torch.Tensor) -> None:
        for part in parts:
            part.copy_(x)


class V3:
    """Its two modules, and what has been built of them."""

    def __init__(self) -> None:
        import kernel  # the V3 repository's, as is model
        import model

        assert Path(kernel.__file__ or "").parent.resolve() == ROOT.resolve(), kernel.__file__
        self.kernel: Any = kernel
        self.model: Any = model
        self.clock: Clock = GpuClock(1.0, DEVICE) if DEVICE.type == "cuda" else NoClock()
        self.tuned: tuple[Any, ...] | None = None
        self.run: Run | None = None
        self.sets = 1
        self.seconds: Callable[[], float] | None = None
        self.whole: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        do = request.pop("do")
        if do == "build":
            return self.build(**request)
        if do == "ready":
            assert self.run is not None
            with as_its_model_runs():
                self.seconds, graph = self.clock.prepare(self.run, self.sets, request["calls"])
            return {"graph": graph}
        if do == "time":
            assert self.seconds is not None
            with as_its_model_runs():
                return {"seconds": self.seconds()}
        return self.slice(**request) if do == "slice" else self.step(**request)

    def build(self, what: str, sets: int, **sizes: Any) -> dict[str, Any]:
        """Makes the call of one contestant and compares its first result with float64."""
        self.run = self.seconds = self.whole = None
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        self.sets = sets
        run, pick, exact = getattr(self, what)(sets=sets, **sizes)
        self.run = run
        with as_its_model_runs():
            return {"error": relative_error(pick(run(0)), exact)}

    # ---- kernels ----

    def dense(self, m: int, n: int, k: int, sets: int) -> Built:
        data = kernel_gpu.Dense(m, n, k, sets, DEVICE)
        if self.tuned != (n, k, m <= 128):
            self.kernel.fp8_gemm_kernel.cache.clear()
            self.tuned = (n, k, m <= 128)
        fp8_gemm = self.kernel.fp8_gemm
        return lambda i: fp8_gemm(data.q, data.q_s, data.ws[i], data.scales[i]), _as_it_is, data.exact()

    def norm(self, m: int, h: int, sets: int) -> Built:
        data = kernel_gpu.Residual(m, h, sets, DEVICE)
        with as_its_model_runs(), DEVICE:
            norm = self.model.RMSNorm(h)
        norm.weight.data = data.weight
        run: Run = lambda i: self.kernel.act_quant(norm(data.xs[i] + data.deltas[i]))  # noqa: E731
        return run, lambda y: kernel_gpu.widened(*y), data.exact()

    def silu(self, m: int, inter: int, sets: int) -> Built:
        data = kernel_gpu.GateUp(m, inter, sets, DEVICE)
        halves = [[half.contiguous() for half in x.chunk(2, dim=-1)] for x in data.xs]
        run: Run = lambda i: self.kernel.act_quant(F.silu(halves[i][0]) * halves[i][1])  # noqa: E731
        return run, lambda y: kernel_gpu.widened(*y), data.exact()

    def moe(self, m: int, h: int, inter: int, local: int, total: int, top: int, sets: int) -> Built:
        """Its MoE layer with a router that hands over the prepared choice, and without shared experts."""
        data = kernel_gpu.Experts(m, h, inter, local, total, top, sets, DEVICE)
        self._ranks(total // local, "fp8")
        args = self.model.ModelArgs(
            dim=h, moe_inter_dim=inter, n_routed_experts=total, n_activated_experts=top, n_shared_experts=1,
        )  # fmt: skip
        self.model.Linear.dtype = torch.float8_e4m3fn
        with as_its_model_runs(), DEVICE:
            moe = self.model.MoE(args)
        for e in range(local):
            expert = moe.experts[e]
            for layer, w, s, row in (
                (expert.w1, data.w13[e], data.s13[e], 0),
                (expert.w3, data.w13[e], data.s13[e], data.pitch),
                (expert.w2, data.w2[e], data.s2[e], 0),
            ):
                at = row // kernel_gpu.BLOCK
                layer.weight.data = w[row : row + len(layer.weight)]
                layer.scale.data = s[at : at + len(layer.scale)]
        gate, nothing = Hands(), Hands()
        moe.gate, moe.shared_experts = gate, nothing
        choices = [(w.bfloat16(), ids) for w, ids in zip(data.weights, data.ids, strict=True)]
        nothing.given = torch.zeros((), dtype=torch.bfloat16, device=DEVICE)
        rows_compared = data.compared()

        def run(i: int) -> torch.Tensor:
            gate.given = choices[i]
            return moe(data.xs[i])

        return run, lambda y: y[rows_compared], data.exact(rows_compared, True)

    def decode(self, heads: int, b: int, length: int, sets: int) -> Built:
        """Its absorbed attention on prepared queries and caches, its projections replaced."""
        data = kernel_gpu.Cached(heads, b, length, sets, DEVICE)
        self._ranks(1, "bf16")
        self.model.Linear.dtype = torch.bfloat16
        args = self.model.ModelArgs(dim=16, n_heads=heads, max_batch_size=1, max_seq_len=1)
        with as_its_model_runs(), DEVICE:
            mla = self.model.MLA(args)
        q, latent = Hands(), Hands()
        mla.wq, mla.wkv_a, mla.kv_norm, mla.wo = q, latent, nn.Identity(), nn.Identity()
        mla.wkv_b.weight.data = torch.cat((data.w_uk, data.w_uv), dim=1).flatten(0, 1)
        caches = []
        for i in range(sets):
            rows = data.pool[data.tables[i]].flatten(1, 2)[:, :length]  # (B, L, C + R)
            caches.append([part.contiguous() for part in rows.split([kernel_gpu.C, kernel_gpu.ROPE], dim=-1)])
        queries = [torch.cat(pair, dim=-1).flatten(1)[:, None] for pair in zip(data.q_nope, data.q_pe, strict=True)]
        newest = [torch.cat([part[:, -1:] for part in cache], dim=-1) for cache in caches]
        x = torch.zeros(b, 1, 16, dtype=torch.bfloat16, device=DEVICE)
        unturned = torch.ones(1, kernel_gpu.ROPE // 2, dtype=torch.complex64, device=DEVICE)

        def run(i: int) -> torch.Tensor:
            q.given, latent.given = queries[i], newest[i]
            mla.kv_cache, mla.pe_cache = caches[i]
            return mla(x, length - 1, unturned, None)

        return run, lambda y: y.view(b, heads, -1)[data.rows()], data.exact()

    # ---- a whole rank ----

    def slice(self, config: dict[str, Any], ranks: int, longest: int, gemm: str) -> dict[str, Any]:
        """Builds rank 0 of `ranks` of its model with random weights; `gemm` is its switch between W8A16 and W8A8."""
        self.run = self.seconds = self.whole = None
        self._ranks(ranks, gemm)
        known = self.model.ModelArgs.__dataclass_fields__
        facts = {key: value for key, value in config.items() if key in known}
        args = self.model.ModelArgs(**facts | {"max_batch_size": 1, "max_seq_len": longest})
        with as_its_model_runs(), DEVICE:
            self.whole = self.model.Transformer(args)
        fill(self.whole)
        used = torch.cuda.memory_allocated(DEVICE) if DEVICE.type == "cuda" else 0
        return {"parameters": sum(p.numel() for p in self.whole.parameters()), "bytes": used}

    def step(self, kind: str, b: int, context: int, rounds: int) -> dict[str, Any]:
        """Times one token for each of b sequences after `context` cached ones, or one prompt of `context` tokens."""
        room = context + (kind == "decode")
        attentions = [layer.attn for layer in self.whole.layers]
        for mla in attentions:
            mla.kv_cache = mla.pe_cache = None  # the last case's go before this one's come
        for mla in attentions:
            widths = mla.kv_lora_rank, mla.qk_rope_head_dim
            mla.kv_cache, mla.pe_cache = (torch.randn(b, room, n, dtype=torch.bfloat16, device=DEVICE) for n in widths)
        tokens = torch.randint(self.whole.embed.vocab_size, (b, 1 if kind == "decode" else context), device=DEVICE)
        start = context if kind == "decode" else 0
        with as_its_model_runs():
            return Timed(self.clock, rounds).of(lambda: self.whole(tokens.clone(), start).argmax(-1))

    def _ranks(self, size: int, gemm: str) -> None:
        """Its module's own globals, as its `Transformer` would set them."""
        self.model.dist = Ranks(size)
        self.model.world_size, self.model.rank, self.model.gemm_impl = size, 0, gemm


def _as_it_is(y: torch.Tensor) -> torch.Tensor:
    return y


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # whatever its code prints is no answer
    v3 = V3()
    for line in sys.stdin:
        try:
            answer = v3.answer(json.loads(line))
        except Exception as e:
            answer = {"refused": reason(e)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
