"""The known mistakes of ports, each as a change of `exact_network.Network`: what a wrong port computes.

A port that failed is compared with all of these. The names, where a mutant of tests/mutation/ has the same bug, are that
mutant's. What a mistake changes is a method or a value of one network; the weights are shared.
"""

from mistakes import attention, fp8, norms, router
from mistakes.registry import MISTAKES, Mistake

__all__ = ["MISTAKES", "Mistake", "attention", "fp8", "norms", "router"]
