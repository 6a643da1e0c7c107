"""How a divergence moves probability mass: pure functions of logits [B, C], computed in float64.

p = softmax(teacher_logits / T) is the teacher's distribution, q = softmax(student_logits / T) the student's; T is the
temperature, y a class, C the number of classes. The analysis is that of Wang et al., "ABKD: Pursuing a Proper
Allocation of the Probability Mass in Knowledge Distillation via alpha-beta-Divergence", ICML 2025 (arXiv 2505.04560),
which states it at T = 1.

The gradient of the alpha-beta divergence by the logits z is closed: with w_y = q_y^beta (q_y^alpha - p_y^alpha)/alpha,

    dD/dz_y = (w_y - q_y sum_k w_k) / T

and the size of w is a product of two factors: the *hardness* |p^alpha - q^alpha| / |alpha| (|ln p - ln q| at alpha =
0), which says how strongly a class counts for being wrong, and the *confidence* q^beta, which says how strongly it
counts for what the student already gives it.

A step of rate eta moves the logits by -eta dD/dz, and the mass of a class by the factor exp(LogR):

    LogR(y) = ln q'(y) - ln q(y) = -(eta / T) dD/dz_y + N

exactly, for N = -ln sum_k q_k exp(-(eta / T) dD/dz_k), which all classes share. One 1/T is that of the gradient, one is
that of q' = softmax(z' / T); so the bounds of the paper hold for any T with eta / T^2 in place of eta, and a loss
T^2 D has at rate eta exactly those of T = 1:

    forward KL (Prop. 3.1)   |LogR(y)| - |N| <= eta/T^2 |p_y - q_y|
    reverse KL (Prop. 3.1)   |LogR(y)| - |N| <= eta/T^2 q_y (|ln p_y - ln q_y| + sum_k q_k |ln p_k - ln q_k|)
    alpha, beta (Prop. 4.2)  |LogR(y)| - |N| <= eta/T^2 (|w_y| + q_y sum_k |w_k|)

Everything that may be tiny or huge is kept as a logarithm; what is larger than any float saturates there, which takes a
negative exponent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vkd.divergences import Divergence

STATISTICS = (
    "divergence",
    "share/target",
    "share/under",
    "share/over",
    "effective_classes",
    "hardness/target",
    "hardness/under",
    "hardness/over",
    "confidence/target",
    "confidence/under",
    "confidence/over",
    "preference/under",
    "preference/over",
    "bound",
)
"""What `image_statistics` says of each image; hardness, confidence and bound of the alpha-beta family alone."""

FEWEST_CLASSES = 4
"""Of a group that a preference is stated for: three constants are fitted to it."""

_ROUNDING = 1e-20
"""Share of a sum of squares that rounding may leave where nothing is left."""

_MOST = torch.finfo(torch.float64).max


@dataclass(frozen=True)
class AlphaBeta:
    """A member of the alpha-beta family: factor * D_{alpha,beta}. Exponents below 1e-20 in size count as 0."""

    alpha: float
    beta: float
    factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            value = float(getattr(self, name))
            value = 0.0 if abs(value) < 1e-20 else math.copysign(min(abs(value), 1e100), value)
            object.__setattr__(self, name, value)


FORWARD_KL, REVERSE_KL = AlphaBeta(1.0, 0.0), AlphaBeta(0.0, 1.0)


def as_alpha_beta(divergence: Divergence, classes: int) -> AlphaBeta | None:
    """What a divergence is in the alpha-beta family over `classes` classes; None where it is no member."""
    if divergence.name in ("fkld", "rkld"):
        return FORWARD_KL if divergence.name == "fkld" else REVERSE_KL
    if divergence.name != "abkd":
        return None
    alpha, beta = float(divergence.parameters["alpha"]), float(divergence.parameters["beta"])
    # Beyond 1e300 the factor would be no float; neither is the gradient then.
    power = (alpha + beta - 1.0) * math.log(classes) if divergence.parameters.get("match_kl_scale") else 0.0
    return AlphaBeta(alpha, beta, math.exp(max(-690.0, min(690.0, power))))


# The two distributions


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """ln softmax(z / T), float64 [B, C], with all its digits where the softmax is almost 1."""
    logits = logits.double()
    top, top_class = logits.max(dim=-1, keepdim=True)
    scaled = (logits - top) / temperature
    others = scaled.exp().scatter(-1, top_class, 0.0).sum(dim=-1, keepdim=True)
    return scaled - others.log1p()


def _log_power_difference(log_p: Tensor, log_q: Tensor, exponent: float) -> Tensor:
    """ln(|p^k - q^k| / |k|), and ln |ln p - ln q| for k = 0; minus infinity where p = q."""
    distance = (log_q - log_p).abs()
    if exponent == 0.0:
        return distance.log()
    larger = torch.maximum(log_p, log_q) if exponent > 0.0 else torch.minimum(log_p, log_q)
    decay = torch.expm1(-abs(exponent) * distance).neg() / abs(exponent)
    return exponent * larger + decay.log()


def _exponential(logarithm: Tensor) -> Tensor:
    """exp, saturated at the largest float."""
    return logarithm.exp().clamp(max=_MOST)


def _times_exponential(x: Tensor, logarithm: Tensor) -> Tensor:
    """x * exp(logarithm), saturated: in two halves, so that it is exact wherever the product fits."""
    half = (logarithm / 2).clamp(max=700.0).exp()
    return (x * half * half).clamp(-_MOST, _MOST)


def hardness(student_logits: Tensor, teacher_logits: Tensor, *, alpha: float, temperature: float = 1.0) -> Tensor:
    """|p^alpha - q^alpha| / |alpha| [B, C], or |ln p - ln q| at alpha = 0: the factor of hardness-concentration.

    The smaller alpha, the steeper the power, and the more the classes with a large ratio of p and q count.
    """
    log_p, log_q = log_softmax(teacher_logits, temperature), log_softmax(student_logits, temperature)
    return _exponential(_log_power_difference(log_p, log_q, AlphaBeta(alpha, 0.0).alpha))


def confidence(student_logits: Tensor, *, beta: float, temperature: float = 1.0) -> Tensor:
    """q^beta [B, C]: the factor of confidence-concentration. The larger beta, the more the student's choices count."""
    return _exponential(AlphaBeta(0.0, beta).beta * log_softmax(student_logits, temperature))


