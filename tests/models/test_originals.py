"""State dicts of the published implementations load at any depth, and compute their numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import dynaconv as dc
from dynaconv.integrations.timm import import_timm
from dynaconv.models.originals import load_original_, remap_original
from dynaconv.nn.condconv import CondConv2d
from dynaconv.nn.dcd import DCDConv2d, DCDLinear
from dynaconv.nn.dyconv import DYConv2d
from dynaconv.nn.odconv import ODConv2d
from dynaconv.nn.routed_block import RoutedBlock
from dynaconv.nn.routers import SigmoidRouter
from dynaconv.nn.temperature import set_temperature

FIXTURES = Path(__file__).parent.parent / "fixtures"
LAYERS = {
    "dcd_conv3x3_s1": lambda: DCDConv2d(16, 24, 3, padding=1, bias=False, rule="resnet_basic"),
    "dcd_expansion_1x1": lambda: DCDConv2d(24, 144, 1, bias=False),
    "odconv_3x3_k4": lambda: ODConv2d(12, 20, 3, padding=1, bias=False, num_kernels=4),
    "odconv_1x1_k1": lambda: ODConv2d(80, 24, 1, bias=False, reduction=1 / 4),
    "condconv_3x3": lambda: CondConv2d(8, 12, 3, padding=1, num_experts=4, router=False),
}


def read(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """The fixture's tensors, the original's state dict, and the cases."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        names = json.loads(file.metadata()["original_names"])
        saved = {theirs: tensors[f"param.{term}"] for term, theirs in names.items()}
        for bn in [key.removesuffix("running_var") for key in saved if key.endswith("running_var")]:
            saved[f"{bn}num_batches_tracked"] = torch.tensor(7)
        return tensors, saved, json.loads(file.metadata()["cases"])


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert float((got - want).detach().abs().max()) <= tolerance * float(want.detach().abs().max())


def compare(name: str, layer: nn.Module) -> None:
    tensors, _, cases = read(name)
    for case, facts in cases.items():
        set_temperature(layer, facts.get("tau", 1.0))
        layer.train(facts["mode"] == "train")
        routing = {"routing": tensors[f"{case}.r"]} if f"{case}.r" in tensors else {}
        close(layer(tensors[f"{case}.x"], **routing), tensors[f"{case}.y"])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_layer(name: str, prefix: str) -> None:
    layer, saved = LAYERS[name](), read(name)[1]
    missing = load_original_(layer, {prefix + key: value for key, value in saved.items()})
    assert missing == (["router.temperature"] if name.startswith("odconv") else [])
    compare(name, layer)


