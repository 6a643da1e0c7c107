"""A network's answer to a batch, with features where a method asks for them, always in float32."""

from __future__ import annotations

from torch import Tensor, nn

from vkd.methods import Output
from vkd.models import Intermediates


def forward(network: nn.Module, intermediates: Intermediates | None, images: Tensor) -> Output:
    """The output of `network` on images [B, channels, H, W], through `intermediates` where features are wanted.

    What comes out is float32 whatever precision the network ran in: in half precision losses overflow.
    """
    if intermediates is None:
        return Output(network(images).float())
    logits, features, embedding = intermediates(images)
    return Output(logits.float(), [entry.float() for entry in features], embedding.float())
