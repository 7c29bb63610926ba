"""The pool's error tree: whose fault it was, and whether a retry helps.

::

    PoolError
    ├── BadRequest         caller   no retry    a parameter is wrong; nothing was started
    ├── ModelNotFound      caller   no retry    no model of that name
    ├── ModelNotLoaded     caller   no retry    the model is not loaded and loading was not asked for
    ├── ModelBusy          caller   no retry    the model is not in a state in which this can be done
    ├── QueueFull          pool     retry       a queue limit is reached
    ├── QueueTimeout       pool     retry       it waited too long for its model
    ├── LoadFailed         model    maybe       the worker could not load the model: reason, exit code, last log lines
    ├── DownloadFailed     model    maybe       a model could not be downloaded: reason, and when to try again
    ├── WorkerDied         worker   retry       the worker ended while it held the request: exit code, last log lines
    ├── WorkerFailed       worker   maybe       the worker reported that it could not serve this request
    └── PoolClosed         pool     no retry    the pool is closing or closed

``code`` says more, in a word that stays. Codes of the pool and of workers, which programs may want to tell apart (those
of bad requests name what is wrong: ``invalid_stop``, ``context_length_exceeded`` and so on):

==================  ============  ==================================================================================
``queue_full``      QueueFull     too many wait, in all or for the model
``no_room``         QueueFull     what pinned models hold leaves no room for the model
``too_large``       QueueFull     the model does not fit the budget even alone
``queue_timeout``   QueueTimeout  see there
``model_broken``    LoadFailed    the catalogue's entry cannot be used
``load_failed``     LoadFailed    the worker ended while it loaded, and gave no word of its own
``load_backoff``    LoadFailed    it failed again and again, and is not tried before ``retry_after``
``out_of_memory``   both          of LoadFailed and WorkerDied: there was too little memory
``worker_died``     WorkerDied    the worker ended, and gave no word of its own
``engine_broke``    WorkerDied    a mistake in the engine ended the worker
``request_broke``   WorkerFailed  a mistake in the engine showed with this request; the others go on
``decode_failed``   WorkerFailed  llama.cpp could not compute the step
``not_loaded``      WorkerFailed  the worker has no model
``unloaded``        WorkerFailed  the model was stopped by a command
``protocol``        WorkerFailed  the worker's answer is none, or cannot be read
==================  ============  ==================================================================================
"""

import re
from collections.abc import Mapping
from typing import ClassVar, Final, Literal

__all__ = [
    "RETRY_AFTER",
    "BadRequest",
    "DownloadFailed",
    "LoadFailed",
    "ModelBusy",
    "ModelNotFound",
    "ModelNotLoaded",
    "PoolClosed",
    "PoolError",
    "QueueFull",
    "QueueTimeout",
    "WorkerDied",
    "WorkerFailed",
]

#: What a refused caller is told to wait, in seconds: no promise, since nobody knows how long the requests ahead take.
RETRY_AFTER: Final = 1.0

Fault = Literal["caller", "model", "worker", "pool"]


class PoolError(Exception):
    """Base of everything that the pool raises on purpose.

    Attributes:
        fault: Whose fault it was.
        retry: Whether the same call may succeed later.
        retry_after: Seconds to wait before that, if known.
        code: A short stable word for programs.
    """

    fault: ClassVar[Fault] = "pool"

    def __init__(self, message: str, *, code: str = "", retry: bool = False, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry = retry
        self.retry_after = retry_after


class BadRequest(PoolError, ValueError):
    """A parameter is wrong; the text begins with its name. ``code`` is ``context_length_exceeded`` for a prompt that
    does not fit.

    Attributes:
        details: Figures that belong to the code: ``n_prompt_tokens`` and ``n_ctx`` with that one.
    """

    fault = "caller"
    _NAMED: ClassVar[re.Pattern[str]] = re.compile(
        r"([a-z_]+(?:\[\d+\]|\.[a-z_]+)*)(?=: | (?:must|is|has|holds|of|may) )"
    )

    def __init__(self, message: str, *, code: str = "", details: Mapping[str, int] | None = None) -> None:
        super().__init__(message, code=code)
        self.details = dict(details or {})

    @property
    def param(self) -> str:
        """The parameter that is wrong and the place in it, such as ``messages[0].role``; empty if it is no single one.

        It is what the text says: reasons cross the process boundary as texts.
        """
        named = self._NAMED.match(str(self))
        return "" if named is None else named.group(1)


class ModelNotFound(PoolError, LookupError):
    """No model of that name is in the pool."""

    fault = "caller"


class ModelNotLoaded(PoolError):
    """The model is not loaded, and the caller said not to load it."""

    fault = "caller"


class ModelBusy(PoolError):
    """What was asked does not fit the model's state, such as loading what is already running."""

    fault = "caller"


class QueueFull(PoolError):
    """Too many requests wait already."""


class QueueTimeout(PoolError):
    """A request waited longer for its model than ``queue_timeout`` allows."""


class _WorkerEvidence(PoolError):
    """What is known of a worker's end."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        retry: bool = False,
        retry_after: float | None = None,
        exit_code: int | None = None,
        log: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, code=code, retry=retry, retry_after=retry_after)
        self.exit_code = exit_code
        self.log = log


class LoadFailed(_WorkerEvidence):
    """The model could not be loaded.

    Attributes:
        exit_code: The worker's exit code (negative: the signal that ended it), None if it lives.
        log: The worker's last log lines. They may name paths: show them to operators, not to strangers.
    """

    fault = "model"


class DownloadFailed(PoolError):
    """A model could not be downloaded. What was fetched stays for a repeat, unless it was wrong."""

    fault = "model"


class WorkerDied(_WorkerEvidence):
    """The worker ended while it held the request. Attributes as :class:`LoadFailed`."""

    fault = "worker"


class WorkerFailed(PoolError):
    """The worker lives, but could not serve this request."""

    fault = "worker"


class PoolClosed(PoolError):
    """The pool is closing or closed."""
