"""DINOv2 loading, silhouettes, codes and their losses, beyond what the golden arrays fix."""
import math

import pytest
import torch
import torch.nn.functional as F

import sasgl
from data import UserError
from golden import formula
from sasgl import (DINOV2, SASGL, DinoVisionTransformer, Linear, View, choose_body, diversity_loss, drop_half, load_dinov2, refine_edges,
                   smooth_loss, upsampled)


def dino_shapes(dim, depth, registers):
    """Names and shapes of an official DINOv2 file, written down from the released state dicts."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1370, dim), "mask_token": (1, dim),
              "patch_embed.proj.weight": (dim, 3, 14, 14), "patch_embed.proj.bias": (dim,),
              "norm.weight": (dim,), "norm.bias": (dim,)}
    if registers:
        shapes["register_tokens"] = (1, registers, dim)
    for i in range(depth):
        for name, shape in {"norm1.weight": (dim,), "norm1.bias": (dim,), "attn.qkv.weight": (3 * dim, dim),
                            "attn.qkv.bias": (3 * dim,), "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,),
                            "ls1.gamma": (dim,), "norm2.weight": (dim,), "norm2.bias": (dim,),
                            "mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,),
                            "mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim,), "ls2.gamma": (dim,)}.items():
            shapes[f"blocks.{i}.{name}"] = shape
    return shapes


@pytest.mark.parametrize("name", [n for n in DINOV2 if n != "tiny"])
def test_every_variant_has_the_official_tensors(name):
    dim, depth, heads, registers = DINOV2[name]
    with torch.device("meta"):    # shapes alone: vitl14 has 300 million parameters
        ours = DinoVisionTransformer(dim=dim, depth=depth, heads=heads, registers=registers)
    assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == dino_shapes(dim, depth, registers)
    if name == "dinov2_vits14":
        assert len(ours.state_dict()) == 175 and sum(p.numel() for p in ours.parameters()) == 22_056_576


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_local_weights_file(name, tmp_path):
    dim, depth, heads, registers = DINOV2[name]
    tensors = {k: formula(k, s) for k, s in dino_shapes(dim, depth, registers).items()}
    torch.save(tensors, tmp_path / "dino.pth")
    dinov2 = load_dinov2(name, str(tmp_path / "dino.pth"))
    assert not any(p.requires_grad for p in dinov2.parameters()) and not dinov2.training
    layers = dinov2.get_intermediate_layers(torch.randn(1, 3, 56, 28), n=[2, 5, 8, 11], norm=False)
    assert [tuple(x.shape) for x in layers] == [(1, 8, 384)] * 4    # CLS and registers dropped
    assert load_dinov2(name, "/gone.pth", pretrained=False).embed_dim == dim    # a checkpoint will fill it: no file needed
    tensors.pop("blocks.3.ls1.gamma")
    torch.save(tensors, tmp_path / "torn.pth")
    with pytest.raises(UserError, match="blocks.3.ls1.gamma is missing"):
        load_dinov2(name, str(tmp_path / "torn.pth"))


def test_attention_and_blocks_against_a_literal_vit():
    """One frame through a small ViT, head by head and by hand."""
    torch.manual_seed(0)
    vit = DinoVisionTransformer(dim=8, depth=2, heads=2, registers=3).eval()
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.3)
    image = torch.randn(1, 3, 28, 42)
    x = torch.stack([(vit.patch_embed.proj.weight * image[0, :, r:r + 14, c:c + 14]).sum((1, 2, 3)) + vit.patch_embed.proj.bias
                     for r in (0, 14) for c in (0, 14, 28)])
    x = torch.cat([vit.cls_token[0], x]) + vit.positions(2, 3)[0]
    x = torch.cat([x[:1], vit.register_tokens[0], x[1:]])    # (10, 8)
    want = []
    for block in vit.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).split(8, dim=1)
        heads = [torch.softmax(q[:, s] @ k[:, s].t() / 2, dim=1) @ v[:, s] for s in (slice(0, 4), slice(4, 8))]
        x = x + block.ls1.gamma * block.attn.proj(torch.cat(heads, dim=1))
        x = x + block.ls2.gamma * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        want.append(x[4:])
    got = vit.get_intermediate_layers(image, n=[0, 1], norm=False)
    for a, b in zip(got, want):
        torch.testing.assert_close(a[0], b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vit.get_intermediate_layers(image, n=[1])[0][0], vit.norm(want[1]), rtol=1e-4, atol=1e-4)


def test_no_network_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "load", offline)
    with pytest.raises(UserError) as error:
        load_dinov2("dinov2_vits14")
    message = str(error.value)
    assert "\n" not in message and all(way in message for way in ("network", "--dinov2-weights", "--dinov2 tiny"))


def test_hub_is_pinned_and_quiet(monkeypatch, recwarn):
    asked = {}

    def hub(repo, name, **kwargs):
        import warnings
        warnings.warn("xFormers is not available (SwiGLU)")
        asked.update(kwargs, repo=repo, name=name)
        return given
    dim, depth, heads, registers = DINOV2["dinov2_vits14_reg"]
    given = DinoVisionTransformer(dim=dim, depth=depth, heads=heads, registers=registers)
    monkeypatch.setattr(torch.hub, "load", hub)
    dinov2 = load_dinov2("dinov2_vits14_reg")
    assert not dinov2.training and torch.equal(dinov2.pos_embed, given.pos_embed)
    given.blocks[3].mlp = given.blocks[2].attn
    with pytest.raises(UserError, match="torch.hub's dinov2_vits14_reg does not fit: blocks.3.mlp"):
        load_dinov2("dinov2_vits14_reg")
    assert asked["name"] == "dinov2_vits14_reg" and asked["skip_validation"] and asked["trust_repo"]
    assert asked["repo"] == "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"
    assert not [w for w in recwarn if "xFormers" in str(w.message)]


def test_wrong_names_and_combinations():
    for name, weights in (("dinov2_vitg14", None), ("tiny", "file.pth")):
        with pytest.raises(UserError):
            load_dinov2(name, weights)


def test_choose_body_by_the_edge_rows():
    mask = torch.zeros(2, 2, 64, 32)
    mask[0, 0, :, :] = 0.9        # frame 0: channel 0 fills the borders: it is the background
    mask[0, 1] = 1 - mask[0, 0]
    mask[1, 0, 20:40, 10:20] = 0.8    # frame 1: channel 0 is in the middle: it is the body
    mask[1, 1] = 1 - mask[1, 0]
    body = choose_body(mask)
    assert torch.equal(body[0], mask[0, 1]) and torch.equal(body[1], mask[1, 0])
    exactly_half = torch.zeros(1, 2, 64, 32)
    exactly_half[0, 0, :5] = 1    # 5 * W ones: not *more* than half
    assert torch.equal(choose_body(exactly_half), exactly_half[:, 0])


def test_refine_edges_against_loops():
    torch.manual_seed(0)
    p = F.interpolate(torch.rand(2, 1, 5, 4), (17, 13), mode="bilinear")[:, 0]
    got = refine_edges(p)
    N, H, W = p.shape
    for n in range(N):
        m = p[n].round()
        window = lambda a, i, j, r: a[max(0, i - r):i + r + 1, max(0, j - r):j + r + 1]
        d = torch.tensor([[window(m, i, j, 1).max() for j in range(W)] for i in range(H)])
        e = torch.tensor([[window(d, i, j, 2).min() for j in range(W)] for i in range(H)])
        want = torch.where(e > 0.5, torch.ones(H, W), torch.where((d > 0.5) ^ (e > 0.5), p[n], torch.zeros(H, W)))
        assert torch.equal(got[n], want)


def test_losses_by_hand():
    assert smooth_loss(torch.zeros(2, 3, 8, 4)) == 0
    impulse = torch.zeros(1, 1, 5, 5)
    impulse[0, 0, 2, 2] = 1    # |Sobel x| and |Sobel y| of an impulse sum to 8 each
    assert smooth_loss(impulse).item() == pytest.approx(16 / 25)
    even = torch.full((1, 16, 2, 2), 1 / 16)
    assert diversity_loss(even).item() == pytest.approx(0, abs=1e-4)
    one = torch.zeros(1, 16, 2, 2)
    one[:, 3] = 1
    assert diversity_loss(one).item() == pytest.approx(math.log2(16), abs=1e-4)


def small_sasgl():
    torch.manual_seed(0)
    backbone = torch.nn.Conv2d(8, 8, 3, 2, 1)
    return SASGL(dinov2=load_dinov2("tiny"), backbone=backbone, width=8, dino_size=(112, 56), code_size=(16, 8))


def literal_look(net, frames, dropout=0.5):
    """SASGL.look as it is usually written: the features upsampled whole, the foreground's pixels cut out by a boolean index, every
    batch norm called on them. The modules are net's own."""
    def norm(module, x):
        return F.batch_norm(x, module.running_mean, module.running_var, None, None, module.training)

    def linear(module, x):
        return F.linear(x, module.weight, module.bias)
    last, mid4 = (F.interpolate(x.permute(0, 3, 1, 2), net.code_size, mode="bilinear", align_corners=False) for x in net.features(frames))
    N, D, h, w = last.shape
    x, branch = last.permute(0, 2, 3, 1).reshape(-1, D), net.mask_branch
    mask = linear(branch.down_sampling, norm(branch.bn_s, F.dropout(x, dropout, net.training))).softmax(1)
    losses = {"mask": F.mse_loss(linear(branch.up_sampling, mask), x)}
    mask = mask.view(N, h, w, 2).permute(0, 3, 1, 2)
    losses["smooth_mask"] = 0.02 * smooth_loss(mask)
    silhouette = refine_edges(choose_body(mask.detach()))
    foreground = silhouette != 0
    pixels, codes = mid4.permute(0, 2, 3, 1)[foreground], []    # (M, 4D)
    first, second, _, third = net.denoising_branch.down_sampling
    for encode in (lambda: linear(third, F.gelu(norm(second, linear(first, norm(net.denoising_branch.bn_s, pixels))))).softmax(1),
                   lambda: norm(net.appearance_branch.bn_t, linear(net.appearance_branch.down_sampling, norm(net.appearance_branch.bn_s, pixels))).sigmoid()):
        code = torch.zeros(N, h, w, third.out_features)
        code[foreground] = encode()
        codes.append(code.permute(0, 3, 1, 2))
    losses["smooth_part"] = 0.01 * smooth_loss(codes[0][:, :-1])
    losses["diversity"] = 5 * diversity_loss(codes[0])
    return View(mask, silhouette, *codes, losses)


