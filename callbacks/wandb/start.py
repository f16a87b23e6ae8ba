"""How Weights & Biases runs are started, or found again by a resumed process."""

from __future__ import annotations

import json
import netrc
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from opsin.callbacks.wandb.offline_files import last_step, offline_files, wait_until_written
from opsin.errors import log
from opsin.records.folder import write_atomically

if TYPE_CHECKING:
    import wandb

WandbMode = Literal["online", "offline", "disabled"]

MODES: dict[str, WandbMode] = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline"}
RUN_ID_VARIABLE = "WANDB_RUN_ID"
LONGEST_LINE = 200
"""Characters of an error of W&B that a message shows; some list every setting that could have been."""

UPSTREAM_HOST = "api.wandb.ai"
CONNECT_SECONDS = 30
UPLOAD_SECONDS = 300

WANDB_SETTINGS: dict[str, Any] = {
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
    """What a resumed process must know of the killed one: ``wandb_run.json``, of each member ``wandb_run_SLOT.json``.

    Args:
        path: file that keeps the ledger.
        id: name under which the W&B run is uploaded and continued.
        fingerprint: hash of the configuration, as ``fingerprint`` makes it.
        logged_until: last optimizer step that was handed to W&B; what an offline file lacks of it is logged again.
        logged_before: last step that was logged before the process began that has written this.
        offline: whether that process has kept its W&B run offline.
        told: events that were sent as alerts, each with its step and member.
        finished: whether the run came to its end.
    """

    path: Path
    id: str
    fingerprint: str
    logged_until: int = -1
    logged_before: int = -1
    offline: bool = True
    told: list[str] = field(default_factory=list)
    finished: bool = False

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """The ledger that a file holds."""
        return cls(path, **json.loads(path.read_text()))

    @classmethod
    def open(cls, path: Path, fingerprint: str, from_checkpoint: bool, wanted_id: str | None = None) -> Ledger:
        """Continue what a file holds if it is the ledger of this run, else begin anew.

        It is if the run starts from a checkpoint, or if a run with an equal configuration was killed before its first
        checkpoint: equal configurations give equal numbers.

        Args:
            path: file that keeps the ledger.
            fingerprint: hash of the configuration.
            from_checkpoint: whether the run starts from a checkpoint.
            wanted_id: name that a run which begins anew is given; a random one when None.
        """
        if path.exists():
            old = cls.read(path)
            if from_checkpoint or (old.fingerprint == fingerprint and not old.finished):
                return replace(old, fingerprint=fingerprint, finished=False)
        return cls(path, wanted_id or secrets.token_hex(4), fingerprint)

    def note_start(self, run: wandb.Run) -> None:
        """Note which W&B run has started; the agent of a sweep has chosen the id of its own."""
        self.id, self.offline = run.id, bool(run.offline)
        self.save()

    def save(self) -> None:
        """Write the file."""
        content = {name: value for name, value in vars(self).items() if name != "path"}
        write_atomically(self.path, json.dumps(content) + "\n")


def open_ledgers(
    paths: Sequence[Path], files: Path, fingerprints: Sequence[str], from_checkpoint: bool
) -> list[Ledger]:
    """The ledgers of runs that start together, each continued or begun anew as ``Ledger.open`` says.

    Args:
        paths: file of every ledger.
        files: folder in which W&B keeps the runs' files.
        fingerprints: hash of every run's configuration.
        from_checkpoint: whether the runs start from a checkpoint.
    """
    ids = wanted_ids(len(paths))
    ledgers = [
        Ledger.open(path, fingerprint, from_checkpoint, wanted)
        for path, fingerprint, wanted in zip(paths, fingerprints, ids, strict=True)
    ]
    # what a killed process handed over last may not have reached its file
    written = [offline_files(files, ledger.id) if _is_in_files(ledger) else [] for ledger in ledgers]
    wait_until_written(path for paths in written for path in paths)
    for ledger, paths in zip(ledgers, written, strict=True):
        if paths:
            ledger.logged_until = max(ledger.logged_before, *map(last_step, paths))
        ledger.logged_before = ledger.logged_until
        ledger.save()
    return ledgers


def _is_in_files(ledger: Ledger) -> bool:
    """Whether files say what was logged last; an online run's steps are on the server."""
    return ledger.offline and ledger.logged_until >= 0


def wanted_ids(count: int) -> list[str | None]:
    """Names that ``WANDB_RUN_ID`` gives to runs which start together: itself, and ``ID-SLOT`` of several."""
    wanted = os.environ.get(RUN_ID_VARIABLE)
    if not wanted:
        return [None] * count
    return [wanted] if count == 1 else [f"{wanted}-{slot}" for slot in range(count)]


def has_agent() -> bool:
    """Whether this process is the trial of a sweep, whose agent has chosen the id of its run."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def default_mode() -> WandbMode:
    """What ``WANDB_MODE`` says; without it, online where an API key is configured."""
    wanted = os.environ.get("WANDB_MODE", "")
    if wanted == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        return "disabled"
    return MODES.get(wanted) or ("online" if has_key() else "offline")


def has_key() -> bool:
    """Whether wandb would log in without asking."""
    import wandb

    _find_room_for_cache()

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


def _find_room_for_cache() -> None:
    """Let wandb's service keep its log and cache with temporary files where there is no home that can be written.

    Else the service prints what it does on the terminal, line by line.
    """
    home = os.environ.get("HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or (os.path.join(home, ".cache") if home else "")
    try:
        if cache:
            Path(cache, "wandb").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=Path(cache, "wandb")):
                return
    except OSError:
        pass
    os.environ["XDG_CACHE_HOME"] = tempfile.gettempdir()


def start(mode: WandbMode, folder: Path, settings: Sequence[Mapping[str, Any]]) -> list[wandb.Run]:
    """W&B runs, all online or all offline; offline where online cannot be had; none where nothing can.

    Args:
        mode: ``online`` or ``offline``, as it is wanted.
        folder: folder that receives the files of W&B.
        settings: arguments of ``wandb.init``, by name, for each run.
    """
    if mode == "online" and not has_key():
        log.info("opsin: no W&B API key is configured (`wandb login` sets one); the run is kept offline")
        mode = "offline"
    runs = _attempt(mode, folder, settings, otherwise="is kept offline") or _attempt(
        "offline", folder, settings, otherwise="goes on without it"
    )
    if runs:
        names = ", ".join(run.id for run in runs)
        log.info(f"opsin: W&B run{'s' * (len(runs) > 1)} {names}: {_where(runs, folder)}")
    return runs


def _where(runs: Sequence[wandb.Run], folder: Path) -> str:
    """Where the runs are to be seen."""
    if not runs[0].offline:
        return (runs[0].url if len(runs) == 1 else runs[0].project_url) or "online"
    files = Path(runs[0].dir).parent if len(runs) == 1 else folder / "wandb" / "offline-run-*"
    return f"offline, `wandb sync {files}` uploads {'it' if len(runs) == 1 else 'them'}"


def _attempt(mode: WandbMode, folder: Path, settings: Sequence[Mapping[str, Any]], otherwise: str) -> list[wandb.Run]:
    import wandb

    try:
        return [_init(mode, folder, arguments) for arguments in settings]
    except Exception as error:
        log.info(f"opsin: W&B did not start {mode} ({one_line(error)}); the run {otherwise}")
        # or else the service holds the failed attempts' ids in use
        wandb.teardown()
        return []


def _init(mode: WandbMode, folder: Path, arguments: Mapping[str, Any]) -> wandb.Run:
    import wandb

    _find_room_for_cache()
    folder.mkdir(parents=True, exist_ok=True)
    wait_for_free_second(folder, arguments.get("id"))
    # settings that this version of wandb does not know are no reason to fail
    known = {name: value for name, value in WANDB_SETTINGS.items() if name in wandb.Settings.model_fields}
    settings = wandb.Settings(init_timeout=CONNECT_SECONDS, **known)
    resuming: dict[str, Any] = {"resume": "allow", "reinit": "create_new", "allow_val_change": True}
    return wandb.init(**arguments, **resuming, mode=mode, dir=folder, settings=settings)


def finish(run: wandb.Run, exit_code: int = 0) -> None:
    """End a W&B run; an offline one is whole in its file then, for which wandb itself does not wait.

    Args:
        run: W&B run that was started.
        exit_code: 0 for one that W&B shows as finished, 1 for failed.
    """
    offline, path = run.offline, Path(run.dir).parent / f"run-{run.id}.wandb"
    run.finish(exit_code=exit_code)
    if offline:
        wait_until_written([path])


def wait_for_free_second(folder: Path, run_id: str | None) -> None:
    """Wait until wandb, which names the folder of a run by id and second, would not take that of a killed process.

    Args:
        folder: folder that receives the files of W&B.
        run_id: id of the run that is about to start; None for one that wandb makes up.
    """
    while run_id and any(folder.glob(f"wandb/*run-{time.strftime('%Y%m%d_%H%M%S')}-{run_id}")):
        time.sleep(0.05)


@contextmanager
def unharmed(give_up: Callable[[], None] = lambda: None, unharmed_part: str = "the run goes on") -> Iterator[None]:
    """A failure of W&B is one line on the terminal and ends nothing else.

    Args:
        give_up: function that is called after a failure.
        unharmed_part: what goes on without W&B, for the message.
    """
    try:
        yield
    except Exception as error:
        log.info(f"opsin: W&B failed ({one_line(error)}); {unharmed_part} without it")
        give_up()


def one_line(error: BaseException) -> str:
    """What went wrong, without line breaks, and no longer than a line is read."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]} ..."
