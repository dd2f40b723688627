"""What every test gets: one thread, an explicit seed, repeatable property tests."""

from __future__ import annotations

import os
from importlib.util import find_spec

import hypothesis
import pytest
import torch

# xdist runs a test process per core, so each of them computes on one thread.
torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "dynaconv",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=10 if os.environ.get("CI") else 25,
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500)
hypothesis.settings.load_profile("dynaconv")


@pytest.fixture
def seed() -> int:
    """Seed torch's global generator and return the seed, for generators of your own."""
    torch.manual_seed(0)
    return 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Run a test marked ``needs("timm")`` only where timm is installed."""
    for marker in item.iter_markers("needs"):
        for package in marker.args:
            if find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
