"""Claims about forks: a branch differs from its run by what the fork changes, and by nothing else."""

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from opsin.cli import main
from opsin.population.chunks import recipe_of_member
from tests.helpers.killers import EndAt, Killed, assert_equal_optimizers, assert_equal_weights, checkpoint, kill
from tests.helpers.paths import RECIPES

STEPS, AT = 40, 20
TASK = {
    "class_path": "opsin.tasks.FewShot",
    "init_args": {
        **{"batch_size": 4, "train_classes": 8},
        "exemplars": {
            "class_path": "opsin.tasks.GaussianClusters",
            "init_args": {"classes": 12, "exemplars": 2, "features": 8},
        },
    },
}
COSINE = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": STEPS}}


def writer(name, **settings):
    return {"class_path": f"opsin.callbacks.{name}", "init_args": settings}


# what a run may have done before it is forked: pulses, a mean, and records that outlive a checkpoint
TRUNK = [
    writer("Clamp", heads=["0:1"], pattern="previous_token", schedule={"start": 3, "stop": 33, "ramp": 9, "period": 8}),
    writer("Ablate", heads=["1:0"], value="mean", schedule={"start": 40, "unit": "sequences"}),
    writer("InductionHeads", every=5),
    writer("PhaseChange"),
    writer("Snapshots", every=5),
    {"class_path": "tests.helpers.killers.EndAt"},
]


def recipe(*callbacks, **changes):
    model = {
        **{"transformer": {"width": 8, "heads": 2}, "learning_rate": 0.01, "steps_per_batch": 5, "log_every": 5},
        **{"probe_size": 64, "evaluation_size": 8, "compile": False, "idle": "warn"},
        **changes,
    }
    trainer = {"max_steps": STEPS, "val_check_interval": 2, "enable_progress_bar": False, "callbacks": [*callbacks]}
    return {"task": TASK, "model": model, "trainer": trainer, "checkpoint_every": 1000}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of runs that were trained already, by their recipes."""
    return defaultdict(lambda: tmp_path_factory.mktemp("trunk") / "run")


@pytest.fixture
def forked(opsin, tmp_path, monkeypatch, trained):
    """Train a recipe in ``run``, fork it with these conditions, and hand out the branches' folders.

    Branches train in this process, one after the other.
    """

    def one_by_one(jobs, processes, on_end, on_poll):
        codes = [main(list(job.arguments)) for job in jobs]
        return [job for job, code in zip(jobs, codes, strict=True) if code]

    monkeypatch.setattr("opsin.launch.population.run_jobs", one_by_one)
    # drawing takes longer than training, and has tests of its own
    monkeypatch.setattr("opsin.callbacks.readers.run_folder.save_figure", lambda *_: None)

    def fork(settings, conditions=None, at=AT, *further):
        (tmp_path / "recipe.yaml").write_text(text := yaml.safe_dump(settings))
        if not trained[text].exists():
            assert opsin("fit", "--config", "recipe.yaml", "--run_folder", "run").code == 0
            shutil.copytree(tmp_path / "run", trained[text])
        shutil.copytree(trained[text], tmp_path / "run", dirs_exist_ok=True)
        return branches(opsin, tmp_path, "run", conditions, at, *further)

    return fork


def branches(opsin, folder, run, conditions, at, *further):
    chosen = []
    if conditions is not None:
        (folder / "branches.yaml").write_text(yaml.safe_dump({"conditions": conditions}, sort_keys=False))
        chosen = ["--config", "branches.yaml"]
    ended = opsin("fork", run, "--at", at, "--run_folder", "fork", *chosen, *further)
    assert ended.code == 0, ended.err
    return [folder / "fork" / "chunks" / f"{number:02d}" for number in range(len(conditions or [0]))]


def fit(opsin, folder, settings, name):
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    assert opsin("fit", "--config", f"{name}.yaml", "--run_folder", name).code == 0
    return folder / name


def rows(run, until=None):
    """Lines of the table, those of the first so many steps."""
    lines = (run / "metrics.csv").read_text().splitlines()[1:]
    return [line for line in lines if until is None or int(line.split(",")[0]) <= until]


def same(a, b):
    """Whether what two checkpoints hold is equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- without a change -------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [pytest.param(20, marks=pytest.mark.slow), 25])
