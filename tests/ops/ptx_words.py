"""Races in shared memory: who touched each word last, and when."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
NOBODY, MANY = -1, -2


class Words:
    """All words of shared memory of a grid."""

    def __init__(self, count: int) -> None:
        self.writer, self.reader, self.reading_warp = (np.full(count, NOBODY, np.int32) for _ in range(3))
        self.written, self.read = np.full(count, -1, np.int32), np.full(count, -1, np.int32)
        self.written_in_warp, self.read_in_warp = np.zeros(count, np.int32), np.zeros(count, np.int32)

    def touch(
        self, word: Array, who: Array, warp: Array, time: Array, warp_time: Array, write: bool
    ) -> tuple[str, int] | None:
        """Note an access of one word a thread; a fault and the index of who did it, or None.

        Two accesses are in order if there is a barrier of the block between them, or one of the warp that both are in.
        What one instruction writes is looked at by ``Machine.store``.
        """
        writer = self.writer[word]
        if not write and (wrong := writer == NOBODY).any():
            return "uninitialised shared memory is read", int(wrong.argmax())
        racing = (self.written[word] == time) & (writer != who)
        if racing.any():
            racing &= (writer // 32 != warp) | (self.written_in_warp[word] >= warp_time)
            if racing.any():
                return f"a race of a {'write' if write else 'read'} after a write", int(racing.argmax())
        read_since = self.read[word] == time
        if write:
            racing = read_since & (self.reader[word] != who)
            racing &= (self.reading_warp[word] != warp) | (self.read_in_warp[word] >= warp_time)
            if racing.any():
                return "a race of a write after a read", int(racing.argmax())
            self.writer[word], self.written[word], self.written_in_warp[word] = who, time, warp_time
            return None
        # Lanes that read before a barrier of their warp are in order with whoever of the warp writes behind it.
        together = read_since & ((self.reading_warp[word] != warp) | (self.read_in_warp[word] >= warp_time))
        for owner, own, since in ((self.reader, who, together), (self.reading_warp, warp, read_since)):
            new = np.where(since & (owner[word] != own), MANY, own)
            owner[word] = new
            owner[word[owner[word] != new]] = MANY
        self.read[word], self.read_in_warp[word] = time, warp_time
        return None
