"""The options of the server: what they mean, and that a key goes nowhere but to the door."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import httpx2
import psutil
import pytest

from llamaherd.http.limits import Limits
from llamaherd.http.offer import DEFAULT_BODY_SECONDS
from llamaherd.http.security import Cors
from llamaherd.http.server_options import ServerSettings, server_options

DEADLINE = 120


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("LLAMA_ARG_", "LLAMA_API_KEY")):
            monkeypatch.delenv(name)


def parsed(*arguments: str) -> ServerSettings:
    seen: list[ServerSettings] = []

    @click.command()
    @server_options
    def probe(settings: ServerSettings) -> None:
        seen.append(settings)

    probe.main(list(arguments), standalone_mode=False)
    return seen[0]


def test_without_options_the_server_is_on_loopback_and_open_to_this_machine() -> None:
    settings = parsed()
    assert (settings.host, settings.port, settings.tls) == ("127.0.0.1", 8080, None)
    assert [settings.offer.get(name) for name in ("autoload", "manage", "metrics")] == [True, True, True]
    assert settings.limits == Limits()
    assert settings.offer.get("body_seconds") == DEFAULT_BODY_SECONDS
    assert len(settings.security.keys) == 0
    assert settings.security.cors == Cors()
    assert settings.security.allowed_hosts == ()


def test_keys_come_from_options_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfrom-file\n")
    keys = parsed("--api-key", "a, b,", "--api-key", "c", "--api-key-file", str(file)).security.keys
    assert all(map(keys.admit, (b"a", b"b", b"c", b"from-file")))
    assert not keys.admit(b"a, b,")
    monkeypatch.setenv("LLAMA_API_KEY", "with space,second")
    monkeypatch.setenv("LLAMA_ARG_API_KEY_FILE", str(file))
    keys = parsed().security.keys
    assert all(map(keys.admit, (b"with space", b"second", b"from-file")))
    assert len(keys) == 3


def test_an_empty_variable_is_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_API_KEY", "")
    assert len(parsed().security.keys) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--api-key", ""], "the key is empty"),
        (["--api-key", " , "], "the key is empty"),
        (["--api-key-file", "/absent"], "/absent cannot be read: No such file or directory"),
        (["--api-key-file", "/dev/null"], "/dev/null holds no API key"),
        (["--ssl-key-file", "key.pem"], "go together"),
        (["--ssl-cert-file", "cert.pem"], "go together"),
        (["--max-connections", "0"], "0 is not in the range"),
        (["--timeout", "0"], "0.0 is not in the range"),
    ],
)
def test_a_door_that_would_stand_open_by_mistake_is_an_error(arguments: list[str], message: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        parsed(*arguments)
    assert message in caught.value.format_message()


def test_the_rest_has_the_references_names() -> None:
    settings = parsed(
        *("--host", "::1", "--port", "9", "--ssl-key-file", "key.pem", "--ssl-cert-file", "cert.pem"),
        *("--max-connections", "7", "-to", "600", "--allowed-host", "a.example", "--allowed-host", "b.example"),
        *("--cors-origins", "https://a.example, localhost", "--cors-methods", "GET", "--cors-headers", "x-a"),
        *(
            "--sse-ping-interval",
            "3",
            "--no-cors-credentials",
            "--no-models-autoload",
            "--no-models-manage",
            "--no-metrics",
        ),
    )
    assert (settings.host, settings.port) == ("::1", 9)
    assert settings.tls == (Path("cert.pem"), Path("key.pem"))
    assert settings.limits.max_connections == 7
    assert (settings.limits.send_seconds, settings.offer.get("body_seconds")) == (600, 600)
    assert settings.offer.get("stream_ping") == 3
    assert parsed("--sse-ping-interval", "-1").offer.get("stream_ping", 0) is None
    assert settings.security.allowed_hosts == ("a.example", "b.example")
    assert settings.security.cors == Cors(
        origins=("https://a.example", "localhost"), methods="GET", headers="x-a", credentials=False
    )
    assert [settings.offer.get(name) for name in ("autoload", "manage", "metrics")] == [False, False, False]


@pytest.mark.parametrize(
    ("arguments", "warnings"),
    [
        ([], 0),
        (["--host", "localhost"], 0),
        (["--host", "x.sock"], 0),
        (["--host", "0.0.0.0"], 1),
        (["--host", "0.0.0.0", "--cors-origins", "*"], 2),
        (["--host", "0.0.0.0", "--cors-origins", "*", "--api-key", "k"], 0),
    ],
)
def test_whoever_lets_strangers_in_is_warned(
    arguments: list[str], warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    parsed(*arguments).warn()
    assert len(caplog.records) == warnings


@pytest.mark.timeout(300)
def test_a_key_is_in_no_workers_environment_or_command_line_and_in_no_log(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("secret-of-file\n")
    command = [sys.executable, "-P", "-m", "llamaherd.http", "serve", "-m", "demo", "--port", "0"]
    with subprocess.Popen(
        [*command, "--api-key-file", str(file)],
        env={**os.environ, "LLAMA_API_KEY": "secret-of-environment"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[3].rstrip(",")
            body = {"prompt": "The", "max_tokens": 1}
            with httpx2.Client(base_url=url, timeout=DEADLINE) as client:
                assert client.post("/v1/completions", json=body).status_code == 401
                for key in ("secret-of-environment", "secret-of-file"):
                    response = client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
                    assert response.status_code == 200
            workers = psutil.Process(process.pid).children(recursive=True)
            told = [str((worker.cmdline(), worker.environ())) for worker in workers]
            process.send_signal(signal.SIGTERM)
            log = "".join(process.communicate(timeout=DEADLINE))
        finally:
            process.kill()
    assert told
    assert not any("secret-of" in text for text in (*told, log))


def test_the_end_and_the_inputs_are_bounded_as_told() -> None:
    settings = parsed("--drain-seconds", "0.5", "--max-inputs", "3")
    assert settings.limits.drain_seconds == 0.5
    assert settings.offer.get("max_inputs") == 3
