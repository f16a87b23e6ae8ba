"""Claims about every pair of the reference system's interventions, both on the same head: composed, or refused.

The rule: each overwrites one site, and sites are computed in one order. Two that share no entry of a site
compose: both hold, and what one takes from another pass or a donor is free of the other. Two that share an
entry are refused unless they are given an order; then the later holds.
"""

from dataclasses import dataclass
from itertools import combinations_with_replacement

import pytest
import torch

from opsin.callbacks import (
    Ablate,
    Clamp,
    CopyFromPattern,
    Disallow,
    Graft,
    HeadTemperature,
    PerfectPreviousInput,
    Preserve,
)
from opsin.errors import ConfigError
from opsin.interventions.apply import run_passes
from opsin.interventions.donors import donor_from
from tests.helpers.toys import SMALL, batch_of, few_shot, inputs_of, plan_of, run, weights

TASK = few_shot()
VALUES = {name: value[:1] for name, value in weights(SMALL, TASK).items()}
BATCH = batch_of(TASK, seeds=(0,), dtype=torch.float64)
DONOR = donor_from("donor", SMALL, {name: value[:1] for name, value in weights(SMALL, TASK, seeds=(5, 6)).items()})
LAST, LABELS, OTHERS = 4, [1, 3], [0, 2, 4]

# what each writes, as layer and kind of site; two that share one need an order
WRITERS = {
    "induction": (lambda **o: Clamp(["1:1"], "induction", **o), {"1.pattern"}),
    "match": (lambda **o: Clamp(["1:1"], "match", **o), {"1.pattern"}),
    "previous_token": (lambda **o: Clamp(["1:1"], "previous_token", **o), {"1.pattern"}),
    "disallow_previous": (lambda **o: Disallow(["1:1"], "previous_token", **o), {"1.scores"}),
    "silence_non_labels": (lambda **o: Disallow(["1:1"], "non_labels", **o), {"1.scores"}),
    "temperature": (lambda **o: HeadTemperature({"1:1": 0.5}, **o), {"1.scores"}),
    "ablate_head": (lambda **o: Ablate(heads=["1:1"], **o), {"1.v"}),
    "ablate_embedding": (lambda **o: Ablate(sites=["hook_embed"], **o), {"embed"}),
    "preserve_patterns": (lambda **o: Preserve(["patterns"], **o), {"0.pattern", "1.pattern"}),
    "preserve_values": (lambda **o: Preserve(["values"], **o), {"0.v", "1.v"}),
    "preserve_queries": (lambda **o: Preserve(["queries"], **o), {"0.q", "1.q"}),
    "preserve_keys": (lambda **o: Preserve(["keys"], **o), {"0.k", "1.k"}),
    "copy_from_pattern": (lambda **o: CopyFromPattern("1:1", **o), {"logits"}),
    "perfect_input": (lambda **o: PerfectPreviousInput(**o), {"0.resid", "1.pattern"}),
    "graft_lower": (lambda **o: Graft(DONOR, 0, "lower", **o), {"0.resid"}),
    "graft_upper": (lambda **o: Graft(DONOR, 0, "upper", **o), {"logits"}),
}


def seen_with(*writers, model=SMALL, values=VALUES):
    plan = plan_of(model, TASK, *writers, members=1)
    return run(model, values, BATCH, run_passes(plan, inputs_of(plan, model, values, BATCH)))[1]


