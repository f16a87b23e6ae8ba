"""Claims about features of bits: what they are, that they are independent, and what is minimised."""

import itertools
import math

import pytest
import torch

from opsin.errors import ConfigError
from opsin.tasks import BinaryFeatures


def whole(made, bits):
    """All sequences of so many bits."""
    every = torch.tensor(list(itertools.product(range(2), repeat=bits)))
    return made.assemble({}, {"bits": every[None]})


def test_a_feature_is_the_parity_of_its_own_bits():
    made = BinaryFeatures({"bit": 1, "xor": 2, "hard": 4}, unused=1)
    batch = whole(made, 8)
    for bits, (answers,) in zip(batch.tokens[0].tolist(), batch.targets[0].tolist(), strict=True):
        xor_of_xors = (bits[3] ^ bits[4]) ^ (bits[5] ^ bits[6])
        assert answers == [bits[0], bits[1] ^ bits[2], xor_of_xors]
    assert made.layout.scored == (7,) and made.n_outputs == 3


def test_features_are_declared_with_a_bit_that_decides_nothing_and_are_independent():
    made = BinaryFeatures({"bit": 1, "xor": 2}, unused=2)
    batch = whole(made, 5)
    features = {name: feature(batch)[0] for name, feature in made.declared_features().items()}
    assert list(features) == ["bit", "xor", "unused"] and torch.equal(features["unused"], batch.tokens[0, :, 3])
    for one, other in itertools.combinations(features.values(), 2):
        assert torch.bincount(2 * one + other).tolist() == [8, 8, 8, 8]
    assert "unused" not in BinaryFeatures(unused=0).declared_features()


def test_bits_are_uniform_and_follow_from_seed_and_step():
    made = BinaryFeatures(batch_size=4000)
    bits = made.batch(3, 7).tokens[0]
    assert ((bits.double().mean(0) - 0.5).abs() < 5 * 0.5 / math.sqrt(4000)).all()
    assert torch.equal(bits, made.draw([1, 3], 6, 2)["bits"][1, 1])


def test_the_loss_is_that_of_all_features_and_each_has_an_accuracy():
    made = BinaryFeatures({"easy": 1, "hard": 2}, unused=0)
    batch = whole(made, 3)
    # right about the easy feature, and undecided about the hard one, which is then said to be 0
    outputs = torch.stack([100.0 * (2 * batch.targets[..., 0] - 1), torch.zeros(1, 8, 1)], -1)
    found = made.objective.measured(outputs, batch)
    assert found["loss"].item() == pytest.approx(math.log(2))
    assert found["accuracy_easy"].item() == 1 and found["accuracy_hard"].item() == 0.5
    assert found["accuracy"].item() == 0.75 and found["all_right"].item() == 0.5
    assert made.baselines() == pytest.approx({"guessing": 2 * math.log(2), "linear_features": math.log(2)})
    assert BinaryFeatures({"one": 2}).plateau == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"parities": {}}, "BinaryFeatures.parities"),
        ({"parities": {"easy": 0}}, "BinaryFeatures.parities.easy"),
        ({"parities": {"unused": 1}}, "BinaryFeatures.parities"),
        ({"parities": {"a b": 1}}, "BinaryFeatures.parities"),
        ({"unused": -1}, "BinaryFeatures.unused"),
        ({"batch_size": 0}, "BinaryFeatures.batch_size"),
    ],
)
def test_a_wrong_setting_is_named(wrong, line):
    with pytest.raises(ConfigError, match=line):
        BinaryFeatures(**wrong)
