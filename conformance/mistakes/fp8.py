"""Mistakes of FP8 weights and activations."""


from collections.abc import Callable

import torch
from torch import Tensor

import exact_math
from exact_math import to_bfloat16
from exact_network import Network
from mistakes.registry import Change, mistake, replaced, right

# --- FP8

def _rescaled(change: Callable[[Tensor, Tensor], Tensor]) -> Change:
    """Every FP8 weight with other scales: `change` is given the right ones, spread over the weight, and themselves."""

    def apply(net: Network) -> None:
        from hashed_weights import spread

        for name, s in net.scales.items():
            shape = tuple(net.weights[name].shape)
            q = net.weights[name] / spread(s, shape)
            net.weights[name] = q * spread(change(s, s), shape)

    return apply


DEQUANT = "attn.q_a and kv_a of layer 0; attn_norm agrees; BF16 families pass"
mistake("fp8-inverse-scale", "weights are divided by weight_scale_inv", DEQUANT)(_rescaled(lambda s, _: 1 / s))
mistake("fp8-scale-left-out", "weight_scale_inv is not read", DEQUANT)(_rescaled(lambda s, _: torch.ones_like(s)))
mistake("fp8-scales-transposed", "block scales are read column by column", DEQUANT)(
    _rescaled(lambda s, _: s.mT.reshape(s.shape)))
mistake("fp8-scale-rounded", "block scales are rounded to bfloat16", f"{DEQUANT}; v3.1-fp8 passes")(
    _rescaled(lambda s, _: to_bfloat16(s)))
mistake("fp8-first-scale", "one scale, the first, for a whole weight", DEQUANT)(
    _rescaled(lambda s, _: s[:1, :1].expand(s.shape)))
mistake("fp8-ue8m0-weight-scales", "weights' scales are rounded up to powers of two", f"{DEQUANT}; v3.1-fp8 passes")(
    _rescaled(lambda s, _: exact_math.power_of_two(torch.frexp(s).exponent)))

SCALES = "the activation scales (…scale)"
replaced("fp8-scale-per-token", "activations have one scale a token instead of one per 128 channels", SCALES, "w8a8",
         act_quant=lambda net, x: _per_token(net, x))
replaced("fp8-saturation", "activation scales by 224 instead of 448", f"{SCALES}, twice as large", "w8a8",
         act_quant=lambda net, x: _other_largest(net, x, 224.0))
replaced("fp8-scales-by-240", "activation scales by 240, e4m3fnuz's largest number", SCALES, "w8a8",
         act_quant=lambda net, x: _other_largest(net, x, 240.0))
replaced("fp8-ue8m0-nearest", "UE8M0 rounds to the nearest power of two, so that values saturate", f"{SCALES} of v3.1-fp8", "w8a8",
         power_of_two=lambda net, s: exact_math.power_of_two(torch.frexp(s * (2 / 3)).exponent))
replaced("fp8-ue8m0-not-reached", "scale_fmt ue8m0 is not obeyed", f"{SCALES} of v3.1-fp8; v3-fp8 passes", "w8a8",
         power_of_two=lambda net, s: s)
replaced("fp8-ue8m0-parallel-not-reached", "scale_fmt ue8m0 does not reach the linears that ranks share (q_b, o, dense and shared MLPs), "
         "as in the original model.py", f"{SCALES} of v3.1-fp8: attn.c_q.scale; attn_norm.scale agrees", "w8a8",
         linear=lambda net, name, x, point=None: _reached(net, name, x, point, ("q_a_proj", "kv_a_proj", ".experts.")))
replaced("fp8-ue8m0-fused-not-reached", "scale_fmt ue8m0 reaches the experts' down_proj alone, not what norms and attention quantise",
         f"{SCALES} of v3.1-fp8; v3-fp8 passes", "w8a8",
         linear=lambda net, name, x, point=None: _reached(net, name, x, point, ("down_proj",), ".experts."))
