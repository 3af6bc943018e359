"""evaluate.py as a user calls it, and a run from Python."""
import re
import sys

from data import load_dataset
from evaluate import distances, embed_tracklets
from scripts import TINY_LSMRL, fails, here, results_of, succeeds, tensors_of
from search import embed_images, see_images
from support.weights import load_run
from walkers import make_walkers

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module")
def elsewhere(walkers, tmp_path_factory):
    """Three of the test people in folders of one's own: another dataset, to be tested on alone."""
    folder = tmp_path_factory.mktemp("data") / "elsewhere"
    for person in sorted((walkers / "Test").iterdir())[:3]:
        for split, modality in ("query", "ir"), ("gallery", "rgb"):
            (folder / split / person.name).mkdir(parents=True)
            (folder / split / person.name / modality).symlink_to(person / modality)
    return folder


def evaluated(run_folder, out, *words):
    """-> results.json, what was printed."""
    result = here("evaluate.py", "--checkpoint", run_folder, "--out", out, *words)
    return results_of(out), succeeds(result).stdout


@pytest.mark.parametrize("method", ["dinogrl", "lsmrl"])
def test_it_finds_what_train_py_found(method, run_of, tmp_path):
    folder = run_of(method)
    found, printed = evaluated(folder / "last.pt", tmp_path, "--workers", 1)
    expected = results_of(folder)
    for name in "method", "dataset", "directions", "streams", "silhouette_iou":
        assert found[name] == expected[name]
    for direction, scores in found["directions"].items():
        assert direction in printed and f"{100 * scores['mAP']:.2f}" in printed
    for picture in "sees.png", "ranking.png":
        assert (tmp_path / picture).read_bytes() == (folder / picture).read_bytes()
    assert not (tmp_path / "log.jsonl").exists()    # --out may be the run's own folder


def test_on_another_dataset_it_says_where_the_run_was_trained(run_of, elsewhere, tmp_path):
    found, printed = evaluated(run_of("lsmrl"), tmp_path, "--data", elsewhere, "--workers", 0)
    assert "trained on walkers, tested on elsewhere" in printed
    assert found["trained_on"] == "walkers" and found["dataset"] == "elsewhere"
    scores = found["directions"]["infrared->visible"]
    assert 0 < scores["queries"] <= scores["gallery"] < 20 and "rank-20" not in scores
    assert found["silhouette_iou"] is None


def test_other_walkers_do_not_show_the_people_of_the_training(run_of, tmp_path):
    """Two, where the run knows the sentences of four."""
    make_walkers(tmp_path / "two", train_identities=2, test_identities=2, tracklets=2, cameras=2,
                 height=32)
    evaluated(run_of("lsmrl"), tmp_path / "out", "--data", tmp_path / "two", "--workers", 0)
    assert (tmp_path / "out" / "sees.png").exists()


def test_more_frames_and_re_ranking_change_the_scores(run_of, elsewhere, tmp_path):
    words = ["--data", elsewhere, "--workers", 0]
    ranked, printed = evaluated(run_of("lsmrl"), tmp_path, *words, "--rerank")
    assert ranked["rerank"] is True
    tables = [printed]
    for more in [], ["--test-frames", 12]:
        result = here("evaluate.py", "--checkpoint", run_of("lsmrl"), *words, *more)
        tables.append(succeeds(result).stdout)
    rows = {re.search("infrared->visible.*", table)[0] for table in tables}
    assert len(rows) == 3


