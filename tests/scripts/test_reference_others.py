"""Claims about the checks of the toy, the sampler and the initial weights, with files made by hand."""

import itertools

import numpy as np
import pytest

from tests.helpers.toys import script

TRUTH, START, STEPS, SIDE = {}, {}, 30, 4
for name in "abc":
    TRUTH[name] = np.random.default_rng(ord(name)).normal(size=SIDE)
    START[name] = np.random.default_rng(2 * ord(name)).normal(size=SIDE).astype(np.float32).astype(float)


@pytest.fixture(scope="module")
def check_reference():
    return script("check_reference")


@pytest.fixture
def checked(check_reference, tmp_path, capsys):
    """Exit code, and the words of the line, of a folder with one file."""

    def check(content, precision="both", mode="eager"):
        np.savez(tmp_path / "it.npz", **content)
        code = check_reference.main(tmp_path, check_reference.modes_of(precision, mode))
        _, line, _ = capsys.readouterr().out.splitlines()
        return code, line

    return check


# ---- the toy ------------------------------------------------------------------------------------------


def toy_numbers(held, precision):
    """Losses and both progress measures, in loops."""
    true = {name: value.astype(precision) for name, value in TRUTH.items()}
    now = {name: value.astype(precision) for name, value in START.items()} | {name: true[name] for name in held}
    cells = list(itertools.product(range(SIDE), repeat=3))

    def off(a, b, c):
        return [true["a"][i] * true["b"][j] * true["c"][k] - a[i] * b[j] * c[k] for i, j, k in cells]

    def loss(a, b, c):
        return sum(d * d for d in off(a, b, c)) / len(cells) / 2

    rows = []
    for _ in range(STEPS):
        a, b, c = (now[name] for name in "abc")
        cosine = (a @ true["a"]) / np.sqrt((a @ a) * (true["a"] @ true["a"]))
        ends = [loss(sign * a, true["b"], true["c"]) for sign in (1, -1)]
        rows.append((loss(a, b, c), 1 - cosine**2, min(ends)))
        slope = {name: np.zeros(SIDE, precision) for name in "abc"}
        for (i, j, k), d in zip(cells, off(a, b, c), strict=True):
            slope["a"][i] -= d * b[j] * c[k] / len(cells)
            slope["b"][j] -= d * a[i] * c[k] / len(cells)
            slope["c"][k] -= d * a[i] * b[j] / len(cells)
        now = {name: true[name] if name in held else now[name] - slope[name] for name in "abc"}
    return np.array(rows, float).T


@pytest.fixture(scope="module")
def toy():
    file = {f"true_{name}": value for name, value in TRUTH.items()} | {f"init_{n}": v for n, v in START.items()}
    for held, (prefix, precision) in itertools.product(("none", "c", "bc"), (("", float), ("float32_", np.float32))):
        numbers = toy_numbers("" if held == "none" else held, precision)
        for what, values in zip(("loss", "progress1_cos", "progress2_loss"), numbers, strict=True):
            file[f"{prefix}{what}_{held}"] = values
    return file | {"kind": "toy"}


def test_the_toy_follows_the_loops_to_rounding(checked, toy):
    assert checked(toy)[0] == 0


@pytest.mark.slow
def test_the_compiled_toy_does_too(checked, toy):
    assert checked(toy, "float64", "compiled")[0] == 0


@pytest.mark.parametrize("name", ["loss_none", "progress1_cos_c", "progress2_loss_bc"])
def test_a_number_of_the_toy_that_is_off_fails(checked, toy, name):
    off = np.array(toy[name])
    off[-1] += 1e-6
    code, line = checked(toy | {name: off}, "float64")
    assert code == 1 and line.count("!") == 1
    code, line = checked(toy | {f"float32_{name}": toy[f"float32_{name}"] + 1e-2}, "float32")
    assert code == 1 and line.count("!") == 1


