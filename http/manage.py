"""The commands that manage models: ``pull``, ``list``, ``show``, ``rm``, ``ps``, ``load``, ``unload``, ``logs`` and
``events``.

``pull``, ``list``, ``show`` and ``rm`` work on this machine's cache, or on a running server if one is named by
``--server``; the others always speak to a server.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import click
import msgspec

from llamaherd.http.terminal import printable, restore
from llamaherd.http.wanted import Pull
from llamaherd.pool import (
    CachedModel,
    Caches,
    ModelNotFound,
    Origin,
    PoolError,
    file_of_url,
    find_model,
    model_parts,
    parse_name,
    read_facts,
)

if TYPE_CHECKING:
    from llamaherd.http.client import Server

__all__ = ["COMMANDS"]

_Command = Callable[..., Any]
_DEFAULT_URL: Final = "http://127.0.0.1:8080"
#: Seconds that a server has to tell its models to somebody who is typing.
_COMPLETION_SECONDS: Final = 1.0
#: Facts that only estimates need.
_HIDDEN_FACTS: Final = ("attention", "state", "n_head")


@dataclass(frozen=True)
class ServerAddress:
    """Which server is meant; an empty address is none in particular."""

    url: str
    key: str

    def open(self) -> "Server":
        """Return a client of it."""
        from llamaherd.http.client import Server

        return Server(self.url or _DEFAULT_URL, self.key)


def _server_options(command: _Command) -> _Command:
    """Give a command the address of a server; it receives it as ``server``, a :class:`ServerAddress`."""

    @functools.wraps(command)
    def with_server(*args: Any, server_url: str, server_key: str, **values: Any) -> Any:
        return command(*args, server=ServerAddress(server_url, server_key), **values)

    decorated: _Command = click.option(
        "--api-key",
        "server_key",
        default="",
        envvar="LLAMA_API_KEY",
        help="A key of the server. Others on this machine can see command lines: better use the environment variable.",
    )(with_server)
    return click.option(
        "--server",
        "server_url",
        default="",
        metavar="URL",
        envvar="LLAMAHERD_SERVER",
        help=f"The server to speak to, such as {_DEFAULT_URL}.",
    )(decorated)


_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _echo_json(content: object) -> None:
    click.echo(msgspec.json.encode(content))


def _cached_names(_context: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a cached model."""
    return [model.name for model in Caches.of_environment().scan() if model.name.startswith(incomplete)]


