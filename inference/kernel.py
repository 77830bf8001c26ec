"""The quantised ops under the names and at the place where the original repository has them.

    from kernel import act_quant, weight_dequant, fp8_gemm

They are Triton kernels, which ops/reference.py specifies.
"""

from ops.gpu.gemm import fp8_gemm
from ops.gpu.quantisation import act_quant, weight_dequant

__all__ = ["act_quant", "fp8_gemm", "weight_dequant"]
