"""One door per op, and the only place that chooses between the plain-torch reference, Triton and the CPU's own forms.

model.py calls these and never asks what hardware it is on. `use("reference")` makes every op follow its
specification; the choice is a context variable, so a test can make it without touching another thread's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
import torch.nn.functional as F

from core.batch import Batch
from core.numerics import Gemm
from ops import reference
from ops.cpu import backend as cpu
from ops.formats import Quantised, Routing, Scales, Weight

_side: ContextVar[str] = ContextVar("ops side", default="auto")


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


def _by_rows(product: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """product(*inputs) for inputs (T, …), in blocks of rows if the mode asks for it."""
    if not _invariant.get():
        return product(*inputs)
    n = len(inputs[0])
    if n % ROW_BLOCK:
        inputs = tuple(torch.cat((x, x.new_zeros(ROW_BLOCK - n % ROW_BLOCK, *x.shape[1:]))) for x in inputs)
    blocks = zip(*(x.split(ROW_BLOCK) for x in inputs), strict=True)
    return torch.cat([product(*block) for block in blocks])[:n]


def _fast(x: torch.Tensor) -> bool:
    return x.is_cuda and _side.get() == "auto"


def _plain() -> Any:
    """Where an op is that no kernel computes."""
    return cpu if _side.get() == "auto" else reference


def has_fp8(device: torch.device) -> bool:
    """Whether a GPU multiplies FP8 in its tensor cores: NVIDIA from Ada and Hopper on, AMD's MI300."""
    from ops.gpu import gemm as kernel

    return kernel.has_fp8(device)


