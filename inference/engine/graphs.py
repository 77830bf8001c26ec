"""Forwards of fixed shape, recorded once as CUDA graphs and replayed: the launches of a decode step become one.

A decode step runs few tokens of each sequence (one, or one and its drafts), so a few shapes serve every such step: a
batch is padded with empty sequences to the next recorded number, and each sequence to the recorded number of tokens.
The latents of padding go to a page that no sequence reads. A replay's inputs go to the device in one copy.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from tqdm import tqdm

from core.batch import DECODE_ROWS, Batch, BatchBounds, SequenceSlice
from core.run_config import PAGE_SIZE

# a batch and hidden states (T, H), if it takes some, to hidden states (T, H)
Forward = Callable[[Batch, torch.Tensor | None], torch.Tensor]
Capture = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]


def records(gpu: bool, dtype: torch.dtype) -> bool:
    """Whether decode steps can be recorded: on a GPU, in bfloat16. Other types attend as the reference does, which
    asks the device for lengths and pages."""
    return gpu and dtype == torch.bfloat16


def cuda_capture() -> Capture:
    """Returns a function that turns one that launches kernels into one that replays them.

    All graphs share one pool of memory, as they never run at the same time; a result is kept, so that its memory is not
    given to the next graph. They share a stream to warm up on, as cuBLAS keeps a workspace (32 MiB on Hopper) for every
    stream it has worked on.
    """
    pool = torch.cuda.graph_pool_handle()
    side = torch.cuda.Stream()

    def capture(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # what is compiled, loaded or allocated at a first call must not be recorded
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

    return capture


def sizes(most: int) -> list[int]:
    """Numbers of sequences to record: every one to 4, then in steps that waste at most a third, up to `most`."""
    small = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256) if n < most]
    return [*small, *range(320, most, 64), most]


class Graphs:
    """One forward, recorded for batches of up to `max_num_seqs` sequences of `width` tokens each."""

    def __init__(
        self,
        forward: Forward,
        *,
        max_num_seqs: int,
        width: int,
        hidden: torch.Tensor,
        n_pages: int,
        padding_page: int,
        capture: Capture,
        progress: str = "",
        lanes: int = 1,
    ):
        """hidden (max_num_seqs * width, H): the buffer for input hidden states, shared by all that is recorded.

        n_pages: the most pages of a sequence; padding_page: the page that padding's latents are written to; `progress`:
        the label of a progress bar, none if empty. `lanes` record and replay together, each as many sequences.
        """
        assert width <= DECODE_ROWS
        self.width, self.n_pages, self.padding_page, self.hidden = width, n_pages, padding_page, hidden
        self.lanes, self.max_num_seqs = lanes, max_num_seqs
        self._replay: dict[int, Callable[[], torch.Tensor]] = {}
        self._static_inputs: dict[int, torch.Tensor] = {}
        # the largest first: the smaller ones then fit into the memory it took
        for n in tqdm(sizes(max_num_seqs)[::-1], desc=progress, unit="graph", disable=not progress):
            self._static_inputs[n] = torch.tensor(self._pack([], n), dtype=torch.int64, device=hidden.device)
            self._replay[n] = capture(partial(self._forward, forward, n))

    def fit(self, slices: Sequence[SequenceSlice]) -> bool:
        """Whether a recorded shape takes a step of these sequences."""
        return len(slices) <= self.max_num_seqs and all(
            len(tokens) <= self.width and len(pages) <= self.n_pages for tokens, _, pages in slices
        )

    def run(self, slices: Sequence[SequenceSlice], hidden: torch.Tensor | None = None, n: int = 0) -> torch.Tensor:
        """The forward on a step's sequences, which must fit: (T, H), T counting real tokens only. `n`: the most
        sequences of any lane.

        hidden (T, H): input hidden states, a row for each token. The result is overwritten by the next replay.
        """
        n = min(size for size in self._replay if size >= max(n, len(slices)))
        packed = torch.tensor(self._pack(slices, n), dtype=torch.int64)
        if self.hidden.is_cuda:
            packed = packed.pin_memory()
        self._static_inputs[n].copy_(packed, non_blocking=True)
        rows = [i * self.width + j for i, (tokens, _, _) in enumerate(slices) for j in range(len(tokens))]
        no_padding = len(rows) == len(slices) * self.width
        index = None if no_padding else torch.tensor(rows).to(self.hidden.device, non_blocking=True)
        if hidden is not None:
            if index is None:
                self.hidden[: len(rows)] = hidden
            else:
                self.hidden.index_copy_(0, index, hidden)
        out = self._replay[n]()
        return out[: len(rows)] if index is None else out[index]

    def _forward(self, forward: Forward, n: int) -> torch.Tensor:
        return forward(self._batch(self._static_inputs[n], n), self.hidden[: n * self.width])

    def _pack(self, slices: Sequence[SequenceSlice], n: int) -> list[int]:
        """n sequences' tokens, positions, slots, lengths and pages, one after another; those that `slices` does not
        name are padding."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        lengths: list[int] = []
        pages: list[int] = []
        padding_slot = self.padding_page * PAGE_SIZE
        for new, start, held in [*slices, *[([], 0, [])] * (n - len(slices))]:
            fill = self.width - len(new)
            tokens += [*new, *[0] * fill]
            positions += [*range(start, start + len(new)), *[start] * fill]
            slots += [held[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(start, start + len(new))]
            slots += [padding_slot] * fill
            lengths.append(start + max(len(new), 1))
            pages += [*held, *[self.padding_page] * (self.n_pages - len(held))]
        return tokens + positions + slots + lengths + pages

    def _batch(self, static_inputs: torch.Tensor, n: int) -> Batch:
        """The batch that `_pack` wrote, as views of the device's copy."""
        t = n * self.width
        tokens, positions, slots, lengths, pages = static_inputs.split([t, t, t, n, n * self.n_pages])
        cu_seqlens = torch.arange(0, t + 1, self.width, dtype=torch.int32, device=static_inputs.device)
        longest = self.n_pages * PAGE_SIZE  # the bounds must hold for every batch that may be replayed
        bounds = BatchBounds(n, t, self.width, longest, n * longest)
        pages = pages.int().view(n, self.n_pages)
        lane_rows = (t,) * self.lanes if self.lanes > 1 else ()
        return Batch(tokens, positions, slots, cu_seqlens, lengths.int(), pages, bounds, lane_rows=lane_rows)