# The gradient


def _log_weight(log_p: Tensor, log_q: Tensor, member: AlphaBeta) -> Tensor:
    """ln |w| [B, C], without the factor."""
    return member.beta * log_q + _log_power_difference(log_p, log_q, member.alpha)


def _through_softmax(weight: Tensor, q: Tensor) -> Tensor:
    """w - q sum(w). The second time takes from the largest class what the sum over the classes then lacks to 0."""
    for _ in range(2):
        weight = weight - q * weight.sum(dim=-1, keepdim=True)
    return weight


def _scaled_gradient(log_p: Tensor, log_q: Tensor, member: AlphaBeta) -> tuple[Tensor, Tensor]:
    """A tensor [B, C] of ordinary size and a logarithm [B, 1] whose exponential times it is T dD/dz / factor."""
    log_weight = _log_weight(log_p, log_q, member)
    log_scale = log_weight.amax(dim=-1, keepdim=True)
    log_scale = torch.where(log_scale.isfinite(), log_scale, 0.0)
    weight = (log_weight - log_scale).exp().copysign(log_q - log_p)
    if (member.alpha, member.beta) == (1.0, 0.0):
        return weight, log_scale  # w = q - p adds up to 0 as it is
    return _through_softmax(weight, log_q.exp()), log_scale


def logit_gradient(
    student_logits: Tensor, teacher_logits: Tensor, member: AlphaBeta, *, temperature: float = 1.0
) -> Tensor:
    """dD/dz by the student's logits, [B, C], in closed form, for any alpha and beta, singular ones too."""
    log_p, log_q = log_softmax(teacher_logits, temperature), log_softmax(student_logits, temperature)
    gradient, log_scale = _scaled_gradient(log_p, log_q, member)
    return _times_exponential(gradient, log_scale + math.log(member.factor) - math.log(temperature))


def divergence_gradient(divergence: Divergence, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """dD/dz [B, C] of any divergence at its own temperature: closed in the alpha-beta family, by autograd elsewhere."""
    member = as_alpha_beta(divergence, student_logits.shape[-1])
    if member is not None:
        return logit_gradient(student_logits, teacher_logits, member, temperature=divergence.temperature)
    with torch.enable_grad():
        leaf = student_logits.detach().double().requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(leaf, teacher_logits.double(), reduction="sum"), leaf)
    return gradient


# One step


