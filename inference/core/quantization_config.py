"""What `quantization_config` says of how a checkpoint's weights are stored, in every spelling that is supported.

    fp8                 e4m3 with 128x128 block scales (DeepSeek's releases)
    blockwise_int8      int8 with 128x128 block scales (casts of R1 for GPUs without FP8)
    compressed-tensors  `pack-quantized`: INT4 or INT8 in groups of a row's channels (Kimi-K2-Thinking, Red Hat's casts)
    awq, gptq           INT4 in groups with zero points, in other orders of bits

A value that is not implemented is refused by its name: every one of these fields changes what the bits stand for.
"""

from typing import Any, NamedTuple

from core.errors import UserError

BLOCK_SIZE = 128  # FP8 scales: one per 1x128 activations and per 128x128 weights (technical report, section 3.3.2)
BLOCK = [BLOCK_SIZE, BLOCK_SIZE]  # as weight_block_size has it: null would mean one scale a weight
GROUP_SIZES = (32, 64, 128)
UNCONVERTED = ("modules_to_not_convert", "ignored_layers", "ignore")  # fields that name modules which are not quantised
WHERE = "quantization_config"


class Quantisation(NamedTuple):
    """How the quantised weights of a checkpoint are stored."""

    method: str  # quant_method
    dtype: str  # of the weights: ModelArgs.dtype
    scale_fmt: str | None = None
    group_size: int = 0  # channels of a row that share a scale; 0: blocks of 128 by 128
    zero_points: bool = False
    zero_offset: int = 0  # what is added to a stored zero point (GPTQ's first format: 1)


def quantisation(raw: dict[str, Any]) -> Quantisation | None:
    """How a Hugging Face config says that weights are quantised; None where they are not. Raises UserError."""
    quant = raw.get(WHERE)
    if quant and not isinstance(quant, dict):
        raise UserError(f"config: {WHERE} is {quant!r}, expected an object")
    if not quant:
        return None
    method = quant.get("quant_method")
    if method not in METHODS:
        found = f"{WHERE}.quant_method {method!r}"
        found += f" ({quant['format']})" if isinstance(quant.get("format"), str) else ""
        known = f"{', '.join(map(repr, METHODS))}, or no {WHERE}: weights in bfloat16, float16 or float32"
        raise UserError(f"config: {found} is not supported (known: {known})")
    for name in UNCONVERTED:
        if not isinstance(quant.get(name) or [], list):
            raise UserError(f"config: {WHERE}.{name} is {quant[name]!r}, expected a list of modules")
    return METHODS[method](quant)


def _fp8(quant: dict[str, Any]) -> Quantisation:
    usual: dict[str, Any] = {"fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": BLOCK}
    _require(usual | quant, "", **{name: (value,) for name, value in usual.items()})
    # transformers 5 writes "float" for scales that are no powers of two
    scale_fmt = quant.get("scale_fmt")
    return Quantisation("fp8", "fp8", None if scale_fmt == "float" else scale_fmt)


def _blockwise_int8(quant: dict[str, Any]) -> Quantisation:
    usual: dict[str, Any] = {"activation_scheme": "dynamic", "weight_block_size": BLOCK}
    _require(usual | quant, "", **{name: (value,) for name, value in usual.items()})
    return Quantisation("blockwise_int8", "int8")


def _compressed_tensors(quant: dict[str, Any]) -> Quantisation:
    _require(quant, format=("pack-quantized",), quantization_status=("compressed", None), kv_cache_scheme=(None,),
             sparsity_config=(None, {}), transform_config=(None, {}))  # fmt: skip
    groups = quant.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        raise UserError(f"config: {WHERE}.config_groups is {groups!r}, expected an object with a group")
    found: set[Quantisation] = set()
    for name, group in groups.items():
        where = f"config_groups.{name}"
        _require(group, where, input_activations=(None,), output_activations=(None,), format=("pack-quantized", None))
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise UserError(f"config: {WHERE}.{where}.weights is {weights!r}, expected an object")
        # "static", once "weight", orders channels while it quantises and leaves the groups where they are
        _require(weights, f"{where}.weights", num_bits=(4, 8), type=("int",), strategy=("group",),
                 dynamic=(False, None), block_structure=(None,), actorder=(None, False, "static", "weight"),
                 group_size=GROUP_SIZES, symmetric=(True, False))  # fmt: skip
        if weights["num_bits"] == 8:
            _require(weights, f"{where}.weights", symmetric=(True,))
        dtype = f"int{weights['num_bits']}"
        found.add(
            Quantisation("compressed-tensors", dtype, None, weights["group_size"], zero_points=not weights["symmetric"])
        )
    if len(found) > 1:
        raise UserError(f"config: {WHERE}.config_groups has groups of different weights, which is not supported")
    return found.pop()


def _awq(quant: dict[str, Any]) -> Quantisation:
    lower = quant | {name: quant[name].lower() for name in ("version",) if isinstance(quant.get(name), str)}
    _require(lower, version=("gemm", None), bits=(4,), group_size=GROUP_SIZES, zero_point=(True,))
    return Quantisation("awq", "int4", None, quant["group_size"], zero_points=True)


def _gptq(quant: dict[str, Any]) -> Quantisation:
    if quant.get("desc_act"):
        says = "act-order, which scatters a group's channels over the row, is not supported"
        raise UserError(f"config: {WHERE}.desc_act is true: {says}; get a cast that was made without it")
    _require(quant, bits=(4,), group_size=GROUP_SIZES, checkpoint_format=("gptq", "gptq_v2", None))
    offset = 0 if quant.get("checkpoint_format") == "gptq_v2" else 1
    return Quantisation("gptq", "int4", None, quant["group_size"], zero_points=True, zero_offset=offset)


METHODS = {"fp8": _fp8, "blockwise_int8": _blockwise_int8, "compressed-tensors": _compressed_tensors, "awq": _awq,
           "gptq": _gptq}  # fmt: skip


def _require(fields: dict[str, Any], within: str = "", **known: tuple[Any, ...]) -> None:
    """Raises UserError for a field with another value than those known, of which None stands for its absence."""
    for name, values in known.items():
        value = fields.get(name)
        if not any(value == one and type(value) is type(one) for one in values):
            said = ", ".join(repr(one) for one in values if one is not None) or "none"
            where = ".".join(part for part in (WHERE, within, name) if part)
            raise UserError(f"config: {where} {value!r} is not supported (known: {said})")
