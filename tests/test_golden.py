"""Every golden array: what the authors' released network computes on formula-filled weights,
float32, CPU. Only loss_smooth_mask_as_released is left out: the released code reads memory in the
wrong order there (see sasgl.smooth_loss)."""
from pathlib import Path

from evaluate import distances
from golden import formula, official_keys
from model import DinoGRL, identity_loss, triplet_loss
from pbmge import PBMGE
from sasgl import diversity_loss, smooth_loss

import numpy as np
import pytest
import torch

GOLDEN = dict(np.load(Path(__file__).parent / "dinogrl_official.npz"))


def agrees(name, value):
    """The largest deviation is below a ten-thousandth of the largest golden value."""
    want, got = GOLDEN[name], value.detach().numpy()
    assert got.shape == want.shape, name
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < 1e-4, f"{name}: relative deviation {error:.1e}"


def standard_normal(random, shape):
    return torch.from_numpy(random.standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="module")
def computed(official_files):
    """All that the network gives for one visible and one infrared tracklet of six frames."""
    model, _ = DinoGRL.released(official_files)
    sasgl, seen = model.sasgl, {}
    sasgl.register_forward_hook(lambda module, given, output: seen.update(codes=output[1]))
    sasgl.mask_branch.register_forward_hook(
        lambda module, given, mask: seen.update(pixels=given[0], mask=mask))
    random = np.random.RandomState(60)
    frames = torch.stack([standard_normal(random, (6, 3, 256, 128)) for _ in range(2)])
    with torch.no_grad():
        embedding = model.embed(frames, torch.tensor([0, 1]))
        features = sasgl.features(frames[0, :1])
        parts = model.streams_of(embedding)
        return {**seen, "parts": parts, "embedding": embedding,
                "features": [sasgl.upsampled(x)[0].flatten(0, 1) for x in features],
                "logits": {name: model.streams[name].head(x) for name, x in parts.items()},
                "loss_mask": sasgl.mask_branch.reconstruction_loss(seen["mask"], seen["pixels"])}


def test_features(computed):
    last, mid4 = computed["features"]
    agrees("last1", last[::97, ::48])
    agrees("mid4", mid4[::97, ::192])


def test_silhouettes_and_codes(computed):
    codes = computed["codes"]
    agrees("mask_probability", codes.mask[:, 0])
    agrees("foreground", codes.silhouette)
    agrees("denoising", codes.denoising.permute(0, 2, 3, 1)[::5, ::7, ::5])
    agrees("appearance_code", codes.appearance.permute(0, 2, 3, 1)[::5, ::7, ::5])


def test_losses_of_sasgl(computed):
    codes = computed["codes"]
    agrees("loss_mask", computed["loss_mask"])
    agrees("loss_smooth_mask", smooth_loss(codes.mask))    # a constant, not computed in training
    agrees("loss_smooth_part", smooth_loss(codes.denoising[:, :15]))
    agrees("loss_diversity", diversity_loss(codes.denoising))


def test_embeddings_logits_and_distances(computed):
    embedding = computed["embedding"]
    assert embedding.shape == (2, 70, 256) and embedding.dtype == torch.float32
    agrees("gait", embedding[:, :35].transpose(1, 2))
    agrees("appearance", embedding[:, 35:].transpose(1, 2))
    assert torch.equal(computed["parts"]["gait"], embedding[:, :35])
    assert torch.equal(computed["parts"]["appearance"], embedding[:, 35:])
    for name, logits in computed["logits"].items():
        agrees(f"{name}_logits", logits.transpose(1, 2)[:, ::25])
    agrees("distance", distances(embedding, embedding))


def test_losses_of_a_stream():
    random = np.random.RandomState(63)
    features = torch.from_numpy(0.05 * random.standard_normal((8, 256, 35)).astype(np.float32))
    logits = torch.from_numpy(random.uniform(-1, 1, (8, 10, 35)).astype(np.float32))
    label = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    agrees("loss_triplet", triplet_loss(features.transpose(1, 2), label))
    agrees("loss_identity", identity_loss(logits.transpose(1, 2), label))


def test_pbmge_in_training():
    pbmge = PBMGE(dim=256, strips=(1, 2, 4, 8, 16)).train()
    modules = {"enhance_shape_net_3": pbmge.enhance_gait,
               "enhance_app_net_3": pbmge.enhance_appearance}
    for theirs, module in modules.items():
        tensors = {key.removeprefix(f"{theirs}.").replace("g.0.", "g."): formula(key, shape)
                   for key, shape in official_keys()["best_model2.pth"].items()
                   if key.startswith(theirs)}
        module.load_state_dict(tensors)
    parts = [standard_normal(np.random.RandomState(seed), (8, 256, 31)) for seed in (61, 62)]
    gait, appearance = pbmge(*(x.transpose(1, 2) for x in parts))
    agrees("pbmge_train_gait", gait.transpose(1, 2)[:, :, 31:])
    agrees("pbmge_train_appearance", appearance.transpose(1, 2)[:, :, 31:])
    for theirs, module in modules.items():
        for W, batch_norm in (("W1", module.W1[1]), ("W2", module.W2[1])):
            agrees(f"pbmge_{theirs}_{W}_1_running_mean", batch_norm.running_mean)
            agrees(f"pbmge_{theirs}_{W}_1_running_var", batch_norm.running_var)
