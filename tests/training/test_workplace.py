"""What the runs of one process share is shared only where it is the same."""

import dataclasses

import torch
from toys import write_images

from vkd.config import Config, DatasetConfig
from vkd.training.assembly import Workplace


def config(root, augmentation, view_augmentation=None) -> Config:
    dataset = DatasetConfig(
        name="toy",
        mean=[0.4, 0.5, 0.6],
        std=[0.2, 0.3, 0.4],
        augmentation=augmentation,
        view_augmentation=view_augmentation or {},
    )
    return Config(dataset=dataset, data_root=str(root))


def test_the_same_data_set_is_read_once_and_another_one_anew(tmp_path):
    write_images(tmp_path)
    workplace, device = Workplace(), torch.device("cpu")
    first = workplace.data(config(tmp_path, {"crop": {"padding": 1}, "flip": {}}), device, 1)
    assert workplace.data(config(tmp_path, {"crop": {"padding": 1}, "flip": {}}), device, 1) is first
    other = dataclasses.replace(config(tmp_path, {"crop": {"padding": 1}, "flip": {}}))
    other.dataset.val_fraction = 0.25
    assert workplace.data(other, device, 1) is not first


def test_the_order_of_augmentations_makes_another_data_set(tmp_path):
    write_images(tmp_path)
    workplace, device = Workplace(), torch.device("cpu")
    first = workplace.data(config(tmp_path, {"crop": {"padding": 1}, "flip": {}}), device, 1)
    assert workplace.data(config(tmp_path, {"flip": {}, "crop": {"padding": 1}}), device, 1) is not first


def test_data_with_further_views_serve_runs_of_one_view_and_not_the_other_way_round(tmp_path):
    write_images(tmp_path)
    workplace, device = Workplace(), torch.device("cpu")
    asked = config(tmp_path, {"flip": {}}, {"crop": {"padding": 1}})
    one = workplace.data(asked, device, 1)
    two = workplace.data(asked, device, 2)
    assert two is not one
    assert workplace.data(asked, device, 1) is two
    images = [next(data.train_batches(seed=1, epoch=1, batch_size=8, drop_last=False)).images for data in (one, two)]
    assert torch.equal(*images)