replaced("fp8-ue8m0-experts-not-reached", "scale_fmt ue8m0 does not reach the experts' down_proj", "ffn.routed of v3.1-fp8; v3-fp8 passes", "w8a8",
         linear=lambda net, name, x, point=None: _down_not_reached(net, name, x, point))
replaced("fp8-ue8m0-always", "activation scales are powers of two without scale_fmt", f"{SCALES} of v3-fp8; v3.1-fp8 passes", "w8a8",
         act_quant=lambda net, x: _always(net, x))
replaced("fp8-ue8m0-after-division", "the data is divided by the scale of before it was rounded", "attn.q_a of v3.1-fp8; its scales agree", "w8a8",
         act_quant=lambda net, x: _after_division(net, x))
replaced("fp8-silently-w8a16", "activations are not quantised (W8A16)", "attn.q_a by some percent; BF16 families pass", "w8a8",
         quantises=lambda net, name: False)
replaced("fp8-experts-silently-w8a16", "the input of the experts' down_proj is not quantised", "ffn.routed by some percent; ids agree", "w8a8",
         quantises=lambda net, name: right(net, "quantises", name) and not (".experts." in name and "down_proj" in name))
replaced("fp8-kv-b-quantised", "kv_b_proj's input is quantised too (not a mistake: what attention without absorption does)",
         "attn.o by some percent; latents agree", "w8a8", quantises=lambda net, name: True)
replaced("fp8-activation-scale-left-out", "activations' scales are forgotten", "attn.q_a and kv_a of layer 0", "w8a8",
         dequantised=lambda net, q, s: q)
replaced("fp8-sum-in-bfloat16", "products of 128 channels are added up in bfloat16", "attn.q_a by 0.3 %", "w8a8",
         fp8_product=lambda net, name, x: _coarse(net, name, x))


def _blocks(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))


def _by_scales(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return exact_math.to_e4m3(_blocks(x) / s.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]], s


def _formatted(net: Network, s: Tensor) -> Tensor:
    s = s.float().double()
    return net.power_of_two(s) if net.config["quantization_config"].get("scale_fmt") == "ue8m0" else s


def _per_token(net: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    s = (x.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448).expand(-1, -(-x.shape[-1] // 128))
    return _by_scales(x, _formatted(net, s))


def _other_largest(net: Network, x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    return _by_scales(x, _formatted(net, _blocks(x).abs().amax(-1).clamp(min=1e-4) / largest))


def _always(net: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    return _by_scales(x, net.power_of_two((_blocks(x).abs().amax(-1).clamp(min=1e-4) / 448).float().double()))


def _reached(net: Network, name: str, x: Tensor, point: str | None, reached: tuple[str, ...], also: str = "") -> Tensor:
    return _linear(net, name, x, point, any(part in name for part in reached) and also in name)


def _down_not_reached(net: Network, name: str, x: Tensor, point: str | None) -> Tensor:
    return _linear(net, name, x, point, not (".experts." in name and "down_proj" in name))


def _linear(net: Network, name: str, x: Tensor, point: str | None, obeyed: bool) -> Tensor:
    """A linear whose activation scales obey scale_fmt, or not."""
    net.power_of_two = (lambda s: right(net, "power_of_two", s)) if obeyed else (lambda s: s)  # type: ignore[method-assign]
    return right(net, "linear", name, x, point)  # type: ignore[no-any-return]


def _after_division(net: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    plain = (_blocks(x).abs().amax(-1).clamp(min=1e-4) / 448).float().double()
    return _by_scales(x, plain)[0], _formatted(net, plain)


def _coarse(net: Network, name: str, x: Tensor) -> Tensor:
    total = x.new_zeros(())
    for k in range(0, x.shape[1], 128):
        total = to_bfloat16(total + net.math.product(x[:, k : k + 128], net.weights[name][:, k : k + 128]))
    return total
