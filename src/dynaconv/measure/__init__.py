"""Operating points of a trained network: accuracy, executed MACs, milliseconds, and pictures of its masks."""

from dynaconv.measure.gallery import build_gallery, gallery_of_images
from dynaconv.measure.latency import dense_twin, latency_ratios
from dynaconv.measure.points import measure_points
from dynaconv.measure.results import read_results, write_results
from dynaconv.measure.verify import compare_with_dense

__all__ = [
    "build_gallery",
    "compare_with_dense",
    "dense_twin",
    "gallery_of_images",
    "latency_ratios",
    "measure_points",
    "read_results",
    "write_results",
]
