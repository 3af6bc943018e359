"""evaluate.py in one's own footage, re-ranking, all frames: written from the description of what
users meet, not from the code.

The model is a tiny LSMRL run: what it finds means nothing, but equal frames are at distance 0
whatever the model.
"""
import json
import os
import re
import shutil

from data import Tracklet, load_dataset
from evaluate import clips
from layouts import picture
from scripts import OWNED, TINY, TINY_LSMRL, Evil, fails, here, succeeds, tensors_of
from support.footage import find_footage
from support.ranking import distances, rerank
from test_metrics import metrics

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.mark.parametrize("n, T", [(12, 6), (13, 6), (100, 6), (3, 6), (1, 2), (7, 3), (7, 1),
                                  (2, 2), (17, 16)])
def test_clips_hold_every_frame(n, T):
    tracklet = Tracklet(tuple(f"{i}.jpg" for i in range(n)), 7, "D3", "infrared")
    found = clips(tracklet, T)
    size = -(-n // T)
    assert len(found) == size
    for clip in found:
        assert (clip.pid, clip.camera, clip.modality) == (7, "D3", "infrared")
        assert len(clip.frames) == T
    numbers = [[int(frame.removesuffix(".jpg")) for frame in clip.frames] for clip in found]
    assert {i for clip in numbers for i in clip} == set(range(n))
    assert numbers == [[min(k * size + j, n - 1) for k in range(T)] for j in range(size)]


# ------------------------------------------------------------------ search ----

def write(folder, modality, *pids):
    """One frame each."""
    folder.mkdir(parents=True)
    for i, pid in enumerate(pids, start=1):
        (folder / f"{i}.jpg").write_bytes(picture(pid, modality, 1, i, (32, 16)))


def write_gif(path, *levels):
    first, *rest = [Image.new("L", (8, 16), level) for level in levels]
    first.save(path, save_all=True, append_images=rest)


def is_drawn(path):
    return np.ptp(np.asarray(Image.open(path))) > 0


@pytest.fixture(scope="module")
def trained(walkers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lsmrl"
    succeeds(here("train.py", "--data", walkers, "--run", folder, *TINY_LSMRL))
    return folder


@pytest.fixture(scope="module")
def ask(trained):
    """evaluate.py on the tiny run -> what it leaves."""
    def call(*given, checkpoint=trained):
        return here("evaluate.py", "--checkpoint", checkpoint, "--workers", 0, *given)
    return call


@pytest.fixture(scope="module")
def answers(ask):
    """evaluate.py on the tiny run, with --json -> what it prints, and the JSON."""
    def call(file, *given, **how):
        result = succeeds(ask(*given, "--json", file, **how))
        return result.stdout, json.loads(file.read_text())
    return call


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """A gallery of 12, one of them a GIF, two queries, a copy of cam2/3's frames and somebody by
    night, and a broken tracklet."""
    root = tmp_path_factory.mktemp("footage")
    names = ["cam1/1", "cam1/2", "cam2/3", *(f"cam10/{i} b" for i in range(8))]
    for pid, name in enumerate(names, start=1):
        write(root / "gallery" / name, "visible", *[pid] * 6)
    write_gif(root / "gallery/cam2/walk.gif", 0, 100, 200)
    write(root / "queries/night 5", "infrared", *[50] * 6)
    shutil.copytree(root / "gallery/cam2/3", root / "queries/copy")
    shutil.copytree(root / "gallery/cam2/3", root / "broken/p")
    for frame in (root / "broken/p").iterdir():    # all of them: whichever is looked at
        frame.write_bytes(frame.read_bytes()[:300])
    return root


@pytest.fixture(scope="module")
def by_day(footage):
    """Both queries, said to be visible, and lists of three."""
    return ["--query", footage / "queries", "--query-modality", "visible", "--top", 3]


@pytest.fixture(scope="module")
def found(answers, by_day, footage, tmp_path_factory):
    """A search: the folder of f.png and g.npz, what was printed, the JSON."""
    out = tmp_path_factory.mktemp("found")
    stdout, results = answers(out / "r.json", *by_day, "--gallery", footage / "gallery",
                              "--figure", out / "f.png", "--save", out / "g.npz")
    return out, stdout, results


def test_a_search_answers_for_each_query(found, footage):
    """The copy is found first, at distance 0."""
    out, stdout, results = found
    assert results.keys() == {"method", "gallery", "queries", "seconds"}
    assert results["method"] == "lsmrl" and results["gallery"] == 12
    asked = [(q["query"], q["modality"], q["frames"]) for q in results["queries"]]
    assert asked == [("copy", "visible", 6), ("night 5", "visible", 6)]
    names = find_footage(str(footage / "gallery")).keys()
    for q in results["queries"]:
        assert q.keys() == {"query", "modality", "frames", "ranked"} and q["query"] in stdout
        distance = [hit["distance"] for hit in q["ranked"]]
        assert len(distance) == 3 and distance == sorted(distance)
        for hit in q["ranked"]:
            assert hit.keys() == {"tracklet", "modality", "distance"}
            assert hit["modality"] == "visible" and hit["tracklet"] in names
    first, second, _ = results["queries"][0]["ranked"]
    assert first["tracklet"] == "cam2/3" and first["distance"] == pytest.approx(0, abs=1e-4)
    assert second["distance"] > 1e-3
    assert is_drawn(out / "f.png")


def test_the_lists_on_screen_are_those_of_the_json(found):
    _, stdout, results = found
    shown = re.findall(r"^\s*(\d+)\s+([\d.]+)\s+(visible|infrared)\s+(.+?)\s*$", stdout, re.M)
    wanted = [(place, hit) for q in results["queries"] for place, hit in enumerate(q["ranked"], 1)]
    assert len(shown) == len(wanted) == 6
    for (place, distance, modality, name), (number, hit) in zip(shown, wanted, strict=True):
        assert int(place) == number
        assert float(distance) == pytest.approx(hit["distance"], abs=0.006)
        assert (modality, name) == (hit["modality"], hit["tracklet"])


def test_the_saved_gallery_answers_alone(found, ask, answers, by_day, footage, tmp_path):
    """--gallery DIR --save only embeds; then the frames are gone and the lists the same."""
    gallery, file = tmp_path / "gallery", tmp_path / "g.npz"
    shutil.copytree(footage / "gallery", gallery)
    succeeds(ask("--gallery", gallery, "--save", file))
    tracklets = find_footage(str(gallery))
    shutil.rmtree(gallery)
    saved, before = np.load(file), np.load(found[0] / "g.npz")
    assert saved["embedding"].shape[:2] == (12, 1) and saved["embedding"].dtype == np.float32
    assert np.allclose(saved["embedding"], before["embedding"], atol=1e-5)
    assert np.array_equal(saved["model"], before["model"])
    assert saved["name"].tolist() == list(tracklets)
    assert set(saved["modality"].tolist()) == {"visible"} and saved["shown"].shape == (12, 4)
    rows = zip(tracklets.values(), saved["frame"], saved["shown"], strict=True)
    for frames, frame, shown in rows:
        assert frame == frames[0] and set(shown) <= set(frames)
    _, again = answers(tmp_path / "r.json", *by_day, "--gallery", file)
    for q, p in zip(again["queries"], found[2]["queries"], strict=True):
        assert q["query"] == p["query"]
        for hit, same in zip(q["ranked"], p["ranked"], strict=True):
            assert hit["tracklet"] == same["tracklet"]
            assert hit["distance"] == pytest.approx(same["distance"], abs=1e-5)


def test_what_a_search_takes_for_granted(answers, footage, tmp_path):
    """A query by night, a gallery by day, lists of ten."""
    _, results = answers(tmp_path / "r.json", "--query", footage / "queries/night 5",
                         "--gallery", footage / "gallery")
    q, = results["queries"]
    assert (q["query"], q["modality"], len(q["ranked"])) == ("night 5", "infrared", 10)
    assert q["ranked"][0]["modality"] == "visible"


def test_another_model_s_gallery_is_refused(found, ask, by_day, trained, tmp_path):
    """One of one other number."""
    other = tensors_of(trained)
    other["model"]["bank"][0, 0] += 1
    torch.save(other, tmp_path / "other.pt")
    fails(ask(*by_day, "--gallery", found[0] / "g.npz", checkpoint=tmp_path / "other.pt"),
          "g.npz", "model")


def test_all_frames_sees_what_the_sample_misses(answers, tmp_path):
    """Of "odd" two frames are looked at, and those are the gallery's, unless all four are; two
    frames are one clip either way."""
    tracklets = {"q/odd": (1, 9, 2, 2), "q/two": (3, 4), "g/ab": (5, 6)}
    for name, pids in tracklets.items():
        write(tmp_path / name, "visible", *pids)
    for number, frame in (1, 1), (2, 3):
        shutil.copyfile(tmp_path / f"q/odd/{frame}.jpg", tmp_path / f"g/ab/{number}.jpg")
    given = ["--query", tmp_path / "q", "--gallery", tmp_path / "g", "--query-modality", "visible"]
    best = {}
    for switches in [], ["--all-frames"]:
        _, results = answers(tmp_path / "r.json", *given, *switches)
        assert results.get("all_frames", False) is bool(switches)
        assert [q["frames"] for q in results["queries"]] == [4, 2]
        for q in results["queries"]:
            best[q["query"], bool(switches)] = q["ranked"][0]["distance"]
    assert best["odd", False] == pytest.approx(0, abs=1e-4) and best["odd", True] > 1e-3
    assert best["two", True] == pytest.approx(best["two", False], abs=1e-5)


# A terminal would be cleared by the first, get a line of its own of the second, be rung by the
# third and turned round by the fourth.
NASTY = ["a\x1b[2J", "b\n     1      0.0000  visible   forged", "c\x07\r\x9b", "d\u202e"]


@pytest.mark.skipif(os.name == "nt", reason="this system has no such names")
def test_control_characters_in_names_reach_no_terminal(ask, tmp_path):
    """The JSON has the names as they are, in letters that any terminal may see."""
    for name in NASTY:
        write(tmp_path / "g" / name, "visible", 1, 2)
        write(tmp_path / "q" / name, "infrared", 3)
    kept, file = tmp_path / "\x1b.npz", tmp_path / "r.json"
    query = ["--query", tmp_path / "q", "--json", file]
    outputs = ["--save", kept, "--figure", tmp_path / "f\x1b.png"]
    for given in ["--gallery", tmp_path / "g", *outputs], ["--gallery", kept]:
        result = succeeds(ask(*query, *given))
        lines = result.stdout.splitlines()
        assert all(line.isprintable() for line in lines), lines
        # What was saved, what it was trained on; a title, and four places.
        assert len(lines) == ("--save" in given) + 1 + 4 * (1 + 4)
        assert len(re.findall(r"^\s+1 ", result.stdout, re.M)) == 4
        assert r"a\x1b[2J" in result.stdout and r"d\u202e" in result.stdout
        assert file.read_text().isascii() and "\x1b" not in file.read_text()
        for q in json.loads(file.read_text())["queries"]:
            assert q["query"] in NASTY
            assert sorted(hit["tracklet"] for hit in q["ranked"]) == sorted(NASTY)
    assert is_drawn(tmp_path / "f\x1b.png")
    result = ask("--query", tmp_path / "q", "--gallery", tmp_path / "no\x1b[2J\nwhere")
    fails(result, r"no\x1b[2J\nwhere")
    assert result.stderr.strip().isprintable()


# -------------------------------------------------------------- a benchmark ----

@pytest.fixture(scope="module")
def embedded(answers, walkers, tmp_path_factory):
    """The benchmark evaluated plainly, re-ranked, of all frames: {switch: (its folder, what it
    prints, the JSON, the arrays of its g.npz)}."""
    every = {}
    for switch in "", "--rerank", "--all-frames":
        out = tmp_path_factory.mktemp("embedded")
        given = ["--figure", out / "f.png", "--save", out / "g.npz", *switch.split()]
        stdout, results = answers(out / "r.json", "--data", walkers, *given)
        every[switch] = out, stdout, results, dict(np.load(out / "g.npz"))
    return every


@pytest.mark.parametrize("switch", ["", "--rerank", "--all-frames"])
def test_a_benchmark_s_results_say_how_they_were_made(switch, embedded):
    out, stdout, results, _ = embedded[switch]
    assert ("re-ranked" in stdout) == (switch == "--rerank") == results.get("rerank", False)
    assert ("all frames" in stdout) == (switch == "--all-frames")
    assert results.get("all_frames", False) == (switch == "--all-frames")
    assert is_drawn(out / "f.png")


@pytest.mark.parametrize("switch", ["", "--rerank", "--all-frames"])
def test_a_benchmark_s_results_are_those_of_its_embeddings(switch, embedded):
    """Both streams' and each one's alone."""
    _, _, results, saved = embedded[switch]
    whole, pid, camera = saved["embedding"], saved["pid"], saved["camera"]
    z, f = np.split(whole, 2, axis=2)
    streams = results["streams"]
    for found, parts in (results["directions"], whole), (streams["z"], z), (streams["f"], f):
        for direction, r in found.items():
            query, gallery = [np.flatnonzero(saved["modality"] == m) for m in direction.split("->")]
            features = torch.from_numpy(parts[np.concatenate([query, gallery])])
            everyone = distances(features, features)
            distance = rerank(everyone, 20) if switch == "--rerank" else everyone[:20, 20:]
            expected = metrics(distance, pid[query], pid[gallery], camera[query], camera[gallery])
            # Two that are equally far, to rounding, may change places.
            assert r == pytest.approx(expected, abs=2e-3)


def test_the_switches_change_the_results(embedded):
    plain, reranked, every = [results["directions"] for _, _, results, _ in embedded.values()]
    assert plain != reranked and plain != every


@pytest.mark.parametrize("switch", ["", "--all-frames"])
def test_a_benchmark_s_embeddings_are_a_gallery(switch, embedded, answers, walkers, tmp_path):
    out, _, _, saved = embedded[switch]
    wanted = next(t for t in load_dataset(walkers).test[3:] if t.modality == "visible")
    (tmp_path / "q").mkdir()
    for i, frame in enumerate(wanted.frames):
        shutil.copyfile(frame, tmp_path / f"q/{i}.jpg")
    _, found = answers(tmp_path / "r.json", "--query", tmp_path / "q", "--gallery", out / "g.npz",
                       "--query-modality", "visible", *switch.split())
    assert found["gallery"] == 40 == len(set(saved["name"].tolist()))
    assert saved["shown"].shape == (40, 4)
    best = found["queries"][0]["ranked"][0]
    place = saved["frame"].tolist().index(wanted.frames[0])
    assert (best["tracklet"], best["modality"]) == (saved["name"][place], "visible")
    assert best["distance"] < 5e-3    # among so many 0 is rounded


def test_silhouettes_and_figures_of_dinogrl(answers, footage, walkers, tmp_path):
    untrained = [*TINY, "--epochs", 0, "--frames", 1]
    succeeds(here("train.py", "--data", walkers, "--run", tmp_path / "run", *untrained))
    own = ["--query", footage / "queries", "--gallery", footage / "gallery"]
    for given in own, ["--data", walkers]:
        pictures = [tmp_path / f"{given[0]}{name}.png" for name in ("silhouettes", "figure")]
        answers(tmp_path / "r.json", *given, "--silhouettes", pictures[0], "--figure", pictures[1],
                checkpoint=tmp_path / "run")
        assert is_drawn(pictures[0]) and is_drawn(pictures[1])


# ----------------------------------------------------------------- refused ----

SEARCH = "--query {q} --gallery {g} "


@pytest.mark.parametrize("given, word", [
    (SEARCH + "--json {q}/1.jpg", ".json"),
    (SEARCH + "--figure {tmp}/a.png --silhouettes {tmp}/./a.png", "two names"),
    (SEARCH + "--json=", "--json is empty"),
    ("--query {q} --gallery {npz} --all-frames", "all frames, 2 at a time"),
    ("--query {q}", "--gallery"),
    ("--gallery {g}", "--save"),
    ("--gallery {npz}", "--save"),
    (SEARCH + "--data {data}", "--data"),
    ("--gallery {g} --save {tmp}/e.npz --data {data}", "--data"),
    ("--query {q} --data {data}", "--data"),
    (SEARCH + "--rerank", "--rerank"),
    (SEARCH + "--top 0", "--top"),
    (SEARCH + "--top -3", "--top"),
    ("--query {q} --gallery {npz} --gallery-modality visible", "--gallery-modality"),
    (SEARCH + "--save {tmp}/none/e.npz", "none"),
    ("--gallery {g} --save {tmp}/none/e.npz", "none"),
    (SEARCH + "--json {tmp}/none/r.json", "none"),
    (SEARCH + "--figure {tmp}/none/f.png", "none"),
    (SEARCH + "--silhouettes {tmp}/s.png", "--silhouettes"),
    (SEARCH + "--query-modality thermal", "thermal"),
    (SEARCH + "--gallery-modality thermal", "thermal"),
    ("--query {tmp}/nowhere --gallery {g}", "nowhere"),
    ("--query {q} --gallery {tmp}/nowhere", "nowhere"),
    ("--query {q} --gallery {tmp}/nil.npz", "nil.npz"),
    ("--query {broken} --gallery {g}", "broken"),
    ("--query {q} --gallery {broken}", "broken")])
def test_refused_options(given, word, found, ask, footage, walkers, tmp_path):
    files = {"q": footage / "queries", "g": footage / "gallery", "broken": footage / "broken",
             "npz": found[0] / "g.npz", "data": walkers, "tmp": tmp_path}
    result = ask(*given.format(**files).split())
    fails(result, word)
    assert not list(tmp_path.iterdir())
    if word == "broken":
        assert re.search(r"broken/p/\d\.jpg", result.stderr)


@pytest.mark.parametrize("what", ["notes", "half", "evil", "no model"])
def test_refused_gallery_files(what, found, ask, footage, tmp_path):
    """Each by its name, and what is pickled in one is not run. (What else may be wrong in one:
    test_footage.py.)"""
    good, path = found[0] / "g.npz", tmp_path / f"{what}.npz"
    arrays, content = dict(np.load(good)), good.read_bytes()
    if what == "notes":
        path.write_text("these are notes\n")
    elif what == "half":
        path.write_bytes(content[:len(content) // 2])
    elif what == "evil":
        np.savez(path, **{**arrays, "name": np.array([Evil()] * 12, object)})
    else:
        np.savez(path, **{name: array for name, array in arrays.items() if name != "model"})
    fails(ask("--query", footage / "queries", "--gallery", path), path.name)
    assert not os.path.exists(OWNED)
