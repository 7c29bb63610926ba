"""The command line as its user meets it: mostly real processes, and nothing that they leave behind."""

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Any

import click
import httpx2
import psutil
import pytest
from click.testing import CliRunner

from llamaherd.http.cli import cli, main
from llamaherd.http.options import engine_options
from llamaherd.http.terminal import one_line, printable
from llamaherd.pool import EngineOptions
from llamaherd.pool.catalog import demo_file
from tiny_gguf import write_scripted_llama

COMMAND = [sys.executable, "-P", "-m", "llamaherd.http"]
QUESTION = "Name the capital of France."
#: What the demo model answers without end when it always takes the likeliest token.
ENDLESS = "What is the capital of France?"
#: Seconds after which a test gives up waiting.
DEADLINE = 120

# Real models on whatever machine this is: nothing here takes a tenth of it when that machine is idle.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options come from the command line alone unless a test says otherwise."""
    for name in os.environ:
        if name.startswith(("LLAMA_ARG_", "LLAMA_API_KEY")):
            monkeypatch.delenv(name)


def llamaherd(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, text=True, timeout=DEADLINE)


@contextlib.contextmanager
def started(*arguments: str, **settings: Any) -> Generator[subprocess.Popen[str]]:
    """A running command, killed if the test does not end it."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    with subprocess.Popen([*COMMAND, *arguments], text=True, **settings) as process:
        try:
            yield process
        finally:
            process.kill()


def output(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers, "there is no worker to look for later"
    return workers


def alive(workers: list[psutil.Process]) -> list[psutil.Process]:
    """Who of them still runs; the command has ended, so nobody should."""
    return [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]


def read_terminal(outer: int) -> str:
    """Return what a terminal was told until its last program left."""
    shown = b""
    with contextlib.suppress(OSError):  # the terminal reports its other end's closing as an error
        while chunk := os.read(outer, 65536):
            shown += chunk
    return shown.decode()


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one line of a failed command, without its prefix."""
    assert result.returncode != 0
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("llamaherd: error: ")
    return line.removeprefix("llamaherd: error: ")


# --- run ---


@pytest.mark.parametrize("transport", ["pipe", "zmq", "stdio"])
def test_run_answers_over_every_transport(transport: str) -> None:
    result = llamaherd("run", "demo", QUESTION, "--temp", "0", "--transport", transport)

    assert "Paris" in result.stdout
    assert (result.returncode, result.stderr) == (0, "")


def test_run_can_print_one_json_object_and_read_the_prompt_from_stdin() -> None:
    result = llamaherd("run", "demo", "-", "--temp", "0", "--json", "--max-tokens", "3", stdin=QUESTION + "\n")

    answer = json.loads(result.stdout)
    assert answer["model"] == "demo"
    assert answer["finish_reason"] == "length"
    assert answer["text"].startswith("The capital")
    assert answer["usage"]["completion_tokens"] == 3
    assert set(answer["usage"]) == {"prompt_tokens", "completion_tokens", "cached_tokens"}
    assert set(answer["timings"]) == {"queue_ms", "prompt_ms", "predicted_ms"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_run_and_its_worker(number: signal.Signals, code: int) -> None:
    with started("run", "demo", ENDLESS, "--temp", "0") as process:
        assert output(process.stdout).read(1)
        workers = workers_of(process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=DEADLINE)

    assert (process.returncode, errors) == (code, "")
    assert alive(workers) == []


def test_run_ends_in_silence_when_nobody_reads_its_answer() -> None:
    with started("run", "demo", ENDLESS, "--temp", "0") as process:
        assert output(process.stdout).read(1)
        workers = workers_of(process)
        output(process.stdout).close()
        errors = output(process.stderr).read()
        process.wait(DEADLINE)

    assert (process.returncode, errors) == (1, "")
    assert alive(workers) == []


def test_on_a_terminal_the_load_shows_its_progress_and_the_answer_stays_apart() -> None:
    outer, inner = pty.openpty()
    try:
        with started("run", "demo", QUESTION, "--temp", "0", stderr=inner) as process:
            os.close(inner)
            answer = output(process.stdout).read()
            shown = read_terminal(outer)
    finally:
        os.close(outer)

    assert "loading demo" in shown
    assert "Paris" in answer and "\x1b" not in answer


@pytest.fixture
def red_alert(tmp_path: Path) -> Path:
    """A model that answers with an escape sequence between two words."""
    path = tmp_path / "red.gguf"
    write_scripted_llama(path, script=["▁Red", "\x1b[31m", "▁alert"])
    return path


def test_a_terminal_is_not_driven_by_what_a_model_says(red_alert: Path) -> None:
    outer, inner = pty.openpty()
    try:
        with started("run", str(red_alert), "x", "--temp", "0", stdout=inner) as process:
            os.close(inner)
            shown = read_terminal(outer)
            errors = output(process.stderr).read()
    finally:
        os.close(outer)

    assert (shown.split(), errors) == (["Red␛[31m", "alert"], "")


def test_a_program_that_reads_the_answer_gets_it_as_it_is(red_alert: Path) -> None:
    assert llamaherd("run", str(red_alert), "x", "--temp", "0").stdout.split() == ["Red\x1b[31m", "alert"]


def cut_model(folder: Path) -> list[str]:
    path = folder / "cut.gguf"
    with demo_file().open("rb") as whole:
        path.write_bytes(whole.read(4_000_000))
    return [str(path)]


def text_file(folder: Path) -> list[str]:
    path = folder / "notes.gguf"
    path.write_text("no model at all")
    return [str(path)]


def given(*arguments: str) -> Callable[[Path], list[str]]:
    return lambda _folder: list(arguments)


@pytest.mark.parametrize(
    ("model", "evidence"),
    [
        (cut_model, "cut.gguf cannot be loaded"),
        (text_file, "notes.gguf is not a GGUF file: it starts with b'no m'"),
        (given("demo", "-c", "20000000"), " context of 20000"),
        (given("absent"), "absent: no such file, and no model has that name (known: demo)"),
        (given("."), ". is a folder, not a GGUF file"),
    ],
    ids=["truncated", "not GGUF", "context over memory", "unknown", "folder"],
)
def test_run_says_in_one_line_why_a_model_cannot_answer(
    tmp_path: Path, model: Callable[[Path], list[str]], evidence: str
) -> None:
    result = llamaherd("run", *model(tmp_path), QUESTION)

    assert evidence in error_line(result)
    assert result.returncode == 1


# --- serve ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_says_where_it_listens_answers_and_stops_without_leaving_a_worker(number: signal.Signals) -> None:
    with started("serve", "-m", "demo", "--alias", "one,two", "--port", "0", "-np", "2") as process:
        line = output(process.stdout).readline()
        assert line.startswith("llamaherd: listening on http://127.0.0.1:")
        assert line.endswith(", model: one\n")
        url = line.split()[3].rstrip(",")
        while httpx2.get(f"{url}/health", timeout=DEADLINE).status_code == 503:
            pass  # the one model is loaded without being asked for
        body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        answer = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=DEADLINE).json()
        workers = workers_of(process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=DEADLINE)

    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert alive(workers) == []


