"""Writers whose values come from another forward pass of the same batch."""

from __future__ import annotations

from typing import Literal

from opsin.callbacks.writers.base import FromAnotherPass, check_layer
from opsin.errors import ConfigError
from opsin.interventions.intervention import Intervention, Pass, Source
from opsin.interventions.schedules import Schedule
from opsin.interventions.selection import Selection, parse_pairs
from opsin.interventions.values.passes import CopyOutput, FromPass, PreviousInput, Tempered
from opsin.model.sites import SiteTable

PRESERVED = {
    "patterns": "attn.hook_pattern",
    "values": "attn.hook_v",
    "queries": "attn.hook_rot_q",
    "keys": "attn.hook_rot_k",
}
SCALE = ".hook_scale"


class Preserve(FromAnotherPass):
    """Hold patterns, values, queries, keys or LayerNorm scales at what they are in a pass without interventions.

    Beside an ablation this isolates the paths that do not run through what is preserved. Reference
    options ``preserve_patterns``, ``preserve_values``, ``preserve_queries``, ``preserve_keys``. With the scale of the
    last LayerNorm preserved, ablated neurons of the last layer have their direct effect alone: none of it runs through
    the standard deviation that the LayerNorm divides by (Stolfo et al. 2024, "Confidence regulation neurons in
    language models", section 3; the mean is taken off anew).

    Args:
        what: any of ``patterns``, ``values``, ``queries``, ``keys`` (the latter two after rotation) and ``scales``.
        layers: blocks of all but scales; all when None.
        norms: LayerNorms whose scale is preserved, ``ln_final`` or for example ``blocks.0.ln2``; the last when None.
        detach: stop the gradient at what is taken.
        members: members it acts in; all when None.
        schedule: when, and how strongly.
        order: rank among writers that touch the same entries; the later wins. Beside an ablation of
            values give the ablation the higher order.

    Raises:
        ConfigError: something else to preserve, or layers or norms of nothing; when the run is built, a layer or a
            LayerNorm that does not exist.
    """

    def __init__(
        self,
        what: list[Literal["patterns", "values", "queries", "keys", "scales"]],
        layers: list[int] | None = None,
        norms: list[str] | None = None,
        detach: bool = False,
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        super().__init__(detach, members, schedule, order)
        known = (*PRESERVED, "scales")
        unknown = [name for name in what if name not in known]
        if unknown or not what:
            raise ConfigError("Preserve.what", unknown[0] if unknown else [], f"any of {', '.join(known)}")
        if norms is not None and "scales" not in what:
            raise ConfigError("Preserve.norms", norms, "nothing: without scales they have no effect")
        if layers is not None and set(what) == {"scales"}:
            raise ConfigError("Preserve.layers", layers, "nothing: scales are named by norms")
        self.what, self.layers, self.norms = what, layers, norms

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it holds on a model with these sites."""
        layers = range(sites.layers) if self.layers is None else self.layers
        for layer in layers:
            check_layer("Preserve.layers", layer, sites)
        kinds = [kind for kind in self.what if kind != "scales"]
        names = [f"blocks.{layer}.{PRESERVED[kind]}" for layer in layers for kind in kinds]
        names += self._scales(sites) if "scales" in self.what else []
        return [self._at(name, FromPass(Source(name, detach=self.detach))) for name in names]

    def _scales(self, sites: SiteTable) -> list[str]:
        known = [site.name.removesuffix(SCALE) for site in sites if site.name.endswith(SCALE)]
        if not known:
            raise ConfigError("Preserve.what", "scales", "nothing of them: this model has no LayerNorm")
        norms = ["ln_final"] if self.norms is None else self.norms
        unknown = [name for name in norms if name not in known]
        if unknown or not norms:
            raise ConfigError("Preserve.norms", unknown[0] if unknown else [], f"any of {', '.join(known)}")
        return [name + SCALE for name in norms]


class HeadTemperature(FromAnotherPass):
    """Divide the scores of heads by a temperature, all scores of their layers being those of a pass without it.

    Reference option ``set_head_temperature``: the layer's scores come from a pass without interventions.

    Args:
        temperatures: ``"layer:head"`` and its temperature, more than 0; below 1 sharpens.
        detach: stop the gradient at the scores that are taken.
        members: members it acts in; all when None.
        schedule: when, and how strongly.
        order: rank among writers that touch the same entries; the later wins.
    """

    def __init__(
        self,
        temperatures: dict[str, float],
        detach: bool = False,
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        super().__init__(detach, members, schedule, order)
        for head, temperature in temperatures.items():
            if not temperature > 0:
                raise ConfigError(f"HeadTemperature.temperatures[{head}]", temperature, "more than 0")
        self.temperatures = temperatures

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it overwrites on a model with these sites."""
        names = list(self.temperatures)
        pairs = parse_pairs("HeadTemperature.temperatures", names, sites.layers, sites.size("H"), "head")
        found = []
        for layer, heads in pairs.items():
            site = f"blocks.{layer}.attn.hook_attn_scores"
            given = tuple((head, float(self.temperatures[f"{layer}:{head}"])) for head in heads)
            found.append(self._at(site, Tempered(Source(site, detach=self.detach), given)))
        return found


class PerfectPreviousInput(FromAnotherPass):
    """Layer 1 attends as if every label carried its exemplar, while its values stay those of the bare embedding.

    Reference manipulation ``perfect_prev_token_input``, which replaces layer 0: block 0 passes the
    embedding on, and block 1's patterns come from a pass in which block 0's output is the embedding moved on by one
    position. Parameters of block 0 get exactly zero gradient.

    Args:
        detach: stop the gradient at the patterns that are taken.
        members: members it acts in; all when None.
        schedule: when, and how strongly.
        order: rank among writers that touch the same entries; the later wins.
    """

    def __init__(
        self,
        detach: bool = False,
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        super().__init__(detach, members, schedule, order)

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it overwrites on a model with these sites."""
        check_layer("PerfectPreviousInput", 1, sites)
        pattern = "blocks.1.attn.hook_pattern"
        return [
            self._at("blocks.0.hook_resid_post", FromPass(Source("blocks.0.hook_resid_pre"))),
            self._at(pattern, FromPass(Source(pattern, perfect_input(), self.detach))),
        ]


class CopyFromPattern(FromAnotherPass):
    """Answer with one head's attention: its score for a label of the context is that label's logit.

    Reference option ``perfect_copy_from_head_pattern``. The scores come from a pass without
    interventions, so that other writers have no effect on the loss.

    Args:
        head: ``"layer:head"``.
        perfect_input: take the scores from the pass of ``PerfectPreviousInput`` instead.
        detach: stop the gradient at the scores.
        members: members it acts in; all when None.
        schedule: when, and how strongly.
        order: rank among writers that touch the same entries; the later wins.
    """

    def __init__(
        self,
        head: str,
        perfect_input: bool = False,
        detach: bool = False,
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        super().__init__(detach, members, schedule, order)
        self.head, self.perfect_input = head, perfect_input

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it overwrites on a model with these sites."""
        pairs = parse_pairs("CopyFromPattern.head", [self.head], sites.layers, sites.size("H"), "head")
        ((layer, (head,)),) = pairs.items()
        run = perfect_input() if self.perfect_input else Pass()
        source = Source(f"blocks.{layer}.attn.hook_attn_scores", run, self.detach)
        return [self._at("hook_logits", CopyOutput(source, head))]


def perfect_input() -> Pass:
    """The pass in which block 0 hands on the embedding moved on by one position."""
    value = PreviousInput(Source("blocks.0.hook_resid_pre"))
    return Pass((Intervention("PerfectPreviousInput", "blocks.0.hook_resid_post", Selection(), value),))
