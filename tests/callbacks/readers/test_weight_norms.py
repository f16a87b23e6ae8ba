"""Claims about WeightNorms: every parameter counts, with its kind, at its time."""

import numpy as np

from opsin.callbacks import WeightNorms
from opsin.model.transformer import Transformer
from opsin.training.module import OpsinModule
from tests.helpers.toys import ToyTokens, train


def test_norms_are_those_of_the_weights_of_each_kind():
    shape = Transformer(layers=2, width=8, heads=2, mlp_ratio=1, norm=False)
    model = OpsinModule(ToyTokens(), shape, [1, 2], 0.01, steps_per_batch=4, log_every=4, compile=False)
    train(model, 4, WeightNorms(4))
    values = {name: value.detach().numpy() for name, value in model.parameters_by_name().items()}
    parts = {"embed": "embed.", "attention": ".attn.", "mlp": ".mlp.", "unembed": "unembed.", "all": ""}
    for kind, part in parts.items():
        found = [values[name] for name in values if (name.startswith(part) if part[:1] != "." else part in name)]
        expected = [np.sqrt(sum(np.square(value[member]).sum() for value in found)) for member in range(2)]
        series = model.history[f"weight_norm/{kind}"]
        assert list(series.steps) == [0, 4]
        np.testing.assert_allclose(series.values[-1], expected, rtol=1e-5)
    assert {name for name in model.history.names() if name.startswith("weight_norm/")} == {
        f"weight_norm/{kind}" for kind in parts
    }
