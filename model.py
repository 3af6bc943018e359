"""DinoGRL assembled: two streams, parts, fusion, heads, losses (sections 3.1 and 3.4).

    frames (B,T,3,256,128), modality (B,)
       |-- visible_stem | infrared_stem -> backbone, shared: (B,T,2048,16,8)
       |                                     -> appearance_parts (B,31,256) --+
       |                                                                    pbmge -> 35 + 35 parts
       +-- sasgl: silhouettes, codes, gait net: (B,T,2048,16,8)               |
                                             -> gait_parts (B,31,256) --------+
    embed()    (test)  -> (B, 70, 256), gait parts first; distance: mean over parts, Euclidean
    forward()  (train) -> gait_head, appearance_head -> losses_of each stream, and sasgl's own

The two modalities meet early: only the stem is a modality's own. All of DinoGRL's modelling of time
is a maximum over the frames, as in GaitSet: what shows in any frame counts, in whichever order.

load_official(dir) reads the authors' three files (best_model.pth, best_model2.pth, best_shape.pth)
into this model; OFFICIAL below is the whole map of their names.

Quick question: why 16 times the cosine in the identity loss? (A softmax over 500 cosines between -1
and 1 is flat: the right class could never get more than 1.5 % of it, and nothing would be learned.)

Ours, not the paper's: thinner and shallower ResNets and fewer strips for the offline demo (`width`,
`blocks`, `strides`, `strips`); triplets are taken for any number of tracklets per identity;
ablations (`gait`, `pbmge` off) as switches.
"""
import math
import os
from dataclasses import dataclass

from pbmge import PBMGE
from sasgl import SASGL
from support.dinov2 import check_dino_size, load_dinov2
from support.files import UserError
from support.options import option
from support.parallel import gathered
from support.resnet import Stages, Stem, load_resnet50
from support.weights import load_strictly, misfits, named_tensors, read_tensors

import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------- parts and heads ----

class Parts(nn.Module):
    """Maps (B, T, C, H, W) -> parts (B, P, dim): maximum over time, strips from top to bottom, mean
    + maximum of each, a linear map of its own for each."""

    def __init__(self, *, channels, dim, strips):
        super().__init__()
        self.strips = strips
        weight = torch.empty(sum(strips), channels, dim)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(weight))

    def forward(self, maps):
        maps = maps.amax(1)    # (B, C, H, W)
        B, C, H, W = maps.shape
        assert H % max(self.strips) == 0, f"maps of height {H} for {max(self.strips)} strips"
        pooled = []
        for n in self.strips:
            strips = maps.reshape(B, C, n, -1)
            pooled.append(strips.mean(-1) + strips.amax(-1))    # (B, C, n)
        return torch.einsum("bcp,pcd->bpd", torch.cat(pooled, dim=2), self.weight)


class Head(nn.Module):
    """Parts (B, P, D) -> cosine logits (B, P, classes): batch norm over all P*D values, then
    features and class weights L2-normalised."""

    def __init__(self, *, parts, dim, classes):
        super().__init__()
        self.bn = nn.BatchNorm1d(parts * dim)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(parts, dim, classes)))

    def forward(self, parts):
        B, P, D = parts.shape
        with torch.autocast(parts.device.type, enabled=False):    # bfloat16 is too coarse
            x = parts.float().transpose(1, 2).reshape(B, -1)    # channel-major, as released
            x = F.normalize(self.bn(x).view(B, D, P), dim=1)
            return torch.einsum("bdp,pdk->bpk", x, F.normalize(self.weight, dim=1))


def identity_loss(logits, label):
    """Cosine logits (B, P, classes), label (B,) -> cross-entropy of 16 * logits, smoothing 0.1,
    mean over B and P."""
    label = label[:, None].expand(-1, logits.shape[1])
    return F.cross_entropy(16 * logits.transpose(1, 2), label, label_smoothing=0.1)


def triplet_loss(parts, label, margin=0.2):
    """Parts (B, P, D), label (B,) -> scalar. Per part, every anchor, all its positives (itself
    included) against all its negatives, Euclidean; mean over the terms that are not zero, then over
    the parts."""
    x = parts.float().transpose(0, 1)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")    # (P, B, B)
    same = label[:, None] == label
    anchor, positive = same.nonzero(as_tuple=True)    # (M,) pairs
    to_positive = distance[:, anchor, positive][:, :, None]    # (P, M, 1)
    to_everyone = distance[:, anchor]    # (P, M, B)
    terms = F.relu(to_positive - to_everyone + margin) * ~same[anchor]
    count = (terms != 0).sum((1, 2)).clamp(min=1)
    return (terms.sum((1, 2)) / count).mean()


