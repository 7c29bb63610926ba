"""A start without typing_extensions: what stands in for it, and that it leaves."""

import subprocess
import sys

import typing_extensions

from llamaherd.pool.child.lean import without_typing_extensions


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_who_asks_later_gets_the_real_one() -> None:
    program = """
import sys
import llamaherd.pool.child.llama_library
assert "typing_extensions" not in sys.modules
import typing_extensions
print(typing_extensions.__file__ is not None)
"""
    assert run(program) == "True"


def test_names_are_typings_and_what_typing_lacks_is_the_real_ones() -> None:
    program = """
import sys, typing
from llamaherd.pool.child.lean import without_typing_extensions
with without_typing_extensions():
    from typing_extensions import TypeAlias
    assert TypeAlias is typing.TypeAlias and "inspect" not in sys.modules
    from typing_extensions import Doc
import typing_extensions
print(Doc is typing_extensions.Doc)
"""
    assert run(program) == "True"


def test_a_name_that_nobody_has_is_missing_as_ever() -> None:
    program = """
from llamaherd.pool.child.lean import without_typing_extensions
with without_typing_extensions():
    try:
        from typing_extensions import NoSuchName
    except ImportError as error:
        print("missing")
"""
    assert run(program) == "missing"


def test_where_it_is_imported_already_it_stays() -> None:
    with without_typing_extensions():
        assert sys.modules["typing_extensions"] is typing_extensions
