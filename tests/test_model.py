"""DinoGRL assembled: weights in, parts out, losses by loops, ablations, ideas of your own."""
import itertools
import re
from dataclasses import replace

from golden import formula, official_keys
from model import AppearanceStream, DinoGRL, GaitStream, Options, identity_loss, triplet_loss
from support.dinov2 import load_dinov2
from support.files import UserError
from support.method import Method
from support.official import load_release
from support.weights import take_weights, without_frozen

import pytest
import torch

SIZE, CHANNELS_LAST = (64, 32), torch.channels_last
SMALL = Options(width=8, blocks=(1, 1, 1, 1), strides=(1, 1, 1, 1), gait_strides=(1, 1, 1, 1),
                strips=(1, 2, 4), dim=16, dino_size=(112, 56), code_size=(16, 8),
                dinov2="tiny-random", resnet_weights="random")
FRAMES = torch.randn(4, 2, 3, *SIZE, generator=torch.Generator().manual_seed(2))
MODALITY, LABEL = torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 1, 1])


def small_model(method=DinoGRL, **changes):
    torch.manual_seed(0)
    return method(replace(SMALL, **changes), 5, SIZE)


def losses_of(model):
    torch.manual_seed(1)
    losses, _ = model.train()(FRAMES, MODALITY, LABEL)
    return losses


@torch.no_grad()
def embedding_of(model):
    return model.eval().embed(FRAMES, MODALITY)


def without_gradient(model):
    """The names of the parameters that no gradient reaches."""
    return {name for name, p in model.named_parameters() if p.grad is None}


