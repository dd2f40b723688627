"""Multiply-adds counted from masks, and milliseconds measured."""

from dynaconv.cost.blocks import BlockCost, ConvCost, block_cost
from dynaconv.cost.dense import DenseCounts, count_dense, guess_input_size
from dynaconv.cost.latency import compare_latency, latency_of, prepare_for_timing
from dynaconv.cost.machine import machine_line, source_commit
from dynaconv.cost.masks import MaskCollection, collect_masks, mac_density_map, ponder_map
from dynaconv.cost.profile import LayerProfile, Profile, profile

__all__ = [
    "BlockCost",
    "ConvCost",
    "DenseCounts",
    "LayerProfile",
    "MaskCollection",
    "Profile",
    "block_cost",
    "collect_masks",
    "compare_latency",
    "count_dense",
    "guess_input_size",
    "latency_of",
    "mac_density_map",
    "machine_line",
    "ponder_map",
    "prepare_for_timing",
    "profile",
    "source_commit",
]
