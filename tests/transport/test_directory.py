"""The directory of a pool's socket is private, goes with its pool, and is cleared away when its pool was killed."""

import os
import stat
import subprocess
import sys
from pathlib import Path

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
