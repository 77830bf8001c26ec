"""One door per op, and the only place that chooses between the plain-torch reference, Triton and the CPU's own forms.

model.py calls these and never asks what hardware it is on. `use("reference")` makes every op follow its
specification; the choice is a context variable, so a test can make it without touching another thread's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

import cpu
import reference

if TYPE_CHECKING:
    from model import Batch

Gemm = Literal["fp8", "bf16"]
_side: ContextVar[str] = ContextVar("ops side", default="auto")


class Weight(NamedTuple):
    """What a linear multiplies by: (N, K), or experts stacked (E, N, K), with block scales when it is e4m3."""

    data: Any  # a tensor; after `prepare` perhaps a packed form, or a list of them, one per expert
    scale: torch.Tensor | None = None
    gemm: Gemm = "bf16"
    scale_fmt: str | None = None

    def expert(self, e: int) -> "Weight":
        """Expert e's own weight, a view."""
        return self._replace(data=self.data[e], scale=None if self.scale is None else self.scale[e])


@contextmanager
def use(side: Literal["auto", "reference"]) -> Iterator[None]:
    """Within the block, ops run as the reference specifies ("reference") or as fast as the device allows ("auto")."""
    token = _side.set(side)
    try:
        yield
    finally:
        _side.reset(token)


_invariant: ContextVar[bool] = ContextVar("batch-invariant", default=False)
ROW_BLOCK = 16  # rows of every matrix product in batch-invariant mode


@contextmanager
def batch_invariant(on: bool = True) -> Iterator[None]:
    """Within the block a token's result does not depend, to the bit, on what else is in the batch.

    How a product's sums are ordered depends on its shape, so every product gets one shape: rows in blocks of
    ROW_BLOCK, the last filled up with zeros, and attention in one form over key tiles of one size.
    """
    token = _invariant.set(on)
    try:
        yield
    finally:
        _invariant.reset(token)


