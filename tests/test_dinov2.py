"""DINOv2: the official tensors, the literal network, and where its weights come from."""
import re
import warnings

from golden import formula
from support.dinov2 import DINOV2, DinoVisionTransformer, TokenLinear, load_dinov2
from support.files import UserError

import pytest
import torch
import torch.nn.functional as F

OFFICIAL = [name for name in DINOV2 if name.startswith("dinov2_")]
TINY = [name for name in DINOV2 if name.startswith("tiny")]
FEW = {"dinov2_vits14": (16, 2, 2, 0), "dinov2_vits14_reg": (16, 2, 2, 4)}    # quick to write


def dino_shapes(dim, depth, registers):
    """Names and shapes of an official file, written down from the released state dicts."""
    block = {"norm1.weight": (dim,), "norm1.bias": (dim,),
             "attn.qkv.weight": (3 * dim, dim), "attn.qkv.bias": (3 * dim,),
             "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,),
             "ls1.gamma": (dim,),
             "norm2.weight": (dim,), "norm2.bias": (dim,),
             "mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,),
             "mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim,),
             "ls2.gamma": (dim,)}
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1370, dim), "mask_token": (1, dim),
              "patch_embed.proj.weight": (dim, 3, 14, 14), "patch_embed.proj.bias": (dim,),
              "norm.weight": (dim,), "norm.bias": (dim,)}
    if registers:
        shapes["register_tokens"] = (1, registers, dim)
    for i in range(depth):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def official_dino(name):
    """Formula-filled tensors under the official names."""
    dim, depth, _, registers = DINOV2[name]
    shapes = dino_shapes(dim, depth, registers)
    return {key: formula(key, shape) for key, shape in shapes.items()}


def saved(tensors, path):
    torch.save(tensors, path)
    return str(path)


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# --------------------------------------------------------------- network ----

@pytest.mark.parametrize("name", OFFICIAL)
def test_every_variant_has_the_official_tensors(name):
    dim, depth, heads, registers = DINOV2[name]
    with torch.device("meta"):    # shapes alone: vitl14 has 300 million parameters
        ours = DinoVisionTransformer(dim=dim, depth=depth, heads=heads, registers=registers)
    shapes = {key: tuple(tensor.shape) for key, tensor in ours.state_dict().items()}
    assert shapes == dino_shapes(dim, depth, registers)
    if name == "dinov2_vits14":
        assert len(shapes) == 175
        assert sum(p.numel() for p in ours.parameters()) == 22_056_576


def literal_tokens(vit, image):
    """One frame (1, 3, 28, 42), patch by patch -> tokens (10, 8): CLS, registers, patches."""
    projection = vit.patch_embed.proj
    patches = []
    for row in (0, 14):
        for column in (0, 14, 28):
            pixels = image[0, :, row:row + 14, column:column + 14]
            patches.append((projection.weight * pixels).sum((1, 2, 3)) + projection.bias)
    tokens = torch.cat([vit.cls_token[0], torch.stack(patches)]) + vit.positions(2, 3)[0]
    return torch.cat([tokens[:1], vit.register_tokens[0], tokens[1:]])


def literal_block(block, x):
    """Tokens (L, 8) -> (L, 8), head by head."""
    q, k, v = block.attn.qkv(block.norm1(x)).split(8, dim=1)
    heads = []
    for s in (slice(0, 4), slice(4, 8)):
        affinity = torch.softmax(q[:, s] @ k[:, s].t() / 2, dim=1)
        heads.append(affinity @ v[:, s])
    x = x + block.ls1.gamma * block.attn.proj(torch.cat(heads, dim=1))
    return x + block.ls2.gamma * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def test_attention_and_blocks_against_a_literal_vit():
    """One frame through a small ViT, by hand."""
    torch.manual_seed(0)
    vit = DinoVisionTransformer(dim=8, depth=2, heads=2, registers=3).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.randn(1, 3, 28, 42)
    got = vit.get_intermediate_layers(image, n=[0, 1], norm=False)
    normed = vit.get_intermediate_layers(image, n=[1])
    # The literal form has no batch axis: its Linears are plain ones.
    for module in vit.modules():
        if isinstance(module, TokenLinear):
            module.__class__ = torch.nn.Linear
    x, want = literal_tokens(vit, image), []
    for block in vit.blocks:
        x = literal_block(block, x)
        want.append(x[4:])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[0], b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normed[0][0], vit.norm(want[1]), rtol=1e-4, atol=1e-4)


def test_a_token_linear_is_a_linear():
    torch.manual_seed(0)
    module = TokenLinear(5, 7)
    for shape in ((3, 4, 5), (1, 1, 5), (2, 9, 5)):
        x = torch.randn(shape)
        plain = F.linear(x, module.weight, module.bias)
        torch.testing.assert_close(module(x), plain)
        assert module(x).is_contiguous()


# --------------------------------------------------------------- weights ----

@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_local_weights_file(name, tmp_path):
    tensors = official_dino(name)
    dinov2 = load_dinov2(name, saved(tensors, tmp_path / "dino.pth"))
    assert not any(p.requires_grad for p in dinov2.parameters()) and not dinov2.training
    frame = torch.randn(1, 3, 56, 28)
    layers = dinov2.get_intermediate_layers(frame, n=[2, 5, 8, 11], norm=False)
    # CLS and registers are dropped.
    assert [tuple(x.shape) for x in layers] == [(1, 8, 384)] * 4
    tensors.pop("blocks.3.ls1.gamma")
    torn = saved(tensors, tmp_path / "torn.pth")
    with pytest.raises(UserError, match="blocks.3.ls1.gamma is missing"):
        load_dinov2(name, torn)


