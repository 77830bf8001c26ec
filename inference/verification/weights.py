"""A checkpoint's weights one at a time, a window of rows at a time, so that any model fits a laptop's memory."""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint.directory import Checkpoint, choose_args
from checkpoint.partition import Partition
from checkpoint.reading import Entry, Reader
from checkpoint.table import scale_name, zero_name
from core.errors import UserError
from core.numerics import PLAIN, Form
from ops import reference

WINDOW_VALUES = 1 << 23  # of a weight that are widened at one time


class StoredWeight(NamedTuple):
    """Rows of a weight as the files hold them."""

    data: torch.Tensor  # (n, K), of INT4 (n, K/2)
    scale: torch.Tensor | None = None  # (blocks of rows, blocks of columns)
    zero: torch.Tensor | None = None
    form: Form = PLAIN

    def exact(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """The numbers that they stand for, (n, K)."""
        if self.scale is None:
            return self.data.to(dtype)
        values = reference.widened(self.data, self.form.block, self.zero).to(dtype)
        return values * self.spread(self.scale).to(dtype)

    def spread(self, blocks: torch.Tensor) -> torch.Tensor:
        """One number for each block as one for each value."""
        rows, columns = self.form.block
        n, k = self.data.shape[0], self.data.shape[1] * self.form.packing
        return blocks.float().repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]


class Weights:
    """The tensors of a checkpoint directory by our names (checkpoint/table.py), whole, read when they are asked for.

    path, args   the directory, and its model
    """

    def __init__(self, path: str | Path, config: str | Path | None = None, cache_bytes: int = 512 << 20):
        """Reads headers and config. Exact weights are kept up to so many bytes. Raises UserError for what is no whole
        checkpoint, or was converted for several ranks."""
        self.path = Path(path)
        checkpoint = Checkpoint(path)
        self.args = choose_args(checkpoint, config)
        if checkpoint.ranks is not None and 1 not in checkpoint.ranks:
            raise UserError(f"{path}: converted for several ranks; give the directory that it was converted from")
        self.has_mtp = bool(self.args.n_mtp_layers) and checkpoint.has_mtp
        self.entries: dict[str, Entry] = checkpoint.match(Partition(self.args))
        self.specs = checkpoint.expected(self.args)
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[tuple, torch.Tensor] = OrderedDict()
        self._reader = Reader()

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def form(self, name: str) -> Form:
        return self.specs[name].form or PLAIN

    def shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of a weight; of one that is a vector, rows and 1."""
        entry = self._entry(name)
        return entry.rows, (entry.shape[1] if len(entry.shape) > 1 else 1) * self.form(name).packing

    def stored(self, name: str, first: int = 0, last: int | None = None) -> StoredWeight:
        """Rows [first, last) of a tensor, which begin with a whole block."""
        entry, form = self._entry(name), self.form(name)
        last = entry.rows if last is None else last
        if not form.is_quantised:
            return StoredWeight(self._rows(entry, first, last))
        assert first % form.block[0] == 0, (name, first)
        blocks = first // form.block[0], -(-last // form.block[0])
        scale = self._rows(self.entries[scale_name(name)], *blocks)
        zero = self._rows(self.entries[zero_name(name)], *blocks) if form.zeros else None
        return StoredWeight(self._rows(entry, first, last), scale, zero, form)

    def exact(
        self, name: str, dtype: torch.dtype = torch.float64, first: int = 0, last: int | None = None
    ) -> torch.Tensor:
        """Rows of what a tensor stands for."""
        key = name, dtype, first, last
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        value = self.stored(name, first, last).exact(dtype)
        if value.nbytes <= self.cache_bytes // 4:
            self._cache[key] = value
            while sum(kept.nbytes for kept in self._cache.values()) > self.cache_bytes:
                self._cache.popitem(last=False)
        return value

    def windows(self, name: str) -> Iterator[tuple[int, int]]:
        """The rows [first, last) of a weight in parts of whole blocks, of at most WINDOW_VALUES numbers if they can."""
        rows, columns = self.shape(name)
        unit = self.form(name).block[0] if self.form(name).is_quantised else 1
        step = max(WINDOW_VALUES // columns // unit, 1) * unit
        return ((first, min(first + step, rows)) for first in range(0, rows, step))

    def _entry(self, name: str) -> Entry:
        if name == "head.weight" and name not in self.entries:
            name = "embed.weight"  # tied
        if name not in self.entries and name.startswith("mtp.") and name.endswith((".embed.weight", ".head.weight")):
            name = name.split(".")[2] + ".weight"
        return self.entries[name]

    def _rows(self, entry: Entry, first: int, last: int) -> torch.Tensor:
        windows = [data.clone() for _, data in self._reader.rows(entry, first, last)]
        data = windows[0] if len(windows) == 1 else torch.cat(windows)
        return data.view(-1).view(entry.dtype).view(last - first, *entry.shape[1:])

    def close(self) -> None:
        self._reader.close()
        self._cache.clear()
