"""Measuring a network that is already trained: a run's student, or any architecture with a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vkd.config import Config
from vkd.data import Normalization, load_data
from vkd.errors import ConfigError
from vkd.models import create_model, load_into, load_weights
from vkd.training.environment import choose_device
from vkd.training.measurement import Evaluator
from vkd.training.run import find_teacher

logger = logging.getLogger("vkd")


def assess(
    config: Config,
    *,
    checkpoint: str | Path | None,
    with_teacher: bool,
    split: str | None = None,
    world_size: int = 1,
) -> dict[str, Any]:
    """Measure `config.student` on `config.dataset`.

    Args:
        config: its student, data set and, with `with_teacher`, teacher are looked at.
        checkpoint: the student's weights; None takes timm's pretrained ones.
        with_teacher: measure agreement with the config's teacher too, where that can be found without training it.
        split: val or test; None measures those that there are.
        world_size: how many processes did the run, and so trained the teacher where it is not given.

    Returns {"arch", "checkpoint", "dataset", "images": {split: n}, "metrics": {"test/top1": ...}}.

    Raises UserError for wrong input.
    """
    device = choose_device(config.device)
    data = load_data(config.dataset, config.data_root, device=device, workers=config.workers)
    for note in data.notes:
        logger.info("%s", note)
    splits = [split] if split else [name for name in ("val", "test") if name in data.splits_present]
    if not set(splits) <= data.splits_present - {"train"}:
        raise ConfigError(f"split={split} is not there", expected=", ".join(sorted(data.splits_present - {"train"})))
    arch = config.student.arch
    model = create_model(
        arch,
        num_classes=data.num_classes,
        in_channels=data.channels,
        image_size=data.image_size,
        pretrained=checkpoint is None,
    )
    if checkpoint is not None:
        load_into(model, load_weights(checkpoint), arch=arch, source=str(checkpoint))
    teacher = find_teacher(config, data, device=device, world_size=world_size) if with_teacher else None
    if with_teacher and teacher is None:
        logger.warning("the run's teacher is no longer there, so agreement and teacher_kl are left out")
    evaluator = Evaluator(
        data,
        Normalization(data.mean, data.std, data.channels).to(device),
        teacher_logits={} if teacher is None else teacher.logits,
        batch_size=config.evaluation_batch_size,
        device=device,
    )
    return {
        "arch": arch,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "dataset": data.name,
        "images": {name: data.sizes[name] for name in splits},
        "metrics": evaluator(model.to(device), splits),
    }
