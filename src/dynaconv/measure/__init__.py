"""Operating points of a trained network: accuracy, executed MACs, milliseconds, and pictures of its masks."""

from dynaconv.measure.gallery import build_gallery, gallery_of_images
from dynaconv.measure.latency import dense_latency, dense_twin, dynamic_latency, left_out_line
from dynaconv.measure.points import measure_points
from dynaconv.measure.race import EnginesDisagree
from dynaconv.measure.results import read_results, write_results
from dynaconv.measure.verify import compare_with_dense

__all__ = [
    "EnginesDisagree",
    "build_gallery",
    "compare_with_dense",
    "dense_latency",
    "dense_twin",
    "dynamic_latency",
    "gallery_of_images",
    "left_out_line",
    "measure_points",
    "read_results",
    "write_results",
]
