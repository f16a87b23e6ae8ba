"""Claims about the check against reference files, with files from a slow model of the test's own."""

import json
from itertools import product

import numpy as np
import pytest

from tests.helpers.paths import REFERENCE as REAL
from tests.helpers.toys import script

WIDTH, HEADS, LABELS, FEATURES, PAIRS, BATCH = 4, 2, 3, 3, 2, 2
CONFIG = {
    **{"width": WIDTH, "heads": HEADS, "labels": LABELS, "features": FEATURES, "pairs": PAIRS},
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
    "graft_in": {"graft_in_model_till_layer": 0, "ablate_heads": ["1:0"], "graft_in_model_ckpt": "its.eqx"},
    "graft_in_clamped": {"graft_in_model_till_layer": 1, "prev_token_heads": ["0:0"]},
    # where the donor answers, what the model would answer is without effect
    "graft_out": {"graft_out_model_from_layer": 0, "ablate_heads": ["0:0"], "perfect_copy_from_head_pattern": "1:0"},
    "graft_out_void": {"graft_out_model_from_layer": 1},
    "ignored": {"specific_fn": "perfect_prev_token_input", "graft_out_model_from_layer": 0},
}
DEEP = {"deep": {}, "deep_silent": {"ablate_heads": ["2:0"]}, "deep_graft": {"graft_in_model_till_layer": 1}}
# the reference runs a donor of upper blocks without these
DONOR_OPTIONS = {
    "graft_in_clamped": {"prev_token_heads": ["0:1", "2:0"], "ablate_heads": ["1:1"]},
    "graft_out_void": {"ablate_heads": ["2:0"]},
}


@pytest.fixture(scope="module")
def check_reference():
    return script("check_reference")


# ---- the slow model: one sequence, loops, the reference's own mathematics -----------------------------


def shapes(layers):
    named = {"example_embed.weight": (WIDTH, FEATURES), "example_embed.bias": (WIDTH,)}
    named |= {"label_embed.weight": (WIDTH, LABELS), "unembed.weight": (LABELS, WIDTH), "unembed.bias": (LABELS,)}
    for norm in (*(f"layer{layer}.norm" for layer in range(layers)), "final_norm"):
        named |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    for layer in range(layers):
        named |= {f"layer{layer}.qkv.weight": (3 * WIDTH, WIDTH), f"layer{layer}.proj.weight": (WIDTH, WIDTH)}
    return named


def weights(layers=2, seed=1):
    numbers = np.random.default_rng(seed)
    return {name: numbers.normal(size=shape) for name, shape in shapes(layers).items()}


def depth(p):
    return sum(name.endswith("qkv.weight") for name in p)


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


def embedded(p, examples, labels):
    tokens = []
    for item in range(PAIRS + 1):
        tokens.append(p["example_embed.weight"] @ examples[item].astype(float) + p["example_embed.bias"])
        tokens.append(p["label_embed.weight"][:, labels[item]] + 0j * tokens[0])
    return np.array(tokens[:-1])


def blocks(p, examples, labels, options, handed=None):
    """Output and patterns of every block; ``handed`` are outputs that replace a block's own."""
    h, found = embedded(p, examples, labels) * (0 if options.get("ablate_embedding") else 1), []
    for layer in range(depth(p)):
        added, pattern = attended(h, p, layer, options, examples, labels)
        h = (handed or {}).get(layer, h + added)
        found.append((h, pattern))
    return found


def sequence(p, examples, labels, options, donor=None, donor_options=()):
    """The query's logits and loss, and output and patterns of the blocks of the last pass."""
    handed = {}
    if options.get("specific_fn"):
        return perfect(p, examples, labels)
    if (layer := options.get("graft_in_model_till_layer")) is not None:
        handed = {layer: blocks(donor, examples, labels, dict(donor_options))[layer][0]}
    found = blocks(p, examples, labels, options, handed)
    if (layer := options.get("graft_out_model_from_layer")) is not None:
        p, found = donor, blocks(donor, examples, labels, {}, {layer: found[layer][0]})
    return answer(p, found, labels)


