"""Sends a run to Weights & Biases: with an account while it trains, without one into files to sync later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from opsin.callbacks.phase import KIND as PHASE_CHANGE
from opsin.callbacks.run_folder import keeper_of, run_folder
from opsin.callbacks.snapshots import log_spaced
from opsin.callbacks.wandb_start import Ledger, Mode, default_mode, one_line, start
from opsin.errors import ConfigError, log
from opsin.metrics.heads import induction_strength
from opsin.module import OpsinModule, opsin_module
from opsin.pictures import as_image, attention_figure, position_names
from opsin.watching import Event

# wandb takes a second to import, so it is imported when a run starts
if TYPE_CHECKING:
    import wandb

PICTURED_MEMBERS = 4
"""Of a larger population only the first members are drawn."""


class WeightsAndBiases(Callback):
    """Everything a run measures, over sequences seen; attention patterns as pictures; alerts; the summary.

    Never asks for a login and needs no account: where no API key is configured, or the server does
    not answer, the run is kept offline under ``FOLDER/wandb`` and ``wandb sync`` uploads it. A
    resumed run continues under the same id, and its steps go on where the killed process stopped.
    Read-only: the weights are the same with and without it.

    Keys are those of ``metrics.csv``, ``METRIC/LAYER:HEAD`` for a head and ``METRIC/max`` for the
    strongest; in a population each ends with ``/member_M``. Pictures are ``attention``.

    Args:
        project: of the run.
        name: of the run; None for the name of the run folder.
        group: of the run.
        tags: of the run.
        mode: None for what ``WANDB_MODE`` says, else online where an API key is configured
            (``WANDB_API_KEY`` or netrc), else offline.
        folder: where its files go; None for the run folder.
        pictures: attention patterns drawn per tenfold of optimizer steps, beside those at the start,
            at the end and at every phase change; each at the end of the Lightning batch that reaches it.
            0 for none at all.
    """

    def __init__(
        self,
        project: str = "opsin",
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        mode: Mode | None = None,
        folder: str | None = None,
        pictures: int = 3,
    ) -> None:
        if pictures < 0:
            raise ConfigError("WeightsAndBiases.pictures", pictures, "0 or more")
        self.project, self.name, self.group, self.tags = project, name, group, tags
        self.mode, self.folder, self.pictures = mode, folder, pictures
        self._run: wandb.Run | None = None

    # ---- start ----------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mode = self.mode or default_mode()
        if mode == "disabled":
            return
        self._module = opsin_module(pl_module)
        keeper = keeper_of(trainer)
        folder = Path(self.folder or run_folder(trainer)).absolute()
        config = resolved_config(self._module, keeper.config if keeper else None)
        self._ledger = Ledger.open(folder / "wandb_run.json", fingerprint(config), trainer.ckpt_path is not None)
        self._taken: dict[str, int] = {}
        self._rows: dict[int, dict[str, Any]] = {}
        self._picture_times = log_spaced(trainer.max_steps, self.pictures) if self.pictures else set()
        self._picture_due = trainer.ckpt_path is None
        name = self.name or (folder.name if keeper else None)
        about = {"project": self.project, "name": name, "group": self.group, "tags": self.tags}
        self._run = start(mode, folder, {**about, "id": self._ledger.id, "config": config})
        self._module.on_event(self._tell)

    # ---- while it trains --------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._looked_until = trainer.global_step
        self._follow()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._follow()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._follow()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._picture_due = True
        self._follow()

    def _follow(self) -> None:
        """Take over what is new, and send the steps that can gain nothing more."""
        if self._run is None:
            return
        self._collect()
        now = self._module.steps_done
        if self._picture_due or any(self._looked_until < time <= now for time in self._picture_times):
            self._draw(now, range(self._module.n_members))
        self._looked_until, self._picture_due = now, False
        # validation and pictures still add to the newest step
        self._send(before=now)

    def _collect(self) -> None:
        history = self._module.history
        for metric in history.names():
            series, taken = history[metric], self._taken.get(metric, 0)
            for step, values in zip(series.steps[taken:], series.values[taken:], strict=True):
                self._row(step).update(scalars(metric, values))
            self._taken[metric] = len(series.steps)

    def _row(self, step: int) -> dict[str, Any]:
        position = {"sequences": step * self._module.task.batch_size, "step": step}
        return self._rows.setdefault(step, position)

    def _send(self, before: float = float("inf")) -> None:
        """Log finished steps, each once and in order, whatever a killed process or a checkpoint repeats."""
        rows = {step: self._rows.pop(step) for step in sorted(self._rows) if step < before}
        rows = {step: row for step, row in rows.items() if step > self._ledger.logged_until}
        if not rows or self._run is None:
            return
        # written first: a kill in between leaves a gap (metrics.csv has it), never a step that goes back
        self._ledger.logged_until = max(rows)
        self._ledger.save()
        with self._unharmed():
            for step, row in rows.items():
                self._run.log(row, step=step, commit=True)

    def _draw(self, step: int, members: Iterable[int]) -> None:
        """Add the attention of some members to a step that is not sent yet."""
        module, row = self._module, self._row(step)
        keys = {m: "attention" + suffix(m, module.n_members) for m in members if m < PICTURED_MEMBERS}
        keys = {member: key for member, key in keys.items() if key not in row}
        if not (self.pictures and keys) or step <= self._ledger.logged_until:
            return
        sites = [f"blocks.{layer}.attn.hook_pattern" for layer in range(module.sites.layers)]
        seen = module.observe(module.probe, sites)
        patterns = torch.stack([seen[site].mean(1) for site in sites], 1).float().cpu()
        induction = torch.stack([induction_strength(seen[site], module.probe.truth) for site in sites], 1).float().cpu()
        with self._unharmed():
            for member, key in keys.items():
                row[key] = self._picture(patterns[member].numpy(), induction[member].numpy(), step, member)

    def _picture(self, patterns: np.ndarray, induction: np.ndarray, step: int, member: int) -> wandb.Image:
        from wandb import Image

        task = self._module.task
        whose = f"of member {member} " if self._module.n_members > 1 else ""
        title = f"Attention {whose}after step {step:,} ({step * task.batch_size:,} sequences)"
        figure = attention_figure(patterns, induction, position_names(task.layout), title)
        return Image(as_image(figure), caption=title)

    def _tell(self, event: Event) -> None:
        """Alert once of a phase change: a resumed run lives through events that the killed process told already."""
        name = f"{event.kind}, step {event.step}, member {event.member}"
        if self._run is None or event.kind != PHASE_CHANGE or name in self._ledger.told:
            return
        self._draw(self._module.steps_done, [event.member])
        whose = f" (member {event.member})" if self._module.n_members > 1 else ""
        with self._unharmed():
            self._run.alert(title=event.kind + whose, text=event.message)
            self._ledger.told.append(name)
            self._ledger.save()

    # ---- end ----------------------------------------------------------------------------------------

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finish here and not in ``on_fit_end``, where other callbacks still complete the summary."""
        if self._run is not None:
            self._finish(exit_code=0)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._run is not None:
            self._collect()
            self._finish(exit_code=1)

    def _finish(self, exit_code: int) -> None:
        self._send()
        if self._run is None:
            return
        with self._unharmed():
            self._run.summary.update(flat(self._module.summary))
            self._run.finish(exit_code=exit_code)
            self._ledger.finished = exit_code == 0
            self._ledger.save()
        self._run = None

    @contextmanager
    def _unharmed(self) -> Iterator[None]:
        """A run does not end because its observer did."""
        try:
            yield
        except Exception as error:
            log.info(f"opsin: W&B failed ({one_line(error)}); the run goes on without it")
            self._run = None


