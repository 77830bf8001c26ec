"""The CPU's C kernels beside what torch has: products of few rows and many, experts, and attention.

    python benchmarks/kernel_cpu.py --output benchmarks/results/kernel_cpu.json

Every result is held to float64 first. Weights, in bfloat16, take turns, a gigabyte of them, so that none is still in a
cache when it comes up again. The sides take turns; a figure is the best of a side's turns, a ratio is the median of the
turns' ratios. GB/s are those of the weights, or latents, alone. How fast memory can be read is torch's sum over as many
bytes. The processor's peak is torch's product of two matrices that stay in its caches.

    python benchmarks/kernel_cpu.py --clang --output benchmarks/results/kernel_cpu_clang.json

Instead: the same code compiled by Clang, of the package ziglang, beside it as the first compiler here compiles it.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from lib import report
from lib.machine import memory_read
from lib.timing import take_turns, timed

from core.batch import Batch
from core.errors import UserError
from core.numerics import Form
from ops import reference
from ops.cpu import attention as attention_torch
from ops.cpu import kernels as kernel_cpu
from ops.formats import Weight

BYTES = 1 << 30
SHAPES = [(2048, 2048), (7168, 2048), (1536, 7168)]  # (N, K): of a small model, and two of DeepSeek-V3's
ROWS = (1, 4, 8, 64, 512)
FORMS = {
    "FP8": Form("fp8"), "INT8": Form("int8"), "INT8, groups of 128": Form("int8", (1, 128), torch.bfloat16),
    "INT4, groups of 32": Form("int4", (1, 32), torch.bfloat16),
    "INT4, groups of 128": Form("int4", (1, 128), torch.bfloat16),
    "INT4, groups of 128, zero points": Form("int4", (1, 128), torch.bfloat16, True),
}  # fmt: skip
FORM_SHAPE, FORM_ROWS = (1536, 2048), (1, 8, 512)
EXPERTS = (2048, 1024, 32, 4)  # hidden size, width, how many, for a token: bench_cpu.py's
HEADS, DN, R, C, DV = 16, 128, 64, 512, 128  # DeepSeek-V3's at TP8
PROMPTS = ((512, 512), (512, 4096))  # new rows, and the context with them
by_clang: Any = None  # the library that Clang made, where that is compared
Sides = dict[str, Callable[[int], torch.Tensor]]  # each called with the number of the weights whose turn it is


def check(y: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """The relative error is to be bfloat16's."""
    error = float((y.double() - expected).norm() / expected.norm())
    assert error < 8e-3, f"{what} is {error:.1e} off"


def compare(
    name: str, sides: Sides, copies: int, size: int | dict[str, int], operations: int, turns: int
) -> dict[str, Any]:
    """One row: size bytes, a side's or all sides', and so many operations a call."""

    if by_clang is not None:
        sides = {"ours": sides["ours"], "Clang": swapped(sides["ours"])}

    def of_each_copy(run: Callable[[int], torch.Tensor]) -> Callable[[], object]:
        return lambda: [run(i) for i in range(copies)][:0]

    seconds, ratios = take_turns({side: timed(of_each_copy(run)) for side, run in sides.items()}, turns)
    row: dict[str, Any] = {"name": name}
    for side, taken in seconds.items():
        best = min(taken) / copies
        of_side = size[side] if isinstance(size, dict) else size
        row[side] = {"us": best * 1e6, "gb_s": of_side / best / 1e9, "gflops": operations / best / 1e9}
        row[side]["ratio"] = statistics.median(ratios.get(side, [1.0]))
    text = "   ".join(
        f"{side} {f['us']:8.0f} us {f['gb_s']:5.1f} GB/s {f['gflops']:4.0f} GFLOPS ({f['ratio']:.2f} x ours)"
        for side, f in row.items() if isinstance(f, dict)
    )  # fmt: skip
    print(f"{name:28} {text}", flush=True)
    return row