def test_what_a_checkpoint_will_fill_needs_no_file():
    assert load_dinov2("dinov2_vits14", "/gone.pth", pretrained=False).embed_dim == 384


def hugging_face(official):
    """The official tensors under the names of Hugging Face's Dinov2Model, which has a tensor each
    for query, key and value."""
    names = {"cls_token": "embeddings.cls_token",
             "pos_embed": "embeddings.position_embeddings",
             "mask_token": "embeddings.mask_token",
             "register_tokens": "embeddings.register_tokens",
             "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
             "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
             "norm.weight": "layernorm.weight",
             "norm.bias": "layernorm.bias"}
    of_a_block = {"attn.proj": "attention.output.dense",
                  "ls1.gamma": "layer_scale1.lambda1",
                  "ls2.gamma": "layer_scale2.lambda1"}
    renamed = {}
    for name, tensor in official.items():
        if name in names:
            renamed[names[name]] = tensor
            continue
        number, rest = re.fullmatch(r"blocks\.(\d+)\.(.+)", name).groups()
        layer = f"encoder.layer.{number}"
        if rest.startswith("attn.qkv."):
            kind = rest.removeprefix("attn.qkv.")
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{layer}.attention.attention.{part}.{kind}"] = third.clone()
            continue
        for ours, theirs in of_a_block.items():
            rest = rest.replace(ours, theirs)
        renamed[f"{layer}.{rest}"] = tensor
    return renamed


@pytest.mark.parametrize("prefix", ["", "dinov2."])
@pytest.mark.parametrize("name", FEW)
def test_hugging_face_s_names_give_the_same_network(name, prefix, tmp_path, monkeypatch):
    monkeypatch.setitem(DINOV2, name, FEW[name])
    official = official_dino(name)
    theirs = {prefix + key: tensor for key, tensor in hugging_face(official).items()}
    assert len(theirs) == len(official) + 2 * 4    # two blocks, weights and biases: 3 for 1
    assert f"{prefix}encoder.layer.1.attention.attention.key.weight" in theirs
    expected = load_dinov2(name, saved(official, tmp_path / "official.pth"))
    found = load_dinov2(name, saved(theirs, tmp_path / "theirs.pth"))
    for key, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key
    frames = torch.randn(2, 3, 28, 42)
    for a, b in zip(found.get_intermediate_layers(frames, n=[0, 1]),
                    expected.get_intermediate_layers(frames, n=[0, 1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_hugging_face_s_file_without_a_projection_is_refused(part, kind, tmp_path, monkeypatch):
    name = "dinov2_vits14_reg"
    monkeypatch.setitem(DINOV2, name, FEW[name])
    theirs = hugging_face(official_dino(name))
    del theirs[f"encoder.layer.1.attention.attention.{part}.{kind}"]
    torn = saved(theirs, tmp_path / "torn.pth")
    with pytest.raises(UserError) as error:
        load_dinov2(name, torn)
    message = one_line(error)
    assert torn in message and f"blocks.1.attn.qkv.{kind} is missing" in message
    assert "blocks.0" not in message


def test_no_network_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "load", offline)
    with pytest.raises(UserError) as error:
        load_dinov2("dinov2_vits14")
    message = one_line(error)
    for way_out in ("network", "--dinov2-weights", "--dinov2 tiny"):
        assert way_out in message


def test_hub_is_pinned_and_quiet(monkeypatch, recwarn):
    name, asked = "dinov2_vits14_reg", {}
    dim, depth, heads, registers = DINOV2[name]
    given = DinoVisionTransformer(dim=dim, depth=depth, heads=heads, registers=registers)

    def hub(repo, name, **kwargs):
        warnings.warn("xFormers is not available (SwiGLU)", stacklevel=1)
        asked.update(kwargs, repo=repo, name=name)
        return given
    monkeypatch.setattr(torch.hub, "load", hub)
    dinov2 = load_dinov2(name)
    assert not dinov2.training and torch.equal(dinov2.pos_embed, given.pos_embed)
    assert asked["name"] == name and asked["skip_validation"] and asked["trust_repo"]
    assert asked["repo"] == "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"
    assert not [w for w in recwarn if "xFormers" in str(w.message)]
    given.blocks[3].mlp = given.blocks[2].attn
    with pytest.raises(UserError, match=f"torch.hub.*{name}.* does not fit: blocks.3.mlp"):
        load_dinov2(name)


def test_an_unknown_name_is_one_clear_error():
    with pytest.raises(UserError) as error:
        load_dinov2("dinov2_vitg14")
    message = one_line(error)
    assert all(name in message for name in ("dinov2_vitg14", *DINOV2))


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_one_reads_no_weights_of_a_user(name):
    with pytest.raises(UserError) as error:
        load_dinov2(name, "file.pth")
    assert f"--dinov2 {name}" in one_line(error)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_one_is_the_same_in_every_run_and_leaves_chance_alone(name):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = load_dinov2(name).state_dict()
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    other = load_dinov2(name).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
