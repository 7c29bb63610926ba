"""The private directory that holds a pool's socket, and the removal of those that killed pools left behind.

A directory is in use as long as its lock is held. The kernel lets go of a lock when its holder dies, however it dies,
and a lock says the same in every container that shares the file system; a process id would not. A lock gets its name
only once it is held: between making the file and locking it, another pool could take it for a dead one's.
"""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

__all__ = ["PrivateDirectory"]

_PREFIX: Final = "llamaherd-"
_LOCK: Final = "lock"
_NEW_LOCK: Final = "lock.new"


class PrivateDirectory:
    """A new directory below ``base`` that only this user can enter, removed by :meth:`remove`.

    Making one removes those of this user below ``base`` whose pools are gone.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, base: str) -> None:
        _sweep(base)
        self.path: Final = tempfile.mkdtemp(prefix=_PREFIX, dir=base)  # with mode 0700
        new = os.path.join(self.path, _NEW_LOCK)
        self._lock = os.open(new, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(new, os.path.join(self.path, _LOCK))
        except OSError:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove the directory and all in it. Idempotent; never raises."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _sweep(base: str) -> None:
    for path in Path(base).glob(f"{_PREFIX}*"):
        try:
            # A directory without this file is one that is just being made.
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if os.fstat(lock).st_uid == os.getuid() and not path.is_symlink():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass  # its pool lives
        finally:
            os.close(lock)
