"""Every test runs with the shapes in the package's signatures checked."""

import sys

from tests import shapes

assert "opsin" not in sys.modules, "shapes can only be checked if the hook comes before the package"
shapes.install("opsin")
