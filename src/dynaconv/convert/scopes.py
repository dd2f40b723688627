"""Which layers each paper makes dynamic, network by network (`scope="paper"`).

Published choices, and ours (marked *) where the papers are silent; the nearest stated rule decides:

==============  =====================================  ====================================  ==========================
family          CondConv, arXiv 1904.04971             DY-Conv, 1912.03458                   DyNet, 2004.10694
==============  =====================================  ====================================  ==========================
ResNet          main path of the last three blocks,    all but the stem, shortcuts too       main path of every block
                classifier
MobileNetV2     last six blocks, classifier            all but the stem, depthwise and head  all of every block
MobileNetV3     * last six blocks, classifier          * blocks and head                     * all of every block
EfficientNet    last three rows                        * blocks and head                     * all of every block
MNASNet         * last three rows (EfficientNet's)     * all but the stem                    * all of every block
ShuffleNetV2    * last six units, right branch,        * all but the stem                    right branch, fed by its
                classifier                                                                   own input
ConvNeXt        * last six blocks, classifier          * all but the stem                    * convolutions of blocks
==============  =====================================  ====================================  ==========================

==============  =====================================  ====================================  ==========================
family          DCD, 2103.08756 (always with the       ODConv, 2209.07947                    WeightNet, 2007.11823
                classifier)
==============  =====================================  ====================================  ==========================
ResNet          main path of every block               main path of every block              * all of every block
MobileNetV2     expansion and projection of blocks     all but the stem, depthwise and head  * all of every block
                with an expansion
MobileNetV3     * as MobileNetV2                       * blocks and head                     * all of every block
EfficientNet    * as MobileNetV2                       * blocks and head                     * all of every block
MNASNet         * as MobileNetV2                       * as MobileNetV2                      * all of every block
ShuffleNetV2    * as MobileNetV2, right branch         * as MobileNetV2, both branches       all of every unit
ConvNeXt        * convolutions that are not depthwise  * all but the stem                    * convolutions of blocks
==============  =====================================  ====================================  ==========================

RegNet follows ResNet (*). Squeeze-excite and layers behind the pool other than the classifier are always static.
Linear layers inside ConvNeXt's blocks stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from dynaconv import _checks
from dynaconv.convert.layer_sites import LayerSite, find_blocks, layer_sites, network_family

METHODS = ("condconv", "dyconv", "dynet", "dcd", "odconv", "weightnet")
_MAIN = ("conv", "expand", "depthwise", "project")
_ROWS = ("efficientnet", "mnasnet")
_WITH_HEAD = ("dyconv", "odconv")


def paper_sites(
    model: nn.Module,
    method: str,
    *,
    first_block: str | int | None = None,
    head: bool | None = None,
    classifier: bool | None = None,
) -> list[LayerSite]:
    """The layers that a method's paper makes dynamic, in forward order; this module's table lists them all.

    Args:
        model: a static network that `layer_sites` knows.
        method: condconv, dyconv, dynet, dcd, odconv or weightnet.
        first_block: blocks before this one stay static; its path, or its index among the blocks (-6: the last six).
            None takes the published choice.
        head, classifier: whether the last convolution before the pool, and the classifier, are dynamic. None takes
            the published choice.
    Returns:
        Sites; `block` is the module whose input a shared router sees. In ShuffleNetV2 that is the right branch for
        DyNet, and for WeightNet unless a strided unit's left branch shares the router.
    Raises:
        ValueError: an unknown method, network or first block.

    >>> import dynaconv as dc
    >>> [site.name for site in paper_sites(dc.create_model("resnet8_cifar"), "condconv", first_block="layer3.0")]
    ['layer3.0.conv1', 'layer3.0.conv2', 'fc']
    """
    _checks.one_of("dynamic kernel method", method, METHODS)
    family, sites, blocks = network_family(model), layer_sites(model), list(find_blocks(model))
    kept = blocks[_first(blocks, method, family, first_block) :]
    whole = first_block is None and method != "condconv"
    wanted = [s for s in _RULES[method](family, sites) if whole or s.block in kept]
    ends = {
        "head": method in _WITH_HEAD if head is None else head,
        "classifier": _classifies(method, family) if classifier is None else classifier,
    }
    chosen = [s for s in sites if ends.get(s.role, s in wanted)]
    return with_router_blocks(model, method, chosen)


def with_router_blocks(model: nn.Module, method: str, chosen: list[LayerSite]) -> list[LayerSite]:
    """The sites with `block` set to the module whose input the method's shared router sees.

    That is the block, except in ShuffleNetV2 units with DyNet or WeightNet layers in the right branch only: there it is
    the right branch, as for every method in our two ShuffleNetV2 skeletons.
    """
    if type(model).__name__ in ("DyShuffleNetV2", "WeightShuffleNetV2") or (
        network_family(model) == "shufflenetv2" and method in ("dynet", "weightnet")
    ):
        left = {s.block for s in chosen if s.role == "shortcut"}
        chosen = [s if s.block in (None, *left) else replace(s, block=f"{s.block}.branch2") for s in chosen]
    return chosen


def _first(blocks: list[str], method: str, family: str, first_block: str | int | None) -> int:
    """Index of the first dynamic block."""
    if isinstance(first_block, str):
        if first_block not in blocks:
            raise _checks.unknown("block", first_block, blocks)
        return blocks.index(first_block)
    if first_block is not None:
        if not -len(blocks) <= first_block < len(blocks):
            raise ValueError(
                f"first_block must be an index from {-len(blocks)} to {len(blocks) - 1}, got {first_block}"
            )
        return first_block % len(blocks)
    if method != "condconv":
        return 0
    if family in _ROWS:
        rows = list(dict.fromkeys(block.rpartition(".")[0] for block in blocks))
        return next(i for i, block in enumerate(blocks) if block.rpartition(".")[0] in rows[-3:])
    return max(0, len(blocks) - (3 if family == "resnet" else 6))


def _classifies(method: str, family: str) -> bool:
    return method == "dcd" or (method == "condconv" and family not in _ROWS)


def _main_path(_family: str, sites: list[LayerSite]) -> list[LayerSite]:
    return [s for s in sites if s.role in _MAIN]


def _in_blocks(_family: str, sites: list[LayerSite]) -> list[LayerSite]:
    return [s for s in sites if s.role in _MAIN and (s.block or s.role != "conv")]


def _all_but_stem(_family: str, sites: list[LayerSite]) -> list[LayerSite]:
    return [s for s in sites if s.role in (*_MAIN, "shortcut")]


def _odconv(family: str, sites: list[LayerSite]) -> list[LayerSite]:
    return _main_path(family, sites) if family == "resnet" else _all_but_stem(family, sites)


def _dcd(family: str, sites: list[LayerSite]) -> list[LayerSite]:
    if family in ("resnet", "dymobile", "convnext"):
        return [s for s in sites if s.role in _MAIN and s.role != "depthwise"]
    expanded = {s.block for s in sites if s.role == "expand"}
    return [s for s in sites if s.role in ("expand", "project") and s.block in expanded]


def _weightnet(_family: str, sites: list[LayerSite]) -> list[LayerSite]:
    return [s for s in sites if s.block and s.role in (*_MAIN, "shortcut")]


_RULES: dict[str, Callable[[str, list[LayerSite]], list[LayerSite]]] = {
    "condconv": _main_path,
    "dyconv": _all_but_stem,
    "dynet": _in_blocks,
    "dcd": _dcd,
    "odconv": _odconv,
    "weightnet": _weightnet,
}
