"""Keeps worker processes alive and gives them work.

The public surface is what this module names; everything else may change. Names are imported on first use, because a
worker process passes through this package on its way to ``llamaherd.pool.child`` and must not pay for asyncio and the
manager.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from llamaherd.pool.adapters import AdapterStatus
    from llamaherd.pool.admission import read_duration
    from llamaherd.pool.caches import Caches
    from llamaherd.pool.catalog import DEMO, Catalog, build_catalog, find_model, model_parts
    from llamaherd.pool.chat_params import ChatMessage, TemplateParams
    from llamaherd.pool.config import DEFAULT_STOP_TIMEOUT, Adapter, BrokenModel, EngineOptions, ModelSpec, Placement
    from llamaherd.pool.counts import Abandoned, PoolCounts
    from llamaherd.pool.docker import docker_cache, find_docker, remove_docker, scan_docker
    from llamaherd.pool.embeddings import Embedding, Embeddings, Ranking
    from llamaherd.pool.errands import in_thread
    from llamaherd.pool.errors import (
        BadRequest,
        DownloadFailed,
        LoadFailed,
        ModelBusy,
        ModelNotFound,
        ModelNotLoaded,
        PoolClosed,
        PoolError,
        QueueFull,
        QueueTimeout,
        WorkerDied,
        WorkerFailed,
    )
    from llamaherd.pool.events import Event, Subscription
    from llamaherd.pool.flags import FLAGS, Flag, find_flag, find_key
    from llamaherd.pool.generation import Completion, Generation, Piece, ToolCall
    from llamaherd.pool.gguf import GGUFError, ModelFacts, estimate_bytes, kv_bytes, read_facts
    from llamaherd.pool.hub import CachedModel, cache_folder, find_cached, remove_cached, scan_cache
    from llamaherd.pool.lifecycle import State
    from llamaherd.pool.names import DockerName, HubName, model_name, parse_docker_name, parse_hub_name, parse_name
    from llamaherd.pool.origin import Origin, file_of_url, shown_address
    from llamaherd.pool.params import ChatParams, GenerateParams, check_defaults, with_defaults
    from llamaherd.pool.pool import Pool
    from llamaherd.pool.presets import Preset, PresetFile, Setting, read_presets
    from llamaherd.pool.reload import ReloadReport
    from llamaherd.pool.sources import Configure, Draft, Sources, fingerprint, gather, plain
    from llamaherd.pool.status import ModelStatus, QueuedRequest, ReplicaStatus
    from llamaherd.pool.sync import SyncPool
    from llamaherd.pool.sync_stream import SyncGeneration, SyncSubscription
    from llamaherd.transport.messages import (
        CallDelta,
        EngineLoad,
        FinishReason,
        PromptProgress,
        SlotFile,
        SlotState,
        Timings,
        TokenProb,
        TokenProbs,
        Usage,
    )

__all__ = [
    "fingerprint",
    "DEFAULT_STOP_TIMEOUT",
    "DEMO",
    "FLAGS",
    "Abandoned",
    "Adapter",
    "AdapterStatus",
    "BadRequest",
    "BrokenModel",
    "CachedModel",
    "Caches",
    "CallDelta",
    "Catalog",
    "ChatMessage",
    "ChatParams",
    "Completion",
    "Configure",
    "DownloadFailed",
    "Draft",
    "Embedding",
    "Embeddings",
    "EngineOptions",
    "Event",
    "FinishReason",
    "Flag",
    "GGUFError",
    "GenerateParams",
    "Generation",
    "DockerName",
    "HubName",
    "LoadFailed",
    "ModelBusy",
    "ModelFacts",
    "ModelNotFound",
    "ModelNotLoaded",
    "ModelSpec",
    "ModelStatus",
    "Origin",
    "Piece",
    "Placement",
    "Pool",
    "PoolClosed",
    "PoolCounts",
    "PoolError",
    "Preset",
    "PresetFile",
    "QueueFull",
    "QueueTimeout",
    "QueuedRequest",
    "Ranking",
    "ReloadReport",
    "ReplicaStatus",
    "Setting",
    "Sources",
    "State",
    "Subscription",
    "SyncGeneration",
    "SyncPool",
    "SyncSubscription",
    "TemplateParams",
    "EngineLoad",
    "PromptProgress",
    "SlotFile",
    "SlotState",
    "Timings",
    "TokenProb",
    "TokenProbs",
    "ToolCall",
    "Usage",
    "WorkerDied",
    "WorkerFailed",
    "build_catalog",
    "cache_folder",
    "estimate_bytes",
    "file_of_url",
    "find_cached",
    "find_flag",
    "check_defaults",
    "shown_address",
    "with_defaults",
    "find_key",
    "find_model",
    "gather",
    "in_thread",
    "kv_bytes",
    "model_name",
    "model_parts",
    "parse_docker_name",
    "parse_name",
    "docker_cache",
    "find_docker",
    "remove_docker",
    "scan_docker",
    "parse_hub_name",
    "plain",
    "read_duration",
    "read_facts",
    "read_presets",
    "remove_cached",
    "scan_cache",
]

_HOME: Final = {
    "fingerprint": "llamaherd.pool.sources",
    "Abandoned": "llamaherd.pool.counts",
    "Adapter": "llamaherd.pool.config",
    "AdapterStatus": "llamaherd.pool.adapters",
    "BadRequest": "llamaherd.pool.errors",
    "BrokenModel": "llamaherd.pool.config",
    "CachedModel": "llamaherd.pool.hub",
    "Caches": "llamaherd.pool.caches",
    "CallDelta": "llamaherd.transport.messages",
    "Catalog": "llamaherd.pool.catalog",
    "ChatMessage": "llamaherd.pool.chat_params",
    "ChatParams": "llamaherd.pool.params",
    "Completion": "llamaherd.pool.generation",
    "Configure": "llamaherd.pool.sources",
    "DEFAULT_STOP_TIMEOUT": "llamaherd.pool.config",
    "DEMO": "llamaherd.pool.catalog",
    "DownloadFailed": "llamaherd.pool.errors",
    "Draft": "llamaherd.pool.sources",
    "Embedding": "llamaherd.pool.embeddings",
    "Embeddings": "llamaherd.pool.embeddings",
    "EngineOptions": "llamaherd.pool.config",
    "Event": "llamaherd.pool.events",
    "FLAGS": "llamaherd.pool.flags",
    "FinishReason": "llamaherd.transport.messages",
    "Flag": "llamaherd.pool.flags",
    "GGUFError": "llamaherd.pool.gguf",
    "GenerateParams": "llamaherd.pool.params",
    "Generation": "llamaherd.pool.generation",
    "DockerName": "llamaherd.pool.names",
    "HubName": "llamaherd.pool.names",
    "LoadFailed": "llamaherd.pool.errors",
    "ModelBusy": "llamaherd.pool.errors",
    "ModelFacts": "llamaherd.pool.gguf",
    "ModelNotFound": "llamaherd.pool.errors",
    "ModelNotLoaded": "llamaherd.pool.errors",
    "ModelSpec": "llamaherd.pool.config",
    "ModelStatus": "llamaherd.pool.status",
    "Origin": "llamaherd.pool.origin",
    "Piece": "llamaherd.pool.generation",
    "Placement": "llamaherd.pool.config",
    "Pool": "llamaherd.pool.pool",
    "PoolClosed": "llamaherd.pool.errors",
    "PoolCounts": "llamaherd.pool.counts",
    "PoolError": "llamaherd.pool.errors",
    "Preset": "llamaherd.pool.presets",
    "PresetFile": "llamaherd.pool.presets",
    "QueueFull": "llamaherd.pool.errors",
    "QueueTimeout": "llamaherd.pool.errors",
    "QueuedRequest": "llamaherd.pool.status",
    "Ranking": "llamaherd.pool.embeddings",
    "ReloadReport": "llamaherd.pool.reload",
    "ReplicaStatus": "llamaherd.pool.status",
    "Setting": "llamaherd.pool.presets",
    "Sources": "llamaherd.pool.sources",
    "State": "llamaherd.pool.lifecycle",
    "Subscription": "llamaherd.pool.events",
    "SyncGeneration": "llamaherd.pool.sync_stream",
    "SyncPool": "llamaherd.pool.sync",
    "SyncSubscription": "llamaherd.pool.sync_stream",
    "TemplateParams": "llamaherd.pool.chat_params",
    "EngineLoad": "llamaherd.transport.messages",
    "PromptProgress": "llamaherd.transport.messages",
    "SlotFile": "llamaherd.transport.messages",
    "SlotState": "llamaherd.transport.messages",
    "Timings": "llamaherd.transport.messages",
    "TokenProb": "llamaherd.transport.messages",
    "TokenProbs": "llamaherd.transport.messages",
    "ToolCall": "llamaherd.pool.generation",
    "Usage": "llamaherd.transport.messages",
    "WorkerDied": "llamaherd.pool.errors",
    "WorkerFailed": "llamaherd.pool.errors",
    "build_catalog": "llamaherd.pool.catalog",
    "cache_folder": "llamaherd.pool.hub",
    "estimate_bytes": "llamaherd.pool.gguf",
    "file_of_url": "llamaherd.pool.origin",
    "find_cached": "llamaherd.pool.hub",
    "find_flag": "llamaherd.pool.flags",
    "check_defaults": "llamaherd.pool.params",
    "shown_address": "llamaherd.pool.origin",
    "with_defaults": "llamaherd.pool.params",
    "find_key": "llamaherd.pool.flags",
    "find_model": "llamaherd.pool.catalog",
    "gather": "llamaherd.pool.sources",
    "in_thread": "llamaherd.pool.errands",
    "kv_bytes": "llamaherd.pool.gguf",
    "model_name": "llamaherd.pool.names",
    "model_parts": "llamaherd.pool.catalog",
    "parse_docker_name": "llamaherd.pool.names",
    "parse_name": "llamaherd.pool.names",
    "docker_cache": "llamaherd.pool.docker",
    "find_docker": "llamaherd.pool.docker",
    "remove_docker": "llamaherd.pool.docker",
    "scan_docker": "llamaherd.pool.docker",
    "parse_hub_name": "llamaherd.pool.names",
    "plain": "llamaherd.pool.sources",
    "read_duration": "llamaherd.pool.admission",
    "read_facts": "llamaherd.pool.gguf",
    "read_presets": "llamaherd.pool.presets",
    "remove_cached": "llamaherd.pool.hub",
    "scan_cache": "llamaherd.pool.hub",
}


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
