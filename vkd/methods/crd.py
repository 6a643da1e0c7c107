"""Contrastive representation distillation: an image's vector in one network picks out its vector in the other.

Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020 (arXiv 1910.10699).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from vkd.errors import ConfigError, require
from vkd.methods.contract import METHODS, Batch, Method, MethodContext


@METHODS.register("crd")
class ContrastiveRepresentationDistillation(Method):
    """weight * (contrast of the students with the teacher's memory + of the teachers with the student's memory).

    A linear layer and the L2 norm take the vector ahead of each network's classifier to the unit sphere of
    `embedding_size` dimensions. A memory of each network holds such a vector for every training image; for an anchor u
    of image i, the memory's vector v_i is the positive and those of K drawn images of other classes are the negatives.
    Noise-contrastive estimation tells them apart: with P(k) = exp(u . v_k / temperature) / Z and noise of 1/N over the
    N training images,

        loss = -log[P(i) / (P(i) + K/N)] - sum over the negatives k of log[(K/N) / (P(k) + K/N)],

    averaged over the batch. After its use the memory of an image becomes the normalised momentum * old + (1 - momentum)
    * new. Both linear layers are trained, the networks' memories are not.

    Taken over from the published code although it is odd: Z is set from the first batch, when everything is random, to
    N times the mean of exp(u . v / temperature) over its positives and negatives, one constant for each direction, and
    never again. Otherwise than there: the negatives come from the method's own generator and not from NumPy's global
    one, so that runs repeat and resume exactly; they are drawn with replacement (there without, where there are enough
    images); and no epsilon is added to the probabilities, whose logarithms are taken without forming them.

    The two memories take 8 * N * embedding_size bytes, in the checkpoint too (51 MB for the 50,000 images of
    CIFAR-100), and once more during a step. A step of B images holds 8 * B * K bytes of draws (8 MB at 64 and 16,384)
    and some matrices of 4 * B * N bytes (13 MB each). On CUDA the gradient adds up in no fixed order, so that runs
    repeat there to rounding only, unless `deterministic=true`.

    Args:
        weight: weight of the term (0.8 in the literature).
        embedding_size: dimensions of the vectors that are compared.
        negatives: K, drawn anew for every image of every batch; lowered to the number of images outside the largest
            class where that is smaller.
        temperature: of the exponentials; the divergence's is not used.
        momentum: share of the old vector in the memory's update, from 0 to below 1.

    Raises ConfigError for a value out of its range, and where the training images have no labels or all the same one.
    """

    needs_features = True

    def __init__(
        self,
        context: MethodContext,
        *,
        weight: float,
        embedding_size: int,
        negatives: int,
        temperature: float,
        momentum: float,
    ) -> None:
        super().__init__()
        require(embedding_size >= 1, f"method.crd.embedding_size = {embedding_size}", "a whole number from 1")
        require(negatives >= 1, f"method.crd.negatives = {negatives}", "a whole number from 1")
        require(temperature > 0, f"method.crd.temperature = {temperature}", "a number above 0")
        require(0 <= momentum < 1, f"method.crd.momentum = {momentum}", "from 0 to below 1")
        self.weight, self.temperature, self.momentum = weight, temperature, momentum
        self.generator = context.generator

        by_class, sizes = _sorted_by_class(context)
        self.train_size = len(by_class)
        self.negatives = min(negatives, self.train_size - int(sizes.max()))
        self.register_buffer("by_class", by_class, persistent=False)
        self.register_buffer("class_sizes", sizes, persistent=False)
        self.register_buffer("class_starts", sizes.cumsum(0) - sizes, persistent=False)

        self.student_embedding = nn.Linear(context.student_features.embedding, embedding_size)
        self.teacher_embedding = nn.Linear(context.teacher_features.embedding, embedding_size)
        # Uniform with a mean squared length of 1, as in the published code.
        bound = math.sqrt(3 / embedding_size)
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.empty(self.train_size, embedding_size).uniform_(-bound, bound))
        # log Z of student anchors and of teacher anchors; -inf until the first batch sets them.
        self.register_buffer("log_normalizers", torch.full((2,), -torch.inf))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The one term `crd`: a scalar. Also brings the memories up to date."""
        student = functional.normalize(self.student_embedding(batch.student.embedding), dim=1)
        teacher = functional.normalize(self.teacher_embedding(batch.teacher.embedding), dim=1)
        images = torch.cat([batch.indices[:, None], self.draw_negatives(batch.targets)], dim=1)
        scores = [
            self._scores(student, self.teacher_memory, images),
            self._scores(teacher, self.student_memory, images),
        ]
        self._set_normalizers(scores)
        loss = sum(
            self._contrast(each - log_normalizer)
            for each, log_normalizer in zip(scores, self.log_normalizers, strict=True)
        )
        self.student_memory = self._updated(self.student_memory, student, batch.indices)
        self.teacher_memory = self._updated(self.teacher_memory, teacher, batch.indices)
        return {"crd": self.weight * loss}

    def draw_negatives(self, targets: Tensor) -> Tensor:
        """For each label [B] the positions of K training images of other classes [B, K], uniform with replacement."""
        # On the host, whose generator is in the checkpoint. 63 bits a draw, whatever the class, so that it need not ask
        # the device which class it is; the remainder favours no image by more than one part in 2^63 / N.
        draws = torch.randint(2**63 - 1, (len(targets), self.negatives), generator=self.generator)
        draws = draws.to(self.by_class.device, non_blocking=True)
        sizes, starts = self.class_sizes[targets][:, None], self.class_starts[targets][:, None]
        # A place in the images by class, with the block of the own class jumped over.
        places = draws % (self.train_size - sizes)
        return self.by_class[torch.where(places < starts, places, places + sizes)]

    def _scores(self, anchors: Tensor, memory: Tensor, images: Tensor) -> Tensor:
        """u . v / temperature [B, 1 + K] of anchors [B, D] and the vectors of `images` [B, 1 + K] in memory [N, D]."""
        # All N products and a choice among them: taking the vectors first would fill B * K * D numbers.
        return (anchors @ memory.T).gather(1, images) / self.temperature

    @torch.no_grad()
    def _set_normalizers(self, scores: list[Tensor]) -> None:
        """Set log Z from these scores where it is not set yet."""
        estimates = torch.stack(
            [each.flatten().logsumexp(0) - math.log(each.numel()) + math.log(self.train_size) for each in scores]
        )
        self.log_normalizers = torch.where(self.log_normalizers.isinf(), estimates, self.log_normalizers)

    def _contrast(self, log_probabilities: Tensor) -> Tensor:
        """The loss, a scalar, of log P [B, 1 + K], the positive first."""
        log_odds = log_probabilities - math.log(self.negatives / self.train_size)
        positives, negatives = log_odds[:, 0], log_odds[:, 1:]
        found = functional.logsigmoid(positives).sum() + functional.logsigmoid(-negatives).sum()
        return -found / len(log_odds)

    @torch.no_grad()
    def _updated(self, memory: Tensor, embeddings: Tensor, indices: Tensor) -> Tensor:
        """The memory with new vectors for `indices`; a new tensor, since the backward pass wants the old one."""
        mixed = self.momentum * memory[indices] + (1 - self.momentum) * embeddings
        return memory.index_copy(0, indices, functional.normalize(mixed, dim=1))


def _sorted_by_class(context: MethodContext) -> tuple[Tensor, Tensor]:
    """The positions of the training images, class by class [N], and how many images each class has [C]."""
    targets = context.train_targets
    sizes = None if targets is None else torch.bincount(targets, minlength=context.num_classes)
    if sizes is None or int((sizes > 0).sum()) < 2:
        raise ConfigError(
            "method.crd contrasts an image with images of other classes, and "
            + ("the training images have no labels" if sizes is None else "all training images are of one class"),
            expected="labelled images of two classes or more",
            hint="another method, such as method=kd",
        )
    return targets.argsort(stable=True), sizes