def peak(turns: int, n: int = 1024) -> float:
    """GFLOP/s of torch's product of two bfloat16 matrices of n x n, which stay in a cache; the best turn's."""
    a, b = torch.randn(n, n).bfloat16(), torch.randn(n, n).bfloat16()
    seconds, _ = take_turns({"torch": timed(lambda: [a @ b for _ in range(8)][:0])}, turns)
    return 8 * 2 * n**3 / min(seconds["torch"]) / 1e9


def swapped(ours: Callable[[int], torch.Tensor]) -> Callable[[int], torch.Tensor]:
    """The same by the library that Clang made."""

    def run(i: int) -> torch.Tensor:
        library, kernel_cpu.library = kernel_cpu.library, lambda: by_clang
        try:
            return ours(i)
        finally:
            kernel_cpu.library = library

    return run


def products(n: int, k: int, turns: int) -> list[dict[str, Any]]:
    copies = BYTES // (2 * n * k)
    weights = [torch.randn(n, k).bfloat16() for _ in range(copies)]
    packed, units = [kernel_cpu.pack(w) for w in weights], kernel_cpu.may_use_units()
    can_pack = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    onednn = [torch.ops.mkldnn._reorder_linear_weight(w) for w in weights] if can_pack else []

    def product(rows: int) -> dict[str, Any]:
        x = torch.randn(rows, k).bfloat16()
        sides: Sides = {
            "ours": lambda i: kernel_cpu.linear(x, packed[i], torch.bfloat16, units),
            "F.linear": lambda i: F.linear(x, weights[i]),
        }
        if onednn:
            linear = torch.ops.mkldnn._linear_pointwise
            sides["oneDNN, packed"] = lambda i: linear(x, onednn[i], None, "none", [], "")
        for side, run in sides.items():
            check(run(1), x.double() @ weights[1].double().T, side)
        some = max(2, min(copies, 4096 // rows))
        return compare(f"{rows} x {k} by {n} x {k}", sides, some, 2 * n * k, 2 * rows * n * k, turns)

    return [product(rows) for rows in ROWS]


def forms(n: int, k: int, turns: int) -> list[dict[str, Any]]:
    """Weights of 8 and 4 bits beside those of bfloat16; GB/s are each form's own bytes, with its scales."""
    made = {"bfloat16": (Form(), Weight(torch.randn(n, k).bfloat16()))}
    made |= {name: (form, _quantised(form, n, k)) for name, form in FORMS.items()}
    units, copies = kernel_cpu.may_use_units(fixed_point=True), max(2, BYTES // len(made) // (2 * n * k))
    packed = {name: [kernel_cpu.pack_weight(w) for _ in range(copies)] for name, (_, w) in made.items()}

    def by(x: torch.Tensor, w: list[kernel_cpu.Packed], i: int) -> torch.Tensor:
        return kernel_cpu.linear(x, w[i], torch.bfloat16, units)

    def product(rows: int) -> dict[str, Any]:
        x, some = torch.randn(rows, k).bfloat16(), max(2, min(copies, 4096 // rows))
        sides: Sides = {}
        for name, (_, w) in made.items():
            scale = w.scale
            plain = w.data if scale is None else reference.weight_dequant(w.data, scale, torch.float64, w.block, w.zero)
            sides[name] = partial(by, x, packed[name])
            check(sides[name](1), x.double() @ plain.double().T, name)
        size = {name: kernel_cpu.packed_bytes(form, n, k) for name, (form, _) in made.items()}
        return compare(f"{rows} x {k} by {n} x {k}, forms", sides, some, size, 2 * rows * n * k, turns)

    return [product(rows) for rows in FORM_ROWS]


def _quantised(form: Form, n: int, k: int) -> Weight:
    """Random: e4m3 as of normal numbers, the others' values all as likely."""
    scale = (torch.rand(-(-n // form.block[0]), -(-k // form.block[1])) + 0.5).to(form.scale)
    if form.kind == "fp8":
        data = (torch.randn(n, k) * 100).to(torch.float8_e4m3fn)
    else:
        data = torch.randint(256, (n, k // form.packing), dtype=torch.uint8).view(form.dtype)
    zero = torch.randint(16, scale.shape, dtype=torch.uint8) if form.zeros else None
    return Weight(data, scale, block=form.block, zero=zero)


def experts(turns: int) -> list[dict[str, Any]]:
    """A layer's routed experts; beside them a loop over those that are chosen."""
    h, inter, n, top = EXPERTS
    one = 6 * h * inter
    copies = max(2, BYTES // (n * one))
    w13 = [torch.randn(n, 2 * inter, h).div(h**0.5).bfloat16() for _ in range(copies)]
    w2 = [torch.randn(n, h, inter).div(inter**0.5).bfloat16() for _ in range(copies)]
    packed = [(kernel_cpu.pack(a.clone()), kernel_cpu.pack(b.clone())) for a, b in zip(w13, w2, strict=True)]
    units = kernel_cpu.may_use_units()

    def layer(tokens: int) -> dict[str, Any]:
        x, weights = torch.randn(tokens, h).bfloat16(), torch.rand(tokens, top)
        ids = torch.stack([torch.randperm(n)[:top] for _ in range(tokens)])

        def loop(i: int) -> torch.Tensor:
            def run(e: int, rows: torch.Tensor) -> torch.Tensor:
                middle = reference.silu_mul(F.linear(rows, w13[i][e]), inter)
                assert isinstance(middle, torch.Tensor)
                return F.linear(middle, w2[i][e])

            return reference.experts(x, weights, ids, 0, n, run).bfloat16()

        sides: Sides = {
            "ours": lambda i: kernel_cpu.experts(x, weights, ids, 0, *packed[i], inter, units=units),
            "loop over F.linear": loop,
        }
        expected = torch.zeros(tokens, h, dtype=torch.float64)
        for e in ids.unique().tolist():
            at, place = (ids == e).nonzero(as_tuple=True)
            gate, up = (x[at].double() @ w13[1][e].double().T).chunk(2, dim=-1)
            expected[at] += weights[at, place, None].double() * ((F.silu(gate) * up) @ w2[1][e].double().T)
        for side, run in sides.items():
            check(run(1), expected, side)
        size, operations = len(ids.unique()) * one, tokens * top * one
        return compare(f"experts, {tokens} tokens", sides, copies, size, operations, turns)

    return [layer(tokens) for tokens in (1, 8, 512)]


def attention(turns: int) -> list[dict[str, Any]]:
    """Of one token a sequence, beside the reference."""
    w_uk, w_uv = (torch.randn(HEADS, d, C).div(C**0.5).bfloat16() for d in (DN, DV))

    def decode(sequences: int, context: int) -> dict[str, Any]:
        per = -(-context // 64)
        copies = max(2, BYTES // 4 // (sequences * context * (C + R) * 2))
        order = torch.randperm(sequences * per).tolist()
        batch = Batch.pack([([1], context - 1, order[i * per : (i + 1) * per]) for i in range(sequences)])
        latents = [torch.randn(sequences * per, 64, C + R).bfloat16() for _ in range(copies)]
        q_nope, q_pe = torch.randn(sequences, HEADS, DN).bfloat16(), torch.randn(sequences, HEADS, R).bfloat16()

        def ours(i: int) -> torch.Tensor:
            out = torch.empty(sequences, HEADS, DV, dtype=torch.bfloat16)
            kernel_cpu.mla(q_nope, q_pe, latents[i], batch, w_uk, w_uv, 0.1, 1, out)
            return out

        def plain(i: int) -> torch.Tensor:
            return reference.mla(q_nope, q_pe, latents[i], batch, w_uk, w_uv, 0.1)

        exact = _exact(q_nope.double(), q_pe.double(), latents[1].double(), batch, w_uk.double(), w_uv.double())
        check(ours(1), exact, "attention")
        size = sequences * context * (C + R) * 2
        operations = 2 * sequences * HEADS * (context * (2 * C + R) + C * (DN + DV))
        sides: Sides = {"ours": ours, "reference": plain}
        return compare(f"attention, {sequences} at {context}", sides, copies, size, operations, turns)

    return [decode(*of) for of in ((1, 512), (1, 4096), (8, 4096))]


def prompts(turns: int) -> list[dict[str, Any]]:
    """Attention of a prompt's rows, beside torch's fused attention."""
    w_uk, w_uv = (torch.randn(HEADS, d, C).div(C**0.5).bfloat16() for d in (DN, DV))
    units = kernel_cpu.may_use_units()

    def prefill(new: int, context: int) -> dict[str, Any]:
        pages = torch.randperm(-(-context // 64)).tolist()
        batch = Batch.pack([([1] * new, context - new, pages)])
        latents = torch.randn(len(pages), 64, C + R).bfloat16()
        q_nope, q_pe = torch.randn(new, HEADS, DN).bfloat16(), torch.randn(new, HEADS, R).bfloat16()

        def by(form: Callable[..., None], *more: bool) -> Callable[[int], torch.Tensor]:
            def run(_: int) -> torch.Tensor:
                out = torch.empty(new, HEADS, DV, dtype=torch.bfloat16)
                form(q_nope, q_pe, latents, batch, w_uk, w_uv, 0.1, 0, out, *more)
                return out

            return run

        sides: Sides = {"ours": by(kernel_cpu.mla_prefill, units), "torch": by(attention_torch.prefill)}
        gathered = reference.gather(latents, batch.pages[0], context, C).double()
        inputs = q_nope.double(), q_pe.double(), gathered, batch.positions, w_uk.double(), w_uv.double()
        exact = reference.mla_expanded(*inputs, 0.1)
        for side, run in sides.items():
            check(run(0), exact, side)
        keys = new * (context - new) + new * (new + 1) // 2
        operations = 2 * HEADS * (context * C * (DN + DV) + keys * (DN + R + DV))
        return compare(f"attention, {new} rows at {context}", sides, 2, context * (C + R) * 2, operations, turns)

    return [prefill(*of) for of in PROMPTS]


def _exact(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    batch: Batch,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
) -> torch.Tensor:
    """Attention of one token a sequence, in float64."""
    out = []
    for b, (length, pages) in enumerate(zip(batch.kv_lens.tolist(), batch.pages.tolist(), strict=True)):
        keys = latents[pages].flatten(0, 1)[:length]
        q = torch.cat((torch.einsum("hd,hdc->hc", q_nope[b], w_uk), q_pe[b]), dim=-1)
        weights = (q @ keys.T * 0.1).softmax(dim=-1)
        out.append(torch.einsum("hc,hvc->hv", weights @ keys[:, :C], w_uv))
    return torch.stack(out)


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="JSON file for the results")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--clang", action="store_true", help="instead: Clang's code beside the first compiler's")
    args = parser.parse_args()
    if why := kernel_cpu.why_not():
        raise UserError(f"there are no kernels to time: {why}")
    global by_clang
    if args.clang:
        *_, command = kernel_cpu.compilers()
        if "ziglang" not in command:
            raise UserError("the package ziglang is not installed")
        by_clang = kernel_cpu.load(kernel_cpu.build(command, kernel_cpu.FLAGS))
    torch.manual_seed(0)
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "read_gb_s": memory_read(args.turns, BYTES)}
    found["peak_gflops"] = peak(args.turns)  # both again at the end: a machine that others use has slow moments
    print(f"memory is read at {found['read_gb_s']:.1f} GB/s, torch multiplies at {found['peak_gflops']:.0f} GFLOPS, "
          f"{found['threads']} threads", flush=True)  # fmt: skip
    found["rows"] = []
    for n, k in SHAPES:
        found["rows"] += products(n, k, args.turns)
    if not args.clang:
        found["rows"] += forms(*FORM_SHAPE, args.turns)
    found["rows"] += experts(args.turns) + attention(args.turns) + prompts(args.turns)
    found["read_gb_s"] = max(found["read_gb_s"], memory_read(args.turns, BYTES))
    found["peak_gflops"] = max(found["peak_gflops"], peak(args.turns))
    report.save(args.output, found)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as e:
        sys.exit(f"error: {e}")
