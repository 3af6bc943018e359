"""From Python: the README's lines from another folder, images in place of files, and one importable
name that leaves everybody's `data` and `train` alone."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

from data import Tracklet
from evaluate import embed_images, embed_tracklets, load_run
from lsmrl import LSMRL
from model import DinoGRL
from scripts import ROOT, TINY, TINY_LSMRL, fails, here
from support.export import export
from support.files import UserError
from support.footage import is_mask

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module")
def run(walkers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere") / "runs" / "dinogrl-walkers-1"
    result = here("train.py", "--data", walkers, "--run", folder, *TINY)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def frames(walkers):
    """Paths of three people's frames by day."""
    folders = sorted((walkers / "Test").glob("*/rgb/*"))[::4][:3]
    return [sorted(folder.glob("*.jpg")) for folder in folders]


def test_images_arrays_and_paths_are_embedded_alike(run, frames):
    model, config, name = load_run(str(run))
    assert name == "dinogrl"
    tracklets = [Tracklet(tuple(map(str, paths)), -1, "", "visible") for paths in frames]
    wanted = torch.stack(list(embed_tracklets(model, tracklets, config, torch.device("cpu"))))
    images = [[Image.open(path) for path in paths] for paths in frames]
    arrays = [[np.asarray(image) for image in one] for one in images]
    before = [image.tobytes() for one in images for image in one]
    for given in (frames, images, arrays):
        assert torch.equal(embed_images(model, config, given, "visible"), wanted)
    assert [image.tobytes() for one in images for image in one] == before
    assert not torch.equal(embed_images(model, config, frames, "infrared"), wanted)


def test_an_upright_image_is_not_turned_in_the_caller_s_hands(run):
    model, config, _ = load_run(str(run))
    lying = Image.new("RGB", (64, 32), "red")
    lying.getexif()[0x0112] = 6    # to be turned by 90 degrees
    embed_images(model, config, [[lying] * 2], "visible")
    assert lying.size == (64, 32) and lying.getexif()[0x0112] == 6


@pytest.mark.parametrize("tracklets, modality, words", [
    ([], "visible", "no tracklet"),
    ([[]], "visible", "without frames"),
    ([[np.zeros((3, 8, 4), np.uint8)]], "visible", "uint8, .3, 8, 4.; expected a PIL image"),
    ([[np.zeros((8, 4, 3), np.float32)]], "visible", "float32"),
    ([[7]], "visible", "a frame is int"),
    ([Image.new("RGB", (4, 8))], "visible", "a frame in the place of one"),
    ([np.zeros((8, 4, 3), np.uint8)], "visible", "a frame in the place of one"),
    (["nowhere.jpg"], "visible", "a frame in the place of one"),
    ([["nowhere.jpg"]], "visible", "nowhere.jpg cannot be read"),
    ([["nowhere.jpg"]], "ir", "modality 'ir'; expected visible or infrared")])
def test_what_is_no_tracklet_is_refused(tracklets, modality, words, run):
    model, config, _ = load_run(str(run))
    with pytest.raises(UserError, match=words):
        embed_images(model, config, tracklets, modality)


