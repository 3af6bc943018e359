"""Every golden array: what the authors' released network computes on formula-filled weights,
float32, CPU."""
from pathlib import Path

from golden import formula, official_keys
from model import identity_loss, load_official, triplet_loss
from pbmge import PBMGE
from support.ranking import distances

import numpy as np
import pytest
import torch

GOLDEN = dict(np.load(Path(__file__).parent / "dinogrl_official.npz"))


def agrees(name, value, tolerance=1e-4):
    """Largest deviation relative to the largest golden value."""
    want, got = GOLDEN[name], np.asarray(value.detach() if torch.is_tensor(value) else value)
    assert got.shape == want.shape, f"{name}: {got.shape}, expected {want.shape}"
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < tolerance, f"{name}: relative deviation {error:.1e}"


def standard_normal(random, shape):
    return torch.from_numpy(random.standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="module")
def official(official_files):
    return load_official(official_files)


@pytest.fixture(scope="module")
def frames():
    random = np.random.RandomState(60)
    return torch.stack([standard_normal(random, (6, 3, 256, 128)) for _ in range(2)])


def other_way_round(x):
    """Of two tracklets or their frames, the second one's first."""
    return torch.cat(x.chunk(2)[::-1])


@pytest.fixture(scope="module")
def computed(official, frames):
    """Everything the network gives for one visible and one infrared tracklet, computed once: in an
    embedding of the infrared one and then the visible one. Here the visible one is the first."""
    seen, parts_by_stream = [], official.parts_by_stream

    def watched(*arguments):
        seen.append(parts_by_stream(*arguments))
        return seen[-1]

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(official, "parts_by_stream", watched)
        embedding = official.embed(other_way_round(frames), torch.tensor([1, 0]))
        features = official.sasgl.features(frames[0, :1])
    (streams, codes), = seen
    codes = codes._replace(**{name: other_way_round(x) for name, x in codes._asdict().items()
                              if torch.is_tensor(x)})
    streams = {name: other_way_round(parts) for name, parts in streams.items()}
    logits = {"gait": official.gait_head(streams["gait"]),
              "appearance": official.appearance_head(streams["appearance"])}
    return {"codes": codes, **streams, "logits": logits, "features": features,
            "embedding": other_way_round(embedding)}


def test_features(official, computed):
    last, mid4 = (official.sasgl.upsampled(x)[0].flatten(0, 1) for x in computed["features"])
    agrees("last1", last[::97, ::48])
    agrees("mid4", mid4[::97, ::192])


def test_silhouettes(computed):
    codes = computed["codes"]
    agrees("mask_probability", codes.mask[:, 0])
    agrees("foreground", codes.silhouette)
    agrees("denoising", codes.denoising.permute(0, 2, 3, 1)[::5, ::7, ::5])
    agrees("appearance_code", codes.appearance.permute(0, 2, 3, 1)[::5, ::7, ::5])


def test_sasgl_losses(computed):
    losses = computed["codes"].losses    # weighted
    agrees("loss_mask", losses["mask"])
    agrees("loss_smooth_mask", losses["smooth_mask"] / 0.02)
    agrees("loss_smooth_part", losses["smooth_part"] / 0.01)
    agrees("loss_diversity", losses["diversity"] / 5)


def test_the_streams_of_an_embedding(official, computed):
    named = official.streams_of(computed["embedding"])
    assert list(named) == ["gait", "appearance"]
    assert all(torch.equal(parts, computed[name]) for name, parts in named.items())


def test_embeddings_and_logits(computed):
    for stream in ("gait", "appearance"):
        agrees(stream, computed[stream].transpose(1, 2))
        agrees(f"{stream}_logits", computed["logits"][stream].transpose(1, 2)[:, ::25])


def test_distance(computed):
    agrees("distance", distances(computed["embedding"], computed["embedding"]))


def test_embed_is_the_concatenation_gait_first(computed):
    """In the caller's order: see computed."""
    embedding = computed["embedding"]
    assert embedding.shape == (2, 70, 256) and embedding.dtype == torch.float32
    agrees("gait", embedding[:, :35].transpose(1, 2))
    agrees("appearance", embedding[:, 35:].transpose(1, 2))


def test_losses():
    random = np.random.RandomState(63)
    features = torch.from_numpy(0.05 * random.standard_normal((8, 256, 35)).astype(np.float32))
    logits = torch.from_numpy(random.uniform(-1, 1, (8, 10, 35)).astype(np.float32))
    label = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    agrees("loss_triplet", triplet_loss(features.transpose(1, 2), label))
    agrees("loss_identity", identity_loss(logits.transpose(1, 2), label))


def test_pbmge_in_training():
    pbmge = PBMGE(dim=256, strips=(1, 2, 4, 8, 16)).train()
    keys = official_keys()["best_model2.pth"]
    modules = {"enhance_shape_net_3": pbmge.enhance_gait,
               "enhance_app_net_3": pbmge.enhance_appearance}
    for theirs, module in modules.items():
        tensors = {}
        for key, shape in keys.items():
            if key.startswith(theirs):
                ours = key.removeprefix(theirs + ".").replace("g.0.", "g.")
                tensors[ours] = formula(key, shape)
        module.load_state_dict(tensors)
    parts = [standard_normal(np.random.RandomState(seed), (8, 256, 31)) for seed in (61, 62)]
    gait, appearance = pbmge(*(x.transpose(1, 2) for x in parts))
    agrees("pbmge_train_gait", gait.transpose(1, 2)[:, :, 31:])
    agrees("pbmge_train_appearance", appearance.transpose(1, 2)[:, :, 31:])
    for theirs, module in modules.items():
        for W, batch_norm in (("W1", module.W1[1]), ("W2", module.W2[1])):
            agrees(f"pbmge_{theirs}_{W}_1_running_mean", batch_norm.running_mean)
            agrees(f"pbmge_{theirs}_{W}_1_running_var", batch_norm.running_var)


def test_every_golden_array_is_tested():
    source = Path(__file__).read_text()
    by_loop = {"gait", "appearance", "gait_logits", "appearance_logits",
               "loss_smooth_mask_as_released"}
    for name in GOLDEN:
        is_of_pbmge = name.startswith("pbmge_enhance_")
        assert f'"{name}"' in source or name in by_loop or is_of_pbmge, name
