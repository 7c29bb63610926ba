"""The calls of a pool that look into a loaded model, or set what a load leaves open: its slots and its adapters."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from msgspec.structs import replace

from llamaherd.pool.adapters import AdapterStatus, check_lora, describe, scales_of
from llamaherd.pool.calls import Calls
from llamaherd.pool.entry import Answer, Entry, Replica, Request
from llamaherd.pool.errands import in_thread
from llamaherd.pool.errors import BadRequest, ModelNotLoaded, WorkerFailed
from llamaherd.pool.lifecycle import State
from llamaherd.pool.params import check_command
from llamaherd.transport.messages import Result, SlotFile, Slots, SlotState
from llamaherd.transport.messages import Sequence as SlotCommand

__all__ = ["SlotCalls"]


class SlotCalls(Calls):
    """Slots, which go past the line of those who wait, and the scales of LoRA adapters."""

    async def slots(self, model: str) -> list[SlotState]:
        """Return what runs where in a model's workers. Wakes and loads nothing, and is not held up by what waits.

        With several replicas their slots follow each other: the second one's begin at ``n_parallel``.

        Raises:
            ModelNotLoaded: it is not loaded, or asleep. ModelNotFound, PoolClosed, WorkerDied, WorkerFailed.
        """
        entry = self._entry_for(model)
        awake = [one for one in entry.replicas if one.state is State.LOADED and not one.drowsy]
        found: list[SlotState] = []
        gone = 0
        for replica in awake:
            try:
                result = await self._look(replica, Slots(request=self._herd.next_number()))
            except WorkerFailed as error:
                if error.code != "unloaded":
                    raise
                gone += 1  # it was stopped meanwhile
                continue
            first = replica.index * replica.spec.options.n_parallel
            found += [replace(slot, id=first + slot.id) for slot in result.slots or ()]
        if gone == len(awake):
            raise ModelNotLoaded(f"model {entry.name!r} is not loaded", code="model_not_loaded")
        return found

    async def save_slot(self, model: str, slot: int, name: str) -> SlotFile:
        """Save what a slot's last request has left in the cache, once the slot is idle.

        Args:
            model: A model's name or alias.
            slot: The slot's number, as the last piece of an answer tells it.
            name: Of the file in the model's ``slot_save_path``: printable, no path. A file of that name is replaced.

        Raises:
            BadRequest: the slot is empty or does not exist, the name cannot be a file's, saving is not set up
                (``not_supported``), or the file cannot be written.
            ModelNotLoaded: there is nothing to save. ModelNotFound, PoolClosed, WorkerDied, WorkerFailed.
        """
        return await self._slot(self._entry_for(model), "save", slot, name)

    async def restore_slot(self, model: str, slot: int, name: str) -> SlotFile:
        """Put what was saved back into the cache, as what a slot's last request has left; the model is loaded if it
        must be. Prompts that begin alike then find it, in whatever slot they run.

        Raises:
            BadRequest: as :meth:`save_slot`; and there is no such file, it is damaged, was saved by another model or
                with other settings, or does not fit. The slot is empty then.
            LoadFailed: as :meth:`load`.
        """
        entry = self._entry_for(model)
        self._check_slot(entry, slot)
        await self._ask(entry, self._herd.next_number(), None)
        return await self._slot(entry, "restore", slot, name)

    async def erase_slot(self, model: str, slot: int) -> SlotFile:
        """Forget what a slot's last request has left in the cache. Raises as :meth:`save_slot`."""
        return await self._slot(self._entry_for(model), "erase", slot, "")

    @staticmethod
    def _check_slot(entry: Entry, slot: int) -> None:
        most = entry.spec.options.n_parallel * len(entry.replicas)
        if type(slot) is not int or not 0 <= slot < most:
            raise BadRequest(f"slot must be an integer from 0 to {most - 1}", code="invalid_slot")

    async def _slot(self, entry: Entry, action: Literal["save", "restore", "erase"], slot: int, name: str) -> SlotFile:
        self._check_slot(entry, slot)
        index, inner = divmod(slot, entry.spec.options.n_parallel)
        number = self._herd.next_number()
        command = check_command(SlotCommand(request=number, action=action, slot=inner, name=name))
        result = await self._look(entry.replicas[index], command)
        return replace(result.file or SlotFile(slot=slot, name=name), slot=slot)

    async def _look(self, replica: Replica, command: Slots | SlotCommand) -> Result:
        future: asyncio.Future[Result | None] = asyncio.get_running_loop().create_future()
        self._herd.look(Request(command.request, replica.entry, command, Answer(future)), replica)
        try:
            return await future or Result(request=command.request)
        finally:
            self._herd.leave(command.request)

    async def adapters(self, model: str) -> list[AdapterStatus]:
        """Return a model's LoRA adapters. Loads nothing. Raises ModelNotFound."""
        entry = self._entry(model)
        adapters = entry.spec.options.adapters
        scales = entry.scales if entry.scales is not None else tuple(adapter.scale for adapter in adapters)
        return await in_thread(describe, [adapter.path for adapter in adapters], scales)

    def set_adapters(self, model: str, lora: Sequence[Mapping[str, Any]]) -> None:
        """Choose how a model's LoRA adapters are applied where a request does not say.

        The choice holds for what a worker is given from now on, and outlives sleep, unloading and crashes. It loads
        nothing.

        Args:
            model: A model's name or alias.
            lora: Objects with ``id`` and ``scale``; adapters that are not named are off.

        Raises:
            BadRequest: there is no such adapter. ModelNotFound, PoolClosed.
        """
        entry = self._entry_for(model)
        self._herd.scale(entry, scales_of(check_lora(lora), len(entry.spec.options.adapters)))
