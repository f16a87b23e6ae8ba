"""How a Weights & Biases run is started, or found again by a resumed process."""

from __future__ import annotations

import json
import netrc
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from opsin.errors import log
from opsin.runs import write_atomically

# wandb takes a second to import, so it is imported when a run starts
if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]

MODES: dict[str, Mode] = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline"}
UPSTREAM_HOST = "api.wandb.ai"
CONNECT_SECONDS = 30
UPLOAD_SECONDS = 300
SETTLED_SECONDS = 2.0
"""Longer than the interval in which wandb writes."""

SETTINGS: dict[str, Any] = {
    # nothing on the terminal but what this file prints
    "silent": True,
    "quiet": True,
    "console": "off",
    # nothing about the machine or the code: the resolved configuration says what ran
    "disable_git": True,
    "disable_code": True,
    "label_disable": True,
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    # a lost machine costs a second of records, a lost network minutes at most
    "x_transaction_log_flush_interval": 1.0,
    "finish_timeout": float(UPLOAD_SECONDS),
}


@dataclass
class Ledger:
    """What a resumed process must know of the killed one: ``wandb_run.json``.

    Args:
        path: of the file.
        id: of the W&B run.
        fingerprint: of the configuration.
        logged_until: no step up to this one is logged again.
        told: events that were alerts.
        finished: it came to its end.
    """

    path: Path
    id: str
    fingerprint: str
    logged_until: int = -1
    told: list[str] = field(default_factory=list)
    finished: bool = False

    @classmethod
    def open(cls, path: Path, fingerprint: str, from_checkpoint: bool) -> Ledger:
        """Continue what the file holds if this is the same run, else begin anew.

        It is the same run if it starts from a checkpoint, or if one with the same configuration was
        killed before its first: equal configurations give equal numbers.
        """
        ledger = cls(path, secrets.token_hex(4), fingerprint)
        if path.exists():
            old = cls(path, **json.loads(path.read_text()))
            if from_checkpoint or (old.fingerprint == fingerprint and not old.finished):
                # what a killed process handed over last may not have reached its file
                until = written_until(path.parent, old.id, otherwise=old.logged_until)
                ledger = cls(path, old.id, fingerprint, until, old.told)
        ledger.save()
        return ledger

    def save(self) -> None:
        """Write the file."""
        content = {name: value for name, value in vars(self).items() if name != "path"}
        write_atomically(self.path, json.dumps(content) + "\n")


def written_until(folder: Path, run_id: str, otherwise: int) -> int:
    """Last step that the files of an offline run hold, as wandb's own reader sees them.

    Args:
        otherwise: the answer where there are no such files (an online run) or they cannot be read.
    """
    steps: list[int] = []
    for path in folder.glob(f"wandb/offline-run-*-{run_id}/*.wandb"):
        _wait_until_settled(path)
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        read = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if read.returncode:
            return otherwise
        records = (json.loads(line) for line in read.stdout.splitlines())
        steps += [record["history"]["item"]["_step"] for record in records if record["type"] == "history"]
    return min(otherwise, max(steps, default=otherwise))


def _wait_until_settled(path: Path) -> None:
    """The service of a killed process may still be writing what it was handed; ten seconds at the most."""
    for _ in range(10):
        age = time.time() - path.stat().st_mtime
        if age >= SETTLED_SECONDS:
            return
        time.sleep(min(1.0, SETTLED_SECONDS - age))


def default_mode() -> Mode:
    """What ``WANDB_MODE`` says; without it, online where an API key is configured."""
    wanted = os.environ.get("WANDB_MODE", "")
    if wanted == "disabled":
        return "disabled"
    return MODES.get(wanted) or ("online" if has_key() else "offline")


def has_key() -> bool:
    """Whether wandb would log in without asking."""
    import wandb

    settings = wandb.setup().settings
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.api_key:
        return True
    usual = (Path.home() / name for name in (".netrc", "_netrc"))
    path = os.environ.get("NETRC") or next((path for path in usual if path.exists()), None)
    try:
        logins = netrc.netrc(path) if path else None
    except (OSError, netrc.NetrcParseError):
        return False
    host = urlsplit(settings.base_url).netloc
    return logins is not None and any(logins.authenticators(name) for name in (host, UPSTREAM_HOST))


def start(mode: Mode, folder: Path, about: Mapping[str, Any]) -> wandb.Run | None:
    """A W&B run with sequences on the x-axis; offline where online cannot be had; None where nothing can."""
    if mode == "online" and not has_key():
        log.info("opsin: no W&B API key is configured (`wandb login` sets one); the run is kept offline")
        mode = "offline"
    run = _attempt(mode, folder, about, otherwise="is kept offline") or _attempt(
        "offline", folder, about, otherwise="goes on without it"
    )
    if run is not None:
        run.define_metric("sequences")
        run.define_metric("*", step_metric="sequences")
        where = f"offline, `wandb sync {Path(run.dir).parent}` uploads it" if run.offline else run.url
        log.info(f"opsin: W&B run {run.id}: {where}")
    return run


def _attempt(mode: Mode, folder: Path, about: Mapping[str, Any], otherwise: str) -> wandb.Run | None:
    import wandb

    try:
        return _init(mode, folder, about)
    except Exception as error:
        log.info(f"opsin: W&B did not start {mode} ({one_line(error)}); the run {otherwise}")
        # or else the service holds the failed attempt's id in use
        wandb.teardown()
        return None


def _init(mode: Mode, folder: Path, about: Mapping[str, Any]) -> wandb.Run:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    # settings that this version of wandb does not know are no reason to fail
    known = {name: value for name, value in SETTINGS.items() if name in wandb.Settings.model_fields}
    settings = wandb.Settings(init_timeout=CONNECT_SECONDS, **known)
    return wandb.init(
        **about, mode=mode, dir=folder, resume="allow", reinit="create_new", allow_val_change=True, settings=settings
    )


def one_line(error: BaseException) -> str:
    """What went wrong, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
