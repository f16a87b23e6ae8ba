"""What docs/models.md says: every setting and model is on the page, and its example is a model."""

import re
import sys
from dataclasses import fields
from typing import get_args

import torch

import opsin
from opsin.model.layers import Activation
from opsin.model.protocol import ADDED, Model
from opsin.model.transformer import Positions, Transformer
from tests.helpers.paths import ROOT
from tests.helpers.toys import ToyTokens, batch_of, run, weights

PAGE = (ROOT / "docs" / "models.md").read_text()


def test_every_choice_and_model_is_on_the_page():
    names = [item.name for item in fields(Transformer) if item.metadata == ADDED]
    names += [*get_args(Activation), *get_args(Positions), "LayerNorm", "RMSNorm"]
    assert [name for name in names if f"`{name}`" not in PAGE] == []
    models = [name for name in opsin.__all__ if isinstance(getattr(opsin, name), type)]
    models = [name for name in models if issubclass(getattr(opsin, name), Model) and name != "Model"]
    assert len(models) == 6 and [name for name in models if f"`opsin.{name}`" not in PAGE] == []


def test_the_example_is_a_model(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "bag.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    from bag import Bag

    monkeypatch.delitem(sys.modules, "bag")
    model, task = Bag(width=3), ToyTokens()
    values, batch = weights(model, task), batch_of(task)
    logits, seen = run(model, values, batch)
    assert [site.name for site in model.sites(task)] == list(seen)
    torch.testing.assert_close(seen["bag.hook_sum"][:, :, -1], seen["hook_embed"].sum(2))
    assert logits.shape == (2, 4, 6, 7)
