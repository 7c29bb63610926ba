"""What answers must follow, said for the whole server: grammars and schemas on the command line and in files."""

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from llamaherd.http.sampling_options import SAMPLING_OPTIONS, sampling_defaults


def parsed(*words: str) -> dict[str, Any]:
    seen: list[dict[str, Any]] = []

    def command(**values: Any) -> None:
        seen.append(sampling_defaults(values))

    decorated: Any = command
    for option in SAMPLING_OPTIONS:
        decorated = option(decorated)
    result = CliRunner().invoke(click.command()(decorated), list(words))
    if result.exit_code:
        raise ValueError(result.output)
    return seen[0]


def test_a_text_and_a_file_mean_the_same(tmp_path: Path) -> None:
    grammar, schema = tmp_path / "g.gbnf", tmp_path / "s.json"
    grammar.write_text('root ::= "yes" | "no"')
    schema.write_text('{"type": "boolean"}')
    assert parsed("--grammar", 'root ::= "a"') == {"grammar": 'root ::= "a"'}
    assert parsed("--grammar-file", str(grammar)) == {"grammar": 'root ::= "yes" | "no"'}
    assert parsed("-j", '{"type": "boolean"}') == parsed("-jf", str(schema)) == {"json_schema": {"type": "boolean"}}


def test_a_file_that_holds_no_schema_is_one_too(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("root")
    with pytest.raises(ValueError, match="no JSON Schema"):
        parsed("-jf", str(tmp_path / "s.json"))


@pytest.mark.parametrize("words", [("-j", "{"), ("-j", "[]"), ("-jf", "/nowhere"), ("--grammar-file", "/nowhere")])
def test_what_cannot_be_read_is_an_error_of_the_command_line(words: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="Invalid value"):
        parsed(*words)