INSTALLED = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("vvireid", {file!r})
sys.modules["vvireid"] = importlib.util.module_from_spec(spec)    # as pip install -e does
spec.loader.exec_module(sys.modules["vvireid"])
"""
OURS_ARE_ALONE = """
import data, train
assert data.MINE and train.MINE
bare = {"model", "evaluate", "sasgl", "pbmge", "support", "walkers"} & set(sys.modules)
assert not bare, bare
assert %r not in sys.path
"""


def test_the_readme_s_lines_run_in_another_folder(run, frames, walkers):
    """Beside files of the same names as ours, which stay what they are."""
    [lines] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len([line for line in lines.splitlines() if line]) <= 9
    folder = run.parent.parent
    for i, paths in enumerate(frames):
        shutil.copytree(paths[0].parent, folder / "day" / f"person {i}")
    [night, *_] = sorted((walkers / "Test").glob("*/ir/*"))
    shutil.copytree(night, folder / "unknown")
    for name in "data.py", "train.py":
        (folder / name).write_text("MINE = True\n")
    script = folder / "mine.py"
    installed = INSTALLED.format(file=str(ROOT / "vvireid" / "__init__.py"))
    script.write_text(installed + lines + OURS_ARE_ALONE % str(ROOT))
    ended = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    ranked = re.findall(r"\d", ended.stdout.splitlines()[-1])
    assert sorted(ranked) == ["0", "1", "2"]


def test_every_file_of_ours_can_be_imported_so(tmp_path):
    installed = INSTALLED.format(file=str(ROOT / "vvireid" / "__init__.py"))
    names = [path.stem for path in ROOT.glob("*.py")]
    names += [f"support.{path.stem}" for path in (ROOT / "support").glob("[!_]*.py")]
    script = tmp_path / "all.py"
    script.write_text(installed + "".join(f"import vvireid.{name}\n" for name in names) +
                      "assert vvireid.train.Frames is vvireid.data.Frames\n"
                      "assert 'support' not in sys.modules\n")
    ended = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_masks_among_the_frames_are_noticed(walkers, tmp_path):
    mask, frame = (next(Path(walkers, where).rglob(f"*.{kind}"))
                   for where, kind in (("masks", "png"), ("Test", "jpg")))
    assert is_mask(str(mask)) and not is_mask(str(frame)) and not is_mask("nowhere.png")


def embeds_alike(network, model, T, size):
    """Any number of tracklets, of either modality or both."""
    for modality in [1], [0, 0], [1, 0, 1, 1, 0]:
        frames, modality = torch.randn(len(modality), T, 3, *size), torch.tensor(modality)
        with torch.no_grad():
            got, wanted = network(frames, modality), model.embed(frames, modality)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_dinogrl_is_exported(tmp_path):
    torch.manual_seed(3)    # of networks that are not trained, some have masks on a knife's edge
    options = DinoGRL.Options(
        dinov2="tiny-random", resnet_weights="random", width=4, dim=8, blocks=(1, 1, 1, 1),
        strips=(1, 2, 4), strides=(1, 1, 1, 1), gait_strides=(1, 1, 1, 1), dino_size=(112, 56),
        code_size=(16, 8))
    model = DinoGRL(options, 5).eval()
    export(model, 2, (64, 32), tmp_path / "embed.pt2")
    embeds_alike(torch.export.load(tmp_path / "embed.pt2").module(), model, 2, (64, 32))


class Fixed(LSMRL):
    def embed(self, frames, modality):
        return super().embed(frames, modality)[:int(modality.sum())]


class Other(DinoGRL):
    def appearance_maps(self, frames, modality):
        maps, back = super().appearance_maps(frames, modality)
        return 2 * maps, back


@pytest.mark.parametrize("method, options, words", [
    (Fixed, LSMRL.Options(clip="tiny-random", size=(32, 16), split=(4, 0, 0)),
     "cannot be exported"),
    (Other, DinoGRL.Options(resnet_weights="random", gait=False, width=4, dim=8, strips=(1, 2),
                            blocks=(1, 1, 1, 1)), "embeds otherwise")])
def test_what_would_embed_otherwise_is_not_exported(method, options, words, tmp_path):
    size = getattr(options, "size", (64, 32))
    with pytest.raises(UserError, match=words):
        export(method(options, 5).eval(), 2, size, tmp_path / "embed.pt2")
    assert not list(tmp_path.iterdir())


def test_a_run_is_exported(walkers, tmp_path):
    result = here("train.py", "--data", walkers, "--run", tmp_path / "run", *TINY_LSMRL)
    assert result.returncode == 0, result.stderr
    file = tmp_path / "embed.pt2"
    result = here("evaluate.py", "--checkpoint", tmp_path / "run", "--export", file)
    assert result.returncode == 0 and "embed.pt2: embeds 2 frames of 32 16" in result.stdout
    model, _, _ = load_run(str(tmp_path / "run"))
    embeds_alike(torch.export.load(file).module(), model, 2, (32, 16))

    # Two people, by night and by day: four frames each, where they look, whose words they read.
    sheet = tmp_path / "words.png"
    result = here("evaluate.py", "--checkpoint", tmp_path / "run", "--reading", sheet)
    assert result.returncode == 0, result.stderr
    with Image.open(sheet) as image:
        assert image.size == (110 + 4 * (4 * 64 + 16), 24 + 3 * (128 + 8) + 20)


def test_who_reads_no_sentences_says_so(run, tmp_path):
    words = ["evaluate.py", "--checkpoint", run]
    fails(here(*words, "--reading", tmp_path / "a.png"), "--reading", "dinogrl", "LSMRL")
    fails(here(*words, "--export", tmp_path / "a.pt2", "--rerank"), "--export", "nothing else")
    fails(here(*words, "--query", tmp_path, "--gallery", tmp_path, "--reading",
               tmp_path / "a.png"), "--reading", "benchmark")
