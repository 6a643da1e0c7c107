"""How far a student's distribution is from its teacher's: pure functions of two tensors of logits.

Throughout, p = softmax(teacher_logits / T) is the teacher's distribution and q = softmax(student_logits / T) the
student's; C is the number of classes. Every function here keeps the same contract:

* Logits are [..., C], so images [B, C] and token sequences [B, S, V] go through the same code. The sum runs over C.
  `reduction="mean"` averages over the positions that `mask` [...] keeps (True or non-zero), `"sum"` adds them up and
  `"none"` returns [...] with 0 where the mask drops a position. An empty mask gives 0 with a zero gradient, and NaN or
  infinity at a masked position reaches neither value nor gradient.
* No factor T^2 is applied; a method decides about that.
* The result is float32 (float64 if either input is), whatever autocast does. The teacher never gets a gradient; the
  student's gradient has the dtype of its logits.
* The value is never negative and exactly 0 for equal logits. Where it is a Kullback-Leibler divergence it is in nats.
* Errors: ValueError for logits of different shapes, a mask that is not [...], a temperature that is not positive and
  finite, an unknown reduction, or a parameter out of its range.

How it works. `_evaluate` does what all divergences share: mask, precision, temperature, log-softmax, the way back
through the softmax. A divergence only says, class by class, its value and the weight w_k = dD/d(ln q_k); then
dD/dz = (w - q sum(w)) / T is exact, needs no autograd graph, and leaves one saved [..., C] tensor. A new divergence is
a function `_Pair -> _Terms` of about five lines, a public function that calls `_divergence`, and a name in
`DIVERGENCES`; with one in `DUALS`, it serves methods that need the derivative by the teacher's logits too.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from vkd.errors import ConfigError, list_names, nearest
from vkd.registry import Registry

DIVERGENCES: Registry[Callable[..., Tensor]] = Registry("divergence")
"""The divergences by their config names."""

DUALS = {
    "fkld": "rkld",
    "rkld": "fkld",
    "abkd": "abkd",
    "js": "js",
    "skew_fkld": "skew_rkld",
    "skew_rkld": "skew_fkld",
    "tvd": "tvd",
}
"""The divergence that each becomes when student and teacher change places; alpha and beta then change places too."""

REDUCTIONS = ("mean", "sum", "none")

_SHARED_PARAMETERS = ("student_logits", "teacher_logits", "temperature", "mask", "reduction")

# Positions are worked off in blocks of about this many logits. On a CPU a block's temporaries then stay in the cache;
# on an accelerator blocks only bound the memory, and are large so that launching kernels costs little.
_BLOCK_CPU = 2**16
_BLOCK_ACCELERATOR = 2**25


# What all divergences share


class _Scratch:
    """Memory for the temporaries [N, C] of one block of positions, which the next block uses again.

    Fresh memory costs a CPU more than the arithmetic on it.
    """

    def __init__(self, like: Tensor, rows: int, dtype: torch.dtype) -> None:
        self._make = lambda: like.new_empty((rows, like.shape[-1]), dtype=dtype)
        self._tensors: list[Tensor] = []
        self._rows = self._used = 0

    def start(self, rows: int) -> None:
        """Begin a block: all memory is free again."""
        self._rows, self._used = rows, 0

    def take(self) -> Tensor:
        """An uninitialized [N, C]."""
        if self._used == len(self._tensors):
            self._tensors.append(self._make())
        tensor = self._tensors[self._used]
        self._used += 1
        return tensor if len(tensor) == self._rows else tensor[: self._rows]


class _Pair:
    """The teacher's and the student's distribution at N positions. Every tensor is [N, C] and only to be read.

    ln q = s - log1p(sum of exp(s) over the classes other than the largest), s = (z - max z) / T. Leaving the largest
    class out of the sum keeps ln q accurate to the last digits where q is almost 1.

    Args:
        student_logits, teacher_logits: [N, C], float32 or float64.
        temperature: T.
        exact: compute d from differences of logits, so that it keeps its relative accuracy where p and q are almost
            equal even if both are tiny. It costs a few more passes; divergences that weigh every class by a positive
            power of p or q do not need it in float32.
        scratch: where temporaries come from; `take()` gives an uninitialized [N, C].

    Attributes:
        log_q, log_p, q, p: the distributions and their logarithms.
        d: ln q - ln p.
        top_class: the student's largest class [N, 1].
    """

    def __init__(
        self, student_logits: Tensor, teacher_logits: Tensor, temperature: float, exact: bool, scratch: _Scratch
    ) -> None:
        self.exact = exact
        self.take = scratch.take
        student = _LogSoftmax(student_logits, temperature, self.take)
        teacher = _LogSoftmax(teacher_logits, temperature, self.take)
        self.top_class = student.top_class
        normalizer_ratio = student.normalizer - teacher.normalizer
        if not exact:
            # Not log_q - log_p, which would carry the roundings of both.
            self.d = torch.sub(student.scaled, teacher.scaled, out=self.take()).sub_(normalizer_ratio)
        self.log_q = student.scaled.sub_(student.normalizer)
        self.log_p = teacher.scaled.sub_(teacher.normalizer)
        self.q = torch.exp(self.log_q, out=student.exponentials)
        self._memory_for_p = teacher.exponentials
        if exact:
            logits_ratio, logits_error = _exact_difference(student_logits, teacher_logits)
            top_ratio, top_error = _exact_difference(student.top, teacher.top)
            d = logits_ratio.sub_(top_ratio).add_(logits_error.sub_(top_error)).div_(temperature)
            # The normalizers of an almost equal pair differ by less than their rounding errors; their ratio does not.
            near = d.abs().amax(dim=-1, keepdim=True) <= 0.5
            near_ratio = d.expm1().mul_(self.p).sum(dim=-1, keepdim=True).log1p_()
            self.d = d.sub_(torch.where(near, near_ratio, normalizer_ratio))

    @cached_property
    def p(self) -> Tensor:
        """The teacher's distribution, which not every divergence needs."""
        return torch.exp(self.log_p, out=self._memory_for_p)


