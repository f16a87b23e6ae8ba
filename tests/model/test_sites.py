"""Claims about the site table: it is what a forward pass computes."""

import pytest

from opsin.errors import ConfigError
from opsin.model.transformer import Transformer
from tests.helpers.toys import SMALL, ToyTokens, batch_of, few_shot, run, weights


@pytest.mark.parametrize("make_task", [few_shot, ToyTokens])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("mlp_ratio", [None, 1.5])
@pytest.mark.parametrize("positions", ["rope", "sinusoidal", "learned"])
def test_the_table_lists_what_a_forward_pass_taps(make_task, norm, mlp_ratio, positions):
    task = make_task()
    model = Transformer(layers=2, width=8, heads=2, mlp_ratio=mlp_ratio, norm=norm, positions=positions)
    _, seen = run(model, weights(model, task), batch_of(task))
    table = [(site.name, site.shape(members=2, batch=4)) for site in model.sites(task)]
    assert [(name, tuple(activation.shape)) for name, activation in seen.items()] == table


def test_an_unknown_site_is_refused_with_the_nearest_names(tiny_task):
    with pytest.raises(ConfigError, match=r"Clamp\.site.*attn\.hook_patern.*blocks\.1\.attn\.hook_pattern"):
        SMALL.sites(tiny_task).find("blocks.1.attn.hook_patern", "Clamp.site")


def test_a_name_like_nothing_is_refused_without_a_hint(tiny_task):
    with pytest.raises(ConfigError) as refused:
        SMALL.sites(tiny_task)["%%%"]
    assert refused.value.field == "site" and "nearest" not in str(refused.value)


def test_a_site_knows_its_layer_and_the_table_its_sizes(tiny_task):
    sites = SMALL.sites(tiny_task)
    assert (sites["blocks.1.hook_resid_post"].layer, sites["hook_embed"].layer) == (1, None)
    assert (sites.layers, sites.size("H"), sites.size("L"), sites.size("N")) == (2, 2, 5, 0)


def test_the_learned_table_must_hold_the_sequence(tiny_task):
    with pytest.raises(ConfigError, match=r"transformer\.max_positions: got 4, expected at least the task's 5"):
        Transformer(positions="learned", max_positions=4).sites(tiny_task)