# ---------------------------------------------------------------- options ----

@dataclass
class Options:
    """DinoGRL's own choices (train.Config has those that every method has)."""
    dinov2: str = option(
        "dinov2_vits14",
        "which DINOv2; vitb14 is slower and needs a new run; tiny is small, for trying out")
    dinov2_weights: str = option("", "local file of DINOv2's tensors, instead of the download")
    resnet_weights: str = option(
        "imagenet", "imagenet (download), a local file, or random (much worse)")
    mask_branch: str = option("", "BigGait's MaskBranch_vits14.pt; spares the warm-up")
    mask_warmup: int = option(
        250, "steps that train the mask bottleneck alone, before the rest may use it; after 30 "
        "some silhouettes are inverted, after 500 they are no better (docs/weights.md)",
        least=0, most=1_000_000)
    mask_lr: float = option(1e-2, "learning rate of that warm-up", least=1e-12, most=100)
    gait: bool = option(True, "off removes the whole gait stream")
    pbmge: bool = option(True, "off removes the fusion of the streams")
    margin: float = option(0.2, "of the triplet loss", least=0, most=100)
    identity_weight: float = option(1.0, "of both streams' identity losses", least=0, most=1000)
    triplet_weight: float = option(1.0, "of both streams' triplet losses", least=0, most=1000)
    dim: int = option(256, "numbers per part", least=1, most=4096)
    strips: tuple = option(
        (1, 2, 4, 8, 16),
        "horizontal strips of each granularity, the global part first; the largest divides the "
        "rows of the maps")
    width: int = option(
        64, "channels of both ResNets after the stem; 64 is ResNet-50", least=1, most=512)
    blocks: tuple = option((3, 4, 6, 3), "blocks of their four layers", least=0, most=100)
    strides: tuple = option(
        (1, 2, 2, 1), "strides of the appearance ResNet's four layers", least=1, most=4)
    gait_strides: tuple = option(
        (1, 2, 2, 1), "strides of the gait ResNet's four layers", least=1, most=4)
    dino_size: tuple = option(
        (448, 224),
        "height and width that DINOv2 sees, multiples of 14; smaller is faster and blurs the "
        "silhouettes", least=14, most=4480)
    code_size: tuple = option(
        (64, 32), "height and width of silhouettes and codes", least=1, most=1024)

    # Not a field (it has no annotation): the values that --preset small sets, in these options and
    # in train.Config's. A laptop's CPU, minutes: a tiny distilled ViT, thin one-block ResNets,
    # small frames.
    small = {"epochs": 6, "steps": 85, "identities": 8, "tracklets": 1, "frames": 3,
             "test_frames": 8, "evaluate_every": 2, "workers": 0, "warmup_epochs": 0,
             "milestones": (4, 5), "lr": 5e-3, "size": (128, 64), "erase": 0.0, "dinov2": "tiny",
             "resnet_weights": "random", "mask_warmup": 80, "mask_lr": 5e-2, "dim": 64, "width": 8,
             "blocks": (1, 1, 1, 1), "strips": (1, 2, 4, 8), "strides": (1, 1, 2, 1),
             "gait_strides": (2, 1, 1, 1), "dino_size": (336, 168), "code_size": (32, 16)}

    def check(self):
        """Raises UserError for a configuration that cannot work. train.py joins Options and its
        Config into one dataclass, so self.size is there."""
        starts_global = self.strips[:1] == (1,)
        if not starts_global or len(self.strips) > 10 or not all(0 < n <= 256 for n in self.strips):
            raise UserError(f"--strips {' '.join(map(str, self.strips))}; expected 1, the global "
                            "part, and then how many strips of each granularity, such as 1 2 4 8 "
                            "16")
        if self.gait and self.pbmge and len(self.strips) == 1:
            raise UserError("--strips 1 leaves PBMGE no strip to read; expected more "
                            "granularities, such as 1 2 4 8 16, or --pbmge off")
        rows = self.size[0] / 4    # the stem divides by 4
        self.check_rows(rows, self.strides, "--size and --strides")
        if self.gait:
            self.check_rows(self.code_size[0], self.gait_strides, "--code-size and --gait-strides")
            check_dino_size(self.dino_size)

    def check_rows(self, rows, strides, options):
        """Can maps of so many rows, after these strides, be cut into strips? options: the ones that
        decide it. Raises UserError."""
        rows, strips = rows / math.prod(strides), max(self.strips)
        if rows % strips:
            raise UserError(f"{options} leave maps of {rows:g} rows; expected a multiple of the "
                            f"{strips} strips")


