"""PBMGE: progressive bidirectional multi-granularity enhancement (DinoGRL, section 3.3).

Two people's coats may look alike and two people's walks may look alike, seldom both. So each stream asks the other,
strip by strip and from coarse to fine, what confirms it and what contradicts it:

    gait parts        g_0 | g_1 g_2 | g_3 .. g_6 | g_7 .. g_14 | g_15 .. g_30        (B, 31, D), g_0 = global
    appearance parts  a_0 | a_1 a_2 | a_3 .. a_6 | a_7 .. a_14 | a_15 .. a_30        (B, 31, D), a_0 = global
                            n = 2       n = 4        n = 8          n = 16           granularities

    for each granularity n, walking its strips i in order, x starting at g_0 and y at a_0:
        x <- enhance_gait(query x, source a_i)          appearance tells gait       } bidirectional,
        y <- enhance_appearance(query y, source g_i)    gait tells appearance       } progressive
    the last x and y of each granularity are appended: (B, 35, D) and (B, 35, D).

Enhance(q, s) is a cross-attention over the D channels of a part, each channel one scalar token. The literal form
(tests/test_pbmge.py has it, as the reference) lifts every scalar to D dimensions and so costs D^3 a pair. But all the
lifted tokens lie on one line, hence the D x D affinity is bilinear in two scalars,

    f_ij = (k1 q_i s_j + k2 q_i + k3 s_j + k4) / D = alpha_i s_j + beta_i ,       k: four dot products of the weights

and relu(f_i.) is affine in s_j on one side of the threshold -beta_i / alpha_i. With s sorted and its powers summed up
from the left, "the sum over all j beyond the threshold" is one look-up: O(D log D), to rounding the same value.

Quick question: what does PBMGE compute at the first training step? (Nothing: its last BatchNorm starts at zero, so
out = q. It learns to speak only where speaking lowers the loss.)

Ours, not the paper's: the sorted evaluation; float32 throughout under autocast (prefix sums lose too much in bfloat16).
"""
from typing import NamedTuple

import torch
from torch import nn


class Source(NamedTuple):
    """Parts prepared as sources: values sorted along channels (..., D), and sums of their powers (..., 3, D + 1)."""
    values: torch.Tensor
    sums: torch.Tensor    # sums[..., k, j] = sum of the j smallest values, each to the power k


def prepare(parts):
    """(..., D) -> Source. Sorting and summing once serves every enhancement that reads these parts."""
    values = parts.sort(dim=-1).values.contiguous()
    powers = torch.stack([torch.ones_like(values), values, values * values], dim=-2)
    return Source(values, nn.functional.pad(powers.cumsum(dim=-1), (1, 0)))


class Enhance(nn.Module):
    """out = q + similar - dissimilar: what the source confirms is added, what it contradicts is taken away.

    similar = BN(W1(relu(f) g(s))), dissimilar = BN(W2(relu(-f) g(s))), f = theta(q) phi(s)^T / D.
    theta, phi and g are kept as the 1x1 convolutions they are (their weights, and the released tensors, fit), though
    forward() only ever needs dot products of their weights.
    """

    def __init__(self, dim):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv1d(1, dim, 1) for _ in range(3))    # lift a scalar to D dimensions
        self.W1 = nn.Sequential(nn.Conv1d(dim, 1, 1), nn.BatchNorm1d(1))
        self.W2 = nn.Sequential(nn.Conv1d(dim, 1, 1), nn.BatchNorm1d(1))
        for bn in (self.W1[1], self.W2[1]):
            nn.init.zeros_(bn.weight)    # so that PBMGE starts as the identity
            nn.init.zeros_(bn.bias)

    def forward(self, query, source):
        """query (B, D), source: prepare()d (B, D) -> (B, D)."""
        D = query.shape[-1]
        theta_w, phi_w, g_w = (conv.weight.flatten() for conv in (self.theta, self.phi, self.g))
        theta_b, phi_b, g_b = self.theta.bias, self.phi.bias, self.g.bias
        alpha = (theta_w @ phi_w * query + theta_b @ phi_w) / D    # (B, D): f_ij = alpha_i s_j + beta_i
        beta = (theta_w @ phi_b * query + theta_b @ phi_b) / D

        # How many of the sorted source values lie below each query's threshold. A count has no gradient, and f is 0
        # at the threshold itself, so none is missing.
        with torch.no_grad():
            below = torch.searchsorted(source.values, -beta / (alpha + 0.0))    # + 0.0 turns -0 into +0
        left = source.sums.gather(-1, below.unsqueeze(-2).expand(-1, 3, -1))    # (B, 3, D) sums below the threshold
        total = source.sums[..., -1:]
        positive = torch.where((alpha >= 0).unsqueeze(-2), total - left, left)    # sums of s^0, s^1, s^2 where f > 0

        def attend(W, sums, sign):    # W(relu(sign * f) g(s)), every s_j beyond the threshold at once
            slope, offset = W[0].weight.flatten() @ g_w, W[0].weight.flatten() @ g_b    # W g(s_j) = slope s_j + offset
            s0, s1, s2 = sums.unbind(-2)
            lifted = alpha * (slope * s2 + offset * s1) + beta * (slope * s1 + offset * s0)
            return W[1]((sign * lifted + W[0].bias).unsqueeze(1)).squeeze(1)

        similar = attend(self.W1, positive, 1)
        dissimilar = attend(self.W2, total - positive, -1)
        return query + similar - dissimilar


class PBMGE(nn.Module):
    """(B, P, D) gait and appearance parts -> the same with one refined part per granularity appended.

    dim: channels D of a part. strips: the pyramid of the parts, (1, 2, 4, 8, 16) in the paper; strips[0] must be 1,
    the global part. One enhance_gait and one enhance_appearance are shared by all granularities.
    """

    def __init__(self, *, dim, strips):
        super().__init__()
        assert strips[0] == 1, f"the first granularity must be the global part, not {strips[0]} strips"
        self.strips = strips
        self.enhance_gait = Enhance(dim)
        self.enhance_appearance = Enhance(dim)

    def forward(self, gait, appearance):
        with torch.autocast(gait.device.type, enabled=False):
            gait, appearance = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (gait, appearance))
            gait_source, appearance_source = (prepare(x.transpose(0, 1)) for x in (gait, appearance))    # (P, B, ...)
            refined_gait, refined_appearance, first = [], [], 1
            for n in self.strips[1:]:
                x, y = gait[:, 0], appearance[:, 0]
                for i in range(first, first + n):
                    x, y = (self.enhance_gait(x, Source(*(t[i] for t in appearance_source))),
                            self.enhance_appearance(y, Source(*(t[i] for t in gait_source))))
                refined_gait.append(x)
                refined_appearance.append(y)
                first += n
            return (torch.cat([gait, torch.stack(refined_gait, 1)], 1),
                    torch.cat([appearance, torch.stack(refined_appearance, 1)], 1))
