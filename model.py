"""DinoGRL assembled: appearance stream, gait stream, parts, PBMGE, heads, identity losses (section 3.1 and 3.4).

    frames (B,T,3,256,128), modality (B,)
       |-- visible stem | infrared stem -> shared ResNet-50 layer1..4 -> (B,T,2048,16,8) -> parts (B,31,256) --+
       |                                                                                                PBMGE (pbmge.py)
       +-- SASGL (sasgl.py): silhouette, codes, gait net ------------> (B,T,2048,16,8) -> parts (B,31,256) --+
                                                                                                              |
    test:  embed()   -> (B, 70, 256), 35 gait parts first, compared by the mean Euclidean distance   <--------+
    train: forward() -> named losses: four of SASGL, identity and triplet of both streams            <--------+

The two modalities meet early: only the stem (conv1, bn1, maxpool) is the modality's own.

load_official(dir) reads the authors' three files (best_model.pth, best_model2.pth, best_shape.pth) into this model;
OFFICIAL below is the whole key map.

Quick question: why does the stem have no ReLU, though ResNet-50's has one? (The release leaves it out, and its weights
were trained so. With one, the released checkpoints would give other embeddings.)

Ours, not the paper's: thinner and shallower ResNets for the offline demo (`width`, `blocks`, `strides`); triplets are
taken for any number of tracklets per identity; ablations (`gait`, `pbmge` off) as switches.
"""
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data import UserError, gathered, option
from pbmge import PBMGE
from sasgl import SASGL, conv_norm, fill, load_dinov2, misfits, read_tensors, state_dict

RESNET50_URL = "https://download.pytorch.org/models/resnet50-0676ba61.pth"    # ImageNet V1, as in the release


# ------------------------------------------------------------- ResNet-50 ----

class Bottleneck(nn.Module):
    recomputable = True    # train.recompute

    def __init__(self, in_channels, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or in_channels != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, 4 * width, 1, stride, bias=False),
                                            nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = F.relu(conv_norm(x, self.conv1, self.bn1), inplace=True)
        y = F.relu(conv_norm(y, self.conv2, self.bn2), inplace=True)
        return F.relu(conv_norm(y, self.conv3, self.bn3) + (x if self.downsample is None else conv_norm(x, *self.downsample)), inplace=True)


class Stem(nn.Module):
    """One modality's own entrance: (N, 3, H, W) -> (N, width, H/4, W/4). No ReLU, as released."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.max_pool2d(conv_norm(x, self.conv1, self.bn1), 3, 2, 1)


class Stages(nn.Module):
    """layer1..layer4 of a ResNet with torchvision's tensor names: (N, width, H, W) -> (N, 32 * width, h, w)."""

    def __init__(self, *, width, blocks, strides):
        super().__init__()
        channels = width
        for i, (n, stride) in enumerate(zip(blocks, strides)):
            layer = []
            for j in range(n):
                layer.append(Bottleneck(channels, width * 2 ** i, stride if j == 0 else 1))
                channels = 4 * width * 2 ** i
            setattr(self, f"layer{i + 1}", nn.Sequential(*layer))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


# ------------------------------------------------------- parts and heads ----

class Parts(nn.Module):
    """Maps (B, T, C, H, W) -> parts (B, P, dim): max over time, strips from top to bottom, mean + max, one Linear each."""

    def __init__(self, *, channels, dim, strips):
        super().__init__()
        self.strips = strips
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(sum(strips), channels, dim)))

    def forward(self, maps):
        maps = maps.amax(1)    # (B, C, H, W)
        B, C, H, W = maps.shape
        assert H % max(self.strips) == 0, f"maps of height {H} cannot be cut into {max(self.strips)} strips"
        pooled = []
        for n in self.strips:
            strips = maps.reshape(B, C, n, -1)
            pooled.append(strips.mean(-1) + strips.amax(-1))    # (B, C, n)
        pooled = torch.cat(pooled, dim=2)    # (B, C, P)
        return torch.einsum("bcp,pcd->bpd", pooled, self.weight)


