"""Data sets: `scenes` (embedded), image folders, CIFAR-10."""

from dynaconv.data.bundle import DataBundle
from dynaconv.data.dataset import FileImages, ImageSet, MemoryImages, normalise
from dynaconv.data.image_files import load_image
from dynaconv.data.loader import make_loader
from dynaconv.data.registry import list_datasets, load_dataset

__all__ = [
    "DataBundle",
    "FileImages",
    "ImageSet",
    "MemoryImages",
    "list_datasets",
    "load_dataset",
    "load_image",
    "make_loader",
    "normalise",
]
