"""The saved configuration is the configuration: every value, and the run again, byte for byte, from any folder."""

import shutil

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsin.records.recipe_text import dump_recipe

TEXT = "".join(chr(97 + (7 * n * n + n) % 23) for n in range(900))


def described(class_path, **init_args):
    return {"class_path": class_path, "init_args": init_args}


KINDS = st.fixed_dictionaries(
    {"matches": st.integers(1, 2), "distractor_copies": st.sampled_from([None, 1])},
    optional={"weight": st.sampled_from([0.5, 1e-3]), "label_flip": st.just(0.0), "matched_query": st.booleans()},
)
EXEMPLARS = st.fixed_dictionaries(
    {"classes": st.just(12), "exemplars": st.integers(2, 3), "features": st.just(8)},
    optional={"within": st.sampled_from([0, 0.5, 1e-7]), "seed": st.sampled_from([0, 2**40])},
)
FEW_SHOT = st.fixed_dictionaries(
    {
        "exemplars": EXEMPLARS.map(lambda found: described("opsin.tasks.GaussianClusters", **found)),
        **{"batch_size": st.just(4), "train_classes": st.just(8), "context": st.just(4)},
    },
    optional={
        "kinds": st.lists(KINDS, min_size=1, max_size=2),
        "heldout_classes": st.sampled_from([None, 0, 3]),
        "heldout_exemplars": st.sampled_from([None, 0, 1]),
        "noise": st.sampled_from([0.0, 0.1]),
    },
).map(lambda found: described("opsin.tasks.FewShot", **found))
TOKENS = st.one_of(
    st.fixed_dictionaries({"path": st.just("text.txt")}, optional={"vocabulary": st.sampled_from([None, 5])}).map(
        lambda found: described("opsin.tasks.Characters", positions=12, batch_size=4, **found)
    ),
    st.fixed_dictionaries({"text": st.sampled_from([None, "text.txt"])}, optional={"noise": st.just(0.0)}).map(
        lambda found: described("opsin.tasks.Repeats", vocabulary=6, positions=12, batch_size=4, longest=6, **found)
    ),
)
MODEL = st.fixed_dictionaries(
    {
        "transformer": st.fixed_dictionaries(
            {"width": st.just(8), "heads": st.just(2)},
            optional={"mlp_ratio": st.sampled_from([None, 2, 0.5]), "norm": st.booleans(), "init_scale": st.just(1e-1)},
        ),
        **{"steps_per_batch": st.just(5), "log_every": st.just(5), "probe_size": st.just(8)},
        "evaluation_size": st.just(8),
    },
    optional={
        "seed": st.sampled_from([0, 3, [1, 2], 2**62]),
        "learning_rate": st.sampled_from([1e-3, 1e-05, 0.01]),
        "gradient_clip": st.sampled_from([None, 0.5]),
        "betas": st.just([0.9, 0.95]),
        "initial": st.none(),
    },
)
SCHEDULES = st.fixed_dictionaries(
    {}, optional={"start": st.integers(0, 3), "stop": st.sampled_from([None, 9]), "period": st.sampled_from([None, 2])}
)
CALLBACKS = st.lists(
    st.one_of(
        st.just(described("opsin.callbacks.InductionHeads", every=5)),
        st.fixed_dictionaries({"heads": st.just(["0:1"])}, optional={"schedule": SCHEDULES, "members": st.none()}).map(
            lambda found: described("opsin.callbacks.Ablate", **found)
        ),
        st.just(described("opsin.callbacks.PhaseChange", plateau=None)),
    ),
    max_size=2,
    unique_by=lambda found: found["class_path"],
)
RECIPES = st.fixed_dictionaries(
    {
        "task": FEW_SHOT | TOKENS,
        "model": MODEL,
        "trainer": st.fixed_dictionaries(
            {"max_steps": st.just(10), "callbacks": CALLBACKS, "enable_progress_bar": st.just(False)},
            optional={"val_check_interval": st.just(2), "limit_val_batches": st.sampled_from([None, 1.0])},
        ),
    }
)


