"""Every op of every backend against the reference backend's, and the choice between them.

An op is a public method of ReferenceBackend. It exists only if some backend computes it in a faster way, and each way is
held to the reference here, by name: a method without a case fails. Finer tests of each are in the other files.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from core.batch import Batch
from core.numerics import Numerics
from core.sampling_params import SamplingParams
from ops import backend as backends
from ops import reference
from ops.backend import choose_backend
from ops.cpu import kernels
from ops.cpu.backend import CompiledCpuBackend, CpuBackend
from ops.distributions import Field, SamplingMetadata, fields_of
from ops.formats import PartialSums, Quantised, Routing, Weight, columns
from ops.reference_backend import ReferenceBackend
from support.quantised_weights import FORMS, random_weight

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
OPS = [name for name in vars(ReferenceBackend) if not name.startswith("_")]
RULE = Routing(4, "sigmoid", "noaux_tc", 4, 2, True, 2.5)
T, H, INTER, EXPERTS = 5, 192, 96, 8  # one and a half blocks of channels, and three quarters

Results = list[torch.Tensor]
Case = Callable[[ReferenceBackend, torch.device], Results]
CASES: dict[str, Case] = {}


def case(f: Case) -> Case:
    CASES[f.__name__] = f
    return f


def normal(device: torch.device, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)


def fp8(device: torch.device, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.rand(-(-n // 128), -(-k // 128), generator=torch.Generator().manual_seed(1)) + 0.5
    return normal(device, n, k).to(torch.float8_e4m3fn), scale.to(device)


def moved(w: Weight, device: torch.device) -> Weight:
    assert w.scale is not None
    zero = None if w.zero is None else w.zero.to(device)
    return w._replace(data=w.data.to(device), scale=w.scale.to(device), zero=zero)


def wide(x: torch.Tensor | Quantised) -> Results:
    """A result as numbers; activations that were quantised, times their scales."""
    if isinstance(x, torch.Tensor):
        return [x]
    return [x.q.float() * x.s.repeat_interleave(128, dim=-1)[:, : x.q.shape[-1]]]


@case
def use_huge_pages(ops: ReferenceBackend, device: torch.device) -> Results:
    """What is in them stays, also of memory that begins and ends within a page."""
    memory = normal(device, 1 << 12, H)[3:]
    ops.use_huge_pages(memory)
    return [memory]


@case
def pack_weight(ops: ReferenceBackend, device: torch.device) -> Results:
    """Plain, stacked and FP8: what is packed multiplies as before."""
    stack = ops.pack_weight(Weight(normal(device, 3, 70, H)))
    one = ops.pack_weight(Weight(normal(device, 70, H)))
    kept = ops.pack_weight(Weight(*fp8(device, 70, H), "fp8"))
    x = normal(device, T, H, seed=2)
    return [ops.linear(x, w) for w in (one, kept, *(stack.expert(e) for e in range(3)))]


@case
def pack_float32_weight(ops: ReferenceBackend, device: torch.device) -> Results:
    w = normal(device, 70, H)
    y = ops.project_float32(normal(device, T, H, seed=2), ops.pack_float32_weight(w))
    return [y, w]  # which may be tied to the embedding, and is left as it was


@case
def weight_dequant(ops: ReferenceBackend, device: torch.device) -> Results:
    return [ops.weight_dequant(*fp8(device, 200, H)), ops.weight_dequant(*fp8(device, 130, H), torch.float32)]


@case
def act_quant(ops: ReferenceBackend, device: torch.device) -> Results:
    x = normal(device, T, H)
    return [*wide(Quantised(*ops.act_quant(x))), *wide(Quantised(*ops.act_quant(x, "ue8m0")))]


@case
def linear(ops: ReferenceBackend, device: torch.device) -> Results:
    """By plain weights, W8A8 and W8A16."""
    x, w = normal(device, T, H), fp8(device, 200, H)
    plain = ops.pack_weight(Weight(normal(device, 200, H)))
    return [ops.linear(x, plain), ops.linear(x, Weight(*w, "fp8", "ue8m0")), ops.linear(x, Weight(*w, "bf16"))]


@case
def fp8_gemm(ops: ReferenceBackend, device: torch.device) -> Results:
    q, s = ops.act_quant(normal(device, T, H))
    return [ops.fp8_gemm(q, s, Weight(*fp8(device, 200, H), "fp8"), dtype) for dtype in (torch.bfloat16, torch.float32)]


@case
def w8a16_gemm(ops: ReferenceBackend, device: torch.device) -> Results:
    return [ops.w8a16_gemm(normal(device, T, H), Weight(*fp8(device, 200, H), "bf16"))]


@case
def w4a16_gemm(ops: ReferenceBackend, device: torch.device) -> Results:
    """Through `linear`: a weight that a backend has packed may be multiplied by another op of its own."""
    weights = [random_weight(form, 200, H) for form in FORMS.values() if form.kind == "int4" and form.block[1] == 32]
    return [ops.linear(normal(device, T, H), ops.pack_weight(moved(w, device))) for w in weights]


@case
def project_float32(ops: ReferenceBackend, device: torch.device) -> Results:
    """By a weight in the tokens' dtype, and by one in float32."""
    weights = normal(device, 70, H, seed=1), normal(device, 70, H, seed=1).float() * 1.003
    return [ops.project_float32(normal(device, T, H), ops.pack_float32_weight(w)) for w in weights]


