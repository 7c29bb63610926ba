"""What ``ps`` shows of a worker: the model that it has now, which need not be the one that it was started for."""

import ctypes
import sys
from pathlib import Path

__all__ = ["rename"]

#: Places in ``/proc/PID/stat`` behind the name, from 0 on, of where the command line lies in memory: ``arg_start`` and
#: ``arg_end``, see proc_pid_stat(5).
_START, _END = 45, 46


def rename(label: str) -> None:
    """Show another last argument, as far as there is room for it. No effect where the system has no such place."""
    if sys.platform != "linux":
        return
    try:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        start, end = int(fields[_START]), int(fields[_END])
    except (OSError, ValueError, IndexError):
        return
    if not 0 < start < end:  # a kernel that does not tell
        return
    line = ctypes.string_at(start, end - start)
    place = line.rstrip(b"\0").rfind(b"\0") + 1
    room = len(line) - 1 - place
    if place and room > 0:
        # Spaces, since further zeros would be taken for empty arguments.
        text = label.encode("ascii", "backslashreplace")[:room].ljust(room)
        ctypes.memmove(start + place, text, room)
