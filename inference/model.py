"""The network of DeepSeek-V3: MLA attention, DeepSeekMoE layers and the multi-token prediction module, written once.

Numbers in brackets are equations of the DeepSeek-V3 technical report (arXiv 2412.19437); "V2" is the DeepSeek-V2 report
(arXiv 2405.04434). Every op is a method of `ops`, the backend that the model is built with (ops/reference.py specifies
them). The model names a group's collectives and no rank's number: `tp`, a lane's ranks, share the heads; `ep`, those of
all lanes, share MLPs and experts, which therefore run on the tokens of all lanes, gathered over `dp`.

Shapes in comments:
    T  tokens of all sequences, one after another     B  sequences             H  hidden size (args.dim)
    N  this rank's heads                              E  routed experts        K  experts per token
    C  kv_lora_rank, R  qk_rope_head_dim: the latent  P  pages of the longest sequence
    dn, dv  qk_nope_head_dim, v_head_dim              V  vocabulary
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from core.batch import Batch
from core.config import ModelArgs
from core.numerics import PLAIN, Gemm, Numerics
from core.run_config import PAGE_SIZE
from core.stages import Stage, single_stage
from ops.backend import ReferenceBackend, choose_backend
from ops.formats import PartialSums, Quantised, Routing, Scales, Weight, columns, packed_latent_bytes
from ops.reference_backend import plain_tokens
from parallel.group import SOLO, Group, mlp_shard, tree_sum

INNER_NORM_EPS = 1e-6  # of q_norm and kv_norm in the released code, whatever rms_norm_eps says


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, computed in float32 and rounded once. Its weight is float32."""

    def __init__(self, dim: int, eps: float, ops: ReferenceBackend):
        super().__init__()
        self.eps, self.ops = eps, ops
        self.weight = _parameter(dim, dtype=torch.float32)

    def forward(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor:
        """The norm of x (T, H), or of x + delta, in x's dtype."""
        y, _ = self.ops.norm(x, self.weight, self.eps, delta)
        assert isinstance(y, torch.Tensor)
        return y

    def add(
        self, x: torch.Tensor, delta: torch.Tensor | None, fp8: Scales | None, keep: bool = False
    ) -> tuple[torch.Tensor | Quantised, torch.Tensor]:
        """The norm of x + delta, and x + delta. The norm is quantised if `fp8` names the scales, as the next linear's
        `fp8` does; `keep` keeps it in x's dtype too."""
        return self.ops.norm(x, self.weight, self.eps, delta, fp8, keep)


class Linear(nn.Module):
    """A projection without bias, or `experts` of them stacked; quantised, with block scales, where `num` keeps it so,
    unless `dtype` names that of a weight which is never quantised.

    Projections of the same input are one matrix product: `parts` gives their names on disk and their widths. Part i
    begins at row starts[i]. Quantised parts begin at whole blocks, so that each keeps its own scales; the rows between
    are zeros. Parts of one width are equally far apart: gate and up are the halves of their product.
    """

    scale: nn.Parameter | None
    zero: nn.Parameter | None

    def __init__(
        self,
        in_dim: int,
        out: int | dict[str, int],
        num: Numerics,
        ops: ReferenceBackend,
        experts: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        stack = () if experts is None else (experts,)
        form = PLAIN if dtype is not None else num.form
        self.ops, self.block = ops, form.block
        self.gemm: Gemm = "fp8" if num.gemm == "fp8" and form.kind == "fp8" else "bf16"
        self.scale_fmt = num.scale_fmt
        self.parts = {} if isinstance(out, int) else out
        widths = [out] if isinstance(out, int) else list(out.values())
        align = form.block[0] if form.is_quantised and self.parts else 1
        *starts, end = accumulate((math.ceil(n / align) * align for n in widths), initial=0)
        self.starts: tuple[int, ...] = tuple(starts)
        rows = end if len(set(widths)) == 1 else starts[-1] + widths[-1]
        self.register_parameter("scale", None)
        self.register_parameter("zero", None)
        if form.is_quantised:
            blocks = math.ceil(rows / form.block[0]), math.ceil(in_dim / form.block[1])
            self.weight = _parameter(*stack, rows, in_dim // form.packing, dtype=form.dtype)
            self.scale = _parameter(*stack, *blocks, dtype=form.scale)
            if form.zeros:
                self.zero = _parameter(*stack, *blocks, dtype=torch.uint8)
        else:
            self.weight = _parameter(*stack, rows, in_dim, dtype=dtype or num.dtype)

    @property
    def w(self) -> Weight:
        return Weight(self.weight, self.scale, self.gemm, self.scale_fmt, self.block, self.zero)

    @property
    def fp8(self) -> Scales | None:
        """The format of the scales that its input is quantised with (W8A8); None: it takes plain input."""
        return self.w.fp8

    def forward(self, x: torch.Tensor | Quantised) -> torch.Tensor:
        return self.ops.linear(x, self.w)

    def partial(self, x: torch.Tensor | Quantised) -> torch.Tensor | PartialSums:
        """The same for an op that adds up partial sums."""
        return self.ops.partial_linear(x, self.w)

    def split(self, y: torch.Tensor | PartialSums) -> list[torch.Tensor | PartialSums]:
        """Each part's columns of this projection's result."""
        return [columns(y, start, n) for start, n in zip(self.starts, self.parts.values(), strict=True)]

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        if self.scale is None:
            return self.weight
        return self.ops.weight_dequant(self.weight, self.scale, dtype, self.block, self.zero)

    def prepare(self) -> None:
        """Puts a loaded weight in the layout that the backend multiplies."""
        packed = self.ops.pack_weight(self.w)
        for name, value in (("weight", packed.data), ("scale", packed.scale), ("zero", packed.zero)):
            _replace(self, name, value)


class Embedding(nn.Module):
    """Token embedding, the vocabulary split over the ranks."""

    def __init__(self, args: ModelArgs, num: Numerics, tp: Group):
        super().__init__()
        self.tp, self.dtype = tp, num.dtype
        self.rows = tp.split(args.vocab_size, "vocab_size")
        held = num.inside("head").exact_dtype if args.tie_word_embeddings else num.dtype
        self.weight = _parameter(self.rows, args.dim, dtype=held)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        local = tokens - self.tp.rank * self.rows
        mine = (local >= 0) & (local < self.rows)
        x = F.embedding(local.where(mine, 0), self.weight).to(self.dtype)  # (T, H)
        return self.tp.all_reduce(x * mine.unsqueeze(-1)) if self.tp.size > 1 else x


class MLA(nn.Module):
    """Multi-head latent attention (V3 section 2.1.1): a token is cached as one latent of C + R values.

    The heads are split over the ranks; the latent is the same on every rank.
    """

    w_uk: torch.Tensor  # (N, dn, C)
    w_uv: torch.Tensor  # (N, dv, C)

    def __init__(self, args: ModelArgs, num: Numerics, tp: Group, ops: ReferenceBackend):
        super().__init__()
        self.args, self.dtype, self.ops = args, num.dtype, ops
        self.n_heads = tp.split(args.n_heads, "n_heads")
        stacked = num.inside("wqkv_a")
        # W^DQ with W^DKV and W^KR (1, 3, 6); a model without a query latent has W^Q in the place of W^DQ
        if args.q_lora_rank:
            self.wqkv_a = Linear(args.dim, {"wq_a": args.q_lora_rank, "wkv_a": args.latent_dim}, stacked, ops)
            self.q_norm = RMSNorm(args.q_lora_rank, INNER_NORM_EPS, ops)
            self.wq_b = Linear(args.q_lora_rank, self.n_heads * args.qk_head_dim, num.inside("wq_b"), ops)
        else:
            queries = self.n_heads * args.qk_head_dim
            self.wqkv_a = Linear(args.dim, {"wq": queries, "wkv_a": args.latent_dim}, stacked, ops)
        self.kv_norm = RMSNorm(args.kv_lora_rank, INNER_NORM_EPS, ops)
        kv_width = self.n_heads * (args.qk_nope_head_dim + args.v_head_dim)
        self.wkv_b = Linear(args.kv_lora_rank, kv_width, num.inside("wkv_b"), ops)
        self.wo = Linear(self.n_heads * args.v_head_dim, args.dim, num.inside("wo"), ops)

    @property
    def fp8(self) -> Scales | None:
        return self.wqkv_a.fp8

    @property
    def replicated(self) -> tuple[str, ...]:
        """The modules within that every rank has whole."""
        return ("wqkv_a", "q_norm", "kv_norm") if self.args.q_lora_rank else ("kv_norm",)

    def prepare(self) -> None:
        """Splits wkv_b into W^UK and W^UV (2, 5), dequantised once."""
        kv_b = self.wkv_b.dequantised(self.dtype).unflatten(0, (self.n_heads, -1))  # (N, dn + dv, C)
        w_uk, w_uv = kv_b.split([self.args.qk_nope_head_dim, self.args.v_head_dim], dim=1)
        self.register_buffer("w_uk", w_uk.contiguous(), persistent=False)
        self.register_buffer("w_uv", w_uv.contiguous(), persistent=False)
        del self.wkv_b

    def forward(
        self, x: torch.Tensor | Quantised, batch: Batch, latents: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """x (T, H) to this rank's partial sum (T, H). Writes the tokens' latents into this layer's (n_pages, PAGE_SIZE,
        C + R) at batch.slots, then attends to all latents of each sequence. cos, sin: (T, R/2) float32."""
        q, kv = self.wqkv_a.split(self.wqkv_a.partial(x))  # (1, 3, 6) in one product: (T, Q), (T, C + R)
        norm, args = self.kv_norm, self.args
        # kv_norm, RoPE of (3), and the cache write; with them q_norm
        written = kv, norm.weight, norm.eps, cos, sin, batch.slots, latents
        if args.q_lora_rank:
            normed: Any = self.ops.norm_latents(*written, q, self.q_norm.weight, self.wq_b.fp8)
            q = self.wq_b.partial(normed)  # (7, 8): (T, N (dn + R))
        else:
            self.ops.norm_latents(*written)
        # RoPE of (8), and (10): (T, N dv)
        o = self.ops.mla(q, cos, sin, latents, batch, self.w_uk, self.w_uv, args.softmax_scale, self.wo.fp8)
        return self.wo(o)  # (11): (T, H)


class MLP(nn.Module):
    """SwiGLU, its inner width split over the ranks: x (T, H) to this rank's partial sum (T, H)."""

    replicated = ()

    def __init__(self, dim: int, inter_dim: int, num: Numerics, ep: Group, ops: ReferenceBackend, what: str):
        super().__init__()
        self.ops = ops
        self.inner = ep.split(inter_dim, what)
        # gate and up, one product for two
        self.w13 = Linear(dim, {"w1": self.inner, "w3": self.inner}, num.inside("w13"), ops)
        self.w2 = Linear(self.inner, dim, num.inside("w2"), ops)

    @property
    def fp8(self) -> Scales | None:
        return self.w13.fp8

    def inputs(self, x: torch.Tensor | Quantised) -> "FeedForwardInputs":
        """What `forward` takes of tokens x (T, H)."""
        return (x._replace(x=None) if isinstance(x, Quantised) else x,)

    def forward(self, x: torch.Tensor | Quantised) -> torch.Tensor:
        return self.w2(self.ops.silu_mul(self.w13.partial(x), self.inner, self.w2.fp8))


class Gate(nn.Module):
    """The router (13 to 16), in float32 throughout."""

    bias: nn.Parameter | None

    def __init__(self, args: ModelArgs, num: Numerics, ops: ReferenceBackend):
        super().__init__()
        self.ops = ops
        self.rule = Routing(
            args.n_activated_experts, args.score_func, args.topk_method, args.n_expert_groups, args.n_limited_groups,
            args.norm_topk_prob, args.route_scale,
        )  # fmt: skip
        self.weight = _parameter(args.n_routed_experts, args.dim, dtype=num.exact_dtype)
        bias = _parameter(args.n_routed_experts, dtype=torch.float32) if args.gate_bias else None
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (T, H) to weights (T, K) float32 and expert ids (T, K)."""
        return self.ops.router(x, self.weight, self.bias, self.rule)


class Experts(nn.Module):
    """This rank's routed experts, stacked: with num.experts "whole" some experts, with "split" a share of the inner
    width of every one. Either way the result is this rank's partial sum (T, H).
    """

    def __init__(self, args: ModelArgs, num: Numerics, ep: Group, ops: ReferenceBackend):
        super().__init__()
        self.ops = ops
        n, self.first, self.inner = args.n_routed_experts, 0, args.moe_inter_dim
        self.n_experts = n
        if num.experts == "split":
            self.inner = ep.split(args.moe_inter_dim, "moe_inter_dim")
        else:
            n = ep.split(args.n_routed_experts, "n_routed_experts")
            self.first = ep.rank * n
        self.w13 = Linear(args.dim, {"w1": self.inner, "w3": self.inner}, num, ops, experts=n)  # gate and up
        self.w2 = Linear(self.inner, args.dim, num, ops, experts=n)

    def forward(
        self,
        x: torch.Tensor | Quantised,
        weights: torch.Tensor,
        ids: torch.Tensor,
        shared: Callable[[], torch.Tensor] | None = None,
        shared_weights: tuple[Weight, Weight] | None = None,
    ) -> torch.Tensor:
        w13, w2, inner, n = self.w13.w, self.w2.w, self.inner, self.n_experts
        return self.ops.experts(x, weights, ids, self.first, w13, w2, inner, shared, n, shared_weights)  # (T, H)


class MoE(nn.Module):
    """DeepSeekMoE (12): routed experts, and shared ones for every token. The result is this rank's partial sum."""

    replicated = ("gate",)

    def __init__(self, args: ModelArgs, num: Numerics, ep: Group, ops: ReferenceBackend, tp: Group):
        super().__init__()
        self.gate = Gate(args, num.inside("gate"), ops)
        self.experts = Experts(args, num.inside("experts"), ep, ops)
        self.shared_experts, self.shared_in_lane = None, num.mlps_in_lane
        if args.n_shared_experts:
            sharers, width = tp if num.mlps_in_lane else ep, args.n_shared_experts * args.moe_inter_dim
            self.shared_experts = MLP(
                args.dim, width, num.inside("shared_experts"), sharers, ops, "the shared experts' width"
            )

    @property
    def fp8(self) -> Scales | None:
        return self.experts.w13.fp8

    def inputs(self, x: torch.Tensor | Quantised) -> "FeedForwardInputs":
        """What `forward` takes of tokens x (T, H): they themselves, and the router's choice. A Quantised x must have
        kept x itself, which the router takes."""
        routed = self.gate(plain_tokens(x))
        if isinstance(x, Quantised) and (self.shared_experts is None or self.shared_in_lane or self.shared_experts.fp8):
            x = x._replace(x=None)
        return x, *routed

    def forward(self, x: torch.Tensor | Quantised, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x (T, H), weights and ids (T, K) to (T, H)."""
        if self.shared_experts is None or self.shared_in_lane:
            return self.experts(x, weights, ids)
        own = self.shared_experts.w13.w, self.shared_experts.w2.w
        return self.experts(x, weights, ids, partial(self.shared, x), own)

    def shared(self, x: torch.Tensor | Quantised) -> torch.Tensor:
        """The shared experts' part of the result, on tokens x (T, H)."""
        assert self.shared_experts is not None
        return self.shared_experts(x if self.shared_experts.fp8 else plain_tokens(x))


# Tokens x (T, H), of experts with their weights and ids (T, K).
FeedForwardInputs = tuple[torch.Tensor | Quantised] | tuple[torch.Tensor | Quantised, torch.Tensor, torch.Tensor]


def gather_inputs(dp: Group, lane_rows: tuple[int, ...], inputs: FeedForwardInputs) -> FeedForwardInputs:
    """The feed-forward layer's inputs for the tokens of all lanes, of which each gives its first lane_rows[i]."""
    if dp.size == 1:
        return inputs
    x, *routed = inputs
    if not isinstance(x, Quantised):
        return tuple(dp.gather(lane_rows, x, *routed))  # type: ignore[return-value]
    plain = [] if x.x is None else [x.x]
    q, s, *rest = dp.gather(lane_rows, x.q, x.s, *plain, *routed)
    return Quantised(q, s, rest.pop(0) if plain else None, x.dtype), *rest  # type: ignore[return-value]


class VirtualRanks(nn.ModuleList):
    """A module of this rank, computed as the shards that several ranks would have, one after another (deterministic
    mode). Each shard has the shapes of that many ranks and rounds once; their sum is taken in float32, as one tree over
    all shards of all ranks. Which rank computes a shard then changes no bit.

    What is not split (`replicated`) the shards have in common.
    """

    @classmethod
    def of(cls, num: Numerics, ranks: Group, make: Callable[[Group], Any]) -> Any:
        """`make` of this rank's place among `ranks`, or of each virtual rank's that it stands for."""
        if num.virtual_ranks == 1:
            return make(ranks)
        n = num.virtual_ranks // ranks.size
        first, *others = shards = [make(Group(ranks.rank * n + i, num.virtual_ranks)) for i in range(n)]
        for shard in others:
            for name in first.replicated:
                setattr(shard, name, getattr(first, name))
        return cls(shards)

    @property
    def fp8(self) -> Scales | None:
        first: Any = self[0]
        return first.fp8  # type: ignore[no-any-return]

    def inputs(self, x: torch.Tensor | Quantised) -> "FeedForwardInputs":
        first: Any = self[0]
        return first.inputs(x)  # type: ignore[no-any-return]

    def forward(self, *inputs: Any) -> torch.Tensor:
        """This rank's partial sum (T, H), float32."""
        return tree_sum(shard(*inputs) for shard in self)


class Block(nn.Module):
    """A transformer layer: attention and feed-forward, each after its norm and with a residual."""

    def __init__(self, args: ModelArgs, num: Numerics, tp: Group, ops: ReferenceBackend, dense: bool, dp: Group = SOLO):
        super().__init__()
        self.tp, self.dp, self.dtype = tp, dp, num.dtype
        self.attn_norm = RMSNorm(args.dim, args.norm_eps, ops)
        self.attn = VirtualRanks.of(num, tp, lambda tp: MLA(args, num.inside("attn"), tp, ops))
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps, ops)

        if dense and num.mlps_in_lane:
            self.dp = SOLO  # nothing to share with other lanes

        def feed_forward(ep: Group) -> nn.Module:
            inner = num.inside("ffn")
            if dense:
                return MLP(args.dim, args.inter_dim, inner, ep, ops, "inter_dim")
            return MoE(args, inner, ep, ops, tp)

        self.ffn = VirtualRanks.of(num, mlp_shard(tp, self.dp), feed_forward)
        self.shared_in_lane = num.mlps_in_lane and not dense and args.n_shared_experts > 0

    def forward(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        batch: Batch,
        latents: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream x (T, H) and the output still to be added to it, before and after this layer: the next
        norm does each addition, so that both are one op."""
        y, x = self.attn_norm.add(x, delta, self.attn.fp8)
        delta = self.tp.all_reduce(self.attn(y, batch, latents, cos, sin)).to(self.dtype)
        y, x = self.ffn_norm.add(x, delta, self.ffn.fp8, keep=True)
        inputs = gather_inputs(self.dp, batch.lane_rows, self.ffn.inputs(y))
        own = self.dp.scatter_sum(self.ffn(*inputs), batch.lane_rows, len(x))
        if self.shared_in_lane:
            own = own + self.ffn.shared(y)
        return x, self.tp.all_reduce(own).to(self.dtype)


class MTP(Block):
    """The multi-token prediction module (V3 section 2.2): from the hidden state of token i and token i + 1, the hidden
    state that predicts token i + 2. Embedding and head are the main model's.
    """

    def __init__(self, args: ModelArgs, num: Numerics, tp: Group, ops: ReferenceBackend, dp: Group = SOLO):
        super().__init__(args, num, tp, ops, dense=False, dp=dp)
        self.enorm = RMSNorm(args.dim, args.norm_eps, ops)
        self.hnorm = RMSNorm(args.dim, args.norm_eps, ops)
        self.eh_proj = Linear(2 * args.dim, args.dim, num, ops, dtype=num.dtype)
        self.norm = RMSNorm(args.dim, args.norm_eps, ops)

    def combine(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """M_k of (21), (T, H). The embedding comes first, as in the released weights; (21) has the other order."""
        return self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))


class Transformer(nn.Module):
    """One rank's share of the model. Its weights are uninitialised: load them, then call `prepare`."""

    inv_freq: torch.Tensor
    head_shards: list[Any]  # the head's rows as the backend multiplies by them, those of each virtual rank apart

    def __init__(
        self,
        args: ModelArgs,
        num: Numerics = Numerics(),
        tp: Group = SOLO,
        device: torch.device | str = "cpu",
        mtp: bool | None = None,
        backend: ReferenceBackend | None = None,
        dp: Group = SOLO,
        stage: Stage | None = None,
    ):
        """tp: the ranks of a lane, which is all of them unless `dp` are those with this one's place in other lanes.
        mtp: whether to build the MTP module, which a checkpoint may lack; None: if args has it. backend: computes every
        op; None: the fastest one for the device and the numerics. stage: the layers that this rank has (None: all).

        Raises UserError if a size does not divide by the ranks.
        """
        super().__init__()
        self.args, self.num, self.tp, self.dp, self.stage = args, num, tp, dp, stage or single_stage(args)
        self.device = torch.device(device)
        self.ops = ops = backend or choose_backend(self.device, num)
        n_mtp = args.n_mtp_layers if mtp is None else int(mtp)
        with self.device:
            if self.stage.has("embed.weight", n_mtp > 0, args.tie_word_embeddings):
                self.embed = Embedding(args, num, tp)
            self.layers = nn.ModuleList()
            for i in self.stage.layers:
                block = Block(args, num.inside(f"layers.{i}"), tp, ops, i < args.n_dense_layers, dp)
                self.layers.add_module(str(i), block)
            self.mtp = nn.ModuleList()
            if self.stage.is_last:
                self.norm = RMSNorm(args.dim, args.norm_eps, ops)
                rows, held = tp.split(args.vocab_size, "vocab_size"), num.inside("head").exact_dtype
                self.head = Linear(args.dim, rows, num, ops, dtype=held)
                self.mtp.extend(MTP(args, num.inside(f"mtp.{k}"), tp, ops, dp) for k in range(n_mtp))
                if args.tie_word_embeddings:
                    self.head.weight = self.embed.weight
            self.register_buffer("inv_freq", yarn_frequencies(args), persistent=False)
        for parameter in self.parameters():
            ops.use_huge_pages(parameter)

    def prepare(self) -> "Transformer":
        """Call after loading: splits and dequantises wkv_b, has the backend pack all weights. Returns self."""
        for module in list(self.modules()):
            if isinstance(module, MLA):
                module.prepare()
        for module in list(self.modules()):
            if isinstance(module, Gate):
                _replace(module, "weight", self.ops.pack_float32_weight(module.weight))
            elif self.stage.is_last and module is self.head:
                shards = module.weight.chunk(max(self.num.virtual_ranks // self.tp.size, 1))
                self.head_shards = [self.ops.pack_float32_weight(shard) for shard in shards]
                if self.head_shards[0] is not shards[0]:
                    del module.weight
            elif isinstance(module, Linear):
                module.prepare()
        return self

    def new_cache(self, n_pages: int) -> torch.Tensor:
        """Zeroed latents of every layer, the MTP module's last: (layers, n_pages, PAGE_SIZE, C + R) in the numerics'
        dtype; with fp8_latents rows of packed_latent_bytes uint8 in place of C + R values."""
        args, shape = self.args, (len(self.layers) + len(self.mtp), n_pages, PAGE_SIZE)
        if self.num.fp8_latents:
            width, dtype = packed_latent_bytes(args.kv_lora_rank, args.qk_rope_head_dim), torch.uint8
        else:
            width, dtype = args.latent_dim, self.num.dtype
        cache = torch.zeros(*shape, width, dtype=dtype, device=self.device)
        self.ops.use_huge_pages(cache)
        return cache

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return self.new_cache(1).nbytes

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states (T, H) of the batch's tokens after the final norm. Writes their latents into the cache.

        A stage of a pipeline other than the first takes the hidden states (T, H) that the one before returned, and
        returns, unless it is the last, those after its layers.
        """
        cos, sin = self.angles(batch.positions)
        x: Any = self.embed(batch.tokens) if self.stage.is_first else hidden
        delta: Any = None
        for layer, latents in zip(self.layers, cache, strict=False):
            x, delta = layer(x, delta, batch, latents, cos, sin)
        return self.norm(x, delta) if self.stage.is_last else x + delta

    @torch.inference_mode()
    def draft(self, batch: Batch, hidden: torch.Tensor, cache: torch.Tensor, k: int = 0) -> torch.Tensor:
        """Hidden states (T, H) of MTP module k, which predict one token further than `hidden` (T, H) does.

        batch.tokens holds the *next* tokens; positions, slots and pages are those of the hidden states. Writes the
        module's latents into the cache.
        """
        module = self.mtp[k]
        assert isinstance(module, MTP)
        cos, sin = self.angles(batch.positions)
        x = module.combine(self.embed(batch.tokens), hidden)
        return module.norm(*module(x, None, batch, cache[len(self.layers) + k], cos, sin))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (rows, H) to logits (rows, V) float32, on every rank of the lane."""
        parts = [self.ops.project_float32(hidden, shard) for shard in self.head_shards]
        return self.tp.all_gather(torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0])

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (T, R/2) float32 of the rotary embedding at positions (T,)."""
        angle = positions.float().unsqueeze(-1) * self.inv_freq
        return angle.cos() * self.args.rope_multiplier, angle.sin() * self.args.rope_multiplier


def yarn_frequencies(args: ModelArgs) -> torch.Tensor:
    """Rotary frequencies (R/2,) float32, stretched by YaRN (arXiv 2309.00071, section 3.2) if the config has it.

    A pair that turns more than beta_fast times within the original length keeps its frequency; one that turns less than
    beta_slow times has its frequency divided by the factor; between them lies a linear ramp.
    """
    dim, base = args.qk_rope_head_dim, args.rope_theta
    freqs = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if args.rope_factor == 1:
        return freqs

    def pair_turning(times: float) -> float:
        return dim * math.log(args.original_seq_len / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_turning(args.beta_fast)), 0)
    high = min(math.ceil(pair_turning(args.beta_slow)), dim - 1)
    width = high - low if high > low else 0.001  # beta_fast = beta_slow (Kimi-K2) makes the ramp a step
    slowed = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return freqs / args.rope_factor * slowed + freqs * (1 - slowed)


def _replace(module: Any, name: str, packed: Any) -> None:
    """Puts what a backend made of a parameter, a tensor or not, in its place, unless it is the parameter."""
    if packed is not getattr(module, name):
        delattr(module, name)
        setattr(module, name, packed)


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