@case
def norm(ops: ReferenceBackend, device: torch.device) -> Results:
    x, delta, weight = normal(device, T, H), normal(device, T, H, seed=1), normal(device, H, seed=2).float()
    y, total = ops.norm(x, weight, 1e-6, delta)
    quantised, same = ops.norm(x, weight, 1e-6, delta, "float32")
    assert isinstance(quantised, Quantised) and quantised.x is not None
    return [*wide(y), total, *wide(quantised), quantised.x, same]


@case
def silu_mul(ops: ReferenceBackend, device: torch.device) -> Results:
    gate_up = normal(device, T, 2 * H)
    return [*wide(ops.silu_mul(gate_up, 150)), *wide(ops.silu_mul(gate_up, 150, "ue8m0"))]


@case
def route(ops: ReferenceBackend, device: torch.device) -> Results:
    bias = torch.linspace(-1, 0, EXPERTS * 2, device=device)
    return [*ops.route(normal(device, T, EXPERTS * 2).float(), bias, RULE)]


@case
def router(ops: ReferenceBackend, device: torch.device) -> Results:
    bias = torch.linspace(-1, 0, EXPERTS * 2, device=device)
    w = normal(device, EXPERTS * 2, H, seed=1) / 8
    packed = [ops.pack_float32_weight(w) for w in (w, w.float() * 1.003)]
    return [result for w in packed for result in ops.router(normal(device, T, H), w, bias, RULE)]


@case
def experts(ops: ReferenceBackend, device: torch.device) -> Results:
    """Some of the experts are here; with the shared ones' part and without."""
    x, shared = normal(device, T, H), normal(device, T, H, seed=1)
    w13, w2 = normal(device, 5, 2 * INTER, H, seed=2) / 8, normal(device, 5, H, INTER, seed=3) / 8
    packed = [ops.pack_weight(Weight(w)) for w in (w13, w2)]
    ids = (torch.arange(T)[:, None] + torch.tensor([0, 3, 4])).to(device) % EXPERTS
    weights = torch.rand(T, 3, generator=torch.Generator().manual_seed(4)).to(device)
    return [ops.experts(x, weights, ids, 2, *packed, INTER, part, EXPERTS) for part in (None, lambda: shared)]


