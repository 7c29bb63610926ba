"""Preset files: an INI file with one section per model, written for llama-server and read by its rules.

A key is a flag of the command line without its dashes, long or short, or the flag's environment variable. ``[*]`` holds
what is true of all models; keys ahead of the first section make a model called ``default``; the key ``version`` means
nothing. ``;`` and ``#`` begin a comment anywhere in a line. A key that is written twice counts where it stands last.

This module knows the file and not the options: what a setting does is for whoever turns settings into a
:class:`~llamaherd.pool.config.ModelSpec` to say. A mistake costs the section that it is in and nothing else.
"""

import re
from pathlib import Path
from typing import Final

import msgspec

from llamaherd.pool.errors import BadRequest
from llamaherd.pool.names import canonical_section

__all__ = ["Preset", "PresetFile", "Setting", "parse_presets", "read_presets"]

#: Largest preset file that is read, in bytes.
MAX_BYTES: Final = 16 * 1024 * 1024
#: The section whose settings are true of all models, and the model of the keys ahead of every section.
EVERYONE: Final = "*"
DEFAULT: Final = "default"

_HEADER: Final = re.compile(r"\[(?P<name>[^\]]+)\][ \t]*(?:[;#].*)?")
_SETTING: Final = re.compile(r"(?P<key>[A-Za-z_][A-Za-z0-9_.-]*)[ \t]*=[ \t]*(?P<value>[^;#]*)(?:[;#].*)?")
_LINE_END: Final = re.compile(r"\r\n|\n|\r")
_WORD: Final = re.compile(r"[^\s:=]+|.", re.DOTALL)
_IGNORED_KEY: Final = "version"
_SHOWN: Final = 60


class Setting(msgspec.Struct, frozen=True, gc=False):
    """One line of a preset file.

    Attributes:
        key: As it is written.
        value: Without spaces around it and without a comment.
        place: File and line, for people.
    """

    key: str
    value: str
    place: str


class Preset(msgspec.Struct, frozen=True):
    """One section.

    Attributes:
        name: The model's, with its quant as listings write it.
        settings: In the file's order; no key twice.
        place: File and line of the section's head.
        error: Why the section cannot be used; empty if it can.
    """

    name: str
    settings: tuple[Setting, ...] = ()
    place: str = ""
    error: str = ""


class PresetFile(msgspec.Struct, frozen=True):
    """A preset file.

    Attributes:
        everyone: The settings of ``[*]``.
        presets: The other sections, in the file's order; no name twice.
        warnings: One line for people per oddity that costs nothing.
    """

    everyone: tuple[Setting, ...] = ()
    presets: tuple[Preset, ...] = ()
    warnings: tuple[str, ...] = ()


def read_presets(path: Path) -> PresetFile:
    """Return what a preset file says.

    Raises:
        BadRequest: it cannot be read, is over 16 MiB or is no UTF-8 text, or ``[*]`` has a line that means nothing.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadRequest(f"preset file {path} cannot be read: {reason}") from None
    if len(raw) > MAX_BYTES:
        raise BadRequest(f"preset file {path} is over {MAX_BYTES} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise BadRequest(f"{path}:{line}: this is not UTF-8 text") from None
    return parse_presets(text, str(path))


def parse_presets(text: str, source: str) -> PresetFile:
    """Return what a preset file's text says. ``source`` is its name in messages. Raises as :func:`read_presets`."""
    parser = _Parser(source)
    for number, line in enumerate(_LINE_END.split(text), 1):
        parser.feed(line.strip(" \t"), number)
    return parser.finish()


class _Section:
    def __init__(self, name: str, place: str) -> None:
        self.name = name
        self.place = place
        self.settings: dict[str, Setting] = {}
        self.error = ""


class _Parser:
    """Takes a file line by line."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._warnings: list[str] = []
        self._current = _Section(DEFAULT, f"{source}:1")
        self._sections = {DEFAULT: self._current}

    def feed(self, line: str, number: int) -> None:
        if not line or line[0] in ";#":
            return
        header = _HEADER.fullmatch(line) if line[0] == "[" else None
        if header is not None and header["name"].strip():
            self._open(header["name"].strip(), f"{self._source}:{number}")
            return
        found = _SETTING.fullmatch(line)
        settings = self._current.settings
        if found is None:
            problem = f"{self._source}:{number}: {_beginning(line)} is no [section] and no key = value"
            self._current.error = self._current.error or problem
        elif (key := found["key"]) != _IGNORED_KEY:
            # Written anew, a key moves to the end: of two spellings of one flag, the later line counts.
            settings.pop(key, None)
            settings[key] = Setting(key, found["value"].rstrip(" \t"), f"{self._source}:{number}")

    def _open(self, name: str, place: str) -> None:
        name = name if name == EVERYONE else canonical_section(name)
        self._current = _Section(name, place)
        before = self._sections.pop(name, None)
        if before is not None and (before.settings or before.error):
            self._warnings.append(f"{place}: [{name}] stands a second time and replaces {before.place}")
        self._sections[name] = self._current

    def finish(self) -> PresetFile:
        everyone = self._sections.pop(EVERYONE, None)
        if everyone is not None and everyone.error:
            raise BadRequest(f"{everyone.error} (in [*], so of all models)")
        first = self._sections[DEFAULT]
        if first.place == f"{self._source}:1" and not first.settings and not first.error:
            del self._sections[DEFAULT]
        return PresetFile(
            everyone=() if everyone is None else tuple(everyone.settings.values()),
            presets=tuple(
                Preset(section.name, tuple(section.settings.values()), section.place, section.error)
                for section in self._sections.values()
            ),
            warnings=tuple(self._warnings),
        )


def _beginning(line: str) -> str:
    """Return a line's first word, in quotes: a value that stands behind it may be a secret, and clients read errors."""
    found = _WORD.match(line)
    word = found[0] if found is not None else ""
    return ascii(word[:_SHOWN]) + (" ..." if len(word) < len(line) else "")
