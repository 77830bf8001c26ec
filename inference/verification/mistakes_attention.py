"""Known mistakes of attention: projections, RoPE and YaRN, the softmax's scale, the mask, W^UK and W^UV."""

import math
from dataclasses import replace
from typing import Any

import torch

from model import yarn_frequencies
from verification.expected import COMPUTE, Expected
from verification.mistakes import mistake, require


def is_yarn(e: Expected) -> bool:
    return e.args.rope_factor > 1


def unrotated(e: Expected, point: str, layer: str, at: torch.Tensor) -> torch.Tensor:
    """What RoPE is given at q_rope or k_rope."""
    if point == "attn.q_rope":
        return e.queries(layer, at)[..., e.args.qk_nope_head_dim :]
    return e.value(f"{layer}.attn.kv_a", at)[:, e.args.kv_lora_rank :]


def on_rope(name: str, sentence: str, applies: Any = lambda e: True) -> Any:
    """A mistake at queries and at keys apart: a port may make it at one of them alone. The function is given what is
    to be rotated (n, …, R), and its positions (n,)."""

    def add(how: Any) -> Any:
        for point, whose in (("attn.q_rope", "queries"), ("attn.k_rope", "keys")):

            def one(e: Expected, layer: str, at: torch.Tensor, point: str = point) -> torch.Tensor:
                return e.round(how(e, unrotated(e, point, layer, at), at))

            mistake(f"{name}:{point[-6]}", point, sentence.replace("WHOSE", whose), applies)(one)
        return how

    return add


def by_halves(x: torch.Tensor) -> torch.Tensor:
    """Channels i and i + R/2 as pairs 2i and 2i + 1."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def to_halves(x: torch.Tensor) -> torch.Tensor:
    """The opposite."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def as_read(e: Expected, x: torch.Tensor) -> torch.Tensor:
    """Channels that a program left in the weights' order, as a trace that says rope_layout halves is read."""
    return by_halves(x) if e.halves else x


