"""One small member of each family of residual networks, and blocks as users write them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.nn import Anatomy, Step


def timm_model(name: str, **options: object) -> nn.Module:
    """A timm network, most of them with a few channels only."""
    from dynaconv.integrations.timm import import_timm

    return import_timm().create_model(name, num_classes=5, **options)


def torchvision_model(name: str, **options: object) -> nn.Module:
    """A torchvision network."""
    from dynaconv.integrations.torchvision import import_torchvision

    return import_torchvision().models.get_model(name, weights=None, num_classes=5, **options)


def timm_resnet(block: str = "BasicBlock", **options: object) -> nn.Module:
    """ResNet with one narrow block a stage."""
    from dynaconv.integrations.timm import import_timm

    import_timm()
    from timm.models import resnet

    options = {"stem_width": 16, "channels": (8, 12, 16, 24), **options}
    return resnet.ResNet(getattr(resnet, block), (1, 1, 1, 2), num_classes=5, **options)


def blur() -> type[nn.Module]:
    """timm's anti-aliasing layer."""
    from dynaconv.integrations.timm import import_timm

    import_timm()
    from timm.layers import BlurPool2d

    return BlurPool2d


def timm_regnet(**options: object) -> nn.Module:
    """RegNet of four narrow stages."""
    from dynaconv.integrations.timm import import_timm

    import_timm()
    from timm.models.regnet import RegNet, RegNetCfg

    return RegNet(RegNetCfg(depth=5, w0=16, wa=16.0, wm=1.7, group_size=8, **options), num_classes=5)


def torchvision_regnet(se_ratio: float | None) -> nn.Module:
    """RegNet of torchvision."""
    from dynaconv.integrations.torchvision import import_torchvision

    import_torchvision()
    from torchvision.models.regnet import BlockParams, RegNet

    params = BlockParams.from_init_params(
        depth=6, w_0=16, w_a=12.0, w_m=2.0, group_width=8, se_ratio=se_ratio
    )
    return RegNet(params, num_classes=5)


def timm_fastvit(**options: object) -> nn.Module:
    """FastViT of two narrow stages of convolutions."""
    stages = {"layers": (1, 1), "embed_dims": (8, 16), "mlp_ratios": (2, 2), "downsamples": (False, True)}
    return timm_model("fastvit_t8", token_mixers=("repmixer", "repmixer"), **stages, **options)


# Builder, side of the input, how many blocks become dynamic, whether they are plain chains (None: some are).
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, int, bool | None]] = {
    "resnet": (timm_resnet, 40, 5, True),
    "resnext": (partial(timm_resnet, "Bottleneck", cardinality=2, base_width=32), 40, 5, True),
    "wide resnet": (partial(timm_resnet, "Bottleneck", base_width=128), 40, 5, True),
    "se-resnet": (partial(timm_resnet, block_args={"attn_layer": "se"}), 40, 5, False),
    "eca-resnet-d": (
        partial(timm_resnet, "Bottleneck", block_args={"attn_layer": "eca"}, avg_down=True, stem_type="deep"),
        40, 5, False,
    ),
    "blurred resnet": (lambda: timm_resnet("Bottleneck", aa_layer=blur(), drop_path_rate=0.1), 40, 5, None),
    "preact resnet": (partial(timm_model, "resnetv2_50", layers=(1, 1), channels=(16, 24), stem_chs=8), 40, 2, False),
    "norm-free resnet": (partial(timm_model, "test_nfnet"), 48, 4, False),
    "regnetx": (timm_regnet, 40, 5, True),
    "regnety": (partial(timm_regnet, se_ratio=0.25), 40, 5, False),
    "mobilenetv2": (partial(timm_model, "mobilenetv2_035"), 48, 10, True),
    "mobilenetv3": (partial(timm_model, "mobilenetv3_small_050", drop_path_rate=0.1), 48, 7, None),
    "efficientnet": (partial(timm_model, "efficientnet_b0", drop_path_rate=0.1), 40, 9, False),
    "mnasnet": (partial(timm_model, "mnasnet_small"), 48, 9, None),
    "convnext": (partial(timm_model, "test_convnext", drop_path_rate=0.1), 64, 9, False),
    "convnext conv": (partial(timm_model, "test_convnext", conv_mlp=True), 64, 9, False),
    "convnextv2": (partial(timm_model, "test_convnext2"), 64, 4, False),
    "torchvision regnety": (partial(torchvision_regnet, 0.25), 40, 6, False),
    "torchvision mobilenetv3": (partial(torchvision_model, "mobilenet_v3_small", width_mult=0.5), 48, 7, None),
    "torchvision mnasnet": (partial(torchvision_model, "mnasnet0_5"), 48, 10, True),
    "repvit": (partial(timm_model, "repvit_m0_9", embed_dim=(8, 16), depth=(2, 1)), 48, 4, False),
    "fastvit": (partial(timm_fastvit, drop_path_rate=0.1), 64, 6, False),
    "reparameterised fastvit": (partial(timm_fastvit, inference_mode=True), 64, 2, False),
    "torchvision shufflenetv2": (partial(torchvision_model, "shufflenet_v2_x0_5"), 48, 13, False),
}  # fmt: skip