class Network(nn.Module):
    """Dynamic layers at some depth, with static ones around."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.stages = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), LAYERS[name]()), LAYERS[name]())
        self.fc = nn.Linear(4, 2)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("match", ["name", "order"])
def test_a_network(name: str, match: str, seed: int) -> None:
    network, layer = Network(name), read(name)[1]
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    inner, head = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
    parts = [stem.state_dict(), inner.state_dict(), layer, layer, head.state_dict()]
    paths = {
        "name": ("stem", "stages.0.0", "stages.0.1", "stages.1", "fc"),
        "order": ("first", "layers.3", "layers.4.conv.0", "fc.0", "classifier"),
    }[match]
    each = zip(paths, parts, strict=True)
    saved = {f"{path}.{key}": value for path, part in each for key, value in part.items()}
    load_original_(network, saved, match=match)
    compare(name, network.stages[0][1])
    compare(name, network.stages[1])
    assert torch.equal(network.fc.weight, head.weight)
    assert torch.equal(network.stem[1].running_var, stem[1].running_var)


def test_dcd_classifier(seed: int) -> None:
    original = DCDLinear(12, 5)
    for parameter in original.parameters():
        nn.init.normal_(parameter)
    names = {
        "weight": "cls.weight", "bias": "cls.bias", "q": "cls_q.weight", "p": "cls_p.weight",
        "router.squeeze.weight": "fc.0.weight", "router.gate.weight": "fc.1.fc.0.weight",
        "router.fusion.weight": "fc_phi.weight", "router.scale.weight": "fc_scale.weight",
    }  # fmt: skip
    state = original.state_dict()
    saved = {"classifier.0." + names.get(k, k.replace("norm", "bn")): v for k, v in state.items()}
    network = nn.ModuleDict({"fc": DCDLinear(12, 5)})
    assert load_original_(network, saved, match="order") == []
    x = torch.randn(3, 12)
    close(network["fc"].eval()(x), original.eval()(x), 1e-6)
    with pytest.raises(ValueError, match=r"no layer 'classifier.0' here.*no layer 'fc' there.*match='order'"):
        remap_original(saved, network)


@pytest.mark.parametrize("match", ["name", "order"])
def test_condconv_block_of_timm(match: str, seed: int) -> None:
    tensors, saved, _ = read("condconv_3x3")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_pw = LAYERS["condconv_3x3"]()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv_pw(x)

    network = nn.Sequential(RoutedBlock(Block(), SigmoidRouter(8, 4), ["conv_pw"]))
    routing = nn.Linear(8, 4)
    state = {f"0.conv_pw.{key}": value for key, value in saved.items()}
    state |= {f"0.routing_fn.{key}": value for key, value in routing.state_dict().items()}
    assert load_original_(network, state, match=match) == []
    x = tensors["even.x"]
    r = torch.sigmoid(routing(x.mean((2, 3))))
    experts = [
        F.conv2d(x, w, b, padding=1) for w, b in zip(tensors["param.W"], tensors["param.b"], strict=True)
    ]
    close(network(x), sum(r[:, k, None, None, None] * y for k, y in enumerate(experts)))


@pytest.mark.parametrize("fc2_bias", [True, False])
def test_dyconv_with_another_hidden_width(fc2_bias: bool, seed: int) -> None:
    saved = {
        "weight": torch.randn(4, 6, 8, 3, 3),
        "bias": torch.randn(4, 6),
        "attention.fc1.weight": torch.randn(3, 8, 1, 1),
        "attention.fc2.weight": torch.randn(4, 3, 1, 1),
    }
    if fc2_bias:
        saved["attention.fc2.bias"] = torch.randn(4)
    layer = DYConv2d(8, 6, 3, padding=1)
    assert load_original_(layer, saved) == ["router.temperature"]
    x = torch.randn(2, 8, 5, 7)
    hidden = F.conv2d(F.adaptive_avg_pool2d(x, 1), saved["attention.fc1.weight"]).relu()
    logits = F.conv2d(hidden, saved["attention.fc2.weight"], saved.get("attention.fc2.bias"))
    pi = torch.softmax(logits.flatten(1), dim=1)
    experts = [F.conv2d(x, w, b, padding=1) for w, b in zip(saved["weight"], saved["bias"], strict=True)]
    close(layer(x), sum(pi[:, k, None, None, None] * y for k, y in enumerate(experts)))


def test_bad_input() -> None:
    saved = read("odconv_3x3_k4")[1]
    with pytest.raises(
        ValueError, match=r"'weight' for layer '' is \[4, 20, 12, 3, 3\], but \[2, 20, 12, 3, 3\]"
    ):
        load_original_(ODConv2d(12, 20, 3, bias=False, num_kernels=2), saved)
    with pytest.raises(ValueError, match="has 'attention.kernel_fc.weight' .* which ODConv2d does not have"):
        part = {k: v for k, v in saved.items() if k != "weight"}
        load_original_(ODConv2d(12, 20, 3, bias=False), part)
    with pytest.raises(ValueError, match="the original lacks 'static_bias' .1 tensors in all."):
        load_original_(ODConv2d(12, 20, 3, num_kernels=4), saved)
    with pytest.raises(ValueError, match="the original has 1 layers and this network 2"):
        network = nn.Sequential(ODConv2d(12, 20, 3), nn.BatchNorm2d(20))
        load_original_(network, saved, match="order")
    with pytest.raises(ValueError, match="unknown match 'names'; did you mean 'name'"):
        load_original_(ODConv2d(12, 20, 3), saved, match="names")


@pytest.mark.needs("timm", "torchvision")
@pytest.mark.parametrize("match", ["name", "order"])
def test_condconv_network_of_timm(match: str, seed: int) -> None:
    """timm's CondConv EfficientNet into its static twin made dynamic (by name) and into torchvision's (by order)."""
    timm = import_timm()
    original = timm.create_model("efficientnet_cc_b0_4e", num_classes=10).eval()
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    if match == "order":
        network = dc.create_model("condconv4_efficientnet_b0", num_classes=10)
    else:
        network = timm.create_model("efficientnet_b0", num_classes=10)
        dc.dynamize_(network, dc.CondConv(num_experts=4))
    assert load_original_(network, original.state_dict(), match=match) == []
    x = torch.randn(2, 3, 64, 64)
    close(network.eval()(x), original(x))