@pytest.mark.parametrize("training", [True, False])
def test_values_gradients_and_statistics_equal_the_literal_form(training, monkeypatch):
    monkeypatch.setattr(sasgl, "drop_half", lambda x: x)
    net = small_sasgl()
    for name, buffer in net.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer += torch.rand_like(buffer)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    frames = torch.randn(4, 3, 32, 16)
    results = []
    for look in (net.look, lambda frames: literal_look(net, frames, dropout=0)):
        net.load_state_dict(state)
        net.train(training).zero_grad()
        view = look(frames)
        weights = torch.randn(2, *view.denoising.shape, generator=torch.Generator().manual_seed(1))
        (sum(view.losses.values()) + (weights[0] * view.denoising + weights[1] * view.appearance).sum()).backward()
        results.append((*view[:4], view.losses, {k: p.grad for k, p in net.named_parameters() if p.grad is not None}, {k: v.clone() for k, v in net.state_dict().items()}))
    ours, literal = results
    assert 0.02 < (ours[1] != 0).float().mean() < 0.98 and len(ours[5]) == 10
    for a, b in zip(ours[:6], literal[:6]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    pixels = upsampled(net.features(frames)[1], net.code_size)[ours[1] != 0]
    for name in ("denoising_branch.bn_s", "appearance_branch.bn_s"):    # as BatchNorm1d keeps them
        want = torch.nn.BatchNorm1d(pixels.shape[1], affine=False).train(training)
        want.running_mean[:], want.running_var[:] = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        want(pixels)
        for key, value in want.state_dict().items():
            torch.testing.assert_close(ours[6][f"{name}.{key}"], value, rtol=1e-5, atol=1e-6)


def test_linear_is_linear_on_tokens_and_maps():
    module = Linear(5, 7)
    for shape in ((3, 4, 5), (2, 3, 4, 5)):
        x = torch.randn(shape)
        torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias))
        assert module(x).is_contiguous()


