"""Stored latents follow the nets: those of trained rows are replaced by the ones that an update computed.

Letters: B sequences, T steps, D deter, K categoricals, C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sb3_dreamer_gpld.nets.rssm import States
from sb3_dreamer_gpld.transfer import PendingArrays, to_host

if TYPE_CHECKING:
    from sb3_dreamer_gpld.buffers import SequenceReplayBuffer, SequenceSamples


class _Newer(NamedTuple):
    """Latents on their way to the host.

    :param envs, starts: of their windows, (B,)
    :param arrays: deter (B, T, D) and class indices (B, T, K)
    """

    envs: np.ndarray
    starts: np.ndarray
    arrays: PendingArrays


class LatentRefresh:
    """Writes the latents of updates into the buffer that their batches came from.

    :param buffer: is written into; one whose rows lie on the device takes them at once, without a wait
    :param late: write those of an update after the next one has been begun, whose batch has seen the older ones then. A GPU
        goes on meanwhile, instead of waiting for the host
    """

    def __init__(self, buffer: SequenceReplayBuffer, late: bool) -> None:
        self.buffer, self.late = buffer, late
        self._waiting: _Newer | None = None

    def add(self, samples: SequenceSamples, states: States) -> None:
        """Take over what an update computed.

        :param samples: its batch
        :param states: its posterior states, (B, T, ·), which may change afterwards. If the update failed and some of them are
            not finite, these rows have no latent from then on
        """
        finite = (states.deter.sum(-1) + states.stoch.sum((-2, -1))).isfinite().unsqueeze(-1)  # (B, T, 1)
        classes = states.stoch.argmax(-2).masked_fill(~finite, -1)  # (B, T, K)
        if self.buffer.storage == "device":
            self.buffer.update_latents(samples.envs, samples.starts, states.deter, classes)
            return
        newer = _Newer(samples.envs, samples.starts, to_host(states.deter, classes))
        before, self._waiting = self._waiting, newer
        self._write(before)
        if not self.late:
            self.finish()

    def finish(self) -> None:
        """Write all that is waiting."""
        waiting, self._waiting = self._waiting, None
        self._write(waiting)

    def _write(self, newer: _Newer | None) -> None:
        if newer is not None:
            self.buffer.update_latents(newer.envs, newer.starts, *newer.arrays.wait())