def test_a_toy_with_other_clamps_than_it_says_fails(checked, toy):
    swapped = {f"{what}_c": toy[f"{what}_bc"] for what in ("loss", "progress1_cos", "progress2_loss")}
    assert checked(toy | swapped, "float64")[0] == 1


# ---- the sampler --------------------------------------------------------------------------------------

EVERY = np.array(list(itertools.combinations(range(5), 2)), np.int32)
HELDOUT = np.array([[1, 3], [0, 2]], np.int32)
TRAINED = np.array([pair for pair in EVERY.tolist() if pair not in HELDOUT.tolist()], np.int32)


def sequences(count=2000, first=0.5, seed=0, popular=()):
    """Sequences as README section 3 of the files has them; ``popular`` classes come twice as often."""
    numbers, rows = np.random.default_rng(seed), []
    for _ in range(count):
        query, other = numbers.choice([*range(50), *popular], 2)
        while query == other:
            query, other = numbers.choice([*range(50), *popular], 2)
        pair = numbers.permutation(TRAINED[numbers.integers(8)])
        context = [(query, 1, pair[0]), (other, 2, pair[1])]
        rows.append([*(context if numbers.random() < first else context[::-1]), (query, 3, pair[0])])
    return np.array(rows, np.int32).transpose(2, 0, 1)


def sampler_file(**changes):
    """A sampler file whose sequences follow the law, but for the changes."""
    numbers = np.random.default_rng(1)
    classes, types, labels = changes.pop("drawn", sequences())
    file = {"class_idx": classes, "types": types, "labels": labels, "exemplar_idx": np.zeros((2000, 3), np.int32)}
    file |= {"relabel_pairs_train": TRAINED, "relabel_pairs_val": HELDOUT, "relabel_pairs_all": EVERY}
    tests = np.array([1523 + numbers.permutation(100)[:2] for _ in range(2000)])
    file["test_class_idx"] = np.concatenate([tests, tests[:, :1]], 1)
    file["val_exemplar_idx"] = numbers.integers(1, 5, (2000, 3))
    return file | {"kind": "sampler"} | changes


def test_sequences_of_the_law_pass(checked):
    code, line = checked(sampler_file())
    assert code == 0 and "structure 0.0e+00" in line and "frequencies" in line


def altered(what, rows, column, value):
    drawn = sequences()
    drawn[what][rows, column] = value
    return drawn


@pytest.mark.parametrize(
    "changes",
    [
        {"drawn": altered(2, 0, 2, 4 - sequences()[2][0, 2])},
        {"drawn": altered(1, 0, 2, 1)},
        {"drawn": altered(0, slice(None), slice(None), 7)},
        {"relabel_pairs_val": np.array([[1, 3], [0, 4]], np.int32)},
        {"exemplar_idx": np.eye(2000, 3, dtype=np.int32)},
        {"val_exemplar_idx": np.random.default_rng(1).choice([1, 2, 4], (2000, 3))},
    ],
    ids=[
        "a wrong target",
        "a wrong type",
        "one class",
        "other held-out pairs",
        "another exemplar",
        "a gap in the exemplars",
    ],
)
def test_a_sequence_that_cannot_occur_fails(checked, changes):
    code, line = checked(sampler_file(**changes))
    assert code == 1 and ("structure inf!" in line or "unreadable" in line)


@pytest.mark.parametrize(
    "changes",
    [
        {"drawn": sequences(first=0.6)},
        {"drawn": sequences(popular=range(0, 50, 2))},
        {"val_exemplar_idx": np.repeat(np.random.default_rng(1).integers(1, 5, (2000, 1)), 3, 1)},
    ],
    ids=["order", "classes", "exemplars that go together"],
)
def test_what_is_too_frequent_fails_on_frequencies_alone(checked, changes):
    code, line = checked(sampler_file(**changes))
    assert code == 1 and "structure 0.0e+00" in line and line.count("!") == 1


