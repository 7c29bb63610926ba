"""What a model will take, before anyone has loaded it; and what all may take together."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from llamaherd.pool.config import CUDA_ENV, ModelSpec, Placement
from llamaherd.pool.gguf import GGUFError, estimate_bytes, read_facts
from llamaherd.pool.gguf_memory import cache_bytes
from llamaherd.pool.gpus import Gpu, Gpus, visible
from llamaherd.pool.machine import available_memory
from llamaherd.transport.messages import EngineOptions

__all__ = ["Budget", "Expected", "automatic_budget", "expected", "expected_memory", "expected_shares"]

_log = logging.getLogger("llamaherd.pool")

#: What of the memory that was free at the start all workers together may take.
HOST_SHARE: Final = 0.8
GPU_SHARE: Final = 0.9
#: What a process takes of each GPU that it is shown before it has loaded anything, and keeps while it sleeps (CUDA's
#: context and kernels): 592 MiB on an H200, 638 with a context and no layers; smaller GPUs take less.
GPU_PROCESS_BYTES: Final = 640 * 1024 * 1024
#: What such a process takes of this machine's memory beside the model's: 370 MiB resident, CUDA's libraries among them.
GPU_HOST_BYTES: Final = 384 * 1024 * 1024


class Budget(NamedTuple):
    """What all workers together may take: of this machine's memory, and of each of these GPUs."""

    host: int
    gpus: tuple[Gpu, ...] = ()
    gpu_bytes: tuple[int, ...] = ()


class Expected(NamedTuple):
    """What a model's worker is expected to take: of this machine's memory, for each of the model's placements of each
    GPU, and of all that for its cache. Zeros where nothing is known.
    """

    host: int = 0
    gpus: tuple[tuple[int, ...], ...] = ((),)
    cache: int = 0


def expected(spec: ModelSpec, gpus: Sequence[Gpu]) -> Expected:
    """Return what can be told from a model's spec and file. Reads the file, if it was not read before."""
    return Expected(*expected_shares(spec, gpus), _expected_cache(spec))


def _expected_cache(spec: ModelSpec) -> int:
    if spec.path is None or spec.options.embedding:
        return 0
    try:
        return cache_bytes(read_facts(spec.path), spec.options)
    except (GGUFError, OSError):
        return 0


def automatic_budget(gpus: Gpus) -> Budget:
    """Return a share of the memory that is free now: 80 % of this machine's (0, which is no limit, where that is not
    known) and 90 % of that of each GPU that ``CUDA_VISIBLE_DEVICES`` shows to this process.
    """
    names = os.environ.get(CUDA_ENV)
    shown = visible(gpus.devices(), None if names is None else [name.strip() for name in names.split(",")])
    return Budget(int((available_memory() or 0) * HOST_SHARE), shown, tuple(int(gpu.free * GPU_SHARE) for gpu in shown))


def expected_shares(spec: ModelSpec, gpus: Sequence[Gpu]) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Return the bytes that a worker is expected to take of this machine's memory, and for each placement of the model
    (one, if it has none) the bytes of each GPU. Zeros where nothing is known.

    Layers go to those of the GPUs that the placement shows and the options name, in proportion to their size unless the
    options say otherwise, as llama.cpp divides them. A process takes its part of each of them without layers too:
    llama.cpp has long prompts computed there.
    """
    total = expected_memory(spec)
    share = _offloaded(spec) if gpus and total else 0.0
    on_gpus = int(total * share)
    placements = spec.placements or (Placement(),)
    if not total:
        return 0, ((0,) * len(gpus),) * len(placements)
    shown = [_given(spec.options, visible(gpus, place.gpus)) for place in placements]
    beside = _beside_gpus(spec, share) if any(shown) else 0
    return total - on_gpus + beside, tuple(_divided(on_gpus, gpus, some, spec.options.tensor_split) for some in shown)


def _offloaded(spec: ModelSpec) -> float:
    """Return which part of a model its options give to GPUs."""
    layers = spec.options.n_gpu_layers if spec.options.devices != ("none",) else 0
    if layers <= 0 or spec.path is None:
        return 1.0 if layers < 0 else 0.0
    try:
        # One more than its layers is the output.
        return min(1.0, layers / (read_facts(spec.path).n_layer + 1))
    except (GGUFError, OSError):
        return 1.0


def _beside_gpus(spec: ModelSpec, share: float) -> int:
    """Return what a worker with so large a share of its model on GPUs takes of this machine's memory all the same: its
    embeddings stay there, in the mapped file. Nothing where the spec says what it takes.
    """
    if spec.memory is not None or spec.path is None:
        return 0
    try:
        facts = read_facts(spec.path)
    except (GGUFError, OSError):
        return 0
    embeddings = facts.n_vocab * facts.n_embd * facts.size_bytes // max(1, facts.n_params)
    return GPU_HOST_BYTES + int(share * embeddings)


def _given(options: EngineOptions, shown: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Return those of the GPUs that a process sees that its model is given. CUDA's devices count from 0 in it."""
    if options.devices:
        names = {f"CUDA{number}": gpu for number, gpu in enumerate(shown)}
        shown = [names[name] for name in options.devices if name in names]
    if options.split_mode == "none":
        shown = shown[options.main_gpu : options.main_gpu + 1]
    return tuple(shown)


def _divided(total: int, gpus: Sequence[Gpu], given: Sequence[Gpu], split: Sequence[float]) -> tuple[int, ...]:
    parts = [*split, *[0.0] * len(given)] if split else [float(gpu.total) for gpu in given]
    parts = parts[: len(given)]
    whole = sum(parts) or 1.0
    shares = {gpu.index: int(total * part / whole) for gpu, part in zip(given, parts, strict=True)}
    return tuple(shares[gpu.index] + GPU_PROCESS_BYTES if gpu.index in shares else 0 for gpu in gpus)


def expected_memory(spec: ModelSpec) -> int:
    """Return the bytes that a model's worker is expected to take, wherever; 0 where its file does not tell.

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
