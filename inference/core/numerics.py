"""The types a run computes in, and the promises it makes about bits."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from core.config import BLOCK_SIZE
from core.run_config import ExpertLayout

Gemm = Literal["fp8", "bf16"]


class Form(NamedTuple):
    """How the weights (N, K) of a projection lie in memory: numbers of the activations' dtype ("plain") or float32, or
    quantised, of a few bits with a scale for each block.

    fp8: e4m3. int8: two's complement. int4: two in a byte, uint8 (N, K / 2), the even k in the low four bits; what is
    stored is the value plus its block's zero point.
    """

    kind: Literal["plain", "float32", "fp8", "int8", "int4"] = "plain"
    block: tuple[int, int] = (BLOCK_SIZE, BLOCK_SIZE)  # rows and columns that share a scale
    scale: torch.dtype = torch.float32  # that scales have in memory
    zeros: bool = False  # whether each block has a zero point, uint8; without one it is 8

    @property
    def is_quantised(self) -> bool:
        return self.kind in ("fp8", "int8", "int4")

    @property
    def dtype(self) -> torch.dtype:
        """Of a quantised weight's data."""
        return {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}[self.kind]

    @property
    def packing(self) -> int:
        """How many values one number of the data holds."""
        return 2 if self.kind == "int4" else 1


PLAIN, FLOAT32, FP8 = Form(), Form("float32"), Form("fp8")


@dataclass(frozen=True)
class Numerics:
    """How this engine computes, as opposed to what the model is.

    `dtype` is that of activations and plain weights. `gemm` None: all weights are plain (quantised ones were
    dequantised when loaded). Otherwise they stay as they are stored, most of them in the form `projections`; products
    of FP8 weights are W8A8 ("fp8") or W8A16 ("bf16"), those of others W8A16 and W4A16. Norm weights, the router's bias
    and the scales of 128x128 blocks are float32 in every case.

    `exceptions` are the modules, by their names in the model, whose weights lie in another form because a checkpoint
    stores them otherwise: projections that are plain, though the others are quantised ("layers.3.attn.wo", or
    "layers.3.ffn.experts" for all of a layer), and routers and a head that are float32, though `dtype` is bfloat16. See
    table.exceptions.
    """

    dtype: torch.dtype = torch.bfloat16
    gemm: Gemm | None = None
    scale_fmt: str | None = None
    fp8_latents: bool = False  # the cache holds the compressed key/value in e4m3, see reference.pack_latents
    experts: ExpertLayout = "whole"  # how ranks share the routed experts, see checkpoint/partition.py
    mlps_in_lane: bool = False  # dense MLPs and shared experts are shared by a lane's ranks, not by those of all lanes
    batch_invariant: bool = False  # a token's result does not depend on the rest of its batch, to the bit
    # how many ranks' shares of heads, MLPs and experts are computed apart and summed in one order, whatever ranks hold
    # them: the same bits on any number of ranks (a power of two, see model.VirtualRanks); 1: each rank's as a whole
    virtual_ranks: int = 1
    projections: Form = FP8  # the form of projections that stay as they are stored
    fixed_point: bool = False  # a CPU may round what it multiplies by quantised weights: see reference.fixed_point
    exceptions: tuple[tuple[str, Form], ...] = ()

    def inside(self, module: str) -> "Numerics":
        """The numerics of a submodule: its exceptions, by their names within it."""
        if not self.exceptions:
            return self
        found = ((name, form) for name, form in self.exceptions if f"{name}.".startswith(f"{module}."))
        return replace(self, exceptions=tuple((name[len(module) + 1 :], form) for name, form in found))

    @property
    def form(self) -> Form:
        """The form of this module's own weights, if it is a projection."""
        return dict(self.exceptions).get("", PLAIN if self.gemm is None else self.projections)

    @property
    def exact_dtype(self) -> torch.dtype:
        """The dtype of a router's or a head's weights in memory, which holds every stored value exactly."""
        return torch.float32 if dict(self.exceptions).get("") == FLOAT32 else self.dtype
