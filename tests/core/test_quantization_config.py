"""quantization_config in each spelling: what is read of it, and what is refused by the name of its field."""

import copy

import pytest

from core.config import ModelArgs
from core.errors import UserError
from core.quantization_config import Quantisation, quantisation
from support.families import FAMILIES

KIMI = {  # as Kimi-K2-Thinking has it
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "kv_cache_scheme": None, "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    "config_groups": {"group_0": {
        "targets": ["Linear"], "input_activations": None, "output_activations": None,
        "weights": {"actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4,
                    "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int"},
    }},
}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
BLOCKS = {"quant_method": "blockwise_int8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
WEIGHTS = "config_groups.group_0.weights."


def changed(config: dict, path: str, value: object) -> dict:
    config = copy.deepcopy(config)
    *way, last = path.split(".")
    inner = config
    for key in way:
        inner = inner[key]
    inner[last] = value
    return config


def read(quant: dict) -> Quantisation | None:
    return quantisation({"quantization_config": quant})


@pytest.mark.parametrize(
    ("quant", "found"),
    [
        (KIMI, Quantisation("compressed-tensors", "int4", None, 32)),
        (changed(KIMI, WEIGHTS + "group_size", 128), Quantisation("compressed-tensors", "int4", None, 128)),
        (changed(KIMI, WEIGHTS + "symmetric", False), Quantisation("compressed-tensors", "int4", None, 32, True)),
        (changed(KIMI, WEIGHTS + "num_bits", 8), Quantisation("compressed-tensors", "int8", None, 32)),
        (changed(KIMI, WEIGHTS + "actorder", "static"), Quantisation("compressed-tensors", "int4", None, 32)),
        (AWQ, Quantisation("awq", "int4", None, 128, True)),
        (AWQ | {"version": "GEMM"}, Quantisation("awq", "int4", None, 128, True)),
        (GPTQ, Quantisation("gptq", "int4", None, 128, True, 1)),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, Quantisation("gptq", "int4", None, 128, True, 0)),
        (BLOCKS, Quantisation("blockwise_int8", "int8")),
    ],
)
def test_what_is_read(quant, found):
    assert read(quant) == found
    args = ModelArgs.from_hf(FAMILIES["v3"] | {"quantization_config": quant})
    assert (args.dtype, args.group_size, args.zero_points) == (found.dtype, found.group_size, found.zero_points)
    assert args.weight_block == ((1, found.group_size) if found.group_size else (128, 128))


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        (changed(KIMI, WEIGHTS + "num_bits", 3), WEIGHTS + "num_bits 3 is not supported (known: 4, 8)"),
        (changed(KIMI, WEIGHTS + "group_size", 48), WEIGHTS + "group_size 48 is not supported (known: 32, 64, 128)"),
        (changed(KIMI, WEIGHTS + "strategy", "channel"), WEIGHTS + "strategy 'channel' is not supported (known: 'group')"),
        (changed(KIMI, WEIGHTS + "actorder", "group"), WEIGHTS + "actorder 'group' is not supported"),
        (changed(KIMI, WEIGHTS + "type", "float"), WEIGHTS + "type 'float' is not supported (known: 'int')"),
        (changed(KIMI, WEIGHTS + "dynamic", True), WEIGHTS + "dynamic True is not supported"),
        (changed(changed(KIMI, WEIGHTS + "num_bits", 8), WEIGHTS + "symmetric", False), WEIGHTS + "symmetric False is not supported"),
        (changed(KIMI, "config_groups.group_0.input_activations", {"num_bits": 8}), "input_activations {'num_bits': 8} is not supported (known: none)"),
        (changed(KIMI, "config_groups.group_0.weights", None), "config_groups.group_0.weights is None, expected an object"),
        (changed(KIMI, "config_groups", {}), "config_groups is {}, expected an object with a group"),
        (changed(KIMI, "config_groups.group_1", changed(KIMI, WEIGHTS + "group_size", 64)["config_groups"]["group_0"]),
         "config_groups has groups of different weights"),
        (KIMI | {"format": "float-quantized"}, "format 'float-quantized' is not supported (known: 'pack-quantized')"),
        (KIMI | {"quantization_status": "frozen"}, "quantization_status 'frozen' is not supported"),
        (KIMI | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme {'num_bits': 8} is not supported"),
        (KIMI | {"ignore": "lm_head"}, "ignore is 'lm_head', expected a list of modules"),
        (AWQ | {"bits": 8}, "bits 8 is not supported (known: 4)"),
        (AWQ | {"version": "gemv"}, "version 'gemv' is not supported (known: 'gemm')"),
        (AWQ | {"zero_point": False}, "zero_point False is not supported (known: True)"),
        (AWQ | {"group_size": -1}, "group_size -1 is not supported"),
        (GPTQ | {"desc_act": True}, "desc_act is true: act-order, which scatters a group's channels over the row, is not supported"),
        (GPTQ | {"bits": 3}, "bits 3 is not supported"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        (BLOCKS | {"weight_block_size": [64, 64]}, "weight_block_size [64, 64] is not supported (known: [128, 128])"),
        (BLOCKS | {"activation_scheme": "static"}, "activation_scheme 'static' is not supported"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2' is not supported (known: 'e4m3')"),
        ({}, None),
        ([], None),
        ("int4", "quantization_config is 'int4', expected an object"),
    ],
)  # fmt: skip
def test_what_is_refused(quant, message):
    if message is None:
        assert quantisation({"quantization_config": quant}) is None
        return
    with pytest.raises(UserError) as error:
        read(quant)
    assert str(error.value).startswith("config: quantization_config") and message in str(error.value)
