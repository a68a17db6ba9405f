"""Configurations: what TOML may say, what each error says, and what a checkpoint is compared by."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from onepass.seq2seq.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    SearchConfig,
    TrainingConfig,
    config_from_dict,
    config_to_dict,
    differences,
    load_config,
)
from onepass.seq2seq.data import DataError

PAIRS = {"task": "pairs", "train": "train.tsv", "validation": "sub/validation.tsv", "test": "/elsewhere/test.tsv"}
DEFAULTS = {
    "seed": 0,
    "data": {
        "task": "cmudict",
        "stress": False,
        "phrase_words": 1,
        "train": "",
        "validation": "",
        "test": "",
        "source": "characters",
        "target": "words",
    },
    "model": {
        "decoder": "bahdanau",
        "cell": "gru",
        "embedding_dim": 64,
        "encoder_dim": 192,
        "decoder_dim": 256,
        "attention_dim": 128,
        "num_layers": 1,
        "dropout": 0.0,
        "maxout_dim": 0,
        "score": "general",
        "window": "global",
        "half_width": 0,
        "input_feeding": True,
    },
    "training": {
        "steps": 2600,
        "batch_size": 128,
        "learning_rate": 3e-3,
        "warmup": 100,
        "clip": 1.0,
        "validate_every": 400,
        "patience": 0,
        "threads": 0,
        "label_smoothing": 0.0,
    },
    "search": {"beams": 4, "length_penalty": 0.0, "coverage_penalty": 0.0, "max_length": 0},
}


def model(**values: Any) -> Config:
    return config_from_dict({"model": values}, "")


def message(mapping: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        config_from_dict(mapping, "folder")
    return str(error.value)


def test_defaults() -> None:
    assert config_to_dict(Config()) == DEFAULTS
    assert config_from_dict({}, "") == Config()
    assert config_from_dict({"model": {}}, "") == Config()


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]
    assert hash(Config()) == hash(config_from_dict(DEFAULTS, ""))


def test_an_error_is_one_of_data() -> None:
    """So that a command line prints both in one way."""
    assert issubclass(ConfigError, DataError)


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        """
        seed = 3
        [data]
        task = "pairs"
        train = "train.tsv"
        validation = "../validation.tsv"
        test = "/data/test.tsv"
        source = "words"
        [model]
        decoder = "luong"
        window = "local-p"
        half_width = 4
        dropout = 0.2
        input_feeding = false
        [training]
        learning_rate = 1
        [search]
        beams = 10
        """
    )
    config = load_config(path)
    assert config == load_config(str(path))
    assert config.seed == 3
    assert config.data.train == str(tmp_path / "train.tsv")
    assert config.data.validation == str(tmp_path.parent / "validation.tsv")
    assert config.data.test == "/data/test.tsv"
    assert (config.data.source, config.data.target) == ("words", "words")
    assert config.model == ModelConfig(decoder="luong", window="local-p", half_width=4, dropout=0.2, input_feeding=False)
    assert (config.training, config.search) == (TrainingConfig(learning_rate=1.0), SearchConfig(beams=10))


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run can be resumed from another folder."""
    (tmp_path / "run.toml").write_text('[data]\ntask = "pairs"\ntrain = "a"\nvalidation = "b"\ntest = "c"\n')
    monkeypatch.chdir(tmp_path)
    assert load_config("run.toml").data.train == str(tmp_path / "a")
    assert load_config("run.toml") == load_config(tmp_path / "run.toml")


def test_an_int_does_for_a_float() -> None:
    config = config_from_dict({"training": {"clip": 5, "label_smoothing": 0}}, "")
    assert (config.training.clip, config.training.label_smoothing) == (5.0, 0.0)
    assert type(config.training.clip) is float


configs = st.builds(
    Config,
    seed=st.integers(0, 2**63 - 1),
    data=st.one_of(
        st.builds(DataConfig, stress=st.booleans()),
        st.builds(
            DataConfig,
            task=st.just("pairs"),
            **{key: st.sampled_from(["/a", "/b/c"]) for key in ("train", "validation", "test")},  # type: ignore[arg-type]
            source=st.sampled_from(["characters", "words"]),
        ),
    ),
    model=st.one_of(
        st.builds(ModelConfig, maxout_dim=st.integers(0, 99), dropout=st.floats(0, 0.9)),
        st.builds(ModelConfig, decoder=st.just("plain"), cell=st.sampled_from(["lstm", "gru"]), num_layers=st.integers(1, 4)),
        st.builds(
            ModelConfig,
            decoder=st.just("luong"),
            window=st.sampled_from(["local-m", "local-p"]),
            half_width=st.integers(1, 9),
            input_feeding=st.booleans(),
        ),
    ),
    training=st.builds(TrainingConfig, steps=st.integers(1), learning_rate=st.floats(0, exclude_min=True, allow_infinity=False)),
    search=st.builds(SearchConfig, beams=st.integers(1), length_penalty=st.floats(0, 9)),
)


