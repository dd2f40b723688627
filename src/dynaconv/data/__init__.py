"""Data sets: `scenes` (embedded), image folders, CIFAR-10, people with keypoints."""

from dynaconv.data.bundle import DataBundle
from dynaconv.data.dataset import FileImages, ImageSet, MemoryImages, normalise
from dynaconv.data.image_files import load_image
from dynaconv.data.keypoints import KeypointImages
from dynaconv.data.loader import make_loader
from dynaconv.data.registry import list_datasets, load_dataset
from dynaconv.data.tasks import Classification, Keypoints, task_of

__all__ = [
    "Classification",
    "DataBundle",
    "FileImages",
    "ImageSet",
    "KeypointImages",
    "Keypoints",
    "MemoryImages",
    "list_datasets",
    "load_dataset",
    "load_image",
    "make_loader",
    "normalise",
    "task_of",
]
