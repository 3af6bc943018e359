"""Tests run from the repository's root: `python -m pytest`."""
import ctypes
import gc
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

# Behind the path that finds them; support before torch, which reads at its import what it sets.
import support  # noqa: E402, F401
from golden import write_official  # noqa: E402
from walkers import make_walkers  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def leave_little(tmp_path_factory):
    """What fixtures share is removed when all is done; pytest keeps what a test wrote that
    failed."""
    yield
    for entry in tmp_path_factory.getbasetemp().iterdir():
        if entry.is_symlink():    # pytest's own, to a folder that goes
            entry.unlink()
        elif entry.is_dir() and not entry.name.startswith("test_"):
            shutil.rmtree(entry)


def pytest_collection_finish():
    """What is imported by now stays: looking for garbage there takes a second by the end."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def give_memory_back():
    """Networks of the paper's size leave gigabytes to glibc (keep_memory in support/options.py),
    and a process that holds them takes long to fork."""
    yield
    with suppress(OSError, AttributeError):    # another C library
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def official_files(tmp_path_factory):
    """The authors' three files, formula-filled with seed 60. Half a gigabyte: made once, to be read
    only, and removed."""
    folder = tmp_path_factory.mktemp("official")
    write_official(folder)
    return folder


@pytest.fixture(scope="session")
def walkers(tmp_path_factory):
    """A folder of walkers: 4 training and 5 test identities, galleries of 20. Read only."""
    folder = tmp_path_factory.mktemp("walkers") / "walkers"
    make_walkers(folder, train_identities=4, test_identities=5, frames=12, height=64)
    return folder
