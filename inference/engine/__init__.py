"""Answers requests with one model, several at a time: `Engine`, and what it takes and gives."""

from engine.engine import Engine, Request
from engine.sampling import SamplingParams

__all__ = ["Engine", "Request", "SamplingParams"]