def test_serve_says_in_one_line_that_the_port_is_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = llamaherd("serve", "--port", str(port))

    assert error_line(result) == f"port {port} on 127.0.0.1 is in use by another program"
    assert result.returncode == 1


def test_serve_refuses_a_folder_without_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--models-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"llamaherd: error: there is no model in {tmp_path}\n"


# --- models, and the command as a whole ---


def test_models_lists_what_serve_would_offer_and_warns_of_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.gguf").write_bytes(b"GGUF" + bytes(1_999_996))
    (tmp_path / "bad.gguf").write_bytes(b"PK")

    assert main(["models", "--models-dir", str(tmp_path)]) == 0

    shown = capsys.readouterr()
    assert [line.split() for line in shown.out.splitlines()] == [
        ["MODEL", "SIZE", "FILE"],
        ["good", "2.0", "MB", str(tmp_path / "good.gguf")],
    ]
    assert shown.err == f"llamaherd: warning: {tmp_path}/bad.gguf is not a GGUF file: it starts with b'PK'\n"


def test_models_can_print_one_json_object() -> None:
    result = CliRunner().invoke(cli, ["models", "--json"])

    path = demo_file()
    row: dict[str, Any] = {"name": "demo", "aliases": [], "path": str(path), "size": path.stat().st_size}
    row["source"] = "preset"
    assert json.loads(result.stdout) == {"models": [row], "problems": []}


def test_the_version_is_the_packages() -> None:
    assert llamaherd("--version").stdout == "llamaherd 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("serve --transport smoke", "Invalid value for '--transport': 'smoke' is not one of 'pipe', 'zmq', 'stdio'."),
        ("serve -c -1", "Invalid value for '-c' / '--ctx-size': -1 is not in the range 0 to 2147483647."),
        ("serve -np 0", "Invalid value for '-np' / '--parallel': 0 slots can serve nobody."),
        ("serve --port 65536", "Invalid value for '--port': 65536 is not in the range 0 to 65535."),
        ("run demo x -ngl some", "'some' is not a whole number."),
        ("run demo x -fa perhaps", "'perhaps' is not 'on', 'off' or 'auto'."),
        ("run demo x --seed x", "Invalid value for '-s' / '--seed': 'x' is not a whole number."),
        ("run demo x --chat-template vicuna", "'vicuna' is no Jinja source."),
        ("run demo x --chat-template-file /absent", "/absent cannot be read: No such file or directory."),
        ("run demo", "Missing argument 'PROMPT'."),
        ("graze", "No such command 'graze'."),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llamaherd: error: ") and line.endswith(message)


