"""DinoGRL assembled: weights in, shapes out, losses by loops, ablations, ideas of your own."""
import itertools
from dataclasses import replace

from golden import formula, official_keys
from model import AppearanceStream, DinoGRL, GaitStream, Options, Parts, identity_loss, triplet_loss
from sasgl import MaskBranch
from support.dinov2 import load_dinov2
from support.files import UserError
from support.method import Method
from support.official import load_mask_branch
from support.resnet import Stages, Stem, load_resnet50
from support.weights import digests, rebuild, without_frozen

import pytest
import torch

SIZE = 64, 32
SMALL = Options(width=8, blocks=(1, 1, 1, 1), strides=(1, 1, 1, 1), gait_strides=(1, 1, 1, 1),
                dim=16, dino_size=(224, 112), code_size=(16, 8), dinov2="tiny-random",
                resnet_weights="random")
FRAMES = torch.randn(4, 2, 3, *SIZE, generator=torch.Generator().manual_seed(2))
MODALITY, LABEL = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])


def small_model(method=DinoGRL, **changes):
    torch.manual_seed(0)
    return method(replace(SMALL, **changes), 5, SIZE)


def training_step(model):
    """-> named losses, what else is shown."""
    torch.manual_seed(1)
    return model.train()(FRAMES, MODALITY, LABEL)


@torch.no_grad()
def embedding_of(model):
    return model.eval().embed(FRAMES, MODALITY)


def saved(tensors, path):
    torch.save(tensors, path)
    return str(path)


# ------------------------------------------------------------ shapes, parts ----