@dataclass(frozen=True)
class LogMassRatio:
    """What one step does to ln q: `own` of each class [B, C], and `shared` [B, 1] by all; their sum is LogR.

    own: -(eta / T) dD/dz.
    shared: N.
    """

    own: Tensor
    shared: Tensor

    @property
    def total(self) -> Tensor:
        """LogR = ln q' - ln q, [B, C]."""
        return self.own + self.shared

    @property
    def excess(self) -> Tensor:
        """|LogR| - |N|, [B, C], to the last digits where the one is almost the other: what the propositions bound."""
        own, shared = self.own.abs(), self.shared.abs()
        apart = torch.maximum(own - 2.0 * shared, -own)
        return torch.where(self.own * self.shared.sign() >= 0.0, own, apart)


def log_mass_ratio(student_logits: Tensor, gradient: Tensor, *, rate: float, temperature: float = 1.0) -> LogMassRatio:
    """The log mass ratio of a step from z to z - rate * gradient, exactly.

    Args:
        student_logits, gradient: [B, C].
        rate: eta.
        temperature: of the distribution whose mass is looked at.
    """
    log_q = log_softmax(student_logits, temperature)
    own = (gradient.double() * (-rate / temperature)).clamp(-_MOST, _MOST)
    near = -torch.log1p((log_q.exp() * own.clamp(-1.0, 1.0).expm1()).sum(dim=-1, keepdim=True))
    far = -torch.logsumexp(log_q + own, dim=-1, keepdim=True)
    return LogMassRatio(own, torch.where(own.abs().amax(dim=-1, keepdim=True) <= 1.0, near, far))


def mass_ratio_bound(
    student_logits: Tensor, teacher_logits: Tensor, member: AlphaBeta, *, rate: float, temperature: float = 1.0
) -> Tensor:
    """What |LogR| - |N| is at most, [B, C]: Prop. 3.1 for forward KL, elsewhere Prop. 4.2, which for reverse KL is 3.1.

    Args:
        student_logits, teacher_logits: [B, C].
        member: its factor counts.
        rate: eta, of a step against the gradient of D without T^2; the bound has eta / T^2.
        temperature: T.
    """
    log_p, log_q = log_softmax(teacher_logits, temperature), log_softmax(student_logits, temperature)
    log_weight = _log_weight(log_p, log_q, member)
    log_factor = math.log(member.factor) + math.log(rate) - 2.0 * math.log(temperature)
    if (member.alpha, member.beta) == (1.0, 0.0):
        return _exponential(log_weight + log_factor)
    total = torch.logsumexp(log_weight, dim=-1, keepdim=True)
    return _exponential(torch.logaddexp(log_weight, log_q + total) + log_factor)


# Where a gradient goes


@dataclass(frozen=True)
class Groups:
    """The classes of each image in three parts, bool [B, C].

    target: the label's; under, over: of the others, those with q < p and with q >= p.
    """

    target: Tensor
    under: Tensor
    over: Tensor

    def items(self) -> tuple[tuple[str, Tensor], ...]:
        """The parts by name."""
        return ("target", self.target), ("under", self.under), ("over", self.over)


def class_groups(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> Groups:
    """Which class is the target, which others the student under- and over-estimates; targets are labels, int64 [B]."""
    log_p, log_q = log_softmax(teacher_logits, temperature), log_softmax(student_logits, temperature)
    target = torch.zeros_like(log_q, dtype=torch.bool).scatter(-1, targets[:, None], True)
    return Groups(target, ~target & (log_q < log_p), ~target & (log_q >= log_p))


def gradient_shares(gradient: Tensor) -> Tensor:
    """|g_y| / sum_k |g_k| [B, C]: each class's part of the L1 norm of a gradient; NaN where all of it is 0."""
    size = gradient.double().abs()
    size = size / size.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return size / size.sum(dim=-1, keepdim=True)


def effective_classes(shares: Tensor) -> Tensor:
    """exp(entropy) of shares [B, C]: [B], 1 where one class has everything, C where all have the same."""
    return torch.special.entr(shares).sum(dim=-1).exp()


def confidence_preference(gradient: Tensor, difference: Tensor, q: Tensor, members: Tensor) -> Tensor:
    """How the step treats classes that are equally wrong and that the student gives different mass: [B], in [-1, 1].

    The partial correlation over the classes of a group between LogR and q, what is linear in p - q taken out of both.
    Thm. 3.2 is about its sign: 0 for forward KL, which spreads mass over equally wrong classes alike; positive for
    reverse KL, which among equally under-estimated classes raises those with the larger q more, and among equally
    over-estimated ones lowers those with the smaller q more.

    Args:
        gradient: dD/dz [B, C]; neither its scale nor what a step shares among all classes matters.
        difference: p - q [B, C].
        q: [B, C].
        members: the group, bool [B, C].

    NaN for a group of fewer than `FEWEST_CLASSES` classes, where q differs in nothing but what is linear in p - q, and
    where the gradient is 0.
    """
    count = members.sum(dim=-1, keepdim=True)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=-1, keepdim=True)

    def varying(x: Tensor) -> Tensor:
        """x over its largest size, less the mean of the group; 0 where it is the same in all of it but for rounding."""
        x = torch.where(members, x.double(), 0.0)
        x = x / x.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        x = torch.where(members, x - x.sum(dim=-1, keepdim=True) / count, 0.0)
        return torch.where(product(x, x) > _ROUNDING * count, x, 0.0)

    wrong = varying(difference)
    of_wrong = product(wrong, wrong)

    def unexplained(x: Tensor) -> Tensor:
        """What p - q leaves of x; 0 where that is rounding."""
        x = varying(x)
        rest = torch.where(of_wrong > 0.0, x - wrong * (product(x, wrong) / of_wrong), x)
        return torch.where(product(rest, rest) > _ROUNDING * product(x, x), rest, 0.0)

    raised, mass = unexplained(-gradient), unexplained(q)
    of_raised, of_mass = product(raised, raised), product(mass, mass)
    correlation = product(raised, mass) / (of_raised * of_mass).sqrt()
    correlation = torch.where(of_raised > 0.0, correlation.clamp(-1.0, 1.0), 0.0)
    has_gradient = gradient.abs().amax(dim=-1, keepdim=True) > 0.0
    is_stated = (count >= FEWEST_CLASSES) & (of_mass > 0.0) & has_gradient
    return torch.where(is_stated, correlation, torch.nan).squeeze(-1)