@hypothesis.given(configs)
def test_there_and_back(config: Config) -> None:
    """Through JSON, as a checkpoint keeps it, and whatever the folder is."""
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))), "anywhere")
    assert again == config
    assert differences(config, again) == []


def test_unknown_table() -> None:
    assert message({"trainig": {}}) == (
        "unknown table [trainig]; did you mean [training]?; known in the file are seed, data, model, training, search"
    )


def test_unknown_key() -> None:
    assert message({"search": {"beam": 3}}) == (
        "unknown key search.beam; did you mean search.beams?; known in [search] are beams, length_penalty, coverage_penalty, max_length"
    )
    assert message({"search": {"zzz": 3}}) == (
        "unknown key search.zzz; known in [search] are beams, length_penalty, coverage_penalty, max_length"
    )


@pytest.mark.parametrize(
    ("mapping", "meant"),
    [({"beams": 3}, "search.beams"), ({"model": {"batch_sise": 3}}, "training.batch_size"), ({"data": {"seed": 3}}, "seed")],
)
def test_a_key_of_another_table(mapping: dict[str, Any], meant: str) -> None:
    assert f"; did you mean {meant}?" in message(mapping)


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"seed": "3"}, 'seed must be an integer; got "3", a string'),
        ({"seed": True}, "seed must be an integer; got true, a boolean"),
        ({"data": 3}, "data must be a table, [data]; got 3, an integer"),
        ({"data": {"stress": 1}}, "data.stress must be a boolean; got 1, an integer"),
        ({"data": PAIRS | {"train": ["a"]}}, 'data.train must be a string; got ["a"], an array'),
        ({"data": PAIRS | {"train": 0}}, "data.train must be a string; got 0, an integer"),
        ({"model": {"encoder_dim": 19.5}}, "model.encoder_dim must be an integer; got 19.5, a number"),
        ({"model": {"dropout": "0.1"}}, 'model.dropout must be a number; got "0.1", a string'),
        ({"model": {"dropout": False}}, "model.dropout must be a number; got false, a boolean"),
        ({"training": {"steps": {"n": 1}}}, 'training.steps must be an integer; got {"n": 1}, a table'),
        ({"model": {"cell": 3}}, 'model.cell must be one of "lstm", "gru"; got 3, an integer'),
        ({"model": {"cell": ["gru"]}}, 'model.cell must be one of "lstm", "gru"; got ["gru"], an array'),
    ],
)
def test_wrong_type(mapping: dict[str, Any], said: str) -> None:
    assert message(mapping) == said


def test_not_a_choice() -> None:
    assert message({"model": {"cell": "lsmt"}}) == 'model.cell must be one of "lstm", "gru"; got "lsmt", a string; did you mean "lstm"?'
    assert message({"data": {"task": "x"}}) == 'data.task must be one of "cmudict", "pairs"; got "x", a string'


CHOICES = {
    "data": {"task": PAIRS, "source": PAIRS, "target": PAIRS},
    "model": {"decoder": {}, "cell": {}, "score": {"decoder": "luong"}, "window": {"decoder": "luong"}},
}


@pytest.mark.parametrize(("table", "key"), [(table, key) for table, keys in CHOICES.items() for key in keys])
def test_every_choice_refuses_others(table: str, key: str) -> None:
    assert message({table: CHOICES[table][key] | {key: "other"}}).startswith(f"{table}.{key} must be one of ")