class Head(nn.Module):
    """Parts (B, P, D) -> cosine logits (B, P, classes): BatchNorm over all P*D values, then both sides L2-normalised."""

    def __init__(self, *, parts, dim, classes):
        super().__init__()
        self.bn = nn.BatchNorm1d(parts * dim)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(parts, dim, classes)))

    def forward(self, parts):
        with torch.autocast(parts.device.type, enabled=False):    # cosines of 256 bfloat16 numbers are too coarse
            B, P, D = parts.shape
            x = self.bn(parts.float().transpose(1, 2).reshape(B, -1)).view(B, D, P)    # channel-major, as released
            return torch.einsum("bdp,pdk->bpk", F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


def identity_loss(logits, label):
    """Cosine logits (B, P, classes), label (B,) -> cross-entropy of 16 * logits, smoothing 0.1, mean over B and P."""
    return F.cross_entropy(16 * logits.transpose(1, 2), label[:, None].expand(-1, logits.shape[1]), label_smoothing=0.1)


def triplet_loss(parts, label, margin=0.2):
    """Parts (B, P, D), label (B,) -> scalar. Per part, every anchor, all its positives (itself included) against all
    its negatives, Euclidean; mean over the terms that are not zero, then over the parts."""
    x = parts.float().transpose(0, 1)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")    # (P, B, B)
    same = label[:, None] == label[None, :]
    anchor, positive = same.nonzero(as_tuple=True)    # (M,) pairs
    terms = F.relu(distance[:, anchor, positive][:, :, None] - distance[:, anchor] + margin) * ~same[anchor]    # (P, M, B)
    return (terms.sum((1, 2)) / (terms != 0).sum((1, 2)).clamp(min=1)).mean()


# ---------------------------------------------------------------- DinoGRL ----

class DinoGRL(nn.Module):
    """The whole method. classes: training identities. dinov2: see sasgl.load_dinov2. strips: the pyramid of parts.

    width, blocks, strides: of both ResNets, (64, (3, 4, 6, 3), (1, 2, 2, 1)) being ResNet-50 with last stride 1;
    gait_strides: the gait net's own, as its maps start at code_size. gait, pbmge: False removes the part (ablation).
    """

    def __init__(self, *, classes, dinov2, dim=256, strips=(1, 2, 4, 8, 16), width=64, blocks=(3, 4, 6, 3),
                 strides=(1, 2, 2, 1), gait_strides=(1, 2, 2, 1), dino_size=(448, 224), code_size=(64, 32),
                 gait=True, pbmge=True):
        super().__init__()
        parts = sum(strips) + (len(strips) - 1 if gait and pbmge else 0)    # 35 = 31 + 4 refined
        self.classes = classes
        self.warm_up_stage = None    # (module, steps, learning rate): trained alone before the rest, on the losses of warm_up()
        self.visible_stem, self.infrared_stem = Stem(width), Stem(width)
        self.backbone = Stages(width=width, blocks=blocks, strides=strides)
        self.appearance_parts = Parts(channels=32 * width, dim=dim, strips=strips)
        self.appearance_head = Head(parts=parts, dim=dim, classes=classes)
        self.sasgl = self.pbmge = None
        if gait:
            self.sasgl = SASGL(dinov2=dinov2, backbone=Stages(width=width, blocks=blocks, strides=gait_strides),
                               width=width, dino_size=dino_size, code_size=code_size)
            self.gait_parts = Parts(channels=32 * width, dim=dim, strips=strips)
            self.gait_head = Head(parts=parts, dim=dim, classes=classes)
            if pbmge:
                self.pbmge = PBMGE(dim=dim, strips=strips)

    def streams(self, frames, modality):
        """frames (B, T, 3, H, W) normalised, modality (B,) 0 visible, 1 infrared, best on the CPU -> {stream: parts (B, P, D)}, View."""
        B, T = frames.shape[:2]
        order = modality.argsort(stable=True)    # visible tracklets first, each through its own stem
        visible = T * (modality == 0).sum().item()    # a GPU need not be waited for where modality lies on the CPU
        sorted_frames = frames[order.to(frames.device, non_blocking=True)].flatten(0, 1).contiguous(memory_format=torch.channels_last)    # convolutions like it
        maps = torch.cat([self.visible_stem(sorted_frames[:visible]), self.infrared_stem(sorted_frames[visible:])])
        appearance = self.appearance_parts(self.backbone(maps).unflatten(0, (B, T)))[order.argsort().to(frames.device, non_blocking=True)]
        if self.sasgl is None:
            return {"appearance": appearance}, None
        gait_maps, view = self.sasgl(frames)
        gait = self.gait_parts(gait_maps)
        if self.pbmge is not None:
            gait, appearance = self.pbmge(gait, appearance)
        return {"gait": gait, "appearance": appearance}, view

    def embed(self, frames, modality):
        """frames (B, T, 3, H, W), modality (B,) -> (B, parts, dim) float32, gait parts first; (B, 70, 256) in the paper."""
        return torch.cat(list(self.streams(frames, modality)[0].values()), dim=1).float()

    def forward(self, frames, modality, label):
        """Training step: -> named losses (weighted: the total is their sum), and what the progress bar shows."""
        streams, view = self.streams(frames, modality)
        losses, shown = dict(view.losses) if view else {}, {}
        label = gathered(label)    # tracklets are compared with those of all processes
        for name, parts in streams.items():
            parts = gathered(parts)
            logits = getattr(self, f"{name}_head")(parts)
            losses[f"identity_{name}"] = identity_loss(logits, label)
            losses[f"triplet_{name}"] = triplet_loss(parts, label)
            shown[f"accuracy_{name}"] = (logits.detach().argmax(2) == label[:, None]).float().mean()
        return losses, shown

    def warm_up(self, frames):
        """frames (B, T, 3, H, W) -> the mask bottleneck's losses alone, for the steps before the rest may use it."""
        return self.sasgl.mask_losses(self.sasgl.features(frames.flatten(0, 1))[0])[1]

    def parameter_groups(self):
        """-> groups for the optimizer, each with its factor on the learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "factor": 1}]


# --------------------------------------------------------- configuration ----

@dataclass
class Options:
    """DinoGRL's own choices, beside those that every method has (train.Config)."""
    gait: bool = option(True, "off removes SASGL and the gait stream: the appearance baseline")
    pbmge: bool = option(True, "off removes the fusion: two independent streams")
    dinov2: str = option("dinov2_vits14", "dinov2_vits14, _vitb14, _vitl14 (each also with _reg), or tiny: random, offline")
    dinov2_weights: str = option("", "local file of the official DINOv2 tensors, instead of torch.hub")
    resnet_weights: str = option("imagenet", "imagenet (downloaded once), a file of torchvision's resnet50, or random")
    mask_branch: str = option("", "BigGait's MaskBranch_vits14.pt; without it the mask bottleneck is warmed up first")
    mask_warmup: int = option(500, "steps for the mask bottleneck alone where no --mask-branch is given; more if silhouettes "
                                   "come out as blocks of background", 0)
    mask_lr: float = option(1e-2, "Adam's rate in that warm-up, falling linearly to 0", 1e-12)
    dim: int = option(256, "channels D of a part", 1)
    width: int = option(64, "channels of the ResNets' stem; 64 is ResNet-50, and the only one ImageNet weights fit", 1)
    blocks: tuple = option((3, 4, 6, 3), "blocks of layer1..layer4", 1)
    strides: tuple = option((1, 2, 2, 1), "strides of layer1..layer4; last stride 1 keeps 16 rows for 16 strips", 1)
    gait_strides: tuple = option((1, 2, 2, 1), "the same for the gait net, which starts at code_size", 1)
    dino_size: tuple = option((448, 224), "what DINOv2 sees, multiples of 14; smaller is faster and blurs the silhouettes", 1)
    code_size: tuple = option((64, 32), "height and width of silhouettes and codes", 1)

    # A laptop's CPU, minutes: a tiny ViT, thin one-block ResNets, small frames.
    small = dict(epochs=6, steps=60, identities=8, tracklets=2, frames=4, warmup_epochs=0, milestones=(4, 5), lr=3e-3,
                 size=(64, 32), workers=0, dinov2="tiny", resnet_weights="random", mask_warmup=60, erase=0.0, mask_lr=5e-2,
                 dim=64, width=8, blocks=(1, 1, 1, 1), strides=(1, 1, 1, 1), gait_strides=(2, 1, 1, 1), dino_size=(336, 168),
                 code_size=(32, 16))

    def check(self):
        """Raises UserError for a configuration that cannot work."""
        for name, height, strides in (("size", self.size[0] / 4, "strides"), ("code-size", self.code_size[0], "gait_strides")):
            rows = height / math.prod(getattr(self, strides))
            if rows % 16 and (self.gait or name == "size"):
                raise UserError(f"--{name} and --{strides.replace('_', '-')} leave maps of {rows:g} rows; expected a multiple of the 16 strips")
        if self.gait and (self.dino_size[0] % 14 or self.dino_size[1] % 14):
            raise UserError(f"--dino-size {self.dino_size}; expected multiples of 14, DINOv2's patch")


# ---------------------------------------------------------------- weights ----

def build(config, classes, pretrained=True, cls=DinoGRL):
    """A DinoGRL (or a subclass: cls) as the configuration (train.Config with Options) says. pretrained=False: random, to be
    filled."""
    dinov2 = load_dinov2(config.dinov2, config.dinov2_weights, pretrained) if config.gait else None
    model = cls(classes=classes, dinov2=dinov2, dim=config.dim, width=config.width, blocks=config.blocks,
                strides=config.strides, gait_strides=config.gait_strides, dino_size=config.dino_size,
                code_size=config.code_size, gait=config.gait, pbmge=config.pbmge)
    if pretrained and config.resnet_weights != "random":
        load_resnet50(model, config.resnet_weights)
    if pretrained and config.mask_branch and config.gait:
        load_mask_branch(model, config.mask_branch)
    elif config.gait and config.mask_warmup:
        model.warm_up_stage = (model.sasgl.mask_branch, config.mask_warmup, config.mask_lr)
    return model


def load_resnet50(model, source):
    """torchvision's resnet50 tensors into both stems, the shared stages and the gait net's own copy.

    source: "imagenet" (downloaded once and cached, hash checked) or a file. The classifier fc.* is not used."""
    if source == "imagenet":
        try:
            tensors = torch.hub.load_state_dict_from_url(RESNET50_URL, map_location="cpu", check_hash=True,
                                                         weights_only=True)
        except Exception as error:
            raise UserError(f"ResNet-50's ImageNet weights are neither cached nor downloadable here ({type(error).__name__}); "
                            "either run once with a network, or give torchvision's file by --resnet-weights FILE, or "
                            "take --resnet-weights random (much worse)") from error
    else:
        tensors = read_tensors(source)
    tensors = {k: v for k, v in state_dict(tensors, source).items() if not k.startswith("fc.")}
    stem = {k: v for k, v in tensors.items() if not k.startswith("layer")}
    stages = {k: v for k, v in tensors.items() if k.startswith("layer")}
    for module, part in [(model.visible_stem, stem), (model.infrared_stem, stem), (model.backbone, stages)] + (
            [(model.sasgl.gait_net.backbone, stages)] if model.sasgl else []):
        fill(module, part, f"{source} (as ResNet-50)")


def load_mask_branch(model, path):
    """BigGait's released mask branch (MaskBranch_vits14.pt, under the key `model`; its bn_t is not used)."""
    tensors = read_tensors(path)
    if not isinstance(tensors, dict) or "model" not in tensors:
        raise UserError(f"{path} has no key `model`; expected BigGait's MaskBranch file; see README, Weights")
    fill(model.sasgl.mask_branch, {k: v for k, v in state_dict(tensors["model"], path).items() if not k.startswith("bn_t.")}, path)


# The authors' files: (their prefix, ours). Longest first where one begins another.
OFFICIAL = {
    "best_model.pth": [
        ("image_encoder1.resnet_conv.0.", "visible_stem.conv1."), ("image_encoder1.resnet_conv.1.", "visible_stem.bn1."),
        ("image_encoder2.resnet_conv.0.", "infrared_stem.conv1."), ("image_encoder2.resnet_conv.1.", "infrared_stem.bn1."),
        *((f"share_encoder.resnet_conv.{i}.", f"backbone.layer{i + 1}.") for i in range(4)),
        ("FCs.fc_bin", "appearance_parts.weight"), ("BNNecks.fc_bin", "appearance_head.weight"),
        ("BNNecks.bn1d.", "appearance_head.bn.")],
    "best_model2.pth": [
        ("enhance_shape_net_3.g.0.", "pbmge.enhance_gait.g."), ("enhance_shape_net_3.", "pbmge.enhance_gait."),
        ("enhance_app_net_3.g.0.", "pbmge.enhance_appearance.g."), ("enhance_app_net_3.", "pbmge.enhance_appearance.")],
    "best_shape.pth": [
        ("dinov2.dinov2.", "sasgl.dinov2."), ("dinov2.Mask_Branch.", "sasgl.mask_branch."),
        ("dinov2.Denoising_Branch.", "sasgl.denoising_branch."), ("dinov2.Appearance_Branch.", "sasgl.appearance_branch."),
        *((f"dinov2.gait_net.{theirs}.forward_block.{a}", f"sasgl.gait_net.{ours}.{b}")
          for theirs, ours in (("pre_part", "denoising_stem"), ("pre_rgb", "appearance_stem"))
          for a, b in (("conv1.conv.", "conv."), ("bn1.", "bn."), ("layer1.0.", "block."))),
        ("dinov2.gait_net.fusion.conv.forward_block.", "sasgl.gait_net.fusion.score."),
        *((f"dinov2.gait_net.post_backbone.resnet_conv.{i}.", f"sasgl.gait_net.backbone.layer{i + 1}.") for i in range(4)),
        ("dinov2.gait_net.FCs.fc_bin", "gait_parts.weight"), ("dinov2.gait_net.BNNecks.fc_bin", "gait_head.weight"),
        ("dinov2.gait_net.BNNecks.bn1d.", "gait_head.bn.")]}
# Tensors that the files hold and the released network never reads.
UNUSED = {"best_model.pth": ["share_encoder.GAP.p"], "best_model2.pth": [],
          "best_shape.pth": ["dinov2.gait_net.post_backbone.GAP.p",
                             *(f"dinov2.{branch}.bn_t.{k}" for branch in ("Mask_Branch", "Denoising_Branch")
                               for k in ("running_mean", "running_var", "num_batches_tracked"))]}


def load_official(folder):
    """The authors' three files in `folder` -> a DinoGRL in eval mode that gives exactly their embeddings.

    The class count is the files' own. gcn_* tensors are ignored. Raises UserError that lists every other missing,
    surplus or misshapen tensor under the authors' name."""
    paths = {name: os.path.join(folder, name) for name in OFFICIAL}
    files = {name: state_dict(read_tensors(path), path) for name, path in paths.items()}
    try:
        classes = files["best_model.pth"]["BNNecks.fc_bin"].shape[2]
    except (KeyError, IndexError):
        raise UserError(f"{folder}/best_model.pth has no BNNecks.fc_bin (parts, dim, classes); expected the authors' "
                        "appearance file") from None
    model = DinoGRL(classes=classes, dinov2=load_dinov2("dinov2_vits14", pretrained=False))

    own = model.state_dict()
    tensors, wrong = {}, []
    for name, rules in OFFICIAL.items():
        theirs = {}    # the authors' name of each tensor of ours that this file holds
        for key in own:
            rule = next(((a, b) for a, b in rules if key.startswith(b)), None)
            if rule:
                theirs[rule[0] + key[len(rule[1]):]] = key
        held = {k: v for k, v in files[name].items() if ".gcn_" not in k}
        shapes = {k: own[t].shape for k, t in theirs.items()} | dict.fromkeys(UNUSED[name])
        wrong += [f"{name}: {misfit}" for misfit in misfits(held, shapes)]
        tensors.update({t: held.get(k) for k, t in theirs.items()})
    if wrong:
        raise UserError(f"{folder} does not fit the released DinoGRL: {'; '.join(wrong)}")
    model.load_state_dict(tensors)    # strict: every tensor of ours came from one of the files
    return model.eval()
