"""PBMGE against the literal form of the paper: every D x D x D product formed, every BatchNorm
called."""
from pbmge import PBMGE, Enhance, prepare

import torch
import torch.nn.functional as F


def literal_enhance(module, query, source):
    """out = q + W1(relu(f) g(s)) - W2(relu(-f) g(s)), f = theta(q) phi(s)^T / D, as the paper
    writes it."""
    q, s = query.unsqueeze(1), source.unsqueeze(1)    # (B, 1, D): one scalar token per channel
    D = query.shape[-1]
    f = module.theta(q).transpose(1, 2) @ module.phi(s) / D    # (B, D, D)
    g = module.g(s).transpose(1, 2)    # (B, D, D)
    similar = module.W1((F.relu(f) @ g).transpose(1, 2))
    dissimilar = module.W2((F.relu(-f) @ g).transpose(1, 2))
    return (q + similar - dissimilar).squeeze(1)


def literal_pbmge(module, gait, appearance):
    gaits, appearances = list(gait.unbind(1)), list(appearance.unbind(1))
    first = 1
    for n in module.strips[1:]:
        x, y = gait[:, 0], appearance[:, 0]
        for i in range(first, first + n):
            x = literal_enhance(module.enhance_gait, x, appearance[:, i])
            y = literal_enhance(module.enhance_appearance, y, gait[:, i])
        gaits.append(x)
        appearances.append(y)
        first += n
    return torch.stack(gaits, 1), torch.stack(appearances, 1)


def speaking(module):
    """Lets PBMGE's zero-initialised BatchNorms speak, or the test would compare identities."""
    for name, parameter in module.named_parameters():
        if name.endswith(("1.weight", "1.bias")) and parameter.numel() == 1:
            torch.nn.init.normal_(parameter)
    return module.double()


def test_values_gradients_and_statistics_equal_the_literal_form():
    torch.manual_seed(0)
    ours = speaking(PBMGE(dim=24, strips=(1, 2, 4)))
    literal = PBMGE(dim=24, strips=(1, 2, 4)).double()
    literal.load_state_dict(ours.state_dict())
    inputs = [torch.randn(5, 7, 24, dtype=torch.float64).requires_grad_() for _ in range(2)]
    copies = [x.detach().clone().requires_grad_() for x in inputs]
    got = ours(*inputs)
    want = literal_pbmge(literal, *copies)
    weights = [torch.randn_like(x) for x in want]
    for outputs in (got, want):
        total = 0
        for weight, output in zip(weights, outputs, strict=True):
            total = total + (weight * output).sum()
        total.backward()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(inputs, copies, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
    for name, parameter in ours.named_parameters():
        wanted = literal.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-8, atol=1e-8, msg=name)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, literal.state_dict()[name], msg=name)


def same_as_literal(module, query, source):
    got = module(query, prepare(source), module.products())
    torch.testing.assert_close(got, literal_enhance(module, query, source))


def test_degenerate_affinities():
    """alpha = 0 (either sign of zero), ties among the source's values, and thresholds equal to a
    value."""
    torch.manual_seed(1)
    module = speaking(Enhance(6)).eval()
    with torch.no_grad():
        for conv in (module.theta, module.phi):
            conv.weight.zero_()    # f is constant: alpha = 0, beta = theta_b . phi_b
    query = torch.randn(3, 6).double()
    source = torch.tensor([[1.0, 1.0, -2.0, 0.0, 0.0, 1.0]]).double().expand(3, 6)
    for sign in (1, -1):
        module.theta.bias.data.copy_(sign * module.phi.bias.data)
        same_as_literal(module, query, source)
        same_as_literal(module, -0.0 * query, source)
    with torch.no_grad():    # f_ij = (q_i + s_j - ...) crosses zero exactly at values of s
        for conv in (module.theta, module.phi):
            conv.weight.fill_(1.0)
            conv.bias.zero_()
    whole = torch.tensor([[0.0, 1.0, -1.0, 2.0, -0.0, 3.0]]).double().expand(3, 6)
    same_as_literal(module, whole, source)


def test_starts_as_the_identity():
    gait, appearance = torch.randn(2, 4, 31, 16)
    pbmge = PBMGE(dim=16, strips=(1, 2, 4, 8, 16))
    for x, y in zip((gait, appearance), pbmge(gait, appearance), strict=True):
        assert y.shape == (4, 35, 16)
        torch.testing.assert_close(y, torch.cat([x, x[:, :1].expand(-1, 4, -1)], dim=1))


def test_autocast_changes_nothing():
    torch.manual_seed(2)
    module = speaking(PBMGE(dim=16, strips=(1, 2))).float()
    gait, appearance = torch.randn(2, 4, 3, 16)
    want = module.eval()(gait, appearance)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(gait, appearance)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
