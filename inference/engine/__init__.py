"""Answers requests with one model, several at a time: `Engine`, and what it takes and gives."""

from core.sampling_params import SamplingParams
from engine.engine import Engine
from engine.request import Request

__all__ = ["Engine", "Request", "SamplingParams"]