def perfect(p, examples, labels):
    """Block 0 hands on the embedding; block 1 attends as if it were moved on by one token, but for the query's."""
    e = embedded(p, examples, labels)
    moved = np.array([e[0], *e[:-2], e[-1]])
    pattern = attended(moved, p, 1, {}, examples, labels)[1]
    size, z = WIDTH // HEADS, np.zeros_like(e)
    values = np.array([normalised(row, p, "layer1.norm") for row in e]) @ p["layer1.qkv.weight"][2 * WIDTH :].T
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        z[:, part] = pattern[head] @ values[:, part]
    first = attended(e, p, 0, {}, examples, labels)[1]
    return answer(p, [(e, first), (e + z @ p["layer1.proj.weight"].T, pattern)], labels)


def answer(p, found, labels):
    logits = p["unembed.weight"] @ normalised(found[-1][0][-1], p, "final_norm") + p["unembed.bias"]
    return logits, np.log(np.exp(logits).sum()) - logits[labels[-1]], found


def losses(p, examples, labels, *options):
    return np.array([sequence(p, x, y, *options)[1] for x, y in zip(examples, labels, strict=True)])


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


def results(p, examples, labels, *options):
    passes = [sequence(p, x, y, *options) for x, y in zip(examples, labels, strict=True)]
    found = {"logits": np.array([each[0].real for each in passes])}
    found["loss_per_example"] = np.array([each[1].real for each in passes])
    found["loss"] = found["loss_per_example"].mean()
    for layer in range(len(passes[0][2])):
        found[f"act/layer{layer}.block_out"] = np.array([each[2][layer][0].real for each in passes])
        found[f"act/layer{layer}.pattern"] = np.array([each[2][layer][1].real for each in passes])
    found |= {f"grad/{name}": value for name, value in gradients(p, examples, labels, *options).items()}
    return found | {"options": json.dumps(options[0]), "config": config(p)}


def config(p):
    return json.dumps(CONFIG | {"layers": depth(p)})


def base_file(p, examples, labels):
    plain = results(p, examples, labels, {})
    del plain["options"]
    return plain | held(p) | {"examples": examples, "labels": labels, "kind": "base"}


def held(p):
    return {f"param/{name}": value for name, value in p.items()}


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
    about = {"options": json.dumps(options), "config": config(p), "adam": json.dumps(ADAM)}
    return {"loss": np.array(loss), "grad_norm": np.array(norms), **held(p), **about, "kind": "trajectory"}


@pytest.fixture(scope="module")
def written():
    """Contents of a folder: two bases, a file for each clamp, a donor, and a trajectory with its inputs."""
    numbers, bases = np.random.default_rng(2), {"base": weights(), "deep": weights(3, seed=4)}
    giver = weights(3, seed=5)
    examples = numbers.normal(size=(BATCH, PAIRS + 1, FEATURES)).astype(np.float32)
    labels = np.array([[0, 2, 0], [1, 2, 2]])
    files = {"giver": held(giver) | {"kind": "donor", "config": config(giver)}}
    for name, options in (CLAMPS | DEEP).items():
        base = "deep" if name in DEEP else "base"
        theirs = DONOR_OPTIONS.get(name, {})
        files[name] = results(bases[base], examples, labels, options, giver, theirs)
        files[name] |= {"kind": "clamp", "base": base, "donor": "giver", "donor_options": json.dumps(theirs)}
    files |= {name: base_file(p, examples, labels) for name, p in bases.items()}
    bank, classes = numbers.normal(size=(4, FEATURES)).astype(np.float32), np.array([[[0, 1, 0]], [[2, 3, 3]]])
    named = np.array([[[0, 1, 0]], [[2, 1, 1]]])
    files["trajectory"] = trained(bases["base"], bank, classes, named, CLAMPS["previous"]) | {"base": "base"}
    files["batches"] = {"bank": bank, "class_idx": classes, "labels": named, "kind": "trajectory_batches"}
    return files


