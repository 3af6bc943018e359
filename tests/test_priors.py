"""The two small priors: what the shipped ones know of strangers, and how they are made."""
import math
from pathlib import Path

import distil
from distil import levels, unexplained
from model import DinoGRL
from support import dinov2, priors
from support.clip import load_clip, tokenized
from support.dinov2 import RANDOM, TINY, load_dinov2
from support.files import UserError
from support.pedestrian import describe
from support.priors import contrastive_loss, image_features, text_features
from walkers import make_walker, sample

import pytest
import torch


@torch.no_grad()
def test_the_shipped_dinov2_explains_what_its_teacher_says_of_strangers():
    """Four frames of the demo's test people, and the teacher's tokens of every fourth patch. maps:
    the linear maps from the student's tokens, fitted to 160 other frames."""
    held = torch.load(Path(__file__).parent / "tiny_dinov2_targets.pt", weights_only=True)

    def explained(name):
        tokens = levels(load_dinov2(name), held["frames"] / 255, DinoGRL.small["dino_size"])
        tokens = tokens[:, :, ::4]
        tokens = torch.cat([tokens, torch.ones(*tokens.shape[:3], 1)], dim=3)
        said = tokens @ held["maps"].float()[:, None]
        return 1 - unexplained(said, held["targets"], held["variance"])

    assert explained(TINY).mean() > 0.75 and explained(TINY).min() > 0.69
    assert explained(RANDOM).max() < 0.2


@torch.no_grad()
def test_the_shipped_clip_finds_the_sentences_of_strangers():
    """Each time the right one of 8: a guess is right once in 8."""
    frames, _, _ = sample(people=32, T=1)
    sentences = [describe(make_walker(0, pid)) for pid in range(1, 33)]

    def found(name):
        model = load_clip(name)
        text = text_features(model, *tokenized(sentences)).view(4, 8, -1)
        image = image_features(model, frames[:, 0] / 255).view(2, 4, 8, -1)
        nearest = (image @ text.mT).argmax(3)
        return (nearest == torch.arange(8)).float().mean((1, 2))

    assert found("tiny").min() > 0.75
    assert found("tiny-random").max() < 0.3


def test_the_contrastive_loss_by_hand():
    a, b = torch.eye(3), torch.eye(3)[[0, 1, 0]]    # the third finds the first one's
    two = math.log(math.e ** 2 + 2)
    rows = math.log(2 * math.e ** 2 + 1) - 2 + two - 2 + math.log(3)
    columns = two - 2 + two - 2 + two
    assert contrastive_loss(a, b, 2.0).item() == pytest.approx((rows + columns) / 6)


@pytest.fixture
def make(walkers, tmp_path, monkeypatch):
    """A function: a script, the words of its command line -> the file that it leaves. A random ViT
    is the teacher: its tokens can be imitated too. Everything is small."""
    monkeypatch.setattr(distil, "COMPONENTS", 16)
    monkeypatch.setattr(distil, "load_dinov2", lambda *_: load_dinov2(RANDOM))

    def run(script, *words):
        out = tmp_path / "tiny.pt"
        monkeypatch.setattr("sys.argv", ["script", "--out", str(out), *map(str, words)])
        script.main()
        return out
    return run


def test_distilling_explains_more_and_leaves_a_file_that_loads(
        make, walkers, monkeypatch, capsys):
    files = []
    for steps in (1, 1, 25):
        out = make(distil, "--data", walkers / "Train", "--frames", 32, "--steps", steps,
                   "--dino-size", 56, 28)
        files.append(out.read_bytes())
    assert files[0] == files[1] != files[2]    # the seed's, and nobody else's
    said = capsys.readouterr().out.splitlines()
    _, before, after = (sum(map(float, line.split(": ")[-1].split())) for line in said)
    assert after > before + 0.2
    monkeypatch.setattr(dinov2, "TINY_FILE", str(out))
    assert load_dinov2(TINY).pos_embed.isfinite().all()


def test_contrasting_finds_more_and_leaves_a_file_that_loads(make, walkers):
    people, words, end = priors.load_people(walkers)
    assert people.shape == (4, 2, priors.EACH, 3, 128, 64)
    losses, files = [], []
    for steps in (1, 1, 75):
        out = make(priors, "--data", walkers, "--steps", steps)
        files.append(out.read_bytes())
        model = load_clip("tiny", str(out))
        images = image_features(model, people[1:, 0].flatten(0, 1) / 255).view(3, priors.EACH, -1)
        text = text_features(model, words[1:], end[1:])
        losses.append(contrastive_loss(images.mean(1), text, 10.0).item())
    assert files[0] == files[1]
    assert losses[2] < losses[0] - 0.3


def test_too_few_frames_and_folders_without_sentences_are_refused(make, walkers):
    with pytest.raises(UserError, match="expected 105000"):
        make(distil, "--data", walkers / "Train", "--frames", 100_000)
    with pytest.raises(UserError, match="sentences.json"):
        priors.load_people(walkers / "Train")
