"""DinoGRL assembled: two streams, parts, fusion, heads, losses (sections 3.1 and 3.4).

    frames (B,T,3,256,128), modality (B,)
       |-- AppearanceStream: visible_stem | infrared_stem -> shared backbone: (B,T,2048,16,8)
       |                       -> parts (B,31,256) --+
       |                                           pbmge -> 35 + 35 parts
       +-- GaitStream: sasgl: silhouettes, codes,    |
                 gait net: (B,T,2048,16,8)           |
                       -> parts (B,31,256) ----------+
    embed()    (test)  -> (B, 70, 256), gait parts first; distance: mean over parts, Euclidean
    forward()  (train) -> each stream's head and losses_of, and sasgl's own losses

The two modalities meet early: only the stem belongs to one modality. DinoGRL models time by a
maximum over the frames, as GaitSet does: the order of the frames does not matter.

Quick question: why 16 times the cosine in the identity loss? (A softmax over 500 cosines between -1
and 1 is flat: the right class could never get more than 1.5 % of it, and nothing would be learned.)

Ours, not the paper's: thinner and shallower ResNets and fewer strips for the offline demo (`width`,
`blocks`, `strides`, `strips`); triplets are taken for any number of tracklets per identity;
ablations (`gait`, `pbmge` off) as switches.
"""
import math
from dataclasses import dataclass

from pbmge import PBMGE
from sasgl import SASGL
from support.dinov2 import load_dinov2
from support.files import UserError
from support.method import Method
from support.official import load_mask_branch
from support.options import option
from support.parallel import gathered
from support.resnet import Stages, Stem, load_resnet50

import torch
import torch.nn.functional as F
from torch import nn

# --------------------------------------------------- parts, heads, losses ----

class Parts(nn.Module):
    """Maps (B, T, C, H, W) -> parts (B, P, dim): one map over time, strips from top to bottom, mean
    + maximum of each, a linear map of its own for each. rows: H. Raises UserError."""

    def __init__(self, *, channels, dim, strips, rows):
        super().__init__()
        if any(n < 1 or rows % n for n in strips):
            raise UserError(f"strips {strips} of maps of {rows:g} rows; expected divisors of the "
                            "rows: change strips, strides, or the size of frames and codes")
        self.strips = strips
        weight = torch.empty(sum(strips), channels, dim)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(weight))

    def over_time(self, maps):
        """Maps (B, T, C, H, W) -> (B, C, H, W). T differs between training and test."""
        return maps.amax(1)

    def forward(self, maps):
        maps = self.over_time(maps)    # (B, C, H, W)
        mean, top = maps.mean(3), maps.amax(3)    # of each row, (B, C, H)
        pooled = [mean.unflatten(2, (n, -1)).mean(3) + top.unflatten(2, (n, -1)).amax(3)
                  for n in self.strips]    # (B, C, n)
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
    is_triplet = same[:, :, None] & ~same[:, None]    # (anchor, positive, negative), (B, B, B)
    terms = F.relu(distance[:, :, :, None] - distance[:, :, None] + margin) * is_triplet
    count = (terms != 0).sum((1, 2, 3)).clamp(min=1)
    return (terms.sum((1, 2, 3)) / count).mean()    # of (P, B, B, B)


# ---------------------------------------------------------------- options ----

@dataclass
class Options:
    """DinoGRL's own choices (train.Config has those that every method has)."""
    dinov2: str = option("dinov2_vits14", "which DINOv2; tiny is small, for trying out")
    dinov2_weights: str = option("", "local file of DINOv2's tensors, instead of the download")
    resnet_weights: str = option("imagenet", "imagenet (download), a file, or random (much worse)")
    mask_branch: str = option("", "BigGait's MaskBranch_vits14.pt; spares the warm-up")
    mask_warmup: int = option(250, "steps that train the mask bottleneck alone (docs/weights.md)")
    mask_lr: float = option(1e-2, "learning rate of that warm-up")
    gait: bool = option(True, "off removes the whole gait stream")
    pbmge: bool = option(True, "off removes the fusion of the streams")
    dim: int = option(256, "numbers per part")
    strips: tuple = option((1, 2, 4, 8, 16), "horizontal strips of each granularity, 1 first")
    width: int = option(64, "channels of both ResNets after the stem; 64 is ResNet-50")
    blocks: tuple = option((3, 4, 6, 3), "blocks of their four layers")
    strides: tuple = option((1, 2, 2, 1), "strides of the appearance ResNet's four layers")
    gait_strides: tuple = option((1, 2, 2, 1), "strides of the gait ResNet's four layers")
    dino_size: tuple = option((448, 224), "what DINOv2 sees; smaller is faster and blurs")
    code_size: tuple = option((64, 32), "height and width of silhouettes and codes")