@on_rope("rope-halves", "RoPE turns channels i and i + R/2 of WHOSE; these weights are interleaved, pairs are 2i and 2i + 1")
def _halves(e: Expected, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return as_read(e, to_halves(e.rotate(by_halves(x), at)))


@on_rope("rope-layout", "WHOSE have their rotary channels in another order than the trace says (2i at i and 2i + 1 at i + R/2, or not): "
         "harmless if queries and keys both have; then correct rope_layout in trace.json")  # fmt: skip
def _layout(e: Expected, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    turned = e.rotate(x, at)
    return by_halves(turned) if e.halves else to_halves(turned)


@on_rope("rope-missing", "WHOSE are not rotated")
def _missing(e: Expected, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return as_read(e, x)


@on_rope("rope-position-plus-one", "RoPE of WHOSE begins at position 1")
def _plus_one(e: Expected, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return e.rotate(x, at + 1)


@on_rope("rope-position-minus-one", "RoPE of WHOSE has each token's position less one")
def _minus_one(e: Expected, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return e.rotate(x, (at - 1).clamp(min=0))


@on_rope("rope-direction", "RoPE turns WHOSE the other way: sin has the wrong sign")
def _direction(e: Expected, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return e.rotate(x, -at)


@on_rope("rope-no-yarn", "RoPE of WHOSE has frequencies without YaRN, which applies whatever the context length is", is_yarn)
def _no_yarn(e: Expected, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return e.rotate(x, at, yarn_frequencies(replace(e.args, rope_factor=1.0)))


@on_rope("rope-linear", "all frequencies of WHOSE are divided by YaRN's factor, as linear scaling does", is_yarn)
def _linear(e: Expected, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return e.rotate(x, at, yarn_frequencies(replace(e.args, rope_factor=1.0)) / e.args.rope_factor)


@on_rope("rope-no-ramp", "YaRN of WHOSE has a step where the ramp between beta_fast and beta_slow belongs", is_yarn)
def _no_ramp(e: Expected, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    plain = yarn_frequencies(replace(e.args, rope_factor=1.0))
    turns = plain * e.args.original_seq_len / (2 * math.pi)
    return e.rotate(x, at, torch.where(turns > e.args.beta_slow, plain, plain / e.args.rope_factor))


@on_rope("rope-yarn-inverted", "YaRN's ramp of WHOSE is inverted: slow pairs keep their frequency and fast ones are divided", is_yarn)
def _inverted(e: Expected, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    plain = yarn_frequencies(replace(e.args, rope_factor=1.0))
    return e.rotate(x, at, plain + plain / e.args.rope_factor - yarn_frequencies(e.args))


@on_rope("rope-yarn-length", "YaRN of WHOSE uses the extended length in the place of original_max_position_embeddings", is_yarn)
def _length(e: Expected, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return e.rotate(x, at, yarn_frequencies(replace(e.args, original_seq_len=e.args.max_seq_len)))


@on_rope("rope-mscale", "cos and sin of WHOSE are multiplied by YaRN's temperature, which belongs to the softmax's scale", is_yarn)
def _mscale(e: Expected, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return e.rotate(x, at) * temperature(e)


def temperature(e: Expected) -> float:
    """YaRN's, not squared, of the softmax's scale."""
    return math.sqrt(e.args.softmax_scale * math.sqrt(e.args.qk_head_dim))


def _theta(theta: float) -> Any:
    def how(e: Expected, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        require(theta != e.args.rope_theta)
        return e.rotate(x, at, yarn_frequencies(replace(e.args, rope_theta=theta)))

    return how


for theta in (1e4, 5e4, 1e6):
    on_rope(f"rope-theta-{theta:.0f}", f"rope_theta of WHOSE is {theta:.0f}, not the config's")(_theta(theta))


@on_rope("rope-width", "RoPE's frequencies of WHOSE are those of the whole head, not of its R rotary channels")
def _width(e: Expected, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    r, d = e.args.qk_rope_head_dim, e.args.qk_head_dim
    inv = 1.0 / e.args.rope_theta ** (torch.arange(0, r, 2, dtype=torch.float32) / d)
    return e.rotate(x, at, inv)


@mistake("rope-on-nope", "attn.q_nope", "RoPE turns the queries' first channels, which have no position")
def _on_nope(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    q, r = e.queries(layer, at), e.args.qk_rope_head_dim
    require(r <= e.args.qk_nope_head_dim)
    nope = q[..., : e.args.qk_nope_head_dim]
    return e.round(torch.cat((e.rotate(nope[..., :r], at), nope[..., r:]), dim=-1))


def _split_queries(name: str, sentence: str, how: Any) -> None:
    """how: from the queries' product (n, N (dn + R)) to what is taken for the two parts."""

    def part(e: Expected, layer: str, at: torch.Tensor, which: int) -> torch.Tensor:
        flat = e.queries(layer, at).flatten(1)
        nope, rope = how(e, flat)
        return nope if not which else e.round(e.rotate(rope, at))  # type: ignore[no-any-return]

    for which, point in enumerate(("attn.q_nope", "attn.q_rope")):
        mistake(f"{name}:{('nope', 'rope')[which]}", point, sentence)(
            lambda e, layer, at, which=which: part(e, layer, at, which)
        )


def _rope_first(e: Expected, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    heads = flat.unflatten(-1, (e.args.n_heads, -1))
    r = e.args.qk_rope_head_dim
    return heads[..., r:], heads[..., :r]


def _all_nope_first(e: Expected, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n = e.args.n_heads
    nope, rope = flat.split([n * e.args.qk_nope_head_dim, n * e.args.qk_rope_head_dim], dim=-1)
    return nope.unflatten(-1, (n, -1)), rope.unflatten(-1, (n, -1))


def _heads_last(e: Expected, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    heads = flat.unflatten(-1, (-1, e.args.n_heads)).transpose(-1, -2)
    dn = e.args.qk_nope_head_dim
    return heads[..., :dn], heads[..., dn:]


_split_queries("q-rope-first", "a head's rotary channels are taken first; they are its last R", _rope_first)
_split_queries("q-not-by-head", "queries are split into q^C of all heads and q^R of all heads; each head has both", _all_nope_first)
_split_queries("q-heads-last", "queries are reshaped to (channels, heads); they lie head by head", _heads_last)


@mistake("q-unscaled-latent", "attn.q_nope", "queries are projected from c^Q before its norm", lambda e: e.args.q_lora_rank > 0)
def _q_unnormed(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    y = e.product(e.value(f"{layer}.attn.q_a", at), f"{layer}.attn.wq_b.weight").unflatten(-1, (e.args.n_heads, -1))
    return y[..., : e.args.qk_nope_head_dim]


@mistake("kv-rope-first", "attn.c_kv", "the latent is taken from kv_a's last C channels; the rotary key is last")
def _kv_rope_first(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    x = e.value(f"{layer}.attn.kv_a", at)[:, e.args.qk_rope_head_dim :]
    return e.norm(x, f"{layer}.attn.kv_norm.weight", 1e-6)


@mistake("k-rope-first", "attn.k_rope", "the rotary key is taken from kv_a's first R channels; it is its last")
def _k_rope_first(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.round(e.rotate(e.value(f"{layer}.attn.kv_a", at)[:, : e.args.qk_rope_head_dim], at))


@mistake("k-rope-normed", "attn.k_rope", "the rotary key is normed with the latent; it is not normed at all")
def _k_normed(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    x, c = e.value(f"{layer}.attn.kv_a", at), e.args.kv_lora_rank
    scale = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return e.round(e.rotate(x[:, c:] / scale, at))


# --- scores ----------------------------------------------------------------------------------------------------------


def on_scale(name: str, sentence: str, scale: Any, applies: Any = lambda e: True) -> None:
    def how(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
        wrong = scale(e)
        require(not math.isclose(wrong, e.args.softmax_scale))
        return e.round(e.attend(layer, at, scale=wrong))

    mistake(name, "attn.o", sentence, applies)(how)


on_scale("scale-no-temperature", "the softmax's scale lacks YaRN's temperature, (0.1 mscale_all_dim ln(factor) + 1)^2",
         lambda e: e.args.qk_head_dim**-0.5, is_yarn)  # fmt: skip
on_scale("scale-temperature-once", "YaRN's temperature is in the softmax's scale once; it is squared",
         lambda e: e.args.qk_head_dim**-0.5 * temperature(e), is_yarn)  # fmt: skip
on_scale("scale-temperature-twice", "YaRN's temperature is applied twice to the softmax's scale",
         lambda e: e.args.qk_head_dim**-0.5 * temperature(e) ** 4, is_yarn)  # fmt: skip
on_scale("scale-temperature-divided", "the softmax's scale is divided by YaRN's temperature",
         lambda e: e.args.qk_head_dim**-0.5 / temperature(e) ** 2, is_yarn)  # fmt: skip
on_scale("scale-mscale-one", "mscale_all_dim is taken for 1 in the softmax's scale",
         lambda e: e.args.qk_head_dim**-0.5 * (0.1 * math.log(e.args.rope_factor) + 1) ** 2, is_yarn)  # fmt: skip
on_scale("scale-nope-only", "the softmax's scale is that of dn channels; queries have dn + R",
         lambda e: e.args.softmax_scale * (e.args.qk_head_dim / e.args.qk_nope_head_dim) ** 0.5)  # fmt: skip
on_scale("scale-values", "the softmax's scale is that of the values' dv channels; queries have dn + R",
         lambda e: e.args.softmax_scale * (e.args.qk_head_dim / e.args.v_head_dim) ** 0.5)  # fmt: skip
on_scale("scale-latent", "the softmax's scale is that of the absorbed queries' C + R channels; it stays that of dn + R",
         lambda e: e.args.softmax_scale * (e.args.qk_head_dim / e.args.latent_dim) ** 0.5)  # fmt: skip
on_scale("scale-hidden", "the softmax's scale is that of hidden size / heads", lambda e: (e.args.dim / e.args.n_heads) ** -0.5)
on_scale("scale-missing", "scores are not scaled", lambda e: 1.0)
on_scale("scale-twice", "the softmax's scale is applied twice", lambda e: e.args.softmax_scale**2)


def on_mask(name: str, sentence: str, sees: Any) -> None:
    mistake(name, "attn.o", sentence)(lambda e, layer, at: e.round(e.attend(layer, at, sees=sees)))


on_mask("mask-sees-next", "a token sees the one after it: the causal mask is off by one", lambda q, k: k <= q + 1)
on_mask("mask-not-itself", "a token does not see itself: the causal mask is off by one", lambda q, k: (k < q) | ((q == 0) & (k == 0)))
on_mask("mask-missing", "there is no causal mask: a token sees all of its sequence", lambda q, k: k >= 0)
on_mask("mask-first-hidden", "a token does not see position 0", lambda q, k: (k <= q) & ((k > 0) | (q == 0)))
on_mask("cache-itself-alone", "a token sees itself alone: cached latents are not read", lambda q, k: k == q)
on_mask("cache-last-page", "a token sees the page of 64 that it lies in, and no earlier one", lambda q, k: (k <= q) & (k // 64 == q // 64))


@mistake("scores-without-rope", "attn.o", "scores lack the rotary part q^R k^R")
def _no_rope(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.round(e.attend(layer, at, parts="nope"))


@mistake("scores-rope-only", "attn.o", "scores lack the part without positions, q^C k^C")
def _rope_only(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.round(e.attend(layer, at, parts="rope"))


def on_kv_weights(name: str, sentence: str, split: Any) -> None:
    """split: from the weight of kv_b (N (dn + dv), C) to W^UK (N, dn, C) and W^UV (N, dv, C)."""

    def how(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
        return COMPUTE["attn.o"](e.instead({"kv_weights": split}), layer, at)

    mistake(name, "attn.o", sentence)(how)


def _values_first(e: Expected, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    w_uv, w_uk = w.unflatten(0, (e.args.n_heads, -1)).split([e.args.v_head_dim, e.args.qk_nope_head_dim], dim=1)
    return w_uk, w_uv


def _keys_of_all_first(e: Expected, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n = e.args.n_heads
    w_uk, w_uv = w.split([n * e.args.qk_nope_head_dim, n * e.args.v_head_dim])
    return w_uk.unflatten(0, (n, -1)), w_uv.unflatten(0, (n, -1))


def _kv_heads_last(e: Expected, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    by_head = w.unflatten(0, (-1, e.args.n_heads)).transpose(0, 1)
    w_uk, w_uv = by_head.split([e.args.qk_nope_head_dim, e.args.v_head_dim], dim=1)
    return w_uk, w_uv


def _heads_reversed(e: Expected, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    by_head = w.unflatten(0, (e.args.n_heads, -1))
    w_uk, w_uv = by_head.split([e.args.qk_nope_head_dim, e.args.v_head_dim], dim=1)
    return w_uk, w_uv.roll(1, 0)


on_kv_weights("kv-b-values-first", "W^UV is taken from the first rows of a head in kv_b_proj; W^UK is first", _values_first)
on_kv_weights("kv-b-not-by-head", "kv_b_proj is split into W^UK of all heads and W^UV of all heads; each head has both", _keys_of_all_first)
on_kv_weights("kv-b-heads-last", "kv_b_proj is reshaped to (channels, heads); it lies head by head", _kv_heads_last)
on_kv_weights("kv-heads-shifted", "values are those of the neighbouring head", _heads_reversed)


@mistake("o-heads-last", "attn.out", "heads' outputs are flattened as (dv, heads); o_proj takes them head by head")
def _o_heads_last(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    o = e.value(f"{layer}.attn.o", at).transpose(1, 2).flatten(1)
    return e.product(o, f"{layer}.attn.wo.weight")


@mistake("o-transposed", "attn.out", "o_proj is multiplied untransposed", lambda e: e.args.n_heads * e.args.v_head_dim == e.args.dim)
def _o_transposed(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.round(e.value(f"{layer}.attn.o", at).flatten(1) @ e.weight(f"{layer}.attn.wo.weight"))
