"""Every golden array: what the authors' released network computes on formula-filled weights,
float32, CPU. Only loss_smooth_mask_as_released is left out: the released code reads memory in the
wrong order there (see sasgl.smooth_loss)."""
from pathlib import Path

from evaluate import distances
from model import identity_loss, triplet_loss
from sasgl import diversity_loss, smooth_loss
from support.weights import load_run

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


def standard_normal(seed, *shape):
    numbers = np.random.RandomState(seed).standard_normal(shape)
    return torch.from_numpy(numbers.astype(np.float32))


@pytest.fixture(scope="module")
def computed(official_files):
    """All that the network gives for one visible and one infrared tracklet of six frames."""
    model, _, _ = load_run(official_files)
    sasgl, seen = model.sasgl, {}
    sasgl.mask_branch.register_forward_hook(
        lambda module, given, mask: seen.update(pixels=given[0], mask=mask))
    frames = standard_normal(60, 2, 6, 3, 256, 128)
    with torch.no_grad():
        embedding = model.embed(frames, torch.tensor([0, 1]))
        codes, _ = sasgl.encode(frames.flatten(0, 1))
        features = sasgl.features(frames[0, :1])
    return {**seen, "model": model, "embedding": embedding, "codes": codes,
            "features": [sasgl.upsampled(x)[0].flatten(0, 1) for x in features],
            "loss_mask": sasgl.mask_branch.reconstruction_loss(seen["mask"], seen["pixels"])}


def test_sasgl(computed):
    last, mid4 = computed["features"]
    agrees("last1", last[::97, ::48])
    agrees("mid4", mid4[::97, ::192])
    codes = computed["codes"]
    agrees("mask_probability", codes.mask[:, 0])
    agrees("foreground", codes.silhouette)
    agrees("denoising", codes.denoising.permute(0, 2, 3, 1)[::5, ::7, ::5])
    agrees("appearance_code", codes.appearance.permute(0, 2, 3, 1)[::5, ::7, ::5])
    agrees("loss_mask", computed["loss_mask"])
    agrees("loss_smooth_mask", smooth_loss(codes.mask))    # a constant, not computed in training
    agrees("loss_smooth_part", smooth_loss(codes.denoising[:, :15]))
    agrees("loss_diversity", diversity_loss(codes.denoising))


def test_embeddings_logits_and_distances(computed):
    model, embedding = computed["model"], computed["embedding"]
    parts = {"gait": embedding[:, :35], "appearance": embedding[:, 35:]}
    named = model.streams_of(embedding)
    for name, own in parts.items():
        assert torch.equal(named[name], own)
        agrees(name, own.transpose(1, 2))
        agrees(f"{name}_logits", model.streams[name].head(own).transpose(1, 2)[:, ::25])
    agrees("distance", distances(embedding, embedding))


def test_losses_of_a_stream():
    random = np.random.RandomState(63)
    features = torch.from_numpy(0.05 * random.standard_normal((8, 256, 35)).astype(np.float32))
    logits = torch.from_numpy(random.uniform(-1, 1, (8, 10, 35)).astype(np.float32))
    label = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    agrees("loss_triplet", triplet_loss(features.transpose(1, 2), label))
    agrees("loss_identity", identity_loss(logits.transpose(1, 2), label))


def test_pbmge_in_training(computed):
    pbmge = computed["model"].pbmge.train()
    modules = {"enhance_shape_net_3": pbmge.enhance_gait,
               "enhance_app_net_3": pbmge.enhance_appearance}
    gait, appearance = pbmge(*(standard_normal(seed, 8, 256, 31).transpose(1, 2)
                               for seed in (61, 62)))
    agrees("pbmge_train_gait", gait.transpose(1, 2)[:, :, 31:])
    agrees("pbmge_train_appearance", appearance.transpose(1, 2)[:, :, 31:])
    for theirs, module in modules.items():
        for W, batch_norm in (("W1", module.W1[1]), ("W2", module.W2[1])):
            agrees(f"pbmge_{theirs}_{W}_1_running_mean", batch_norm.running_mean)
            agrees(f"pbmge_{theirs}_{W}_1_running_var", batch_norm.running_var)