@pytest.fixture
def checked(check_reference, written, tmp_path, capsys):
    """Write a folder with changed or further files; exit code, and the line of each file by its name."""

    def check(changes=(), called=lambda name: name, only=None, modes=("both", "eager")):
        for name, content in (written | dict(changes)).items():
            if only is None or name in only:
                named = {key: called(str(content[key])) for key in ("base", "donor") if key in content}
                np.savez(tmp_path / called(name), **content | named)
        code = check_reference.main(tmp_path, check_reference.modes_of(*modes))
        _, *lines, last = capsys.readouterr().out.splitlines()
        return code, {line.split()[0]: line for line in lines}, last

    return check


def test_files_of_an_independent_model_all_pass(checked, written):
    code, lines, last = checked()
    assert code == 0 and set(lines) == set(written)
    assert all(line.split()[1] == "ok" for line in lines.values())
    assert last.startswith(f"{len(written)} files, {len(written)} covered, 0 failed, 0 uncovered; worst error float64")
    for name in ("base", "deep", *CLAMPS):
        assert all(what in lines[name] for what in ("activations", "losses", "gradients"))
    assert all(what in lines["trajectory"] for what in ("losses", "gradients", "weights"))


def test_on_the_plan_of_all_files_of_a_base_each_has_its_own_clamps_alone(check_reference, checked, monkeypatch):
    # what is compiled, without the compiler
    graphs = []
    monkeypatch.setattr(check_reference, "compile_step", lambda function: graphs.append(function) or function)
    code, lines, last = checked(modes=("float64", "compiled"))
    assert code == 0 and {line.split()[1] for line in lines.values()} == {"ok"}
    assert len(graphs) == 3, "two bases and a trajectory"
    assert last.split("; ")[1].startswith("worst error float64 compiled ") and "eager" not in last


@pytest.mark.slow
def test_compiled_files_of_an_independent_model_pass(checked):
    code, lines, _ = checked(modes=("both", "compiled"))
    assert code == 0 and {line.split()[1] for line in lines.values()} == {"ok"}


OFF = ["logits", "loss_per_example", "loss", "act/layer1.pattern", "grad/layer0.qkv.weight", "grad/label_embed.weight"]


@pytest.mark.parametrize(
    ("name", "array"),
    [
        *product(["base", "previous"], OFF),
        *product(["graft_in_clamped"], ["act/layer1.block_out", "loss", "grad/unembed.weight"]),
        *product(["graft_out"], ["act/layer2.pattern", "loss", "grad/layer0.qkv.weight"]),
        *product(["trajectory"], ["loss", "grad_norm", "param/unembed.bias"]),
    ],
)
def test_a_number_that_is_a_millionth_off_fails_its_file_alone(checked, written, name, array):
    off = np.array(written[name][array])
    off.flat[-1] += 1e-6 * max(abs(off.flat[-1]), np.sqrt(np.mean(off**2)))
    only = {name, "base", "giver", "batches"}
    code, lines, last = checked({name: written[name] | {array: off}}, only=only, modes=("float64", "eager"))
    assert code == 1 and "1 failed, 0 uncovered" in last
    assert {other for other, line in lines.items() if line.split()[1] != "ok"} == {name}
    assert lines[name].split()[1] == "FAIL" and "!" in lines[name]


def test_a_number_that_is_a_thousandth_off_fails_in_single_precision(checked, written):
    off = written["previous"]["logits"] * (1 + 1e-3)
    changes = {"previous": written["previous"] | {"logits": off}}
    code, lines, _ = checked(changes, only=("base", "previous", "giver"), modes=("float32", "eager"))
    assert code == 1 and "losses 1.0e-03!" in lines["previous"] and lines["base"].split()[1] == "ok"


def test_an_option_that_changes_nothing_in_the_file_it_should_change_fails(checked, written):
    code, lines, _ = checked({"previous": written["previous"] | {"options": "{}"}})
    assert code == 1 and lines["previous"].split()[1] == "FAIL"


