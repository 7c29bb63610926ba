"""Every example in the README does what it says: it is cut out of the page and run."""

import http.client
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamaherd.pool import find_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SERVER = "127.0.0.1:8080"
DEADLINE = 100

pytestmark = pytest.mark.timeout(2 * DEADLINE)


def block(language: str, containing: str) -> str:
    found: str
    (found,) = [text for kind, text in BLOCKS if kind == language and containing in text]
    return found


def llamaherd(command: str) -> subprocess.CompletedProcess[str]:
    """Run a command line of the README, which begins with ``llamaherd``."""
    program, *arguments = shlex.split(command)
    assert program == "llamaherd"
    return subprocess.run(
        [sys.executable, "-P", "-m", "llamaherd.http", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        stdin=subprocess.DEVNULL,
    )


def python(source: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", source], capture_output=True, text=True, timeout=DEADLINE, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_exactly_two_set_up_commands_and_the_second_is_what_ci_runs() -> None:
    setup = README.split("## Set up")[1].split("\n## ")[0]
    first, second = re.findall(r"^```sh\n(.*)\n```$", setup, re.MULTILINE)
    assert "pip install -e '.[demo]'" in first
    assert second == "pip install -e '.[demo,dev]' && python -m pytest"
    ci = (ROOT / ".ci" / "run").read_text()
    assert "--editable '.[demo,dev]'" in ci
    assert "\npython -m pytest\n" in ci


def test_the_first_set_up_command_has_the_demo_model_answer() -> None:
    command = block("sh", "-m venv").split(" && ")[-1].strip()
    done = llamaherd(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", block("sh", "--seed 1").splitlines())
def test_the_commands_work(command: str) -> None:
    done = llamaherd(command)
    assert done.returncode == 0, done.stderr
    if "--json" in command:
        json.loads(done.stdout)
    assert done.stdout.strip()


def test_the_programmatic_example_answers() -> None:
    assert python(block("python", "asyncio.run")).strip()


def test_the_example_without_async_answers() -> None:
    assert python(block("python", "SyncPool")).strip()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The README's server, on a folder that holds the demo model and on a free port."""
    models = tmp_path_factory.mktemp("models")
    path = find_model("demo").path
    assert path is not None
    (models / "demo.gguf").symlink_to(path)
    command = block("sh", "llamaherd serve").strip().replace("~/models", str(models))
    arguments = [*shlex.split(command)[1:], "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "llamaherd.http", *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        listening = re.search(r"http://([\w.]+:\d+)", process.stdout.readline())
        assert listening is not None
        yield listening[1]
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE)


def test_the_curl_example_answers(server: str) -> None:
    command = shlex.split(block("sh", "curl").replace("\\\n", " "))
    url, header, body = command[1], command[command.index("-H") + 1], command[command.index("-d") + 1]
    assert url.startswith(f"http://{SERVER}/")
    connection = http.client.HTTPConnection(server, timeout=DEADLINE)
    name, value = header.split(": ")
    connection.request("POST", url.removeprefix(f"http://{SERVER}"), body, {name: value})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    assert answer["choices"][0]["message"]["content"].strip()


@pytest.mark.parametrize("client", ["import OpenAI", "import Anthropic"])
def test_the_examples_of_clients_answer(server: str, client: str) -> None:
    source = block("python", client)
    assert SERVER in source
    assert python(source.replace(SERVER, server)).strip()


def test_every_route_of_the_table_exists(server: str) -> None:
    routes = re.findall(r"`(GET|POST) (/\S+)`", README)
    assert len(routes) == 19
    for method, path in routes:
        connection = http.client.HTTPConnection(server, timeout=DEADLINE)
        connection.request(method, path, b"{}" if method == "POST" else None)
        status = connection.getresponse().status
        connection.close()
        assert status in ((200,) if method == "GET" else (400, 404)), (method, path, status)