# ---- initial weights ----------------------------------------------------------------------------------

WIDTH, FEATURES = 32, 128


def truncated(shape, sigma, cut=2.0, seed=0):
    numbers = np.random.default_rng(seed)
    x = numbers.normal(size=shape)
    while (outside := np.abs(x) > cut).any():
        x[outside] = numbers.normal(size=int(outside.sum()))
    return (x * sigma).astype(np.float32)


def initial_file(sigma=1 / 0.87962566103423978, label=0.02, cut=2.0, **changes):
    """Two seeds of a model with one block, an MLP and learned positions."""
    file = {}
    for seed in (0, 1):
        random = {"example_embed.weight": (WIDTH, FEATURES), "layer0.qkv.weight": (3 * WIDTH, WIDTH)}
        random |= {"layer0.proj.weight": (WIDTH, WIDTH), "unembed.weight": (5, WIDTH)}
        random |= {"layer0.mlp.fc1.weight": (2 * WIDTH, WIDTH), "layer0.mlp.fc2.weight": (WIDTH, 2 * WIDTH)}
        for place, (name, shape) in enumerate(random.items()):
            file[f"seed{seed}/{name}"] = truncated(shape, sigma / np.sqrt(shape[1]), cut, 10 * seed + place)
        file[f"seed{seed}/label_embed.weight"] = truncated((WIDTH, 5), label, 2.0, 100 + seed)
        table = np.random.default_rng(200 + seed).uniform(-1, 1, (WIDTH, 32)) / np.sqrt(32)
        file[f"seed{seed}/pos_embed.weight"] = table.astype(np.float32)
        sizes = {"example_embed": WIDTH, "unembed": 5, "layer0.mlp.fc1": 2 * WIDTH, "layer0.mlp.fc2": WIDTH}
        sizes |= dict.fromkeys(("layer0.norm", "layer0.mlp_norm", "final_norm"), WIDTH)
        file |= {f"seed{seed}/{name}.bias": np.zeros(size, np.float32) for name, size in sizes.items()}
        file |= {f"seed{seed}/{name}.weight": np.ones(WIDTH, np.float32) for name in sizes if "norm" in name}
    return file | {"kind": "init_unscaled"} | changes


def test_weights_of_the_law_pass(checked):
    code, line = checked(initial_file())
    assert code == 0 and all(what in line for what in ("structure 0.0e+00", "moments", "extremes"))


@pytest.mark.parametrize(
    ("file", "group"),
    [
        (initial_file(sigma=1.0), "moments"),
        (initial_file(sigma=1.2), "moments"),
        (initial_file(label=0.02 / 0.88), "moments"),
        (initial_file(cut=3.0), "structure"),
        (initial_file(cut=1.9), "extremes"),
        (initial_file(**{"seed1/unembed.bias": np.full(5, 1e-3, np.float32)}), "structure"),
        (initial_file(**{"seed1/final_norm.weight": np.zeros(WIDTH, np.float32)}), "structure"),
        (initial_file(**{"seed1/layer0.proj.weight": np.zeros((WIDTH, WIDTH), np.float32)}), "moments"),
    ],
    ids=["not rescaled", "too wide", "labels rescaled", "cut late", "cut early", "bias", "norm", "nothing drawn"],
)
def test_weights_of_another_law_fail(checked, file, group):
    code, line = checked(file)
    word = line.split(f"{group} ")[1].split()[0]
    assert code == 1 and word.endswith("!")


def test_a_weight_that_no_model_has_and_one_that_is_missing_fail(checked):
    whole = initial_file()
    missing = {key: value for key, value in whole.items() if "mlp.fc2.bias" not in key}
    assert checked(missing)[0] == 1
    odd = whole | {f"seed{seed}/layer0.extra.weight": np.ones(3, np.float32) for seed in (0, 1)}
    code, line = checked(odd)
    assert code == 1 and "extra" in line
