"""Claims about the check against reference files, with files from a slow model of the test's own."""

import json
import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tests.toys import script

REAL = Path(os.environ.get("OPSIN_REFERENCE", Path(__file__).parents[2] / "shared/reference"))
WIDTH, HEADS, LABELS, FEATURES, PAIRS, BATCH = 4, 2, 3, 3, 2, 2
CONFIG = {
    **{"layers": 2, "width": WIDTH, "heads": HEADS, "labels": LABELS, "features": FEATURES, "pairs": PAIRS},
    **{"mlp_ratio": None, "norm": True, "causal": True, "positions": "rope", "position_base": 10000.0},
}
ADAM = {"lr": 1e-2, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0}
CLAMPS = {
    "ablated": {"ablate_heads": ["0:1", "1:0"]},
    "silent": {"ablate_embedding": True},
    "previous": {"prev_token_heads": ["0:0"], "prev_token_head_strength": 0.7},
    "labels_only": {"prev_token_heads": ["0:0"], "prev_token_only_label": True},
    "induction": {"induction_heads": ["1:1"], "induction_head_strength": 0.8},
    "match": {"match_heads": ["1:0"], "match_head_temperature": 0.5},
}


@pytest.fixture(scope="module")
def check_reference():
    return script("check_reference")


# ---- the slow model: one sequence, loops, the reference's own mathematics -----------------------------


def shapes():
    named = {"example_embed.weight": (WIDTH, FEATURES), "example_embed.bias": (WIDTH,)}
    named |= {"label_embed.weight": (WIDTH, LABELS), "unembed.weight": (LABELS, WIDTH), "unembed.bias": (LABELS,)}
    for norm in ("layer0.norm", "layer1.norm", "final_norm"):
        named |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    for layer in range(2):
        named |= {f"layer{layer}.qkv.weight": (3 * WIDTH, WIDTH), f"layer{layer}.proj.weight": (WIDTH, WIDTH)}
    return named


def weights():
    numbers = np.random.default_rng(1)
    return {name: numbers.normal(size=shape) for name, shape in shapes().items()}


