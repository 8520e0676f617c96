# SPDX-License-Identifier: Apache-2.0
"""Which layer and which request the next sample of attention mass is taken of."""

from __future__ import annotations


class MassSampling:
    """One sample every so many decode steps that select, of all layers in turn and of the requests in turn."""

    def __init__(self, every: int, num_layers: int) -> None:
        """
        Args:
            every: steps; 0: no samples.
            num_layers: layers that select.
        """
        self._every, self._num_layers = every, num_layers
        self._steps = self._samples = 0

    def choose(self, num_requests: int) -> tuple[int, int] | None:
        """Layer and request for this step, from 0; None: no sample. Called once per step.

        Args:
            num_requests: that can be sampled.
        """
        if self._every == 0 or self._num_layers == 0 or num_requests == 0:
            return None
        self._steps += 1
        if self._steps % self._every:
            return None
        turn, layer = divmod(self._samples, self._num_layers)
        self._samples += 1
        # Shifted each turn, so that a layer does not meet the same of a steady batch's requests only.
        return layer, (layer + turn) % num_requests
