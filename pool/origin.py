"""Where a model's files come from when they are not on this machine yet: what is downloaded before it is loaded."""

from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import msgspec

from llamaherd.pool.addresses import bare_address, is_other
from llamaherd.pool.docker import docker_cache, find_docker, read_template, registry_address
from llamaherd.pool.errors import BadRequest
from llamaherd.pool.hub import Seen, cache_folder, find_cached, url_folder
from llamaherd.pool.names import DockerName, parse_name
from llamaherd.pool.quants import split_of, split_urls
from llamaherd.transport.messages import Download

__all__ = ["Found", "Origin", "file_of_url", "shown_address"]

_SCHEMES: Final = ("http", "https")
#: Longest name of a file that an address may have, in bytes: with what is put after it, file systems still take it.
_MAX_NAME: Final = 200
#: Most parts of a split model.
_MAX_PARTS: Final = 1000


class Found(msgspec.Struct, frozen=True):
    """The files of a model that are there.

    Attributes:
        path: Its file, or its first part.
        mmproj: The projector that goes with it, None if there is none.
        template: The chat template that came with it, Jinja source; empty if the file's counts.
    """

    path: Path
    mmproj: Path | None = None
    template: str = ""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """A repository of the Hugging Face hub or of a registry, or the address of one file.

    Attributes:
        repo: ``user/repo[:quant]``, or ``registry/repo[:tag|@digest]``.
        file: A file of the repository, instead of a quant.
        url: An ``http`` or ``https`` address of a GGUF file; of a split model that of its first part, beside which the
            others lie.
        path: Where the file of an address goes; None is llama.cpp's cache. The parts of a split one go into its folder.
        cache: The Hugging Face cache, or llama.cpp's for a registry; None is the one that the environment names.
        mmproj: Whether a projector that goes with the model is wanted too; of a repository alone.
        offline: Download nothing: what is not there is an error.
        token: For private and gated repositories; empty is the environment's (``HF_TOKEN``). It goes nowhere else.
    """

    repo: str = ""
    file: str = ""
    url: str = ""
    path: Path | None = None
    cache: Path | None = None
    mmproj: bool = True
    offline: bool = False
    token: str = ""

    def __repr__(self) -> str:
        return f"Origin({shown_address(self.url) or self.repo!r}{f', {self.file!r}' if self.file else ''})"

    def check(self) -> None:
        """Raise :class:`~llamaherd.pool.errors.BadRequest` if it names nothing that could be downloaded."""
        if bool(self.url) == bool(self.repo):
            raise BadRequest("an origin is a repository or an address", code="bad_name")
        if self.url:
            file_of_url(self.url)
            split = split_of(urlsplit(self.url).path)
            if split is not None and split.count > _MAX_PARTS:
                raise BadRequest(f"a model of {split.count} parts is none", code="bad_url")
        elif isinstance(parse_name(self.repo), DockerName) and self.file:
            raise BadRequest("a registry's model has no files to choose from: file is for the Hugging Face hub")

    @property
    def target(self) -> Path:
        """Where the file of an address is, or will be. Raises BadRequest if the address names none."""
        return (self.path or url_folder() / file_of_url(self.url)).absolute()

    @property
    def address(self) -> str:
        """What of its address says which file it is; empty for a repository."""
        return bare_address(self.url) if self.url else ""

    def find(self, seen: Seen | None = None) -> Found | None:
        """Return the files if they are there in whole, and of this address where one is named. Reads folders, except
        for what was ``seen`` just now.

        Raises:
            BadRequest: as :meth:`check`.
        """
        if self.url:
            urls = split_urls(self.url)
            parts = [self.target.with_name(file_of_url(part)) for part in urls]
            parts[0] = self.target if len(parts) == 1 else parts[0]
            there = all(file.is_file() and not is_other(file, url) for file, url in zip(parts, urls, strict=True))
            return Found(parts[0]) if there else None
        name = parse_name(self.repo)
        if isinstance(name, DockerName):
            found = find_docker(self.cache or docker_cache(), name)
        else:
            found = find_cached(self.cache or cache_folder(), name, self.file, seen)
        if found is None:
            return None
        return Found(found.path, found.mmproj if self.mmproj else None, read_template(found.template))

    def to_download(self, model: str, endpoint: str = "") -> Download:
        """Return the command that has a worker download it. Raises as :meth:`check`.

        Args:
            endpoint: The hub's or registry's address, if it is another than usual.
        """
        self.check()
        if self.url:
            return Download(model=model, repo="", cache="", url=self.url, target=str(self.target), offline=self.offline)
        name = parse_name(self.repo)
        if isinstance(name, DockerName):
            return Download(
                model=model,
                registry=name.registry,
                repo=name.repo,
                tag=name.reference,
                cache=str(self.cache or docker_cache()),
                endpoint=registry_address(name, endpoint),
                offline=self.offline,
                mmproj=self.mmproj,
            )
        return Download(
            model=model,
            repo=name.repo,
            tag=name.tag,
            file=self.file,
            cache=str(self.cache or cache_folder()),
            endpoint=endpoint,
            offline=self.offline,
            mmproj=self.mmproj,
        )


def file_of_url(url: str) -> str:
    """Return the name of the file that an address leads to, which is its last part without what follows ``?`` or ``#``.

    Raises:
        BadRequest: it is no ``http`` or ``https`` address, or its last part is no name of a GGUF file.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise BadRequest(f"{ascii(shown_address(url))} is no address: {error}", code="bad_url") from None
    if parts.scheme not in _SCHEMES or not parts.hostname or not url.isprintable():
        raise BadRequest(f"{ascii(shown_address(url))} is no http or https address", code="bad_url")
    name = unquote(parts.path.rpartition("/")[2])
    within = name.isprintable() and not {"/", "\\"} & set(name) and not name.startswith(".")
    within = within and len(name.encode()) <= _MAX_NAME
    if not within or split_of(name) is None:
        raise BadRequest(f"{ascii(shown_address(url))} does not end in the name of a .gguf file", code="bad_url")
    return name


def shown_address(url: str) -> str:
    """Return an address as messages have it: what follows ``?`` or ``#`` or stands before ``@`` may be a secret."""
    scheme, separator, rest = url.partition("?")[0].partition("#")[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"[:200]