def test_a_branch_without_a_change_equals_the_run_to_the_last_bit(forked, tmp_path, at):
    run = tmp_path / "run"
    (branch,) = forked(recipe(*TRUNK, lr_scheduler=COSINE), None, at)
    assert (branch / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()
    one, two = checkpoint(run), checkpoint(branch)
    for saved in (one, two):
        saved["callbacks"]["KeepRun"].pop("seconds")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "opsin", "callbacks", "global_step"):
        assert same(one[part], two[part]), part
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (run, branch))
    assert first | {"wall_time_seconds": 0} == second | {"wall_time_seconds": 0}


def test_a_replay_from_a_checkpoint_and_one_from_the_beginning_agree(forked, opsin, tmp_path, monkeypatch):
    settings = recipe(*TRUNK, lr_scheduler=COSINE) | {"checkpoint_every": 15}
    from_start = forked(settings, None, 25)[0] / "checkpoints" / "fork.ckpt"
    monkeypatch.setattr(EndAt, "planned", ("on_train_batch_start", 20, kill))
    with pytest.raises(Killed):
        opsin("fit", "--config", "recipe.yaml", "--run_folder", "killed")
    monkeypatch.setattr(EndAt, "planned", None)
    assert checkpoint(tmp_path / "killed")["global_step"] == 15
    (tmp_path / "fork").rename(tmp_path / "first")
    from_checkpoint = branches(opsin, tmp_path, "killed", None, 25)[0] / "checkpoints" / "fork.ckpt"
    first = tmp_path / "first" / from_start.relative_to(tmp_path / "fork")
    one, two = (torch.load(path, weights_only=True) for path in (first, from_checkpoint))
    for saved in (one, two):
        saved["callbacks"]["KeepRun"].pop("seconds")
    assert one["global_step"] == 25 and same(one, two)


def test_a_run_with_a_logger_and_what_needs_one_can_be_forked(forked):
    settings = recipe(*TRUNK, {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}, seed=0)
    settings["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "."},
    }
    (branch,) = forked(settings)
    assert (branch / "summary.json").exists()


def test_a_fork_leaves_its_run_as_it_is(forked, tmp_path):
    forked(recipe(*TRUNK))
    run = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (tmp_path / "fork").rename(tmp_path / "another")
    forked(recipe(*TRUNK), {"none": {}, "ablated": {"callbacks": [writer("Ablate", heads=["1:1"])]}})
    assert run == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


# ---- with a change ----------------------------------------------------------------------------------

LATE = {"start": AT}
CHANGES = {
    "heads ablated": writer("Ablate", heads=["1:1"]),
    "a second clamp": writer("Clamp", heads=["0:0"], pattern="previous_token"),
    "another pass": writer("Preserve", what=["patterns"], layers=[1]),
    "weights that stand still": writer("Freeze", heads=["1:1"]),
    "weights that start anew": writer("Reinitialise", heads=["1:1"], schedule={"start": AT, "stop": AT + 1}),
    "directions of a weight": writer(
        "Project", site="blocks.0.hook_resid_post", weight={"name": "unembed.W_U", "side": "input", "rank": 2}
    ),
    "directions that are learned": writer(
        "Project", site="blocks.0.hook_resid_post", learn={"label": "target", "rounds": 1}
    ),
    "a loop that is closed": writer(
        "Ablate", heads=["1:1"], schedule={"feedback": {"metric": "train/loss", "below": 9.0}}
    ),
}


