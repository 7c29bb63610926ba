"""What runs inside a worker process, and never in the pool's own."""

from importlib import import_module

from llamaherd.pool.child.lean import without_typing_extensions

# Everything here needs it, so this is the first to import it.
with without_typing_extensions():
    import_module("msgspec")

__all__: list[str] = []
