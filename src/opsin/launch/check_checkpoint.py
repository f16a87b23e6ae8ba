"""Whether a file that is given to go on from holds what a run saves, before anything is made for the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from opsin.errors import ConfigError
from opsin.training.module import OpsinModule

_ENTRIES: Mapping[str, type | tuple[type, ...]] = {
    "epoch": int,
    "global_step": int,
    "state_dict": dict,
    "loops": dict,
    "loops.fit_loop": dict,
    "loops.fit_loop.epoch_progress": dict,
    "loops.fit_loop.epoch_loop.batch_progress": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "opsin": dict,
    "opsin.events": (int, list),
    "opsin.plan": str,
    "opsin.control": dict,
    "opsin.control.fired": Tensor,
    "opsin.control.active": Tensor,
    "opsin.control.ended": dict,
    "opsin.control.supplied": list,
}
"""What is restored before training begins, by the way to it."""


def check_contents(path: str, saved: Mapping[str, Any], module: OpsinModule) -> None:
    """Refuse a file that lacks what a run saves, or that is the checkpoint of another model.

    Args:
        path: where the file lies.
        saved: what the file holds.
        module: module of the run that is to go on.

    Raises:
        ConfigError: names what is missing, or the first tensor that has another shape.
    """
    for way, kind in _ENTRIES.items():
        if not isinstance(_entry(saved, way), kind):
            names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise ConfigError("ckpt_path", path, f"a checkpoint of a run, which has {way} ({names})")
    built = module.state_dict()
    _check_tensors(path, saved["state_dict"], built)
    states, parameters = saved["optimizer_states"], module.trained_parameters()
    if not (len(states) == 1 and _is_optimizer(states[0], len(parameters))):
        expected = f"a checkpoint of a run, with one optimizer of {len(parameters)} parameters"
        raise ConfigError("ckpt_path", path, expected)
    kept = states[0]["state"]
    for number, (name, parameter) in enumerate(parameters):
        begun = module.optimizer.start(name, torch.empty_like(parameter, device="meta"))
        _check_tensors(path, {key: kept[number].get(key) for key in begun}, begun, f" of {name}")


def _entry(saved: object, way: str) -> object:
    """What lies at the end of a way of keys, some of which have dots themselves; None where nothing does."""
    if not isinstance(saved, Mapping):
        return None
    if way in saved:
        return saved[way]
    for key in saved:
        if isinstance(key, str) and way.startswith(f"{key}."):
            return _entry(saved[key], way.removeprefix(f"{key}."))
    return None


def _is_optimizer(state: object, parameters: int) -> bool:
    if not isinstance(_entry(state, "state"), dict) or not isinstance(_entry(state, "param_groups"), list):
        return False
    assert isinstance(state, dict)
    moments = [state["state"].get(number) for number in range(parameters)]
    return len(state["state"]) == parameters and all(isinstance(moment, dict) for moment in moments)


def _check_tensors(path: str, saved: Mapping[str, Any], built: Mapping[str, Tensor], behind: str = "") -> None:
    for name in _names(built, saved):
        found = saved.get(name)
        shape = tuple(found.shape) if isinstance(found, Tensor) and found.is_floating_point() else None
        expected = tuple(built[name].shape) if name in built else None
        if shape != expected or expected is None:
            message = f"{name}{behind} of shape {expected} as in this model; it has {shape}"
            raise ConfigError("ckpt_path", path, message)


def _names(*mappings: Iterable[object]) -> list[Any]:
    return sorted({name for mapping in mappings for name in mapping}, key=str)
