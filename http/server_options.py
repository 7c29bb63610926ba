"""The command line's options of the server itself: where it listens, whom it lets in, and what it lets them do.

Names, environment variables and meanings are llama-server's, except where the help says otherwise.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from llamaherd.http.grants import Grant
from llamaherd.http.limits import Limits
from llamaherd.http.offer import DEFAULT_BODY_SECONDS, DEFAULT_MAX_INPUTS, Offer
from llamaherd.http.options import Whole
from llamaherd.http.security import ANY, ApiKeys, Cors, Security, is_loopback, read_keys

__all__ = ["ServerSettings", "server_options"]

logger: Final = logging.getLogger("llamaherd.http")

_Command = Callable[..., Any]


class _Words(click.ParamType[str]):
    """A text with words separated by commas. Of the environment variable the whole value is one text."""

    name = "words"

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        return [rv] if rv else []


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What the options say. Arguments of :func:`~llamaherd.http.server.serve`, with those that ``offer`` holds."""

    host: str
    port: int
    limits: Limits
    tls: tuple[Path, Path] | None
    security: Security
    access_log: bool
    offer: Offer

    def to_serve(self) -> dict[str, Any]:
        """Return the arguments of :func:`~llamaherd.http.server.serve`."""
        own = {name: getattr(self, name) for name in ("host", "port", "limits", "tls", "security", "access_log")}
        return own | self.offer

    def warn(self) -> None:
        """Log what an operator should know who lets strangers in."""
        if self.security.keys:
            return
        if not (self.host.endswith(".sock") or self.host == "localhost" or is_loopback(self.host)):
            logger.warning("no API key is set: everybody who can reach %s may use this server", self.host)
        if ANY in self.security.origins:
            logger.warning("no API key is set and --cors-origins allows every web page to use this server")


def _option(*names: str, **settings: Any) -> Callable[[_Command], _Command]:
    return click.option(*names, show_default=settings.pop("show_default", "default" in settings), **settings)


_LISTENING: Final[Sequence[Callable[[_Command], _Command]]] = (
    _option(
        "--host",
        default="127.0.0.1",
        envvar="LLAMA_ARG_HOST",
        help="The address to listen on, or the path of a Unix socket, which ends in .sock.",
    ),
    _option(
        "--port",
        type=Whole(0, 65535),
        metavar="PORT",
        default=8080,
        envvar="LLAMA_ARG_PORT",
        help="The port to listen on. 0 takes a free one.",
    ),
    _option(
        "--ssl-key-file",
        type=click.Path(path_type=Path),
        metavar="PATH",
        envvar="LLAMA_ARG_SSL_KEY_FILE",
        help="The private key for TLS, a PEM file without a password.",
    ),
    _option(
        "--ssl-cert-file",
        type=click.Path(path_type=Path),
        metavar="PATH",
        envvar="LLAMA_ARG_SSL_CERT_FILE",
        help="The certificate for TLS, a PEM file with its chain.",
    ),
    _option(
        "--max-connections",
        type=Whole(1),
        metavar="N",
        default=Limits().max_connections,
        help="Most connections at a time, idle ones included.",
    ),
    _option(
        "-to",
        "--timeout",
        type=click.FloatRange(0, 86_400, min_open=True),
        metavar="SECONDS",
        envvar="LLAMA_ARG_TIMEOUT",
        help="How long a client may neither send its request on nor take any of its answer.  "
        f"[default: {DEFAULT_BODY_SECONDS:g} for a request, {Limits().send_seconds:g} for an answer]",
    ),
    _option(
        "--drain-seconds",
        type=click.FloatRange(0, 86_400),
        metavar="SECONDS",
        default=Limits().drain_seconds,
        help="Time that running requests have to end after the server was told to stop. A second signal ends it.",
    ),
)
_SECURITY: Final[Sequence[Callable[[_Command], _Command]]] = (
    _option(
        "--api-key",
        "api_keys",
        type=_Words(),
        multiple=True,
        metavar="KEY",
        envvar="LLAMA_API_KEY",
        help="A key that requests must carry; several separated by commas. May be repeated. Others on this machine can "
        "see command lines: better use the environment variable or a file.",
    ),
    _option(
        "--api-key-file",
        type=click.Path(path_type=Path),
        metavar="PATH",
        envvar="LLAMA_ARG_API_KEY_FILE",
        help="A file of keys, one per line; lines that begin with # are none. After a key may stand read-only and "
        "models=NAME,NAME, which limit it.",
    ),
    _option(
        "--allowed-host",
        "allowed_hosts",
        multiple=True,
        metavar="NAME",
        help="A further host name that the server answers to, such as a proxy's; * for any. May be repeated.",
    ),
    _option(
        "--cors-origins",
        type=_Words(),
        metavar="ORIGINS",
        envvar="LLAMA_ARG_CORS_ORIGINS",
        help="Origins whose web pages may use the server, separated by commas: 'localhost' for those of this machine, "
        "* for all.  [default: * with API keys, otherwise localhost]",
    ),
    _option(
        "--cors-methods",
        metavar="METHODS",
        default=Cors().methods,
        envvar="LLAMA_ARG_CORS_METHODS",
        help="Methods that web pages may use.",
    ),
    _option(
        "--cors-headers",
        metavar="HEADERS",
        default=Cors().headers,
        envvar="LLAMA_ARG_CORS_HEADERS",
        help="Headers that web pages may send.",
    ),
    _option(
        "--cors-credentials/--no-cors-credentials",
        default=True,
        envvar="LLAMA_ARG_CORS_CREDENTIALS",
        help="Whether browsers may send cookies and the like along.",
    ),
)
_OFFER: Final[Sequence[Callable[[_Command], _Command]]] = (
    _option(
        "--models-autoload/--no-models-autoload",
        "autoload",
        default=True,
        envvar="LLAMA_ARG_MODELS_AUTOLOAD",
        help="Whether a request loads its model. ?autoload=true|false says so for one request.",
    ),
    _option(
        "--models-manage/--no-models-manage",
        "manage",
        default=True,
        help="Whether clients may load, unload, download, delete and reload models, read logs and set adapters.",
    ),
    _option(
        "--sse-ping-interval",
        "ping",
        type=Whole(-1),
        metavar="SECONDS",
        default=10,
        envvar="LLAMA_ARG_SSE_PING_INTERVAL",
        help="Seconds of silence before an answer's stream sends a comment (llama-server: 30). -1 sends none.",
    ),
    _option(
        "--max-inputs",
        type=Whole(1),
        metavar="N",
        default=DEFAULT_MAX_INPUTS,
        help="Most inputs of one request for embeddings, and most documents of one that ranks.",
    ),
    _option(
        "--access-log/--no-access-log",
        default=False,
        help="Whether every request is logged: client, method, path, status, bytes and time.",
    ),
    _option(
        "--metrics/--no-metrics",
        default=True,
        envvar="LLAMA_ARG_ENDPOINT_METRICS",
        help="Whether /metrics answers.",
    ),
    _option(
        "--slots/--no-slots",
        default=True,
        envvar="LLAMA_ARG_ENDPOINT_SLOTS",
        help="Whether GET /slots answers.",
    ),
)


