"""The caches of this machine: models of the Hugging Face hub lie in its own, those of registries in llama.cpp's."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from llamaherd.pool.docker import docker_cache, find_docker, remove_docker, scan_docker
from llamaherd.pool.errors import BadRequest
from llamaherd.pool.hub import CachedModel, Seen, cache_folder, find_cached, remove_cached, scan_cache
from llamaherd.pool.names import DockerName, HubName

__all__ = ["Caches"]


class Caches(msgspec.Struct, frozen=True):
    """Two folders, which may be one.

    Attributes:
        hub: The Hugging Face cache; None for none.
        docker: llama.cpp's cache; None for none.
    """

    hub: Path | None = None
    docker: Path | None = None

    @classmethod
    def of_environment(cls) -> "Caches":
        """Return those that the environment names, whether or not they exist; none where it names none and this user
        has no home, such as in a container.

        Raises:
            BadRequest: a variable begins with the home of a user who is not known.
        """
        return cls(_unless_homeless(cache_folder), _unless_homeless(docker_cache))

    def folder(self, name: HubName | DockerName) -> Path | None:
        """Return where a model belongs."""
        return self.docker if isinstance(name, DockerName) else self.hub

    def scan(self, seen: Seen | None = None) -> list[CachedModel]:
        """Return every model, those of the hub first, each kind sorted by name. ``seen`` as of
        :func:`~llamaherd.pool.hub.scan_cache`.
        """
        hub = [] if self.hub is None else scan_cache(self.hub, seen)
        return hub + ([] if self.docker is None else scan_docker(self.docker))

    def find(self, name: HubName | DockerName, file: str = "") -> CachedModel | None:
        """Return the model that a name means, None if it is not there in whole. ``file`` as of
        :func:`~llamaherd.pool.hub.find_cached`; a registry's model has none.
        """
        folder = self.folder(name)
        if folder is None:
            return None
        if isinstance(name, DockerName):
            return None if file else find_docker(folder, name)
        return find_cached(folder, name, file)

    def remove(self, name: HubName | DockerName) -> int:
        """Delete a model, and return the bytes that this freed. Raises as :func:`~llamaherd.pool.hub.remove_cached` and
        :func:`~llamaherd.pool.docker.remove_docker`.
        """
        if isinstance(name, DockerName):
            return remove_docker(self.docker or docker_cache(), name)
        return remove_cached(self.hub or cache_folder(), name)


def _unless_homeless(find: Callable[[], Path]) -> Path | None:
    try:
        return find()
    except BadRequest as error:
        if error.code != "no_home":
            raise
        return None
