"""The command line's options, under llama-server's names and environment variables.

Where a default differs from llama-server's, the help says so. ``--ctx-size`` is 4096 here and the model's own length
there: llama-server shrinks what it was not asked for until it fits the device, and a context that nobody asked for
should not be what fills the memory.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, cast

import click
import msgspec

from llamaherd.http.adapter_options import ADAPTER_OPTIONS, adapters_of
from llamaherd.http.chat_options import CHAT_OPTIONS, chat_fields
from llamaherd.http.context_options import CONTEXT_OPTIONS, context_fields
from llamaherd.http.device_options import DEVICE_OPTIONS, device_fields
from llamaherd.http.embedding_options import EMBEDDING_OPTIONS, embedding_fields
from llamaherd.http.media_options import MEDIA_OPTIONS
from llamaherd.pool import DEFAULT_STOP_TIMEOUT, EngineOptions

__all__ = [
    "FlashAttention",
    "GpuLayers",
    "ModelPath",
    "Whole",
    "alias_option",
    "engine_options",
    "model_option",
    "models_dir_option",
    "stop_timeout_option",
    "transport_option",
]

_INT32_MAX: Final = 2**31 - 1
#: Longest chat template that is read, in bytes.
_MAX_TEMPLATE: Final = 1024 * 1024
_DEFAULTS: Final = EngineOptions()
#: The one of llama-server's named templates that is known here: every turn between ``<|im_start|>`` and ``<|im_end|>``.
_CHATML: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_Command = Callable[..., Any]


class ModelPath(click.ParamType[str]):
    """A path of a GGUF file or ``demo``. Of the environment variable the whole value is one path."""

    name = "path"

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        return [rv] if rv else []


class Whole(click.ParamType[int]):
    """A whole number within bounds, both included. Unlike click's own, the help does not show the bounds."""

    name = "n"

    def __init__(self, low: int, high: int = _INT32_MAX) -> None:
        self.low = low
        self.high = high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(value)
        except ValueError:
            self.fail(f"{value!r} is not a whole number.", param, ctx)
        if not self.low <= number <= self.high:
            self.fail(f"{number} is not in the range {self.low} to {self.high}.", param, ctx)
        return number


