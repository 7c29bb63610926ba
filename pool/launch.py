"""How a worker comes to run, and how its end is known.

A :class:`Launcher` starts workers and hands out a :class:`Process` for each. Local processes are the one
implementation now; workers on other hosts fit behind the same interface, so nothing above it may assume a shared host
or file system.

Facts about a local process come from its pidfd: neither end of file nor silence means death, and a grandchild that
holds a pipe open delays nothing.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import msgspec

from llamaherd.transport.channel import Endpoint

__all__ = ["HUB_LOGIN_ENV", "Exit", "LaunchSpec", "Launcher", "LocalLauncher", "Process"]

#: The worker's environment variable that names its parent; read by ``pool/child/guards.py``.
PARENT_ENV: Final = "LLAMAHERD_PARENT"
#: The token for the hub: only a worker that downloads is given it.
HUB_LOGIN_ENV: Final = "HF_TOKEN"
#: Variables that are the front end's secrets and no business of a worker.
PRIVATE_ENV: Final = frozenset({"LLAMA_API_KEY", "LLAMAHERD_API_KEY", HUB_LOGIN_ENV, "HUGGING_FACE_HUB_TOKEN"})
#: Most bytes read at once from a worker's log pipe, which a grandchild may go on filling.
LAST_WORDS_BYTES: Final = 1024 * 1024
_READ_BYTES: Final = 65536
#: Characters that the model's name has in the command line, at least.
_LABEL_ROOM: Final = 64
#: A flag in ``/proc/PID/stat``: the kernel takes the process apart. See proc_pid_stat(5), and ``PF_*`` in sched.h.
_PF_EXITING: Final = 0x4


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How a process ended.

    Attributes:
        reason: ``exited`` by itself, or ``signalled``.
        code: The exit code as subprocess has it: negative for a signal.
        signal: The signal's number, or None.
        node: The host that it ran on.
        detail: For people: "exit code 3", "killed by SIGKILL".
        confirmed: Whether the operating system said so; False if the worker is only given up for lost.
    """

    reason: str
    code: int | None
    signal: int | None
    node: str
    detail: str
    confirmed: bool = True


class LaunchSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to start.

    Attributes:
        label: Shown as the last argument of the command line, for ``ps``.
        endpoint: Where the worker finds its channel.
        on_log: Called on the loop with raw bytes that the worker printed.
        env: Variables to add to the inherited environment.
    """

    label: str
    endpoint: Endpoint
    on_log: Callable[[bytes], None]
    env: Mapping[str, str] = {}


class Process(Protocol):
    """One started worker, in the operating system's words. All methods belong to the loop that launched it."""

    @property
    def pid(self) -> int:
        """The process id on :attr:`node`."""
        ...

    @property
    def node(self) -> str:
        """The host that it runs on."""
        ...

    @property
    def args(self) -> Sequence[str]:
        """The command line."""
        ...

    async def wait(self) -> Exit:
        """Wait until the process is gone and reaped. Any number of callers; a cancelled wait changes nothing."""
        ...

    def read_log(self) -> None:
        """Deliver what it has printed so far, which may be ahead of the loop's own turn to do so."""
        ...

    def is_ending(self) -> bool:
        """Whether the process is gone or on its way out, whatever ended it. False if the system does not tell."""
        ...

    def terminate(self) -> None:
        """Ask the process to end (SIGTERM). No effect on one that is gone."""
        ...

    def kill(self) -> None:
        """End the process and its whole group (SIGKILL). No effect on one that is gone."""
        ...


class Launcher(Protocol):
    """Starts workers."""

    async def launch(self, spec: LaunchSpec) -> Process:
        """Start one. Raises OSError if it cannot be started; the caller then discards the endpoint."""
        ...


