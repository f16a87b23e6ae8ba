"""Claims about documents of runs and populations that are damaged, or were written by somebody else."""

import json

import pytest
import yaml

CONFIG = {"model": {"seed": 0, "steps_per_batch": 5}, "trainer": {"max_steps": 10}}
ROW = {"member": 0, "condition": "a", "seed": 0, "chunk": 0, "slot": 0}
POPULATION = {"conditions": ["a"], "members": [ROW]}
DOCUMENTS = {
    "empty": b"",
    "nuls": b"\0" * 99,
    "half": json.dumps(POPULATION).encode()[:40],
    "number": b"3",
    "list": b"[]",
    "nothing": b"null",
    "no_text": b"\xff\xfe\xff",
    "without_entries": b"{}",
    "deep": b"[" * 100_000,
    "entries_are_none": json.dumps({"conditions": None, "members": None, "model": None, "trainer": None}).encode(),
    "entries_are_text": json.dumps({"conditions": ["a"], "members": ["b"], "model": "c", "trainer": "d"}).encode(),
    "numbers_are_text": json.dumps(
        {
            "conditions": ["a"],
            "members": [ROW | {"chunk": "0"}],
            "model": {"seed": "1", "steps_per_batch": 5},
            "trainer": {"max_steps": 10},
        }
    ).encode(),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_damaged_population_json_is_refused_in_one_line_by_every_verb(name, opsin, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "run/population.json").write_bytes(DOCUMENTS[name])
    for arguments in (["resume", "run"], ["fork", "run", "--at", "5", "--member", "0"]):
        ended = opsin(*arguments)
        assert ended.code == 2 and ended.err.count("\n") == 1, ended.err
        assert ended.err.startswith("opsin: population.json: got 'run/population.json', expected "), ended.err


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_damaged_config_yaml_is_not_forked_and_the_file_is_named_on_one_line(name, opsin, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_bytes(DOCUMENTS[name])
    ended = opsin("fork", "run", "--at", "5")
    assert ended.code == 2 and ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("opsin: opsin fork: got 'run/config.yaml', expected "), ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
