"""The command ``llamaherd``: ``serve``, ``run``, ``models``, and those of :mod:`~llamaherd.http.manage`.

Exit codes: 0; 1 for an error, told in one line ``llamaherd: error: ...`` on standard error, or untold if it is only
that nobody reads the output any more; 2 for a wrong command line, told likewise; 128 and the signal's number when a
signal ended ``run`` or ``pull`` (130 for ^C). ``serve`` that a signal stopped has done what it was asked to do: 0.
"""

import contextlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from llamaherd.http.benchmarks import bench
from llamaherd.http.catalog_options import CatalogSettings, catalog_options
from llamaherd.http.foreign import ForeignCommand
from llamaherd.http.manage import COMMANDS
from llamaherd.http.options import (
    Whole,
    engine_options,
    models_dir_option,
    stop_timeout_option,
    transport_option,
)
from llamaherd.http.pool_options import PoolSettings, pool_options
from llamaherd.http.server_options import ServerSettings, server_options
from llamaherd.http.terminal import log_to_stderr, printable, report, restore
from llamaherd.pool import (
    Catalog,
    ChatParams,
    Completion,
    EngineOptions,
    ModelNotFound,
    ModelSpec,
    PoolError,
    Sources,
    State,
    find_model,
    model_parts,
)

__all__ = ["cli", "main"]

