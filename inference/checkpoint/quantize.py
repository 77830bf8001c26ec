"""A Hugging Face checkpoint with its linear layers in FP8 blocks, or its routed experts in groups of integers.

The integers are laid out as compressed-tensors writes them ("pack-quantized"): beside `X.weight_scale`, bfloat16
(N, K / group), `X.weight_packed`, int32 (N, K * bits / 32), and `X.weight_shape`, int64 (2): N and K.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from checkpoint.cast import SCALE, Copied, Dequantised, FromWeight
from checkpoint.directory import Checkpoint
from checkpoint.partition import Partition
from checkpoint.reading import Entry
from checkpoint.table import FP8, Spec
from checkpoint.transform import Output, hf_checkpoint, open_source, plain_config, write_checkpoint
from core.config import BLOCK_SIZE
from core.devices import holds
from core.errors import CheckpointError, UserError
from core.files import read_json
from core.hf_config import text_config
from core.numerics import Numerics
from ops.backend import choose_backend
from ops.weight_quant import block_quant, group_quant, pack_int32
from parallel.startup import choose_device

Format = Literal["fp8", "int4", "int8"]
FORMATS: tuple[Format, ...] = get_args(Format)
GROUP_SIZES = {"int4": (32, 128), "int8": (128, 32)}  # the default first
# of the modules that stay as they are, as compressed-tensors finds them: by a regular expression from the beginning on
IGNORED_MODULES = ("lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
                   r"re:.*mlp\.gate$", "re:.*eh_proj.*", "re:.*shared_head.*")  # fmt: skip
IGNORED_BESIDE_TEXT = ("re:.*lm_head.*", "re:.*vision_tower.*", "re:.*mm_projector.*")  # of a multimodal model as well


@dataclass(slots=True)
class Quantised(FromWeight):
    """A weight in another form, and its scales in `scales`, which wait until the weight's last row is written, so that
    a file is written from its beginning to its end."""

    scales: list[torch.Tensor]

    def quantise(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (n, C) as they are written, (n, …), and their scales."""
        raise NotImplementedError

    def write(self, scale: torch.Tensor | None, zero: torch.Tensor | None, row: int, window: torch.Tensor) -> None:
        data, s = self.quantise(self.weights(scale, zero, row, window, torch.float32))
        if not s.isfinite().all():
            wanted, found = "finite numbers", f"NaN or infinity in rows {row} to {row + len(data) - 1}"
            text = f"{self.source}: expected {wanted}, found {found}"
            raise CheckpointError(text, self.source.file, self.source.name, wanted, found)
        self.put(data.cpu(), row * data[0].nbytes)
        self.scales.append(s.cpu())
        if row + len(data) == self.source.rows:
            self.finish(torch.cat(self.scales))
            self.scales.clear()

    def finish(self, scales: torch.Tensor) -> None:
        """Writes the tensors that come with the weight."""
        raise NotImplementedError


