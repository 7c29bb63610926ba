"""What each worker has of its own in the manager is kept small: hundreds of them are cold when they speak."""

from llamaherd.pool.generation import Generation
from llamaherd.pool.worker import Worker
from llamaherd.transport.pipes import RecordFraming
from llamaherd.transport.queued import Inbox
from llamaherd.transport.streams import StreamChannel


def test_what_a_worker_is_made_of_has_slots_and_no_dictionary() -> None:
    for kind in (Worker, StreamChannel, Inbox, RecordFraming, Generation):
        assert all("__dict__" not in vars(base) for base in kind.__mro__), kind
