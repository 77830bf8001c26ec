"""How far a point may be from what it should be: a multiple of the unit roundoff of the run's number format.

Multiples are of the relative error of a token's value, |found - expected| / |expected| in the 2-norm. They are several
times what this engine's own backends show at each kind of op in each format (tests/verification/test_trace_check.py),
and a fraction of what the mildest known mistake makes of it.
"""

import torch

from verification.trace import RunNumerics

ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-9}
# a point's kind: the multiple in float32, where sums of thousands of terms count, and in narrower formats, where
# roundings on the way do
KINDS = {"row": (32, 4), "product": (128, 4), "chain": (256, 10)}
CHAINS = ("attn.o", "ffn.routed", "ffn.shared", "ffn.out")  # several ops, which round in between
PRODUCTS = (
    "attn.q_a", "attn.q_nope", "attn.q_rope", "attn.kv_a", "attn.k_rope", "attn.out", "ffn.router_logits", "logits",
    "combined",
)  # fmt: skip
EXACT = ("ffn.router_logits", "ffn.weights", "logits")  # in float32 in every run
# of a value that is recorded as it was quantised to e4m3, with 4 bits: what is rounded otherwise before, by a part of
# 2^-9 or in several ops by more, is now and then rounded to e4m3's next number, which is up to 2^-3 away
QUANTISED, QUANTISED_CHAIN = 0.02, 0.05
TIES = 64  # roundoffs within which two experts' scores count as equal


def roundoff(numerics: RunNumerics, point: str, stored: torch.dtype) -> float:
    """Of a point within its layer: its op's, or that of the dtype it was written in, if that is wider apart."""
    computed = torch.float32 if point in EXACT else numerics.torch_dtype
    return max(ROUNDOFF[computed], ROUNDOFF.get(stored, 0.0))


def tolerance(numerics: RunNumerics, point: str, stored: torch.dtype) -> float:
    """The largest relative error that rounding explains at a point within its layer."""
    unit = roundoff(numerics, point, stored)
    kind = "chain" if point in CHAINS else "product" if point in PRODUCTS else "row"
    return KINDS[kind][unit > ROUNDOFF[torch.float32]] * unit
