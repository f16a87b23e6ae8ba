"""Claims about norms of weights: squares add up by kind, and over kinds."""

import torch

from opsin.metrics.weight_norms import norms_by_kind


def test_squares_add_up_within_a_kind_and_over_all():
    values = {
        "embed.W_E": torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]]]),
        "blocks.0.mlp.W_in": torch.tensor([[[0.0]], [[2.0]]]),
        "blocks.0.mlp.b_in": torch.tensor([[4.0], [0.0]]),
    }
    kinds = {"embed.W_E": "embed", "blocks.0.mlp.W_in": "mlp", "blocks.0.mlp.b_in": "mlp"}
    found = {kind: norm.tolist() for kind, norm in norms_by_kind(values, kinds).items()}
    assert found == {"embed": [3, 1], "mlp": [4, 2], "all": [5, torch.tensor(5.0).sqrt().item()]}
