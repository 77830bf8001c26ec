"""Mistakes of norms, the head and the MTP module."""


import torch

from exact_math import to_bfloat16
from exact_network import Network
from mistakes.registry import mistake, replaced, right

# --- norms

@mistake("norm-eps", "rms_norm_eps is not read but taken for 1e-6", "layers.0.attn_norm by 0.1 %; eps of 1e-6 passes")
def _(net: Network) -> None:
    net.eps = 1e-6


@mistake("norm-inner-eps", "q_a_layernorm and kv_a_layernorm take rms_norm_eps instead of 1e-6", "attn.c_kv by 0.1 %; kv_a agrees")
def _(net: Network) -> None:
    net.inner_eps = net.eps


replaced("norm-attention-eps", "input_layernorm alone takes 1e-6 instead of rms_norm_eps", "layers.0.attn_norm by 0.1 %; eps of 1e-6 passes",
         attn_norm=lambda net, at, x: net.norm(x, net.weights[f"{at}.input_layernorm.weight"], 1e-6))
replaced("norm-latent-eps", "kv_a_layernorm alone takes rms_norm_eps instead of 1e-6", "attn.c_kv by 0.1 %; c_q agrees",
         latent_norm=lambda net, at, x: net.norm(x, net.weights[f"{at}.kv_a_layernorm.weight"], net.eps))
replaced("norm-of-queries-left-out", "queries without q_a_layernorm", "attn.c_q; families without q_lora_rank pass",
         query_norm=lambda net, at, q_a: q_a)
replaced("norm-of-latents-left-out", "latents are cached without kv_a_layernorm", "attn.c_kv; kv_a agrees",
         latent_norm=lambda net, at, c_kv: c_kv)
replaced("norm-wrong-one", "the feed-forward behind the attention's norm weight", "ffn_norm; after_attn agrees",
         ffn_norm=lambda net, at, x: net.norm(x, net.weights[f"{at}.input_layernorm.weight"], net.eps))
replaced("norm-final-left-out", "no norm before the head", "norm", final_norm=lambda net, x: x)
replaced("norm-in-the-residual", "the residual stream goes on from behind the norms", "after_attn; attn.out agrees",
         add_attention=lambda net, x, normed, out: normed + out, add_ffn=lambda net, x, normed, out: normed + out)
replaced("norm-rounded-twice", "x / rms(x) is rounded to bfloat16 before it is multiplied by the weight", "layers.0.attn_norm by 0.2 %",
         norm=lambda net, x, w, eps: to_bfloat16(right(net, "norm", x, torch.ones_like(w), eps)) * w)
replaced("norm-weight-plus-one", "norm weights count from 1 (as Gemma's do)", "layers.0.attn_norm by half",
         norm=lambda net, x, w, eps: right(net, "norm", x, w + 1, eps))
replaced("norm-logits-in-bfloat16", "logits are rounded to bfloat16", "logits by 0.2 %; norm agrees",
         head=lambda net, hidden: to_bfloat16(right(net, "head", hidden)))
replaced("head-of-the-embedding", "the embedding's weights as head (tie_word_embeddings)", "logits; norm agrees",
         head=lambda net, hidden: net.math.product(hidden, net.weights["model.embed_tokens.weight"]))

# --- the MTP module

replaced("mtp-concat-order", "eh_proj is given the hidden state first, as the report writes it", "mtp.0.combined; enorm and hnorm agree",
         joined=lambda net, e, h: torch.cat((h, e), -1))
replaced("mtp-before-the-final-norm", "the MTP module takes the hidden state of before the final norm", "mtp.0.hnorm",
         mtp_hidden=lambda net, last, hidden: last)
replaced("mtp-final-norm-twice", "the final norm is applied once more to the MTP module's hidden state", "mtp.0.hnorm",
         mtp_hidden=lambda net, last, hidden: net.final_norm(hidden))
replaced("mtp-main-norm", "the main model's norm instead of shared_head.norm", "mtp.0.norm; mtp.0.hidden agrees",
         mtp_norm_weight=lambda net, at: net.weights["model.norm.weight"])
replaced("mtp-same-token", "the MTP module is given the token itself instead of the next", "mtp.0.embed",
         next_tokens=lambda net, ids: ids[:-1])


@mistake("mtp-norms-swapped", "enorm and hnorm change places", "mtp.0.enorm and hnorm; mtp.0.embed agrees")
def _(net: Network) -> None:
    for name in [name for name in net.weights if name.endswith(".enorm.weight")]:
        other = name.replace("enorm", "hnorm")
        net.weights[name], net.weights[other] = net.weights[other], net.weights[name]
