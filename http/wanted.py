"""What to download, as the command line says it; apart from the download, which needs more imports."""

from pathlib import Path

import msgspec

__all__ = ["Pull"]


class Pull(msgspec.Struct, frozen=True, kw_only=True):
    """What to download.

    Attributes:
        model: ``<user>/<repo>[:<quant>]``, or ``<registry>/<repo>[:<tag>]``.
        file: A file of the repository, instead of a quant.
        cache: The cache's folder; None for the environment's.
        offline: Look into the cache and nowhere else.
        token: For private and gated repositories; empty is the environment's.
        url: The address of a file, instead of a model.
        path: Where that file goes; None is llama.cpp's cache.
    """

    model: str = ""
    cache: Path | None = None
    file: str = ""
    offline: bool = False
    token: str = ""
    url: str = ""
    path: Path | None = None
