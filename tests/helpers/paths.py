"""Where the tests find the project's files, and data that it does not contain."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
BESIDE = ROOT.parent / "shared"
OMNIGLOT = Path(os.environ.get("OPSIN_OMNIGLOT", BESIDE / "data" / "omniglot"))
REFERENCE = Path(os.environ.get("OPSIN_REFERENCE", BESIDE / "reference"))
