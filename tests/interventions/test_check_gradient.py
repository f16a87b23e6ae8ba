"""Claims about values of the user's own: what they state about their gradient is what autograd finds."""

import random
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from opsin.errors import ConfigError
from opsin.interventions.donors import donor_from
from opsin.interventions.intervention import (
    Clock,
    Intervention,
    Overwrite,
    Pass,
    Relative,
    Source,
    Supply,
    Value,
    Weight,
)
from opsin.interventions.selection import Selection
from opsin.training.module import OpsinModule
from tests.helpers.toys import SMALL, ToyTokens, few_shot, weights

SITE = "blocks.1.hook_resid_pre"
EARLIER = "blocks.0.hook_resid_pre"
DONOR = donor_from("donor", SMALL, {name: value[:1] for name, value in weights(SMALL, few_shot()).items()})


class Writes(Callback):
    """Puts one value at one site."""

    def __init__(self, value, site=SITE):
        self.value, self.site = value, site

    def interventions(self, sites):
        return [Intervention("Writes", self.site, Selection(), self.value)]


@dataclass(frozen=True)
class Made(Value):
    """What a function makes of the activation, its inputs and the batch."""

    name: str
    function: object = field(compare=False)
    needed: tuple = ()
    states: str | None = None

    @property
    def needs(self):
        return self.needed

    @property
    def gradient(self):
        return super().gradient if self.states is None else self.states

    def __call__(self, x, batch, *inputs):
        chosen = self.function(x, batch, *inputs)
        return Overwrite(*chosen) if isinstance(chosen, tuple) else chosen if self.name == "raw" else Overwrite(chosen)


@dataclass(frozen=True)
class Several(Supply):
    """Three numbers."""

    def initial(self, members):
        return torch.zeros(members, 3)


def plan(value, site=SITE, task=None):
    return OpsinModule(task or few_shot(), SMALL).plan_for([Writes(value, site)], 10)


def noise(x, *_):
    return x + torch.randn_like(x)


def rare(x, batch, *_):
    """Overwrites nothing in most batches."""
    return x + 1, torch.zeros(x.shape[:3], dtype=torch.bool)[..., None]


STOPS = {
    "detached": (lambda x, *_: x.detach() + 1, ()),
    "a number": (lambda x, *_: x.new_zeros(()), ()),
    "a sign": (lambda x, *_: x.sign(), ()),
    "rounded": (lambda x, *_: x.round(), ()),
    "itself where nothing is overwritten": (
        lambda x, *_: (torch.where(x.detach() > 0, 1.0, x), x.detach() > 0),
        (),
    ),
    "a source that is detached": (lambda x, batch, y: y, (Source(EARLIER, detach=True),)),
    "a donor": (lambda x, batch, y: y, (Source(SITE, Pass(donor=DONOR)),)),
    "a supply": (lambda x, batch, s: x.detach() + s.sum(), (Several(),)),
    "a weight that is detached": (lambda x, batch, w: w.sum() + 0 * x.detach(), (Weight("unembed.W_U", detach=True),)),
    "the clock": (lambda x, batch, clock: x.detach() * clock.sum(), (Clock(),)),
    "no gradient at all": (lambda x, *_: torch.no_grad()(torch.relu)(x), ()),
}
FLOWS = {
    "noise": (noise, ()),
    "a threshold that normals never pass": (lambda x, *_: torch.relu(x - 9), ()),
    "a window that numbers of many sizes saturate": (lambda x, *_: x.softmax(-1), ()),
    "in place": (lambda x, *_: x.mul_(2), ()),
    "rare": (rare, ()),
    "a mean": (lambda x, *_: x.mean(1, keepdim=True), ()),
    "what raises on numbers of many sizes": (lambda x, *_: x if x.abs().max() < 9 else 1 / 0, ()),
    "a source": (lambda x, batch, y: y, (Source(EARLIER),)),
    "a source of the same pass": (lambda x, batch, y: y, (Source(EARLIER, Relative.SAME_PASS),)),
    "a weight": (lambda x, batch, w: x.detach() + w.sum(), (Weight("unembed.W_U"),)),
    "the second source": (lambda x, batch, a, b: a + b, (Source(EARLIER, detach=True), Source(SITE))),
    "custom": (lambda x, *_: _Straight.apply(x), ()),
}
BY_DEFAULT_RIGHT = {"a source", "a source of the same pass", "the second source"}


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize("name", [*STOPS, *FLOWS])
def test_a_value_that_states_the_truth_is_taken_and_one_that_does_not_is_refused_in_one_line(name):
    function, needs = (STOPS | FLOWS)[name]
    truth, lie = ("stops", "flows") if name in STOPS else ("flows", "stops")
    assert plan(Made(name, function, needs, truth)).describe()[-1]["gradient"] == truth
    with pytest.raises(ConfigError, match=rf"^Writes: Made.gradient: got '{lie}', expected '{truth}', ") as caught:
        plan(Made(name, function, needs, lie))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FLOWS)
def test_a_value_that_states_nothing_is_refused_where_gradient_passes_it_unnoticed(name):
    function, needs = FLOWS[name]
    if name in BY_DEFAULT_RIGHT:
        plan(Made(name, function, needs))
        return
    with pytest.raises(ConfigError, match=r"expected 'flows', since autograd finds gradient into .*: state it, or"):
        plan(Made(name, function, needs))


def test_what_gradient_reaches_is_named():
    with pytest.raises(ConfigError, match=rf"into the activation, {EARLIER}: state it"):
        plan(Made("sum", lambda x, batch, y: x + y, (Source(EARLIER),), "stops"))