def server_options(command: _Command) -> _Command:
    """Give a command the server's options; it receives them as one argument ``settings``, a ``ServerSettings``."""

    @functools.wraps(command)
    def with_settings(*args: Any, **values: Any) -> Any:
        timeout = values.pop("timeout")
        settings = ServerSettings(
            host=values.pop("host"),
            port=values.pop("port"),
            limits=_limits(values, timeout),
            tls=_tls(values.pop("ssl_key_file"), values.pop("ssl_cert_file")),
            security=_security(values),
            access_log=values.pop("access_log"),
            offer=_offer(values, timeout),
        )
        return command(*args, settings=settings, **values)

    decorated: _Command = with_settings
    for option in reversed((*_LISTENING, *_SECURITY, *_OFFER)):
        decorated = option(decorated)
    return decorated


def _limits(values: dict[str, Any], timeout: float | None) -> Limits:
    """Return what bounds connections, and take it out of the options."""
    return Limits(
        max_connections=values.pop("max_connections"),
        drain_seconds=values.pop("drain_seconds"),
        send_seconds=Limits().send_seconds if timeout is None else timeout,
    )


def _security(values: dict[str, Any]) -> Security:
    """Return who is let in, and take it out of the options."""
    keys = _keys(values.pop("api_keys"), values.pop("api_key_file"))
    origins: str | None = values.pop("cors_origins")
    cors = Cors(
        origins=None if origins is None else tuple(_words(origins)),
        methods=values.pop("cors_methods"),
        headers=values.pop("cors_headers"),
        credentials=values.pop("cors_credentials"),
    )
    return Security(keys=keys, cors=cors, allowed_hosts=tuple(values.pop("allowed_hosts")))


def _offer(values: dict[str, Any], timeout: float | None) -> Offer:
    """Return what clients may have done, and take it out of the options."""
    ping: int = values.pop("ping")
    return Offer(
        autoload=values.pop("autoload"),
        manage=values.pop("manage"),
        metrics=values.pop("metrics"),
        slots=values.pop("slots"),
        max_inputs=values.pop("max_inputs"),
        body_seconds=DEFAULT_BODY_SECONDS if timeout is None else timeout,
        stream_ping=float(ping) if ping > 0 else None,
    )


def _keys(given: Sequence[str], file: Path | None) -> ApiKeys:
    keys: dict[str, Grant] = {}
    for words in given:
        found = _words(words)
        if not found:
            # An unset variable of a shell, most likely; without a key everybody would get in.
            raise click.BadParameter("the key is empty.", param_hint="'--api-key'")
        keys |= dict.fromkeys(found, Grant())
    if file is not None:
        try:
            keys = read_keys(file) | keys
        except OSError as error:
            raise click.BadParameter(
                f"{file} cannot be read: {error.strerror}.", param_hint="'--api-key-file'"
            ) from None
        except ValueError as error:
            raise click.BadParameter(f"{error}.", param_hint="'--api-key-file'") from None
    return ApiKeys(keys)


def _tls(key: Path | None, certificate: Path | None) -> tuple[Path, Path] | None:
    if key is None and certificate is None:
        return None
    if key is None or certificate is None:
        raise click.UsageError("--ssl-key-file and --ssl-cert-file go together.")
    return certificate, key


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
