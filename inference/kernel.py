"""The quantised ops under the names and at the place where the original repository has them.

    from kernel import act_quant, weight_dequant, fp8_gemm

They are Triton kernels; ops/gpu/gemm.py has them, ops/reference.py specifies them.
"""

from ops.gpu.gemm import act_quant, fp8_gemm, weight_dequant

__all__ = ["act_quant", "fp8_gemm", "weight_dequant"]