def test_without_out_nothing_is_written(run_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = succeeds(here("evaluate.py", "--checkpoint", run_of("lsmrl")))
    assert "infrared->visible" in result.stdout
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------- from Python ----

def test_paths_images_and_arrays_are_embedded_as_in_the_evaluation(run_of, walkers):
    model, config, checkpoint = load_run(run_of("lsmrl"))
    assert checkpoint["classes"] == [1, 2, 3, 4] and not model.training
    tracklets = [t for t in load_dataset(walkers).test if t.modality == "visible"][:3]
    wanted = embed_tracklets(model, tracklets, config)
    paths = [list(t.frames) for t in tracklets]
    images = [[Image.open(path) for path in one] for one in paths]
    arrays = [[np.asarray(image) for image in one] for one in images]
    for given in paths, images, arrays:
        assert torch.equal(embed_images(model, config, given, "visible"), wanted)
    assert distances(wanted, wanted).diagonal().abs().max() < 1e-3


def test_silhouettes_are_seen_from_python(run_of, walkers):
    model, config, _ = load_run(run_of("dinogrl"))
    frames = load_dataset(walkers).test[0].frames
    codes = see_images(model, config, frames[:2])
    assert codes.silhouette.shape == (2, 16, 8)
    assert 0 <= codes.silhouette.min() < codes.silhouette.max() <= 1
    gray = np.asarray(Image.open(frames[1]))    # infrared: (H, W)
    assert gray.ndim == 2
    seen = see_images(model, config, [frames[0], gray])
    assert torch.equal(seen.silhouette, codes.silhouette)


# ---------------------------------------------------------- your own code ----

TRACED = """
from pathlib import Path
import data
from lsmrl import LSMRL

Path(__file__).with_suffix(".ran").touch()

class Mine(LSMRL):
    def pool(self, tokens):
        return tokens.amax(1)

def read(path):
    return data.load_dataset(path)
"""


def test_your_own_code_is_run_only_where_the_command_line_names_it(walkers, tmp_path, monkeypatch):
    mine, folder = tmp_path / "traced.py", tmp_path / "run"
    mine.write_text(TRACED)
    own = ["--method", f"{mine}:Mine", "--reader", f"{mine}:read"]
    words = ["--data", walkers, "--run", folder, *TINY_LSMRL, *own]
    succeeds(here("train.py", *words))
    trace = tmp_path / "traced.ran"
    trace.unlink()
    monkeypatch.delitem(sys.modules, "traced")    # or it would not run again
    checked = ["evaluate.py", "--checkpoint", folder]
    fails(here(*checked), "traced.py:Mine", "--method")
    fails(here(*checked, "--method", "lsmrl"), "traced.py:Mine")
    fails(here("train.py", "--resume", folder, "--epochs", 2), "traced.py:Mine", "--method")
    assert not trace.exists()
    fails(here(*checked, *own[:2]), "traced.py:read", "--reader")
    found, _ = evaluated(folder, tmp_path / "out", *own)
    assert trace.exists() and found["directions"] == results_of(folder)["directions"]
    assert found["method"] == f"{mine}:Mine"


@pytest.mark.parametrize("method, steps", [
    ("dinogrl", {"DINOv2-tokens", "silhouette", "denoising-code", "gait-maps", "gait-refined"}),
    ("lsmrl", {"shifted", "looks-at"})])
def test_a_tour_draws_each_step(method, steps, run_of, walkers, tmp_path):
    succeeds(here("evaluate.py", "--checkpoint", run_of(method), "--data", walkers, "--tour",
                  tmp_path))
    drawn = {path.stem for path in tmp_path.iterdir()}
    assert drawn >= steps | {"frames", "augmented", "distances", "ranking"}
    with Image.open(tmp_path / "walker.gif") as moving:
        assert moving.n_frames == 12


# --------------------------------------------------------------- refused ----

def test_what_is_not_a_run_of_this_version_is_one_line(run_of, walkers, tmp_path):
    old = tensors_of(run_of("lsmrl"))
    old["config"] |= old.pop("options")    # one dict of both
    torch.save(old, tmp_path / "old.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "torn.pt").write_bytes((run_of("lsmrl") / "last.pt").read_bytes()[:10000])
    for name, words in ("old.pt", ["train again"]), ("text.pt", []), ("torn.pt", []):
        fails(here("evaluate.py", "--checkpoint", tmp_path / name), name, *words)
    fails(here("evaluate.py", "--checkpoint", tmp_path / "nothing"), "nothing")
    fails(here("evaluate.py"), "--checkpoint")


def test_a_dataset_without_a_test_set_is_refused(run_of, walkers, tmp_path):
    (tmp_path / "train").symlink_to(walkers / "Train")
    fails(here("evaluate.py", "--checkpoint", run_of("lsmrl"), "--data", tmp_path), "test")


def test_embeddings_that_are_not_finite_are_one_line(run_of, tmp_path):
    checkpoint = tensors_of(run_of("lsmrl"))
    checkpoint["model"]["clip.visual.proj"].fill_(float("nan"))
    torch.save(checkpoint, tmp_path / "last.pt")
    fails(here("evaluate.py", "--checkpoint", tmp_path), "NaN")
