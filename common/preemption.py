"""Being asked to stop: by a scheduler that takes the machine back, or by Ctrl-C.

The step in flight is finished and saved, then the run ends with a code of its own, so that who started it knows
that `--resume` goes on. docs/reliability.md has what each scheduler sends, and to whom."""

import os
import signal
import threading
import time

from common.cli import ENDING

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Seconds in which a signal is the same one: Ctrl-C reaches every process of a terminal, and torchrun passes on
# to its workers what it got itself.
SAME = 2.0


class Preemption:
    """Listens for SIGNALS from its making to `close`.

    `received` is the first one, 0 for none. The run looks at it after each step. A second one, later than SAME,
    ends the process at once, also where it waits for another rank: a thread hears of signals, because
    Python's own handlers wait for the main thread.
    """

    def __init__(self):
        self.received = 0
        self.received_at = 0.0
        self.ended = False
        self.folder = None  # of the run, where it is rank 0's
        # why the first signal ends the run at once, "" while there is a step to finish
        self.at_once = "before the first step"
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)  # or Python refuses it
        self.earlier = {}  # signal -> the handler before
        for number in SIGNALS:
            self.earlier[number] = signal.signal(number, self.wake)
        signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        threading.Thread(target=self.listen, daemon=True).start()

    def wake(self, number: int, _) -> None:
        """Python's own handler. The thread has heard already, unless another library took the pipe's place."""
        if signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False) != self.write_end:
            self.receive(number)

    def listen(self) -> None:
        """The thread: each byte in the pipe is the number of a signal. It ends with the pipe."""
        while True:
            numbers = os.read(self.read_end, 1)
            if not numbers:
                os.close(self.read_end)
                return
            if numbers[0] in SIGNALS:  # others may have handlers of their own
                self.receive(numbers[0])

    def receive(self, number: int) -> None:
        """Keeps the first signal; ends the process at a second one, or where there is no step to finish."""
        name = signal.Signals(number).name
        if ENDING.is_set():  # torchrun ends the others where one has failed
            os._exit(1)
        if self.ended:
            os._exit(EXIT_CODE)
        if self.received:
            if time.monotonic() - self.received_at > SAME:
                say(f"{name} again: ended at once")
                os._exit(128 + number)
            return
        self.received = number
        self.received_at = time.monotonic()
        if self.at_once:
            # SIGTERM is also how torchrun ends this rank because another has failed: that is no reason to go on
            if self.folder and number == signal.SIGUSR1:
                (self.folder / "stopped").write_text(f"{name} {self.at_once}\n")
            say(f"{name}: stopped {self.at_once}")
            os._exit(EXIT_CODE)
        say(f"{name}: the step in flight is finished and saved; a second signal ends at once")

    def finished(self) -> None:
        """The run has done what a signal asks for: another one ends it at once, with EXIT_CODE, and says nothing."""
        self.ended = True

    def close(self) -> None:
        """Signals do again what they did before."""
        signal.set_wakeup_fd(-1)
        for number, handler in self.earlier.items():
            signal.signal(number, handler)
        os.close(self.write_end)


def say(text: str) -> None:
    """A line of rank 0; not by `print`, whose buffer the main thread may hold."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{text}\n".encode())
