"""Being told to stop: a signal, or a time limit, becomes a wish that all ranks grant after the same step."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

# Exit codes: of a rank that ended because of another one, "start me again" (EX_TEMPFAIL), that of a shell after Ctrl-C.
PEER_FAILED, PREEMPTED, INTERRUPTED = 1, 75, 130

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
TIME_LIMIT, UNSAVED = signal.NSIG, signal.NSIG + 1  # reasons beside the signals
SAME = 3.0  # seconds; a launcher that is told to stop passes the signal on to ranks which have it already


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Around what ends a process: where a failure left its process group open, the process ends here, without more.

    NCCL waits for all ranks when a group ends, at a process's regular end, too; a rank that failed alone would wait for
    those which wait for it.
    """
    try:
        yield
    except BaseException as error:
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_initialized():
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else PEER_FAILED)
        raise


class StopRequest:
    """Whether this rank was told to stop, and why. A context manager, for the main thread, around the whole program.

    The first signal only leaves a wish, `reason`; the loop grants it at the end of a step. Another one, SAME seconds
    later, ends the process at once, wherever it is: a thread listens, for Python's own handlers wait while a
    collective runs. So does the first SIGINT before `defer_interrupts`: there is nothing to save yet.

    time_limit: minutes from now after which the run shall stop as if preempted; None for no limit.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        self.ends = None if time_limit is None else time.monotonic() + 60 * time_limit
        self.handlers: dict[int, object] = {}
        self.received: int | None = None
        self.received_at = 0.0
        self.deferred = False

    def __enter__(self) -> Self:
        self.pipe = os.pipe()
        os.set_blocking(self.pipe[1], False)
        # Ignored is SIGINT in the background of a shell.
        numbers = SIGNALS[: 2 if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else 3]
        self.handlers = {number: signal.signal(number, self._handle) for number in numbers}
        self.wakeup = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="stop-request", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        os.close(self.pipe[1])  # ends the thread, which closes the other end

    def defer_interrupts(self) -> None:
        """From now on SIGINT is a wish, too, if signals are listened to at all."""
        self.deferred = True
        if not self.handlers or signal.SIGINT in self.handlers:  # after a rewind it is asked for again
            return
        self.handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._handle)

    @property
    def reason(self) -> int:
        """The signal that was received, or TIME_LIMIT; 0 while there is no reason to stop."""
        if self.received is None and self.ends is not None and time.monotonic() >= self.ends:
            return TIME_LIMIT
        return self.received or 0

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received = number

    def _listen(self) -> None:
        with os.fdopen(self.pipe[0], "rb", buffering=0) as pipe:
            while received := pipe.read(1):
                number, now = received[0], time.monotonic()
                if number not in self.handlers:
                    continue
                if number == signal.SIGINT and not self.deferred:
                    _say("interrupted before the first step; the same command with --resume auto begins")
                    os._exit(INTERRUPTED)
                if not self.received_at:
                    self.received_at = now
                    _say(f"{reason_name(number)}: stopping after this step; again in {SAME:g} s: at once")
                elif now - self.received_at > SAME:
                    os._exit(exit_code(number))


def _say(message: str) -> None:
    """On rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"\n{message}", file=sys.stderr, flush=True)


def reason_name(reason: int) -> str:
    """For people: the signal's name, or what else it was."""
    others = {TIME_LIMIT: "the time limit", UNSAVED: "a last checkpoint that could not be written"}
    return others.get(reason) or signal.Signals(reason).name


def exit_code(reason: int) -> int:
    """That of a run which stopped for this reason."""
    return INTERRUPTED if reason == signal.SIGINT else PREEMPTED
