"""The two priors: what is shipped, and how they are made, from a teacher at hand or from none."""
import hashlib
import json
import math
import os
import shutil

import walkers as drawing
from model import Options
from support import clip, dinov2, priors
from support.dinov2 import RANDOM, TINY, load_dinov2
from support.files import UserError
from support.footage import picture
from support.pedestrian import describe
from support.priors import (
    FRAME,
    Components,
    contrastive_loss,
    image_features,
    levels,
    spoiled,
    text_features,
    unexplained,
)

import pytest
import torch
import torch.nn.functional as F

LEAST_EXPLAINED = 0.75
DINOV2_DIGEST = "8aa16daebe2be31145928587403c1bfd93920a789c38acadd27d5047cbaeb4f7"


def test_the_shipped_prior_is_this_one_and_no_random_one():
    with open(dinov2.TINY_FILE, "rb") as file:
        content = file.read()
    assert hashlib.sha256(content).hexdigest() == DINOV2_DIGEST and len(content) < 300_000
    shipped, random = load_dinov2(TINY).state_dict(), load_dinov2(RANDOM).state_dict()
    assert shipped.keys() == random.keys()
    assert all(tensor.dtype == torch.float32 for tensor in shipped.values())
    assert not torch.equal(shipped["patch_embed.proj.weight"], random["patch_embed.proj.weight"])


@torch.no_grad()
def test_the_shipped_prior_explains_walkers_that_it_has_not_seen():
    """Four frames of the demo's test people and what the teacher says of every fourth patch of
    them. maps: the linear maps from the student's tokens, fitted to 160 other frames."""
    path = os.path.join(os.path.dirname(__file__), "tiny_dinov2_targets.pt")
    held = torch.load(path, weights_only=True)
    size = Options.small["dino_size"]
    tokens = levels(load_dinov2(TINY), held["frames"] / 255, size)[:, :, ::4]
    tokens = torch.cat([tokens, torch.ones(*tokens.shape[:3], 1)], dim=3)
    said = tokens @ held["maps"].float()[:, None]
    explained = 1 - unexplained(said, held["targets"].float(), held["variance"])
    assert explained.mean() > LEAST_EXPLAINED and explained.min() > LEAST_EXPLAINED - 0.06


def test_components_hold_what_differs_most():
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.1, 3, 64)
    tokens = 5 + scale * torch.randn(4, 4000, 64, generator=generator)
    components = Components(tokens)
    assert torch.allclose(components.variance, scale[-priors.COMPONENTS:].square().sum(), rtol=0.1)
    said = components(tokens[:, None])
    assert said.shape == (4, 1, 4000, priors.COMPONENTS)
    assert said.mean((1, 2)).abs().max() < 1e-3
    assert torch.allclose(unexplained(said, said, components.variance), torch.zeros(4))
    nothing = unexplained(torch.zeros_like(said), said, components.variance)
    assert torch.allclose(nothing, torch.ones(4), rtol=1e-3)


def test_a_spoiled_view_is_the_seed_s_alone_and_a_picture_still():
    frames = torch.rand(32, 3, 64, 32, generator=torch.Generator().manual_seed(1))
    one, again, other = (spoiled(frames, torch.Generator().manual_seed(s)) for s in (2, 2, 3))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.shape == frames.shape and one.min() >= 0 and one.max() <= 1


def test_distilling_explains_more_and_leaves_a_file_that_loads(walkers, tmp_path, monkeypatch):
    """A random ViT as the teacher: its tokens can be imitated too."""
    monkeypatch.setattr(priors, "COMPONENTS", 16)
    monkeypatch.setattr(priors, "load_dinov2", lambda name, weights: load_dinov2(RANDOM))
    said, files = [], []
    monkeypatch.setattr(priors, "say", said.append)
    out = tmp_path / "tiny.pt"
    for steps in (1, 1, 40):
        words = ["priors", "dinov2", "--data", str(walkers / "Train"), "--out", str(out),
                 "--frames", "64", "--steps", str(steps), "--dino-size", "112", "56"]
        monkeypatch.setattr("sys.argv", words)
        priors.main()
        files.append(out.read_bytes())
    assert files[0] == files[1]    # the seed's, and nobody else's
    _, before, after = (sum(map(float, line.split(": ")[-1].split())) for line in said)
    assert after > before + 0.2
    monkeypatch.setattr(dinov2, "TINY_FILE", str(out))
    frames = torch.rand(1, 3, 112, 56)
    assert load_dinov2(TINY).get_intermediate_layers(frames, n=[3])[0].isfinite().all()


