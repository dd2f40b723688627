"""One process a folder: a lock of the operating system, which ends with the process that holds it."""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path

from dynaconv import _checks

LOCK = ".lock"
_BUSY = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK)


class FolderLock:
    """Held from its making until it is closed, collected, or the process ends, however it ends.

    The file stays behind; it says which process held the folder last, and nobody minds it.

    Raises:
        ValueError: another process holds the folder.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        self._free = weakref.finalize(self, os.close, file)
        try:
            _lock(file)
        except OSError as error:
            holder = os.read(file, 32).decode("ascii", "replace").strip()
            self.close()
            # Some file systems have no locks, and a process does not keep itself out.
            if error.errno in _BUSY and holder != str(os.getpid()):
                raise _checks.study_busy(folder, holder) from None
            return
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode("ascii"))

    def close(self) -> None:
        """Give the folder free."""
        self._free()


def _lock(file: int) -> None:
    try:
        import fcntl
    except ImportError:
        import msvcrt

        # A byte that nobody reads or writes, because locks of Windows forbid that, too.
        os.lseek(file, 1 << 20, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(file, 0, os.SEEK_SET)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