@case
def norm_latents(ops: ReferenceBackend, device: torch.device) -> Results:
    """With a query's latent, quantised and not, and without."""
    kv, q = normal(device, T, 144), normal(device, T, 200, seed=2)
    weight, angles = normal(device, 128, seed=3).float(), torch.linspace(0, 6, T * 8, device=device).view(T, 8)
    pools = [torch.zeros(2, 64, 144, dtype=torch.bfloat16, device=device) for _ in range(3)]
    slots = torch.tensor([70, -1, 3, 0, 64], device=device)
    written = [(kv, weight, 1e-6, angles.cos(), angles.sin(), slots, pool) for pool in pools]
    q_weight = normal(device, 200, seed=4).float()
    plain, quantised = ops.norm_latents(*written[0], q, q_weight), ops.norm_latents(*written[1], q, q_weight, "ue8m0")
    assert ops.norm_latents(*written[2]) is None
    assert isinstance(plain, torch.Tensor) and isinstance(quantised, Quantised)
    return [plain, *wide(quantised), *pools]


@case
def partial_linear(ops: ReferenceBackend, device: torch.device) -> Results:
    """Summed up, by all kinds of weights; of so many channels that K is split."""
    k, found = 1024 + 128, []
    weights = [Weight(normal(device, 200, k)), *(Weight(*fp8(device, 200, k), gemm) for gemm in ("fp8", "bf16"))]
    weights += [moved(random_weight(FORMS["int4 groups of 32, zero points"], 200, k), device)]
    for w in map(ops.pack_weight, weights):
        x = normal(device, T, k)
        y = ops.partial_linear(x, w)
        assert reference.summed(y).shape == ops.linear(x, w).shape and y.dtype == x.dtype
        found.append(reference.summed(y))
        wide_pair = columns(y, 8, 128)
        found.append(reference.summed(wide_pair))
    return found


@case
def mla(ops: ReferenceBackend, device: torch.device) -> Results:
    """Sequences that decode and one of many rows, together and alone; products as they are and in parts; quantised."""
    few, many = [([0], 99, [2, 0]), ([0, 0], 30, [3])], [([0] * 70, 20, [1, 4])]
    pool = normal(device, 5, 64, 80, seed=2)
    w_uk, w_uv = normal(device, 2, 32, 64, seed=3) / 8, normal(device, 2, 32, 64, seed=4) / 8
    wide_uv = normal(device, 2, 128, 64, seed=5) / 8
    found = []
    for sequences in (few, many, few + many):
        batch = Batch.pack(sequences, device)
        n = len(batch.tokens)
        q = normal(device, n, 2 * 48)
        parts = PartialSums(torch.stack((q.float() * 0.25, q.float() * 0.75)), q.dtype)
        angles = torch.linspace(0, 6, n * 8, device=device).view(n, 8)
        for given, uv, scales in ((q, w_uv, "float32"), (parts, w_uv, "float32"), (q, wide_uv, "ue8m0")):
            arguments = given, angles.cos(), angles.sin(), pool, batch, w_uk, uv, 0.1
            y, quantised = ops.mla(*arguments), ops.mla(*arguments, scales)
            assert isinstance(y, torch.Tensor) and isinstance(quantised, Quantised)
            expected = ops.act_quant(y, None if scales == "float32" else scales)
            assert all(torch.equal(a.float(), b.float()) for a, b in zip(quantised[:2], expected, strict=True))
            found.append(y)
    return found


@case
def sample(ops: ReferenceBackend, device: torch.device) -> Results:
    """A greedy row, and others with each cut."""
    logits = 4 * normal(device, T, H).float()
    choice = torch.stack((logits.amax(-1).isfinite().long(), logits.argmax(-1)))
    params = [SamplingParams(temperature=0.8 * (n > 0), top_k=8 * (n == 1), top_p=1 - 0.2 * (n == 2), min_p=0.1 * (n == 3))
              for n in range(T)]  # fmt: skip
    table = np.zeros((len(Field), T))
    table[Field.TEMPERATURE : Field.UNIFORM] = np.array([fields_of(one, H) for one in params]).T
    table[Field.ROW], table[Field.UNIFORM], table[Field.DRAFT] = range(T), 0.4, -1
    return [ops.sample(logits, choice, SamplingMetadata(table, params))[0]]


