"""Every test runs with the shapes in the package's signatures checked."""

import sys

import hypothesis
import pytest

from tests import shapes

assert "opsin" not in sys.modules, "shapes can only be checked if the hook comes before the package"
shapes.install("opsin")

hypothesis.settings.register_profile("opsin", deadline=None)
hypothesis.settings.load_profile("opsin")


@pytest.fixture
def tiny_task():
    """A few-shot task small enough for loops in Python."""
    from tests.toys import few_shot

    return few_shot()
