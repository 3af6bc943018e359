"""PBMGE's sorted form against the paper's formulas: values, gradients, running statistics."""
import itertools

from pbmge import PBMGE, attend, enhance_as_written, prepare

import pytest
import torch


def literal_enhance(m, query, source):
    return enhance_as_written(query, source, m.theta, m.phi, m.g, m.W1, m.W2)


def literal_pbmge(module, gait, appearance):
    gaits, appearances, first = [gait], [appearance], 1
    for n in module.strips[1:]:
        x, y = gait[:, 0], appearance[:, 0]
        for i in range(first, first + n):
            x = literal_enhance(module.enhance_gait, x, appearance[:, i])
            y = literal_enhance(module.enhance_appearance, y, gait[:, i])
        gaits.append(x[:, None])
        appearances.append(y[:, None])
        first += n
    return torch.cat(gaits, 1), torch.cat(appearances, 1)


def no_identity(module):
    """Its last batch norms start at zero: with random ones there is something to compare."""
    for name, parameter in module.named_parameters():
        if name.endswith(("W1.1.weight", "W1.1.bias", "W2.1.weight", "W2.1.bias")):
            torch.nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("training", [True, False])
def test_values_gradients_and_statistics_equal_the_literal_form(training):
    torch.manual_seed(0)
    sorted_form = no_identity(PBMGE(dim=24, strips=(1, 2, 4))).double().train(training)
    literal = PBMGE(dim=24, strips=(1, 2, 4)).double().train(training)
    literal.load_state_dict(sorted_form.state_dict())
    inputs = [torch.randn(5, 7, 24).double().requires_grad_() for _ in range(2)]
    weights = torch.randn(2, 5, 9, 24).double()

    def results(module, function):
        outputs = function(*inputs)
        total = (torch.stack(outputs) * weights).sum()
        return outputs, torch.autograd.grad(total, [*inputs, *module.parameters()])

    got = results(sorted_form, sorted_form)
    want = results(literal, lambda *parts: literal_pbmge(literal, *parts))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    refined, start = got[0][0][:, 7:], inputs[0][:, :1]
    assert (refined - start).abs().mean() > 0.1    # no identity
    torch.testing.assert_close(sorted_form.state_dict(), literal.state_dict())


def test_degenerate_affinities():
    """Constant f (of either sign, or 0), ties among the source's values, thresholds equal to a
    value, both signs of zero."""
    torch.manual_seed(1)
    module = no_identity(PBMGE(dim=6, strips=(1, 1))).double().eval().requires_grad_(False)
    source = torch.tensor([[0.0, 1.0, -1.0, 1.0, -0.0, 3.0]]).double()
    for numbers in itertools.product((0.0, 1.0), (-1.0, 0.0, 1.0), repeat=2):
        for name, parameter in module.named_parameters():
            if "theta" in name or "phi" in name:
                place = 2 * ("phi" in name) + name.endswith("bias")
                parameter.fill_(numbers[place])
        for query in (source, -0.0 * source):
            # One enhancement of each stream.
            parts = torch.stack([query, source], 1)
            want = literal_pbmge(module, parts, parts)
            torch.testing.assert_close(module(parts, parts), want)


def test_alpha_is_zero_of_either_sign():
    source = torch.randn(1, 2, 5, 6)
    query = torch.zeros(2, 5, 6)
    ones = torch.ones(2, 2, 1, 1)
    (part,) = prepare(source, 0 * ones, ones)    # v1 = v2 = 1
    for zero, beta in itertools.product((0.0, -0.0), (-1.0, 1.0)):
        offset = torch.tensor([zero, beta])[:, None, None] * ones
        confirmed, contradicted = attend(query, *part, zero * ones, offset).unbind(1)
        assert (confirmed == 6 * max(beta, 0)).all()
        assert (contradicted == 6 * min(beta, 0)).all()


def test_starts_as_the_identity():
    gait, appearance = torch.randn(2, 4, 31, 16)
    pbmge = PBMGE(dim=16, strips=(1, 2, 4, 8, 16))
    refined = pbmge(gait, appearance)
    for x, y in zip((gait, appearance), refined, strict=True):
        torch.testing.assert_close(y, torch.cat([x, x[:, :1].expand(-1, 4, -1)], dim=1))


def test_autocast_changes_nothing():
    torch.manual_seed(2)
    module = no_identity(PBMGE(dim=16, strips=(1, 2))).eval()
    gait, appearance = torch.randn(2, 4, 3, 16)
    want = module(gait, appearance)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(gait, appearance)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
