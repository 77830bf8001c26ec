"""Known mistakes of quantised weights and activations: block scales, their format, FP8's largest number."""

from typing import Any

import torch

from ops import reference
from verification.expected import COMPUTE, Expected, quantise
from verification.mistakes import mistake, require
from verification.weights import StoredWeight

PROJECTIONS = "attn.q_a attn.q_nope attn.q_rope attn.kv_a attn.out ffn.routed ffn.shared ffn.out"


def is_quantised(e: Expected) -> bool:
    return e.args.is_quantised


def is_fp8(e: Expected) -> bool:
    return e.args.dtype == "fp8"


def in_w8a8(e: Expected) -> bool:
    return e.numerics.gemm == "fp8"


def _at_products(name: str, sentence: str, overrides: dict[str, Any], applies: Any, points: str = PROJECTIONS) -> None:
    """A mistake that shows at every product by a quantised weight; a port may make it at some, so it is tried at each."""
    for point in points.split():

        def how(e: Expected, layer: str, at: torch.Tensor, point: str = point) -> torch.Tensor:
            require(point != "ffn.out" or e.is_dense(layer))
            return COMPUTE[point](e.instead(overrides), layer, at)

        mistake(f"{name}:{point}", point, sentence, applies)(how)


def on_weights(name: str, sentence: str, applies: Any = is_quantised, points: str = PROJECTIONS) -> Any:
    """A mistake in dequantisation. The function is given the stored rows, the weight's name, and the first row's number."""

    def add(how: Any) -> Any:
        _at_products(name, sentence, {"weight": how}, applies, points)
        return how

    return add


def values_of(stored: StoredWeight) -> torch.Tensor:
    return reference.widened(stored.data, stored.form.block, stored.zero).double()


@on_weights("scale-missing", "block scales are not applied")
def _missing(e: Expected, stored: StoredWeight, name: str, first: int) -> torch.Tensor:
    return values_of(stored)


@on_weights("scale-divided", "weights are divided by weight_scale_inv; they are multiplied by it, whatever its name says")
def _divided(e: Expected, stored: StoredWeight, name: str, first: int) -> torch.Tensor:
    assert stored.scale is not None
    return values_of(stored) / stored.spread(stored.scale)


@on_weights("scale-transposed", "block scales are applied transposed: the scale of block (i, j) to block (j, i)", is_fp8)
def _transposed(e: Expected, stored: StoredWeight, name: str, first: int) -> torch.Tensor:
    scale = e.weights.stored(name).scale
    assert scale is not None
    require(scale.shape[0] > 1 or scale.shape[1] > 1)
    turned = scale.float().T.reshape(-1).reshape(scale.shape)  # as the same memory read in the other order
    if scale.shape[0] == scale.shape[1]:
        turned = scale.float().T
    rows = first // stored.form.block[0]
    return values_of(stored) * stored.spread(turned[rows:])


@on_weights("scale-of-tensor", "the first block's scale is applied to the whole weight", is_fp8)
def _of_tensor(e: Expected, stored: StoredWeight, name: str, first: int) -> torch.Tensor:
    scale = e.weights.stored(name, 0, min(e.weights.shape(name)[0], stored.form.block[0])).scale
    assert scale is not None
    require(scale.shape[1] > 1 or e.weights.shape(name)[0] > stored.form.block[0])
    return values_of(stored) * float(scale[0, 0])


@on_weights("scale-of-row-blocks", "each row of blocks has its first scale: the columns' are not told apart", is_fp8)
def _of_rows(e: Expected, stored: StoredWeight, name: str, first: int) -> torch.Tensor:
    assert stored.scale is not None
    require(stored.scale.shape[1] > 1)
    return values_of(stored) * stored.spread(stored.scale[:, :1].expand_as(stored.scale))


@on_weights("scale-of-column-blocks", "each column of blocks has its first scale: the rows' are not told apart", is_fp8)
def _of_columns(e: Expected, stored: StoredWeight, name: str, first: int) -> torch.Tensor:
    scale = e.weights.stored(name).scale
    assert scale is not None and stored.scale is not None
    require(scale.shape[0] > 1)
    return values_of(stored) * stored.spread(scale[:1].expand_as(stored.scale))


@on_weights("scale-tiled", "block scales are repeated as a pattern (0, 1, 2, 0, 1, 2 …) in the place of runs of 128", is_fp8)
def _tiled(e: Expected, stored: StoredWeight, name: str, first: int) -> torch.Tensor:
    scale = e.weights.stored(name).scale
    assert scale is not None
    k, at = stored.data.shape[1], torch.arange(first, first + stored.data.shape[0])
    require(scale.numel() > 1)
    return values_of(stored) * scale.double()[at % scale.shape[0]][:, torch.arange(k) % scale.shape[1]]