def gpu_backend() -> type[ReferenceBackend]:
    pytest.importorskip("triton")
    from ops.gpu.backend import GpuBackend

    return GpuBackend


FASTER: dict[str, Callable[[], type[ReferenceBackend]]] = {
    "CPU": lambda: CpuBackend,
    "compiled": lambda: CompiledCpuBackend,
    "GPU": gpu_backend,
}


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("name", FASTER)
@pytest.mark.parametrize("op", OPS)
def test_an_op_is_the_reference_s(op: str, name: str, invariant: bool) -> None:
    if name == "compiled" and kernels.library() is None:
        pytest.skip("there is no C compiler")
    device = DEVICE if name == "GPU" else torch.device("cpu")
    if name == "GPU" and not GPU and op in ("project_float32", "pack_float32_weight"):
        pytest.skip("torch has this product on GPUs only")
    if name == "GPU" and GPU and op in ("fp8_gemm", "linear", "partial_linear", "pack_weight") and not backends.has_fp8(device):
        pytest.skip("this GPU has no FP8 tensor cores")
    found, expected = CASES[op](FASTER[name]()(invariant), device), CASES[op](ReferenceBackend(invariant), device)
    assert len(found) == len(expected)
    for y, z in zip(found, expected, strict=True):
        assert y.shape == z.shape and y.dtype == z.dtype and z.double().norm() > 0
        assert (y.double() - z.double()).norm() <= 1e-2 * z.double().norm()


@pytest.mark.parametrize("name", FASTER)
def test_a_float32_router_is_not_rounded(name: str) -> None:
    """Logits of bfloat16 tokens are what float64 makes of them, which they were not with bfloat16 weights."""
    if name == "compiled" and kernels.library() is None:
        pytest.skip("there is no C compiler")
    device, ops = DEVICE if name == "GPU" else torch.device("cpu"), FASTER[name]()()
    x, w = normal(device, T, H), normal(device, EXPERTS * 2, H, seed=1).float() * 1.003 / 8
    weights, ids = ops.router(x, ops.pack_float32_weight(w), None, RULE)
    for held, near in ((w, True), (w.bfloat16(), False)):
        expected, best = reference.route((x.double() @ held.double().T).float(), None, RULE)
        assert (torch.equal(ids, best) and bool(((weights - expected).abs() < 1e-6).all())) == near


def test_every_op_has_a_case_and_a_faster_side() -> None:
    assert set(CASES) == set(OPS)
    sides = [cls() for cls in FASTER.values()]
    for op in OPS:
        assert any(getattr(side, op) is not getattr(ReferenceBackend, op) for side in sides), op
        assert all(op in vars(ReferenceBackend) for side in sides for op in vars(side) if not op.startswith("_"))


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """By device and dtype, without a compiler too; with the numerics' mode."""
    cpu, half, full = torch.device("cpu"), Numerics(), Numerics(torch.float32, batch_invariant=True)
    if kernels.library() is not None:
        assert type(choose_backend(cpu, half)) is CompiledCpuBackend
        with monkeypatch.context() as patched:
            patched.setattr(kernels, "may_use_units", lambda fixed_point: fixed_point)
            assert not choose_backend(cpu, half).units and choose_backend(cpu, Numerics(fixed_point=True)).units
        assert choose_backend(cpu, Numerics(batch_invariant=True)).batch_invariant
    assert type(choose_backend(cpu, full)) is CpuBackend and choose_backend(cpu, full).batch_invariant
    assert type(choose_backend(torch.device("cuda"), half)) is gpu_backend()
    assert choose_backend(torch.device("cuda"), full).batch_invariant
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert type(choose_backend(cpu, half)) is CpuBackend and not choose_backend(cpu, half).batch_invariant