def test_drop_half_drops_half_and_doubles_the_rest():
    torch.manual_seed(0)
    for shape in ((100, 77), (3,), (1, 64)):
        assert set(drop_half(torch.ones(shape)).unique().tolist()) <= {0, 2} and drop_half(torch.ones(shape)).shape == shape
    x = drop_half(torch.ones(2000, 65))
    assert abs(x.mean() - 1) < 0.01 and (x.mean(0) - 1).abs().max() < 0.15 and (x.mean(1) - 1).abs().max() < 0.75
    assert abs(((x[:, 1:] - 1) * (x[:, :-1] - 1)).mean()) < 0.02    # neighbours are independent
    assert not torch.equal(drop_half(torch.ones(1000)), drop_half(torch.ones(1000)))


def test_background_is_zero_and_statistics_are_the_foreground_s_alone():
    net = small_sasgl().train()
    frames = torch.randn(4, 3, 32, 16)
    view = net.look(frames)
    outside = (view.silhouette == 0)[:, None].expand(-1, 16, -1, -1)
    assert outside.any() and not outside.all()
    assert (view.denoising[outside] == 0).all() and (view.appearance[outside] == 0).all()
    pixels = upsampled(net.features(frames)[1], net.code_size)[view.silhouette != 0]
    torch.testing.assert_close(net.denoising_branch.bn_s.running_mean, 0.1 * pixels.mean(0))


