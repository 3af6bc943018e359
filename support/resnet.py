"""ResNet-50 (He et al., CVPR 2016) in the two pieces that DinoGRL uses, with torchvision's tensors.

    (N,3,256,128) -> Stem: conv1, bn1, maxpool -> (N,64,64,32) -> Stages: layer1..4 -> (N,2048,16,8)

Each modality has its own stem, and both share one set of stages; the gait net has its own stages.
The last stride is 1: re-identification needs the finer map. The order of the layers in each class
is fixed: it decides which initial weights a seed gives.

Quick question: why does the stem have no ReLU, though ResNet-50's has one? (The release leaves it
out, and its weights were trained like that. A ReLU would change its embeddings.)

Ours, not the paper's: `width` and `blocks`, for smaller networks that a CPU trains.
"""
from functools import partial

from support.weights import download, load_strictly, read_tensors

import torch
import torch.nn.functional as F
from torch import nn

# ImageNet V1, as in the release.
RESNET50_URL = "https://download.pytorch.org/models/resnet50-0676ba61.pth"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut: (N, width, H, W) -> the same shape."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(x + y, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a shortcut: (N, in_channels, H, W) -> (N, 4*width, h, w)."""

    def __init__(self, in_channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or in_channels != 4 * width:
            convolution = nn.Conv2d(in_channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(y + shortcut, inplace=True)


class Stem(nn.Module):
    """(N, 3, H, W) -> (N, width, H/4, W/4)."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.max_pool2d(self.bn1(self.conv1(x)), 3, 2, 1)


class Stages(nn.Module):
    """layer1..layer4: (N, width, H, W) -> (N, out_channels, h, w).

    blocks, strides: one number for each layer; (3, 4, 6, 3) and (1, 2, 2, 1) with width 64 are
    ResNet-50 with last stride 1 and 2048 channels."""

    def __init__(self, *, width, blocks, strides):
        super().__init__()
        channels = width
        for i, (number, stride) in enumerate(zip(blocks, strides, strict=True)):
            layer = []
            for j in range(number):
                layer.append(Bottleneck(channels, width * 2 ** i, stride if j == 0 else 1))
                channels = 4 * width * 2 ** i
            setattr(self, f"layer{i + 1}", nn.Sequential(*layer))
        self.out_channels = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def load_resnet50(source, stems, stages):
    """Load torchvision's resnet50 into each of the stems and each of the stages.

    source: "imagenet" (downloaded once and cached) or a file. Raises UserError."""
    if source == "imagenet":
        fetch = partial(torch.hub.load_state_dict_from_url, RESNET50_URL, map_location="cpu",
                        check_hash=True, weights_only=True)
        tensors = download("ResNet-50 (ImageNet)", fetch, "give torchvision's file by "
                           "--resnet-weights FILE, or take --resnet-weights random (much worse)")
    else:
        tensors = read_tensors(source)
    pieces = [(stem, ("conv1.", "bn1.")) for stem in stems]
    pieces += [(stage, "layer") for stage in stages]
    for module, prefixes in pieces:
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
        load_strictly(module, own, f"{source} (as ResNet-50)")
