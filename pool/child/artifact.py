"""What the manifests of a registry say: which layers are a model's files, and what they are to be called here.

Manifests are untrusted: no name of theirs becomes a path, digests must be digests, and sizes numbers. Read by the
formats of Docker's model artifacts, Ollama's, the Cloud Native Computing Foundation's ModelPack, and plain files pushed
by ``oras``; image manifests and indexes of both makers, which differ in their media types alone.
"""

import re
from typing import Annotated, Any, Final

import msgspec

from llamaherd.pool.child.failures import DownloadFailure
from llamaherd.pool.child.remote import RemoteFile
from llamaherd.pool.docker_layout import MMPROJ, TEMPLATE, file_names
from llamaherd.pool.quants import pick_model, pick_projector, split_files, split_of

__all__ = ["MANIFEST_TYPES", "Descriptor", "Manifest", "children", "choose_layers", "parse_manifest"]

#: What is accepted for a manifest: OCI's and Docker's manifests, and their indexes.
MANIFEST_TYPES: Final = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
#: Most parts of one model.
MAX_PARTS: Final = 1000
#: Largest chat template that is fetched, in bytes.
MAX_TEMPLATE: Final = 1024 * 1024

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
#: The reference takes every layer whose type holds this.
_GGUF: Final = "gguf"
_MODELS: Final = frozenset({"application/vnd.ollama.image.model"})
_PROJECTORS: Final = frozenset({"application/vnd.docker.ai.mmproj", "application/vnd.ollama.image.projector"})
_TEMPLATES: Final = frozenset({"application/vnd.docker.ai.chat.template.jinja"})
#: Types of any file, whose name is an annotation.
_ANY_FILE: Final = frozenset(
    {
        "application/vnd.cncf.model.weight.v1.raw",
        "application/octet-stream",
        "application/vnd.oci.image.layer.v1.tar",  # what oras calls a file, though it packs none
    }
)
_NAMES: Final = ("org.cncf.model.filepath", "org.opencontainers.image.title")
#: Of an index's entry that says something of another entry, and is none to run.
_ATTESTATION: Final = "vnd.docker.reference.type"
_UNKNOWN: Final = "unknown"
_SHOWN: Final = 8

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class _Platform(msgspec.Struct):
    os: str = ""
    architecture: str = ""


class Descriptor(msgspec.Struct, rename="camel"):
    """What a manifest says of a layer, or an index of a manifest.

    Attributes:
        digest: ``sha256:`` and 64 digits.
        size: In bytes.
    """

    digest: str
    size: _Size
    media_type: str = ""
    annotations: dict[str, Any] | None = None
    platform: _Platform | None = None

    def annotation(self, *keys: str) -> str:
        """Return the first of these annotations that is a text; empty without one."""
        found = [(self.annotations or {}).get(key) for key in keys]
        return next((text for text in found if isinstance(text, str)), "")


class Manifest(msgspec.Struct, rename="camel"):
    """A manifest, which has layers, or an index, which has manifests."""

    schema_version: int = 0
    layers: list[Descriptor] | None = None
    manifests: list[Descriptor] | None = None


def parse_manifest(raw: bytes, name: str) -> Manifest:
    """Return what a registry's answer says. Raises DownloadFailure if it makes no sense."""

    def refuse(reason: str) -> DownloadFailure:
        return DownloadFailure(f"the manifest of {name} makes no sense: {reason}", code="bad_answer")

    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise refuse(str(error)[:200]) from None
    if manifest.schema_version == 1:
        raise refuse("it is of the first version, which registries gave up years ago")
    if (manifest.layers is None) == (manifest.manifests is None):
        raise refuse("it has to have either layers or manifests")
    for part in (*(manifest.layers or ()), *(manifest.manifests or ())):
        if not _DIGEST.fullmatch(part.digest):
            raise refuse(f"{ascii(part.digest[:100])} is no SHA-256 digest")
    return manifest


def children(manifest: Manifest, machine: str) -> list[Descriptor]:
    """Return the manifests of an index in the order in which a model is looked for: those for this machine's
    processor, those for any, the others. Attestations are left out.
    """

    def rank(entry: Descriptor) -> int:
        if entry.platform is None or not entry.platform.architecture:
            return 1
        return 0 if entry.platform.architecture == machine else 2

    entries = [
        entry
        for entry in manifest.manifests or ()
        if not entry.annotation(_ATTESTATION) and (entry.platform is None or entry.platform.os != _UNKNOWN)
    ]
    return sorted(entries, key=rank)


def choose_layers(manifest: Manifest, name: str, *, mmproj: bool = True) -> tuple[RemoteFile, ...]:
    """Return the files of the model that a manifest holds, by the names that they get here, its first part last. An
    artifact of several files by name holds the model that the default quant means.

    Raises:
        DownloadFailure: it holds none.
    """
    layers = manifest.layers or []
    models, projector = _typed(layers)
    if not models:
        models, named = _named(layers)
        projector = projector or named
    if not models:
        types = dict.fromkeys(layer.media_type[:80] for layer in layers)
        shown = ", ".join(map(ascii, list(types)[:_SHOWN])) or "none"
        raise DownloadFailure(f"{name} holds no GGUF file; its layers are {shown}", code="no_such_file")
    if len(models) > MAX_PARTS:
        raise DownloadFailure(
            f"{name} is said to have {len(models)} parts, and {MAX_PARTS} are the most", code="bad_answer"
        )
    names = file_names(len(models))
    files = [_file(layer, path) for layer, path in zip(models, names, strict=True)]
    templates = [layer for layer in layers if layer.media_type in _TEMPLATES and layer.size <= MAX_TEMPLATE]
    beside = [_file(layer, TEMPLATE) for layer in templates[:1]]
    if projector is not None and mmproj:
        beside.append(_file(projector, MMPROJ))
    return (*beside, *files[1:], files[0])


def _typed(layers: list[Descriptor]) -> tuple[list[Descriptor], Descriptor | None]:
    """Return the layers that are a model by their types, parts in the order of the layers, and the projector."""
    models = [layer for layer in layers if _GGUF in layer.media_type or layer.media_type in _MODELS]
    projectors = [layer for layer in layers if layer.media_type in _PROJECTORS]
    return models, projectors[0] if projectors else None


def _named(layers: list[Descriptor]) -> tuple[list[Descriptor], Descriptor | None]:
    """Return the layers that are a model by their files' names, and the projector."""
    files: dict[str, Descriptor] = {}
    for layer in layers:
        path = layer.annotation(*_NAMES)
        if layer.media_type in _ANY_FILE and path.endswith(".gguf"):
            files.setdefault(path, layer)
    first = pick_model(files)
    if first is None:
        return [], None
    parts, split = split_files(files, first), split_of(first)
    if split is not None and split.count != len(parts):
        return [], None
    projector = pick_projector(files, first)
    return [files[path] for path in parts], None if projector is None else files[projector]


def _file(layer: Descriptor, path: str) -> RemoteFile:
    return RemoteFile(path, layer.size, layer.digest.removeprefix("sha256:"))