def test_a_gradient_that_is_no_number_decides_nothing():
    for states in ("stops", "flows"):
        plan(Made("nan", lambda x, *_: (x - x).sqrt() * torch.nan, (), states))


@pytest.mark.parametrize("states", ["", "stop", None.__class__])
def test_a_value_states_one_of_two_words(states):
    with pytest.raises(ConfigError, match=r"Made.gradient: got .*, expected 'flows'"):
        plan(Made("word", noise, (), states))


def test_a_weight_that_the_model_lacks_is_refused_by_writer_and_name():
    with pytest.raises(ConfigError, match=r"^Writes: got 'unembed.W_V', expected a weight of .*nearest: unembed.W_U"):
        plan(Made("broken", lambda x, batch, w: w, (Weight("unembed.W_V"),)))


@pytest.mark.parametrize(
    "function, needs, reason",
    [
        (lambda x, *_: 1 / 0, (), "ZeroDivisionError: division by zero"),
        (lambda x, *_: x[..., :3], (), "RuntimeError: The expanded size"),
        (lambda x, batch: x, (Clock(),), "TypeError: "),
    ],
)
def test_a_value_that_cannot_be_computed_is_refused_by_writer_and_name(function, needs, reason):
    with pytest.raises(ConfigError, match=rf"^Writes: got 'Made', expected a value that can be .*{SITE} \({reason}"):
        plan(Made("broken", function, needs))


def test_a_value_that_returns_no_overwrite_is_refused():
    with pytest.raises(ConfigError, match="TypeError: it returns a Tensor and no Overwrite"):
        plan(Made("raw", lambda x, *_: x.detach()))


def test_a_value_that_needs_more_sequences_than_two_gets_those_of_the_run():
    plan(Made("four", lambda x, *_: x.detach().topk(4, 1).values))
    with pytest.raises(ConfigError, match="expected 'flows'"):
        plan(Made("four", lambda x, *_: x.topk(4, 1).values))


@pytest.mark.parametrize("task", [few_shot(), ToyTokens()], ids=["features", "tokens"])
def test_a_value_may_need_the_truth(task):
    def function(x, batch):
        return x.detach(), batch.truth.match[:, :, None].expand_as(x)

    plan(Made("truth", function), "blocks.1.attn.hook_pattern", task)


@pytest.mark.parametrize("site", [site.name for site in SMALL.sites(few_shot())])
def test_a_value_can_be_checked_at_every_site(site):
    with pytest.raises(ConfigError, match="expected 'flows'"):
        plan(Made("noise", noise), site)


def test_a_value_inside_a_donor_is_checked_too():
    inside = Intervention("Inner", SITE, Selection(), Made("noise", noise))
    outer = Made("outer", lambda x, batch, y: y, (Source(SITE, Pass((inside,), DONOR)),))
    with pytest.raises(ConfigError, match=r"^Inner: Made.gradient: got 'stops', expected 'flows'"):
        plan(outer)


def test_a_check_draws_no_random_number_of_the_run_even_where_it_refuses():
    def numbers():
        return torch.rand(1).item(), np.random.rand(), random.random()

    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = numbers()
    for states in ("flows", "stops"):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        value = Made("draws", lambda x, *_: noise(x) + np.random.rand() + random.random(), (), states)
        try:
            plan(value)
        except ConfigError:
            assert states == "stops"
        assert numbers() == expected


def test_a_check_takes_well_under_a_tenth_of_a_second():
    module, value = OpsinModule(few_shot(), SMALL), Writes(Made("noise", noise, (), "flows"))
    took = []
    for _ in range(5):
        begun = time.perf_counter()
        module.plan_for([value], 10)
        took.append(time.perf_counter() - begun)
    assert min(took) < 0.05


class Unstated(Value):
    """No dataclass."""

    def __call__(self, x, batch, *inputs):
        return Overwrite(x.detach())


@dataclass
class Thawed(Unstated):
    """Not frozen."""


@dataclass(frozen=True)
class Unhashable(Unstated):
    """With a field that cannot be hashed."""

    numbers: list


@pytest.mark.parametrize("value", [Unstated(), Thawed(), Unhashable([1])], ids=["class", "thawed", "unhashable"])
def test_a_value_whose_fields_do_not_say_what_it_is_is_refused_in_one_line(value):
    with pytest.raises(ConfigError, match=rf"^Writes: got '{type(value).__name__}', expected a ") as caught:
        plan(value)
    assert "\n" not in str(caught.value)


def test_a_run_with_such_a_value_ends_before_it_begins(opsin, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        """
from dataclasses import dataclass
import torch
from lightning.pytorch import Callback
from opsin.interventions.intervention import Intervention, Overwrite, Value
from opsin.interventions.selection import Selection

@dataclass(frozen=True)
class Shaken(Value):
    def __call__(self, x, batch, *inputs):
        return Overwrite(x + torch.randn_like(x))

class Shake(Callback):
    def interventions(self, sites):
        return [Intervention("Shake", "hook_embed", Selection(), Shaken())]
"""
    )
    (tmp_path / "tiny.yaml").write_text(
        """
task: {class_path: opsin.tasks.Repeats, init_args: {batch_size: 2}}
model: {transformer: {width: 8, heads: 2}, probe_size: 4, evaluation_size: 4}
trainer: {max_steps: 50, callbacks: [{class_path: mine.Shake}]}
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    for verb in ("fit", "sites"):
        ended = opsin(verb, "--config", "tiny.yaml", *(["--run_folder", "run"] if verb == "fit" else []))
        assert ended.code == 2 and ended.err.count("\n") == 1
        assert ended.err.startswith("opsin: Shake: Shaken.gradient: got 'stops', expected 'flows'")
        assert not (tmp_path / "run").exists()