def test_mask_gets_no_gradient_from_the_codes():
    net = small_sasgl().train()
    view = net.look(torch.randn(4, 3, 32, 16))
    (view.denoising.sum() + view.appearance.square().sum() + view.losses["diversity"]).backward()
    assert all(p.grad is None for p in net.mask_branch.parameters())
    assert any(p.grad is not None for p in net.denoising_branch.parameters())


def test_a_batch_without_foreground_trains_on(monkeypatch):
    net = small_sasgl().train()
    monkeypatch.setattr(sasgl, "refine_edges", torch.zeros_like)
    maps, view = net(torch.randn(2, 2, 3, 32, 16))
    assert maps.isfinite().all() and all(v.isfinite() for v in view.losses.values())


def test_a_fifth_of_the_tracklets_loses_one_code_in_training_only(monkeypatch):
    net = small_sasgl()
    seen = {}
    monkeypatch.setattr(net.gait_net, "forward", lambda d, a: seen.update(d=d, a=a) or d)
    frames = torch.randn(10, 2, 3, 32, 16)
    for training in (True, False):
        net.train(training)
        _, view = net(frames)
        blank = [(code.unflatten(0, (10, 2)) == 0).flatten(1).all(1) for code in (seen["d"], seen["a"])]
        assert not (blank[0] & blank[1]).any()
        assert (blank[0] | blank[1]).sum() == (2 if training else 0)
        assert not (view.denoising.unflatten(0, (10, 2)) == 0).flatten(1).all(1).any()    # losses see both codes


def test_dinov2_stays_frozen_in_training():
    net = small_sasgl().train()
    assert not net.dinov2.training and not any(p.requires_grad for p in net.dinov2.parameters())
