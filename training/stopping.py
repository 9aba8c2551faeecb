"""Being told to stop: at the first SIGINT or SIGTERM a run ends after its step, at the second at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from options import Interrupted, first_process

_AGAIN = 1.0  # seconds after which a signal is a second one: torchrun hands on what its processes got themselves


class Stop:
    """Whether the process was told to stop, and by which signal. One that it was started to ignore is ignored."""

    number: int | None = None
    _when = 0.0

    @property
    def told(self) -> bool:
        """Whether it was."""
        return self.number is not None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, the first signal is only remembered; the second acts as it does outside. In the main thread only.

        After the first one it stays so outside, where the process is about to end.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are another's
            return
        every = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in every.items() if handler not in (None, signal.SIG_IGN)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def told(number: int, frame: FrameType | None) -> None:
            if self.learn(number):
                if first_process():
                    os.write(2, b"\nstopping after this step; once more stops at once, without saving\n")
            elif time.monotonic() - self._when > _AGAIN:
                restore()
                os.kill(os.getpid(), number)

        try:
            for number in before:
                signal.signal(number, told)
            yield
        finally:
            if not self.told:
                restore()

    def learn(self, number: int) -> bool:
        """That some process of the run was told to, by a signal; 0 is none. Whether that is news."""
        if not number or self.number is not None:
            return False
        self._when, self.number = time.monotonic(), number
        return True

    def check(self) -> None:
        """Raise Interrupted if the process was told to."""
        if self.number is not None:
            raise Interrupted(self.number)