def test_a_branch_equals_the_run_in_which_the_change_begins_at_that_step(forked, opsin, tmp_path):
    conditions = {what: {"callbacks": [change]} for what, change in CHANGES.items()}
    found = forked(recipe(*TRUNK, lr_scheduler=COSINE), conditions)
    for (what, change), branch in zip(CHANGES.items(), found, strict=True):
        late = LATE | change["init_args"].get("schedule", {})
        change = change | {"init_args": change["init_args"] | {"schedule": late}}
        truth = fit(opsin, tmp_path, recipe(*TRUNK, change, lr_scheduler=COSINE), what.replace(" ", "_"))
        assert_equal_weights((truth, branch))
        assert_equal_optimizers((truth, branch), STEPS)
        assert rows(branch, AT)[: len(rows(tmp_path / "run", AT))] == rows(tmp_path / "run", AT), what
        counts = [json.loads((run / "summary.json").read_text())["interventions"] for run in (truth, branch)]
        assert counts[0] == counts[1], what
        weights = [checkpoint(run)["state_dict"] for run in (tmp_path / "run", branch)]
        assert not same(*weights), what


def test_branches_differ_from_the_fork_on_and_not_before(forked, tmp_path):
    none, ablated = forked(recipe(*TRUNK), {"none": {}, "ablated": {"callbacks": [writer("Ablate", heads=["1:1"])]}})
    assert rows(none, AT) == rows(ablated, AT) == rows(tmp_path / "run", AT) and rows(none, AT)
    assert rows(none, AT + 5) != rows(ablated, AT + 5)
    members = pd.read_csv(tmp_path / "fork" / "members.csv")
    assert list(members.condition) == ["none", "ablated"] and set(members.status) == {"complete"}
    assert (tmp_path / "fork" / "population.png").exists()
    about = json.loads((tmp_path / "fork" / "population.json").read_text())["fork"]
    assert about == {"run": "run", "member": 0, "at": AT, "replay_equals_run": True}


def test_records_of_a_closed_loop_go_on_when_its_writer_is_numbered(forked, tmp_path):
    loop = writer("Ablate", heads=["1:0"], schedule={"feedback": {"metric": "train/loss", "below": 9.0}})
    (branch,) = forked(recipe(loop), {"two": {"callbacks": [writer("Ablate", heads=["1:1"])]}})
    names = {line.split(",")[2] for line in rows(branch) if "feedback" in line}
    assert names == {f"feedback/Ablate 1/{part}" for part in ("strength", "value", "measured_at")}
    assert {line.split(",")[2] for line in rows(tmp_path / "run") if "feedback/Ablate/" in line}


def test_a_member_takes_no_records_of_another_members_closed_loop_for_its_own(forked, tmp_path):
    writers = [
        writer(
            "Ablate", heads=["1:0"], members=[member], schedule={"feedback": {"metric": "train/loss", "below": level}}
        )
        for member, level in ((0, 9.0), (1, 1e-6))
    ]
    (branch,) = forked(recipe(*writers, seed=[3, 4]), None, AT, "--member", 1)
    assert any("feedback/Ablate 1/" in line for line in rows(tmp_path / "run"))
    assert not any("feedback" in line for line in rows(branch))


