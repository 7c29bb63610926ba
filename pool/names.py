"""How models are called, by the reference's rules (``common/common.h``, ``common/preset.cpp``).

A model is called by its Hugging Face repository, else by its Docker repository, else by its path. The first is written
``<user>/<repo>[:<quant>]``; what a quant means among files is in :mod:`llamaherd.pool.quants`. The second begins with
the registry's host where it stands beside names of the first kind: ``docker.io/ai/smollm2:135M-Q4_0``.
"""

import ipaddress
import re
from typing import Final

import msgspec

from llamaherd.pool.errors import BadRequest

__all__ = [
    "DOCKER_HUB",
    "DockerName",
    "HubName",
    "canonical_section",
    "canonical_tag",
    "is_loopback",
    "model_name",
    "parse_docker_name",
    "parse_hub_name",
    "parse_name",
]

#: Docker's own registry.
DOCKER_HUB: Final = "docker.io"

_LAST_WORD: Final = re.compile(r"[-.]([A-Z0-9_]+)$", re.IGNORECASE | re.ASCII)
#: Letters, digits and ``_``; ``.`` and ``-`` stand between those; one slash. Longer than 256 is none.
_REPO: Final = re.compile(r"\w+(?:[.-]\w+)*/\w+(?:[.-]\w+)*", re.ASCII)
_QUANT: Final = re.compile(r"[\w.-]+", re.ASCII)
_MAX_REPO: Final = 256
#: Other names of the same registry.
_DOCKER_HUB_NAMES: Final = frozenset({DOCKER_HUB, "index.docker.io", "registry-1.docker.io"})
#: What the reference puts ahead of a name without ``/``, and after one without a tag.
_DOCKER_USER: Final = "ai"
_DOCKER_TAG: Final = "latest"
_LOCALHOST: Final = "localhost"
#: Letters, digits and ``-`` between ``.``, and perhaps a port.
_REGISTRY: Final = re.compile(r"(?P<host>[a-z0-9]+(?:-+[a-z0-9]+|\.[a-z0-9]+)*)(?::(?P<port>[0-9]{1,5}))?", re.ASCII)
#: The registries' own grammar (OCI distribution specification, "Pulling manifests").
_DOCKER_REPO: Final = re.compile(
    r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*)*", re.ASCII
)
_DOCKER_REFERENCE: Final = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DOCKER_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


class HubName(msgspec.Struct, frozen=True):
    """A model of a Hugging Face repository.

    Attributes:
        repo: ``user/repo``.
        tag: The quant as it was given; empty for the default one.
    """

    repo: str
    tag: str = ""

    def __str__(self) -> str:
        return f"{self.repo}:{self.tag}" if self.tag else self.repo


class DockerName(msgspec.Struct, frozen=True):
    """A model of a Docker or OCI registry.

    Attributes:
        registry: Its host and perhaps a port, such as ``docker.io`` or ``localhost:5000``.
        repo: Its path there, such as ``ai/smollm2``.
        reference: A tag, or the digest of a manifest, ``sha256:`` and 64 digits.
    """

    registry: str
    repo: str
    reference: str = _DOCKER_TAG

    def __str__(self) -> str:
        return f"{self.repository}{'@' if self.is_digest else ':'}{self.reference}"

    @property
    def repository(self) -> str:
        """Registry and path, which name the model with the tag ``latest`` too."""
        return f"{self.registry}/{self.repo}"

    @property
    def is_digest(self) -> bool:
        """Whether it names certain contents, and not what has a tag now."""
        return ":" in self.reference

    @property
    def is_latest(self) -> bool:
        """Whether the repository alone means it."""
        return self.reference == _DOCKER_TAG


def model_name(*, hf_repo: str = "", docker_repo: str = "", path: str = "") -> str:
    """Return how a model is called that comes from one of these; empty if it comes from none."""
    return hf_repo or docker_repo or path


