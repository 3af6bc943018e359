"""DINOv2: the official tensors, the literal network, and where its weights come from."""
import warnings

from golden import formula, official_keys
from support.dinov2 import DINOV2, DinoVisionTransformer, load_dinov2
from support.files import UserError
from support.resnet import load_resnet50

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

OFFICIAL = [name for name in DINOV2 if name.startswith("dinov2_")]
PARAMETERS = {"vits14": 22_056_576, "vitb14": 86_580_480, "vitl14": 304_368_640}


def official_shapes(name):
    """Names and shapes of an official file. The authors' files hold those of vits14; the other
    variants differ in width, number of blocks and register tokens."""
    dim, depth, _, registers = DINOV2[name]
    shapes = {"register_tokens": (1, registers, dim)} if registers else {}
    for key, shape in official_keys()["best_shape.pth"].items():
        own = key.removeprefix("dinov2.dinov2.")
        wide = tuple(n * dim // 384 if n % 384 == 0 else n for n in shape)
        if own != key and not own.startswith("blocks."):
            shapes[own] = wide
        if own.startswith("blocks.0."):
            shapes |= {own.replace("0", str(i), 1): wide for i in range(depth)}
    return shapes


@pytest.fixture(params=OFFICIAL[:2])
def narrow(request, monkeypatch):
    """The name of a variant, without and with registers, that is quick to write: two narrow
    blocks."""
    monkeypatch.setitem(DINOV2, request.param, (16, 2, 2, DINOV2[request.param][3]))
    return request.param


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_variant_has_the_official_tensors(name):
    dim, depth, heads, registers = DINOV2[name]
    with torch.device("meta"):    # shapes alone: vitl14 has 300 million parameters
        vit = DinoVisionTransformer(dim=dim, depth=depth, heads=heads, registers=registers)
    shapes = {key: tuple(tensor.shape) for key, tensor in vit.state_dict().items()}
    assert shapes == official_shapes(name)
    _, variant, *is_reg = name.split("_")
    assert registers == 4 * len(is_reg) and dim == 64 * heads
    number = sum(p.numel() for p in vit.parameters())
    assert number == PARAMETERS[variant] + registers * dim


def literal_tokens(vit, image):
    """One frame (1, 3, 28, 42) -> tokens (10, 8): CLS, registers, patches."""
    projection, grid = vit.patch_embed.proj, vit.pos_embed[0, 1:].t().unflatten(1, (37, 37))
    # Positions of register models: bicubic with antialiasing, which Pillow has too.
    smaller = [np.asarray(Image.fromarray(channel).resize((3, 2), Image.Resampling.BICUBIC))
               for channel in grid.detach().numpy()]
    positions = torch.from_numpy(np.stack(smaller)).flatten(1).t()    # (6, 8)
    pixels = F.unfold(image, 14, stride=14)[0].t()    # (6, 3 * 14 * 14)
    patches = pixels @ projection.weight.flatten(1).t() + projection.bias
    first = vit.cls_token[0] + vit.pos_embed[0, :1]
    return torch.cat([first, vit.register_tokens[0], patches + positions])


def literal_block(block, x):
    """Tokens (L, 8) -> (L, 8), by two heads of 4 dimensions."""
    q, k, v = block.attn.qkv(block.norm1(x)).split(8, dim=1)
    heads = [torch.softmax(q[:, s] @ k[:, s].t() / 2, dim=1) @ v[:, s]
             for s in (slice(0, 4), slice(4, 8))]
    x = x + block.ls1.gamma * block.attn.proj(torch.cat(heads, dim=1))
    return x + block.ls2.gamma * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def test_tokens_against_a_literal_vit():
    torch.manual_seed(0)
    vit = DinoVisionTransformer(dim=8, depth=2, heads=2, registers=3).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.randn(1, 3, 28, 42)
    got = vit.get_intermediate_layers(image, n=[0, 1], norm=False)
    last, = vit.get_intermediate_layers(image, n=[1])
    x = literal_tokens(vit, image)
    for block, tokens in zip(vit.blocks, got, strict=True):
        x = literal_block(block, x)
        torch.testing.assert_close(tokens[0], x[4:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last[0], vit.norm(x[4:]), rtol=1e-4, atol=1e-4)


def hugging_face(official):
    """The official tensors under the names of Hugging Face's Dinov2Model, which has a tensor each
    for query, key and value."""
    parts = {"cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token",
             "register_tokens": "embeddings.register_tokens",
             "pos_embed": "embeddings.position_embeddings",
             "patch_embed.proj": "embeddings.patch_embeddings.projection",
             "blocks": "encoder.layer", "attn.proj": "attention.output.dense",
             "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
    renamed = {}
    for name, tensor in official.items():
        name = f"layer{name}" if name.startswith("norm.") else name
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        if "attn.qkv" in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.attention.{part}")] = third.clone()
        else:
            renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("prefix", ["", "dinov2."])
def test_a_local_file_with_the_official_names_or_hugging_face_s(narrow, prefix, tmp_path):
    official = {key: formula(key, shape) for key, shape in official_shapes(narrow).items()}
    theirs = {prefix + key: tensor for key, tensor in hugging_face(official).items()}
    of_a_key = f"{prefix}encoder.layer.1.attention.attention.key.weight"
    assert of_a_key in theirs and len(theirs) == len(official) + 2 * 4    # 3 tensors for 1
    file = tmp_path / "dino.pth"
    for tensors in (official, theirs):
        torch.save(tensors, file)
        vit = load_dinov2(narrow, file)
        assert not any(p.requires_grad for p in vit.parameters()) and not vit.training
        torch.testing.assert_close(dict(vit.state_dict()), official, rtol=0, atol=0)
    del theirs[of_a_key]
    torch.save(theirs, file)
    with pytest.raises(UserError, match="blocks.1.attn.qkv.weight"):
        load_dinov2(narrow, file)


def test_no_network_is_one_clear_error_with_the_ways_out(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "load", offline)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="--dinov2-weights FILE.*--dinov2 tiny"):
        load_dinov2("dinov2_vits14")
    with pytest.raises(UserError, match="--resnet-weights FILE"):
        load_resnet50("imagenet", [], [])


def test_hub_is_pinned_and_quiet(narrow, monkeypatch, recwarn):
    asked, (dim, depth, heads, registers) = {}, DINOV2[narrow]
    given = DinoVisionTransformer(dim=dim, depth=depth, heads=heads, registers=registers)

    def hub(repo, name, **kwargs):
        warnings.warn("xFormers is not available (SwiGLU)", stacklevel=1)
        asked.update(kwargs, repo=repo, name=name)
        return given
    monkeypatch.setattr(torch.hub, "load", hub)
    assert torch.equal(load_dinov2(narrow).pos_embed, given.pos_embed)
    assert asked == {"name": narrow, "skip_validation": True, "trust_repo": True,
                     "repo": "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"}
    assert not recwarn.list


@pytest.mark.parametrize("name", ["tiny", "tiny-random"])
def test_a_tiny_one_is_the_same_in_every_run_and_leaves_chance_alone(name):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = load_dinov2(name).state_dict()
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    torch.testing.assert_close(load_dinov2(name).state_dict(), one, rtol=0, atol=0)