LEAST_ONE = {
    "data": ["phrase_words"],
    "model": ["embedding_dim", "encoder_dim", "decoder_dim", "attention_dim", "num_layers"],
    "training": ["steps", "batch_size", "validate_every"],
    "search": ["beams"],
}
LEAST_ZERO = {"model": ["maxout_dim", "half_width"], "training": ["warmup", "patience", "threads"], "search": ["max_length"]}
REALS = {
    "in [0, 1)": ({"model": ["dropout"], "training": ["label_smoothing"]}, [-0.1, 1, 1.0, float("nan"), float("inf")]),
    "finite and above 0": ({"training": ["learning_rate", "clip"]}, [0, -1.0, float("nan"), float("inf"), 10**400]),
    "finite and at least 0": ({"search": ["length_penalty", "coverage_penalty"]}, [-0.5, float("nan"), float("inf"), 10**400]),
}
RANGES = [
    *[(table, key, value, "at least 1") for table, keys in LEAST_ONE.items() for key in keys for value in (0, -3)],
    *[(table, key, -1, "at least 0") for table, keys in LEAST_ZERO.items() for key in keys],
    *[(table, key, value, text) for text, (keys, out) in REALS.items() for table in keys for key in keys[table] for value in out],
]


@pytest.mark.parametrize(("table", "key", "value", "text"), RANGES, ids=lambda value: str(value)[:12])
def test_out_of_range(table: str, key: str, value: float, text: str) -> None:
    assert message({table: {key: value}}).startswith(f"{table}.{key} must be {text}; got ")


def test_ranges_are_of_every_number() -> None:
    """No key with a number was forgotten above."""
    numbers = {
        (table, key) for table, keys in DEFAULTS.items() if isinstance(keys, dict) for key, value in keys.items() if is_number(value)
    }
    assert {(table, key) for table, key, _, _ in RANGES} == numbers


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(seed: int) -> None:
    assert message({"seed": seed}) == f"seed must be from 0 to 2^63 - 1; got {seed}"


@pytest.mark.parametrize(
    ("values", "key"),
    [
        *[({"decoder": "plain"}, key) for key in ("attention_dim", "maxout_dim", "score", "window", "half_width", "input_feeding")],
        *[({"decoder": "bahdanau"}, key) for key in ("score", "window", "half_width", "input_feeding")],
        *[({"decoder": "luong"}, key) for key in ("attention_dim", "maxout_dim", "half_width")],
        ({"decoder": "luong", "window": "local-m", "half_width": 3}, "attention_dim"),
    ],
)
def test_a_key_that_the_decoder_does_not_use(values: dict[str, Any], key: str) -> None:
    """Set, it is an error that names both; at its default it may stand."""
    others = {"score": "concat", "window": "local-m", "input_feeding": False}
    changed, default = others.get(key, 7), DEFAULTS["model"][key]  # type: ignore[index]
    said = message({"model": {**values, key: changed}})
    assert said.startswith(f"model.{key} = {json.dumps(changed)} has no effect with model.")
    assert said.endswith("; leave it out")
    assert values["decoder"] in said or "global" in said
    assert model(**values, **{key: default}) == model(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"decoder": "plain", "num_layers": 3, "dropout": 0.5, "cell": "lstm"},
        {"decoder": "bahdanau", "attention_dim": 7, "maxout_dim": 7},
        {"decoder": "luong", "score": "concat", "attention_dim": 7, "input_feeding": False},
        {"decoder": "luong", "score": "dot", "decoder_dim": 384},
    ],
)
def test_keys_that_the_decoder_uses(values: dict[str, Any]) -> None:
    assert {key: getattr(model(**values).model, key) for key in values} == values


@pytest.mark.parametrize("window", ["local-m", "local-p"])
def test_a_local_window_needs_a_width(window: str) -> None:
    said = message({"model": {"decoder": "luong", "window": window}})
    assert said == f'model.window = "{window}" needs model.half_width of at least 1; got 0'


def test_dot_needs_equal_widths() -> None:
    said = message({"model": {"decoder": "luong", "score": "dot"}})
    assert "model.decoder_dim = 2 * model.encoder_dim" in said
    assert "got 256 and 192" in said
    assert "widths" not in str(model(decoder="luong", score="dot", encoder_dim=128))


def test_coverage_needs_attention() -> None:
    said = message({"model": {"decoder": "plain"}, "search": {"coverage_penalty": 0.2}})
    assert said == 'search.coverage_penalty = 0.2 has no effect with model.decoder = "plain"; leave it out'


@pytest.mark.parametrize("key", ["train", "validation", "test"])
def test_pairs_need_paths(key: str) -> None:
    said = f'data.task = "pairs" needs the path of a file of pairs in data.{key}; got none'
    assert message({"data": PAIRS | {key: ""}}) == said
    assert message({"data": {name: value for name, value in PAIRS.items() if name != key}}) == said