def run_again(opsin, folder, monkeypatch, recipe):
    """Train a recipe, and its saved configuration from another working folder; the table of numbers of both."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "elsewhere").mkdir(parents=True)
    (folder / "text.txt").write_text(TEXT)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    monkeypatch.chdir(folder)
    ended = opsin("fit", "--config", "recipe.yaml", "--run_folder", "first")
    assert ended.code == 0, ended.err
    monkeypatch.chdir(folder / "elsewhere")
    ended = opsin("fit", "--config", folder / "first" / "config.yaml", "--run_folder", "second")
    assert ended.code == 0, ended.err
    return [path.read_bytes() for path in (folder / "first/metrics.csv", folder / "elsewhere/second/metrics.csv")]


CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=6, suppress_health_check=CHECKS)
@given(recipe=RECIPES)
def test_a_saved_configuration_gives_the_same_numbers_from_any_folder(opsin, tmp_path, monkeypatch, recipe):
    first, second = run_again(opsin, tmp_path / "case", monkeypatch, recipe)
    assert first == second


@pytest.mark.slow
@settings(max_examples=80, suppress_health_check=CHECKS)
@given(recipe=RECIPES)
def test_many_saved_configurations_give_the_same_numbers(opsin, tmp_path, monkeypatch, recipe):
    first, second = run_again(opsin, tmp_path / "case", monkeypatch, recipe)
    assert first == second


def small(**task):
    exemplars = described("opsin.tasks.GaussianClusters", classes=12, exemplars=2, features=8)
    model = {"transformer": {"width": 8, "heads": 2}, "steps_per_batch": 5, "log_every": 5}
    sizes = {"probe_size": 8, "evaluation_size": 8}
    task = {"exemplars": exemplars, "batch_size": 4, "train_classes": 8} | task
    return {
        "task": described("opsin.tasks.FewShot", **task),
        "model": model | sizes,
        "trainer": {"max_steps": 10, "enable_progress_bar": False},
    }


def test_a_null_that_is_not_the_default_is_saved(opsin, tmp_path):
    recipe = small(context=4, kinds=[{"matches": 2, "distractor_copies": None}])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert opsin("fit", "--config", "recipe.yaml", "--run_folder", "run").code == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["task"]["init_args"]["kinds"][0]["distractor_copies"] is None


def test_a_file_beside_the_recipe_is_found_and_saved_with_its_whole_path(opsin, tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "text.txt").write_text(TEXT)
    recipe = small() | {"task": described("opsin.tasks.Characters", path="text.txt", positions=12, batch_size=4)}
    (tmp_path / "recipes" / "recipe.yaml").write_text(dump_recipe(recipe))
    assert opsin("fit", "--config", "recipes/recipe.yaml", "--run_folder", "run").code == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["task"]["init_args"]["path"] == str(tmp_path / "recipes" / "text.txt")


def test_a_file_in_the_working_folder_comes_before_one_beside_the_recipe(opsin, tmp_path):
    (tmp_path / "recipes").mkdir()
    for folder in (tmp_path, tmp_path / "recipes"):
        (folder / "text.txt").write_text(TEXT)
    recipe = small() | {"task": described("opsin.tasks.Characters", path="text.txt", positions=12, batch_size=4)}
    (tmp_path / "recipes" / "recipe.yaml").write_text(dump_recipe(recipe))
    assert opsin("fit", "--config", "recipes/recipe.yaml", "--run_folder", "run").code == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["task"]["init_args"]["path"] == str(tmp_path / "text.txt")


def test_a_path_may_begin_at_home(opsin, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "text.txt").write_text(TEXT)
    recipe = small() | {"task": described("opsin.tasks.Characters", path="~/text.txt", positions=12, batch_size=4)}
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert opsin("fit", "--config", "recipe.yaml", "--run_folder", "~/run").code == 0
    assert (tmp_path / "home" / "run" / "config.yaml").exists()


def test_text_that_looks_like_a_number_stays_text(opsin, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    recipe = small()
    recipe["trainer"]["callbacks"] = [described("opsin.callbacks.WeightsAndBiases", name="1e5", tags=["1:1", "010"])]
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert opsin("fit", "--config", "recipe.yaml", "--run_folder", "run").code == 0
    assert opsin("fit", "--config", "run/config.yaml", "--run_folder", "again").code == 0
    saved = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())["trainer"]["callbacks"][0]["init_args"]
    assert saved["name"] == "1e5" and saved["tags"] == ["1:1", "010"]