class LocalLauncher:
    """Starts workers as child processes of this one, each in a session (and so a process group) of its own."""

    async def launch(self, spec: LaunchSpec) -> Process:
        endpoint = spec.endpoint
        # With room for another model's name, should it become that one's worker; see ``pool/child/title.py``.
        args = [sys.executable, "-P", "-m", "llamaherd.pool.child", spec.label.ljust(_LABEL_ROOM)]
        inherited = {name: value for name, value in os.environ.items() if name not in PRIVATE_ENV}
        log_read, log_write = os.pipe()
        try:
            # On the loop's thread, by design: the parent-death signal of the worker follows the thread that spawned it.
            popen = subprocess.Popen(  # noqa: ASYNC220
                args,
                stdin=endpoint.stdin,
                stdout=log_write if endpoint.stdout is None else endpoint.stdout,
                stderr=log_write,
                pass_fds=tuple(endpoint.pass_fds),
                close_fds=True,
                start_new_session=True,
                env={**inherited, **spec.env, **endpoint.env, PARENT_ENV: str(os.getpid())},
            )
        except BaseException:
            os.close(log_read)
            raise
        finally:
            os.close(log_write)
        endpoint.spawned()
        return LocalProcess(popen, args, log_read, spec.on_log)


class LocalProcess:
    """A child process of this one. Implements :class:`Process`."""

    def __init__(
        self, popen: subprocess.Popen[bytes], args: Sequence[str], log_fd: int, on_log: Callable[[bytes], None]
    ) -> None:
        self._popen = popen
        self._args = tuple(args)
        self._log_fd = log_fd
        self._on_log = on_log
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[Exit] = self._loop.create_future()
        self._log_open = True
        os.set_blocking(log_fd, False)
        self._loop.add_reader(log_fd, self._read_some)
        self._watch()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def node(self) -> str:
        return socket.gethostname()

    @property
    def args(self) -> Sequence[str]:
        return self._args

    async def wait(self) -> Exit:
        return await asyncio.shield(self._exit)

    def read_log(self) -> None:
        total = 0
        while self._log_open and total < LAST_WORDS_BYTES:
            count = self._read_some()
            if count == 0:
                break
            total += count

    def is_ending(self) -> bool:
        return self._exit.done() or is_exiting(self._popen.pid)

    def terminate(self) -> None:
        if not self._exit.done():
            self._popen.terminate()

    def kill(self) -> None:
        if not self._exit.done():
            self._kill_group()

    def _kill_group(self) -> None:
        # The leader is not reaped yet, so its number, which is the group's, cannot belong to anyone else.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    # --- the end ---

    def _watch(self) -> None:
        try:
            pidfd = os.pidfd_open(self._popen.pid)
        except (AttributeError, OSError):  # no such call in this system, this kernel or this sandbox
            pidfd = -1
        if pidfd >= 0:
            self._loop.add_reader(pidfd, self._on_pidfd, pidfd)
        else:
            # Not one of the loop's executor: those are few, and everyone else would wait for the end of workers.
            threading.Thread(target=self._wait_in_thread, name=f"end of {self._popen.pid}", daemon=True).start()

    def _on_pidfd(self, pidfd: int) -> None:
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        self._on_end()

    def _wait_in_thread(self) -> None:
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOWAIT)
        else:  # macOS before Python 3.13. The group keeps its number for as long as anyone is left in it
            self._popen.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._on_end)

    def _on_end(self) -> None:
        self._kill_group()  # grandchildren end with the worker
        code = self._popen.wait()
        self.read_log()
        self._close_log()
        self._exit.set_result(describe_exit(code, self.node))

    # --- the log ---

    def _read_some(self) -> int:
        try:
            data = os.read(self._log_fd, _READ_BYTES)
        except BlockingIOError:
            return 0
        except OSError:
            data = b""
        if data:
            self._on_log(data)
        else:
            self._close_log()
        return len(data)

    def _close_log(self) -> None:
        if self._log_open:
            self._log_open = False
            self._loop.remove_reader(self._log_fd)
            os.close(self._log_fd)


def is_exiting(pid: int) -> bool:
    """Whether the kernel is at ending a process that is not reaped yet, or has ended it. False where it does not tell.

    A dying process closes its pipes before it can be reaped, and much before where a driver has gigabytes to free.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # Behind the name, which may hold anything: the state, the parent, the group, the session, the terminal,
            # its group, and the flags.
            flags = file.read().rpartition(b")")[2].split()[6]
    except OSError:
        return False
    return bool(int(flags) & _PF_EXITING)


def describe_exit(code: int, node: str) -> Exit:
    """Return what an exit code of subprocess means."""
    if code >= 0:
        return Exit(reason="exited", code=code, signal=None, node=node, detail=f"exit code {code}")
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return Exit(reason="signalled", code=code, signal=-code, node=node, detail=f"killed by {name}")
