"""The tokens of one forward and what the host knows of them: `Batch`, its bounds, and the size of a cache page."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from core.devices import CPU, upload
from core.run_config import PAGE_SIZE

# New tokens of a sequence, how many of its tokens are cached before them, and its pages.
SequenceSlice = tuple[Sequence[int], int, Sequence[int]]
DECODE_ROWS = 64  # new tokens of a sequence up to which it is decoding, or close to it: see ops/gpu/attention.py


@dataclass(frozen=True)
class BatchBounds:
    """What the host knows of some sequences of a batch, so that nobody has to ask the device. Apart from `n` and
    `tokens` these may be upper bounds."""

    n: int = 0  # sequences
    tokens: int = 0  # new tokens of all of them
    longest_q: int = 0  # the most new tokens that one has
    longest_kv: int = 0  # the greatest length with these tokens
    total_kv: int = 0  # all lengths together

    @classmethod
    def of(cls, lengths: Sequence[tuple[int, int]]) -> "BatchBounds":
        """From (new tokens, length with them) for each sequence."""
        q, kv = [q for q, _ in lengths], [kv for _, kv in lengths]
        return cls(len(lengths), sum(q), max(q, default=0), max(kv, default=0), sum(kv))


@dataclass(frozen=True)
class Batch:
    """Ragged tokens of B sequences, one forward's worth: whole prompts, chunks of prompts and single tokens alike."""

    tokens: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64, each token's place in its own sequence
    slots: torch.Tensor  # (T,) int64, where its latent goes: page * PAGE_SIZE + offset
    cu_seqlens_q: torch.Tensor  # (B+1,) int32, where each sequence's tokens begin; the last entry is T
    kv_lens: torch.Tensor  # (B,) int32, each sequence's length with these tokens
    pages: torch.Tensor  # (B, P) int32, each sequence's pages in order, padded with 0
    decode: BatchBounds = BatchBounds()  # of the sequences before the first with more than DECODE_ROWS new tokens
    prefill: BatchBounds = BatchBounds()  # of the others
    lane_rows: tuple[int, ...] = ()  # with lanes: how many tokens each brings to this forward; an idle one's is padding
    # What attention works out from lengths and bounds, once for all layers; a changed batch starts without.
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def whole(self) -> BatchBounds:
        a, b = self.decode, self.prefill
        longest = max(a.longest_q, b.longest_q), max(a.longest_kv, b.longest_kv)
        return BatchBounds(a.n + b.n, a.tokens + b.tokens, *longest, a.total_kv + b.total_kv)

    @classmethod
    def pack(
        cls, sequences: Sequence[SequenceSlice], device: torch.device | str = CPU, lane_rows: tuple[int, ...] = ()
    ) -> "Batch":
        """One batch of all sequences' new tokens; those that decode had better come first."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        bounds = [0]
        widest = max(len(pages) for _, _, pages in sequences)
        for new, start, pages in sequences:
            assert new and len(pages) * PAGE_SIZE >= start + len(new), "a sequence without tokens, or without room"
            tokens += new
            positions += range(start, start + len(new))
            slots += [pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(start, start + len(new))]
            bounds.append(len(tokens))

        lengths = [(len(new), start + len(new)) for new, start, _ in sequences]
        n_decode = next((i for i, (q, _) in enumerate(lengths) if q > DECODE_ROWS), len(lengths))

        def tensor(values: list, dtype: torch.dtype) -> torch.Tensor:
            return upload(values, dtype, device)

        return cls(
            tensor(tokens, torch.int64),
            tensor(positions, torch.int64),
            tensor(slots, torch.int64),
            tensor(bounds, torch.int32),
            tensor([kv for _, kv in lengths], torch.int32),
            tensor([[*pages, *[0] * (widest - len(pages))] for _, _, pages in sequences], torch.int32),
            BatchBounds.of(lengths[:n_decode]),
            BatchBounds.of(lengths[n_decode:]),
            lane_rows,
        )
