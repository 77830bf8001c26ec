"""Numerics: which modules are exceptions, seen from the modules around them."""

import torch

from core.numerics import FLOAT32, FP8, PLAIN, Numerics


def test_exceptions_by_the_names_inside():
    forms = {"head": FLOAT32, "layers.1.attn.wo": PLAIN, "layers.11.ffn.experts": PLAIN, "layers.11.ffn.gate": FLOAT32}
    num = Numerics(gemm="bf16", exceptions=tuple(forms.items()))
    assert num.inside("layers.1").exceptions == (("attn.wo", PLAIN),)
    assert num.inside("layers.1").inside("attn").inside("wo").form == PLAIN
    assert num.inside("layers.1").inside("attn").inside("wq_b").form == FP8
    assert num.inside("layers.11").inside("ffn").exceptions == (("experts", PLAIN), ("gate", FLOAT32))
    assert num.inside("head").exact_dtype == torch.float32 and num.exact_dtype == torch.bfloat16
    assert num.inside("layers.2") == Numerics(gemm="bf16")