@torch.no_grad()
def test_embedding_does_not_depend_on_the_batch_or_its_order():
    model = small_model().eval()
    frames, modality = torch.randn(5, 2, 3, *SIZE), torch.tensor([1, 0, 1, 1, 0])
    together = model.embed(frames, modality)
    # One modality, a batch of one.
    alone = [model.embed(frames[i:i + 1], modality[i:i + 1]) for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    later = model.embed(frames.flip(1), modality)
    torch.testing.assert_close(together, later, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_each_modality_has_its_own_stem():
    model = small_model().eval()
    stream = model.streams["appearance"]
    by_day, by_night = torch.tensor([0]), torch.tensor([1])
    frames = FRAMES[:1]
    assert not torch.allclose(model.embed(frames, by_day), model.embed(frames, by_night))
    stream.infrared_stem.load_state_dict(stream.visible_stem.state_dict())
    assert torch.equal(model.embed(frames, by_day), model.embed(frames, by_night))


@pytest.mark.parametrize("switches, parts", [
    ({}, 35), ({"pbmge": False}, 31), ({"strips": (1, 2, 4, 8)}, 18), ({"gait": False}, 31)])
def test_ablations_remove_parts_and_losses(switches, parts):
    model = small_model(**switches)
    streams = ["gait", "appearance"] if model.options.gait else ["appearance"]
    expected = {f"{loss}_{name}" for loss in ("identity", "triplet") for name in streams}
    if model.options.gait:
        expected |= {"mask", "smooth_part", "diversity"}
    losses, shown = training_step(model)
    assert losses.keys() == expected
    assert shown.keys() == {f"accuracy_{name}" for name in streams}
    sum(losses.values()).backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, f"no gradient reaches {idle}"

    embedding = embedding_of(model)
    assert embedding.shape == (4, len(streams) * parts, 16)
    with torch.no_grad():
        by_stream, own_losses = model.parts_by_stream(FRAMES, MODALITY)
    assert torch.equal(torch.cat(list(by_stream.values()), dim=1), embedding)
    assert own_losses == {}
    if model.options.gait:
        named = model.streams_of(embedding)
        assert list(named) == streams
        assert all(torch.equal(named[name], by_stream[name]) for name in streams)


def test_the_narrowest_strips_of_each_stream_are_named():
    """Of 1 + 2 + 4 + 8 + 16 parts and 4 refined ones, twice: the 16 before the refined ones."""
    strips = small_model().strips_of(torch.arange(70.0))
    assert {name: values.tolist() for name, values in strips.items()} == {
        "gait": list(range(15, 31)), "appearance": list(range(50, 66))}


def test_strips_run_from_top_to_bottom_and_time_is_a_maximum():
    maps = torch.zeros(1, 3, 1, 16, 8)
    maps[0, 1, 0, :4] = 2    # one frame, top quarter
    parts = Parts(channels=1, dim=1, strips=(1, 2, 4, 8, 16), rows=16)
    torch.nn.init.ones_(parts.weight)
    got = parts(maps)[0, :, 0].tolist()
    # Mean + maximum of each strip.
    want = [2.5], [3, 0], [4, 0, 0, 0], [4, 4] + [0] * 6, [4] * 4 + [0] * 12
    assert got == sum(want, [])


@pytest.mark.parametrize("changes", [
    {"strips": ()}, {"strips": (1,)}, {"strips": (2, 4)}, {"strips": (1, 0)}, {"strips": (1, 3)},
    {"strips": (1, 32)}, {"code_size": (24, 8)}, {"strides": (1, 2, 1, 1)}])
def test_strips_that_do_not_divide_the_maps_are_refused(changes):
    with pytest.raises(UserError, match="strips"):
        small_model(**changes)


# ------------------------------------------------------------------- losses ----

def test_triplet_loss_against_loops_with_uneven_identities():
    torch.manual_seed(0)
    parts, label = torch.randn(6, 3, 4) * 0.2, torch.tensor([0, 1, 0, 2, 0, 1])
    per_part = []
    for p in range(3):
        terms = []
        for anchor, positive, negative in itertools.product(range(6), repeat=3):
            if label[anchor] == label[positive] and label[anchor] != label[negative]:
                near = (parts[anchor, p] - parts[positive, p]).norm()
                far = (parts[anchor, p] - parts[negative, p]).norm()
                terms.append(max(0.0, (near - far + 0.2).item()))
        active = [term for term in terms if term > 0]
        per_part.append(sum(active) / max(1, len(active)))
    assert triplet_loss(parts, label).item() == pytest.approx(sum(per_part) / 3, rel=1e-5)
    x = parts.clone().requires_grad_()
    # The anchor as its own positive is at distance 0, where the root has no slope.
    triplet_loss(x, label).backward()
    assert x.grad.isfinite().all()


def test_losses_of_sees_the_whole_batch_and_is_weighted_by_the_options():
    seen = []

    class Watching(DinoGRL):
        def losses_of(self, parts, logits, label, modality):
            seen.append((parts, logits, label, modality))
            return super().losses_of(parts, logits, label, modality)
    model = small_model(Watching, identity_weight=0.5, triplet_weight=3.0, margin=0.7)
    losses, shown = training_step(model)
    for stream, (parts, logits, label, modality) in zip(model.streams, seen, strict=True):
        assert parts.shape == (4, 35, 16) and logits.shape == (4, 35, 5)
        assert torch.equal(label, LABEL) and torch.equal(modality, MODALITY)
        identity, triplet = identity_loss(logits, label), triplet_loss(parts, label, margin=0.7)
        assert torch.equal(losses[f"identity_{stream}"], 0.5 * identity)
        assert torch.equal(losses[f"triplet_{stream}"], 3 * triplet)
        is_right = logits.argmax(2) == label[:, None]
        assert shown[f"accuracy_{stream}"] == is_right.float().mean()


# ------------------------------------------------------- ideas of your own ----

class Centred(DinoGRL):
    """Parts are drawn to their identity's centre, instead of the triplet loss."""

    def losses_of(self, parts, logits, label, modality):
        same = (label[:, None] == label).float()
        share = same / same.sum(1, keepdim=True)    # (B, B)
        centre = torch.einsum("ab,bpd->apd", share, parts)
        losses = super().losses_of(parts, logits, label, modality)
        return {**losses, "triplet": (parts - centre).norm(dim=2).mean()}


def test_a_subclass_changes_exactly_the_loss_that_it_replaces():
    losses, _ = training_step(small_model())
    own_losses, _ = training_step(small_model(Centred))
    assert own_losses.keys() == losses.keys()
    changed = {name for name in losses if not torch.equal(losses[name], own_losses[name])}
    assert changed == {"triplet_gait", "triplet_appearance"}


class Top(AppearanceStream):
    """The upper half of the frames, cut into other strips."""

    def __init__(self, options, classes, size):
        super().__init__(replace(options, strips=(1, 4)), classes, size, refined=0)

    def forward(self, frames, modality):
        return super().forward(frames[..., :32, :], modality)


class ThreeStreams(DinoGRL):
    def __init__(self, options, classes, size, pretrained=True):
        super().__init__(options, classes, size, pretrained)
        self.streams["top"] = Top(options, classes, size)


def test_a_third_stream_is_one_more_entry():
    model = small_model(ThreeStreams)
    losses, shown = training_step(model)
    assert "triplet_top" in losses and "accuracy_top" in shown
    sum(losses.values()).backward()
    assert model.streams["top"].head.weight.grad.abs().sum() > 0
    parts = model.streams_of(embedding_of(model))
    sizes = {name: tuple(own.shape) for name, own in parts.items()}
    assert sizes == {"gait": (4, 35, 16), "appearance": (4, 35, 16), "top": (4, 5, 16)}
    assert torch.equal(torch.cat(list(parts.values()), dim=1), embedding_of(model))
    strips = model.strips_of(torch.arange(75.0))
    assert strips["gait"].tolist() == list(range(15, 31))
    assert strips["appearance"].tolist() == list(range(50, 66))


class GaitAlone(Method):
    """Another method with the gait stream as a part."""
    Options = Options

    def __init__(self, options, classes, size, pretrained=True):
        super().__init__()
        self.gait = GaitStream(options, classes, load_dinov2(options.dinov2))

    def embed(self, frames, modality):
        return {"gait": self.gait(frames)[0]}

    def forward(self, frames, modality, label):
        parts, losses = self.gait(frames)
        return {**losses, "identity": identity_loss(self.gait.head(parts), label)}, {}


def test_the_gait_stream_is_a_part_of_another_method():
    model = small_model(GaitAlone)
    model.gait.warm_up_losses(FRAMES)["mask"].backward()
    warmed = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(warmed) == 4 and all(name.startswith("gait.sasgl.mask_branch") for name in warmed)
    losses, _ = training_step(model)
    sum(losses.values()).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    assert not any(name.startswith("gait.sasgl.prior") for name in trained)
    assert model.streams_of(embedding_of(model))["gait"].shape == (4, 31, 16)


class Prior(torch.nn.Module):
    """The least that SASGL can see through: patches of 16 pixels, four linear blocks."""
    patch_size, embed_dim = 16, 6

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 6, 16, 16)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(4))
        self.norm = torch.nn.LayerNorm(6)

    def get_intermediate_layers(self, x, n, norm):
        x, layers = self.patches(x).flatten(2).transpose(1, 2), []
        for block in self.blocks:
            x = block(x)
            layers.append(x)
        return [layers[i] for i in n]