@torch.no_grad()
def test_embedding_does_not_depend_on_the_batch_nor_on_the_order_of_tracklets_and_frames():
    model = small_model()
    together = embedding_of(model)
    alone = [model.embed(FRAMES[i:i + 1].flip(1), MODALITY[i:i + 1]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together, model.embed(FRAMES, 1 - MODALITY))    # two stems


def test_both_backbones_get_maps_with_channels_last():
    """Convolutions are faster so, on a GPU above all. The codes and the frames come otherwise."""
    model, formats = small_model(), []
    for net in model.streams["appearance"], model.sasgl.gait_net:
        net.backbone.register_forward_pre_hook(
            lambda _, given: formats.append(given[0].is_contiguous(memory_format=CHANNELS_LAST)))
    losses_of(model)
    embedding_of(model)
    assert formats == [True] * 4


@pytest.mark.parametrize("switches, parts, number", [
    ({}, 2 * (7 + 2), 7), ({"pbmge": False}, 2 * 7, 7), ({"strips": (1, 2, 4, 8)}, 2 * (15 + 3), 7),
    ({"gait": False}, 7, 2)])
def test_ablations_remove_parts_and_losses(switches, parts, number):
    model = small_model(**switches)
    losses = losses_of(model)
    assert len(losses) == number and {"identity_appearance", "triplet_appearance"} <= losses.keys()
    sum(losses.values()).backward()
    assert all(name.startswith("streams.gait.sasgl.prior.") for name in without_gradient(model))
    assert embedding_of(model).shape == (4, parts, 16)


@pytest.mark.parametrize("changes", [
    {"strips": ()}, {"strips": (1,)}, {"strips": (2, 4)}, {"strips": (1, 0)}, {"strips": (1, 3)},
    {"strips": (1, 32)}, {"code_size": (18, 8)}, {"strides": (2, 2, 2, 1)}])
def test_strips_that_do_not_divide_the_maps_are_refused(changes):
    with pytest.raises(UserError, match="strips"):
        small_model(**changes)


def test_triplet_loss_against_loops_with_uneven_identities():
    torch.manual_seed(0)
    parts, label = torch.randn(6, 3, 4) * 0.2, torch.tensor([0, 1, 0, 2, 0, 1])
    parts.requires_grad_()
    per_part = []
    for x in parts.detach().unbind(1):
        terms = []
        for anchor, positive, negative in itertools.product(range(6), repeat=3):
            if label[anchor] == label[positive] and label[anchor] != label[negative]:
                near, far = (x[anchor] - x[positive]).norm(), (x[anchor] - x[negative]).norm()
                terms.append(max(0.0, (near - far + 0.2).item()))
        active = [term for term in terms if term > 0]
        per_part.append(sum(active) / max(1, len(active)))
    loss = triplet_loss(parts, label)
    assert loss.item() == pytest.approx(sum(per_part) / 3, rel=1e-5)
    # The anchor as its own positive is at distance 0, where the root has no slope.
    loss.backward()
    assert parts.grad.isfinite().all()


# ------------------------------------------------------- ideas of your own ----

class Near(DinoGRL):
    """The two modalities' means are drawn together, instead of the triplet loss."""

    def losses_of(self, parts, logits, label, modality):
        apart = parts[modality == 0].mean(0) - parts[modality == 1].mean(0)
        losses = super().losses_of(parts, logits, label, modality)
        return {**losses, "triplet": apart.norm(dim=1).mean()}


def test_a_subclass_changes_exactly_the_loss_that_it_replaces():
    losses, own_losses = losses_of(small_model()), losses_of(small_model(Near))
    assert own_losses.keys() == losses.keys()
    changed = {name for name in losses if not torch.equal(losses[name], own_losses[name])}
    assert changed == {"triplet_gait", "triplet_appearance"}


class ThreeStreams(DinoGRL):
    def __init__(self, options, classes, size, pretrained=True):
        super().__init__(options, classes, size, pretrained)
        other_strips = replace(options, strips=(1, 4))
        self.streams["coarse"] = AppearanceStream(other_strips, classes, size, refined=0)


def test_a_third_stream_is_one_more_entry():
    model = small_model(ThreeStreams)
    losses = losses_of(model)
    assert {"identity_coarse", "triplet_coarse"} <= losses.keys()
    sum(losses.values()).backward()
    assert "streams.coarse.head.weight" not in without_gradient(model)
    embedding = embedding_of(model)
    parts = model.streams_of(embedding)
    sizes = {name: own.shape[1] for name, own in parts.items()}
    assert sizes == {"gait": 9, "appearance": 9, "coarse": 5}
    assert torch.equal(torch.cat(list(parts.values()), dim=1), embedding)


class GaitAlone(Method):
    """Another method, with the gait stream as a part."""

    def __init__(self, options, classes, size):
        super().__init__()
        self.gait = GaitStream(options, classes, load_dinov2(options.dinov2))

    def forward(self, frames, modality, label):
        parts, losses = self.gait(frames)
        return {**losses, "identity": identity_loss(self.gait.head(parts), label)}, {}


def test_the_gait_stream_is_a_part_of_another_method():
    model = small_model(GaitAlone)
    everything = without_gradient(model)
    model.gait.warm_up_losses(FRAMES)["mask"].backward()
    warmed = everything - without_gradient(model)
    assert len(warmed) == 4 and all("mask_branch" in name for name in warmed)
    sum(losses_of(model).values()).backward()
    assert all(name.startswith("gait.sasgl.prior.") for name in without_gradient(model))


class Prior(torch.nn.Conv2d):
    """The least that SASGL can see through: tokens of patches of 16 pixels."""
    patch_size, embed_dim, blocks = 16, 6, range(4)

    def norm(self, tokens):
        return tokens - 1

    def get_intermediate_layers(self, x, n, norm):
        return [self(x).flatten(2).transpose(1, 2)] * len(n)


class Through(DinoGRL):
    """Another prior than DINOv2."""

    def prior(self):
        torch.manual_seed(1)
        return Prior(3, 6, 16, 16)


def test_another_prior_is_frozen_and_its_patch_size_is_read():
    model = small_model(Through, dino_size=(128, 64))
    last, mid4 = model.sasgl.features(FRAMES[0])
    assert last.shape == (2, 8, 4, 6) and mid4.shape == (2, 8, 4, 24)
    sum(losses_of(model).values()).backward()
    prior = model.sasgl.prior
    assert not prior.training and not any(p.requires_grad for p in prior.parameters())
    with pytest.raises(UserError, match="multiples.*16"):
        small_model(Through, dino_size=(112, 56))
    with pytest.raises(UserError, match="multiples.*14"):
        small_model(dino_size=(128, 64))


def test_a_checkpoint_leaves_the_frozen_prior_out_and_is_loaded_strictly():
    model = small_model(Through, dino_size=(128, 64))
    kept = without_frozen(model)
    prior = {f"streams.gait.sasgl.prior.{name}" for name in model.sasgl.prior.state_dict()}
    assert model.state_dict().keys() - kept.keys() == prior and len(prior) == 2
    checkpoint = {"model": kept, "classes": list("abcde")}
    other = small_model(Through, dino_size=(128, 64))
    take_weights(other, checkpoint, "last.pt")
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    kept.pop("pbmge.enhance_gait.W1.0.bias")
    with pytest.raises(UserError, match="pbmge.enhance_gait.W1.0.bias"):
        take_weights(other, checkpoint, "last.pt")


# ------------------------------------------------------ pre-trained pieces ----

def looks_like(shape, number=0.0):
    """A tensor of that shape that holds one number: small in a file."""
    return torch.tensor(number).expand(shape)


def torchvision_resnet50():
    """The names and shapes of torchvision's file, from the authors' list: their ResNets are copies
    of it. Each tensor holds a number of its own."""
    shapes = {"fc.weight": (1000, 2048), "fc.bias": (1000,)}
    for key, shape in official_keys()["best_model.pth"].items():
        name = re.sub(r"share_encoder\.resnet_conv\.(\d)", lambda m: f"layer{int(m[1]) + 1}", key)
        name = name.replace("image_encoder1.resnet_conv.0.", "conv1.")
        name = name.replace("image_encoder1.resnet_conv.1.", "bn1.")
        if name.startswith(("conv1.", "bn1.", "layer")):
            shapes[name] = shape
    return {name: looks_like(shape, i) for i, (name, shape) in enumerate(shapes.items())}


def test_resnet50_has_torchvision_s_tensors(tmp_path):
    tensors, path = torchvision_resnet50(), str(tmp_path / "resnet50.pth")
    assert len(tensors) == 320
    torch.save(tensors, path)
    model = small_model(resnet_weights=path, width=64, blocks=(3, 4, 6, 3))
    stream, filled = model.streams["appearance"], {"fc.weight", "fc.bias"}
    for module in (stream.visible_stem, stream.infrared_stem, stream.backbone,
                   model.sasgl.gait_net.backbone):
        filled |= module.state_dict().keys()
        assert all((x == tensors[name]).all() for name, x in module.state_dict().items())
    assert filled == tensors.keys()


def test_biggait_s_mask_branch_is_loaded_and_spares_the_warm_up(tmp_path):
    prefix, path, tensors = "dinov2.Mask_Branch.", str(tmp_path / "MaskBranch_vits14.pt"), {}
    for key, shape in official_keys()["best_shape.pth"].items():
        if key.startswith(prefix):    # bn_t too, which nothing reads
            narrow = [32 if n == 384 else n for n in shape]    # the width of tiny-random
            tensors[key.removeprefix(prefix)] = formula(key, narrow)
    torch.save({"model": tensors, "iteration": 80000}, path)
    model = small_model(mask_warmup=7, mask_branch=path)
    own = model.sasgl.mask_branch.state_dict()
    assert all(torch.equal(x, tensors[name]) for name, x in own.items())
    warm_ups = model, small_model(mask_warmup=7), small_model(mask_warmup=7, gait=False)
    assert [m.warm_up_steps for m in warm_ups] == [0, 7, 0]


def test_tensors_of_the_authors_that_do_not_fit_are_named(tmp_path):
    files = {file: {key: looks_like(shape) for key, shape in shapes.items()}
             for file, shapes in official_keys().items()}
    appearance, shape = files["best_model.pth"], files["best_shape.pth"]
    # Another number of identities is no error: the files decide.
    appearance["BNNecks.fc_bin"] = looks_like((35, 256, 7))
    shape["dinov2.gait_net.BNNecks.fc_bin"] = looks_like((35, 256, 7))
    del appearance["FCs.fc_bin"]
    appearance["text_encoder.weight"] = looks_like((2,))
    shape["dinov2.Appearance_Branch.down_sampling.bias"] = looks_like((15,))
    for file, tensors in files.items():
        torch.save(tensors, tmp_path / file)
    with pytest.raises(UserError) as error, torch.device("meta"):    # shapes alone
        load_release(ThreeStreams, tmp_path)    # a changed DinoGRL, too
    message = str(error.value)
    for words in ("missing, such as best_model.pth: FCs.fc_bin",
                  "1 tensors are surplus, such as best_model.pth: text_encoder.weight",
                  "such as best_shape.pth: dinov2.Appearance_Branch.down_sampling.bias"):
        assert words in message
    assert "\n" not in message