@pytest.mark.parametrize("words, answer", [
    (["--frames", "100000"], "frames under .* expected 105000"),
    (["--dino-size", "280", "150"], "280, 150.*expected multiples of 14"),
    (["--dino-size", "0", "140"], "expected multiples of 14"),
    (["--dinov2", "tiny"], "tiny is no teacher; expected a large one"),
    (["--dinov2", "dinov3"], "dinov3 is not known"),
    (["--seed", "99999999999999999999"], "--seed 9+; expected 0 to"),
    (["--data", "{walkers}"], "has masks/.*expected a folder of frames alone.*Train")])
def test_what_cannot_be_distilled_is_refused(words, answer, walkers, monkeypatch, tmp_path):
    if words[0] != "--dinov2":    # refused before a teacher is loaded
        monkeypatch.setattr(priors, "load_dinov2", lambda name, weights: load_dinov2(RANDOM))
    words = [word.format(walkers=walkers) for word in words]
    monkeypatch.setattr("sys.argv", ["priors", "dinov2", "--data", str(walkers / "Train"),
                                     "--out", str(tmp_path / "x.pt"), *words])
    with pytest.raises(UserError, match=answer):
        priors.main()


# ------------------------------------------------------------------ clip ----

CLIP_DIGEST = "221f5fddb5ff20b91c147bc7d008d65117778c6b3b12d240bcdb02c4376572b7"


def test_the_shipped_clip_is_this_one_and_no_random_one():
    with open(clip.TINY_FILE, "rb") as file:
        content = file.read()
    assert hashlib.sha256(content).hexdigest() == CLIP_DIGEST and len(content) < 700_000
    shipped = clip.load_clip("tiny")
    again, random = clip.load_clip("tiny"), clip.load_clip("tiny-random")
    for name, tensor in shipped.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]) and tensor.dtype == torch.float32
    assert not torch.allclose(shipped.visual.proj, random.visual.proj, atol=0.01)


def photographs(pids, modality):
    """One frame of each of those people of the demo's seed -> (N, 3, 128, 64) in 0..1."""
    frames = []
    for pid in pids:
        camera = drawing.make_camera(0, 1 + pid % 6, 6, FRAME[0])
        rng = torch.Generator().manual_seed(pid)
        numbers = drawing.np.random.default_rng(torch.randint(10 ** 6, (1,), generator=rng).item())
        paint = drawing.make_paint(0, pid, modality)
        walker = drawing.make_walker(0, pid)
        [(frame, _)] = drawing.draw_tracklet(numbers, walker, paint, camera, modality, 1)
        frames.append(picture(frame, FRAME))
    return torch.stack(frames) / 255


@torch.no_grad()
@pytest.mark.parametrize("modality", ["visible", "infrared"])
def test_the_shipped_clip_knows_the_words_of_strangers(modality):
    """Of the sentences of 8 people that it has not seen, it finds the right one, by day and by
    night: chance is 1 in 8."""
    model, right = clip.load_clip("tiny"), 0
    for first in range(1, 65, 8):
        pids = range(first, first + 8)
        sentences = [describe(drawing.make_walker(0, pid)) for pid in pids]
        text = text_features(model, *clip.tokenized(sentences))
        image = image_features(model, photographs(pids, modality))
        right += ((image @ text.t()).argmax(1) == torch.arange(8)).sum().item()
    assert right / 64 > 0.75


def test_the_contrastive_loss_by_hand():
    a, b = torch.eye(3), torch.eye(3)[[0, 2, 1]]    # the first finds its own, the others do not
    own, other = math.log(math.e ** 2 + 2), math.log(math.e ** 2 + 2)
    wanted = (own - 2 + 2 * other) / 3
    assert contrastive_loss(a, b, 2.0).item() == pytest.approx(wanted)
    rows, columns = F.normalize(torch.randn(4, 5), dim=1), F.normalize(torch.randn(4, 5), dim=1)
    got, swapped = contrastive_loss(rows, columns, 3.0), contrastive_loss(columns, rows, 3.0)
    torch.testing.assert_close(got, swapped)