# All of it


def image_statistics(
    divergence: Divergence, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, *, rate: float
) -> dict[str, Tensor]:
    """The statistics of each image by the names in `STATISTICS`, float64 [B]; NaN where an image has none.

    divergence: D at its temperature. share/...: parts of the L1 norm of dD/dz. effective_classes: over how many classes
    that norm is spread. hardness/..., confidence/...: means over the classes of each group. preference/...: see
    `confidence_preference`. bound: the largest (|LogR| - |N|) / bound over the classes, at most 1 but for rounding.

    Args:
        divergence: with its temperature.
        student_logits, teacher_logits: [B, C].
        targets: labels, int64 [B].
        rate: eta / T^2 of the step that the bound is looked at for.
    """
    temperature = divergence.temperature
    student_logits, teacher_logits = student_logits.double(), teacher_logits.double()
    member = as_alpha_beta(divergence, student_logits.shape[-1])
    log_p, log_q = log_softmax(teacher_logits, temperature), log_softmax(student_logits, temperature)
    groups = class_groups(student_logits, teacher_logits, targets, temperature=temperature)
    if member is None:
        gradient = divergence_gradient(divergence, student_logits, teacher_logits)
        direction = gradient
    else:
        direction, log_scale = _scaled_gradient(log_p, log_q, member)
        log_scale = log_scale + math.log(member.factor) - math.log(temperature)
        gradient = _times_exponential(direction, log_scale)
    shares = gradient_shares(direction)
    found = {
        "divergence": divergence(student_logits, teacher_logits, reduction="none"),
        "effective_classes": effective_classes(shares),
    }
    difference = _exponential(_log_power_difference(log_p, log_q, 1.0)).copysign(log_p - log_q)
    for name, members in groups.items():
        share = torch.where(members, shares, 0.0).sum(dim=-1)
        found[f"share/{name}"] = share.masked_fill(shares.isnan().any(dim=-1), torch.nan)
        if name != "target":
            found[f"preference/{name}"] = confidence_preference(direction, difference, log_q.exp(), members)
    if member is None:
        return {name: found[name] for name in STATISTICS if name in found}
    factors = {
        "hardness": _exponential(_log_power_difference(log_p, log_q, member.alpha)),
        "confidence": _exponential(member.beta * log_q),
    }
    for name, members in groups.items():
        count = members.sum(dim=-1)
        for factor, values in factors.items():
            found[f"{factor}/{name}"] = torch.where(members, values, 0.0).sum(dim=-1) / count
    rate = rate * temperature**2
    excess = log_mass_ratio(student_logits, gradient, rate=rate, temperature=temperature).excess
    bound = mass_ratio_bound(student_logits, teacher_logits, member, rate=rate, temperature=temperature)
    found["bound"] = torch.where(excess > 0.0, excess / bound, 0.0).amax(dim=-1)
    return {name: found[name] for name in STATISTICS}
