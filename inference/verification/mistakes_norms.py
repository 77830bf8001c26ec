"""Known mistakes of norms, residuals, embedding, head and the MTP module."""

from typing import Any

import torch

from model import INNER_NORM_EPS
from verification.expected import COMPUTE, Expected, rms
from verification.mistakes import mistake, require

NORMS = {  # by point: its weight within its layer, what is normed
    "attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "attn.c_q": "attn.q_norm", "attn.c_kv": "attn.kv_norm", "norm": "norm",
    "mtp.enorm": "enorm", "mtp.hnorm": "hnorm", "mtp.norm": "norm",
}  # fmt: skip
ALL = " ".join(NORMS)
INNER = "attn.c_q attn.c_kv"


def source(e: Expected, point: str, layer: str, at: torch.Tensor) -> torch.Tensor:
    """What a norm is given."""
    if point == "attn_norm":
        return e.before(layer, at)
    if point == "norm" and not layer:
        return e.value(f"layers.{e.args.n_layers - 1}.hidden", at)
    of = {"ffn_norm": "after_attn", "attn.c_q": "attn.q_a", "attn.c_kv": "attn.kv_a", "enorm": "embed", "norm": "hidden"}
    if point == "hnorm":
        return e.value("norm", at)
    x = e.value(f"{layer}.{of[point]}", at)
    return x[:, : e.args.kv_lora_rank] if point == "attn.c_kv" else x


def weight_of(e: Expected, point: str, layer: str) -> torch.Tensor:
    name = {"attn.c_q": "attn.q_norm", "attn.c_kv": "attn.kv_norm"}.get(point, point)
    return e.weights.exact(".".join(filter(None, (layer, name, "weight"))), e.dtype)


def eps_of(e: Expected, point: str) -> float:
    return INNER_NORM_EPS if point in ("attn.c_q", "attn.c_kv") else e.args.norm_eps


def on_norms(name: str, points: str, sentence: str) -> Any:
    """A mistake whose function has the point's name before its other arguments, for each of the points apart: a port
    may do it at one norm alone."""

    def add(how: Any) -> Any:
        for point in points.split():
            inner = point.removeprefix("mtp.")
            where = {"attn.c_q": "queries' latent", "attn.c_kv": "keys' and values' latent"}.get(point, point)

            def one(e: Expected, layer: str, at: torch.Tensor, inner: str = inner) -> torch.Tensor:
                return how(e, inner, layer, at)  # type: ignore[no-any-return]

            mistake(f"{name}:{point}", point, sentence.replace("NORM", f"the {where} norm".replace("norm norm", "norm")))(one)
        return how

    return add


def _with_eps(eps: float) -> Any:
    def how(e: Expected, point: str, layer: str, at: torch.Tensor) -> torch.Tensor:
        require(eps_of(e, point) != eps)
        return e.round(rms(source(e, point, layer, at), eps) * weight_of(e, point, layer))

    return how


for eps, digits in ((1e-5, "1e-5"), (1e-6, "1e-6"), (1e-12, "1e-12")):
    why = "; the two inner norms have 1e-6 whatever rms_norm_eps says" if eps == 1e-5 else ""
    on_norms(f"norm-eps-{digits}", ALL, f"eps is {digits} in NORM{why}")(_with_eps(eps))


