"""What the CIFAR networks share: a stem, stages, global pooling and a linear classifier, with the interface of timm.

A network of the literature is a subclass that defines its layers, and entry points that call `build`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vkd.errors import ModelError

CIFAR100_MEAN = (0.5070, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2761)

Network = TypeVar("Network", bound="StagedNetwork")


class StagedNetwork(nn.Module, ABC):
    """An image classifier of a stem, stages in sequence, global pooling and a linear classifier called `fc`.

    A subclass defines `forward_stem` and the stages, each an `nn.Sequential`, and fills in the attributes below.
    Pooling is global, so images of any size are taken. `forward` maps images [B, in_chans, H, W] to logits
    [B, num_classes].

    Attributes:
        stage_names: names of the stages in order: one word, numbered.
        norm_name: name of the layer that normalises the last stage's features, in a network of pre-activation blocks.
        feature_info: for the stem and then each stage, its `num_chs`, `reduction` and `module`, as timm has it.
        num_features: channels of the last stage.
        head_hidden_size: length of the pooled features that reach the classifier.
        num_classes, in_chans, drop_rate: as given; `drop_rate` is the dropout ahead of the classifier in training.
    """

    stage_names: tuple[str, ...]
    norm_name: str | None = None
    feature_info: list[dict[str, Any]]
    num_features: int
    head_hidden_size: int
    num_classes: int
    in_chans: int

    def __init__(self, *, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

    @abstractmethod
    def forward_stem(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to the input of the first stage."""

    def _forward_stage(self, name: str, x: Tensor) -> Tensor:
        stage = getattr(self, name)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_seq(stage, x)
        return stage(x)

    def _forward_norm(self, x: Tensor) -> Tensor:
        return x if self.norm_name is None else getattr(self, self.norm_name)(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to the last stage's features [B, num_features, H', W']."""
        x = self.forward_stem(x)
        for name in self.stage_names:
            x = self._forward_stage(name, x)
        return self._forward_norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, num_features, H', W'] to logits [B, num_classes], or with `pre_logits` to what enters `fc`."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features after the stem (index 0) and after each stage, each [B, C, H', W'].

        Args:
            x: images [B, in_chans, H, W].
            indices: the last n where it is an integer, all where None, else these (negative ones count from the end).
            norm: give the last stage's features behind the network's norm layer, if it has one, rather than before it.
            stop_early: run nothing behind the last feature that is asked for.
            output_fmt: only "NCHW".
            intermediates_only: return the list alone rather than (last features, list).

        Raises:
            ValueError: `output_fmt` is another format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', not {output_fmt!r}")
        taken, last = feature_take_indices(len(self.feature_info), indices)
        x = self.forward_stem(x)
        features = [x] if 0 in taken else []
        final = len(self.stage_names)
        for index, name in enumerate(self.stage_names[:last] if stop_early else self.stage_names, start=1):
            before = x = self._forward_stage(name, x)
            if index == final:
                x = self._forward_norm(x)
            if index in taken:
                features.append(x if norm else before)
        return features if intermediates_only else (x, features)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Empties the stages behind the last of `indices`, with them the norm layer and the head, and these two also
        where `prune_norm` and `prune_head` say so. Returns the kept indices, counted from 0.
        """
        taken, last = feature_take_indices(len(self.feature_info), indices)
        pruned = self.stage_names[last:]
        for name in pruned:
            setattr(self, name, nn.Sequential())
        if pruned:
            self.num_features = self.feature_info[last]["num_chs"]
        if self.norm_name is not None and (prune_norm or pruned):
            setattr(self, self.norm_name, nn.Identity())
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return taken

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one (0 classes: the identity), and the pooling where it is named."""
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        reference = next(self.parameters())
        self._make_head(num_classes, global_pool)
        self.fc.to(device=reference.device, dtype=reference.dtype)
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def _make_head(self, num_classes: int, global_pool: str) -> None:
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The classifier, or its name."""
        return "fc" if name_only else self.fc

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of parameter names: the stem, and each stage (`coarse`) or each block."""
        stage = self.stage_names[0].rstrip("0123456789")
        return {"stem": r"^conv1|^bn1", "blocks": rf"^{stage}(\d+)" if coarse else rf"^{stage}(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations.

        As with timm's networks, BatchNorm in training mode then updates its running statistics twice a step.
        """
        self.grad_checkpointing = enable


def cifar_cfg(**changes: Any) -> dict[str, Any]:
    """timm's default_cfg of a CIFAR-100 network without published weights, with `changes` applied."""
    return {
        "input_size": (3, 32, 32),
        "num_classes": 100,
        "mean": CIFAR100_MEAN,
        "std": CIFAR100_STD,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "first_conv": "conv1",
        "classifier": "fc",
        **changes,
    }


def build(network: type[Network], name: str, pretrained: bool, **arguments: Any) -> Network:
    """The network `name` through timm's builder, which knows `features_only`, `pretrained_cfg` and the like.

    Raises:
        ModelError: `pretrained` is asked for and nothing says where the weights are (`pretrained_cfg_overlay=
            {"file": ...}` would): there are none to download, and random ones in their place would go unnoticed.
    """
    if pretrained:
        sources = arguments.get("pretrained_cfg"), arguments.get("pretrained_cfg_overlay")
        cfg = resolve_pretrained_cfg(name, *sources)
        if not (cfg.has_weights or cfg.state_dict):
            raise no_published_weights(name)
    features = {"out_indices": tuple(range(1 + len(network.stage_names))), "feature_cls": "getter"}
    return build_model_with_cfg(network, name, pretrained, feature_cfg=features, **arguments)


def no_published_weights(name: str) -> ModelError:
    """The error that answers `pretrained=true` for a network nobody published weights of."""
    return ModelError(
        f"there are no published pretrained weights for {name!r}",
        expected="pretrained=false, with the path of a checkpoint",
        hint="teacher.pretrained=false teacher.checkpoint=path/to/weights.safetensors",
    )