@pytest.mark.parametrize(
    ("values", "key", "task"),
    [
        ({"train": "a.tsv"}, "train", "cmudict"),
        ({"target": "characters"}, "target", "cmudict"),
        (PAIRS | {"stress": True}, "stress", "pairs"),
        (PAIRS | {"phrase_words": 2}, "phrase_words", "pairs"),
    ],
)
def test_a_key_that_the_task_does_not_use(values: dict[str, Any], key: str, task: str) -> None:
    said = message({"data": values})
    assert said.startswith(f"data.{key} = ")
    assert said.endswith(f'has no effect with data.task = "{task}"; leave it out')


def test_changes_are_held_to_the_same_rules() -> None:
    with pytest.raises(ConfigError, match=r"search\.beams must be at least 1; got 0"):
        dataclasses.replace(SearchConfig(), beams=0)
    with pytest.raises(ConfigError, match=r"coverage_penalty"):
        Config(model=ModelConfig(decoder="plain"), search=SearchConfig(coverage_penalty=1.0))
    with pytest.raises(ConfigError, match="data must be DataConfig"):
        Config(data={})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"seed = 1\n[model\n", ":2: not TOML: "),
        (b"seed = 1\r\n\r\nseed = 2\r\n", ":3: not TOML: "),
        (b"seed = [1,\n\n", ":3: not TOML: "),
        (b"seed = 1\n# \xe9\n", ": not UTF-8 at byte 12"),
        (b"[search]\nbeams = 0\n", ": search.beams must be at least 1; got 0"),
        (b"sead = 0\n", ": unknown key sead; did you mean seed?"),
    ],
    ids=["syntax", "CR LF", "end of file", "encoding", "value", "key"],
)
def test_errors_of_a_file(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"{path}{said}")) as error:
        load_config(path)
    assert str(error.value).startswith(str(path))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "none.toml")
    assert str(error.value) == f"{tmp_path / 'none.toml'}: no such file"


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_differences() -> None:
    checkpoint = Config(model=ModelConfig(decoder_dim=256))
    wanted = config_from_dict({"seed": 1, "model": {"decoder_dim": 512, "cell": "lstm"}, "training": {"clip": 2}}, "")
    assert differences(checkpoint, wanted) == [
        "seed: 0 in the checkpoint, 1 in the configuration",
        'model.cell: "gru" in the checkpoint, "lstm" in the configuration',
        "model.decoder_dim: 256 in the checkpoint, 512 in the configuration",
        "training.clip: 1.0 in the checkpoint, 2.0 in the configuration",
    ]


def test_search_and_threads_may_differ() -> None:
    search = SearchConfig(beams=1, length_penalty=1.0, coverage_penalty=1.0, max_length=9)
    assert differences(Config(), Config(training=TrainingConfig(threads=2), search=search)) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["seed=7"], Config(seed=7)),
        (
            ["training.steps=100", "training.warmup = 1", "model.cell=lstm"],
            {"training": {"steps": 100, "warmup": 1}, "model": {"cell": "lstm"}},
        ),
        (['model.cell="lstm"', "data.stress=true"], {"model": {"cell": "lstm"}, "data": {"stress": True}}),
        (["training.steps=1", "training.steps=2"], {"training": {"steps": 2}}),
    ],
)
def test_settings_go_before_the_file(tmp_path: Path, settings: list[str], expected: Config | dict[str, Any]) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[training]\nsteps = 5\nclip = 2.0\n")
    wanted = expected if isinstance(expected, Config) else config_from_dict(expected, tmp_path)
    steps = wanted.training.steps if any("steps" in one for one in settings) else 5
    assert load_config(path, settings) == dataclasses.replace(wanted, training=dataclasses.replace(wanted.training, steps=steps, clip=2.0))


@pytest.mark.parametrize("setting", ["", "steps", "=3", "seed=", "seed=1\nseed=2", "a b=3"])
def test_not_a_setting(tmp_path: Path, setting: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"a setting is a key, = and a value, like training\.steps=100; got "):
        load_config(path, [setting])


def test_a_setting_is_checked_like_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"unknown key training\.stops; did you mean training\.steps\?"):
        load_config(path, ["training.stops=3"])
