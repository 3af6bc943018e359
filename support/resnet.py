"""ResNet-50 (He et al., CVPR 2016) in the two pieces that DinoGRL uses, with torchvision's tensors.

    (N,3,256,128) -> Stem: conv1, bn1, maxpool -> (N,64,64,32) -> Stages: layer1..4 -> (N,2048,16,8)

Each modality has its own stem, and both share one set of stages; the gait net has its own stages.
The last stride is 1: re-identification needs the finer map.
The stem has no ReLU, though ResNet-50's has one: the release leaves it out.
"""
from functools import partial

from support.weights import download, load_strictly, read_pretrained

import torch
import torch.nn.functional as F
from torch import nn

RESNET50_URL = "https://download.pytorch.org/models/resnet50-0676ba61.pth"
Conv = partial(nn.Conv2d, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut: (N, width, H, W) -> the same shape."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = Conv(width, width, 3, padding=1)
        self.conv2 = Conv(width, width, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(x + y, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a shortcut: (N, in_channels, H, W) -> (N, 4*width, h, w)."""

    def __init__(self, in_channels, width, stride):
        super().__init__()
        self.conv1 = Conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv(width, width, 3, stride, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = Conv(width, 4 * width, 1)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or in_channels != 4 * width:
            self.downsample = nn.Sequential(
                Conv(in_channels, 4 * width, 1, stride), nn.BatchNorm2d(4 * width))

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
        self.conv1 = Conv(3, width, 7, 2, 3)
        self.bn1 = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.max_pool2d(self.bn1(self.conv1(x)), 3, 2, 1)


class Stages(nn.Sequential):
    """layer1..layer4: (N, width, H, W) -> (N, out_channels, h, w). ResNet-50 with last stride 1 is
    width 64, blocks (3, 4, 6, 3) and strides (1, 2, 2, 1), one number for each layer."""

    def __init__(self, *, width, blocks, strides):
        super().__init__()
        channels = width
        for i, (number, stride) in enumerate(zip(blocks, strides, strict=True)):
            layer = []
            for j in range(number):
                layer.append(Bottleneck(channels, width * 2 ** i, stride if j == 0 else 1))
                channels = 4 * width * 2 ** i
            self.add_module(f"layer{i + 1}", nn.Sequential(*layer))
        self.out_channels = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def load_resnet50(source, stems, stages):
    """Load torchvision's resnet50 into each of the stems and of the stages. source: "imagenet"
    (downloaded once and cached) or a file. Raises UserError."""
    if source == "imagenet":
        tensors = download(
            "ResNet-50 (ImageNet)", "give torchvision's file by --resnet-weights FILE, or take "
            "--resnet-weights random (much worse)", torch.hub.load_state_dict_from_url,
            RESNET50_URL, map_location="cpu", check_hash=True, weights_only=True)
    else:
        tensors = read_pretrained(source)
    for module in [*stems, *stages]:
        prefixes = tuple(f"{name}." for name, _ in module.named_children())
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
        load_strictly(module, own, f"{source} (as ResNet-50)")
