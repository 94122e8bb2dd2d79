"""What the workers of a training do together about its checkpoints; worker 0 alone reads and writes the directory."""

from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
from numpy.typing import NDArray

from cluster.errors import CheckpointError
from jobs.training.checkpoint import State, assign, host_copies, weights_hash
from jobs.training.keeper import CheckpointStore, Keeper

LOSS_SCALE = "loss_scale"
"""The part that only training in float16 has."""
NO_CHECKPOINT, NONE_WHOLE = -1, -2
"""What worker 0 tells the others in place of the step to go on from."""

Exchange = Callable[[Sequence[int]], NDArray[np.int32]]
"""Every worker's integers, [worker, n]."""


class Checkpointing:
    """Every worker calls each method at the same step."""

    def __init__(
        self,
        parts: Mapping[str, Sequence[keras.Variable]],
        store: CheckpointStore,
        keeper: Keeper,
        rank: int,
        exchange: Exchange,
        stop: Callable[[str], None],
    ) -> None:
        """`parts` are the variables by the part of a checkpoint that holds them. `stop` tells the driver, of worker 0,
        why training cannot go on."""
        self._parts, self._store, self._keeper = parts, store, keeper
        self._rank, self._exchange, self._stop = rank, exchange, stop
        self.stopped = False
        """Whether training cannot go on, on every worker; the driver has been told why."""

    def restore(self) -> State | None:
        """Take up the newest checkpoint of this run that is whole; None where there is none, or training is stopped."""
        step = int(self._exchange([self._newest() if self._rank == 0 else NO_CHECKPOINT])[0, 0])
        self.stopped = step == NONE_WHOLE
        if step < 0:
            return None
        checkpoint = self._store.open(step)
        for part, variables in self._parts.items():
            arrays = checkpoint.read(part)
            # It begins anew where the precision is another than before.
            if part != LOSS_SCALE or len(arrays) == len(variables):
                assign(variables, arrays, part)
        return checkpoint.state

    def save(self, describe: Callable[[str], State]) -> None:
        """Copy what a checkpoint holds; worker 0 writes it while training goes on.

        `describe` makes the state of the SHA-256 of the weights. Raises RuntimeError when the workers' ones differ.
        """
        # Only then are there never more than one copy in memory and one checkpoint to be lost.
        self._keeper.wait()
        parts = {name: host_copies(variables) for name, variables in self._parts.items()}
        digest = weights_hash(
            [array for name, arrays in parts.items() if name not in ("optimizer", LOSS_SCALE) for array in arrays]
        )
        words = [int(digest[i : i + 7], 16) for i in range(0, 56, 7)]
        told = self._exchange([*words, int(self._keeper.given_up)])
        state = describe(digest)
        if len(np.unique(told[:, :-1], axis=0)) != 1:
            raise RuntimeError(f"the workers hold different weights after step {state.step}")
        self.stopped = bool(told[:, -1].any())
        if self._rank == 0 and not self.stopped:
            self._keeper.save(state, parts)

    def finish(self) -> None:
        """To be called when training has ended: the last checkpoint is then written, or the driver knows why not."""
        if self._rank == 0:
            try:
                self._keeper.finish()
            except CheckpointError as error:
                self._stop(str(error))

    def _newest(self) -> int:
        """The step to go on from, as worker 0 sees it."""
        self._store.clean()
        try:
            newest = self._store.newest()
        except CheckpointError as error:
            self._stop(str(error))
            return NONE_WHOLE
        return NO_CHECKPOINT if newest is None else newest.state.step
