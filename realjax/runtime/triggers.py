"""When to save and evaluate."""

import time

from realjax.core.processes import from_first
from realjax.data.loader import Position
from realjax.dataflow.run import Frequency


class Trigger:
    """Fires at the ends of epochs, at steps and after seconds, whichever of them its frequency sets."""

    def __init__(self, frequency: Frequency) -> None:
        self.frequency = frequency
        self._last_fired = time.monotonic()

    def fires(self, position: Position) -> bool:
        """Returns whether it is due after the step that `position` describes."""
        f = self.frequency
        by_epoch = f.epochs is not None and position.ends_epoch and position.epoch % f.epochs == 0
        by_step = f.steps is not None and position.global_step % f.steps == 0
        # Clocks differ between processes, and all of them must save or none.
        elapsed = 0.0 if f.secs is None else from_first(time.monotonic() - self._last_fired)
        by_time = f.secs is not None and elapsed >= f.secs
        if by_time:
            self._last_fired = time.monotonic()
        return by_epoch or by_step or by_time