def test_the_command_alone_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Commands:" in capsys.readouterr().out


# --- options ---


def parsed(*arguments: str) -> EngineOptions:
    """Return the engine options that a command line makes."""
    seen: list[EngineOptions] = []

    @click.command()
    @engine_options
    def probe(options: EngineOptions) -> None:
        seen.append(options)

    probe.main(list(arguments), standalone_mode=False)
    return seen[0]


def test_without_options_the_engine_has_its_defaults() -> None:
    assert parsed() == EngineOptions()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-c 512", EngineOptions(n_ctx=512)),
        ("--ctx-size 0", EngineOptions(n_ctx=0)),
        ("-t 3 -tb 5", EngineOptions(n_threads=3, n_threads_batch=5)),
        ("--threads -1 --threads-batch -1", EngineOptions()),
        ("-ngl 7", EngineOptions(n_gpu_layers=7)),
        ("--gpu-layers 0", EngineOptions(n_gpu_layers=0)),
        ("--n-gpu-layers all", EngineOptions(n_gpu_layers=-1)),
        ("-ngl auto", EngineOptions(n_gpu_layers=-1)),
        ("-dev CUDA0,CUDA2 -sm row -mg 1", EngineOptions(devices=("CUDA0", "CUDA2"), split_mode="row", main_gpu=1)),
        ("--device none", EngineOptions(devices=("none",))),
        ("--tensor-split 3,1 --split-mode layer", EngineOptions(tensor_split=(3.0, 1.0))),
        ("-ts 0/2.5 -mg 0", EngineOptions(tensor_split=(0.0, 2.5))),
        ("-b 64 -ub 32", EngineOptions(n_batch=64, n_ubatch=32)),
        ("--batch-size 64 --ubatch-size 32", EngineOptions(n_batch=64, n_ubatch=32)),
        ("-np 2", EngineOptions(n_parallel=2)),
        ("--parallel -1", EngineOptions()),
        ("-fa on", EngineOptions(flash_attn="on")),
        ("--flash-attn 0", EngineOptions(flash_attn="off")),
        ("--no-mmap", EngineOptions(use_mmap=False)),
        ("--embeddings", EngineOptions(embedding=True)),
        ("--embedding --pooling last", EngineOptions(embedding=True, pooling="last")),
        ("--reranking", EngineOptions(embedding=True, pooling="rank")),
        ("--rerank --pooling rank", EngineOptions(embedding=True, pooling="rank")),
        ("--embd-normalize -1 --spm-infill", EngineOptions(embd_normalize=-1, spm_infill=True)),
    ],
)
def test_options_have_the_references_spellings(arguments: str, expected: EngineOptions) -> None:
    assert parsed(*arguments.split()) == expected


def test_options_come_from_the_references_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in [("CTX_SIZE", "256"), ("N_GPU_LAYERS", "all"), ("MMAP", "0"), ("N_PARALLEL", "1")]:
        monkeypatch.setenv(f"LLAMA_ARG_{name}", value)

    assert parsed() == EngineOptions(n_ctx=256, use_mmap=False, n_parallel=1)
    assert parsed("-c", "512").n_ctx == 512


def test_a_models_path_in_the_environment_is_one_path_even_with_spaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "my model: one.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setenv("LLAMA_ARG_MODEL", str(path))

    result = CliRunner().invoke(cli, ["models", "--json"])

    assert [row["name"] for row in json.loads(result.stdout)["models"]] == ["my model: one"]


def test_a_chat_template_is_text_or_a_file_and_not_both(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages[0].content }}")

    assert parsed("--chat-template-file", str(path)) == parsed("--chat-template", path.read_text())
    with pytest.raises(click.UsageError, match="cannot be given together"):
        parsed("--chat-template-file", str(path), "--chat-template", "{{ x }}")


@pytest.mark.parametrize(("content", "message"), [(b"\xff", "is not UTF-8 text"), (b" " * 1048577, "is over 1048576")])
def test_a_chat_template_file_that_cannot_be_one_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "template.jinja"
    path.write_bytes(content)

    with pytest.raises(click.BadParameter, match=message):
        parsed("--chat-template-file", str(path))


# --- text for a terminal ---


def test_control_characters_become_visible_and_harmless() -> None:
    assert printable("a\x1b[31mb\x9b2J\x07\x7f\r\n\tc\u202ed") == "a␛[31mb\ufffd2J␇␡␍\n\tc\ufffdd"
    assert printable("Grüße 👩\u200d🌾 日本") == "Grüße 👩\u200d🌾 日本"


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    assert one_line("first\n second\tthird\x1b[2J") == "first second third␛[2J"


def test_a_reranker_has_one_pooling() -> None:
    with pytest.raises(click.UsageError, match="contradict"):
        parsed("--reranking", "--pooling", "mean")