def normalised(x, p, name):
    centred = x - x.sum() / WIDTH
    return centred / np.sqrt((centred**2).sum() / WIDTH + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def rotated(x, position):
    y = x.copy()
    for j in range(len(x) // 2):
        angle = position * CONFIG["position_base"] ** (-2 * j / len(x))
        a, b = x[2 * j], x[2 * j + 1]
        y[2 * j], y[2 * j + 1] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return y


def clamped(pattern, head, options, examples, labels):
    """A head's attention ``[T, T]`` under the options."""
    length, tokens = len(pattern), range(1, len(pattern), 2)
    if head in options.get("prev_token_heads", ()):
        strength = options.get("prev_token_head_strength", 1.0)
        for row in tokens if options.get("prev_token_only_label") else range(length):
            pattern[row] = 0
            pattern[row, row] = 1 - strength if row else 1
            if row:
                pattern[row, row - 1] = strength
    if head in options.get("induction_heads", ()):
        strength = options.get("induction_head_strength", 1.0)
        pattern[-1] = 0
        for item, token in enumerate(tokens):
            pattern[-1, token] = strength if labels[item] == labels[-1] else 1 - strength
    if head in options.get("match_heads", ()):
        unit = [vector / np.sqrt(vector @ vector) for vector in examples.astype(float)]
        close = np.exp([unit[item] @ unit[-1] / options["match_head_temperature"] for item in range(PAIRS)])
        pattern[-1] = 0
        pattern[-1, 1::2] = close / close.sum()
    return pattern


def attended(h, p, layer, options, examples, labels):
    """What a layer's heads add to the residual stream ``[T, D]``, and their patterns."""
    length, size = len(h), WIDTH // HEADS
    normal = np.array([normalised(row, p, f"layer{layer}.norm") for row in h])
    qkv = normal @ p[f"layer{layer}.qkv.weight"].T
    z, patterns = np.zeros_like(h), []
    for head in range(HEADS):
        q, k, v = (qkv[:, part * WIDTH + head * size :][:, :size] for part in range(3))
        q, k = (np.array([rotated(row, i) for i, row in enumerate(x)]) for x in (q, k))
        if f"{layer}:{head}" in options.get("ablate_heads", ()):
            v = 0 * v
        weight = np.array(
            [[np.exp(q[i] @ k[j] / np.sqrt(size)) * (j <= i) for j in range(length)] for i in range(length)]
        )
        pattern = clamped(weight / weight.sum(1, keepdims=True), f"{layer}:{head}", options, examples, labels)
        z[:, head * size : (head + 1) * size] = pattern @ v
        patterns.append(pattern)
    return z @ p[f"layer{layer}.proj.weight"].T, np.array(patterns)


def sequence(p, examples, labels, options):
    """The query's logits and loss, and the patterns of both layers."""
    tokens = []
    for item in range(PAIRS + 1):
        tokens.append(p["example_embed.weight"] @ examples[item].astype(float) + p["example_embed.bias"])
        tokens.append(p["label_embed.weight"][:, labels[item]] + 0j * tokens[0])
    h = np.array(tokens[:-1]) * (0 if options.get("ablate_embedding") else 1)
    patterns = []
    for layer in range(2):
        added, pattern = attended(h, p, layer, options, examples, labels)
        h, patterns = h + added, [*patterns, pattern]
    logits = p["unembed.weight"] @ normalised(h[-1], p, "final_norm") + p["unembed.bias"]
    return logits, np.log(np.exp(logits).sum()) - logits[labels[-1]], patterns


def losses(p, examples, labels, options):
    return np.array([sequence(p, x, y, options)[1] for x, y in zip(examples, labels, strict=True)])


def gradients(p, *batch):
    """Exact to rounding: a step along the imaginary axis has no cancellation."""
    found = {name: np.zeros(value.shape) for name, value in p.items()}
    for name, value in p.items():
        for index in np.ndindex(value.shape):
            shifted = p | {name: value.astype(complex)}
            shifted[name][index] += 1e-30j
            found[name][index] = losses(shifted, *batch).mean().imag / 1e-30
    return found


# ---- its files -------------------------------------------------------------------------------------


def results(p, examples, labels, options):
    passes = [sequence(p, x, y, options) for x, y in zip(examples, labels, strict=True)]
    found = {"logits": np.array([each[0].real for each in passes])}
    found["loss_per_example"] = np.array([each[1].real for each in passes])
    found["loss"] = found["loss_per_example"].mean()
    for layer in range(2):
        found[f"act/layer{layer}.pattern"] = np.array([each[2][layer].real for each in passes])
    found |= {f"grad/{name}": value for name, value in gradients(p, examples, labels, options).items()}
    return found | {"options": json.dumps(options), "config": json.dumps(CONFIG)}


def trained(p, bank, classes, labels, options):
    """Some steps of Adam."""
    p = {name: value.copy() for name, value in p.items()}
    first, second = ({name: 0 * value for name, value in p.items()} for _ in range(2))
    loss, norms = [], []
    for step, (chosen, named) in enumerate(zip(classes, labels, strict=True), 1):
        batch = (bank[chosen], named, options)
        slopes = gradients(p, *batch)
        loss.append(losses(p, *batch).mean().real)
        norms.append(np.sqrt(sum((slope**2).sum() for slope in slopes.values())))
        for name, slope in slopes.items():
            first[name] = ADAM["b1"] * first[name] + (1 - ADAM["b1"]) * slope
            second[name] = ADAM["b2"] * second[name] + (1 - ADAM["b2"]) * slope**2
            size = np.sqrt(second[name] / (1 - ADAM["b2"] ** step)) + ADAM["eps"]
            p[name] -= ADAM["lr"] * first[name] / (1 - ADAM["b1"] ** step) / size
    final = {f"param/{name}": value for name, value in p.items()}
    about = {"options": json.dumps(options), "config": json.dumps(CONFIG), "adam": json.dumps(ADAM)}
    return {"loss": np.array(loss), "grad_norm": np.array(norms), **final, **about, "kind": "trajectory"}


@pytest.fixture(scope="module")
def written():
    """Contents of a folder: a base, a file for each clamp, and a trajectory with its inputs."""
    numbers, p = np.random.default_rng(2), weights()
    examples = numbers.normal(size=(BATCH, PAIRS + 1, FEATURES)).astype(np.float32)
    labels = np.array([[0, 2, 0], [1, 2, 2]])
    files = {name: results(p, examples, labels, options) | {"kind": "clamp"} for name, options in CLAMPS.items()}
    plain = results(p, examples, labels, {})
    del plain["options"]
    inputs = {f"param/{name}": value for name, value in p.items()} | {"examples": examples, "labels": labels}
    files["base"] = plain | inputs | {"kind": "base"}
    bank, classes = numbers.normal(size=(4, FEATURES)).astype(np.float32), np.array([[[0, 1, 0]], [[2, 3, 3]]])
    named = np.array([[[0, 1, 0]], [[2, 1, 1]]])
    files["trajectory"] = trained(p, bank, classes, named, CLAMPS["previous"])
    files["batches"] = {"bank": bank, "class_idx": classes, "labels": named, "kind": "trajectory_batches"}
    return files


@pytest.fixture
def checked(check_reference, written, tmp_path, capsys):
    """Write a folder with changed or further files; exit code, and the line of each file by its name."""

    def check(changes=(), called=lambda name: name):
        for name, content in (written | dict(changes)).items():
            base = {} if content["kind"] in ("base", "trajectory_batches") else {"base": called("base")}
            np.savez(tmp_path / called(name), **content, **base)
        code = check_reference.main(tmp_path)
        *lines, last = capsys.readouterr().out.splitlines()
        return code, {line.split()[0].removesuffix(".npz"): line for line in lines}, last

    return check


def test_files_of_an_independent_model_all_pass(checked, written):
    code, lines, last = checked()
    assert code == 0 and set(lines) == set(written)
    assert all(line.split()[1] == "ok" for line in lines.values())
    assert last.startswith(f"{len(written)} files, {len(written)} covered, 0 failed, 0 uncovered; worst error ")
    for name in ("base", *CLAMPS):
        assert all(what in lines[name] for what in ("activations", "losses", "gradients"))
    assert all(what in lines["trajectory"] for what in ("losses", "gradients", "weights"))


WRONG = [
    "logits",
    "loss_per_example",
    "loss",
    "act/layer1.pattern",
    "grad/layer0.qkv.weight",
    "grad/label_embed.weight",
]


@pytest.mark.parametrize(
    ("name", "array"),
    [*product(["base", "previous"], WRONG), *product(["trajectory"], ["loss", "grad_norm", "param/unembed.bias"])],
)
def test_a_number_that_is_a_millionth_off_fails_its_file_alone(checked, written, name, array):
    off = np.array(written[name][array])
    off.flat[-1] *= 1 + 1e-6
    code, lines, last = checked({name: written[name] | {array: off}})
    assert code == 1 and "1 failed, 0 uncovered" in last
    assert {other for other, line in lines.items() if line.split()[1] != "ok"} == {name}
    assert lines[name].split()[1] == "FAIL"


def test_an_option_that_changes_nothing_in_the_file_it_should_change_fails(checked, written):
    code, lines, _ = checked({"previous": written["previous"] | {"options": "{}"}})
    assert code == 1 and lines["previous"].split()[1] == "FAIL"


def test_an_unknown_option_and_an_unknown_kind_are_uncovered_and_no_success(checked, written):
    odd = written["previous"] | {"options": json.dumps({"levitate_heads": ["0:1"]})}
    code, lines, last = checked({"odd": odd, "toy": {"kind": "toy"}})
    assert code == 1 and "0 failed, 2 uncovered" in last
    assert "uncovered: options levitate_heads" in lines["odd"] and "uncovered: kind toy" in lines["toy"]


def test_what_a_file_is_called_does_not_matter(checked):
    code, lines, last = checked(called=lambda name: f"x{sum(name.encode())}")
    assert code == 0 and not set(lines) & {"base", *CLAMPS} and " 0 failed, 0 uncovered" in last


def test_a_folder_without_files_is_no_success(check_reference, tmp_path, capsys):
    assert check_reference.main(tmp_path) == 1
    assert "no .npz files" in capsys.readouterr().out


# ---- the real ones -----------------------------------------------------------------------------------


def test_every_covered_file_of_the_reference_system_passes(check_reference, capsys):
    if not (REAL / "base.npz").exists():
        pytest.skip(f"no reference files in {REAL} (set OPSIN_REFERENCE to their folder)")
    check_reference.main(REAL)
    *lines, last = capsys.readouterr().out.splitlines()
    states = {line.split()[0].removesuffix(".npz"): line.split()[1] for line in lines}
    assert len(states) == len(list(REAL.glob("*.npz"))) and " 0 failed" in last
    assert set(states.values()) <= {"ok", "uncovered:"}
    beginnings = ("base", "ablate_l", "prev_", "induction_", "match_", "trajectory_")
    found = {name: state for name, state in states.items() if name.startswith(beginnings)}
    assert {state for state in found.values()} == {"ok"}
    assert all(any(name.startswith(beginning) for name in found) for beginning in beginnings)
    for name in ("ablate_embedding_only", "fig5b_noclamp", "fig5b_perfect_match", "fig5b_prev_token_single"):
        assert states[name] == "ok"


def test_a_file_that_cannot_be_read_fails_and_the_others_are_checked(tmp_path, capsys):
    (tmp_path / "broken.npz").write_bytes(b"not a zip file")
    np.savez(tmp_path / "lonely.npz", kind="clamp", base="nowhere", options="{}")
    assert script("check_reference").main(tmp_path) == 1
    broken, lonely, last = capsys.readouterr().out.splitlines()
    assert "FAIL  unreadable" in broken and "FAIL  unreadable" in lonely and "nowhere" in lonely
    assert last.startswith("2 files, 2 covered, 2 failed, 0 uncovered")
