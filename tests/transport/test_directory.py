"""The directory of a pool's socket is private, goes with its pool, and is cleared away when its pool was killed."""

import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from llamaherd.transport.directory import PrivateDirectory

MAKE_ONE_AND_DIE = """
import os, signal, sys
from llamaherd.transport.directory import PrivateDirectory
print(PrivateDirectory(sys.argv[1]).path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_only_its_user_may_enter_it(tmp_path: Path) -> None:
    directory = PrivateDirectory(str(tmp_path))
    assert stat.S_IMODE(os.stat(directory.path).st_mode) == 0o700
    directory.remove()
    directory.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_pool_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", MAKE_ONE_AND_DIE, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    left = Path(done.stdout.strip())
    assert left.is_dir()
    living = PrivateDirectory(str(tmp_path))
    assert not left.exists()
    other = PrivateDirectory(str(tmp_path))
    assert os.path.isdir(living.path)
    living.remove()
    other.remove()


def test_directories_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "llamaherd-notes"
    foreign.mkdir()
    (tmp_path / "llamaherd-file").write_text("mine")
    PrivateDirectory(str(tmp_path)).remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llamaherd-file", "llamaherd-notes"]


@pytest.mark.parametrize(("module", "step"), [(fcntl, "flock"), (os, "rename")])
def test_a_pool_that_opens_while_another_is_opening_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, step: str
) -> None:
    others: list[PrivateDirectory] = []
    real: Callable[..., None] = getattr(module, step)

    def after_another_opened(*arguments: object) -> None:
        monkeypatch.undo()
        others.append(PrivateDirectory(str(tmp_path)))
        real(*arguments)

    monkeypatch.setattr(module, step, after_another_opened)
    directory = PrivateDirectory(str(tmp_path))
    others.append(PrivateDirectory(str(tmp_path)))
    assert len(others) == 2
    for each in (directory, *others):
        assert os.path.isdir(each.path)
        each.remove()
    assert list(tmp_path.iterdir()) == []