@on_weights("scale-ragged-lost", "the last, partial block of rows is not scaled (576 rows are 4.5 blocks)", is_fp8, "attn.kv_a")
def _ragged(e: Expected, stored: StoredWeight, name: str, first: int) -> torch.Tensor:
    rows = e.weights.shape(name)[0]
    require(rows % 128 != 0)
    w = stored.exact()
    lost = max(rows // 128 * 128 - first, 0)
    w[lost:] = values_of(stored)[lost:]
    return w


@on_weights("scale-ragged-before", "the last, partial block of rows has the scale of the block before it", is_fp8, "attn.kv_a")
def _ragged_before(e: Expected, stored: StoredWeight, name: str, first: int) -> torch.Tensor:
    rows = e.weights.shape(name)[0]
    require(rows % 128 != 0 and rows > 128 and stored.scale is not None)
    assert stored.scale is not None
    scale = stored.scale.clone()
    require(len(scale) > 1)
    scale[-1] = scale[-2]
    return values_of(stored) * stored.spread(scale)


@on_weights("scale-rows-only", "block scales of 64 rows: block_size is taken for 64", is_fp8)
def _half_blocks(e: Expected, stored: StoredWeight, name: str, first: int) -> torch.Tensor:
    scale = e.weights.stored(name).scale
    assert scale is not None
    n, k = stored.data.shape
    at = (torch.arange(first, first + n) // 64).clamp(max=len(scale) - 1)
    require(len(scale) > 1)
    return values_of(stored) * scale.double()[at][:, torch.arange(k) // 128]


@on_weights("weight-fnuz", "weights' bits are read as float8_e4m3fnuz: half the value", is_fp8)
def _fnuz(e: Expected, stored: StoredWeight, name: str, first: int) -> torch.Tensor:
    return stored.exact() / 2


@on_weights("int4-nibbles", "the two INT4 numbers of a byte are swapped", lambda e: e.args.dtype == "int4")
def _nibbles(e: Expected, stored: StoredWeight, name: str, first: int) -> torch.Tensor:
    return stored.exact().unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


@on_weights("int4-zero-point", "INT4 numbers are taken without their zero point", lambda e: e.args.dtype == "int4")
def _zero_point(e: Expected, stored: StoredWeight, name: str, first: int) -> torch.Tensor:
    assert stored.scale is not None
    return reference.unpack_int4(stored.data).double() * stored.spread(stored.scale)


# --- activations -----------------------------------------------------------------------------------------------------


def on_activations(name: str, sentence: str, applies: Any = in_w8a8) -> Any:
    """A mistake in the quantisation of activations. The function is given them, (n, K)."""

    def add(how: Any) -> Any:
        _at_products(name, sentence, {"activations": how}, applies)
        return how

    return add


@on_activations("activations-plain", "activations are not quantised: the run is W8A16, though W8A8 is what it says")
def _plain(e: Expected, x: torch.Tensor) -> torch.Tensor:
    return x


@on_activations("activations-fp8", "activations are quantised to FP8 (W8A8), though plain ones are what the run says",
                lambda e: is_fp8(e) and not in_w8a8(e))  # fmt: skip
def _quantised(e: Expected, x: torch.Tensor) -> torch.Tensor:
    return quantise(x, e.args.scale_fmt == "ue8m0")


@on_activations("ue8m0-ignored", "activations' scales are any float32; this checkpoint's scale_fmt is ue8m0, powers of two",
                lambda e: in_w8a8(e) and e.numerics.scale_fmt == "ue8m0")  # fmt: skip
def _ue8m0_ignored(e: Expected, x: torch.Tensor) -> torch.Tensor:
    return quantise(x)


@on_activations("ue8m0-down", "activations' ue8m0 scales are rounded down to a power of two; they are rounded up",
                lambda e: in_w8a8(e) and e.numerics.scale_fmt == "ue8m0")  # fmt: skip
def _ue8m0_down(e: Expected, x: torch.Tensor) -> torch.Tensor:
    return quantise(x, True, up=False)


@on_activations("ue8m0-unasked", "activations' scales are powers of two; this checkpoint has no scale_fmt",
                lambda e: in_w8a8(e) and e.numerics.scale_fmt is None)  # fmt: skip
def _ue8m0_unasked(e: Expected, x: torch.Tensor) -> torch.Tensor:
    return quantise(x, True)


@on_activations("activations-240", "activations' scales are amax / 240, as float8_e4m3fnuz has it; e4m3fn's largest number is 448")
def _largest_240(e: Expected, x: torch.Tensor) -> torch.Tensor:
    return quantise(x, e.numerics.scale_fmt == "ue8m0", largest=240.0)


@on_activations("activations-by-row", "activations have one scale a token; they have one for each 128 channels")
def _by_row(e: Expected, x: torch.Tensor) -> torch.Tensor:
    require(x.shape[-1] > 128)
    return quantise(x, e.numerics.scale_fmt == "ue8m0", block=x.shape[-1])


@on_activations("activations-by-64", "activations have one scale for each 64 channels; it is 128")
def _by_64(e: Expected, x: torch.Tensor) -> torch.Tensor:
    return quantise(x, e.numerics.scale_fmt == "ue8m0", block=64)


@on_activations("activations-unscaled", "activations are cast to FP8 without scales")
def _unscaled(e: Expected, x: torch.Tensor) -> torch.Tensor:
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


@mistake("latents-quantised", "attn.c_kv", "the cache holds the latent in FP8, though the run says otherwise", lambda e: e.numerics.latents is None)
def _latents(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return quantise(COMPUTE["attn.c_kv"](e, layer, at), block=128)


@mistake("latents-plain", "attn.c_kv", "the cache does not hold the latent in FP8, though the run says so", lambda e: e.numerics.latents == "fp8")
def _latents_plain(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    c = e.value(f"{layer}.attn.kv_a", at)[:, : e.args.kv_lora_rank]
    return e.norm(c, f"{layer}.attn.kv_norm.weight", 1e-6)