class Through(DinoGRL):
    seed = 1

    def prior(self):
        torch.manual_seed(self.seed)
        return Prior()


class ThroughAnother(Through):
    seed = 2


def test_another_prior_is_frozen_and_its_patch_size_is_read():
    model = small_model(Through, dino_size=(128, 64))
    last, mid4 = model.sasgl.features(FRAMES[0])
    assert last.shape == (2, 8, 4, 6) and mid4.shape == (2, 8, 4, 24)
    losses, _ = training_step(model)
    sum(losses.values()).backward()
    prior = model.sasgl.prior
    assert not prior.training and all(p.grad is None for p in prior.parameters())
    assert embedding_of(model).shape == (4, 70, 16)
    with pytest.raises(UserError, match="multiples of 16"):
        small_model(Through, dino_size=(112, 56))
    with pytest.raises(UserError, match="multiples of 14"):
        small_model(dino_size=(128, 64))


def test_a_checkpoint_leaves_the_frozen_prior_out_and_refuses_another():
    model = small_model(Through, dino_size=(128, 64))
    tensors = without_frozen(model)
    prior = {name for name in model.state_dict() if name.startswith("streams.gait.sasgl.prior.")}
    assert len(prior) == 12 and tensors.keys() == model.state_dict().keys() - prior
    checkpoint = {"model": tensors, "frozen": digests(model), "classes": list("abcde")}

    def rebuilt(method):
        return rebuild(method, model.options, SIZE, checkpoint, "last.pt")
    again = rebuilt(Through).state_dict()
    assert all(torch.equal(again[name], x) for name, x in model.state_dict().items())
    with pytest.raises(UserError, match="prior"):
        rebuilt(ThroughAnother)
    del tensors["pbmge.enhance_gait.W1.0.bias"]
    with pytest.raises(UserError, match="pbmge.enhance_gait.W1.0.bias"):
        rebuilt(Through)


# ---------------------------------------------------------- pre-trained parts ----

def looks_like(shape, number=0.0):
    """A tensor of that shape, of one number: small in a file."""
    return torch.tensor(number).expand(shape)


def torchvision_resnet50():
    """The names and shapes of torchvision's file, taken from the official list of the shared
    ResNet's copy; each tensor holds a number of its own."""
    shapes = {"conv1.weight": (64, 3, 7, 7), "fc.weight": (1000, 2048), "fc.bias": (1000,)}
    stem, stages = "image_encoder1.resnet_conv.1.", "share_encoder.resnet_conv."
    for key, shape in official_keys()["best_model.pth"].items():
        if key.startswith(stem):
            shapes["bn1." + key.removeprefix(stem)] = shape
        if key.startswith(stages):
            stage, rest = key.removeprefix(stages).split(".", 1)
            shapes[f"layer{int(stage) + 1}.{rest}"] = shape
    return {name: looks_like(shape, i) for i, (name, shape) in enumerate(shapes.items())}