def act_quant(x: torch.Tensor, scale_fmt: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., K) to e4m3 (..., K) and float32 scales (..., ceil(K/128)). See reference.act_quant."""
    if _fast(x):
        from ops.gpu import gemm as kernel

        return kernel.act_quant(x, scale_fmt=scale_fmt)
    return reference.act_quant(x, scale_fmt=scale_fmt)


def weight_dequant(w: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """e4m3 (..., N, K) times its 128x128 block scales, rounded once to dtype. See reference.weight_dequant."""
    if _fast(w):
        from ops.gpu import gemm as kernel

        return kernel.weight_dequant(w, scale, dtype)
    return reference.weight_dequant(w, scale, dtype)


def linear(x: torch.Tensor | Quantised, w: Weight) -> torch.Tensor:
    """x (T, K) times w (N, K) transposed, in x's dtype.

    Without a scale w holds plain weights. With one it is e4m3, and `gemm` "fp8" quantises x too (W8A8, what the model
    was trained with), unless it comes Quantised, where "bf16" widens the weights inside the product (W8A16).
    """
    if isinstance(x, Quantised):
        assert w.fp8, "quantised activations by a weight that takes plain ones"
        return _fp8_gemm(x.q, x.s, w, x.dtype)
    data, scale = w.data, w.scale
    if scale is None:
        return cpu.linear(x, data) if cpu.is_packed(data) else _by_rows(lambda rows: F.linear(rows, data), x)
    if w.gemm == "fp8":
        return _fp8_gemm(*act_quant(x, w.scale_fmt), w, x.dtype)
    if _fast(x):
        from ops.gpu import gemm as kernel

        return kernel.w8a16_gemm(x, data, scale, x.dtype, _fixed_rows())
    return _by_rows(lambda rows: reference.w8a16_gemm(rows, data, scale, rows.dtype), x)


def _fp8_gemm(q: torch.Tensor, s: torch.Tensor, w: Weight, dtype: torch.dtype) -> torch.Tensor:
    data, scale = w.data, w.scale
    assert scale is not None
    if _fast(q):
        from ops.gpu import gemm as kernel

        return kernel.fp8_gemm(q, s, data, scale, dtype, _fixed_rows())
    return _by_rows(lambda q, s: reference.fp8_gemm(q, s, data, scale, dtype), q, s)


def _fixed_rows() -> int | None:
    """For kernels that need no rows in blocks in batch-invariant mode, but one tile: for how many rows it is chosen."""
    return ROW_BLOCK if _invariant.get() else None


def project_float32(x: torch.Tensor, w: Any) -> torch.Tensor:
    """x (rows, H) times w (V, H) transposed, float32 (rows, V): the logits. See reference.project_float32.

    w is what `prepare_float32` made of the weight.
    """
    if cpu.is_packed(w):
        return cpu.linear_float32(x, w)
    if _fast(x) and x.dtype == w.dtype == torch.bfloat16:
        return _by_rows(lambda rows: torch.mm(rows, w.T, out_dtype=torch.float32), x)
    return _by_rows(lambda rows: reference.project_float32(rows, w), x)


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    delta: torch.Tensor | None = None,
    fp8: Scales | None = None,
    keep: bool = True,
) -> tuple[torch.Tensor | Quantised, torch.Tensor]:
    """RMSNorm of x (T, H) + delta, quantised if the weight behind it has a `fp8`, and the sum. See reference.norm."""
    if _fast(x):
        from ops.gpu import fused as kernel_fused

        return kernel_fused.norm(x, weight, eps, delta, fp8, keep)
    return _plain().norm(x, weight, eps, delta, fp8, keep)


def silu_mul(gate_up: torch.Tensor, inter: int, fp8: Scales | None = None) -> torch.Tensor | Quantised:
    """silu(gate) * up of stacked gate_up (T, 2 I') to (T, inter), quantised if the weight behind it has a `fp8`.

    See reference.silu_mul.
    """
    if _fast(gate_up):
        from ops.gpu import fused as kernel_fused

        return kernel_fused.silu_mul(gate_up, inter, fp8)
    return _plain().silu_mul(gate_up, inter, fp8)


def route(logits: torch.Tensor, bias: torch.Tensor | None, rule: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits (T, E) float32 to weights (T, K) float32 and expert ids (T, K). See reference.route."""
    n = len(logits)
    if _invariant.get():  # torch's sigmoid on a CPU takes the numbers behind the last whole vectors another way
        logits = F.pad(logits, (0, 0, 0, -n % ROW_BLOCK))
    weights, ids = _plain().route(logits, bias, rule)
    return weights[:n], ids[:n]


def router(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, rule: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, H), w (E, H), bias (E,) float32 to weights (T, K) float32 and expert ids (T, K). See reference.router."""
    if _fast(x) and x.dtype == w.dtype:
        from ops.gpu import moe as kernel_moe

        return kernel_moe.router(x, w, bias, rule, _invariant.get())
    return route(project_float32(x, w), bias, rule)


def experts(
    x: torch.Tensor | Quantised,
    weights: torch.Tensor,
    ids: torch.Tensor,
    first: int,
    w13: Weight,
    w2: Weight,
    inter: int,
    shared: Callable[[], torch.Tensor] | None = None,
    n_experts: int | None = None,
) -> torch.Tensor:
    """The weighted sum of the SwiGLU experts this rank holds, numbered from `first`, and of what `shared` gives (T, H).

    x (T, H), weights (T, K) float32, ids (T, K); w13 stacked (E_local, 2 I', H), each expert's gate and up as silu_mul
    wants them, w2 (E_local, H, inter). Summed in float32, rounded once to x's dtype: (T, H). n_experts: how many there
    are on all ranks, by which is judged how many tokens fall to one (without it those here are all).
    """
    if _fast(weights):
        from ops.gpu import moe as kernel_moe

        return kernel_moe.experts(x, weights, ids, first, w13, w2, inter, shared, n_experts, _invariant.get())
    if isinstance(x, Quantised):
        assert x.x is not None
        x = x.x

    def run(e: int, rows: torch.Tensor) -> torch.Tensor:
        return linear(silu_mul(linear(rows, w13.expert(e)), inter), w2.expert(e))

    if cpu.is_packed(w13.data):
        return cpu.experts(x, weights, ids, first, w13.data, w2.data, inter, shared)
    y = reference.experts(x, weights, ids, first, len(w13.data), run)
    if shared is not None:
        y += shared()
    return y.to(x.dtype)


def latent_write(
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_pe: torch.Tensor,
    slots: torch.Tensor,
    latents: torch.Tensor,
) -> torch.Tensor:
    """Norms c_kv, rotates k_pe and writes both at their slots; returns q_pe rotated. See reference.latent_write."""
    if _fast(c_kv):
        from ops.gpu import fused as kernel_fused

        return kernel_fused.latent_write(c_kv, k_pe, weight, eps, cos, sin, q_pe, slots, latents)
    return _plain().latent_write(c_kv, k_pe, weight, eps, cos, sin, q_pe, slots, latents)


def mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    batch: Batch,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of ragged queries over their pages: (T, N, dn) and (T, N, R) to (T, N, dv). See reference.mla.

    On a GPU, in bfloat16, the batch's first sequences, of few rows, are decoded and the others prefilled.
    """
    if _fast(q_nope) and q_nope.dtype == torch.bfloat16:
        from ops.gpu import attention as kernel_attention

        by_rows = _by_rows if _invariant.get() else None
        return kernel_attention.mla(q_nope, q_pe, latents, batch, w_uk, w_uv, scale, by_rows)
    if _invariant.get():
        return reference.mla(q_nope, q_pe, latents, batch, w_uk, w_uv, scale, one_form=ROW_BLOCK)
    side = cpu if q_nope.device.type == "cpu" and _side.get() == "auto" else reference
    return side.mla(q_nope, q_pe, latents, batch, w_uk, w_uv, scale)


def prepare(w: torch.Tensor) -> Any:
    """Called once per plain weight, (N, K) or stacked (E, N, K), after loading: a backend may return a packed form."""
    return cpu.pack(w) if w.device.type == "cpu" and _side.get() == "auto" else w


def prepare_float32(w: torch.Tensor) -> Any:
    """Called once for a weight of project_float32 after loading: a CPU, whose bfloat16 product rounds its result, keeps
    a form that gives float32, as widening the weight in every step takes longer than reading it."""
    return cpu.pack_float32(w) if w.device.type == "cpu" and _side.get() == "auto" else w


def prepare_fp8(w: torch.Tensor, scale: torch.Tensor, gemm: Gemm) -> tuple[torch.Tensor, torch.Tensor]:
    """Called once per FP8 weight and its scales after loading: puts them in the FP8 type the device multiplies."""
    if gemm == "fp8" and _fast(w):
        from ops.gpu import gemm as kernel

        if kernel.fp8_dtype(w.device) == torch.float8_e4m3fnuz:
            return reference.to_fnuz(w, scale)
    return w, scale
