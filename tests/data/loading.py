"""Batches of a data set as lists that tests can compare."""

import torch


def train_batches(data, seed=1, epoch=1, batch_size=8, drop_last=False, start_step=0):
    """The training batches of an epoch."""
    return list(
        data.train_batches(seed=seed, epoch=epoch, batch_size=batch_size, drop_last=drop_last, start_step=start_step)
    )


def same(one, other):
    """Whether two lists of batches are equal in every image, target and index."""
    return len(one) == len(other) and all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and torch.equal(a.indices, b.indices)
        for a, b in zip(one, other, strict=True)
    )
