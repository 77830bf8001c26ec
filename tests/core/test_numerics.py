"""Numerics: which modules are exceptions, seen from the modules around them."""

from core.numerics import Numerics


def test_exceptions_by_the_names_inside():
    num = Numerics(exceptions=("head", "layers.1.attn.wo", "layers.11.ffn.experts", "layers.11.ffn.gate"))
    assert num.inside("layers.1").exceptions == ("attn.wo",)
    assert num.inside("layers.1").inside("attn").inside("wo").is_exception
    assert not num.inside("layers.1").inside("attn").inside("wq_b").is_exception
    assert num.inside("layers.11").inside("ffn").exceptions == ("experts", "gate")
    assert num.inside("head").is_exception and not num.is_exception
    assert num.inside("layers.2") == Numerics()