class UserBlock(nn.Module):
    """x + f(x), written with functions and without a projection."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 10, 3, padding=2, dilation=2)
        self.norm = nn.BatchNorm2d(10)
        self.second = nn.Conv2d(10, channels, 1)
        self.scale = nn.Parameter(torch.full((channels,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W] -> the same shape."""
        y = F.elu(self.norm(self.first(x)))
        y = torch.tanh(self.second(y)) * self.scale[:, None, None]
        return x + y


class TwoPaths(nn.Module):
    """A branch that forks, shuffles channels, and squeezes before its depthwise convolution."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, 8, 1, groups=2)
        self.wide, self.narrow = (
            nn.Conv2d(8, 8, 5, padding=2, groups=8),
            nn.Conv2d(8, 8, (3, 1), padding=(1, 0)),
        )
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)
        self.leave = nn.Conv2d(16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W] -> the same shape."""
        n, c, h, w = x.shape
        y = F.leaky_relu(self.enter(x), 0.2)
        y = y.view(n, 2, 4, h, w).transpose(1, 2).reshape(n, 8, h, w)
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))
        y = y * scale[:, :, None, None]
        y = torch.cat((self.wide(y), self.narrow(y)), 1)
        return F.silu(self.leave(y) + x)


class Averaged(nn.Module):
    """A strided block whose branch and shortcut pool in their own ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down = nn.Conv2d(6, 9, 3, padding=1, bias=False), nn.AvgPool2d(1, 2)
        self.norm, self.last = nn.BatchNorm2d(9), nn.Conv2d(9, 8, 1, bias=False)
        self.pool, self.projection = nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, 6, H, W] -> [N, 8, h, w]."""
        y = self.last(F.relu(self.norm(self.down(self.conv(x)))))
        return F.relu(y + self.projection(self.pool(x)))


class TwoAdditions(nn.Module):
    """A smaller map, to which two branches are added one after the other in the same forward."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.mix = nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.enter = nn.BatchNorm2d(8), nn.Conv2d(8, 12, 1)
        self.leave = nn.Conv2d(12, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, 6, H, W] -> [N, 8, h, w]."""
        x = F.silu(self.down(x))
        x = x + self.mix(x)
        return F.relu(x + self.leave(F.relu(self.enter(self.norm(x)))))


class Stubborn(nn.Module):
    """A forward that cannot be traced, with its anatomy written down."""

    def __init__(self, says: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = (
            nn.Conv2d(6, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
        )
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        if says:
            self.masked_anatomy = partial(
                Anatomy, "user", (Step("conv1", "bn1", "relu"), Step("conv2")), act="relu"
            )

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, 6, H, W] -> the same shape."""
        y = self.conv2(self.relu(self.bn1(self.conv1(x))))
        return self.relu(x + y) if float(x.abs().sum()) >= 0 else x


def timm_block(name: str, *args: object, **options: object) -> nn.Module:
    """One block of timm: "module.Class"."""
    import importlib

    from dynaconv.integrations.timm import import_timm

    import_timm()
    module, _, kind = name.rpartition(".")
    return getattr(importlib.import_module(f"timm.models.{module}"), kind)(*args, **options)


def shuffle_unit() -> nn.Module:
    """ShuffleNetV2's unit of stride 1."""
    from dynaconv.integrations.torchvision import import_torchvision

    import_torchvision()
    from torchvision.models.shufflenetv2 import InvertedResidual

    return InvertedResidual(48, 48, 1)


def _blurred() -> nn.Module:
    down = nn.Sequential(nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    return timm_block("resnet.BasicBlock", 6, 8, 2, down, aa_layer=blur())


def _se_bottleneck() -> nn.Module:
    from functools import partial as with_options

    from dynaconv.integrations.timm import import_timm

    import_timm()
    from timm.layers import SEModule

    down = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
    layer = with_options(SEModule, rd_channels=4)
    return timm_block("resnet.Bottleneck", 8, 3, 2, down, attn_layer=layer)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "user": UserBlock,
    "two paths": TwoPaths,
    "averaged": Averaged,
    "inverted with se": lambda: timm_block(
        "_efficientnet_blocks.InvertedResidual", 6, 6, exp_ratio=2.0, se_layer=timm_se
    ),
    "edge with se": lambda: timm_block(
        "_efficientnet_blocks.EdgeResidual", 6, 6, exp_ratio=2.0, se_layer=timm_se
    ),
    "bottleneck with se": _se_bottleneck,
    "blurred": _blurred,
    "convnext": lambda: timm_block("convnext.ConvNeXtBlock", 6, drop_path=0.2, ls_init_value=0.8),
    "convnext with grn": lambda: timm_block("convnext.ConvNeXtBlock", 6, use_grn=True, conv_mlp=True),
    "two additions": TwoAdditions,
    "repvit": lambda: timm_block("repvit.RepViTBlock", 6, 2, 3, False, nn.GELU),
    "shuffle": shuffle_unit,
}


def timm_se(channels: int, **options: object) -> nn.Module:
    """EfficientNet's squeeze-excite."""
    return timm_block("_efficientnet_blocks.SqueezeExcite", channels, **options)
