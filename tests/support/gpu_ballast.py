"""A process that holds a GPU's memory, so that little is left of it. CUDA's driver API; no package needed.

    python gpu_ballast.py DEVICE LEAVE

takes all of the device's memory but LEAVE bytes, prints how many are left, and holds it until standard input ends.
"""

import ctypes
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["ballast"]

#: What the driver hands out at a time.
_STEP = 2 * 1024 * 1024


@contextmanager
def ballast(leave: int, device: int = 0) -> Generator[int]:
    """Leave about so many bytes of a GPU; yield how many there are."""
    command = [sys.executable, "-P", __file__, str(device), str(leave)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, "the ballast could not be taken"
            yield int(line)
        finally:
            process.stdin.close()


class _Driver:
    """The few calls of libcuda that it takes."""

    def __init__(self, device: int) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        context = ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code != 0:
            raise OSError(f"{name} returned {code}")

    def free(self) -> int:
        """Return the bytes that are left."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def take(self, size: int) -> bool:
        """Take so many bytes for good; False where they are not to be had."""
        address = ctypes.c_uint64()
        try:
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        except OSError:
            return False
        return True


def _hold(device: int, leave: int) -> None:
    driver = _Driver(device)
    size = driver.free() - leave
    while size >= _STEP:
        if driver.take(size):
            size = driver.free() - leave
        else:
            size //= 2
    print(driver.free(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _hold(int(sys.argv[1]), int(sys.argv[2]))
