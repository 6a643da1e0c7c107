"""What the CIFAR networks share: a stem, stages, global pooling and a linear classifier, with the interface of timm.

A network of the literature is a subclass that defines its layers, and entry points that call `build`.
"""

from __future__ import annotations

import re
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

Names = str | tuple[str, ...]
"""The dotted name of a module, or those of several in the order in which they run."""


class StagedNetwork(nn.Module):
    """An image classifier of a stem, stages in sequence, global pooling and a linear classifier.

    A subclass defines its modules, says by name where they belong, fills in the attributes below and calls
    `_make_head` and `_initialize_all`. Parameter names are then free to be those of published checkpoints. Pooling is
    global, so images of any size are taken that the strides leave something of. `forward` maps images
    [B, in_chans, H, W] to logits [B, num_classes].

    Attributes:
        stem_name: the modules ahead of the first stage.
        stage_names: for each stage in order its modules. Those that are an `nn.Sequential` hold the stage's blocks.
        layers_per_block: how many layers of such a sequence make a block.
        norm_name: what normalises the last stage's features, in a network of pre-activation blocks.
        head_name: what widens the last stage's features ahead of the pooling, in a network that does so.
        classifier_name: the classifier.
        feature_info: for the stem and then each stage, its `num_chs`, `reduction` and `module`, as timm has it.
        num_features: channels of what is pooled.
        head_hidden_size: length of the pooled features that reach the classifier.
        num_classes, in_chans, drop_rate: as given; `drop_rate` is the dropout ahead of the classifier in training.
    """

    stem_name: Names = ("conv1", "bn1", "act1")
    stage_names: tuple[Names, ...]
    layers_per_block: int = 1
    norm_name: Names = ()
    head_name: Names = ()
    classifier_name: str = "fc"
    feature_info: list[dict[str, Any]]
    num_features: int
    head_hidden_size: int
    num_classes: int
    in_chans: int

    def __init__(self, *, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

    def _run(self, names: Names, x: Tensor) -> Tensor:
        for name in _listed(names):
            x = self.get_submodule(name)(x)
        return x

    def forward_stem(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to the input of the first stage."""
        return self._run(self.stem_name, x)

    def _stages_for(self, images: Tensor) -> tuple[Names, ...]:
        """The modules of each stage that run for these images [B, in_chans, H, W]."""
        return self.stage_names

    def _forward_stage(self, names: Names, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return self._run(names, x)
        for name in _listed(names):
            module = self.get_submodule(name)
            blocks = isinstance(module, nn.Sequential)
            x = checkpoint_seq(module, x, every=self.layers_per_block) if blocks else module(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to the features that are pooled [B, num_features, H', W']."""
        stages = self._stages_for(x)
        x = self.forward_stem(x)
        for names in stages:
            x = self._forward_stage(names, x)
        return self._run(self.head_name, self._run(self.norm_name, x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, num_features, H', W'] to logits [B, num_classes], or with `pre_logits` to what enters the
        classifier.
        """
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.get_classifier()(x)

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
            intermediates_only: return the list alone rather than (what `forward_head` takes, list).

        Raises:
            ValueError: `output_fmt` is another format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', not {output_fmt!r}")
        taken, last = feature_take_indices(len(self.feature_info), indices)
        stages = self._stages_for(x)
        x = self.forward_stem(x)
        features = [x] if 0 in taken else []
        final = len(stages)
        for index, names in enumerate(stages[:last] if stop_early else stages, start=1):
            before = x = self._forward_stage(names, x)
            if index == final:
                x = self._run(self.norm_name, x)
            if index in taken:
                features.append(x if norm else before)
        if intermediates_only:
            return features
        if last == final or not stop_early:
            x = self._run(self.head_name, x)
        return x, features

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Empties the stages behind the last of `indices`, with them the layers between stages and pooling and the
        classifier, and these two also where `prune_norm` and `prune_head` say so. Returns the kept indices, counted
        from 0.
        """
        taken, last = feature_take_indices(len(self.feature_info), indices)
        pruned = [name for names in self.stage_names[last:] for name in _listed(names)]
        for name in pruned:
            self.set_submodule(name, nn.Sequential())
        if pruned or prune_norm:
            for name in (*_listed(self.norm_name), *_listed(self.head_name)):
                self.set_submodule(name, nn.Identity())
        narrowed = bool(pruned or (prune_norm and self.head_name))
        if narrowed:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or narrowed:
            self.reset_classifier(0, "")
        return taken

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one (0 classes: the identity), and the pooling where it is named."""
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        reference = next(self.parameters())
        self._make_head(num_classes, global_pool)
        classifier = self.get_classifier().to(device=reference.device, dtype=reference.dtype)
        self._initialize(classifier)
        classifier.train(self.training)
        self.global_pool.train(self.training)

    def _make_head(self, num_classes: int, global_pool: str) -> None:
        self.num_classes = num_classes
        self.global_pool, classifier = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.set_submodule(self.classifier_name, classifier)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def _initialize(self, layer: nn.Module) -> None:
        """Draw a layer's first weights as the literature does. Convolutions: normal with variance 2 / (k * k * out
        channels), biases zero; a subclass says where others differ from torch's own.
        """
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def _initialize_all(self) -> None:
        for layer in self.modules():
            self._initialize(layer)

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The classifier, or its name."""
        return self.classifier_name if name_only else self.get_submodule(self.classifier_name)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of parameter names, first layer first: the stem, each stage (`coarse`) or each block, and what
        lies between the last stage and the pooling. The classifier matches none of them.
        """
        patterns = {"stem": _starts_with(self.stem_name)}
        for index, names in enumerate(self.stage_names, start=1):
            if coarse:
                patterns[f"stage{index}"] = _starts_with(names)
            else:
                patterns |= {name: rf"^{re.escape(name)}\.(\d+)" for name in _listed(names)}
        behind = (*_listed(self.norm_name), *_listed(self.head_name))
        return {**patterns, "behind": _starts_with(behind)} if behind else patterns

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


def _listed(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _starts_with(names: Names) -> str:
    """A pattern of the names of these modules and of all that is in them."""
    return rf"^(?:{'|'.join(re.escape(name) for name in _listed(names))})\b"


def no_published_weights(name: str) -> ModelError:
    """The error that answers `pretrained=true` for a network nobody published weights of."""
    return ModelError(
        f"there are no published pretrained weights for {name!r}",
        expected="pretrained=false, with the path of a checkpoint",
        hint="teacher.pretrained=false teacher.checkpoint=path/to/weights.safetensors",
    )
