"""Room on the disk: looked at before a download, and again while it goes on."""

import shutil
from pathlib import Path
from typing import Final

from llamaherd.pool.child.failures import DownloadFailure

__all__ = ["LOOK_BYTES", "SPARE_BYTES", "DiskFull", "DiskGuard", "check_disk"]

#: Bytes that a download leaves free on the disk.
SPARE_BYTES: Final = 64 * 1024 * 1024
#: Bytes that are written between two looks at the disk. All files of a download that are fetched at a time write less
#: than what is spared before each of them has looked.
LOOK_BYTES: Final = 8 * 1024 * 1024


class DiskFull(DownloadFailure):
    """A disk has no room for what is to be written."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, code="disk_full", retry=True)


def check_disk(folder: Path, needed: int) -> None:
    """Raise :class:`DiskFull` if a folder's disk has not that many bytes, and some to spare."""
    free = shutil.disk_usage(folder).free
    if needed and needed + SPARE_BYTES > free:
        raise DiskFull(f"{needed / 1e9:.2f} GB are missing and {free / 1e9:.2f} GB are free on the disk of {folder}")


class DiskGuard:
    """Sees to it that one file leaves room on its disk, however long it is and whoever else writes there.

    Args:
        folder: Where the file lies.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._unseen = LOOK_BYTES

    def before(self, size: int) -> None:
        """Call this before so many bytes are written. Raises :class:`DiskFull`."""
        self._unseen += size
        if self._unseen < LOOK_BYTES:
            return
        self._unseen = 0
        free = shutil.disk_usage(self._folder).free
        if size + SPARE_BYTES > free:
            raise DiskFull(
                f"the disk of {self._folder} is full: {free / 1e6:.0f} MB are free, and {SPARE_BYTES / 1e6:.0f} MB are "
                "left alone; make room, or choose another folder"
            )
