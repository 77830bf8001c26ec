"""The pages of the sequences that recorded steps run: which row of a table each has, on the host and on the device."""

import torch

from core.batch import SequenceSlice
from core.devices import upload


class BlockTable:
    """A row of page numbers for each sequence, which keeps its row from step to step. Only what has changed since the
    last step is sent: the page that a sequence has got, or the row of one that has come.

    A sequence is told by its list of pages, which grows in place; one that lost its pages comes with another list.
    Entries behind a sequence's pages are whatever was there, always pages that exist.
    """

    def __init__(self, rows: int, n_pages: int, padding_page: int, device: torch.device):
        self.n_pages = n_pages
        self.pages = torch.full((rows, n_pages), padding_page, dtype=torch.int32, device=device)  # (rows, n_pages)
        self._held: list[list[int] | None] = [None] * rows
        self._sent = [0] * rows  # pages of each row that the device has
        self._row_of: dict[int, int] = {}  # by the identity of a list in _held

    def rows_needed(self, slices: list[SequenceSlice]) -> int:
        """The number of rows from the first to the last that these sequences would have if none were moved."""
        rows = [self._row_of.get(id(pages), -1) for _, _, pages in slices]
        return max(len(slices), max(rows, default=-1) + 1)

    def place(self, slices: list[SequenceSlice], n: int) -> list[int]:
        """The row of each sequence, among the first n; brings the device's pages up to date."""
        rows = [self._row_of.get(id(pages), n) for _, _, pages in slices]
        if max(rows, default=0) >= n:
            taken = set(rows)
            free = (row for row in range(n) if row not in taken)
            for i, row in enumerate(rows):
                if row >= n:
                    rows[i] = self._move(slices[i][2], next(free))  # type: ignore[arg-type]
        at: list[int] = []
        new: list[int] = []
        for (_, _, pages), row in zip(slices, rows, strict=True):
            sent = self._sent[row]
            if sent < len(pages):
                at += range(row * self.n_pages + sent, row * self.n_pages + len(pages))
                new += pages[sent:]
                self._sent[row] = len(pages)
        if at:
            changed, held = upload([at, new], torch.int64, self.pages.device).unbind()
            self.pages.view(-1).index_copy_(0, changed, held.int())
        return rows

    def _move(self, pages: list[int], row: int) -> int:
        """Gives a sequence a row whose own, if it has one, has no part in this step."""
        if (left := self._held[row]) is not None:
            del self._row_of[id(left)]
        if (before := self._row_of.get(id(pages))) is not None:
            self._held[before] = None
        self._held[row], self._sent[row], self._row_of[id(pages)] = pages, 0, row
        return row
