"""Parameters and multiply-adds from the tables and formulas of the papers alone, without building a network.

An independent second count: nothing here knows about modules. Input 224x224, one image, 1000 classes by default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, isqrt


@dataclass(frozen=True)
class Conv:
    """One convolution: role, channels, kernel size, groups, side of the output map, its block and the block's input."""

    role: str
    i: int
    o: int
    k: int
    g: int
    side: int
    block: int = -1
    block_in: int = 0
    kind: str = ""

    @property
    def weights(self) -> int:
        return self.o * (self.i // self.g) * self.k * self.k

    @property
    def macs(self) -> int:
        return self.weights * self.side**2


@dataclass(frozen=True)
class Net:
    """Convolutions (each followed by batch norm), squeeze-excite pairs (channels, squeeze), classifier (in, out)."""

    convs: tuple[Conv, ...]
    classifier: tuple[int, int]
    squeezes: tuple[tuple[int, int], ...] = ()

    @property
    def params(self) -> int:
        f, n = self.classifier
        excite = sum(2 * c * s + s + c for c, s in self.squeezes)
        return sum(c.weights + 2 * c.o for c in self.convs) + excite + f * n + n

    @property
    def macs(self) -> int:
        f, n = self.classifier
        return sum(c.macs for c in self.convs) + sum(2 * c * s for c, s in self.squeezes) + f * n


RESNETS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def resnet(depth: int, classes: int = 1000, base: int = 64) -> Net:
    """ResNet with stages of base, 2 base, 4 base, 8 base channels and a stem of 64."""
    convs, i, side, block = [Conv("stem", 3, 64, 7, 1, 112)], 64, 56, 0
    kind = "basic" if depth < 50 else "bottleneck"
    for stage, repeats in enumerate(RESNETS[depth]):
        c = base * 2**stage
        o = c if kind == "basic" else 4 * c
        for n in range(repeats):
            stride = 2 if stage and not n else 1
            out = side // stride
            shapes = [(i, c, 3, out), (c, c, 3, out)]
            if kind == "bottleneck":
                shapes = [(i, c, 1, side), (c, c, 3, out), (c, o, 1, out)]
            convs += [Conv("conv", a, b, k, 1, s, block, i, kind) for a, b, k, s in shapes]
            if stride != 1 or i != o:
                convs.append(Conv("shortcut", i, o, 1, 1, out, block, i))
            i, side, block = o, out, block + 1
    return Net(tuple(convs), (i, classes))


def rounded(v: float) -> int:
    """Channels to a multiple of 8, never more than a tenth below v."""
    near = max(8, int(v + 4) // 8 * 8)
    return near + 8 if near < 0.9 * v else near


MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2(w: float, classes: int = 1000) -> Net:
    i, side, block = rounded(32 * w), 112, 0
    convs = [Conv("stem", 3, i, 3, 1, side)]
    for t, c, repeats, s in MOBILENET_V2:
        for n in range(repeats):
            side, convs = _inverted(convs, block, i, t * i, rounded(c * w), 3, s if not n else 1, side)
            i, block = rounded(c * w), block + 1
    head = 1280 if w <= 1 else rounded(1280 * w)
    return Net((*convs, Conv("head", i, head, 1, 1, side)), (head, classes))


def _inverted(convs, block, i, hidden, o, k, stride, side) -> tuple[int, list[Conv]]:
    out = side // stride
    place = {"block": block, "block_in": i, "kind": "inverted"}
    expand = [Conv("expand", i, hidden, 1, 1, side, **place)] if hidden != i else []
    wide = Conv("depthwise", hidden, hidden, k, hidden, out, **place)
    return out, [*convs, *expand, wide, Conv("project", hidden, o, 1, 1, out, **place)]


EFFICIENTNET = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def efficientnet_b0(depth: float = 1.0, classes: int = 1000) -> tuple[Net, int]:
    """The network, and the first block of its last three rows."""
    i, side, block, squeezes, rows = 32, 112, 0, [], []
    convs = [Conv("stem", 3, 32, 3, 1, 112)]
    for repeats, k, s, t, c in EFFICIENTNET:
        rows.append(block)
        for n in range(ceil(repeats * depth)):
            squeezes.append((t * i, int(0.25 * i)))
            side, convs = _inverted(convs, block, i, t * i, c, k, s if not n else 1, side)
            i, block = c, block + 1
    net = Net((*convs, Conv("head", 320, 1280, 1, 1, side)), (1280, classes), tuple(squeezes))
    return net, rows[-3]


@dataclass(frozen=True)
class Count:
    """What a method makes of a network."""

    params: int
    static: int
    mixing: int
    routing: int

    @property
    def total(self) -> int:
        return self.static + self.mixing + self.routing


def condconv(net: Net, k: int, first_block: int, classifier: bool = True) -> Count:
    """K experts and one router of one linear layer for each block from first_block on."""
    chosen = [c for c in net.convs if c.block >= first_block and c.role not in ("shortcut", "stem", "head")]
    inputs = [c.block_in for c in {c.block: c for c in chosen}.values()]
    params = net.params + (k - 1) * sum(c.weights for c in chosen) + sum(k * c + k for c in inputs)
    mixing, routing = k * sum(c.weights for c in chosen), k * sum(inputs)
    if classifier:
        f, n = net.classifier
        params += (k - 1) * f * n - n + k * f + k
        mixing, routing = mixing + k * f * n, routing + k * f
    return Count(params, net.macs, mixing, routing)


def dyconv(net: Net, k: int) -> Count:
    """K kernels and two linear layers with bias for every convolution but the stem."""
    chosen = [c for c in net.convs if c.role != "stem"]
    routers = [(c.i, c.i // 4) for c in chosen]
    params = net.params + (k - 1) * sum(c.weights for c in chosen)
    params += sum(i * h + h + h * k + k for i, h in routers)
    return Count(params, net.macs, k * sum(c.weights for c in chosen), sum(i * h + h * k for i, h in routers))


def odconv(net: Net, k: int, roles: tuple[str, ...]) -> Count:
    """K kernels, a trunk of max(I // 16, 16) with batch norm, heads with bias."""
    params, mixing, routing = net.params, 0, 0
    for c in (c for c in net.convs if c.role in roles):
        a = max(c.i // 16, 16)
        heads = c.i + (c.o if c.g == 1 else 0) + (c.k**2 if c.k > 1 else 0) + (k if k > 1 else 0)
        params += (k - 1) * c.weights + c.i * a + 2 * a + a * heads + heads
        mixing += k * c.weights if k > 1 else c.weights if c.k > 1 else 0
        routing += c.i * a + a * heads
    return Count(params, net.macs, mixing, routing)


def dcd_sizes(c: Conv, fc_squeeze: int = 16) -> tuple[int, int, int]:
    """(latent channels L, squeeze channels s, pooled positions m)."""
    if c.kind == "basic":
        latent = isqrt(4 * c.i)
        return latent, max(max(4 * c.i, latent**2) // 16, 4), 4
    if c.kind == "bottleneck":
        latent = isqrt(c.i)
        return latent, max(c.i, latent**2) // 16, 1
    m, reduction = (4, 8) if c.i < c.o else (1, 2)
    latent = min(c.i * m // reduction, c.o // reduction)
    while latent**2 > 2 * c.i * m:
        reduction *= 2
        latent = min(c.i * m // reduction, c.o // reduction)
    latent = max(latent, 4)
    return latent, max(max(c.i * m, latent**2) // fc_squeeze, 4), m


def dcd(net: Net, *, fc_squeeze: int = 16, folded: bool = False, classifier: bool = True) -> Count:
    """Residual through L latent channels; ResNets on the main path, others on 1x1 of blocks with an expansion."""
    expanding = {c.block for c in net.convs if c.role == "expand"}
    pointwise = [c for c in net.convs if c.role in ("expand", "project") and c.block in expanding]
    params, mixing, routing = net.params, 0, 0
    for c in [c for c in net.convs if c.role == "conv"] or pointwise:
        latent, s, m = dcd_sizes(c, fc_squeeze)
        branch = m * c.i * s + s * s + s * c.o + s * latent**2
        residual = latent * c.i + c.o * latent
        params += branch + residual + 4 * latent
        routing += branch
        kernel = c.o * latent**2 + c.o * latent * c.i + c.weights
        mixing += kernel if folded else (residual + latent**2) * c.side**2
    if classifier:
        f, n = net.classifier
        branch = f * 32 + 32 * 32 + 32 * 1024 + 32 * n
        params += branch + 32 * (f + n) + 4 * 32
        mixing, routing = mixing + f * 32 + 32**2 + 32 * n, routing + branch
    return Count(params, net.macs, mixing, routing)


def dynet(net: Net, group: int, layers: int) -> Count:
    """`group` kernels for each output channel, predicted from the block input by one or two linear layers."""
    chosen = [c for c in net.convs if c.block >= 0 and c.role != "shortcut"]
    blocks: dict[int, list[Conv]] = {}
    for c in chosen:
        blocks.setdefault(c.block, []).append(c)
    params, routing = net.params + (group - 1) * sum(c.weights for c in chosen), 0
    for convs in blocks.values():
        i, n = convs[0].block_in, group * sum(c.o for c in convs)
        hidden = max(8, i // 4) if layers == 2 and convs[0].kind == "inverted" else i // 4
        params += i * n + n if layers == 1 else i * hidden + hidden + hidden * n + n
        routing += i * n if layers == 1 else i * hidden + hidden * n
    return Count(params, net.macs, group * sum(c.weights for c in chosen), routing)


def dymobile(w: float, classes: int = 1000) -> Net:
    """MobileNetV2 rows without expansion, widths up to a multiple of 6, 3x3 in groups of six channels."""
    base = mobilenet_v2(w, classes)
    convs, i = [base.convs[0]], base.convs[0].o
    for project in (c for c in base.convs if c.role == "project"):
        wide = next(c for c in base.convs if c.block == project.block and c.role == "depthwise")
        before = convs[-1].side
        o = ceil(project.o / 6) * 6
        place = {"block": project.block, "block_in": i, "kind": "dymobile"}
        convs += [
            Conv("conv", i, o, 1, 1, before, **place),
            Conv("conv", o, o, 3, o // 6, wide.side, **place),
            Conv("conv", o, o, 1, 1, project.side, **place),
        ]
        i = o
    head = replace(base.convs[-1], i=i)
    return Net((*convs, head), base.classifier)


def weightnet_shufflenet(stages: tuple[int, int, int], m: int = 2, g: int = 2, classes: int = 1000) -> Count:
    """WeightNet on the released ShuffleNetV2: left branches keep the input's channels, stem and head have biases."""
    params, static, mixing, routing = 24 * 27 + 24 + 48, 24 * 27 * 112**2, 0, 0
    before, side = 24, 56
    for out, repeats in zip(stages, (4, 8, 4), strict=True):
        for unit in range(repeats):
            i, inner, after = (before // 2, out // 2, side) if unit else (before, out // 2, side // 2)
            shapes = [(i, inner, 1, 1, side), (inner, inner, 3, inner, after), (inner, out - i, 1, 1, after)]
            if not unit:
                shapes += [(i, i, 3, i, after), (i, i, 1, 1, after)]
            hidden = max(16, i // 16)
            params, routing = params + i * hidden + hidden, routing + i * hidden
            for a, b, k, groups, out_side in shapes:
                weights, coefficients = b * a // groups * k * k, (m if groups == 1 else m // g) * b
                params += hidden * coefficients + coefficients + (m // g) * weights + 2 * b
                static += weights * out_side**2
                mixing, routing = mixing + (m // g) * weights, routing + hidden * coefficients
            before, side = out, after
    head = before * 1024
    params += head + 3 * 1024 + 1024 * classes + classes
    return Count(params, static + head * side**2 + 1024 * classes, mixing, routing)
