"""Random numbers in [0, 1), each a function of what it is for alone: one by one, or ahead for many requests at once."""

from collections.abc import Sequence

import numpy as np

# What a random number is for: each use at a position has its own.
SAMPLE, DRAFT, ACCEPT = 0, 1, 2
# Philox 4x64-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011): multipliers and Weyl increments.
_MULTIPLIERS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B97F4A7C15], [0xBB67AE8584CAA73B]], dtype=np.uint64)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def uniform(seed: int, rng_key: int, position: int, use: int = SAMPLE) -> float:
    """A random number in [0, 1) from a counter-based generator (Philox 4x64): it depends on these numbers alone, not on
    what else is in the batch or was drawn before."""
    key = np.array([seed, rng_key], dtype=np.uint64)  # a plain list goes through float64 and merges large seeds
    counter = np.array([0, position, use, 0], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=counter)).random())


def uniforms(keys: np.ndarray, positions: np.ndarray, use: int) -> np.ndarray:
    """`uniform` of n requests, keys (n, 2) uint64 of seed and rng_key, at as many positions (n,) uint64: (n,) float64.
    A call takes as long as seven of `uniform`, whatever n up to some hundred."""
    n = len(positions)
    # numpy's generator counts before it draws: its first block is that of 1
    even = np.stack((np.ones(n, dtype=np.uint64), np.full(n, use, dtype=np.uint64)))  # words 0 and 2 of the counter
    odd = np.stack((positions, np.zeros(n, dtype=np.uint64)))  # words 1 and 3
    key = keys.T.copy()
    m_low, m_high = _MULTIPLIERS & _LOW, _MULTIPLIERS >> _HALF
    for _ in range(10):
        low, high = even & _LOW, even >> _HALF  # the products' upper halves, by halves of 32 bits
        middle = m_high * low + (m_low * low >> _HALF)
        upper = m_high * high + (middle >> _HALF) + (m_low * high + (middle & _LOW) >> _HALF)
        even, odd = upper[::-1] ^ odd ^ key, (_MULTIPLIERS * even)[::-1]
        key = key + _WEYL
    return (even[0] >> np.uint64(11)) * 2.0**-53


class Noise:
    """What `uniform` returns, made AHEAD positions at a time, for all requests that need some in one go."""

    AHEAD, KEPT = 32, 4096

    def __init__(self) -> None:
        # by seed, rng_key and use: a position, and the numbers from there on
        self._known: dict[tuple[int, int, int], tuple[int, np.ndarray]] = {}

    def ahead(
        self, wanted: Sequence[tuple[int, int, int]], counts: Sequence[int], use: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """For each (seed, rng_key, position) a first position (n,), and the numbers of AHEAD positions from it on
        (n, AHEAD), among them those of `counts` positions from the wanted one on. Numbers that end soon are made anew
        with the others, to be asked for less often."""
        if len(self._known) > self.KEPT:
            self._known.clear()
        ends, lacks = [], False
        for (seed, rng_key, position), n in zip(wanted, counts, strict=True):
            at = position - self._known.get((seed, rng_key, use), (position + self.AHEAD, ()))[0]
            lacks = lacks or not 0 <= at <= self.AHEAD - n
            if not 0 <= at <= self.AHEAD // 2 - n:
                ends.append((seed, rng_key, position))
        if lacks:
            self._make(ends, use)
        found = []
        for one, n in zip(wanted, counts, strict=True):
            first, known = self._known[*one[:2], use]
            if not 0 <= one[2] - first <= self.AHEAD - n:  # the same request twice, at positions that lie apart
                self._make([one], use)
                first, known = self._known[*one[:2], use]
            found.append((first, known))
        firsts, rows = zip(*found, strict=True)
        return np.array(firsts), np.stack(rows)

    def _make(self, missing: list[tuple[int, int, int]], use: int) -> None:
        first = {(seed, rng_key): position for seed, rng_key, position in reversed(missing)}
        keys = np.array(list(first), dtype=np.uint64).repeat(self.AHEAD, axis=0)
        positions = np.array(list(first.values()), dtype=np.uint64)[:, None] + np.arange(self.AHEAD, dtype=np.uint64)
        made = uniforms(keys, positions.ravel(), use).reshape(-1, self.AHEAD)
        for (request, position), row in zip(first.items(), made, strict=True):
            self._known[*request, use] = position, row
