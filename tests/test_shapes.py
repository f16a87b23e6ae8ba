"""Claims about the tests themselves: shapes in signatures are checked while they run."""

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from opsin.interventions.values.patterns import previous_token_pattern
from opsin.metrics.heads import induction_strength
from opsin.objective import accuracy
from opsin.training.optimizer_state import Hyper
from tests.helpers import shapes
from tests.helpers.toys import batch_of


def test_an_argument_of_another_shape_is_refused(tiny_task):
    batch = batch_of(tiny_task)
    with pytest.raises(TypeCheckError, match="pattern"):
        induction_strength(torch.zeros(2, 4, 5, 5), batch.truth)


def test_a_result_of_another_shape_is_refused(tiny_task):
    truth = batch_of(tiny_task).truth
    with pytest.raises(TypeCheckError, match="return value"):
        previous_token_pattern(truth, torch.ones(1, 1, 1), torch.zeros(()))


def test_a_dataclass_with_fields_of_different_members_is_refused():
    with pytest.raises(TypeCheckError, match="clip"):
        Hyper({"learning_rate": torch.ones(2)}, torch.ones(3), {})


def test_a_shape_holds_across_the_arguments_of_one_call(tiny_task):
    with pytest.raises(TypeCheckError, match="outputs"):
        accuracy(torch.zeros(2, 4, 5), batch_of(tiny_task))


def cut(values: Float[Tensor, " M"], length: int) -> Float[Tensor, " M"]:
    return values[:length]


def test_what_was_right_once_is_refused_where_it_is_wrong_later():
    checked = shapes._checked(cut)
    for _ in range(2):
        assert len(checked(torch.zeros(3), 3)) == 3
        with pytest.raises(TypeCheckError, match="return value"):
            checked(torch.zeros(3), 2)
        with pytest.raises(TypeCheckError, match="values"):
            checked(torch.zeros(3, 1), 3)
