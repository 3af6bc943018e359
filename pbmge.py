"""PBMGE: progressive bidirectional multi-granularity enhancement (DinoGRL, section 3.3).

Two people's coats may look alike, or their walks; rarely both. So each stream is corrected by the
other, strip by strip and from coarse to fine: what the other stream confirms is added, what it
contradicts is subtracted.

    gait parts        g_0 | g_1 g_2 | g_3 .. g_6 | g_7 .. g_14 | g_15 .. g_30      (B, 31, D)
    appearance parts  a_0 | a_1 a_2 | a_3 .. a_6 | a_7 .. a_14 | a_15 .. a_30      (B, 31, D)
                   global    n = 2       n = 4        n = 8          n = 16         granularities

    for each granularity n = 2, 4, 8, 16, over its strips i in order, from x = g_0 and y = a_0:
        x <- enhance_gait(query x, source a_i)          appearance corrects gait  } bidirectional,
        y <- enhance_appearance(query y, source g_i)    gait corrects appearance  } progressive
    the last x and y of each granularity are appended: (B, 35, D) and (B, 35, D).

`enhance` is a cross-attention over the D channels of a part, each channel one scalar token. The
function enhance_as_written has the paper's formulas. They lift every scalar to D dimensions, so a
pair costs D^3 operations. But all lifted tokens lie on one line, hence the D x D affinity is
bilinear in two scalars,

    f_ij = (k1 q_i s_j + k2 q_i + k3 s_j + k4) / D = alpha_i s_j + beta_i,    k: products of weights

For one query channel i, f is a straight line over s. It crosses 0 at the threshold s = -beta_i /
alpha_i: relu(f) is 0 on one side and that line on the other. With s sorted and its powers summed
up from the left, "the sum over all j beyond the threshold" is one look-up: O(D log D), the same
value to rounding, and some 60 times as fast at D = 256. That is the class Enhance.

Quick question: what does PBMGE compute at the first training step? (Nothing: its last BatchNorm
starts at zero, so out = q. It departs from that only where the loss falls by it.)

Ours, not the paper's: the sorted evaluation; float32 throughout under autocast (sums over sorted
values lose too much in bfloat16).
"""
from collections import namedtuple
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------ the paper's formulas ----

def enhance_as_written(query, source, theta, phi, g, W1, W2):
    """The paper's enhancement, one tracklet and one channel as one token: query (B, D), source
    (B, D) -> (B, D). theta, phi, g: 1x1 convolutions 1 -> D; W1, W2: D -> 1 and a batch norm. The
    reference for Enhance, in training and in evaluation."""
    D = query.shape[1]
    q = theta(query[:, None]).transpose(1, 2)    # (B, D tokens, D)
    k = phi(source[:, None])    # (B, D, D tokens)
    v = g(source[:, None]).transpose(1, 2)    # (B, D tokens, D)
    f = q @ k / D    # (B, D, D): how far does channel j of the source agree with channel i?
    similar = W1((F.relu(f) @ v).transpose(1, 2))    # (B, 1, D)
    dissimilar = W2((F.relu(-f) @ v).transpose(1, 2))
    return query + (similar - dissimilar)[:, 0]


# ------------------------------------------------------------ the fast form ----

class Source(NamedTuple):
    """Parts prepared as sources: values sorted along channels (..., D), and sums of their powers
    (..., 3, D + 1): sums[..., k, j] is the sum of the j smallest values, each to the power k."""
    values: torch.Tensor
    sums: torch.Tensor

    def part(self, i):
        """Of parts (P, B, D): the i-th."""
        return Source(self.values[i], self.sums[i])


def prepare(parts):
    """Parts (..., D) -> Source: sorted and summed once for every enhancement that reads them."""
    values = parts.sort(dim=-1).values.contiguous()
    powers = torch.stack([torch.ones_like(values), values, values * values], dim=-2)
    return Source(values, F.pad(powers.cumsum(dim=-1), (1, 0)))


# What the weights of an Enhance come down to, numbers all of them:
# f_ij = (k1 q_i s_j + k2 q_i + k3 s_j + k4) / D, W g(s_j) = slope s_j + offset for W1 and for W2.
Products = namedtuple("Products", "k1 k2 k3 k4 slope1 offset1 slope2 offset2")


