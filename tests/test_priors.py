"""The distilled prior: what is shipped, and how it is made, from a teacher at hand."""
import hashlib
import os

from support import dinov2, priors
from support.dinov2 import RANDOM, TINY, load_dinov2
from support.files import UserError
from support.priors import Components, enlarged, levels, spoiled, unexplained

import pytest
import torch

LEAST_EXPLAINED = 0.73
DIGEST = "814e5d2d11cc1f09f4df14e62a8aa2e4b74096660bc2a1c3a224ae7999ed7243"


def test_the_shipped_prior_is_this_one_and_no_random_one():
    with open(dinov2.TINY_FILE, "rb") as file:
        content = file.read()
    assert hashlib.sha256(content).hexdigest() == DIGEST and len(content) < 300_000
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
    tokens = levels(load_dinov2(TINY), enlarged(held["frames"] / 255))[:, :, ::4]
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
    monkeypatch.setattr(priors, "SEEN", (112, 56))
    monkeypatch.setattr(priors, "load_dinov2", lambda name, weights: load_dinov2(RANDOM))
    said = []
    monkeypatch.setattr(priors, "say", said.append)
    out = tmp_path / "tiny.pt"
    for steps in (1, 40):
        words = ["priors", "dinov2", "--data", str(walkers / "Train"), "--out", str(out),
                 "--frames", "64", "--steps", str(steps)]
        monkeypatch.setattr("sys.argv", words)
        priors.main()
    before, after = (sum(map(float, line.split(": ")[-1].split())) for line in said)
    assert after > before + 0.2
    monkeypatch.setattr(dinov2, "TINY_FILE", str(out))
    frames = torch.rand(1, 3, 112, 56)
    assert load_dinov2(TINY).get_intermediate_layers(frames, n=[3])[0].isfinite().all()


def test_too_few_frames_are_refused(walkers, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["priors", "dinov2", "--data", str(walkers / "Train"),
                                     "--out", str(tmp_path / "x.pt"), "--frames", "100000"])
    with pytest.raises(UserError, match="frames under .* expected 105000"):
        priors.main()