#: Longest prompt that is read from standard input, in bytes.
_MAX_PROMPT: Final = 16 * 1024 * 1024
_SIGINT: Final = 2
#: Model names in the line that says where the server listens.
_SHOWN_NAMES: Final = 8


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(importlib.metadata.version("llamaherd"), message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Run llama.cpp models in supervised worker processes."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command(cls=ForeignCommand)
@catalog_options
@server_options
@pool_options
@transport_option
@stop_timeout_option
@engine_options
def serve(
    wanted: CatalogSettings,
    settings: ServerSettings,
    pool: PoolSettings,
    transport: str,
    stop_timeout: float,
    options: EngineOptions,
) -> None:
    """Serve models over HTTP, each loaded when it is first asked for, and a single one at once.

    Without --model, --models-dir and --models-preset this offers the demo model, beside those that were
    downloaded. A single model also answers requests that name none.
    """
    from llamaherd.http import server, signals
    from llamaherd.http.library import Library
    from llamaherd.pool import Caches, Pool

    missing = wanted.missing()
    if missing is not None:
        from llamaherd.http.pull import pull_here

        signals.run(lambda guard: pull_here(missing, guard), on_abort=restore)
    sources = wanted.sources(options, pool.apply)
    catalog = _catalog(wanted, sources)
    if not (catalog.models or catalog.broken or wanted.watch):
        raise ModelNotFound(f"there is no model in {wanted.models_preset or wanted.models_dir}")
    specs = catalog.models
    names = [spec.name for spec in specs]
    only = names[0] if wanted.single and len(names) == 1 else None
    log_to_stderr()
    settings.warn()

    async def listen(guard: signals.SignalGuard) -> None:
        library = Library(sources, wanted.read, Caches.of_environment(), watch=wanted.watch)
        library.take(catalog)
        herd = Pool(specs, transport=transport, stop_timeout=stop_timeout, **pool.to_pool())

        def on_ready(url: str) -> None:
            click.echo(_listening(url, names))
            if only is not None and herd.status(only).state == State.UNLOADED:
                # Whoever starts a server for one model wants it; /health says when it is there.
                herd.start_load(only)

        async with herd:
            if catalog.broken:
                herd.reload((*specs, *catalog.broken))
            offer: dict[str, Any] = {
                "default_model": only,
                "any_name": only is not None,
                "health_waits": only is not None,
                **settings.to_serve(),
            }
            await guard.guard(server.serve(herd, library=library, on_ready=on_ready, **offer))

    with contextlib.suppress(signals.Interrupted):
        signals.run(listen)


@cli.command()
@click.argument("model")
@click.argument("prompt")
@models_dir_option
@click.option(
    "-n",
    "--max-tokens",
    "--predict",
    "--n-predict",
    type=Whole(-1),
    metavar="N",
    default=-1,
    show_default=True,
    envvar="LLAMA_ARG_N_PREDICT",
    help="Most tokens to generate. -1 goes on until the context is full.",
)
@click.option(
    "--temp",
    "--temperature",
    "temperature",
    type=float,
    metavar="N",
    default=0.8,
    show_default=True,
    envvar="LLAMA_ARG_TEMPERATURE",
    help="Temperature. 0 always takes the likeliest token.",
)
@click.option(
    "-s",
    "--seed",
    type=Whole(-1, 2**32 - 1),
    metavar="N",
    default=-1,
    show_default=True,
    help="Seed of the random choice. -1 draws one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of the text.")
@transport_option
@engine_options
def run(
    model: str,
    prompt: str,
    models_dir: Path | None,
    max_tokens: int,
    temperature: float,
    seed: int,
    as_json: bool,
    transport: str,
    options: EngineOptions,
) -> None:
    """Ask one question and print the answer as it comes.

    MODEL is 'demo', a name in --models-dir, or the path of a GGUF file. PROMPT is the question; '-' reads it from
    standard input.
    """
    spec = find_model(model, models_dir, options=options)
    from llamaherd.http import oneshot, signals

    # What goes wrong is told in one line at the end.
    logging.getLogger("llamaherd").addHandler(logging.NullHandler())
    question = oneshot.Question(
        spec=spec,
        prompt=_prompt(prompt),
        params=ChatParams(max_tokens=max_tokens, temperature=temperature, seed=seed),
        transport=transport,
    )
    write = _ignore if as_json else _write
    answer = signals.run(lambda guard: oneshot.ask(question, write, guard), on_abort=restore)
    if as_json:
        click.echo(_answer_json(spec.name, answer))
    elif not answer.text.endswith("\n"):
        click.echo()


@cli.command("models")
@catalog_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_models(wanted: CatalogSettings, as_json: bool) -> None:
    """List what 'serve' would offer with the same options."""
    catalog = _catalog(wanted, wanted.sources(EngineOptions(), tuple))
    rows = [_row(spec) for spec in catalog.models]
    if as_json:
        click.echo(msgspec.json.encode({"models": rows, "problems": catalog.problems}))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("MODEL", "SIZE", "FILE", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        names = ", ".join([row["name"], *(alias for alias in row["aliases"] if alias != row["path"])])
        table.add_row(*(Text(printable(cell)) for cell in (names, f"{row['size'] / 1e6:.1f} MB", row["path"])))
    # A program that reads the table wants whole lines.
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


for _command in (*COMMANDS, bench):
    cli.add_command(_command)


@cli.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that completes this command in a shell: eval "$(llamaherd completion bash)"."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "llamaherd", "_LLAMAHERD_COMPLETE").source())


def _catalog(wanted: CatalogSettings, sources: Sources) -> Catalog:
    catalog = wanted.read(sources)
    for problem in catalog.problems:
        report("warning", problem)
    return catalog


def _listening(url: str, names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return printable(f"llamaherd: listening on {url}, {'models' if len(names) > 1 else 'model'}: {shown}{more}")


def _prompt(argument: str) -> str:
    if argument != "-":
        raw = os.fsencode(argument)
    else:
        raw = sys.stdin.buffer.read(_MAX_PROMPT + 1)
        if len(raw) > _MAX_PROMPT:
            raise click.BadParameter(f"standard input is over {_MAX_PROMPT} bytes.", param_hint="'PROMPT'")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise click.BadParameter("it is not UTF-8 text.", param_hint="'PROMPT'") from None
    return text.removesuffix("\n") if argument == "-" else text


def _ignore(_text: str) -> None:
    pass


def _write(text: str) -> None:
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _answer_json(model: str, answer: Completion) -> bytes:
    return msgspec.json.encode(
        {
            "model": model,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "usage": msgspec.structs.asdict(answer.usage),
            "timings": msgspec.structs.asdict(answer.timings),
        }
    )


def _row(spec: ModelSpec) -> dict[str, Any]:
    parts = model_parts(spec.path) if spec.path is not None else ()
    return {
        "name": spec.name,
        "aliases": spec.aliases,
        "path": "" if spec.path is None else str(spec.path),
        "size": sum(part.stat().st_size for part in parts if part.exists()),
        "source": spec.source,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (by default the program's) and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        status = cli.main(arguments, prog_name="llamaherd", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except Exception as error:
        return _exit_code(error)
    except KeyboardInterrupt:
        return 128 + _SIGINT


def _exit_code(error: Exception) -> int:
    from llamaherd.http.signals import Interrupted

    match error:
        case click.ClickException():
            report("error", error.format_message())
            return error.exit_code
        case click.Abort():
            return 128 + _SIGINT
        case Interrupted():
            return 128 + error.number
        case BrokenPipeError():
            # Whoever read the output has left. What is still buffered must not fail again when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        case OSError() if error.strerror:
            report("error", f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
            return 1
        case PoolError() | OSError():
            report("error", str(error))
            return 1
        case _:
            raise error
