"""Batches of a data set as lists that tests can compare."""

import torch


def train_batches(data, seed=1, epoch=1, batch_size=8, drop_last=False, start_step=0, **views):
    """The training batches of an epoch."""
    options = {"batch_size": batch_size, "drop_last": drop_last, "start_step": start_step}
    return list(data.train_batches(seed=seed, epoch=epoch, **options, **views))


def all_views(batches):
    """Every view of every image, in the order of the images: uint8 [N, views, C, H, W]."""
    indices = torch.cat([batch.indices for batch in batches])
    views = torch.cat([torch.stack([batch.images, *batch.views], dim=1) for batch in batches])
    return views[indices.argsort()]


def same(one, other):
    """Whether two lists of batches are equal in every image, target, index and further view."""
    return len(one) == len(other) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.targets, b.targets)
        and torch.equal(a.indices, b.indices)
        and len(a.views) == len(b.views)
        and all(map(torch.equal, a.views, b.views))
        for a, b in zip(one, other, strict=True)
    )