def test_contrasting_finds_more_and_leaves_a_file_that_loads(walkers, tmp_path, monkeypatch):
    monkeypatch.setattr(priors, "FRAME", (64, 32))
    sizes = {**clip.TINY_SIZES, "grid": (8, 4)}
    monkeypatch.setattr(clip, "TINY_SIZES", sizes)
    monkeypatch.setattr(clip, "CLIP_MODELS", {"tiny": sizes})
    out = tmp_path / "tiny.pt"
    monkeypatch.setattr(clip, "TINY_FILE", str(out))
    people, losses = priors.load_people(str(walkers)), []
    assert people.frames.shape == (4, 2, priors.EACH, 3, 64, 32)
    for steps in (1, 60):
        words = ["priors", "clip", "--data", str(walkers), "--out", str(out), "--steps", str(steps),
                 "--batch", "3"]
        monkeypatch.setattr("sys.argv", words)
        priors.main()
        model = clip.load_clip("tiny")
        text = text_features(model, people.words[1:], people.end[1:])
        images = [image_features(model, people.frames[1:, m, k] / 255)
                  for m in (0, 1) for k in range(priors.EACH)]
        losses.append(sum(contrastive_loss(image, text, 10.0).item() for image in images) / 12)
    assert losses[1] < losses[0] - 0.3


def test_people_without_sentences_are_refused(walkers):
    """Walkers that an older version drew have none, and walkers.py would leave them as they are."""
    expected = "no sentences.json; expected a folder of walkers .* into another folder"
    with pytest.raises(UserError, match=expected):
        priors.load_people(str(walkers / "Train"))


def in_sentences(change):
    def changed(folder):
        sentences = json.loads((folder / "sentences.json").read_text())
        change(sentences)
        (folder / "sentences.json").write_text(json.dumps(sentences))
    return changed


def without(*names):
    def changed(folder):
        for name in names:
            shutil.rmtree(folder / "Train" / name)
    return changed


def deeper(folder):
    (folder / "Train").rename(folder / "inner")
    (folder / "Train").mkdir()
    (folder / "inner").rename(folder / "Train" / "inner")


UNFIT = "sentences.json and Train/ of .* do not fit together .*: draw walkers anew"
PEOPLE = {    # what is done to a folder of walkers, and what is said of it
    "a person without a sentence": (in_sentences(lambda s: s.pop("2")), UNFIT),
    "an unknown word": (in_sentences(lambda s: s.update({"2": "a purple person ."})), "purple"),
    "a list": (lambda folder: (folder / "sentences.json").write_text("[]"), UNFIT),
    "no JSON": (lambda folder: (folder / "sentences.json").write_text("{"), "no sentences.json"),
    "a person by day alone": (without("0002/ir"), UNFIT),
    "a name": (lambda folder: (folder / "Train/0002").rename(folder / "Train/ann"), UNFIT),
    "a folder too deep": (deeper, UNFIT),
    "two people": (without("0002", "0003"), "2 people in .*; expected 3 or more"),
}


@pytest.mark.parametrize("fault", PEOPLE)
def test_people_that_do_not_fit_their_sentences_are_refused_in_a_line(fault, walkers, tmp_path):
    shutil.copytree(walkers / "Train", tmp_path / "Train")
    shutil.copyfile(walkers / "sentences.json", tmp_path / "sentences.json")
    damage, words = PEOPLE[fault]
    damage(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        priors.load_people(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prior", ["dinov2", "clip"])
@pytest.mark.parametrize("option", ["--steps", "--batch", "--frames"])
def test_less_than_one_of_anything_is_refused(prior, option, walkers, tmp_path, monkeypatch):
    for number in "0", "-3":
        monkeypatch.setattr("sys.argv", ["priors", prior, "--data", str(walkers), "--out",
                                         str(tmp_path / "x.pt"), option, number])
        with pytest.raises(UserError, match=f"{option} {number}; expected 1 or more"):
            priors.main()
