"""One run a folder: a second one that would write there ends in one line."""

import errno
import fcntl
import os
import socket
from pathlib import Path

from common.cli import fail, make_folder, note

HELD = []  # open files: a lock goes with its file


def lock(folder: Path) -> None:
    """Holds `folder`, which is made, until this process ends. Called on rank 0.

    It is a POSIX lock on FOLDER/lock: the system lets it go when the process dies, however that happens, so
    there is no stale one; NFS, Lustre and GPFS carry it from host to host. Where a file system has no locks,
    that is said, and nothing is held. Ends with one line where another process holds it, or the
    folder cannot be made.
    """
    make_folder(folder)
    path = folder / "lock"
    # not "w": the words of the one that holds it must stay
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as the lock)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            fail(
                f"{folder}: another run writes there ({holder(path)}); wait for it, or choose another --run-dir"
            )
        note(f"{folder}: no lock is possible there ({error}); start no second run in it")
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    HELD.append(file)


def holder(path: Path) -> str:
    """Who holds the lock."""
    return path.read_text(encoding="utf-8", errors="replace").strip() or "it has not said who"
