"""Texts that are too long, found out before all of them is encoded."""

from collections.abc import Callable

from core.errors import UserError

PIECE = 1 << 16  # characters that are encoded at a time
LETTERS_PER_TOKEN = 8  # a text of more characters than this for each token of the limit is looked at in pieces first


class TooLong(UserError):
    """A text of more tokens than the caller's limit: of `n`, or of at least `n` where its end was not looked at."""

    def __init__(self, n: int, most: int, is_all: bool):
        super().__init__(f"{n} tokens{'' if is_all else ' or more'}, expected at most {most}")
        self.n, self.is_all = n, is_all


def refuse_long(text: str, most: int, count: Callable[[str], int]) -> None:
    """Raises TooLong as soon as a long text's pieces, which `count` counts the tokens of, have an eighth more than
    `most`: a cut adds a few tokens.

    Raises UserError where so many characters are so few tokens that only encoding them all at once would tell. A
    million spaces, one word to a BPE, take four seconds and 80 MB.
    """
    if len(text) <= max(LETTERS_PER_TOKEN * most, PIECE):
        return
    n = 0
    for start in range(0, len(text), PIECE):
        n += count(text[start : start + PIECE])
        if n * 7 // 8 > most:
            raise TooLong(n * 7 // 8, most, is_all=False)
    if len(text) > (longest := max(2 * LETTERS_PER_TOKEN * most, 16 * PIECE)):
        raise UserError(f"a text has {len(text)} characters, expected at most {longest}")