# ---- what is sent -----------------------------------------------------------------------------------


def resolved_config(module: OpsinModule, text: str | None) -> dict[str, Any]:
    """The resolved configuration (YAML), or what the module says of itself; and the plan and the seeds."""
    config = yaml.safe_load(text) if text else None
    if not isinstance(config, dict):
        settings = {name: getattr(module, name, None) for name in signature(type(module)).parameters}
        config = {
            "task": {"class_path": type(module.task).__name__, "init_args": plain(vars(module.task))},
            "model": plain(settings | {"seed": module.seeds, "compile": module.compile_setting}),
            "trainer": {"max_steps": module.trainer.max_steps},
        }
    return {**config, "plan": module.plan.describe(), "plan_digest": module.plan.digest(), "seeds": module.seeds}


def plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The public attributes that JSON can hold."""
    kept = {}
    for name, value in attributes.items():
        if name.startswith("_"):
            continue
        try:
            kept[name] = json.loads(json.dumps(value, default=asdict))
        except TypeError:
            continue
    return kept


def fingerprint(config: Mapping[str, Any]) -> str:
    """Equal for configurations that train the same, wherever they write."""
    relevant = {name: value for name, value in config.items() if name not in ("run_folder", "ckpt_path")}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()[:16]


def suffix(member: int, members: int) -> str:
    """What a member's keys end with; a single run's end with nothing."""
    return f"/member_{member}" if members > 1 else ""


def scalars(metric: str, values: np.ndarray) -> dict[str, float]:
    """``[M]`` or ``[M, layers, heads]`` as one number per key: ``train/loss``, ``induction_strength/1:3``."""
    numbers = {}
    for member, own in enumerate(values):
        end = suffix(member, len(values))
        for place in np.ndindex(own.shape):
            key = "/".join([metric, *[":".join(map(str, place))] * bool(place)])
            numbers[key + end] = float(own[place])
        if own.ndim:
            numbers[f"{metric}/max{end}"] = float(own.max())
    return numbers


def flat(nested: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of them, as one mapping with keys like ``onset/value``."""
    numbers: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        numbers |= flat(value, f"{above}{name}/") if isinstance(value, Mapping) else {above + name: value}
    return numbers
