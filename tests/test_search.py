"""search.py: the nearest, ranked lists as a user gets them.

What a tiny run finds means nothing, but equal frames are at distance 0 whatever the model.
"""
import re
import shutil

from layouts import picture
from scripts import fails, here, run, succeeds

import numpy as np
import pytest
from PIL import Image


def write(folder, modality, person, frames=6):
    folder.mkdir(parents=True)
    for i in range(frames):
        (folder / f"{i}.jpg").write_bytes(picture(person, modality, 1, i, (32, 16)))


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """A gallery of 12 by day; as queries a copy of one, and somebody by night."""
    root = tmp_path_factory.mktemp("footage")
    for person in range(12):
        write(root / f"gallery/cam{person % 2}/{person}", "visible", person)
    shutil.copytree(root / "gallery/cam1/3", root / "queries/copy")
    write(root / "queries/night", "infrared", 50, frames=1)
    return root


@pytest.fixture(scope="module")
def call(run_of):
    """The words of a search with a tiny run."""
    return ["search.py", "--checkpoint", run_of("lsmrl"), "--workers", 0]


@pytest.fixture(scope="module")
def found(call, footage):
    """What a search prints. It leaves f.png beside the footage."""
    result = succeeds(run(*call, "--query", footage / "queries", "--gallery", footage / "gallery",
                          "--query-modality", "visible", "--top", 3,
                          "--figure", footage / "f.png"))
    return result.stdout


def lists(printed):
    """-> {(query, modality, frames, tracklets searched): its lines (place, distance, name)}."""
    found = {}
    for line in printed.splitlines():
        if asked := re.fullmatch(r"(.+) \((\w+), (\d+) frames\), the nearest of (\d+):", line):
            found[asked.groups()] = rows = []
        elif re.match(r" +\d+ ", line):
            place, distance, name = line.split()
            rows.append((int(place), float(distance), name))
    return found


def test_a_search_ranks_the_gallery_for_each_query(found, footage):
    ranked = lists(found)
    assert list(ranked) == [("copy", "visible", "6", "12"), ("night", "visible", "1", "12")]
    for rows in ranked.values():
        places, distances, _ = zip(*rows, strict=True)
        assert places == (1, 2, 3) and list(distances) == sorted(distances)
    (_, nearest, name), (_, second, _), _ = ranked["copy", "visible", "6", "12"]
    assert name == "cam1/3" and nearest < 1e-3 < second
    assert "walkers" in found    # the model knows no real people
    line = np.asarray(Image.open(footage / "f.png"))[30 + 56]    # through the first list
    assert (line == (150, 150, 150)).all(-1).sum() == 3 * 2 * 4    # grey edges of three


@pytest.mark.parametrize("given", [[], ["--query", "DIR"], ["--gallery", "DIR"]])
def test_a_search_without_its_folders_is_refused(given):
    fails(here("search.py", *given), "--gallery", "--query", "--help")
