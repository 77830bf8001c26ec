"""Token ids to text, incrementally."""

import codecs
from collections.abc import Callable


class Detokenizer:
    """The text of a growing list of ids: all that `push` and `finish` return is `Tokenizer.decode` of the list.

    A character of several bytes is withheld until its last byte is there, so U+FFFD appears before `finish` only for
    bytes that can no longer become a character.
    """

    def __init__(self, piece: Callable[[int], bytes], is_control: Callable[[int], bool]) -> None:
        """Both take a token id: `piece` returns the token's bytes."""
        self._piece, self._is_control = piece, is_control
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._piece(token_id))

    def push_apart(self, token_id: int) -> tuple[str, str, bool]:
        """(leftover, text, is_control): as `push`, with the text of a character that a control token leaves incomplete
        apart from the token's own."""
        text, is_control = self.push(token_id), self._is_control(token_id)
        n = len(text) - len(self._piece(token_id).decode()) if is_control and text else 0
        return text[:n], text[n:], is_control

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


def _byte_letters() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable letter (Radford et al. 2019): printable Latin-1 bytes as
    themselves, the other 68 in order from U+0100 on. Returns letter -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


LETTER_BYTES = _byte_letters()