class _LogSoftmax:
    """The parts of ln softmax(z / T) = scaled - normalizer, for z [N, C].

    top, top_class: max z and its class [N, 1].
    scaled: s = (z - max z) / T [N, C].
    exponentials: memory [N, C] that is free again.
    normalizer: log1p(sum of exp(s) over the classes other than the largest) [N, 1].
    """

    def __init__(self, logits: Tensor, temperature: float, take: Callable[[], Tensor]) -> None:
        self.top, self.top_class = logits.max(dim=-1, keepdim=True)
        self.scaled = torch.sub(logits, self.top, out=take())
        if temperature != 1.0:
            self.scaled.div_(temperature)
        self.exponentials = torch.exp(self.scaled, out=take()).scatter_(-1, self.top_class, 0.0)
        self.normalizer = self.exponentials.sum(dim=-1, keepdim=True).log1p_()


def _exact_difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a - b rounded, and what the rounding took away (Knuth's TwoSum)."""
    difference = a - b
    subtracted = a - difference
    error = torch.sub(a, difference + subtracted).add_(subtracted.sub_(b))
    return difference, error


class _Terms(NamedTuple):
    """What a divergence says about a `_Pair`.

    value: [N, C], the terms of the sum over classes.
    weight: [N, C], dD/d(ln q) of each class; a multiple of q may be added, the softmax annihilates it.
    log_factor: [N, 1], the logarithm of a factor that value and weight still lack, where that factor might overflow.
    """

    value: Tensor
    weight: Tensor
    log_factor: Tensor | None = None


@dataclass(frozen=True)
class _Kernel:
    """A divergence with its parameters bound.

    terms: the function of a pair.
    exact: whether `_Pair.d` must be exact in float32 too (in float64 it always is).
    wide: whether to compute in float64 whatever the input is, and to saturate the result.
    """

    terms: Callable[[_Pair], _Terms]
    exact: bool = False
    wide: bool = False


def _apply_factor(x: Tensor, log_factor: Tensor) -> Tensor:
    """x * exp(log_factor) in place, saturated at the largest number of x's dtype.

    In two halves, so that it is exact wherever the product fits although exp(log_factor) does not; both are cut where
    they would be infinite, since 0 must stay 0.
    """
    half = (log_factor / 2).clamp_(max=700.0).exp_()
    most = torch.finfo(x.dtype).max
    return x.mul_(half).mul_(half).clamp_(-most, most)


class _Request(NamedTuple):
    """What is asked of a pair of logits, apart from the logits and the mask."""

    kernel: _Kernel
    temperature: float
    reduction: str
    needs_gradient: bool


def _evaluate_block(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    request: _Request,
    scratch: _Scratch,
    gradient: Tensor | None,
) -> Tensor:
    """Values [N] of logits [N, C]; dD/dz goes into `gradient` [N, C] unless that is None."""
    kernel, temperature = request.kernel, request.temperature
    if mask is not None:
        # Equal logits have value and gradient 0, and whatever stood here takes part in no arithmetic.
        dropped = mask.logical_not().unsqueeze(-1)
        student_logits = student_logits.masked_fill(dropped, 0.0)
        teacher_logits = teacher_logits.masked_fill(dropped, 0.0)
    scratch.start(len(student_logits))
    exact = kernel.exact or student_logits.dtype == torch.float64
    pair = _Pair(student_logits, teacher_logits, temperature, exact, scratch)
    value, weight, log_factor = kernel.terms(pair)
    value = value.sum(dim=-1).clamp_(min=0.0)
    if log_factor is not None:
        value = _apply_factor(value, log_factor.squeeze(-1))
    if gradient is not None:
        torch.addcmul(weight, pair.q, weight.sum(dim=-1, keepdim=True), value=-1.0, out=gradient)
        if temperature != 1.0:
            gradient.div_(temperature)
        # The largest class gets minus the sum of the others: where q is almost 1 its own difference cancels.
        gradient.scatter_(-1, pair.top_class, 0.0)
        gradient.scatter_(-1, pair.top_class, gradient.sum(dim=-1, keepdim=True).neg_())
        if log_factor is not None:
            _apply_factor(gradient, log_factor)
    return value


def _evaluate(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, request: _Request
) -> tuple[Tensor, Tensor | None]:
    """Values [...] and, if wanted, dD/dz [..., C], both in the dtype of the computation."""
    *positions, classes = student_logits.shape
    dtype = torch.float64 if request.kernel.wide else _result_dtype(student_logits, teacher_logits)
    if len(positions) != 1:
        student_logits, teacher_logits = student_logits.reshape(-1, classes), teacher_logits.reshape(-1, classes)
        mask = None if mask is None else mask.reshape(-1)
    gradient = torch.empty_like(student_logits, dtype=dtype) if request.needs_gradient else None
    on_cpu = student_logits.device.type == "cpu"
    rows = max(1, (_BLOCK_CPU * torch.get_num_threads() if on_cpu else _BLOCK_ACCELERATOR) // classes)
    count = len(student_logits)
    scratch = _Scratch(student_logits, min(rows, count), dtype)
    if count <= rows:
        value = _evaluate_block(student_logits.to(dtype), teacher_logits.to(dtype), mask, request, scratch, gradient)
    else:
        value = student_logits.new_empty(count, dtype=dtype)
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            value[part] = _evaluate_block(
                student_logits[part].to(dtype),
                teacher_logits[part].to(dtype),
                None if mask is None else mask[part],
                request,
                scratch,
                None if gradient is None else gradient[part],
            )
    if len(positions) != 1:
        value = value.reshape(positions)
        gradient = None if gradient is None else gradient.reshape(*positions, classes)
    return value, gradient


def _result_dtype(student_logits: Tensor, teacher_logits: Tensor) -> torch.dtype:
    """float64 if either input is, otherwise float32."""
    return torch.float64 if torch.float64 in (student_logits.dtype, teacher_logits.dtype) else torch.float32


def _reduce(value: Tensor, mask: Tensor | None, reduction: str, dim: tuple[int, ...]) -> tuple[Tensor, Tensor | float]:
    """The values reduced over `dim`, and the factor that each of them had in that."""
    if reduction == "none" or not dim:
        return value, 1.0
    total = value.sum(dim)
    if reduction == "sum":
        return total, 1.0
    if mask is None:
        factor = 1.0 / max(1, math.prod(value.shape[i] for i in dim))
    else:
        factor = mask.sum(dim).clamp(min=1).to(value.dtype).reciprocal()
    return total * factor, factor


def _saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A cast to float32 or float64 that gives the largest finite number where x is larger, or minus that."""
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)


class _Reduced(torch.autograd.Function):
    """(student_logits, teacher_logits, mask, request) -> (reduced value, dD/dz [..., C], factor of the reduction).

    The gradient of every position is computed along with its value and is all that is kept for the way back. Only the
    first output is differentiable, and once.
    """

    @staticmethod
    def forward(
        student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, request: _Request
    ) -> tuple[Tensor, Tensor | None, Tensor | float]:
        value, gradient = _evaluate(student_logits, teacher_logits, mask, request)
        value, factor = _reduce(value, mask, request.reduction, tuple(range(value.dim())))
        if request.kernel.wide:
            value = _saturate(value, _result_dtype(student_logits, teacher_logits))
        return value, gradient, factor

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, gradient, factor = output
        ctx.dtype, ctx.request = inputs[0].dtype, inputs[3]
        ctx.factor = factor
        if gradient is not None:
            if isinstance(factor, Tensor):
                ctx.mark_non_differentiable(gradient, factor)
                ctx.save_for_backward(gradient, factor)
            else:
                ctx.mark_non_differentiable(gradient)
                ctx.save_for_backward(gradient)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value: Tensor, *_):
        gradient, *factor = ctx.saved_tensors
        grad_value = grad_value * (factor[0] if factor else ctx.factor)
        gradient = gradient * (grad_value.unsqueeze(-1) if ctx.request.reduction == "none" else grad_value)
        if ctx.request.kernel.wide:
            gradient = _saturate(gradient, torch.float64 if ctx.dtype == torch.float64 else torch.float32)
        return gradient.to(ctx.dtype), None, None, None

    @staticmethod
    def vmap(info, in_dims, student_logits, teacher_logits, mask, request):
        def to_front(x: Tensor | None, dim: int | None) -> Tensor | None:
            if x is None:
                return None
            return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

        tensors = [to_front(x, dim) for x, dim in zip((student_logits, teacher_logits, mask), in_dims, strict=False)]
        # Inside vmap a tensor does not say that a gradient is taken around the vmap; here it does.
        needs_gradient = request.needs_gradient or student_logits.requires_grad
        each = request._replace(reduction="none", needs_gradient=needs_gradient)
        value, gradient, _ = _Reduced.apply(*tensors, each)
        value, factor = _reduce(value, tensors[2], request.reduction, tuple(range(1, value.dim())))
        return (value, gradient, factor), (
            0,
            None if gradient is None else 0,
            0 if isinstance(factor, Tensor) else None,
        )


# PyTorch binds the arguments to this signature at every call; looking it up anew takes longer than a small divergence.
_Reduced.forward.__signature__ = inspect.signature(_Reduced.forward)


def _divergence(
    kernel: _Kernel,
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    mask: Tensor | None,
    reduction: str,
) -> Tensor:
    """Check the input, evaluate the kernel at every position, and reduce."""
    shape = student_logits.shape
    if shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {list(shape)} and teacher logits {list(teacher_logits.shape)} differ in shape "
            f"({_count(student_logits)} and {_count(teacher_logits)} classes)"
        )
    if _count(student_logits) == 0:
        raise ValueError(f"logits must be [..., C] with at least one class, got {list(shape)}")
    if not (student_logits.is_floating_point() and teacher_logits.is_floating_point()):
        raise ValueError(f"logits must be floating point, got {student_logits.dtype} and {teacher_logits.dtype}")
    if mask is not None and mask.shape != shape[:-1]:
        raise ValueError(
            f"mask {list(mask.shape)} does not fit logits {list(shape)} ({_count(student_logits)} classes): "
            f"it must be {list(shape[:-1])}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; choose one of {', '.join(REDUCTIONS)}")
    temperature = _finite("temperature", temperature)
    if temperature <= 0.0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")

    if mask is not None and mask.dtype != torch.bool:
        mask = mask != 0
    needs_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    request = _Request(kernel, temperature, reduction, needs_gradient)
    return _Reduced.apply(student_logits, teacher_logits.detach(), mask, request)[0]


def _count(logits: Tensor) -> int:
    """C; 0 for a tensor without dimensions."""
    return logits.shape[-1] if logits.dim() else 0


def _finite(name: str, number: float) -> float:
    """The number as a float; ValueError, naming it, unless it is a finite real number."""
    if not isinstance(number, Real) or not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {number!r}")
    return float(number)


# The alpha-beta divergence and both Kullback-Leibler divergences
#
# With d = ln q - ln p, E_k(d) = (exp(k d) - 1) / k, E_0(d) = d and s = alpha + beta, three slopes between the powers
# p^s, p^alpha q^beta and q^s all have the sign of d:
#
#     w = (q^s - p^alpha q^beta) / alpha = p^alpha q^beta E_alpha(d)      (which is dD/d(ln q), whatever beta is)
#     u = (p^alpha q^beta - p^s) / beta  = p^s E_beta(d)
#     t = (q^s - p^s) / s                = p^s E_s(d)
#
# and each class contributes D = (w - u) / s = (t - u) / alpha = (w - t) / beta: the definition, written so that the
# limits at alpha = 0, beta = 0 and s = 0 are no special cases. The largest divisor cancels least. What is left to
# cancel, where d is small, a power series does without.


def _slope(pair: _Pair, low: Tensor, high: Tensor, exponent: float) -> Tensor:
    """(high - low) / k for powers with ln high - ln low = k d; `low` d for k = 0.

    x - y = (x + y) tanh((ln x - ln y) / 2) has the relative accuracy of d and cannot overflow.
    """
    if exponent == 0.0:
        return torch.mul(low, pair.d, out=pair.take())
    half = torch.mul(pair.d, 0.5 * exponent, out=pair.take()).tanh_()
    slope = torch.mul(half, low, out=pair.take()).addcmul_(half, high)
    return slope if exponent == 1.0 else slope.mul_(1.0 / exponent)


def _forward_kl_terms(pair: _Pair) -> _Terms:
    weight = _slope(pair, pair.p, pair.q, 1.0)
    value = torch.addcmul(weight, pair.p, pair.d, value=-1.0, out=pair.take())
    if pair.exact:
        value = _near_equality(value, pair.p, pair.d, alpha=1.0, beta=0.0)
    return _Terms(value, weight)


def _reverse_kl_terms(pair: _Pair) -> _Terms:
    weight = torch.mul(pair.q, pair.d, out=pair.take())
    value = _slope(pair, pair.p, pair.q, 1.0).sub_(weight).neg_()
    if pair.exact:
        value = _near_equality(value, pair.p, pair.d, alpha=0.0, beta=1.0)
    return _Terms(value, weight)


def _alpha_beta_kernel(alpha: float, beta: float, log_scale: float) -> _Kernel:
    """The kernel of D_{alpha,beta}, times exp(log_scale)."""
    # Exponents so small that they change no digit are 0 (k d would be subnormal), and those beyond 1e100 count as that.
    alpha, beta = (0.0 if abs(k) < 1e-20 else math.copysign(min(abs(k), 1e100), k) for k in (alpha, beta))
    total = 0.0 if abs(alpha + beta) < 1e-20 else alpha + beta
    if log_scale == 0.0 and (alpha, beta) in _KULLBACK_LEIBLER:
        return _KULLBACK_LEIBLER[alpha, beta]
    divisor = max(total, alpha, beta, key=abs)
    wide = min(alpha, beta) < 0.0 or max(alpha, beta) > 1e4 or abs(log_scale) > 30.0

    def terms(pair: _Pair) -> _Terms:
        d, log_factor = pair.d, None
        powers = [
            torch.mul(pair.log_p, total, out=pair.take()),
            torch.mul(pair.log_p, alpha, out=pair.take()).add_(pair.log_q, alpha=beta),
            torch.mul(pair.log_q, total, out=pair.take()),
        ]
        if wide:
            log_factor = torch.stack([power.amax(dim=-1, keepdim=True) for power in powers]).amax(dim=0).clamp_(min=0.0)
            powers = [power.sub_(log_factor) for power in powers]
            log_factor = log_factor + log_scale
        p_power, mixed_power, q_power = (power.exp_() for power in powers)
        weight = _slope(pair, mixed_power, q_power, alpha)
        if divisor == 0.0:
            value = 0.5 * d.square()
        elif divisor == total:
            value = _slope(pair, p_power, mixed_power, beta).sub_(weight).mul_(-1.0 / total)
        elif divisor == alpha:
            value = _slope(pair, p_power, mixed_power, beta).sub_(_slope(pair, p_power, q_power, total))
            value.mul_(-1.0 / alpha)
        else:
            value = _slope(pair, p_power, q_power, total).sub_(weight).mul_(-1.0 / beta)
        if pair.exact and divisor != 0.0:
            value = _near_equality(value, p_power, d, alpha, beta)
        if log_scale != 0.0 and not wide:
            value.mul_(math.exp(log_scale))
            weight.mul_(math.exp(log_scale))
        return _Terms(value, weight, log_factor)

    # Below 0.5 the cancellation in (w - u) / s costs digits that float32 does not have to spare.
    return _Kernel(terms, exact=total < 0.5, wide=wide)


def _near_equality(value: Tensor, power: Tensor, d: Tensor, alpha: float, beta: float) -> Tensor:
    """`value`, replaced where k |d| is small, k = max(|alpha|, |beta|, |s|), by a series in which nothing cancels.

    (E_s(d) - E_beta(d)) / alpha = d^2 sum_m h_m(s, beta) d^m / (m + 2)!, with h_m(s, beta) = sum_i s^i beta^(m-i): no
    exponent is divided by. `power` is p^s.
    """
    total = alpha + beta
    largest = max(abs(alpha), abs(beta), abs(total))
    y = d * largest
    coefficients, h = [], 0.0
    for m in range(12 if d.dtype == torch.float64 else 7):
        h = h * (total / largest) + (beta / largest) ** m
        coefficients.append(h / math.factorial(m + 2))
    series = torch.full_like(y, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        series.mul_(y).add_(coefficient)
    series.mul_(d).mul_(d).mul_(power)
    return torch.where(y.abs_() <= 0.25, series, value)


_FORWARD_KL = _Kernel(_forward_kl_terms)
_REVERSE_KL = _Kernel(_reverse_kl_terms)
_KULLBACK_LEIBLER = {(1.0, 0.0): _FORWARD_KL, (0.0, 1.0): _REVERSE_KL}


@DIVERGENCES.register("fkld")
def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """KL(p || q) = sum_k p_k ln(p_k / q_k), in nats: what knowledge distillation minimizes.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv 1503.02531).

    Args:
        student_logits, teacher_logits: [..., C].
        temperature: T, which both logits are divided by.
        mask: [...], the positions to keep; None keeps all.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or [...] with reduction "none". Errors and precision: see the module.
    """
    return _divergence(_FORWARD_KL, student_logits, teacher_logits, temperature, mask, reduction)


@DIVERGENCES.register("rkld")
def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """KL(q || p) = sum_k q_k ln(q_k / p_k), in nats: the mode-seeking direction.

    Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024 (arXiv 2306.08543).

    Args:
        student_logits, teacher_logits: [..., C].
        temperature: T, which both logits are divided by.
        mask: [...], the positions to keep; None keeps all.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or [...] with reduction "none". Errors and precision: see the module.
    """
    return _divergence(_REVERSE_KL, student_logits, teacher_logits, temperature, mask, reduction)


@DIVERGENCES.register("abkd")
def ab_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float,
    beta: float,
    match_kl_scale: bool = False,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The alpha-beta divergence, extended by continuity to alpha = 0, beta = 0 and alpha + beta = 0:

        D(p || q) = - 1/(alpha beta) sum_k [p^alpha q^beta - alpha/(alpha+beta) p^(alpha+beta)
                                                           - beta/(alpha+beta) q^(alpha+beta)]

    (1, 0) is KL(p || q), (0, 1) is KL(q || p), alpha + beta = 1 the alpha family, alpha = 1 the beta family,
    (1/2, 1/2) is 4 (1 - sum sqrt(p q)) (Hellinger), (1, 1) is half the squared Euclidean distance, and (0, 0) is
    sum (ln p - ln q)^2 / 2. A larger beta concentrates on the classes that the student is sure of, a smaller alpha on
    those it gets most wrong.

    Cichocki, Cruces and Amari, "Generalized Alpha-Beta Divergences and Their Application to Robust Nonnegative Matrix
    Factorization", Entropy 13(1), 2011; Wang et al., "ABKD: Pursuing a Proper Allocation of the Probability Mass in
    Knowledge Distillation via alpha-beta-Divergence", ICML 2025 (arXiv 2505.04560).

    Value and gradient are exact to the precision of the dtype on and near the singular lines. With alpha, beta >= 0
    they are finite for logits up to 1e6 in size. A negative exponent is computed in float64 whatever the logits are,
    and can make the true value larger than any float: value and gradient are then exact where they fit the dtype, and
    saturate at `torch.finfo(dtype).max` (float64 for float64 logits, otherwise float32) where they do not; they are
    never NaN. Exponents beyond 1e100 in size count as 1e100.

    Args:
        student_logits, teacher_logits: [..., C].
        alpha, beta: any finite real numbers.
        match_kl_scale: multiply by C^(alpha + beta - 1), which makes the strength near p = q that of KL when the
            distributions are flat. Without it the exponents change the weight of the loss along with its shape.
        temperature: T, which both logits are divided by.
        mask: [...], the positions to keep; None keeps all.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or [...] with reduction "none".

    Raises:
        ValueError: alpha or beta is not finite; the rest as in the module.
    """
    alpha, beta = _finite("alpha", alpha), _finite("beta", beta)
    log_scale = (alpha + beta - 1.0) * math.log(max(_count(student_logits), 1)) if match_kl_scale else 0.0
    kernel = _alpha_beta_kernel(alpha, beta, log_scale)
    return _divergence(kernel, student_logits, teacher_logits, temperature, mask, reduction)


# The others


def _jensen_shannon_terms(pair: _Pair) -> _Terms:
    # ln of the larger probability over the mean m; then ln(q/m) and ln(p/m), neither of which is 0 * inf anywhere.
    above = pair.d.mul(0.5).abs_().tanh_().log1p_()
    weight = (above + pair.d.clamp(max=0.0)).mul_(pair.q)
    value = above.sub_(pair.d.clamp(min=0.0)).mul_(pair.p).add_(weight)
    return _Terms(value.mul_(0.5), weight.mul_(0.5))


def _log_over_mixture(d: Tensor, skew: float) -> Tensor:
    """ln(x / (skew x + (1 - skew) y)) for d = ln y - ln x."""
    rest = 1.0 - skew
    excess = d.clamp(max=30.0).expm1_().mul_(rest)
    # 1 + excess is the mixture over x. It cancels where y is much smaller, and overflows where y is much larger.
    log_mixture = torch.where(excess < -0.5, d.exp().mul_(rest).add_(skew).log_(), excess.log1p())
    return torch.where(d < 30.0, log_mixture, torch.neg(d).exp_().mul_(skew).add_(rest).log_().add_(d)).neg_()


def _skewed_forward_kl_terms(pair: _Pair, skew: float) -> _Terms:
    log_ratio = _log_over_mixture(pair.d, skew)
    value = _slope(pair, pair.p, pair.q, 1.0).mul_(1.0 - skew).addcmul_(pair.p, log_ratio)
    return _Terms(value, log_ratio.expm1_().mul_(pair.q).mul_(skew - 1.0))


def _skewed_reverse_kl_terms(pair: _Pair, skew: float) -> _Terms:
    log_ratio = _log_over_mixture(-pair.d, skew)
    value = _slope(pair, pair.p, pair.q, 1.0).mul_(skew - 1.0).addcmul_(pair.q, log_ratio)
    return _Terms(value, log_ratio.sub_(log_ratio.expm1(), alpha=skew).mul_(pair.q))


def _total_variation_terms(pair: _Pair) -> _Terms:
    value = _slope(pair, pair.p, pair.q, 1.0).abs_().mul_(0.5)
    return _Terms(value, torch.sign(pair.d).mul_(pair.q).mul_(0.5))


_JENSEN_SHANNON = _Kernel(_jensen_shannon_terms)
_TOTAL_VARIATION = _Kernel(_total_variation_terms)


def _skewed_kernel(terms: Callable[[_Pair, float], _Terms], unskewed: _Kernel, skew: float) -> _Kernel:
    """The kernel of a skewed divergence. Raises ValueError unless skew is in [0, 1)."""
    skew = _finite("skew", skew)
    if not 0.0 <= skew < 1.0:
        raise ValueError(f"skew must be in [0, 1), got {skew!r}")
    if skew == 0.0:
        return unskewed
    return _Kernel(lambda pair: terms(pair, skew))


@DIVERGENCES.register("js")
def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, in nats: symmetric, at most ln 2.

    Lin, "Divergence Measures Based on the Shannon Entropy", IEEE Transactions on Information Theory 37(1), 1991.

    Args:
        student_logits, teacher_logits: [..., C].
        temperature: T, which both logits are divided by.
        mask: [...], the positions to keep; None keeps all.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or [...] with reduction "none". Errors and precision: see the module.
    """
    return _divergence(_JENSEN_SHANNON, student_logits, teacher_logits, temperature, mask, reduction)


@DIVERGENCES.register("skew_fkld")
def skewed_forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: float = 0.1,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """KL(p || skew p + (1 - skew) q), in nats: forward KL that stays finite, at most -ln(skew).

    Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024 (arXiv 2402.03898).

    Args:
        student_logits, teacher_logits: [..., C].
        skew: the share of the first distribution in the mixture, in [0, 1); 0 gives forward KL.
        temperature: T, which both logits are divided by.
        mask: [...], the positions to keep; None keeps all.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or [...] with reduction "none". Errors and precision: see the module.

    Raises:
        ValueError: skew is not in [0, 1); the rest as in the module.
    """
    return _divergence(
        _skewed_kernel(_skewed_forward_kl_terms, _FORWARD_KL, skew),
        student_logits,
        teacher_logits,
        temperature,
        mask,
        reduction,
    )


@DIVERGENCES.register("skew_rkld")
def skewed_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: float = 0.1,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """KL(q || skew q + (1 - skew) p), in nats: reverse KL that stays finite, at most -ln(skew).

    Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024 (arXiv 2402.03898).

    Args:
        student_logits, teacher_logits: [..., C].
        skew: the share of the first distribution in the mixture, in [0, 1); 0 gives reverse KL.
        temperature: T, which both logits are divided by.
        mask: [...], the positions to keep; None keeps all.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or [...] with reduction "none". Errors and precision: see the module.

    Raises:
        ValueError: skew is not in [0, 1); the rest as in the module.
    """
    return _divergence(
        _skewed_kernel(_skewed_reverse_kl_terms, _REVERSE_KL, skew),
        student_logits,
        teacher_logits,
        temperature,
        mask,
        reduction,
    )


@DIVERGENCES.register("tvd")
def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """sum_k |p_k - q_k| / 2: between 0 and 1, and the most that the two can differ about any set of classes.

    Where p_k = q_k the gradient takes the subgradient 0. Wen et al., "f-Divergence Minimization for Sequence-Level
    Knowledge Distillation", ACL 2023 (arXiv 2307.15190).

    Args:
        student_logits, teacher_logits: [..., C].
        temperature: T, which both logits are divided by.
        mask: [...], the positions to keep; None keeps all.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or [...] with reduction "none". Errors and precision: see the module.
    """
    return _divergence(_TOTAL_VARIATION, student_logits, teacher_logits, temperature, mask, reduction)


# A divergence with its parameters


@dataclass(frozen=True)
class Divergence:
    """A divergence with its parameters and temperature, called as `divergence(student_logits, teacher_logits)`.

    Args:
        name: its config name ("fkld", "abkd", ...).
        temperature: T of every call that names no other.
        parameters: what else its function takes, for instance {"alpha": 0.8, "beta": 0.3}.

    Raises:
        ConfigError: there is no such divergence, a parameter is unknown or missing, or a value is out of range.
    """

    name: str
    temperature: float = 1.0
    parameters: dict[str, float | bool] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        function = DIVERGENCES[self.name]
        signature = inspect.signature(function).parameters
        own = [name for name in signature if name not in _SHARED_PARAMETERS]
        for name in self.parameters:
            if name not in own:
                raise ConfigError(
                    f"divergence {self.name!r} has no parameter {name!r}",
                    expected=list_names(own) or "no parameters",
                    hint=" or ".join(nearest(name, own)),
                )
        missing = [
            name for name in own if name not in self.parameters and signature[name].default is inspect.Parameter.empty
        ]
        if missing:
            raise ConfigError(
                f"divergence {self.name!r} needs {list_names(missing)}",
                expected=list_names(own),
                hint=" ".join(f"divergence.{name}=..." for name in missing),
            )
        try:  # on two classes, so that a value out of range fails here and not in the first step
            self(torch.zeros(2), torch.zeros(2))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"divergence {self.name!r}: {error}") from error

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        temperature: float | None = None,
        mask: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """D(p || q) of logits [..., C] at `temperature` (None: its own); see the function that `name` stands for."""
        return DIVERGENCES[self.name](
            student_logits,
            teacher_logits,
            temperature=self.temperature if temperature is None else temperature,
            mask=mask,
            reduction=reduction,
            **self.parameters,
        )

    @property
    def dual(self) -> Divergence:
        """The divergence with its arguments exchanged: `dual(b, a)` is `self(a, b)`, at the same temperature.

        A divergence has a gradient by its first argument alone; that of the dual is the one by the second.

        Raises ConfigError when `DUALS` does not name it.
        """
        if self.name not in DUALS:
            raise ConfigError(
                f"the gradient of divergence {self.name!r} by the teacher's logits is not known",
                expected=list_names(DUALS),
                hint=f"an entry for {self.name!r} in vkd.divergences.DUALS",
            )
        exchanged = {"alpha": "beta", "beta": "alpha"}
        parameters = {exchanged.get(name, name): value for name, value in self.parameters.items()}
        return replace(self, name=DUALS[self.name], parameters=parameters)


def make_divergence(name: str, *, temperature: float = 1.0, **parameters: float | bool) -> Divergence:
    """The divergence called `name` in a config, for instance `make_divergence("abkd", alpha=0.8, beta=0.3)`.

    Raises ConfigError for an unknown name or parameter, a missing one, or a value out of range.
    """
    return Divergence(name, temperature, parameters)
