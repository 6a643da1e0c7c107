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
from functools import cached_property, lru_cache, partial
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
_BLOCK_CPU = 2**17
_BLOCK_ACCELERATOR = 2**25


# What all divergences share


def _number(number: Tensor | float, like: Tensor) -> Tensor | float:
    """`number`, to multiply `like` by or to divide it by. A tensor is returned as it is.

    PyTorch makes a Python number a tensor at every operation, which takes longer than the operation itself where `like`
    is small. So on a CPU it is a tensor without dimensions here, made once.
    """
    if type(number) is float and type(like) is Tensor and like.is_cpu:
        return _zero_dimensional(number, like.dtype)
    return number


@lru_cache(maxsize=4096)
def _zero_dimensional(number: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(number, dtype=dtype, device="cpu")


def _divide(logits: Tensor, temperature: float) -> Tensor:
    """z / T [N, C], up to a constant for each position."""
    if temperature == 1.0:
        return logits
    if math.frexp(temperature)[0] != 0.5:
        # Only dividing by a power of two is exact, so what all classes have in common goes before it is rounded.
        logits = logits - logits.amax(dim=-1, keepdim=True)
    return logits / _number(temperature, logits)


class _Pair:
    """The teacher's and the student's distribution at N positions. Every tensor is [N, C] and only to be read.

    Args:
        student_logits, teacher_logits: [N, C], float32 or float64.
        temperature: T.
        exact: compute d from differences of logits, so that it keeps its relative accuracy where p and q are almost
            equal even if both are tiny. It costs more passes than the rest; divergences that weigh every class by a
            positive power of p or q do not need it in float32.

    Attributes:
        log_q, log_p: the logarithms of the distributions, as long as neither `q` nor `p` was asked for.
        d: ln q - ln p.
    """

    def __init__(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float, exact: bool) -> None:
        self.exact = exact
        if exact:
            self._compare_exactly(student_logits, teacher_logits, temperature)
            return
        # Where q is almost 1 its logarithm has few digits here. It needs none: where p is almost 1 too, D grows with
        # the square of d, and the gradient of that class is taken from the others (see _evaluate_block).
        self.log_q = torch.log_softmax(_divide(student_logits, temperature), -1)
        self.log_p = torch.log_softmax(_divide(teacher_logits, temperature), -1)
        self.d = self.log_q - self.log_p

    def _compare_exactly(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
        student = _LogSoftmax(student_logits, temperature)
        teacher = _LogSoftmax(teacher_logits, temperature)
        self.log_q = student.scaled.sub_(student.normalizer)
        self.log_p = teacher.scaled.sub_(teacher.normalizer)
        logits_ratio, logits_error = _exact_difference(student_logits, teacher_logits)
        top_ratio, top_error = _exact_difference(student.top, teacher.top)
        d = logits_ratio.sub_(top_ratio).add_(logits_error.sub_(top_error)).div_(temperature)
        # The normalizers of an almost equal pair differ by less than their rounding errors; their ratio does not.
        near = d.abs().amax(dim=-1, keepdim=True) <= 0.5
        near_ratio = d.expm1().mul_(self.log_p.exp()).sum(dim=-1, keepdim=True).log1p_()
        self.d = d.sub_(torch.where(near, near_ratio, student.normalizer - teacher.normalizer))

    @cached_property
    def q(self) -> Tensor:
        """The student's distribution. It takes the memory of its logarithm, which is gone then."""
        return self.__dict__.pop("log_q").exp_()

    @cached_property
    def p(self) -> Tensor:
        """The teacher's distribution. It takes the memory of its logarithm, which is gone then."""
        return self.__dict__.pop("log_p").exp_()

    def through_softmax(self, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """w - q sum(w), for w [N, C] that may be written over, in the memory of `out`, contiguous, if there is one."""
        log_q = self.__dict__.get("log_q")
        if log_q is None:
            total = weight.sum(dim=-1, keepdim=True)
            return torch.addcmul(weight, self.q, total, value=-1.0, out=weight if out is None else out)
        # One pass, and q need not be made for it. It would write past the strides of `out` in silence.
        if out is None:
            return torch._log_softmax_backward_data(weight, log_q, -1, weight.dtype)
        return torch._log_softmax_backward_data(weight, log_q, -1, weight.dtype, out=out)


class _LogSoftmax:
    """The parts of ln softmax(z / T) = scaled - normalizer, for z [N, C].

    Leaving the largest class out of the sum keeps the result accurate to the last digits where softmax is almost 1.

    top: max z [N, 1].
    scaled: s = (z - max z) / T [N, C].
    normalizer: log1p(sum of exp(s) over the classes other than the largest) [N, 1].
    """

    def __init__(self, logits: Tensor, temperature: float) -> None:
        self.top, top_class = logits.max(dim=-1, keepdim=True)
        self.scaled = (logits - self.top).div_(temperature)
        self.normalizer = self.scaled.exp().scatter_(-1, top_class, 0.0).sum(dim=-1, keepdim=True).log1p_()


def _exact_difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a - b rounded, and what the rounding took away (Knuth's TwoSum)."""
    difference = a - b
    subtracted = a - difference
    error = torch.sub(a, difference + subtracted).add_(subtracted.sub_(b))
    return difference, error


class _Terms(NamedTuple):
    """What a divergence says about a `_Pair`.

    value: [N, C], the terms of the sum over classes, none of them negative.
    weight: [N, C], dD/d(ln q) of each class; a multiple of q may be added, the softmax annihilates it. It becomes the
        gradient, so it must share no memory with anything else.
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
    value_scale, weight_scale: factors that the value and the weight of `terms` still lack.
    """

    terms: Callable[[_Pair], _Terms]
    exact: bool = False
    wide: bool = False
    value_scale: float = 1.0
    weight_scale: float = 1.0


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
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Values [N] of logits [N, C] and, if wanted, dD/dz [N, C], in the memory of `out` if there is one, in `dtype`.

    Both still lack the kernel's scales, and dD/dz the 1/T: they are cheaper to multiply in later, with other factors.
    """
    kernel = request.kernel
    if student_logits.dtype is not dtype or teacher_logits.dtype is not dtype:
        student_logits, teacher_logits = student_logits.to(dtype), teacher_logits.to(dtype)
    if mask is not None:
        # Equal logits have value and gradient 0, and whatever stood here takes part in no arithmetic.
        dropped = mask.logical_not().unsqueeze(-1)
        student_logits = student_logits.masked_fill(dropped, 0.0)
        teacher_logits = teacher_logits.masked_fill(dropped, 0.0)
    exact = kernel.exact or dtype is torch.float64
    pair = _Pair(student_logits, teacher_logits, request.temperature, exact)
    value, weight, log_factor = kernel.terms(pair)
    value = value.sum(dim=-1)
    if log_factor is not None:
        value = _apply_factor(value, log_factor.squeeze(-1))
    if not request.needs_gradient:
        return value, None
    # Where q is almost 1, w - q sum(w) has cancelled. What it lost is what the sum over the classes now lacks to 0, so
    # a second time the largest class gets minus the sum of the others, and nothing else changes.
    if out is None and weight.is_contiguous():
        out = weight
    gradient = pair.through_softmax(pair.through_softmax(weight), out)
    if log_factor is not None:
        _apply_factor(gradient, log_factor - math.log(request.temperature))
    return value, gradient


def _evaluate(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, request: _Request
) -> tuple[Tensor, Tensor | None]:
    """Values [...] and, if wanted, dD/dz [..., C], as in `_evaluate_block`, in the dtype of the computation."""
    shape = student_logits.shape
    if len(shape) != 2:
        value, gradient = _evaluate(
            student_logits.reshape(-1, shape[-1]),
            teacher_logits.reshape(-1, shape[-1]),
            None if mask is None else mask.reshape(-1),
            request,
        )
        return value.reshape(shape[:-1]), None if gradient is None else gradient.reshape(shape)
    count, classes = shape
    dtype = torch.float64 if request.kernel.wide else _result_dtype(student_logits, teacher_logits)
    rows = (_BLOCK_CPU * torch.get_num_threads() if student_logits.is_cpu else _BLOCK_ACCELERATOR) // classes
    if count <= rows:
        return _evaluate_block(student_logits, teacher_logits, mask, request, dtype)
    value = student_logits.new_empty(count, dtype=dtype)
    gradient = student_logits.new_empty(shape, dtype=dtype) if request.needs_gradient else None
    rows = max(1, rows)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        value[part], _ = _evaluate_block(
            student_logits[part],
            teacher_logits[part],
            None if mask is None else mask[part],
            request,
            dtype,
            None if gradient is None else gradient[part],
        )
    return value, gradient


def _result_dtype(student_logits: Tensor, teacher_logits: Tensor) -> torch.dtype:
    """float64 if either input is, otherwise float32."""
    either = student_logits.dtype is torch.float64 or teacher_logits.dtype is torch.float64
    return torch.float64 if either else torch.float32


def _reduce(value: Tensor, mask: Tensor | None, reduction: str, keep: int = 0) -> tuple[Tensor, Tensor | float]:
    """The values summed over all dimensions but the first `keep`, and the factor that the reduction asks for then."""
    if reduction == "none" or value.dim() == keep:
        return value, 1.0
    dim = tuple(range(keep, value.dim()))
    total = value.sum(dim)
    if reduction == "sum":
        return total, 1.0
    if mask is None:
        return total, 1.0 / max(1, math.prod(value.shape[keep:]))
    return total, mask.sum(dim).clamp(min=1).to(value.dtype).reciprocal()


def _saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A cast to float32 or float64 that gives the largest finite number where x is larger, or minus that."""
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)


def _evaluate_and_reduce(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, request: _Request
) -> tuple[Tensor, Tensor | None, Tensor | float]:
    """The reduced value, a multiple of dD/dz [..., C], and the factor that makes it the derivative of the value."""
    kernel = request.kernel
    value, gradient = _evaluate(student_logits, teacher_logits, mask, request)
    value, factor = _reduce(value, mask, request.reduction)
    value = value * _number(factor * kernel.value_scale, value)
    if kernel.wide:
        return _saturate(value, _result_dtype(student_logits, teacher_logits)), gradient, factor
    return value, gradient, factor * (kernel.weight_scale / request.temperature)


class _Reduced(torch.autograd.Function):
    """(student_logits, teacher_logits, mask, request) -> reduced value.

    The gradient of every position is computed along with its value and is all that is kept for the way back. It can be
    differentiated once.
    """

    @staticmethod
    def forward(ctx, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, request: _Request) -> Tensor:
        value, gradient, factor = _evaluate_and_reduce(student_logits, teacher_logits, mask, request)
        _keep(ctx, student_logits.dtype, request, gradient, factor)
        return value

    @staticmethod
    def backward(ctx, grad_value: Tensor, *_) -> tuple[Tensor, None, None, None]:
        # The wrapper takes longer than the arithmetic, and only a gradient with a graph of its own needs it.
        way_back = _multiply_once if torch.is_grad_enabled() else _multiply
        return way_back(ctx, grad_value), None, None, None


def _multiply(ctx, grad_value: Tensor) -> Tensor:
    """The gradient by the student's logits for the gradient `grad_value` by the reduced value."""
    gradient, *factor = ctx.saved_tensors
    grad_value = grad_value * (factor[0] if factor else _number(ctx.factor, grad_value))
    gradient = gradient * (grad_value.unsqueeze(-1) if ctx.request.reduction == "none" else grad_value)
    if ctx.request.kernel.wide:
        gradient = _saturate(gradient, torch.float64 if ctx.dtype is torch.float64 else torch.float32)
    return gradient if gradient.dtype is ctx.dtype else gradient.to(ctx.dtype)


_multiply_once = torch.autograd.function.once_differentiable(_multiply)


def _keep(ctx, dtype: torch.dtype, request: _Request, gradient: Tensor, factor: Tensor | float) -> None:
    """Keep for the way back what `_evaluate_and_reduce` returned."""
    ctx.dtype, ctx.request, ctx.factor = dtype, request, factor
    ctx.save_for_backward(gradient, *([factor] if isinstance(factor, Tensor) else []))


class _ReducedInTransforms(torch.autograd.Function):
    """`_Reduced` for `torch.vmap` and `torch.func.grad`; it takes PyTorch longer to call.

    Returns what `_evaluate_and_reduce` does; only the first output is differentiable.
    """

    forward = staticmethod(_evaluate_and_reduce)
    backward = _Reduced.backward

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, gradient, factor = output
        if gradient is not None:
            ctx.mark_non_differentiable(gradient, *([factor] if isinstance(factor, Tensor) else []))
            _keep(ctx, inputs[0].dtype, inputs[3], gradient, factor)

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
        value, gradient, scale = _ReducedInTransforms.apply(*tensors, each)
        value, factor = _reduce(value, tensors[2], request.reduction, keep=1)
        return (value * factor, gradient, factor * scale), (
            0,
            None if gradient is None else 0,
            0 if isinstance(factor, Tensor) else None,
        )


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
    needs_gradient = student_logits.requires_grad and torch.is_grad_enabled()
    request = _Request(kernel, temperature, reduction, needs_gradient)
    # What torch.autograd.Function asks before it refuses a function without setup_context.
    if torch._C._are_functorch_transforms_active():
        return _ReducedInTransforms.apply(student_logits, teacher_logits.detach(), mask, request)[0]
    if needs_gradient:
        return _Reduced.apply(student_logits, teacher_logits, mask, request)
    with torch.no_grad():
        return _evaluate_and_reduce(student_logits, teacher_logits, mask, request)[0]


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
#
# The size of a slope with exponent k is -E_|k|(-|d|) times the larger of its two powers, which neither overflows nor
# loses digits. For w that is q^beta p^alpha or q^beta q^alpha, whose logarithm takes one maximum; so with u and t.


def _difference(pair: _Pair) -> Tensor:
    """q - p [N, C], with the relative accuracy of d."""
    decay = pair.d.abs().neg_().expm1_()
    return torch.maximum(pair.p, pair.q).mul_(decay).copysign_(pair.d)


def _forward_kl_terms(pair: _Pair) -> _Terms:
    weight = _difference(pair)
    value = torch.addcmul(weight, pair.p, pair.d, value=-1.0).relu_()
    if pair.exact:
        value = _near_equality(value, pair.p, pair.d, alpha=1.0, beta=0.0)
    return _Terms(value, weight)


def _reverse_kl_terms(pair: _Pair) -> _Terms:
    weight = pair.q * pair.d
    value = _difference(pair).neg_().add_(weight).relu_()
    if pair.exact:
        value = _near_equality(value, pair.p, pair.d, alpha=0.0, beta=1.0)
    return _Terms(value, weight)


@lru_cache(maxsize=1024)
def _alpha_beta_kernel(alpha: float, beta: float, log_scale: float) -> _Kernel:
    """The kernel of D_{alpha,beta}, times exp(log_scale)."""
    # Exponents so small that they change no digit are 0 (k d would be subnormal), and those beyond 1e100 count as that.
    alpha, beta = (0.0 if abs(k) < 1e-20 else math.copysign(min(abs(k), 1e100), k) for k in (alpha, beta))
    total = 0.0 if abs(alpha + beta) < 1e-20 else alpha + beta
    if log_scale == 0.0 and (alpha, beta) in _KULLBACK_LEIBLER:
        return _KULLBACK_LEIBLER[alpha, beta]
    if min(alpha, beta) < 0.0 or max(alpha, beta) > 1e4 or abs(log_scale) > 30.0:
        return _Kernel(partial(_wide_terms, alpha=alpha, beta=beta, total=total, log_scale=log_scale), wide=True)
    scale, value_scale, weight_scale = math.exp(log_scale), 0.5, 1.0
    if total != 0.0:
        value_scale, weight_scale = 1.0 / (total * (alpha or beta)), 1.0 / (alpha or beta)
    # Below 0.5 the cancellation in (w - u) / s costs digits that float32 does not have to spare.
    return _Kernel(
        partial(_ordinary_terms, alpha=alpha, beta=beta, total=total, value_scale=value_scale),
        exact=total < 0.5,
        value_scale=scale * value_scale,
        weight_scale=scale * weight_scale,
    )


def _ordinary_terms(pair: _Pair, alpha: float, beta: float, total: float, value_scale: float) -> _Terms:
    """The terms for alpha, beta >= 0. No power is larger than 1 then, and s is the largest divisor."""
    d = pair.d
    if total == 0.0:
        return _Terms(d.square(), d.clone())
    log_larger = torch.maximum(pair.log_p, pair.log_q)
    u = torch.mul(log_larger, _number(beta, d)).add_(pair.log_p, alpha=alpha).exp_()
    w = log_larger.mul_(_number(alpha, d)).add_(pair.log_q, alpha=beta).exp_()
    power = pair.log_p.mul(total).exp_() if pair.exact else None
    del pair.log_p  # not needed any more; with it the peak would be seven [N, C], not six
    # k E_k(-|d|), or -|d| times the other exponent for k = 0. The rounding of this quotient cancels in D if d is small.
    quotient = beta / alpha if alpha and beta else 1.0
    w_decay = d.abs().mul_(_number(-(alpha or beta), d))
    u_decay = w_decay * _number(quotient, d)
    if alpha:
        w_decay.expm1_()
    if beta:
        u_decay.expm1_()
    # D = |w| - |u| up to the sign of d, and no class contributes less than 0.
    value = torch.addcmul(w.mul_(w_decay), u, u_decay, value=-1.0 / quotient, out=u).abs_()
    if power is not None:
        value = _near_equality(value, power.mul_(1.0 / value_scale), d, alpha, beta)
    return _Terms(value, w.copysign_(d))


def _wide_terms(pair: _Pair, alpha: float, beta: float, total: float, log_scale: float) -> _Terms:
    """The terms for any alpha and beta, times exp(log_scale), without a factor that may overflow."""
    d, distance = pair.d, pair.d.abs()
    ends = torch.minimum(pair.log_p, pair.log_q), torch.maximum(pair.log_p, pair.log_q)
    logarithms = {
        "w": (ends[alpha > 0.0] * alpha).add_(pair.log_q, alpha=beta),
        "u": (ends[beta > 0.0] * beta).add_(pair.log_p, alpha=alpha),
        "t": ends[total > 0.0] * total,
    }
    largest = [logarithm.amax(dim=-1, keepdim=True) for logarithm in logarithms.values()]
    log_factor = torch.stack(largest).amax(dim=0).clamp_(min=0.0)

    def size(slope: str, exponent: float) -> Tensor:
        power, k = logarithms[slope].sub_(log_factor).exp_(), abs(exponent)
        return power.mul_((distance * -k).expm1_().mul_(-1.0 / k) if k else distance)

    w = size("w", alpha)
    divisor = max(total, alpha, beta, key=abs)
    if divisor == total:
        value = w - size("u", beta)
    elif divisor == alpha:
        value = size("t", total) - size("u", beta)
    else:
        value = w - size("t", total)
    power = pair.log_p.mul(total).sub_(log_factor).exp_()
    value = _near_equality(value.abs_().mul_(1.0 / abs(divisor)), power, d, alpha, beta)
    return _Terms(value, w.copysign_(d), log_factor + log_scale)


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
    return _Terms(value.relu_(), weight)


def _log_over_mixture(d: Tensor, skew: float) -> Tensor:
    """ln(x / (skew x + (1 - skew) y)) for d = ln y - ln x."""
    rest = 1.0 - skew
    excess = d.clamp(max=30.0).expm1_().mul_(rest)
    # 1 + excess is the mixture over x. It cancels where y is much smaller, and overflows where y is much larger.
    log_mixture = torch.where(excess < -0.5, d.exp().mul_(rest).add_(skew).log_(), excess.log1p())
    return torch.where(d < 30.0, log_mixture, torch.neg(d).exp_().mul_(skew).add_(rest).log_().add_(d)).neg_()


def _skewed_forward_kl_terms(pair: _Pair, skew: float) -> _Terms:
    log_ratio = _log_over_mixture(pair.d, skew)
    value = _difference(pair).mul_(1.0 - skew).addcmul_(pair.p, log_ratio).relu_()
    return _Terms(value, log_ratio.expm1_().mul_(pair.q).mul_(skew - 1.0))


def _skewed_reverse_kl_terms(pair: _Pair, skew: float) -> _Terms:
    log_ratio = _log_over_mixture(-pair.d, skew)
    value = _difference(pair).mul_(skew - 1.0).addcmul_(pair.q, log_ratio).relu_()
    return _Terms(value, log_ratio.sub_(log_ratio.expm1(), alpha=skew).mul_(pair.q))


def _total_variation_terms(pair: _Pair) -> _Terms:
    return _Terms(_difference(pair).abs_(), torch.sign(pair.d).mul_(pair.q))


_JENSEN_SHANNON = _Kernel(_jensen_shannon_terms, value_scale=0.5, weight_scale=0.5)
_TOTAL_VARIATION = _Kernel(_total_variation_terms, exact=True, value_scale=0.5, weight_scale=0.5)


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