def _by_rows(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """product(x) for x (T, …), in blocks of rows if the mode asks for it."""
    if not _invariant.get():
        return product(x)
    n = len(x)
    if n % ROW_BLOCK:
        x = torch.cat((x, x.new_zeros(ROW_BLOCK - n % ROW_BLOCK, *x.shape[1:])))
    return torch.cat([product(block) for block in x.split(ROW_BLOCK)])[:n]


def _fast(x: torch.Tensor) -> bool:
    return x.is_cuda and _side.get() == "auto"


def has_fp8(device: torch.device) -> bool:
    """Whether a GPU multiplies FP8 in its tensor cores: NVIDIA from Ada and Hopper on, AMD's MI300."""
    import kernel

    return kernel.has_fp8(device)


def act_quant(x: torch.Tensor, scale_fmt: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., K) to e4m3 (..., K) and float32 scales (..., ceil(K/128)). See reference.act_quant."""
    if _fast(x):
        import kernel

        return kernel.act_quant(x, scale_fmt=scale_fmt)
    return reference.act_quant(x, scale_fmt=scale_fmt)


def weight_dequant(w: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """e4m3 (..., N, K) times its 128x128 block scales, rounded once to dtype. See reference.weight_dequant."""
    if _fast(w):
        import kernel

        return kernel.weight_dequant(w, scale, dtype)
    return reference.weight_dequant(w, scale, dtype)


def linear(x: torch.Tensor, w: Weight) -> torch.Tensor:
    """x (T, K) times w (N, K) transposed, in x's dtype.

    Without a scale w holds plain weights. With one it is e4m3, and `gemm` "fp8" quantises x too (W8A8, what the model
    was trained with) where "bf16" widens the weights inside the product (W8A16).
    """
    return _by_rows(lambda rows: _linear(rows, w), x)


def _linear(x: torch.Tensor, w: Weight) -> torch.Tensor:
    if w.scale is None:
        return cpu.linear(x, w.data) if cpu.is_packed(w.data) else F.linear(x, w.data)
    if w.gemm == "fp8":
        q, s = act_quant(x, w.scale_fmt)
        if _fast(x):
            import kernel

            return kernel.fp8_gemm(q, s, w.data, w.scale, x.dtype)
        return reference.fp8_gemm(q, s, w.data, w.scale, x.dtype)
    if _fast(x):
        import kernel

        return kernel.w8a16_gemm(x, w.data, w.scale, x.dtype)
    return reference.w8a16_gemm(x, w.data, w.scale, x.dtype)


def project_float32(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x (rows, H) times w (V, H) transposed, float32 (rows, V): the logits. See reference.project_float32."""
    if _fast(x) and x.dtype == w.dtype == torch.bfloat16:
        return _by_rows(lambda rows: torch.mm(rows, w.T, out_dtype=torch.float32), x)
    return _by_rows(lambda rows: reference.project_float32(rows, w), x)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, computed in float32 and rounded once. See reference.silu_mul."""
    if _side.get() == "auto" and not gate.is_cuda:
        return cpu.silu_mul(gate, up)
    return reference.silu_mul(gate, up)


def route(
    logits: torch.Tensor, bias: torch.Tensor | None, rule: reference.Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits (T, E) float32 to weights (T, K) float32 and expert ids (T, K). See reference.route."""
    return reference.route(logits, bias, rule)


def experts(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, first: int, w1: Weight, w2: Weight, w3: Weight
) -> torch.Tensor:
    """The weighted sum of the SwiGLU experts this rank holds, numbered from `first`: float32 (T, H).

    x (T, H), weights (T, K) float32, ids (T, K); w1, w3 stacked (E_local, I, H), w2 (E_local, H, I).
    """

    def run(e: int, rows: torch.Tensor) -> torch.Tensor:
        return linear(silu_mul(linear(rows, w1.expert(e)), linear(rows, w3.expert(e))), w2.expert(e))

    return reference.experts(x, weights, ids, first, len(w1.data), run)


def pack_latents(latent: torch.Tensor, c: int) -> torch.Tensor:
    """Latents (T, C + R) as bytes with the first c values in FP8. See reference.pack_latents."""
    return reference.pack_latents(latent, c)


def mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    batch: "Batch",
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of ragged queries over their pages: (T, N, dn) and (T, N, R) to (T, N, dv). See reference.mla.

    On a GPU, in bfloat16, the batch's first sequences, of few rows, are decoded and the others prefilled.
    """
    if _fast(q_nope) and q_nope.dtype == torch.bfloat16:
        import kernel_attention

        by_rows = _by_rows if _invariant.get() else None
        return kernel_attention.mla(q_nope, q_pe, latents, batch, w_uk, w_uv, scale, by_rows)
    if _invariant.get():
        return reference.mla(q_nope, q_pe, latents, batch, w_uk, w_uv, scale, one_form=ROW_BLOCK)
    side = cpu if q_nope.device.type == "cpu" and _side.get() == "auto" else reference
    return side.mla(q_nope, q_pe, latents, batch, w_uk, w_uv, scale)


def prepare(w: torch.Tensor) -> Any:
    """Called once per plain weight, (N, K) or stacked (E, N, K), after loading: a backend may return a packed form."""
    return cpu.pack(w) if w.device.type == "cpu" and _side.get() == "auto" else w


def prepare_float32(w: torch.Tensor) -> torch.Tensor:
    """Called once for the weight of project_float32 after loading: a CPU, which cannot multiply bfloat16 into float32,
    keeps it in float32, as widening it in every step takes longer than reading twice the bytes."""
    return w.float() if w.device.type == "cpu" and _side.get() == "auto" else w


def prepare_fp8(w: torch.Tensor, scale: torch.Tensor, gemm: Gemm) -> tuple[torch.Tensor, torch.Tensor]:
    """Called once per FP8 weight and its scales after loading: puts them in the FP8 type the device multiplies."""
    if gemm == "fp8" and _fast(w):
        import kernel

        if kernel.fp8_dtype(w.device) == torch.float8_e4m3fnuz:
            return reference.to_fnuz(w, scale)
    return w, scale