@dataclass
class Held:
    """What holds under a pair, checked against passes made by hand."""

    seen: dict
    plain: dict

    def at(self, site, head=1):
        return self.seen[site][:, :, head]

    def induction(self):
        row = self.at("blocks.1.attn.hook_pattern")[:, :, LAST]
        return torch.equal(row, BATCH.truth.match[:, :, LAST].double())

    def match(self):
        row = self.at("blocks.1.attn.hook_pattern")[:, :, LAST]
        similarity = BATCH.similarity()[:, :, LAST]
        best = similarity == similarity.amax(-1, keepdim=True)
        return torch.equal(row, best.double())

    def previous_token(self):
        expected = torch.eye(5, dtype=torch.float64)[[0, 0, 1, 2, 3]]
        return bool((self.at("blocks.1.attn.hook_pattern") == expected).all())

    def disallow_previous(self):
        scores = self.at("blocks.1.attn.hook_attn_scores")
        return all((scores[..., row, row - 1] == -1e9).all() for row in range(1, 5))

    def silence_non_labels(self):
        scores = self.at("blocks.1.attn.hook_attn_scores")[:, :, LAST]
        return bool((scores[..., OTHERS] == -1e9).all() and (scores[..., LABELS[0]] > -1e9).all())

    def temperature(self):
        return torch.equal(self.at("blocks.1.attn.hook_attn_scores"), self.plain_at("attn.hook_attn_scores") / 0.5)

    def plain_at(self, site):
        return self.plain[f"blocks.1.{site}"][:, :, 1]

    def ablate_head(self):
        return bool((self.seen["blocks.1.attn.hook_v"][:, :, :, 1] == 0).all())

    def ablate_embedding(self):
        return bool((self.seen["hook_embed"] == 0).all())

    def _preserved(self, site):
        names = [f"blocks.{layer}.attn.{site}" for layer in (0, 1)]
        return all(torch.equal(self.seen[name], self.plain[name]) for name in names)

    def preserve_patterns(self):
        return self._preserved("hook_pattern")

    def preserve_values(self):
        return self._preserved("hook_v")

    def preserve_queries(self):
        return self._preserved("hook_rot_q")

    def preserve_keys(self):
        return self._preserved("hook_rot_k")

    def copy_from_pattern(self):
        # each label of the context was shown once, so its logit is its score in the plain pass
        scores = self.plain_at("attn.hook_attn_scores")[:, :, LAST][..., LABELS]
        logits = self.seen["hook_logits"][:, :, LAST].gather(-1, BATCH.tokens)
        return torch.equal(logits, scores)

    def perfect_input(self):
        embedding = self.plain["hook_embed"]
        moved = handed_on(VALUES, embedding[:, :, [0, 0, 1, 2, 4]])["blocks.1.attn.hook_pattern"]
        same = torch.equal(self.seen["blocks.0.hook_resid_post"], embedding)
        return same and torch.equal(self.seen["blocks.1.attn.hook_pattern"], moved)

    def graft_lower(self):
        donor = run(SMALL, DONOR.parameters, BATCH)[1]
        return torch.equal(self.seen["blocks.0.hook_resid_post"], donor["blocks.0.hook_resid_post"])

    def graft_upper(self):
        donor = handed_on(DONOR.parameters, self.seen["blocks.0.hook_resid_post"])
        return torch.equal(self.seen["hook_logits"], donor["hook_logits"])


def handed_on(values, resid):
    """All activations when block 0 hands on ``resid``."""

    def tap(name, activation):
        return resid if name == "blocks.0.hook_resid_post" else activation

    return run(SMALL, values, BATCH, tap)[1]


@pytest.fixture(scope="module")
def plain():
    return run(SMALL, VALUES, BATCH)[1]


PAIRS = list(combinations_with_replacement(WRITERS, 2))
CONTESTED = [pair for pair in PAIRS if WRITERS[pair[0]][1] & WRITERS[pair[1]][1]]
COMPOSED = [pair for pair in PAIRS if pair not in CONTESTED]


@pytest.mark.parametrize("name", WRITERS)
def test_each_alone_holds_and_did_not_before(name, plain):
    assert getattr(Held(seen_with(WRITERS[name][0]()), plain), name)()
    if not name.startswith("preserve"):
        assert not getattr(Held(plain, plain), name)()


@pytest.mark.parametrize(("first", "second"), COMPOSED)
def test_two_that_share_no_entry_compose_in_any_order_of_the_recipe(first, second, plain):
    seen = seen_with(WRITERS[first][0](), WRITERS[second][0]())
    swapped = seen_with(WRITERS[second][0](), WRITERS[first][0]())
    assert all(torch.equal(seen[site], swapped[site]) for site in seen)
    held = Held(seen, plain)
    assert getattr(held, first)() and getattr(held, second)()


@pytest.mark.parametrize(("first", "second"), CONTESTED)
def test_two_that_share_an_entry_are_refused_without_an_order(first, second):
    with pytest.raises(ConfigError, match="two different orders"):
        plan_of(SMALL, TASK, WRITERS[first][0](), WRITERS[second][0](), members=1)


@pytest.mark.parametrize(("first", "second"), [pair for pair in CONTESTED if pair[0] != pair[1]])
def test_of_two_with_an_order_the_later_holds(first, second, plain):
    for earlier, later in ((first, second), (second, first)):
        held = Held(seen_with(WRITERS[earlier][0](order=0), WRITERS[later][0](order=1)), plain)
        assert getattr(held, later)(), f"{later} after {earlier}"


def test_all_pairs_were_looked_at():
    count = len(WRITERS)
    assert len(PAIRS) == count * (count + 1) // 2 == len(COMPOSED) + len(CONTESTED)
    assert len(CONTESTED) > count and len(COMPOSED) > len(CONTESTED)