class Enhance(nn.Module):
    """enhance_as_written, in sorted form: query (B, D), source: prepare()d (B, D) -> (B, D).

    theta, phi and g are kept as the 1x1 convolutions they are (the released tensors fit), though
    forward() only needs products of their weights."""

    def __init__(self, dim):
        super().__init__()
        # Each lifts a scalar to D dimensions.
        self.theta, self.phi, self.g = (nn.Conv1d(1, dim, 1) for _ in range(3))
        self.W1 = nn.Sequential(nn.Conv1d(dim, 1, 1), nn.BatchNorm1d(1))
        self.W2 = nn.Sequential(nn.Conv1d(dim, 1, 1), nn.BatchNorm1d(1))
        for batch_norm in (self.W1[1], self.W2[1]):
            nn.init.zeros_(batch_norm.weight)    # so that PBMGE starts as the identity
            nn.init.zeros_(batch_norm.bias)

    def products(self):
        """-> Products; computed once, they serve every strip."""
        theta, theta_bias = self.theta.weight.flatten(), self.theta.bias
        phi, phi_bias = self.phi.weight.flatten(), self.phi.bias
        g, g_bias = self.g.weight.flatten(), self.g.bias
        W1, W2 = self.W1[0].weight.flatten(), self.W2[0].weight.flatten()
        return Products(theta @ phi, theta @ phi_bias, theta_bias @ phi, theta_bias @ phi_bias,
                        W1 @ g, W1 @ g_bias, W2 @ g, W2 @ g_bias)

    def forward(self, query, source, p):
        """p: products()."""
        D = query.shape[-1]
        alpha = (p.k1 * query + p.k3) / D    # f_ij = alpha_i s_j + beta_i, both (B, D)
        beta = (p.k2 * query + p.k4) / D

        # below: how many of the sorted source values lie below each query's threshold. No gradient
        # is lost: f is 0 at the threshold, so the sums of relu(f) do not jump there.
        with torch.no_grad():
            # + 0.0 turns -0 into +0. So for alpha = 0 and beta > 0 the threshold is -inf, and every
            # s counts as positive; for beta < 0 it is +inf, and none does.
            threshold = -beta / (alpha + 0.0)
            below = torch.searchsorted(source.values, threshold)    # (B, D)
        # Sums of s^0, s^1, s^2, (B, 3, D). left: over the s below the threshold; positive: over
        # those where f > 0; negative: where f < 0.
        left = source.sums.gather(-1, below.unsqueeze(-2).expand(-1, 3, -1))
        total = source.sums[..., -1:]
        alpha, beta = alpha.unsqueeze(-2), beta.unsqueeze(-2)    # (B, 1, D)
        positive = torch.where(alpha >= 0, total - left, left)
        negative = total - positive

        # (alpha s + beta) s^k = alpha s^(k+1) + beta s^k. For k = 0 and 1, (B, 2, D): the sums of
        # relu(f) and of relu(f) s; then, over the negative ones, of relu(-f) and of relu(-f) s.
        confirmed = alpha * positive[:, 1:] + beta * positive[:, :2]
        contradicted = -alpha * negative[:, 1:] - beta * negative[:, :2]
        similar = self.W1[1](self.combine(confirmed, p.slope1, p.offset1, self.W1[0].bias))
        dissimilar = self.W2[1](self.combine(contradicted, p.slope2, p.offset2, self.W2[0].bias))
        return query + (similar - dissimilar).squeeze(1)

    @staticmethod
    def combine(sums, slope, offset, bias):
        """Sums of relu(f) and relu(f) s (B, 2, D) -> W(relu(f) g(s)) (B, 1, D), with W g(s) =
        slope s + offset."""
        return offset * sums[:, :1] + slope * sums[:, 1:] + bias


class PBMGE(nn.Module):
    """Gait and appearance parts (B, P, D) -> the same with one refined part per granularity
    appended.

    dim: channels D of a part. strips: the pyramid of the parts, (1, 2, 4, 8, 16) in the paper, the
    first being the global part. One enhance_gait and one enhance_appearance serve all
    granularities."""

    def __init__(self, *, dim, strips):
        super().__init__()
        assert strips[0] == 1, f"the first granularity must be the global part: {strips}"
        self.strips = strips
        self.enhance_gait = Enhance(dim)
        self.enhance_appearance = Enhance(dim)

    def forward(self, gait, appearance):
        with torch.autocast(gait.device.type, enabled=False):
            wide = torch.promote_types(gait.dtype, torch.float32)
            gait, appearance = gait.to(wide), appearance.to(wide)
            refined_gait, refined_appearance = self.refine(gait, appearance)
            gait = torch.cat([gait, refined_gait], 1)
            return gait, torch.cat([appearance, refined_appearance], 1)

    def refine(self, gait, appearance):
        """Parts (B, P, D) of both -> the refined ones (B, granularities, D) of both."""
        # Part by part in memory, (P, B, D): each is read on its own.
        gait_sources = prepare(gait.transpose(0, 1))
        appearance_sources = prepare(appearance.transpose(0, 1))
        gait_products = self.enhance_gait.products()
        appearance_products = self.enhance_appearance.products()
        refined_gait, refined_appearance, first = [], [], 1
        for n in self.strips[1:]:
            x, y = gait[:, 0], appearance[:, 0]
            for i in range(first, first + n):
                x = self.enhance_gait(x, appearance_sources.part(i), gait_products)
                y = self.enhance_appearance(y, gait_sources.part(i), appearance_products)
            refined_gait.append(x)
            refined_appearance.append(y)
            first += n
        return torch.stack(refined_gait, 1), torch.stack(refined_appearance, 1)


def main():
    """PBMGE starts as the identity, and its two forms are equal."""
    torch.manual_seed(1)
    gait, appearance = torch.randn(2, 8, 31, 64)
    pbmge = PBMGE(dim=64, strips=(1, 2, 4, 8, 16))
    refined, _ = pbmge(gait, appearance)
    print(f"at first g_31 - g_0 = {(refined[:, 31] - gait[:, 0]).abs().max():.1g}")
    e = pbmge.enhance_gait
    nn.init.ones_(e.W1[1].weight)
    query, source = gait[:, 0], appearance[:, 1]
    fast = e(query, prepare(source), e.products())
    slow = enhance_as_written(query, source, e.theta, e.phi, e.g, e.W1, e.W2)
    print(f"with a gain of 1 the two forms differ by {(fast - slow).abs().max():.1g}")


if __name__ == "__main__":
    main()