@dataclass(slots=True)
class Blocks(Quantised):
    """e4m3 (R, C) and `_scale_inv`, float32 (ceil(R/128), ceil(C/128))."""

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        blocks = tuple(-(-n // BLOCK_SIZE) for n in self.shape)
        return {self.name: (self.dtype, self.shape), self.name + SCALE: (torch.float32, blocks)}

    def quantise(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return block_quant(w)

    def finish(self, scales: torch.Tensor) -> None:
        self.put(scales, 0, self.name + SCALE)


@dataclass(slots=True)
class Groups(Quantised):
    """`_packed`, `_scale` and `_shape` of a weight (R, C) in integers of so many bits, as the module's docstring
    says."""

    bits: int
    group_size: int

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        rows, columns = self.shape
        return {
            f"{self.name}_packed": (torch.int32, (rows, columns * self.bits // 32)),
            f"{self.name}_scale": (torch.bfloat16, (rows, columns // self.group_size)),
            f"{self.name}_shape": (torch.int64, (2,)),
        }

    def quantise(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, s = group_quant(w, self.bits, self.group_size)
        return pack_int32(q, self.bits), s

    def put(self, data: torch.Tensor, at: int, name: str | None = None) -> None:
        Output.put(self, data, at, name or f"{self.name}_packed")

    def finish(self, scales: torch.Tensor) -> None:
        self.put(scales, 0, f"{self.name}_scale")
        self.put(torch.tensor(self.shape), 0, f"{self.name}_shape")


def quantize(source: Path, target: Path, format: Format, group_size: int | None = None, device: str = "auto") -> None:
    """Writes `source` to `target` with its linear layers ("fp8") or its routed experts ("int4", "int8") quantised, on
    `device`: one of torch's names, or "auto", a GPU if any. What is not quantised stays as it is, but for FP8 weights
    of the source, which become BF16.

    Raises UserError, before anything is written to the target, for a damaged checkpoint, one that is quantised already
    (to integers; for "fp8", to FP8), a group size that does not divide a weight's width or is none of GROUP_SIZES, a
    missing GPU, or a target that cannot be written to; and, with nothing but finished temporaries written, for a weight
    that is not finite.
    """
    group_size = choose_group_size(format, group_size)
    where = choose_device(device, 0, 1)
    checkpoint, state = open_source(source, target)
    args = checkpoint.args
    assert args is not None
    require_unquantised(checkpoint, format)
    if (format == "fp8" or checkpoint.quantised) and not holds(where, torch.float8_e4m3fn):
        raise UserError(f"--device {device}: {where.type} has no FP8 in torch; --device cpu has")
    checkpoint.check(Partition(args))
    specs = {spec.hf: spec for spec in checkpoint.expected(args).values()}
    if format != "fp8" and not any(spec.expert is not None for spec in specs.values()):
        raise UserError(f"{source}: a model without routed experts, which are what {format} quantises; --format fp8")
    entries = checkpoint.tensors(args)
    ops = choose_backend(where, Numerics(torch.float32))  # as in cast.py
    outputs: list[Output] = []
    for name, entry in entries.items():
        if 0 in entry.shape or name.endswith(SCALE):
            continue
        spec = specs.get(checkpoint.table_name(name))
        scale = entries.get(name + SCALE)
        if spec is not None and format == "fp8" and spec.form is not None:
            outputs.append(Blocks(name, entry, FP8, entry.shape, scale, where, ops, []))
        elif spec is not None and format != "fp8" and spec.expert is not None:
            require_divisible(entry, spec, group_size)
            bits = int(format.removeprefix("int"))
            outputs.append(Groups(name, entry, torch.int32, entry.shape, scale, where, ops, [], bits, group_size))
        elif entry.dtype == FP8:
            outputs.append(Dequantised(name, entry, torch.bfloat16, entry.shape, scale, where, ops))
        else:
            outputs.append(Copied(name, entry, entry.dtype, entry.shape))
    multimodal = any(checkpoint.table_name(name) != name for name in entries)  # they have a prefix then
    config = plain_config(source) | {"quantization_config": quantization_config(format, group_size, multimodal)}
    new = hf_checkpoint(outputs, config, source, "deepseek-v3-quantized", [where.type])
    write_checkpoint(new, state, target, f"quantizing to {format}")


def choose_group_size(format: Format, asked: int | None) -> int:
    """The number of weights in a row that share a scale; 0 for FP8. Raises UserError for one that is not offered."""
    offered = GROUP_SIZES.get(format)
    if offered is None:
        if asked is not None:
            raise UserError(f"--group-size goes with int4 and int8: {format} has blocks of {BLOCK_SIZE}x{BLOCK_SIZE}")
        return 0
    if asked not in (None, *offered):
        raise UserError(f"--group-size {asked} is not supported (known: {', '.join(map(str, sorted(offered)))})")
    return asked or offered[0]


def require_unquantised(checkpoint: Checkpoint, format: Format) -> None:
    """Raises UserError for weights that were rounded to integers before, or, for "fp8", to FP8."""
    raw, before = text_config(read_json(checkpoint.path / "config.json"))
    found = raw.get("quantization_config") or {}
    if found.get("quant_method", "fp8") != "fp8":
        method = f"{before}quantization_config.quant_method {found['quant_method']!r}"
        raise UserError(f"{checkpoint.path}: quantised already ({method}); give the BF16 or FP8 checkpoint")
    if format == "fp8" and checkpoint.quantised:
        raise UserError(f"{checkpoint.path}: holds FP8 weights already; fp8_cast_bf16.py makes a BF16 checkpoint of it")


def require_divisible(entry: Entry, spec: Spec, group_size: int) -> None:
    """Raises CheckpointError where groups do not divide a routed expert's rows."""
    columns = entry.shape[1]
    if columns % group_size:
        field = "moe_intermediate_size" if spec.hf.endswith("down_proj.weight") else "hidden_size"
        wanted, found = f"a multiple of {group_size}, the size of a group", str(columns)
        text = f"{entry}: expected a width ({field}) that is {wanted}, found {found}"
        if sizes := [str(size) for size in sorted(GROUP_SIZES["int4"]) if not columns % size]:
            text += f"; --group-size {sizes[-1]} divides it"
        raise CheckpointError(text, entry.file, entry.name, wanted, found)


def quantization_config(format: Format, group_size: int, multimodal: bool) -> dict[str, Any]:
    """What config.json says of the weights: as in V3's release, or as compressed-tensors writes it."""
    if format == "fp8":
        return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                "weight_block_size": [BLOCK_SIZE, BLOCK_SIZE]}  # fmt: skip
    weights: dict[str, Any] = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": group_size,
        "num_bits": int(format.removeprefix("int")), "observer": "mse", "observer_kwargs": {}, "strategy": "group",
        "symmetric": True, "type": "int",
    }  # fmt: skip
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group}, "format": "pack-quantized", "global_compression_ratio": None,
        "ignore": [*IGNORED_MODULES, *(IGNORED_BESIDE_TEXT if multimodal else ())], "kv_cache_scheme": None,
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
    }  # fmt: skip
