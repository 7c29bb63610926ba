"""Half an hour of disorder, on demand: ``pytest -m soak -s``, with ``--soak-minutes``, ``--soak-seed`` and
``--soak-transport``.
"""

import asyncio
import time
from pathlib import Path

import pytest

from soak import Soak


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_nothing_is_lost_left_or_broken_in_a_long_disorder(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    options = pytestconfig.option
    minutes, seed = float(options.soak_minutes), int(options.soak_seed)
    soak = Soak(tmp_path, seed, str(options.soak_transport))
    began = time.monotonic()
    asyncio.run(soak.run(minutes * 60))
    print(f"\nseed {seed}; {soak.report(time.monotonic() - began)}")
    assert soak.wrong == []
    assert soak.outcomes["answered"] > 0
