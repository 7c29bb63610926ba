"""What a model will take, before anyone has loaded it."""

import logging
from pathlib import Path

from llamaherd.pool.config import ModelSpec
from llamaherd.pool.gguf import GGUFError, estimate_bytes, read_facts

__all__ = ["expected_memory"]

_log = logging.getLogger("llamaherd.pool")


def expected_memory(spec: ModelSpec) -> int:
    """Return the bytes that a model's worker is expected to take; 0 where its file does not tell.

    What the spec says comes first. A file that cannot be read costs nothing here, since its load will fail with the
    reason.
    """
    if spec.memory is not None:
        return spec.memory
    if spec.path is None:
        return 0
    try:
        adapters = sum(Path(adapter.path).stat().st_size for adapter in spec.options.adapters)
        projector = spec.mmproj.stat().st_size if spec.mmproj is not None else 0
        return estimate_bytes(read_facts(spec.path), spec.options) + adapters + projector
    except (GGUFError, OSError) as error:
        _log.debug("the memory of %r is not known: %s", spec.name, error)
        return 0
