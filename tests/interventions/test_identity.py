"""Claims about the identity of interventions: equal for what does the same, another for what does not."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from opsin.interventions.identity import DERIVED, identity
from opsin.interventions.intervention import Intervention, Pass, Relative, Source
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection
from opsin.interventions.values.passes import FromPass
from opsin.interventions.values.patterns import Disallowed, PreviousToken
from opsin.model.transformer import Transformer

SITE = "blocks.0.attn.hook_pattern"
CLAMP = Intervention("Clamp", SITE, Selection(heads=(2,), members=(0, 3)), PreviousToken(0.5))


@dataclass(frozen=True)
class Renamed:
    identity_name: ClassVar[str] = "FirstName"
    kept: int
    shown: str = field(default="", metadata=DERIVED)


def test_the_text_of_an_intervention_is_its_parts_by_name():
    assert identity(CLAMP) == (
        "Intervention(writer='Clamp', site='blocks.0.attn.hook_pattern', "
        "selection=Selection(heads=(2,), neurons=None, positions=None, members=(0, 3)), "
        "value=PreviousToken(strength=0.5, labels_only=False), schedule=Schedule(start=0, stop=None, unit='steps', "
        "ramp=0, ramp_down=0, period=None, duty=0.5, random=None, feedback=None), order=None)"
    )


def test_a_derived_field_is_no_part_of_the_identity_and_a_renamed_class_keeps_its_first_name():
    assert identity(Renamed(1, "here")) == identity(Renamed(1, "there")) == "FirstName(kept=1)"
    assert identity(Disallowed("previous_token")).startswith("Disallow(")


def test_every_other_field_makes_another_identity():
    changed = [
        replace(CLAMP, site="blocks.1.attn.hook_pattern"),
        replace(CLAMP, selection=Selection(heads=(3,), members=(0, 3))),
        replace(CLAMP, value=PreviousToken(0.5, labels_only=True)),
        replace(CLAMP, schedule=Schedule(start=1)),
        replace(CLAMP, order=1),
    ]
    assert len({identity(item) for item in [CLAMP, *changed]}) == 6


def test_without_members_an_intervention_is_itself_in_any_of_them():
    alone = replace(CLAMP, selection=Selection(heads=(2,)))
    assert identity(CLAMP) != identity(alone)
    assert identity(CLAMP, members=False) == identity(alone, members=False)
    inside = [Source(SITE, Pass((item,))) for item in (CLAMP, alone)]
    assert len({identity(FromPass(source), members=False) for source in inside}) == 1


def test_a_pass_inside_a_value_counts_and_so_does_the_way_it_is_named():
    sources = [
        Source(SITE),
        Source(SITE, Pass((CLAMP,))),
        Source(SITE, Relative.SAME_PASS),
        Source(SITE, Relative.ASKING_PASS),
    ]
    assert len({FromPass(source).identity for source in sources}) == 4


def test_checkpoints_know_the_output_of_a_norm_by_the_name_that_it_had():
    found = [identity(replace(CLAMP, site=f"ln_final.hook_{end}")) for end in ("out", "normalized", "scale")]
    names = ("ln_final.hook_normalized", "ln_final.hook_normalized_before_weight", "ln_final.hook_scale")
    assert all(f"site='{name}'," in text for name, text in zip(names, found, strict=True))


def test_a_setting_of_a_model_that_was_added_counts_where_it_is_not_at_its_default():
    model = Transformer(layers=1, width=8, heads=2)
    assert identity(model) == (
        "Transformer(layers=1, width=8, heads=2, mlp_ratio=None, norm=True, causal=True, positions='rope', "
        "position_base=10000.0, max_positions=32, init_scale=1.0, unembed_bias=True)"
    )
    assert identity(replace(model, activation="relu")) == identity(model)[:-1] + ", activation='relu')"
