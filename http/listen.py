"""The listening socket: TCP or Unix, plain or TLS. What is wrong with it is one clear line, before anything starts."""

import contextlib
import errno
import os
import socket
import ssl
import stat
from pathlib import Path
from typing import Final

__all__ = ["CannotListen", "Listener", "PortInUse", "make_tls"]

_BACKLOG: Final = 2048
#: As in llama-server: a host that ends like this is the path of a Unix socket.
_UNIX_SUFFIX: Final = ".sock"


class CannotListen(OSError):
    """The address cannot be listened on. The text is one line, for people."""


class PortInUse(CannotListen):
    """Another program listens there already."""


class Listener:
    """A socket that is bound and listens; :meth:`close` it.

    Args:
        host: An address, a name, or the path of a Unix socket, which ends in ``.sock``. A path that nobody listens on
            any more is taken over.
        port: 0 takes a free one; without meaning for a Unix socket.
        tls: Whether the URL shall say ``https``.

    Raises:
        PortInUse, CannotListen.
    """

    def __init__(self, host: str, port: int, *, tls: bool = False) -> None:
        self.is_unix: Final = host.endswith(_UNIX_SUFFIX)
        self._path = Path(host)
        self._scheme = "https" if tls else "http"
        self.socket: Final = _listen_unix(self._path) if self.is_unix else _listen(host, port)
        self._inode = self._path.lstat().st_ino if self.is_unix else 0

    @property
    def url(self) -> str:
        """Where clients find it; ``unix:`` and the path for a Unix socket."""
        if self.is_unix:
            return f"unix://{self._path}"
        host, port = self.socket.getsockname()[:2]
        return f"{self._scheme}://[{host}]:{port}" if ":" in host else f"{self._scheme}://{host}:{port}"

    def close(self) -> None:
        """Listen no more, and remove the file of a Unix socket unless somebody has replaced it. Idempotent."""
        self.socket.close()
        if not self._inode:
            return
        inode, self._inode = self._inode, 0
        with contextlib.suppress(OSError):
            status = self._path.lstat()
            if stat.S_ISSOCK(status.st_mode) and status.st_ino == inode:
                self._path.unlink()


def make_tls(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return the TLS settings of a server with this certificate (chain) and private key, both PEM files.

    Raises:
        CannotListen: a file cannot be read, they do not belong together, or the key has a password.
    """
    for path in (certificate, key):
        try:
            path.open("rb").close()
        except OSError as error:
            raise CannotListen(f"{path} cannot be read: {error.strerror}") from None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # Without a password at hand OpenSSL would ask the terminal for one, and wait.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CannotListen(f"no TLS with certificate {certificate} and key {key}: {reason}") from None
    return context


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        raise CannotListen(f"cannot listen on {host} port {port}: {error}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)  # only this finds out for certain whether the port is free
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise PortInUse(error.errno, f"port {port} on {host} is in use by another program") from None
        raise CannotListen(f"cannot listen on {host} port {port}: {error}") from None
    listener.setblocking(False)
    return listener


def _listen_unix(path: Path) -> socket.socket:
    if "\0" in str(path):
        raise CannotListen(f"cannot listen on {str(path)!r}: a path holds no null character")
    _take_over(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fspath(path))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise CannotListen(f"cannot listen on {path}: {error}") from None
    listener.setblocking(False)
    return listener


def _take_over(path: Path) -> None:
    """Remove a socket that a program has left behind. Raises PortInUse if it still listens."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise CannotListen(f"cannot listen on {path}: there is another kind of file")
    except FileNotFoundError:
        return
    except CannotListen:
        raise
    except OSError as error:
        raise CannotListen(f"cannot listen on {path}: {error}") from None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            return
        except OSError:
            pass  # a full backlog, for one: somebody is there
    raise PortInUse(errno.EADDRINUSE, f"{path} is in use by another program")