@on_norms("norm-plus-one", ALL, "1 is added to the weight of NORM, as other families store it")
def _plus_one(e: Expected, point: str, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.round(rms(source(e, point, layer, at), eps_of(e, point)) * (1 + weight_of(e, point, layer)))


@on_norms("norm-unweighted", ALL, "NORM leaves its weight out")
def _unweighted(e: Expected, point: str, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.round(rms(source(e, point, layer, at), eps_of(e, point)))


@on_norms("norm-missing", ALL, "NORM is missing: its input is passed on")
def _missing(e: Expected, point: str, layer: str, at: torch.Tensor) -> torch.Tensor:
    return source(e, point, layer, at)


@on_norms("norm-weight-only", ALL, "NORM multiplies by its weight and does not normalise")
def _weight_only(e: Expected, point: str, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.round(source(e, point, layer, at) * weight_of(e, point, layer))


@on_norms("norm-centred", ALL, "NORM subtracts the mean, as LayerNorm does")
def _centred(e: Expected, point: str, layer: str, at: torch.Tensor) -> torch.Tensor:
    x = source(e, point, layer, at)
    return e.round(rms(x - x.mean(-1, keepdim=True), eps_of(e, point)) * weight_of(e, point, layer))


@on_norms("norm-l2", ALL, "NORM divides by the sum of squares' root, not by their mean's")
def _l2(e: Expected, point: str, layer: str, at: torch.Tensor) -> torch.Tensor:
    x = source(e, point, layer, at)
    return e.round(x / x.norm(dim=-1, keepdim=True) * weight_of(e, point, layer))


def _swapped(name: str, points: str, other: str, sentence: str) -> None:
    @mistake(name, points, sentence)
    def how(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
        point = points.removeprefix("mtp.")
        w = e.weights.exact(".".join(filter(None, (layer, other, "weight"))), e.dtype)
        return e.round(rms(source(e, point, layer, at), eps_of(e, point)) * w)


_swapped("norms-swapped:attn", "attn_norm", "ffn_norm", "attn_norm has the weight of ffn_norm (input_layernorm and "
         "post_attention_layernorm are swapped)")  # fmt: skip
_swapped("norms-swapped:ffn", "ffn_norm", "attn_norm", "ffn_norm has the weight of attn_norm (input_layernorm and "
         "post_attention_layernorm are swapped)")  # fmt: skip
_swapped("mtp-norms-swapped:e", "mtp.enorm", "hnorm", "enorm has the weight of hnorm")
_swapped("mtp-norms-swapped:h", "mtp.hnorm", "enorm", "hnorm has the weight of enorm")


@mistake("norm-of-whole-kv", "attn.c_kv", "kv_a_layernorm runs over the C + R channels of kv_a, with the rotary key's")
def _whole_kv(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    x, c = e.value(f"{layer}.attn.kv_a", at), e.args.kv_lora_rank
    return e.round(rms(x, INNER_NORM_EPS)[:, :c] * weight_of(e, "attn.c_kv", layer))


@mistake("mtp-norm-is-main", "mtp.norm", "the module's output goes through the main model's final norm, not shared_head.norm")
def _main_norm(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.norm(e.value(f"{layer}.hidden", at), "norm.weight")


# --- residuals -------------------------------------------------------------------------------------------------------


@mistake("residual-missing:attn", "after_attn", "the residual is not added to attention's output")
def _no_residual(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.value(f"{layer}.attn.out", at)


@mistake("residual-missing:ffn", "hidden", "the residual is not added to the feed-forward layer's output")
def _no_residual_ffn(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.value(f"{layer}.ffn.out", at)


@mistake("residual-normed:attn", "after_attn", "the residual is the normed input, not the input itself (post-norm)")
def _normed_residual(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.round(e.value(f"{layer}.attn_norm", at) + e.value(f"{layer}.attn.out", at))


@mistake("residual-normed:ffn", "hidden", "the residual is the normed input of the feed-forward layer, not the sum before the norm")
def _normed_residual_ffn(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.round(e.value(f"{layer}.ffn_norm", at) + e.value(f"{layer}.ffn.out", at))


@mistake("residual-early", "hidden", "the residual is the layer's input: attention's output is lost")
def _early_residual(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.round(e.before(layer, at) + e.value(f"{layer}.ffn.out", at))


@mistake("layer-output-lost", "hidden", "the feed-forward layer's output is not added")
def _lost(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.value(f"{layer}.after_attn", at)


@mistake("residual-twice", "hidden", "the residual is added twice")
def _twice(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.round(2 * e.value(f"{layer}.after_attn", at) + e.value(f"{layer}.ffn.out", at))


@mistake("ffn-norm-of-input", "ffn_norm", "ffn_norm is of the layer's input: attention's output is not added before it")
def _norm_of_input(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.norm(e.before(layer, at), f"{layer}.ffn_norm.weight")


@mistake("ffn-norm-of-attention", "ffn_norm", "ffn_norm is of attention's output alone, without the residual")
def _norm_of_attention(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.norm(e.value(f"{layer}.attn.out", at), f"{layer}.ffn_norm.weight")


# --- embedding and head ----------------------------------------------------------------------------------------------


@mistake("embed-shifted", "embed", "embeddings are of the tokens one position earlier, or ids are shifted")
def _shifted(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.embedding(e.tokens_at((at - 1).clamp(min=0)))


@mistake("embed-scaled", "embed", "embeddings are multiplied by the root of the hidden size, as in other families")
def _scaled(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return COMPUTE["embed"](e, layer, at) * e.args.dim**0.5


@mistake("head-tied", "logits mtp.logits", "the head is the embedding, but this model has one of its own", lambda e: not e.args.tie_word_embeddings)
def _tied(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.float32_product(e.value(f"{layer}.norm" if layer else "norm", at), "embed.weight")


@mistake("head-bf16", "logits mtp.logits", "logits are rounded to bfloat16, as the original demo and a plain lm_head do; float32 sums tell near ties apart")
def _head_bf16(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    x = e.value(f"{layer}.norm" if layer else "norm", at)
    return e.float32_product(x, "head.weight").bfloat16().to(e.dtype)


@mistake("final-norm-skipped", "logits mtp.logits", "the head is given the hidden state before the final norm (or shared_head.norm)")
def _before_norm(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.float32_product(e.value(f"{layer or f'layers.{e.args.n_layers - 1}'}.hidden", at), "head.weight")


@mistake("final-norm-twice", "logits mtp.logits", "the final norm is applied twice")
def _norm_twice(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    name = f"{layer}.norm" if layer else "norm"
    return e.float32_product(e.norm(e.value(name, at), f"{name}.weight"), "head.weight")


@mistake("logits-shifted", "logits mtp.logits", "logits are those of the position before: a shift by one between ids and logits")
def _logits_shifted(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.float32_product(e.value(f"{layer}.norm" if layer else "norm", (at - 1).clamp(min=0)), "head.weight")


# --- MTP -------------------------------------------------------------------------------------------------------------


@mistake("mtp-concat-order", "mtp.combined", "eh_proj is given the hidden state first; the released weights have the embedding first "
         "(equation 21 has the other order)")  # fmt: skip
def _hidden_first(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    both = torch.cat((e.value(f"{layer}.hnorm", at), e.value(f"{layer}.enorm", at)), dim=-1)
    return e.product(both, f"{layer}.eh_proj.weight")


@mistake("mtp-hidden-before-norm", "mtp.hnorm", "the module is given the hidden state before the main model's final norm")
def _unnormed(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.norm(e.value(f"layers.{e.args.n_layers - 1}.hidden", at), f"{layer}.hnorm.weight")


@mistake("mtp-token-same", "mtp.embed", "the module is given the embedding of the same token, not of the one after")
def _same_token(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.embedding(e.tokens_at(at))


@mistake("mtp-token-after-next", "mtp.embed", "the module is given the embedding of the token after the next")
def _after_next(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.embedding(e.tokens_at((at + 2).clamp(max=len(e.request.tokens) - 1)))


@mistake("mtp-first-masked", "mtp.embed", "the module's embedding at position 0 is set to zero")
def _masked(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return COMPUTE["mtp.embed"](e, layer, at).masked_fill(at[:, None] == 0, 0)


@mistake("mtp-unnormed-embedding", "mtp.combined", "eh_proj is given the embedding without enorm")
def _raw_embedding(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    both = torch.cat((e.value(f"{layer}.embed", at), e.value(f"{layer}.hnorm", at)), dim=-1)
    return e.product(both, f"{layer}.eh_proj.weight")
