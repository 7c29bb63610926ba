"""This project as users have it: installed from a wheel, its bytecode compiled, with this interpreter's dependencies.

An editable install, which developers have, starts every process more slowly: its import finder is loaded in each, and
where bytecode may not be written (PYTHONDONTWRITEBYTECODE) each compiles our sources anew.
"""

import shutil
import subprocess
import sys
import venv
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

__all__ = ["installed"]

ROOT: Final = Path(__file__).parents[1]
#: What is built from, copied so that nothing is built in the repository.
SOURCES: Final = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "pool", "transport", "http")


@contextmanager
def installed() -> Generator[str]:
    """Make a virtual environment with the project installed in it; yield its interpreter. Needs pip, and the package
    index for the build's own requirements.
    """
    with TemporaryDirectory() as folder:
        home, source = Path(folder) / "venv", Path(folder) / "source"
        venv.create(home, symlinks=True)
        python = home / "bin" / "python"
        (packages,) = home.glob("lib/python*/site-packages")
        # Its dependencies come from here. A path file found there is not read, so what is editable here stays away.
        (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
        source.mkdir()
        for name in SOURCES:
            item = ROOT / name
            if item.is_dir():
                shutil.copytree(item, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(item, source / name)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--disable-pip-version-check", str(source)], check=True)
        yield str(python)
