"""What all tests share, made once a session and to be read only: walkers, a tiny run of each
method, the authors' files."""
import functools
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

# support before torch, which reads at its import what it sets.
import support  # noqa: E402, F401
from golden import write_official  # noqa: E402
from scripts import TINY, TINY_LSMRL, here, succeeds  # noqa: E402
from walkers import make_walkers  # noqa: E402


@pytest.fixture(scope="session")
def walkers(tmp_path_factory):
    """A folder of walkers: 4 people to train on, 5 to test on, galleries of 20 tracklets."""
    folder = tmp_path_factory.mktemp("walkers") / "walkers"
    make_walkers(folder, train_identities=4, test_identities=5, frames=12, height=64)
    return folder


@pytest.fixture(scope="session")
def run_of(walkers, tmp_path_factory):
    """A function: dinogrl or lsmrl -> the folder of its tiny run of one epoch."""
    @functools.cache
    def trained(method):
        folder = tmp_path_factory.mktemp(method) / "run"
        options = {"dinogrl": TINY, "lsmrl": TINY_LSMRL}[method]
        succeeds(here("train.py", "--data", walkers, "--run", folder, *options))
        return folder
    return trained


@pytest.fixture(scope="session")
def official_files(tmp_path_factory):
    """The authors' three files, formula-filled with seed 60. Half a gigabyte: removed at the
    end."""
    folder = tmp_path_factory.mktemp("official")
    write_official(folder)
    yield folder
    shutil.rmtree(folder)
