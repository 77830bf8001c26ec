"""The values of a checkpoint's tensors, checked in bounded memory: finite, not zeroed, scales that are scales.

NaN and infinity are found by comparing bits as integers.
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from checkpoint.directory import SCALE_NAMES, scale_error
from checkpoint.reading import Entry, Reader
from checkpoint.report import Report
from checkpoint.table import SCALES
from core.config import ModelArgs
from core.errors import CheckpointError, CheckWarning, UserError

WINDOW = 4 << 20  # bytes read at a time
CHUNK = 1 << 20  # bytes examined together, while they are in the processor's cache; as many zeros in a row are a hole
BATCH = 1 << 30  # bytes of tensors given to a thread at a time
THREADS = 2  # one reads while the other compares
BITS = {  # of a type: the integer as wide, the mask of all but the sign, and the least magnitude that is not finite
    torch.float8_e4m3fn: (torch.uint8, 0x7F, 0x7F),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
}


def check_values(entries: list[Entry], args: ModelArgs | None, report: Report) -> None:
    """Reads every byte, in the order on disk, with THREADS batches of tensors at a time."""
    powers = args is not None and args.scale_fmt == "ue8m0"
    groups = args is not None and args.group_size > 0
    batches: list[list[Entry]] = []
    left = 0
    for entry in sorted(entries, key=lambda e: (e.file, e.start)):
        if entry.nbytes > left:
            batches.append([])
            left = BATCH
        batches[-1].append(entry)
        left -= entry.nbytes
    stopping = threading.Event()

    def check_batch(batch: list[Entry]) -> list[tuple[str, UserError]]:
        wanted = itertools.takewhile(lambda _: not stopping.is_set(), batch)
        return list(tensor_problems(wanted, powers, bar.update, groups))

    with (
        tqdm(total=sum(e.nbytes for e in entries), unit="B", unit_scale=True, desc="checking") as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        try:
            for problems in pool.map(check_batch, batches):
                for check, problem in problems:
                    with report.checking(check):
                        raise problem
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    scales = sum(is_scale(entry) for entry in entries)
    weights = len(entries) - scales
    signs = "none negative" if groups else "positive"
    report.cover("scales", f"{scales:,} tensors: finite, {signs}{', powers of two' * powers}", scales)
    report.cover("weights", f"{weights:,} tensors: finite, not zero", weights)


def is_scale(entry: Entry) -> bool:
    return entry.name.endswith(SCALE_NAMES) and entry.dtype in SCALES


def tensor_problems(
    batch: Iterable[Entry], powers: bool, progress: Callable[[int], object], groups: bool = False
) -> Iterator[tuple[str, UserError]]:
    """What is wrong with the values of some tensors, each with the name of its check. `powers`: scales must be powers
    of two; `groups`: they may be zero, see scale_error. Calls `progress` with each tensor's number of bytes."""
    scratch = torch.empty(CHUNK, dtype=torch.uint8)
    with Reader(WINDOW) as reader:
        for entry in batch:
            check = "scales" if is_scale(entry) else "weights"
            try:
                if is_scale(entry):
                    found = scale_problems(entry, reader, powers, groups)
                else:
                    found = weight_problems(entry, reader, scratch)
                yield from ((check, problem) for problem in found)
            except UserError as e:  # its bytes cannot be read, or are not those that were written
                yield check, e
            progress(entry.nbytes)


def scale_problems(entry: Entry, reader: Reader, powers: bool, groups: bool) -> Iterator[CheckpointError]:
    scale = reader.read(entry).float()
    if problem := scale_error(entry, scale, groups):
        yield problem
    elif powers and (odd := (scale.frexp().mantissa != 0.5).nonzero()).numel():
        at = odd[0].tolist()
        wanted, found = "powers of two (scale_fmt ue8m0)", f"{scale[tuple(at)].item()} at {at}, {len(odd)} such"
        released = ".o_proj." in entry.name or ".wo." in entry.name  # V3.1-Terminus
        kind = CheckWarning if released else CheckpointError
        yield kind(f"{entry}: expected {wanted}, found {found}", entry.file, entry.name, wanted, found)


def weight_problems(entry: Entry, reader: Reader, scratch: torch.Tensor) -> Iterator[CheckpointError]:
    """Values that are not finite, and long runs of zeros. `scratch`: uint8 (CHUNK,), overwritten."""

    def damage(wanted: str, found: str) -> CheckpointError:
        return CheckpointError(f"{entry}: expected {wanted}, found {found}", entry.file, entry.name, wanted, found)

    if entry.dtype not in BITS or not entry.nbytes:
        return
    integer, mask, limit = BITS[entry.dtype]
    scratch = scratch.view(integer)
    count = first = at = zeros = most = 0
    for _, window in reader.rows(entry):
        for chunk in window.view(-1).view(integer).split(len(scratch)):
            bits = torch.bitwise_and(chunk, mask, out=scratch[: len(chunk)])
            largest = int(bits.amax())
            if largest >= limit:
                bad = (bits >= limit).nonzero()
                first = at + int(bad[0]) if not count else first
                count += len(bad)
            zeros = 0 if largest else zeros + len(chunk)
            most = max(most, zeros)
            at += len(chunk)
    if count:
        place = [int(i) for i in torch.unravel_index(torch.tensor(first), entry.shape)]
        yield damage("finite values", f"NaN or infinity at {place}, {count:,} such")
    if most == at and not may_be_zero(entry.name):
        yield damage("weights", "nothing but zeros")
    elif most * entry.dtype.itemsize >= CHUNK and most < at and not may_have_gaps(entry.name):
        yield damage("weights", f"{most:,} zeros in a row of {at:,} values")


def may_be_zero(name: str) -> bool:
    """A router's bias starts at zero and stays zero where no load had to be balanced."""
    return name.endswith("bias")


def may_have_gaps(name: str) -> bool:
    """The vocabulary may be padded with rows of tokens that do not exist."""
    return may_be_zero(name) or name.endswith(("embed.weight", "embed_tokens.weight", "head.weight"))