def test_a_branch_with_another_learning_rate_follows_the_schedule_of_that_rate(forked, opsin, tmp_path):
    settings = {"fast": {"learning_rate": 0.03, "weight_decay": 0.1}}
    (branch,) = forked(recipe(lr_scheduler=COSINE), settings)
    start = torch.load(branch / "checkpoints" / "fork.ckpt", weights_only=True)
    assert start["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.015)
    fast = fit(opsin, tmp_path, recipe(lr_scheduler=COSINE, learning_rate=0.03, weight_decay=0.1), "fast")
    for run in (checkpoint(fast), checkpoint(branch)):
        scheduler, group = run["lr_schedulers"][0], run["optimizer_states"][0]["param_groups"][0]
        assert scheduler["base_lrs"] == [0.03] and group["initial_lr"] == 0.03 and group["weight_decay"] == 0.1
        assert scheduler["_last_lr"] == pytest.approx([0.0], abs=1e-9)
    assert not same(checkpoint(tmp_path / "run")["state_dict"], checkpoint(branch)["state_dict"])


@pytest.mark.slow
def test_a_branch_may_be_longer_than_its_run(forked, opsin, tmp_path):
    (branch,) = forked(recipe(*TRUNK), {"long": {"max_steps": 60}})
    long = recipe(*TRUNK)
    long["trainer"]["max_steps"] = 60
    assert_equal_weights((fit(opsin, tmp_path, long, "truth"), branch))


# ---- kills, and forks of forks ----------------------------------------------------------------------


@pytest.mark.parametrize("every", [pytest.param(1000, marks=pytest.mark.slow), 5])
def test_a_killed_branch_resumes_to_the_same_end(forked, opsin, tmp_path, monkeypatch, every):
    settings = recipe(*TRUNK, lr_scheduler=COSINE) | {"checkpoint_every": every}
    conditions = {"ablated": {"callbacks": [writer("Ablate", heads=["1:1"])]}}
    (whole,) = forked(settings, conditions)
    whole.rename(tmp_path / "whole")
    (tmp_path / "fork").rename(tmp_path / "first")
    monkeypatch.setattr(EndAt, "planned", ("on_train_batch_start", 30, kill))
    with pytest.raises(Killed):
        forked(settings, conditions)
    assert (whole / "checkpoints" / "last.ckpt").exists() == (every < STEPS)
    monkeypatch.setattr(EndAt, "planned", None)
    assert opsin("resume", "fork").code == 0
    # what a run began from stays in its configuration when it is resumed
    assert yaml.safe_load((whole / "config.yaml").read_text())["ckpt_path"] == str(whole / "checkpoints" / "fork.ckpt")
    assert (whole / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()
    assert_equal_weights((tmp_path / "whole", whole))
    assert_equal_optimizers((tmp_path / "whole", whole), STEPS)


def test_the_saved_configuration_of_a_branch_gives_the_branch_again(forked, opsin, tmp_path):
    (branch,) = forked(recipe(*TRUNK), {"ablated": {"callbacks": [writer("Ablate", heads=["1:1"])]}})
    assert opsin("fit", "--config", branch / "config.yaml", "--run_folder", "again").code == 0
    assert_equal_weights((tmp_path / "again", branch))


@pytest.mark.slow
def test_a_branch_can_be_forked_from_its_own_beginning_on(forked, opsin, tmp_path):
    forked(recipe(*TRUNK), {"ablated": {"callbacks": [writer("Ablate", heads=["1:1"])]}})
    (tmp_path / "fork").rename(tmp_path / "once")
    config = tmp_path / "once" / "chunks" / "00" / "config.yaml"
    config.write_text(config.read_text().replace(str(tmp_path / "fork"), str(tmp_path / "once")))
    (again,) = branches(opsin, tmp_path, "once", None, 30, "--member", 0)
    once = tmp_path / "once" / "chunks" / "00"
    assert (again / "metrics.csv").read_bytes() == (once / "metrics.csv").read_bytes()
    assert_equal_weights((once, again))
    ended = opsin("fork", "once", "--member", 0, "--at", 10, "--run_folder", "early")
    assert ended.code == 2 and "--at: got 10, expected a step after that of" in ended.err


# ---- one member of several --------------------------------------------------------------------------


@pytest.mark.parametrize("member", [0, 1])
def test_a_member_is_forked_with_its_own_settings_state_and_records(forked, tmp_path, member):
    writers = [
        writer("Ablate", heads=["1:0"], members=[0], schedule={"start": 10}),
        writer("Ablate", heads=["1:0"], members=[1], schedule={"start": 10, "stop": 30}),
        writer("Freeze", heads=["0:0"], members=[1], schedule={"start": 5, "stop": 12}),
    ]
    settings = recipe(*TRUNK[2:5], *writers, seed=[3, 4], learning_rate=[0.01, 0.003], lr_scheduler=COSINE)
    (branch,) = forked(settings, None, AT, "--member", member)
    run = pd.read_csv(tmp_path / "run" / "metrics.csv")
    run = run[run.member == member].assign(member=0).reset_index(drop=True)
    alone = pd.read_csv(branch / "metrics.csv")
    pd.testing.assert_frame_equal(run[run.step <= AT], alone[alone.step <= AT])
    # another number of members is another kernel, which may round differently
    pd.testing.assert_frame_equal(run, alone, rtol=1e-3, atol=1e-4)
    whole, part = checkpoint(tmp_path / "run"), checkpoint(branch)
    for name, value in part["state_dict"].items():
        torch.testing.assert_close(value[0], whole["state_dict"][name][member], rtol=1e-3, atol=1e-4)
    before, after = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "run", branch))
    acting = [row for row in before["interventions"] if row["active_steps"][member]]
    assert [[row["active_steps"][member]] for row in acting] == [row["active_steps"] for row in after["interventions"]]
    assert after["onset"] == before["members"][member]["onset"]