# ---------------------------------------------------------------- streams ----

class AppearanceStream(nn.Module):
    """Frames (B, T, 3, H, W), modality (B,) -> parts (B, P, D), no losses of its own. A stream has
    a `head` for `n_parts` parts; `refined` of them are appended by PBMGE."""

    def __init__(self, options, classes, size, refined):
        super().__init__()
        o = options
        self.visible_stem, self.infrared_stem = Stem(o.width), Stem(o.width)
        self.backbone = Stages(width=o.width, blocks=o.blocks, strides=o.strides)
        rows = size[0] / 4 / math.prod(o.strides)    # the stem divides by 4
        self.parts = Parts(channels=self.backbone.out_channels, dim=o.dim, strips=o.strips,
                           rows=rows)
        self.n_parts = sum(o.strips) + refined    # 35 = 31 + 4
        self.head = Head(parts=self.n_parts, dim=o.dim, classes=classes)

    def forward(self, frames, modality):
        """Each modality goes through its own stem, then all through one backbone. modality: best on
        the CPU, so that nothing waits for a GPU to count the visible tracklets."""
        B, T = frames.shape[:2]
        order = modality.argsort(stable=True)    # visible tracklets first
        n_visible = T * (modality == 0).sum().item()    # frames
        frames = frames[order.to(frames.device, non_blocking=True)].flatten(0, 1)
        frames = frames.contiguous(memory_format=torch.channels_last)    # convolutions like it
        stems = [self.visible_stem(frames[:n_visible]), self.infrared_stem(frames[n_visible:])]
        maps = self.backbone(torch.cat(stems)).unflatten(0, (B, T))    # (B, T, C, h, w)
        back = order.argsort().to(frames.device, non_blocking=True)
        return self.parts(maps)[back], {}


class GaitStream(nn.Module):
    """Frames (B, T, 3, H, W) -> parts (B, P, D), SASGL's losses. prior: see SASGL. Another method
    can use it as it is, with a warm-up of its mask bottleneck (see DinoGRL)."""

    def __init__(self, options, classes, prior, refined=0):
        super().__init__()
        o = options
        backbone = Stages(width=o.width, blocks=o.blocks, strides=o.gait_strides)
        self.sasgl = SASGL(prior=prior, backbone=backbone, width=o.width, dino_size=o.dino_size,
                           code_size=o.code_size)
        rows = o.code_size[0] / math.prod(o.gait_strides)
        self.parts = Parts(channels=backbone.out_channels, dim=o.dim, strips=o.strips, rows=rows)
        self.n_parts = sum(o.strips) + refined
        self.head = Head(parts=self.n_parts, dim=o.dim, classes=classes)

    def forward(self, frames, modality=None):
        """modality: not used, gait is the same in both."""
        maps, losses = self.sasgl(frames)
        return self.parts(maps), losses

    def warm_up_losses(self, frames):
        """Frames (B, T, 3, H, W) -> the mask bottleneck's named losses."""
        last, _ = self.sasgl.features(frames.flatten(0, 1))
        return self.sasgl.mask_and_loss(last)[1]


# ---------------------------------------------------------------- DinoGRL ----

