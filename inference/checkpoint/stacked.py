"""Experts that are stacked in one tensor, read as the single experts of the released files.

transformers 5 has all experts of a layer in two parameters, and saves them so with `save_original_format=False`:

    mlp.experts.gate_up_proj (E, 2M, H)   the rows of gate_proj, then those of up_proj, of each expert
    mlp.experts.down_proj    (E, H, M)

FP8 weights have scales beside them, `gate_up_proj_scale_inv` and `down_proj_scale_inv`, one per 128x128 block. An
expert is a run of bytes in the file, so it is an Entry like any other, which starts within the stacked tensor.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace

from checkpoint.reading import Entry, dtype_and_shape
from core.config import BLOCK_SIZE, ModelArgs
from core.errors import CheckpointError

STACKED = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)(_scale_inv)?")


def unstack(name: str, entry: Entry, args: ModelArgs) -> Iterator[tuple[str, Entry]]:
    """The tensors that a tensor stands for, by their names in released files: (M, H), (M, H) or (H, M) of each expert
    where it stacks them, otherwise the tensor itself.

    Raises CheckpointError for a stack of another shape than the config's.
    """
    if not (match := STACKED.fullmatch(name)):
        yield name, entry
        return
    before, kind, scale = match.groups(default="")
    rows, columns = args.moe_inter_dim, args.dim
    if kind == "down_proj":
        rows, columns = columns, rows
    if scale:
        rows, columns = math.ceil(rows / BLOCK_SIZE), math.ceil(columns / BLOCK_SIZE)
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    shape = (args.n_routed_experts, rows * len(parts), columns)
    if entry.shape != shape:
        wanted, found = dtype_and_shape(entry.dtype, shape), dtype_and_shape(entry.dtype, entry.shape)
        text = f"{entry}: expected experts stacked as {wanted}, found {found}"
        raise CheckpointError(text, entry.file, entry.name, wanted, found)
    nbytes = rows * columns * entry.dtype.itemsize
    start = entry.start
    for expert in range(args.n_routed_experts):
        for i, part in enumerate(parts):
            which = f"[{expert}, {i * rows}:{(i + 1) * rows}]" if len(parts) > 1 else f"[{expert}]"
            single = replace(entry, shape=(rows, columns), start=start, nbytes=nbytes, crc=None, part=which)
            yield f"{before}{expert}.{part}.weight{scale}", single
            start += nbytes