def test_an_unknown_option_and_an_unknown_kind_are_uncovered_and_no_success(checked, written):
    odd = written["previous"] | {"options": json.dumps({"levitate_heads": ["0:1"]})}
    strange = written["base"] | {"act/layer0.aura": np.zeros(2)}
    inside = written["graft_in"] | {"donor_options": json.dumps({"levitate_heads": ["0:1"]})}
    changes = {"odd": odd, "riddle": {"kind": "riddle"}, "base": strange, "inside": inside}
    code, lines, last = checked(changes, only=("odd", "riddle", "base", "giver", "inside"))
    assert code == 1 and "0 failed, 4 uncovered" in last
    assert "uncovered: options levitate_heads" in lines["odd"] and "uncovered: kind riddle" in lines["riddle"]
    assert "uncovered: activation layer0.aura" in lines["base"] and "levitate_heads" in lines["inside"]


def test_a_graft_without_its_donor_fails(checked, written):
    lonely = {key: value for key, value in written["graft_in"].items() if key != "donor"}
    code, lines, last = checked({"graft_in": lonely}, only=("base", "graft_in", "graft_out"))
    assert code == 1 and "2 failed" in last and "giver" in lines["graft_out"] and "donor" in lines["graft_in"]


def test_what_a_file_is_called_does_not_matter(checked):
    code, lines, last = checked(called=lambda name: f"x{sum(name.encode())}")
    assert code == 0 and not set(lines) & {"base", *CLAMPS} and " 0 failed, 0 uncovered" in last


def test_a_folder_without_files_is_no_success(check_reference, tmp_path, capsys):
    assert check_reference.main(tmp_path, []) == 1
    assert "no .npz files" in capsys.readouterr().out


# ---- the real ones -----------------------------------------------------------------------------------


def real(check_reference, capsys, precision, mode):
    """State of every real file by its name, and the last line."""
    if not (REAL / "base.npz").exists():
        pytest.skip(f"no reference files in {REAL} (set OPSIN_REFERENCE to their folder)")
    code = check_reference.main(REAL, check_reference.modes_of(precision, mode))
    _, *lines, last = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {path.stem for path in REAL.glob("*.npz")}
    return code, {line.split()[0]: line.split()[1] for line in lines}, last


def test_every_file_of_the_reference_system_passes(check_reference, capsys):
    code, states, last = real(check_reference, capsys, "both", "eager")
    assert code == 0 and set(states.values()) == {"ok"}
    assert last.startswith(f"{len(states)} files, {len(states)} covered, 0 failed, 0 uncovered; ")


@pytest.mark.slow
def test_every_file_of_the_reference_system_passes_compiled(check_reference, capsys):
    code, states, _ = real(check_reference, capsys, "both", "compiled")
    assert code == 0 and set(states.values()) == {"ok"}


def test_a_file_that_cannot_be_read_fails_and_the_others_are_checked(check_reference, tmp_path, capsys):
    (tmp_path / "broken.npz").write_bytes(b"not a zip file")
    np.savez(tmp_path / "lonely.npz", kind="clamp", base="nowhere", options="{}")
    assert check_reference.main(tmp_path, check_reference.modes_of("both", "both")) == 1
    _, broken, lonely, last = capsys.readouterr().out.splitlines()
    assert "FAIL  unreadable" in broken and "FAIL  unreadable" in lonely and "nowhere" in lonely
    assert last.startswith("2 files, 2 covered, 2 failed, 0 uncovered")


def test_a_config_that_cannot_be_a_model_fails_its_file_alone(checked, written):
    odd = written["deep"] | {"config": json.dumps(json.loads(written["deep"]["config"]) | {"position_base": None})}
    code, lines, last = checked({"deep": odd}, only=("base", "deep"))
    assert code == 1 and "FAIL  unreadable: TypeError" in lines["deep"] and lines["base"].split()[1] == "ok"
    assert last.startswith("2 files, 2 covered, 1 failed")