# ---------------------------------------------------------------- DinoGRL ----

class DinoGRL(nn.Module):
    """The whole method. config: Options, or train's configuration, which has them too. classes:
    number of training identities. pretrained: False for random tensors, to be filled by a
    checkpoint."""
    Options = Options    # train.py asks the class for its options

    def __init__(self, config, classes, pretrained=True):
        super().__init__()
        self.config = config
        width, blocks, dim, strips = config.width, config.blocks, config.dim, config.strips
        refined = len(strips) - 1 if config.gait and config.pbmge else 0
        self.n_parts = sum(strips) + refined    # of a stream: 35 = 31 + 4
        self.visible_stem, self.infrared_stem = Stem(width), Stem(width)
        self.backbone = Stages(width=width, blocks=blocks, strides=config.strides)
        channels = self.backbone.out_channels    # 2048
        self.appearance_parts = Parts(channels=channels, dim=dim, strips=strips)
        self.appearance_head = Head(parts=self.n_parts, dim=dim, classes=classes)
        self.sasgl = self.pbmge = None
        if config.gait:
            dinov2 = load_dinov2(config.dinov2, config.dinov2_weights, pretrained)
            stages = Stages(width=width, blocks=blocks, strides=config.gait_strides)
            self.sasgl = SASGL(dinov2=dinov2, backbone=stages, width=width,
                               dino_size=config.dino_size, code_size=config.code_size)
            self.gait_parts = Parts(channels=channels, dim=dim, strips=strips)
            self.gait_head = Head(parts=self.n_parts, dim=dim, classes=classes)
        if config.gait and config.pbmge:
            self.pbmge = PBMGE(dim=dim, strips=strips)
        if pretrained:
            self.load_pretrained()

    def load_pretrained(self):
        """ResNet-50 for every stem and stage, and the mask bottleneck where there is a trained
        one."""
        config, stages = self.config, [self.backbone]
        if config.gait:
            stages.append(self.sasgl.gait_net.backbone)
        if config.resnet_weights != "random":
            load_resnet50(config.resnet_weights, [self.visible_stem, self.infrared_stem], stages)
        if config.gait and config.mask_branch:
            load_mask_branch(self.sasgl.mask_branch, config.mask_branch)

    def appearance_maps(self, frames, modality):
        """Frames (B, T, 3, H, W), modality (B,) -> maps (B, T, C, h, w), the visible tracklets
        first, and the index (B,) that puts them back in order. Each modality goes through its own
        stem, then all through one backbone. modality: best on the CPU, where nobody waits for a
        GPU to count the visible ones."""
        B, T = frames.shape[:2]
        order = modality.argsort(stable=True)    # visible tracklets first
        n_visible = T * (modality == 0).sum().item()    # frames
        frames = frames[order.to(frames.device)].flatten(0, 1)
        frames = frames.contiguous(memory_format=torch.channels_last)    # convolutions like it
        stems = [self.visible_stem(frames[:n_visible]), self.infrared_stem(frames[n_visible:])]
        maps = self.backbone(torch.cat(stems)).unflatten(0, (B, T))
        back = order.argsort().to(frames.device)
        return maps, back

    def parts_by_stream(self, frames, modality):
        """Frames (B, T, 3, H, W) normalised, modality (B,) 0 visible, 1 infrared -> {stream: parts
        (B, P, D)}, sasgl's Codes or None."""
        maps, back = self.appearance_maps(frames, modality)
        appearance = self.appearance_parts(maps)[back]
        if self.sasgl is None:
            return {"appearance": appearance}, None
        gait_maps, codes = self.sasgl(frames)
        gait = self.gait_parts(gait_maps)
        if self.pbmge is not None:
            gait, appearance = self.pbmge(gait, appearance)
        return {"gait": gait, "appearance": appearance}, codes

    def embed(self, frames, modality):
        """Frames (B, T, 3, H, W), modality (B,) -> (B, parts, dim) float32, gait parts first; (B,
        70, 256) in the paper."""
        streams, _ = self.parts_by_stream(frames, modality)
        return torch.cat(list(streams.values()), dim=1).float()

    def streams_of(self, embeddings):
        """Embeddings (N, 70, dim) -> {stream: its own (N, 35, dim)}: what each knows alone. Empty
        unless there are two such halves: the gait stream may be off, and a subclass may embed
        another number of parts."""
        if embeddings.shape[1] != 2 * self.n_parts:
            return {}
        gait, appearance = embeddings.split(self.n_parts, dim=1)
        return {"gait": gait, "appearance": appearance}

    def strips_of(self, values):
        """A value for each part, (70,) -> {stream: those of its narrowest strips, (16,), from top
        to bottom}: which part of the body speaks for a match? For pictures."""
        strips = self.config.strips
        narrowest = slice(sum(strips[:-1]), sum(strips))    # behind them stand the refined parts
        streams = self.streams_of(values[None, :, None])
        return {name: own[0, narrowest, 0] for name, own in streams.items()}

    def losses_of(self, parts, logits, label, modality):
        """One stream's named losses, weighted. The place for a loss of your own: parts (B, P, D),
        cosine logits (B, P, classes), label (B,), modality (B,) of the whole batch."""
        identity = identity_loss(logits, label)
        triplet = triplet_loss(parts, label, self.config.margin)
        return {"identity": self.config.identity_weight * identity,
                "triplet": self.config.triplet_weight * triplet}

    def forward(self, frames, modality, label):
        """Training step -> named losses (weighted: the total is their sum), and what else to
        show."""
        streams, codes = self.parts_by_stream(frames, modality)
        losses = dict(codes.losses) if codes else {}
        shown = {}
        # Tracklets are compared with those of all processes.
        label, modality = gathered(label), gathered(modality.to(label.device))
        for stream, parts in streams.items():
            parts = gathered(parts)    # (world * B, P, D), gradients included
            logits = self.get_submodule(f"{stream}_head")(parts)
            for name, loss in self.losses_of(parts, logits, label, modality).items():
                losses[f"{name}_{stream}"] = loss
            is_right = logits.detach().argmax(2) == label[:, None]
            shown[f"accuracy_{stream}"] = is_right.float().mean()
        return losses, shown

    # ---- what train.py asks of a method besides ----

    @property
    def warm_up_steps(self):
        """How many steps warm_up_module is trained alone, before the rest may use it."""
        if self.sasgl is None or self.config.mask_branch:
            return 0
        return self.config.mask_warmup

    @property    # an attribute would be a second name, and be saved twice
    def warm_up_module(self):
        return self.sasgl.mask_branch

    @property
    def warm_up_lr(self):
        return self.config.mask_lr

    def warm_up_losses(self, frames):
        """Frames (B, T, 3, H, W) -> the mask bottleneck's named losses."""
        last, _ = self.sasgl.features(frames.flatten(0, 1))
        return self.sasgl.mask_and_losses(last)[1]

    def parameter_groups(self):
        """-> groups for the optimizer, each with its factor on the learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "factor": 1}]


# --------------------------------------------------------- released files ----

def load_mask_branch(mask_branch, path):
    """BigGait's released mask branch (MaskBranch_vits14.pt, under the key `model`; its bn_t is
    unused)."""
    tensors = read_tensors(path)
    if not isinstance(tensors, dict) or "model" not in tensors:
        raise UserError(f"{path} has no key `model`; expected BigGait's MaskBranch file; see "
                        "docs/weights.md")
    tensors = named_tensors(tensors["model"], path)
    used = {name: tensor for name, tensor in tensors.items() if not name.startswith("bn_t.")}
    load_strictly(mask_branch, used, path)


# The authors' files. A tensor's name begins with one of these prefixes, there and here; the rest of
# the name is the same: {file: {their prefix: our prefix}}.
OFFICIAL = {
    "best_model.pth": {
        "image_encoder1.resnet_conv.0.": "visible_stem.conv1.",
        "image_encoder1.resnet_conv.1.": "visible_stem.bn1.",
        "image_encoder2.resnet_conv.0.": "infrared_stem.conv1.",
        "image_encoder2.resnet_conv.1.": "infrared_stem.bn1.",
        "share_encoder.resnet_conv.0.": "backbone.layer1.",
        "share_encoder.resnet_conv.1.": "backbone.layer2.",
        "share_encoder.resnet_conv.2.": "backbone.layer3.",
        "share_encoder.resnet_conv.3.": "backbone.layer4.",
        "FCs.fc_bin": "appearance_parts.weight",
        "BNNecks.fc_bin": "appearance_head.weight",
        "BNNecks.bn1d.": "appearance_head.bn."},
    "best_model2.pth": {
        # The first of our prefixes that fits is taken: so enhance_gait.g. stands before
        # enhance_gait., with which it begins.
        "enhance_shape_net_3.g.0.": "pbmge.enhance_gait.g.",
        "enhance_shape_net_3.": "pbmge.enhance_gait.",
        "enhance_app_net_3.g.0.": "pbmge.enhance_appearance.g.",
        "enhance_app_net_3.": "pbmge.enhance_appearance."},
    "best_shape.pth": {
        "dinov2.dinov2.": "sasgl.dinov2.",
        "dinov2.Mask_Branch.": "sasgl.mask_branch.",
        "dinov2.Denoising_Branch.": "sasgl.denoising_branch.",
        "dinov2.Appearance_Branch.": "sasgl.appearance_branch.",
        "dinov2.gait_net.pre_part.forward_block.conv1.conv.": "sasgl.gait_net.denoising_stem.conv.",
        "dinov2.gait_net.pre_part.forward_block.bn1.": "sasgl.gait_net.denoising_stem.bn.",
        "dinov2.gait_net.pre_part.forward_block.layer1.0.": "sasgl.gait_net.denoising_stem.block.",
        "dinov2.gait_net.pre_rgb.forward_block.conv1.conv.": "sasgl.gait_net.appearance_stem.conv.",
        "dinov2.gait_net.pre_rgb.forward_block.bn1.": "sasgl.gait_net.appearance_stem.bn.",
        "dinov2.gait_net.pre_rgb.forward_block.layer1.0.": "sasgl.gait_net.appearance_stem.block.",
        "dinov2.gait_net.fusion.conv.forward_block.": "sasgl.gait_net.fusion.score.",
        "dinov2.gait_net.post_backbone.resnet_conv.0.": "sasgl.gait_net.backbone.layer1.",
        "dinov2.gait_net.post_backbone.resnet_conv.1.": "sasgl.gait_net.backbone.layer2.",
        "dinov2.gait_net.post_backbone.resnet_conv.2.": "sasgl.gait_net.backbone.layer3.",
        "dinov2.gait_net.post_backbone.resnet_conv.3.": "sasgl.gait_net.backbone.layer4.",
        "dinov2.gait_net.FCs.fc_bin": "gait_parts.weight",
        "dinov2.gait_net.BNNecks.fc_bin": "gait_head.weight",
        "dinov2.gait_net.BNNecks.bn1d.": "gait_head.bn."}}

# Tensors that the files hold and the released network never reads.
UNUSED = {
    "best_model.pth": ["share_encoder.GAP.p"],
    "best_model2.pth": [],
    "best_shape.pth": ["dinov2.gait_net.post_backbone.GAP.p"] + [
        f"dinov2.{branch}.bn_t.{name}" for branch in ("Mask_Branch", "Denoising_Branch")
        for name in ("running_mean", "running_var", "num_batches_tracked")]}


def official_names(own_names, prefixes):
    """own_names: of all our tensors. prefixes: one file's of OFFICIAL -> {the authors' name: our
    name} of the tensors that this file should hold."""
    names = {}
    for own in own_names:
        for theirs, ours in prefixes.items():
            if own.startswith(ours):
                names[theirs + own.removeprefix(ours)] = own
                break
    return names


def load_official(folder):
    """The authors' three files in `folder` -> a DinoGRL in eval mode that gives exactly their
    embeddings.

    The number of classes is read from the files. Tensors with .gcn_ in their name are ignored: they
    belong to layers that the released network never calls, and not every file holds them. Raises
    UserError that lists every other missing, surplus or misshapen tensor under the authors'
    name."""
    paths = {name: os.path.join(folder, name) for name in OFFICIAL}
    files = {name: named_tensors(read_tensors(path), path) for name, path in paths.items()}
    try:
        classes = files["best_model.pth"]["BNNecks.fc_bin"].shape[2]
    except (KeyError, IndexError):
        raise UserError(f"{paths['best_model.pth']} has no BNNecks.fc_bin (parts, dim, classes); "
                        "expected the authors' appearance file") from None
    model = DinoGRL(Options(), classes, pretrained=False)

    own, tensors, wrong = model.state_dict(), {}, []
    for file, prefixes in OFFICIAL.items():
        held = {name: tensor for name, tensor in files[file].items() if ".gcn_" not in name}
        names = official_names(own, prefixes)    # theirs -> ours
        wanted = {theirs: own[ours] for theirs, ours in names.items()}
        for name in UNUSED[file]:
            wanted[name] = None    # must be there, in any shape
        wrong += [f"{file}: {line}" for line in misfits(held, wanted)]
        tensors.update({ours: held.get(theirs) for theirs, ours in names.items()})
    if wrong:
        raise UserError(f"{folder} does not fit the released DinoGRL: {'; '.join(wrong)}")
    model.load_state_dict(tensors)    # strict: every tensor of ours came from one of the files
    return model.eval()
