"""Claims about k-sparse probes, on units that are the feature, or carry it together."""

import pytest
import torch

from opsin.metrics.sparse_probes import probe_accuracies


def bits(count: int, size: int = 400) -> torch.Tensor:
    return torch.randint(0, 2, (size, count), generator=torch.Generator().manual_seed(0))


def test_a_feature_that_is_a_unit_is_read_from_one():
    x = bits(5)
    assert probe_accuracies(x[None].float(), x[None, :, 3], [1, 5]).tolist() == [[1.0, 1.0]]


def test_what_no_unit_tells_is_said_by_chance():
    x = bits(6)
    parity = x[:, :2].sum(1) % 2
    found = probe_accuracies(x[None, :, 2:].float(), parity[None], [1, 4])
    assert ((found - 0.5).abs() < 5 * 0.5 / 200**0.5).all()


def test_a_feature_that_units_carry_together_needs_all_of_them():
    noise, feature = torch.randn(400, 1, generator=torch.Generator().manual_seed(1)), bits(1)[:, 0]
    # two units of large common noise; their difference is the feature
    x = torch.cat([10 * noise, 10 * noise + feature[:, None]], 1)
    one, both = probe_accuracies(x[None], feature[None], [1, 2])[0].tolist()
    assert one < 0.7 and both == 1


def test_a_frequent_class_is_no_success():
    rare = (torch.arange(400) % 20 < 2).long()
    found = probe_accuracies(torch.randn(1, 400, 1, generator=torch.Generator().manual_seed(2)), rare[None], [1])
    assert found.item() == pytest.approx(0.5, abs=0.05)


def test_units_that_do_not_vary_tell_nothing_and_members_are_apart():
    feature = bits(1)[:, 0]
    x = torch.stack([torch.zeros(400, 2), feature[:, None].expand(-1, 2).float(), torch.full((400, 2), torch.nan)])
    dead, alive, broken = probe_accuracies(x, feature.expand(3, -1), [1])[:, 0].tolist()
    assert dead == 0.5 and alive == 1 and broken != broken
