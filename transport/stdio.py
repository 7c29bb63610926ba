"""Takes a worker's standard input and output away from everything else that runs in it.

llama.cpp and its backends print to descriptor 1 from C, and anything may read descriptor 0. A worker calls
:func:`take_stdio` before it imports anything heavy.
"""

import fcntl
import os
import sys
from typing import NamedTuple

__all__ = ["Stdio", "take_stdio"]


class Stdio(NamedTuple):
    """The streams that the process was started with, on private descriptors that no child of it inherits.

    Attributes:
        control: Was descriptor 0. End of file on it means that the pool is gone. On the ``stdio`` transport it
            carries the pool's messages and belongs to the channel.
        output: Was descriptor 1. On the ``stdio`` transport it carries the worker's messages and belongs to the
            channel.
    """

    control: int
    output: int


def take_stdio() -> Stdio:
    """Move descriptors 0 and 1 away; from then on 0 reads ``/dev/null`` and 1 is standard error.

    Raises:
        OSError: descriptor 0, 1 or 2 is not open.
    """
    sys.stdout.flush()
    control = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3)
    output = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return Stdio(control, output)
