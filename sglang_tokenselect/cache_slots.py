# SPDX-License-Identifier: Apache-2.0
"""Who holds which entry of the selection cache: host-side bookkeeping, once per decode step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class CacheSlots:
    """Entries 0..num_slots-1, lent to rows of `req_to_token`.

    SGLang decodes all running requests in every decode step. So a row that a step does not have was finished,
    aborted or retracted, and its entry goes to who needs one: no hook has to tell, and none can be missed.
    """

    def __init__(self, num_slots: int) -> None:
        self._free = list(reversed(range(num_slots)))
        self._slot_of: dict[int, int] = {}

    @property
    def num_lent(self) -> int:
        return len(self._slot_of)

    def release(self, rows: Iterable[int]) -> None:
        """Takes back the entries of these rows, if they have any."""
        for row in rows:
            slot = self._slot_of.pop(row, None)
            if slot is not None:
                self._free.append(slot)

    def lend(self, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Entries for the rows of a decode step.

        Returns:
            The entry of each row, -1 where none is left; and the entries that have a new holder, whose
            contents are someone else's.
        """
        new = [row for row in rows if row not in self._slot_of]
        if len(new) > len(self._free):
            self.release(self._slot_of.keys() - set(rows))
        fresh = [self._free.pop() for _ in range(min(len(new), len(self._free)))]
        self._slot_of.update(zip(new, fresh, strict=False))
        return [self._slot_of.get(row, -1) for row in rows], fresh