class GpuLayers(Whole):
    """A number of layers, ``all`` or ``auto``; both words mean every layer, -1."""

    def __init__(self) -> None:
        super().__init__(-1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return -1 if value in ("all", "auto") else super().convert(value, param, ctx)


class FlashAttention(click.ParamType[str]):
    """``on``, ``off`` or ``auto``, and the other words that llama-server takes for them."""

    name = "on|off|auto"
    _WORDS: Final = {
        "on": ("on", "enabled", "true", "1"),
        "off": ("off", "disabled", "false", "0"),
        "auto": ("auto", "-1"),
    }

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        meaning = next((meaning for meaning, words in self._WORDS.items() if value in words), None)
        if meaning is None:
            self.fail(f"{value!r} is not 'on', 'off' or 'auto'.", param, ctx)
        return meaning


model_option = click.option(
    "-m",
    "--model",
    "models",
    type=ModelPath(),
    multiple=True,
    metavar="PATH",
    envvar="LLAMA_ARG_MODEL",
    help="A GGUF file to offer, or 'demo' for the built-in model. May be repeated. Its name is the file's stem.",
)
models_dir_option = click.option(
    "--models-dir",
    type=click.Path(path_type=Path),
    metavar="PATH",
    envvar="LLAMA_ARG_MODELS_DIR",
    help="A folder of models: GGUF files, or one folder for each model of several files.",
)
alias_option = click.option(
    "-a",
    "--alias",
    metavar="NAMES",
    default="",
    envvar="LLAMA_ARG_ALIAS",
    help="Names of the one --model, separated by commas. The first replaces its name.",
)
transport_option = click.option(
    "--transport",
    type=click.Choice(["pipe", "zmq", "stdio"]),
    default="pipe",
    show_default=True,
    help="What carries the messages between the pool and its workers.",
)
stop_timeout_option = click.option(
    "--stop-timeout",
    type=click.FloatRange(0, 86400),
    metavar="SECONDS",
    default=DEFAULT_STOP_TIMEOUT,
    show_default=True,
    help="How long a worker that was told to stop has before it is killed.",
)

# Engine options: the destination of each is a field of EngineOptions, except for mmap and the two of the template.
_ENGINE: Final[Sequence[Callable[[_Command], _Command]]] = (
    click.option(
        "-c",
        "--ctx-size",
        "n_ctx",
        type=Whole(0),
        metavar="N",
        default=_DEFAULTS.n_ctx,
        show_default=True,
        envvar="LLAMA_ARG_CTX_SIZE",
        help="Context size in tokens, shared by all slots. 0 takes the model's own length (llama-server's default).",
    ),
    click.option(
        "-t",
        "--threads",
        "n_threads",
        type=Whole(-1),
        metavar="N",
        default=-1,
        show_default=True,
        envvar="LLAMA_ARG_THREADS",
        help="Threads for generation. -1 or 0 takes the cores that are available.",
    ),
    click.option(
        "-tb",
        "--threads-batch",
        "n_threads_batch",
        type=Whole(-1),
        metavar="N",
        default=-1,
        envvar="LLAMA_ARG_THREADS_BATCH",
        help="Threads for prompt processing.  [default: same as --threads]",
    ),
    click.option(
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        "n_gpu_layers",
        type=GpuLayers(),
        metavar="N",
        default="auto",
        show_default=True,
        envvar="LLAMA_ARG_N_GPU_LAYERS",
        help="Layers to keep in GPU memory: a number, 'auto' or 'all', which both mean every layer.",
    ),
    click.option(
        "-b",
        "--batch-size",
        "n_batch",
        type=Whole(1),
        metavar="N",
        default=_DEFAULTS.n_batch,
        show_default=True,
        envvar="LLAMA_ARG_BATCH",
        help="Most tokens in one decode call.",
    ),
    click.option(
        "-ub",
        "--ubatch-size",
        "n_ubatch",
        type=Whole(1),
        metavar="N",
        default=_DEFAULTS.n_ubatch,
        show_default=True,
        envvar="LLAMA_ARG_UBATCH",
        help="Most tokens in one physical batch.",
    ),
    click.option(
        "-np",
        "--parallel",
        "n_parallel",
        type=Whole(-1, 256),
        metavar="N",
        default=-1,
        show_default=True,
        envvar="LLAMA_ARG_N_PARALLEL",
        help=f"Slots: requests of one model that are served together. -1 means {_DEFAULTS.n_parallel}.",
    ),
    click.option(
        "-fa",
        "--flash-attn",
        "flash_attn",
        type=FlashAttention(),
        default="auto",
        show_default=True,
        envvar="LLAMA_ARG_FLASH_ATTN",
        help="Flash attention.",
    ),
    click.option(
        "--mmap/--no-mmap",
        "use_mmap",
        default=True,
        show_default=True,
        envvar="LLAMA_ARG_MMAP",
        help="Map the model file instead of reading it into memory.",
    ),
    click.option(
        "--chat-template",
        "template_source",
        metavar="JINJA",
        envvar="LLAMA_ARG_CHAT_TEMPLATE",
        help="Jinja source of the chat template, instead of the model's own.",
    ),
    click.option(
        "--chat-template-file",
        "template_file",
        type=click.Path(path_type=Path),
        metavar="PATH",
        envvar="LLAMA_ARG_CHAT_TEMPLATE_FILE",
        help="A file with the Jinja source of the chat template.",
    ),
    *CHAT_OPTIONS,
    *EMBEDDING_OPTIONS,
    *ADAPTER_OPTIONS,
    *DEVICE_OPTIONS,
    *CONTEXT_OPTIONS,
    *MEDIA_OPTIONS,
)


def engine_options(command: _Command) -> _Command:
    """Give a command the engine's options; it receives them as one argument ``options``, an ``EngineOptions``."""

    @functools.wraps(command)
    def with_options(*args: Any, **values: Any) -> Any:
        chats = chat_fields(values)
        embedding = embedding_fields(values)
        engine = {name: values.pop(name) for name in EngineOptions.__struct_fields__ if name in values}
        engine["rope_scale"] = values.pop("rope_scale")
        template = _template(values.pop("template_source"), values.pop("template_file"))
        engine["adapters"] = adapters_of(
            values.pop("lora"), values.pop("lora_scaled"), unapplied=values.pop("lora_unapplied")
        )
        options = msgspec.structs.replace(_options(engine, template, chats), **embedding)
        return command(*args, options=options, **values)

    decorated: _Command = with_options
    for option in reversed(_ENGINE):
        decorated = option(decorated)
    return decorated


def _options(values: dict[str, Any], template: str, chats: dict[str, Any]) -> EngineOptions:
    if values["n_parallel"] == 0:
        raise click.BadParameter("0 slots can serve nobody.", param_hint="'-np' / '--parallel'")
    return EngineOptions(
        n_ctx=values["n_ctx"],
        n_batch=values["n_batch"],
        n_ubatch=values["n_ubatch"],
        n_parallel=_DEFAULTS.n_parallel if values["n_parallel"] < 0 else values["n_parallel"],
        n_threads=max(0, values["n_threads"]),
        n_threads_batch=max(0, values["n_threads_batch"]),
        n_gpu_layers=values["n_gpu_layers"],
        use_mmap=values["use_mmap"],
        flash_attn=cast(Literal["auto", "on", "off"], values["flash_attn"]),
        chat_template=template,
        **chats,
        adapters=values["adapters"],
        mmproj_offload=values["mmproj_offload"],
        image_min_tokens=values["image_min_tokens"],
        image_max_tokens=values["image_max_tokens"],
        **device_fields(values),
        **context_fields(values),
    )


def _template(source: str | None, path: Path | None) -> str:
    if source and path is not None:
        raise click.UsageError("--chat-template and --chat-template-file cannot be given together.")
    if path is not None:
        hint = "'--chat-template-file'"
        try:
            with path.open("rb") as file:
                raw = file.read(_MAX_TEMPLATE + 1)
            source = raw.decode()
        except OSError as error:
            raise click.BadParameter(f"{path} cannot be read: {error.strerror}.", param_hint=hint) from None
        except UnicodeDecodeError:
            raise click.BadParameter(f"{path} is not UTF-8 text.", param_hint=hint) from None
        if len(raw) > _MAX_TEMPLATE:
            raise click.BadParameter(f"{path} is over {_MAX_TEMPLATE} bytes.", param_hint=hint)
    elif source == "chatml":
        source = _CHATML
    elif source and not ("{{" in source or "{%" in source):
        # A word such as chatml names one of llama.cpp's own templates; taken as Jinja it would be the whole prompt.
        raise click.BadParameter(f"{source[:40]!r} is no Jinja source.", param_hint="'--chat-template'")
    return source or ""