def test_a_member_of_a_population_is_found_by_its_number(forked, opsin, tmp_path):
    forked(recipe(*TRUNK[2:4]), {"none": {}, "fast": {"learning_rate": 0.02}})
    (tmp_path / "fork").rename(tmp_path / "many")
    ended = opsin("fork", "many", "--member", 7, "--at", 30, "--run_folder", "x")
    assert ended.code == 2 and "--member: got 7, expected one of the members 0 to 1" in ended.err
    ended = opsin("fork", "many", "--at", 30, "--run_folder", "x")
    assert ended.code == 2 and "--member: got None" in ended.err


def test_the_recipe_of_a_member_has_what_acts_in_it_alone():
    writers = [
        writer("Ablate", heads=["1:0"], members=[0]),
        writer("Clamp", heads=["1:0"], members=[0, 1]),
        writer("Reinitialise", seed=[8, 9], members=None),
    ]
    initial = [None, {"path": "donor", "place": 3}]
    whole = recipe(*writers, seed=[5, 6], learning_rate=[0.1, 0.2], weight_decay=0.5, initial=initial)
    part = recipe_of_member(whole, 1)
    assert part["model"]["seed"] == 6 and part["model"]["learning_rate"] == 0.2 and part["model"]["weight_decay"] == 0.5
    assert part["model"]["initial"] == [{"path": "donor", "place": 3}]
    settings = [callback["init_args"] for callback in part["trainer"]["callbacks"]]
    assert settings == [{"heads": ["1:0"], "members": None}, {"seed": 9, "members": None}]
    assert whole == recipe(*writers, seed=[5, 6], learning_rate=[0.1, 0.2], weight_decay=0.5, initial=initial)


# ---- what is not as it was, and what it is for ----------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_was_another_before_is_told_apart_from_its_replay(forked, tmp_path, opsin, caplog):
    forked(recipe(*TRUNK))
    (tmp_path / "fork").rename(tmp_path / "first")
    table = tmp_path / "run" / "metrics.csv"
    # another machine: other last digits
    table.write_text(re.sub(r"^(5,.*)\d$", r"\g<1>x", table.read_text(), count=1, flags=re.MULTILINE))
    ended = opsin("fork", "run", "--at", AT, "--run_folder", "fork")
    assert ended.code == 0 and "differs from its metrics.csv from step 5 on" in caplog.text
    assert not json.loads((tmp_path / "fork" / "population.json").read_text())["fork"]["replay_equals_run"]


@pytest.mark.slow
def test_without_the_heads_of_layer_1_nothing_forms_after_the_fork(opsin, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    recipes = RECIPES
    assert opsin("fit", "--config", recipes / "induction.yaml", "--run_folder", "run").code == 0
    conditions = yaml.safe_load((recipes / "forks" / "ablated.yaml").read_text())["conditions"]
    none, _, layer_1 = branches(opsin, tmp_path, "run", conditions, 3000)
    run, same_run, without = (
        json.loads((folder / "summary.json").read_text()) for folder in (Path("run"), none, layer_1)
    )
    assert run["onset"]["low"] > 3000 * 32 and run["strongest_heads"]
    assert (none / "metrics.csv").read_bytes() == (tmp_path / "run" / "metrics.csv").read_bytes()
    assert same_run["onset"] == run["onset"] and same(
        checkpoint(none)["state_dict"], checkpoint(Path("run"))["state_dict"]
    )
    assert without["onset"] is None and not without["strongest_heads"]
    assert rows(layer_1, 3000) == rows(Path("run"), 3000)
