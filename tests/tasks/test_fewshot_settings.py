"""Claims about the settings of the few-shot task: what cannot work is named in one line."""

import math

import pytest
from jsonargparse import ArgumentParser

from opsin.errors import ConfigError
from opsin.task import Task
from opsin.tasks import FewShot, GaussianClusters, Kind

SMALL = GaussianClusters(classes=20, exemplars=5, features=6)


def task(**options):
    return FewShot(**{"exemplars": SMALL, "train_classes": 12, "batch_size": 8} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_classes": 300}, "FewShot.train_classes: got 300, expected at most 20 (classes in the exemplars)"),
        ({"train_classes": 1}, "FewShot.train_classes: got 1, expected at least 2 (different classes in one sequence)"),
        ({"train_classes": 2, "kinds": [Kind(no_support=0.1)]}, "FewShot.train_classes: got 2, expected at least 3"),
        ({"heldout_classes": 9}, "FewShot.heldout_classes: got 9, expected 0 or 2 .. 8"),
        ({"heldout_classes": -1}, "FewShot.heldout_classes: got -1"),
        ({"train_classes": 19}, "FewShot.heldout_classes: got None, expected 0 (1 of 20 classes are not trained on)"),
        ({"train_exemplars": 0}, "FewShot.train_exemplars: got 0, expected at least 1"),
        ({"train_exemplars": 6}, "FewShot.train_exemplars: got 6, expected at most 5 (exemplars of a class)"),
        ({"heldout_exemplars": 5}, "FewShot.heldout_exemplars: got 5, expected 0 or 1 .. 4"),
        ({"heldout_relabellings": 1.0}, "FewShot.heldout_relabellings: got 1.0"),
        ({"heldout_relabellings": math.nan}, "FewShot.heldout_relabellings: got nan"),
        ({"relabelling_seed": -1}, "FewShot.relabelling_seed: got -1"),
        ({"n_labels": 1}, "FewShot.n_labels: got 1, expected at least 2 (classes of kinds[0])"),
        ({"n_labels": 0}, "FewShot.n_labels: got 0, expected at least 1"),
        ({"n_labels": 99, "context": 6}, "FewShot.n_labels: got 99, expected fewer: there are 1120529256 sets of 6"),
        ({"batch_size": 0}, "FewShot.batch_size: got 0"),
        ({"context": 0}, "FewShot.context: got 0"),
        ({"zipf": -1.0}, "FewShot.zipf: got -1.0"),
        ({"noise": math.inf}, "FewShot.noise: got inf"),
        ({"kinds": [Kind(), Kind(matches=3)]}, "FewShot.kinds[1].matches: got 3, expected at most 2"),
        ({"kinds": [Kind(distractor_copies=2)]}, "FewShot.kinds[0].distractor_copies: got 2, expected a divisor of 1"),
        ({"context": 6, "burstiness": 4}, "FewShot.burstiness: got 4, expected a divisor of 6 (context), or null"),
        ({"burstiness": 0}, "FewShot.burstiness: got 0, expected a divisor of 2 (context), or null"),
        ({"burstiness": 1, "kinds": [Kind()]}, "FewShot.burstiness: got 1, expected null beside kinds"),
        ({"bursty": 0.5}, "FewShot.bursty: got 0.5, expected 1, as there is no burstiness"),
        ({"burstiness": 2, "bursty": 1.5}, "FewShot.bursty: got 1.5, expected a share, from 0 to 1"),
        ({"burstiness": 2, "bursty": 0.5}, "FewShot.bursty: got 0.5, expected 1, as labels are drawn: independent"),
        ({"kinds": [Kind(matches=2, label_flip=0.1)]}, "FewShot.kinds[0].label_flip: got 0.1, expected 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_do_not_fit_are_named(options, message):
    with pytest.raises(ConfigError) as caught:
        task(**options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", 0.0),
        ("weight", math.nan),
        ("matches", 0),
        ("distractor_copies", 0),
        ("no_support", 1.1),
        ("random_query", -0.1),
        ("label_flip", math.nan),
    ],
)
def test_a_kind_refuses_a_value_out_of_range(name, value):
    with pytest.raises(ConfigError, match=f"Kind.{name}: got "):
        Kind(**{name: value})


@pytest.mark.parametrize("call", [([-1], 0, 1), ([2**64], 0, 1), ([0], -1, 1), ([0], 0, 1, "train", 0)], ids=str)
def test_a_draw_that_cannot_be_made_is_refused(call):
    with pytest.raises(ConfigError):
        task().draw(*call)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # instantiate_classes has another name in jsonargparse 5
def test_a_task_is_built_from_yaml(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text("""
task:
  class_path: opsin.tasks.FewShot
  init_args:
    exemplars: {class_path: opsin.tasks.GaussianClusters, init_args: {classes: 20, features: 6}}
    train_classes: 12
    context: 4
    kinds:
      - {weight: 3, matches: 2, distractor_copies: 2}
      - {no_support: 1.0, distractor_copies: null}
""")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(Task, "task")
    built = parser.instantiate_classes(parser.parse_args([f"--config={path}"])).task
    assert built.kinds == (Kind(3.0, 2, 2), Kind(no_support=1.0, distractor_copies=None))
    assert built.n_features == 6 and built.layout.positions == 9


class Run:
    """Takes a task the way a LightningModule does."""

    def __init__(self, task: Task):
        self.task = task


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--run.task.train_classes=300"],
            "FewShot.train_classes: got 300, expected at most 100 (classes in the exemplars)",
        ),
        (
            ["--run.task.kinds=[{matches: 0}]"],
            "Kind.matches: got 0, expected at least 1 (no_support leaves the class out)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_bad_setting_on_the_command_line_is_still_one_line(options, message):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Run, "run")
    with pytest.raises(ConfigError) as caught:
        parser.instantiate_classes(parser.parse_args(["--run.task=opsin.tasks.FewShot", *options]))
    assert str(caught.value) == message
