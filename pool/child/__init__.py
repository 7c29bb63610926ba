"""What runs inside a worker process, and never in the pool's own."""

__all__: list[str] = []
