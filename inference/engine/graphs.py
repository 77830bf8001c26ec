"""Forwards of fixed shape, recorded once as CUDA graphs and replayed: the launches of a decode step become one.

A decode step runs few tokens of each sequence (one, or one and its drafts), so a few shapes serve every such step: a
batch is padded with empty sequences to the next recorded number, and each sequence to the recorded number of tokens.
The latents of padding go to a page that no sequence reads. A replay's inputs go to the device in one copy; the pages
of all sequences lie there, in a table of which only changes are sent (block_table.py). What follows from every row, its
logits and the greedy choice among them, is recorded too. One shape more serves a short prompt or the last chunk of one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm

from core.batch import DECODE_ROWS, Batch, BatchBounds, SequenceSlice
from core.devices import upload
from core.run_config import PAGE_SIZE, RunConfig
from engine.block_table import BlockTable
from engine.sampling import greedy

# a batch and hidden states (T, H), if it takes some, to hidden states (T, H)
Forward = Callable[[Batch, torch.Tensor | None], torch.Tensor]
Capture = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
# Of the chunk of a prompt that is recorded: its new tokens, and the sequence's with them, for which keys and values are
# expanded whether or not they are there. A longer chunk keeps the device busy for longer than the host launches.
CHUNK_ROWS, CHUNK_KEYS = 512, 2048


def records(gpu: bool, dtype: torch.dtype) -> bool:
    """Whether decode steps can be recorded: on a GPU, in bfloat16. Other types attend as the reference does, which
    asks the device for lengths and pages."""
    return gpu and dtype == torch.bfloat16


def records_chunks(run: RunConfig, lanes: int) -> bool:
    """Whether a chunk of a prompt is recorded too: where there can be one. All lanes would have to fill it up."""
    fits = min(run.max_num_batched_tokens, run.pages_per_sequence * PAGE_SIZE) >= CHUNK_ROWS
    return lanes == 1 and fits


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


class RecordedBuffers:
    """What all recorded forwards share on the device: input hidden states, the block table, and what they leave."""

    def __init__(self, rows: int, width: int, vocab: int, dim: int, dtype: torch.dtype, table: BlockTable):
        """`rows` sequences of at most `width` tokens; vocab 0: there is no head, as in a stage that is not the last."""
        device, most = table.pages.device, rows * width
        self.table = table
        self.hidden = torch.zeros(most, dim, dtype=dtype, device=device)
        self.logits = torch.empty(most if vocab else 0, vocab, dtype=torch.float32, device=device)
        self.choice = torch.empty(2, most if vocab else 0, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.table.pages, self.hidden, self.logits, self.choice))


class Replayed(NamedTuple):
    """What a replay left; the next one overwrites it. Logits and choice are None where no head was recorded."""

    hidden: torch.Tensor  # (rows, H), of padding too
    logits: torch.Tensor | None  # (rows, V), float32
    choice: torch.Tensor | None  # (2, rows), as sampling.greedy
    rows: list[int]  # of the step's tokens, in order


class Graphs:
    """One forward, recorded for batches of up to `max_num_seqs` sequences of `width` tokens each."""

    def __init__(
        self,
        forward: Forward,
        buffers: RecordedBuffers,
        *,
        max_num_seqs: int,
        width: int,
        padding_page: int,
        capture: Capture,
        head: Callable[[torch.Tensor], torch.Tensor] | None = None,
        progress: str = "",
        lanes: int = 1,
    ):
        """padding_page: the page that padding's latents are written to; `head`: hidden states (rows, H) to logits
        (rows, V); `progress`: the label of a progress bar, none if empty. `lanes` record and replay together, each as
        many sequences.
        """
        self.least = 0 if width <= DECODE_ROWS else width // 2 + 1  # new tokens of a sequence: more would be padding
        self.width, self.padding_page, self.buffers = width, padding_page, buffers
        self.lanes, self.max_num_seqs, self.has_head = lanes, max_num_seqs, head is not None
        self._replay: dict[int, Callable[[], torch.Tensor]] = {}
        self._static_inputs: dict[int, torch.Tensor] = {}
        device = buffers.hidden.device
        bounds = torch.arange(0, max_num_seqs * width + 1, width, dtype=torch.int32, device=device)
        # the largest first: the smaller ones then fit into the memory it took
        for n in tqdm(sizes(max_num_seqs)[::-1], desc=progress, unit="graph", disable=not progress or None):
            self._static_inputs[n] = upload(self._pack([], [], n), torch.int64, device)
            run = partial(_forward, forward, head, self._static_inputs[n], buffers, bounds[: n + 1], width, lanes)
            self._replay[n] = capture(run)

    def fit(self, slices: Sequence[SequenceSlice]) -> bool:
        """Whether a recorded shape takes a step of these sequences."""
        return len(slices) <= self.max_num_seqs and self.fitting(slices) == len(slices)

    def fitting(self, slices: Sequence[SequenceSlice]) -> int:
        """How many of a step's first sequences a recorded shape takes."""
        width, n_pages = self.width, self.buffers.table.n_pages
        for i, (tokens, _, pages) in enumerate(slices[: self.max_num_seqs]):
            if not self.least <= len(tokens) <= width or len(pages) > n_pages:
                return i
        return min(len(slices), self.max_num_seqs)

    def run(self, slices: list[SequenceSlice], hidden: torch.Tensor | None = None, n: int = 0) -> Replayed:
        """The forward on a step's sequences, which must fit. `n`: the most rows of the block table that any lane needs.

        hidden (T, H): input hidden states, one for each token.
        """
        n = next(size for size in reversed(self._replay) if size >= max(n, len(slices)))
        places = self.buffers.table.place(slices, n)
        packed = upload(self._pack(slices, places, n), torch.int64, self.buffers.hidden.device)
        self._static_inputs[n].copy_(packed, non_blocking=True)
        width = self.width
        if width == 1:
            rows = places
        else:
            firsts = [place * width for place in places]
            rows = [at + j for at, (tokens, _, _) in zip(firsts, slices, strict=True) for j in range(len(tokens))]
        if hidden is not None:
            self._put(hidden, rows)
        out = self._replay[n]()
        if not self.has_head:
            return Replayed(out, None, None, rows)
        return Replayed(out, self.buffers.logits[: n * width], self.buffers.choice[:, : n * width], rows)

    def close(self) -> None:
        """Frees what was recorded: it may hold communicators."""
        self._replay.clear()

    def _put(self, hidden: torch.Tensor, rows: list[int]) -> None:
        if rows == list(range(len(rows))):
            self.buffers.hidden[: len(rows)] = hidden
        else:
            self.buffers.hidden.index_copy_(0, upload(rows, torch.int64, hidden.device), hidden)

    def _pack(self, slices: Sequence[SequenceSlice], places: Sequence[int], n: int) -> list[int]:
        """n sequences' tokens, positions, slots and lengths, one after another, each at its place; those that `slices`
        does not name are padding."""
        width, padding_slot = self.width, self.padding_page * PAGE_SIZE
        tokens, positions = [0] * (n * width), [0] * (n * width)
        slots, lengths = [padding_slot] * (n * width), [1] * n
        for place, (new, start, held) in zip(places, slices, strict=True):
            if width == len(new) == 1:  # most steps have nothing else
                tokens[place], positions[place], lengths[place] = new[0], start, start + 1
                slots[place] = held[start // PAGE_SIZE] * PAGE_SIZE + start % PAGE_SIZE
                continue
            at = place * width
            for p, token in enumerate(new, start):
                tokens[at], positions[at] = token, p
                slots[at] = held[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE
                at += 1
            for filled in range(at, (place + 1) * width):
                positions[filled] = start
            lengths[place] = start + max(len(new), 1)
        return tokens + positions + slots + lengths


def _forward(
    forward: Forward,
    head: Callable[[torch.Tensor], torch.Tensor] | None,
    static_inputs: torch.Tensor,
    buffers: RecordedBuffers,
    cu_seqlens_q: torch.Tensor,
    width: int,
    lanes: int,
) -> torch.Tensor:
    """What is recorded. Not a method: a graph that refers to what holds it is freed by the garbage collector alone."""
    n = len(cu_seqlens_q) - 1
    t, n_pages = n * width, buffers.table.n_pages
    tokens, positions, slots, lengths = static_inputs.split([t, t, t, n])
    longest = n_pages * PAGE_SIZE  # the bounds must hold for every batch that may be replayed
    bounds = BatchBounds(n, t, width, longest, n * longest)
    lane_rows = (t,) * lanes if lanes > 1 else ()
    pages = buffers.table.pages[:n]
    decode, prefill = (bounds, BatchBounds()) if width <= DECODE_ROWS else (BatchBounds(), bounds)
    batch = Batch(tokens, positions, slots, cu_seqlens_q, lengths.int(), pages, decode, prefill, lane_rows)
    out = forward(batch, buffers.hidden[:t])
    if head is not None:
        buffers.logits[:t] = head(out)
        buffers.choice[:, :t] = greedy(buffers.logits[:t])
    return out
