"""Multi-level logit distillation: predictions, relations between samples and relations between classes are matched.

Jin, Wang and Lin, "Multi-Level Logit Distillation", CVPR 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vkd.errors import ConfigError
from vkd.methods.contract import METHODS, Batch, Method, MethodContext


@METHODS.register("mlkd")
class MultiLevelDistillation(Method):
    """The sum over temperatures T, and over a weak and a strong view of the images, of three terms each.

    p and q are the teacher's and student's softmax at T [B, C]:

    * `prediction`: T^2 * sum over the chosen samples of D(p || q), over B.
    * `batch`: squared differences of p p^T and q q^T [B, B], summed over the rows of the chosen samples, over B.
    * `class`: squared differences of p^T p and q^T q [C, C], summed over the rows of the chosen classes, over C.

    Chosen are the samples whose confidence, and the classes whose summed probability over the batch, is at most the
    `quantile` of the batch, by the teacher's softmax at T = 1 on the weak view.

    From the paper are the three levels, the several temperatures and that masks act by sample and by class; from its
    public code the temperatures, both views, what is masked by which quantile, T^2 in the first term alone, and the
    divisors. Ours is that the same masks and all three levels hold on both views, where that code multiplies means by
    masks, mixes up views and drops terms. It also has cross-entropy on both views; here it is on the weak one alone.

    Args:
        prediction_weight, batch_weight, class_weight: weights of the three terms.
        temperatures: the T, above 0.
        temperature_squared: multiply the first term by T^2, as published.
        quantile: from 0 to 1; 1 chooses everything.

    Raises ConfigError for a value out of its range.
    """

    cross_entropy_weight = 0.1
    uses_divergence = True
    uses_temperature = False
    capturable = True
    views = 2

    def __init__(
        self,
        context: MethodContext,
        *,
        prediction_weight: float,
        batch_weight: float,
        class_weight: float,
        temperatures: list[float],
        temperature_squared: bool,
        quantile: float,
    ) -> None:
        super().__init__()
        if not temperatures or not all(0 < temperature < float("inf") for temperature in temperatures):
            raise ConfigError(f"method.mlkd.temperatures={temperatures}", expected="one or more numbers above 0")
        if not 0 <= quantile <= 1:
            raise ConfigError(f"method.mlkd.quantile={quantile}", expected="from 0 to 1")
        self.divergence = context.divergence
        self.weights = {"prediction": prediction_weight, "batch": batch_weight, "class": class_weight}
        self.temperatures, self.temperature_squared, self.quantile = temperatures, temperature_squared, quantile

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The terms `prediction`, `batch` and `class`: scalars."""
        with torch.no_grad():
            probabilities = batch.teacher.logits.softmax(dim=-1)
            samples = self._at_most_quantile(probabilities.amax(dim=-1))
            classes = self._at_most_quantile(probabilities.sum(dim=0))
        sums = dict.fromkeys(self.weights, 0.0)
        for student, teacher in ((batch.student, batch.teacher), batch.views[0]):
            for temperature in self.temperatures:
                distance = self.divergence(
                    student.logits, teacher.logits, temperature=temperature, mask=samples, reduction="sum"
                )
                q = (student.logits / temperature).softmax(dim=-1)
                p = (teacher.logits.detach() / temperature).softmax(dim=-1)
                scale = temperature**2 if self.temperature_squared else 1.0
                sums["prediction"] += scale * distance / len(q)
                sums["batch"] += _relation_distance(q, p, samples)
                sums["class"] += _relation_distance(q.t(), p.t(), classes)
        return {name: weight * sums[name] for name, weight in self.weights.items()}

    def _at_most_quantile(self, values: Tensor) -> Tensor:
        return values <= values.quantile(self.quantile)


def _relation_distance(x: Tensor, y: Tensor, chosen: Tensor) -> Tensor:
    """Squared differences of x x^T and y y^T, for x and y [N, M], summed over the rows `chosen` [N], over N."""
    # Masked by a product: picking rows out would have to wait for the device.
    return ((x @ x.t() - y @ y.t()).square().sum(dim=-1) * chosen).sum() / len(x)
