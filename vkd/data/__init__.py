"""Where pixels come from and how they reach the device: sources, splits, augmentations, resident and streaming loading.

data = load_data(config, "data", device=torch.device("cpu"))
for batch in data.train_batches(seed=1, epoch=1, batch_size=64, drop_last=True): ...
"""

from vkd.data.augmentation import AUGMENTATIONS, BatchAugmentation, ImageAugmentation
from vkd.data.batches import Data, ImageBatch
from vkd.data.dataset import load_data
from vkd.data.normalization import Normalization
from vkd.data.sources import SOURCES, ImageArrays, ImageFiles, Source, load_source
from vkd.data.splits import stratified_split

__all__ = [
    "AUGMENTATIONS",
    "SOURCES",
    "BatchAugmentation",
    "Data",
    "ImageArrays",
    "ImageAugmentation",
    "ImageBatch",
    "ImageFiles",
    "Normalization",
    "Source",
    "load_data",
    "load_source",
    "stratified_split",
]