def test_resnet50_has_torchvision_s_tensors(tmp_path):
    tensors = torchvision_resnet50()
    assert len(tensors) == 320
    stem, stages = Stem(64), Stages(width=64, blocks=(3, 4, 6, 3), strides=(1, 2, 2, 1))
    load_resnet50(saved(tensors, tmp_path / "resnet50.pth"), [stem], [stages])
    own = {**stem.state_dict(), **stages.state_dict()}
    assert own.keys() == tensors.keys() - {"fc.weight", "fc.bias"}
    assert all((own[name] == tensors[name]).all() for name in own)
    del tensors["layer2.0.conv1.weight"]
    torn = saved(tensors, tmp_path / "torn.pth")
    with pytest.raises(UserError, match="layer2.0.conv1.weight"):
        load_resnet50(torn, [stem], [stages])


def test_both_stems_and_both_backbones_are_loaded(tmp_path):
    own = small_model(blocks=(2, 1, 3, 1), strides=(1, 2, 1, 1), strips=(1, 8)).streams
    tensors = {**own["appearance"].visible_stem.state_dict(),
               **own["appearance"].backbone.state_dict()}
    path = saved(tensors, tmp_path / "resnet.pth")
    torch.manual_seed(1)
    options = replace(SMALL, blocks=(2, 1, 3, 1), resnet_weights=path)
    model = DinoGRL(options, 5, SIZE)
    appearance = model.streams["appearance"]
    for module in (appearance.visible_stem, appearance.infrared_stem, appearance.backbone,
                   model.sasgl.gait_net.backbone):
        assert all(torch.equal(x, tensors[name]) for name, x in module.state_dict().items())


def test_no_network_for_resnet50_is_one_clear_error(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    options = replace(SMALL, resnet_weights="imagenet")
    with pytest.raises(UserError, match="--resnet-weights FILE"):
        DinoGRL(options, 5, SIZE)
    DinoGRL(options, 5, SIZE, pretrained=False)    # a checkpoint will fill it


def test_mask_branch_file(tmp_path):
    prefix = "dinov2.Mask_Branch."
    tensors = {key.removeprefix(prefix): formula(key, shape)
               for key, shape in official_keys()["best_shape.pth"].items()
               if key.startswith(prefix)}
    # BigGait's file holds it, nothing reads it.
    assert any(name.startswith("bn_t.") for name in tensors)
    contents = {"model": tensors, "iteration": 80000}
    mask_branch = MaskBranch(384)
    load_mask_branch(mask_branch, saved(contents, tmp_path / "MaskBranch_vits14.pt"))
    for name, tensor in mask_branch.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    with pytest.raises(UserError, match="model"):
        load_mask_branch(mask_branch, saved(tensors, tmp_path / "bare.pt"))


def test_a_trained_mask_branch_spares_the_warm_up(tmp_path):
    assert small_model(mask_warmup=7).warm_up_steps == 7
    assert small_model(mask_warmup=7, gait=False).warm_up_steps == 0
    trained = MaskBranch(32)    # tiny-random's width
    path = saved({"model": trained.state_dict()}, tmp_path / "mask.pt")
    model = small_model(mask_warmup=7, mask_branch=path)
    assert model.warm_up_steps == 0
    assert torch.equal(model.sasgl.mask_branch.up_sampling.weight, trained.up_sampling.weight)


# ---------------------------------------------------------- the authors' files ----

class Changed(DinoGRL):
    def __init__(self, options, classes, size, pretrained=True):
        super().__init__(options, classes, size, pretrained)
        self.temperature = torch.nn.Parameter(torch.ones(1))


def misfits(method, folder):
    with pytest.raises(UserError) as error, torch.device("meta"):    # shapes alone
        method.released(folder)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_tensor_of_the_authors_that_does_not_fit_is_named(tmp_path):
    files = {file: {key: looks_like(shape) for key, shape in shapes.items()}
             for file, shapes in official_keys().items()}

    def write():
        for file, tensors in files.items():
            torch.save(tensors, tmp_path / file)
    appearance, shape = files["best_model.pth"], files["best_shape.pth"]
    # Another number of identities: the files decide.
    appearance["BNNecks.fc_bin"] = looks_like((35, 256, 7))
    shape["dinov2.gait_net.BNNecks.fc_bin"] = looks_like((35, 256, 7))
    write()
    message = misfits(Changed, tmp_path)
    assert "temperature" in message and "best_" not in message.replace(str(tmp_path), "")

    del appearance["FCs.fc_bin"]
    appearance["text_encoder.weight"] = looks_like((2,))
    shape["dinov2.Appearance_Branch.down_sampling.bias"] = looks_like((15,))
    write()
    message = misfits(DinoGRL, tmp_path)
    for words in ("best_model.pth: FCs.fc_bin is missing",
                  "best_model.pth: text_encoder.weight is surplus",
                  "best_shape.pth: dinov2.Appearance_Branch.down_sampling.bias is (15,)"):
        assert words in message
    assert message.count("best_") == 3
    (tmp_path / "best_model2.pth").unlink()
    assert "best_model2.pth" in misfits(DinoGRL, tmp_path)