def _served_names(context: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a server's model; nothing where no server answers at once."""
    from llamaherd.http.client import Server

    url, key = (context.params.get(name) or "" for name in ("server_url", "server_key"))
    try:
        with Server(url or _DEFAULT_URL, key, timeout=_COMPLETION_SECONDS) as there:
            names = [name for model in there.models() for name in (model["id"], *model["aliases"])]
    except PoolError:
        return []
    return [name for name in names if name.startswith(incomplete)]


def _known_names(context: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a server's model if a server is named, else of a cached one."""
    complete = _served_names if context.params.get("server_url") else _cached_names
    return complete(context, param, incomplete)


_model_argument = click.argument("model", shell_complete=_known_names)
_served_argument = click.argument("model", shell_complete=_served_names)


@click.command()
@_model_argument
@click.option("-hff", "--hf-file", "file", default="", metavar="FILE", help="A file of the repository, not a quant.")
@click.option("--offline", is_flag=True, envvar="LLAMA_ARG_OFFLINE", help="Only say whether it is in the cache.")
@_json_option
@_server_options
def pull(model: str, file: str, offline: bool, as_json: bool, server: ServerAddress) -> None:
    """Download a model from the Hugging Face hub or from a Docker or OCI registry, or a GGUF file by its address.

    MODEL is <user>/<repo>[:<quant>], <registry>/<repo>[:<tag>] such as docker.io/ai/smollm2:135M-Q4_0, or an address
    that begins with http:// or https://. Interrupted by ^C it keeps what it has, and a repeat goes on from there.
    HF_TOKEN opens private and gated repositories of the hub.
    """
    if model.startswith(("http://", "https://")):
        _pull_address(model, file, offline, as_json, server)
        return
    name = parse_name(model)
    if server.url:
        if file or offline:
            raise click.UsageError("--hf-file and --offline are not for a server.")
        from llamaherd.http.pull import pull_there

        with server.open() as there:
            pull_there(there, str(name))
        result: dict[str, Any] = {"model": str(name), "server": server.url}
    else:
        from llamaherd.http import signals
        from llamaherd.http.pull import pull_here

        caches = Caches.of_environment()
        wanted = Pull(model=str(name), file=file, cache=caches.folder(name), offline=offline)
        signals.run(lambda guard: pull_here(wanted, guard), on_abort=restore)
        found = caches.find(name, file)
        result = {"model": str(name), "path": "" if found is None else str(found.path)}
    _say_pulled(result, as_json)


def _pull_address(url: str, file: str, offline: bool, as_json: bool, server: ServerAddress) -> None:
    from llamaherd.http import signals
    from llamaherd.http.pull import pull_here

    if file or server.url:
        raise click.UsageError("--hf-file and --server are not for an address: this machine downloads all of it.")
    origin = Origin(url=url, offline=offline)
    origin.check()
    signals.run(lambda guard: pull_here(Pull(url=url, offline=offline), guard), on_abort=restore)
    found = origin.find()
    _say_pulled({"model": file_of_url(url), "path": "" if found is None else str(found.path)}, as_json)


def _say_pulled(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _echo_json(result)
    else:
        click.echo(printable(f"{result['model']}: {result.get('path') or 'downloaded'}"))


@click.command("list")
@_json_option
@_server_options
def list_cached(as_json: bool, server: ServerAddress) -> None:
    """List the models of the caches, or those of a server."""
    if server.url:
        _list_served(server, as_json)
        return
    rows = [_cached_row(model) for model in Caches.of_environment().scan()]
    if as_json:
        _echo_json({"models": rows})
    else:
        _table(("MODEL", "SIZE", "FILE"), [(row["name"], _megabytes(row["size"]), row["path"]) for row in rows])


@click.command()
@_json_option
@_server_options
def ps(as_json: bool, server: ServerAddress) -> None:
    """List the models of a server that are running, loading or being downloaded."""
    _list_served(server, as_json, idle=False)


def _list_served(server: ServerAddress, as_json: bool, *, idle: bool = True) -> None:
    with server.open() as there:
        models = there.models()
    if not idle:
        models = [model for model in models if model["status"]["value"] not in ("unloaded", "downloaded")]
    if as_json:
        _echo_json({"models": models})
    else:
        rows = [(model["id"], _state_of(model["status"]), str(model.get("source", ""))) for model in models]
        _table(("MODEL", "STATUS", "SOURCE"), rows)


@click.command()
@_model_argument
@_json_option
@_server_options
def show(model: str, as_json: bool, server: ServerAddress) -> None:
    """Show what is known of a model: of the cache by name, of a file by path, or of a server's."""
    if server.url:
        with server.open() as there:
            found = [one for one in there.models() if model in (one["id"], *one["aliases"])]
        if not found:
            raise ModelNotFound(f"model {model!r} not found")
        facts: dict[str, Any] = found[0]
    else:
        facts = _facts_of(model)
    if as_json:
        _echo_json(facts)
        return
    for key, value in facts.items():
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        click.echo(printable(f"{key}: {text}"))


def _facts_of(model: str) -> dict[str, Any]:
    cached = _find(model)
    path = cached.path if cached is not None else find_model(model).path
    assert path is not None
    facts = msgspec.to_builtins(read_facts(path))
    shown = {key: value for key, value in facts.items() if key not in _HIDDEN_FACTS}
    shown["modalities"] = list(facts["modalities"])
    if cached is not None and cached.mmproj is not None:
        shown["mmproj"] = str(cached.mmproj)
        further = read_facts(cached.mmproj).modalities
        shown["modalities"] += [word for word in further if word not in shown["modalities"]]
    return {"model": model, "path": str(path), **shown}


def _find(model: str) -> CachedModel | None:
    if Path(model).exists():
        return None
    try:
        return Caches.of_environment().find(parse_name(model))
    except ValueError:
        return None


@click.command()
@_model_argument
@_json_option
@_server_options
def rm(model: str, as_json: bool, server: ServerAddress) -> None:
    """Delete a model from the cache: its quant, or the whole repository if none is named; a registry's by its tag."""
    result: dict[str, Any] = {"model": model}
    if server.url:
        with server.open() as there:
            there.ask("DELETE", "/models", model=model)
    else:
        result["freed"] = Caches.of_environment().remove(parse_name(model))
    if as_json:
        _echo_json(result)
    else:
        freed = f", {_megabytes(result['freed'])} freed" if "freed" in result else ""
        click.echo(printable(f"{model}: deleted{freed}"))


def _order(name: str, path: str, text: str) -> click.Command:
    """Return a command that gives a server an order about one model."""

    @click.command(name, help=text)
    @_served_argument
    @_json_option
    @_server_options
    def order(model: str, as_json: bool, server: ServerAddress) -> None:
        with server.open() as there:
            answer = there.ask("POST", path, {"model": model})
        if as_json:
            _echo_json({"model": model, **answer})

    return order


load = _order("load", "/models/load", "Begin to load a model of a server.")
unload = _order("unload", "/models/unload", "Begin to unload a model of a server, or cancel its download.")


@click.command()
@_served_argument
@click.option("-f", "--follow", is_flag=True, help="Go on with what is printed from now on, until ^C.")
@_json_option
@_server_options
def logs(model: str, follow: bool, as_json: bool, server: ServerAddress) -> None:
    """Print what a model's workers printed."""

    def line(text: str) -> None:
        if as_json:
            _echo_json({"model": model, "line": text})
        else:
            click.echo(printable(text))

    with server.open() as there:
        if follow:
            with there.stream("/models/logs", model=model, follow="1") as events:
                for event in events:
                    line(str(event.get("line", "")))
        else:
            for text in there.ask("GET", "/models/logs", model=model)["lines"]:
                line(str(text))


@click.command()
@_json_option
@_server_options
def events(as_json: bool, server: ServerAddress) -> None:
    """Print what happens to a server's models, until ^C."""
    with server.open() as there, there.stream("/models/sse") as stream:
        for event in stream:
            if as_json:
                _echo_json(event)
            else:
                data = msgspec.json.encode(event.get("data", {})).decode() if event["event"] != "snapshot" else ""
                click.echo(printable(f"{event['model']} {event['event']} {data}".rstrip()))


def _state_of(status: Mapping[str, Any]) -> str:
    """Return a state, with how far a load or a download is."""
    progress: dict[str, Any] = status.get("progress") or {}
    files = [cast("dict[str, int]", file) for file in progress.values() if isinstance(file, dict)]
    done, total = (sum(file.get(key, 0) for file in files) for key in ("done", "total"))
    share: float | None = progress.get("value") if not files else done / total if total else None
    return f"{status['value']} {share:.0%}" if isinstance(share, int | float) else str(status["value"])


def _cached_row(model: CachedModel) -> dict[str, Any]:
    size = sum(part.stat().st_size for part in model_parts(model.path))
    row: dict[str, Any] = {"name": model.name, "path": str(model.path), "size": size}
    if model.mmproj is not None:
        row["mmproj"] = str(model.mmproj)
    return row


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    # A program that reads the table wants whole lines.
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


#: For the command line's group.
COMMANDS: Final = (pull, list_cached, show, rm, ps, load, unload, logs, events)