def parse_hub_name(text: str) -> HubName:
    """Return what ``<user>/<repo>[:<quant>]`` names.

    Raises:
        BadRequest: it is no such name. Nothing that passes can lead out of a cache folder.
    """
    repo, colon, tag = text.partition(":")
    fits = len(repo) <= _MAX_REPO and _REPO.fullmatch(repo) is not None
    # huggingface_hub's own rule; its cache folders write / as --.
    fits = fits and "--" not in repo and (not colon or (_QUANT.fullmatch(tag) is not None and ".." not in tag))
    if not fits or len(tag) > _MAX_REPO:
        raise BadRequest(f"{ascii(text[:100])} is no model name of the form <user>/<repo>[:<quant>]", code="bad_name")
    return HubName(repo, tag)


def parse_docker_name(text: str) -> DockerName:
    """Return what ``[<registry>/][<user>/]<model>[:<tag>|@<digest>]`` names, where Docker is known to be meant.

    The first part is a registry if it is ``localhost`` or holds ``.`` or ``:``; otherwise the registry is
    ``docker.io``, where a model without a user is one of ``ai``, and no tag is ``latest``, both as in the reference. A
    name that would read as one of Hugging Face gets its registry's port: ``r.example/m`` is ``r.example:443/m``.

    Raises:
        BadRequest: it is no such name. Nothing that passes can lead out of a cache folder.
    """
    name, at, digest = text.partition("@")
    first, slash, rest = name.partition("/")
    if slash and _is_registry(first):
        registry, path = first.lower(), rest
    else:
        registry, path = DOCKER_HUB, name
    registry = DOCKER_HUB if registry in _DOCKER_HUB_NAMES else registry
    repo, colon, tag = path.partition(":")
    if registry == DOCKER_HUB:
        repo = repo if "/" in repo else f"{_DOCKER_USER}/{repo}"
    elif "/" not in repo and ":" not in registry:
        registry = f"{registry}:{80 if is_loopback(registry) else 443}"
    reference = digest if at else tag if colon else _DOCKER_TAG
    found = DockerName(registry, repo, reference)
    host = _REGISTRY.fullmatch(registry)
    fits = host is not None and int(host["port"] or 1) in range(1, 65536) and _DOCKER_REPO.fullmatch(repo) is not None
    fits = fits and (_DOCKER_DIGEST if at else _DOCKER_REFERENCE).fullmatch(reference) is not None
    if not fits or (at and colon) or len(str(found)) > _MAX_REPO:
        raise BadRequest(
            f"{ascii(text[:100])} is no model name of the form [<registry>/][<user>/]<model>[:<tag>]", code="bad_name"
        )
    return found


def parse_name(text: str) -> HubName | DockerName:
    """Return what a name means that may be of either kind: one of Docker begins with a registry.

    Raises:
        BadRequest: it is neither.
    """
    first, slash, rest = text.partition("/")
    if slash and (first.lower() in _DOCKER_HUB_NAMES or ":" in first or ("/" in rest and _is_registry(first))):
        return parse_docker_name(text)
    try:
        return parse_hub_name(text)
    except BadRequest as error:
        raise BadRequest(f"{error} or <registry>/<repo>[:<tag>]", code="bad_name") from None


def is_loopback(registry: str) -> bool:
    """Whether a registry is on this machine, by its name alone."""
    host = registry.partition(":")[0]
    try:
        return host == _LOCALHOST or ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return False


def _is_registry(part: str) -> bool:
    return part == _LOCALHOST or "." in part or ":" in part


def canonical_tag(tag: str) -> str:
    """Return a quant as listings write it: the last word in capitals, so ``model-q8_0`` is ``Q8_0``."""
    found = _LAST_WORD.search(tag)
    return (found[1] if found is not None else tag).upper()


def canonical_section(name: str) -> str:
    """Return the model that a section of a preset file speaks of: its quant as listings write it. Tags of registries
    stay as they are.
    """
    if ":" not in name:
        return name
    try:
        if isinstance(parse_name(name), DockerName):
            return name
    except BadRequest:
        pass
    repo, colon, tag = name.rpartition(":")
    return f"{repo}:{canonical_tag(tag)}" if colon else name