class DinoGRL(Method):
    """The whole method, see Method. A third stream is one more entry of `streams`."""
    Options = Options
    # A laptop's CPU, minutes: a tiny distilled ViT, thin one-block ResNets, small frames. Values of
    # train.Config and of Options together: each takes its own.
    small = {"epochs": 6, "steps": 85, "identities": 8, "tracklets": 1, "frames": 2,
             "test_frames": 8, "workers": 0, "warmup_epochs": 0, "milestones": (4, 5), "lr": 5e-3,
             "size": (128, 64), "erase": 0.0, "dinov2": "tiny", "resnet_weights": "random",
             "mask_warmup": 30, "mask_lr": 5e-2, "dim": 64, "width": 8, "blocks": (1, 1, 1, 1),
             "strips": (1, 2, 4, 8), "strides": (1, 1, 2, 1), "gait_strides": (2, 1, 1, 1),
             "dino_size": (336, 168), "code_size": (32, 16)}

    def __init__(self, options, classes, size, pretrained=True):
        super().__init__()
        self.options = o = options
        if o.width < 8:    # oneDNN's, with channels last: they write beyond their memory
            raise UserError(f"width {o.width}; expected 8 or more: torch's strided convolutions of "
                            "fewer channels can crash on a CPU")
        if o.strips[:1] != (1,) or (o.gait and o.pbmge and len(o.strips) == 1):
            raise UserError(f"strips {o.strips}; expected 1, the global part, then the strips of "
                            "each granularity, such as 1 2 4 8 16")
        refined = len(o.strips) - 1 if o.gait and o.pbmge else 0
        appearance = AppearanceStream(o, classes, size, refined)
        streams = {"appearance": appearance}
        if o.gait:    # its parts come first, as in the release
            streams = {"gait": GaitStream(o, classes, self.prior(), refined), **streams}
            self.frozen = ("streams.gait.sasgl.prior",)    # not in checkpoints
            self.warm_up_module = "streams.gait.sasgl.mask_branch"
            self.warm_up_steps = 0 if o.mask_branch else o.mask_warmup
            self.warm_up_lr = o.mask_lr
        self.streams = nn.ModuleDict(streams)
        self.pbmge = PBMGE(dim=o.dim, strips=o.strips) if refined else None
        if pretrained and o.resnet_weights != "random":
            stages = [appearance.backbone]
            if o.gait:
                stages.append(self.sasgl.gait_net.backbone)
            load_resnet50(o.resnet_weights, [appearance.visible_stem, appearance.infrared_stem],
                          stages)
        if pretrained and o.gait and o.mask_branch:
            load_mask_branch(self.sasgl.mask_branch, o.mask_branch)

    def prior(self):
        """The frozen network that SASGL sees through. Override it for another one."""
        return load_dinov2(self.options.dinov2, self.options.dinov2_weights)

    def parts_by_stream(self, frames, modality):
        """Frames (B, T, 3, H, W) normalised, modality (B,) 0 visible, 1 infrared -> {stream: parts
        (B, P, D)}, the streams' own losses."""
        parts, losses = {}, {}
        for name, stream in self.streams.items():
            parts[name], own_losses = stream(frames, modality)
            losses |= own_losses
        return parts, losses

    def fused(self, parts):
        """{stream: parts (B, P, D)} -> the same with the refined parts of two streams."""
        if self.pbmge is not None:
            refined = self.pbmge(parts["gait"], parts["appearance"])
            parts = parts | dict(zip(("gait", "appearance"), refined, strict=True))
        return parts

    def embed(self, frames, modality):
        """-> (B, parts, dim) float32, gait parts first; (B, 70, 256) in the paper."""
        parts, _ = self.parts_by_stream(frames, modality)
        return torch.cat(list(self.fused(parts).values()), dim=1).float()

    def streams_of(self, embeddings):
        sizes = [stream.n_parts for stream in self.streams.values()]
        if len(sizes) < 2 or embeddings.shape[1] != sum(sizes):    # a subclass's own
            return {}
        return dict(zip(self.streams, embeddings.split(sizes, dim=1), strict=True))

    def losses_of(self, parts, logits, label, modality):
        """One stream's named losses, weighted. The place for a loss of your own: parts (B, P, D),
        cosine logits (B, P, classes), label (B,), modality (B,) of the whole batch."""
        return {"identity": identity_loss(logits, label), "triplet": triplet_loss(parts, label)}

    def forward(self, frames, modality, label):
        parts, losses = self.parts_by_stream(frames, modality)
        shown = {}
        # Tracklets are compared with those of all processes: (world * B, P, D).
        streams = self.fused({name: gathered(own) for name, own in parts.items()})
        label, modality = gathered(label), gathered(modality.to(label.device, non_blocking=True))
        for name, parts in streams.items():
            logits = self.streams[name].head(parts)
            for kind, loss in self.losses_of(parts, logits, label, modality).items():
                losses[f"{kind}_{name}"] = loss
            is_right = logits.detach().argmax(2) == label[:, None]
            shown[f"accuracy_{name}"] = is_right.float().mean()
        return losses, shown

    @property
    def of_identities(self):
        return tuple(f"streams.{name}.head" for name in self.streams)

    @property
    def whole_batch(self):    # given the gathered batch: batch norms that need no synchronising
        return self.of_identities + ("pbmge",) * (self.pbmge is not None)

    @property
    def sasgl(self):
        return self.streams["gait"].sasgl if "gait" in self.streams else None

    def seen(self, frames):
        """See Method.seen. Of a denoising or appearance code equal colours are equal codes."""
        if self.sasgl is None:
            return {}, []
        codes, _ = self.sasgl.encode(frames.flatten(0, 1))
        maps = self.sasgl.gait_net(codes.denoising, codes.appearance)
        maps = maps - maps.mean(0)    # what differs from frame to frame
        return {"DINOv2 tokens": codes.last.permute(0, 3, 1, 2), "channel 0": codes.mask[:, 0],
                "channel 1": codes.mask[:, 1], "body probability": codes.body,
                "silhouette": codes.silhouette, "denoising code": codes.denoising,
                "appearance code": codes.appearance, "gait maps": maps}, []

    def warm_up_losses(self, frames):
        return self.streams["gait"].warm_up_losses(frames)


if __name__ == "__main__":    # the losses on a few walkers, untrained
    from walkers import show_losses

    show_losses(DinoGRL)
