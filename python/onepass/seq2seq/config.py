"""The configuration of a run: frozen dataclasses, read from TOML or a dict, that refuse what they cannot mean.

Every value is checked where a dataclass is made, by ``dataclasses.replace`` too. All errors are :class:`ConfigError`.
"""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

from onepass.seq2seq.data import DataError, Unit


class ConfigError(DataError):
    """A configuration that says something impossible, or nothing that is known; the message names the key."""


class _Range(NamedTuple):
    text: str
    holds: Callable[[float], bool]


# The upper bounds keep out infinity, NaN and what a float or a generator of torch cannot hold.
_Seed = Annotated[int, _Range("from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)]
_Natural = Annotated[int, _Range("at least 0", lambda value: value >= 0)]
_Count = Annotated[int, _Range("at least 1", lambda value: value >= 1)]
_Share = Annotated[float, _Range("in [0, 1)", lambda value: 0 <= value < 1)]
_Positive = Annotated[float, _Range("finite and above 0", lambda value: 0 < value <= sys.float_info.max)]
_Penalty = Annotated[float, _Range("finite and at least 0", lambda value: 0 <= value <= sys.float_info.max)]


class _Table:
    """What the dataclasses share: values of the declared types, choices and ranges; an int becomes the float that is declared."""

    table: ClassVar[str]

    def __post_init__(self) -> None:
        for key, kind in _kinds(type(self)).items():
            object.__setattr__(self, key, _checked(_dotted(self.table, key), getattr(self, key), kind))

    def _unused(self, keys: Iterable[str], reason: str) -> None:
        """Refuse the keys that ``reason`` leaves without a meaning, if they were set."""
        defaults = type(self)
        for key in keys:
            value, default = getattr(self, key), getattr(defaults, key)
            if value != default:
                raise ConfigError(f"{self.table}.{key} = {_toml(value)} has no effect with {reason}; leave it out")


@dataclass(frozen=True)
class DataConfig(_Table):
    """What to learn from: the CMU dictionary, or files of pairs (:func:`onepass.seq2seq.data.read_pairs`).

    ``stress`` and ``phrase_words``, the most words that are joined for training (:func:`onepass.seq2seq.cmudict.load`), are for the
    dictionary; the paths, which ``"pairs"`` needs, and how ``source`` and ``target`` are cut, are for files.
    """

    table: ClassVar[str] = "data"

    task: Literal["cmudict", "pairs"] = "cmudict"
    stress: bool = False
    phrase_words: _Count = 1
    train: str = ""
    validation: str = ""
    test: str = ""
    source: Unit = "characters"
    target: Unit = "words"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task == "cmudict":
            self._unused(("train", "validation", "test", "source", "target"), 'data.task = "cmudict"')
            return
        self._unused(("stress", "phrase_words"), 'data.task = "pairs"')
        for key in ("train", "validation", "test"):
            if not getattr(self, key):
                raise ConfigError(f'data.task = "pairs" needs the path of a file of pairs in data.{key}; got none')


@dataclass(frozen=True)
class ModelConfig(_Table):
    """The network. A key that the decoder has no use for must keep its default.

    cell and num_layers are the encoder's, and the decoder's too unless it is ``"bahdanau"``, which has one layer of the paper's own gates.
    maxout_dim: width of the maxout output of ``"bahdanau"``; 0 is a linear output. score, window, half_width and input_feeding are for
    ``"luong"``; half_width, of a local window, is at least 1 there and 0 elsewhere. attention_dim is for ``"bahdanau"`` and for
    ``score = "concat"``.
    """

    table: ClassVar[str] = "model"

    decoder: Literal["plain", "bahdanau", "luong"] = "bahdanau"
    cell: Literal["lstm", "gru"] = "gru"
    embedding_dim: _Count = 64
    encoder_dim: _Count = 192
    decoder_dim: _Count = 256
    attention_dim: _Count = 128
    num_layers: _Count = 1
    dropout: _Share = 0.0
    maxout_dim: _Natural = 0
    score: Literal["dot", "general", "concat"] = "general"
    window: Literal["global", "local-m", "local-p"] = "global"
    half_width: _Natural = 0
    input_feeding: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = f"model.decoder = {_toml(self.decoder)}"
        if self.decoder == "plain":
            self._unused(("attention_dim",), chosen)
        if self.decoder != "bahdanau":
            self._unused(("maxout_dim",), chosen)
        if self.decoder != "luong":
            self._unused(("score", "window", "half_width", "input_feeding"), chosen)
            return
        if self.score != "concat":
            self._unused(("attention_dim",), f"{chosen} and model.score = {_toml(self.score)}")
        if self.window == "global":
            self._unused(("half_width",), 'model.window = "global"')
        elif self.half_width < 1:
            raise ConfigError(f"model.window = {_toml(self.window)} needs model.half_width of at least 1; got {self.half_width}")
        if self.score == "dot" and self.decoder_dim != 2 * self.encoder_dim:
            raise ConfigError(
                'model.score = "dot" needs model.decoder_dim = 2 * model.encoder_dim (two directions); '
                f'got {self.decoder_dim} and {self.encoder_dim}; "general" takes any widths'
            )


@dataclass(frozen=True)
class TrainingConfig(_Table):
    """The updates. patience: validations in a row without improvement before it stops, 0 for never; threads: 0 for torch's number."""

    table: ClassVar[str] = "training"

    steps: _Count = 2600
    batch_size: _Count = 128
    learning_rate: _Positive = 3e-3
    warmup: _Natural = 100
    clip: _Positive = 1.0
    validate_every: _Count = 400
    patience: _Natural = 0
    threads: _Natural = 0
    label_smoothing: _Share = 0.0


@dataclass(frozen=True)
class SearchConfig(_Table):
    """The beam search. beams: 1 is greedy; max_length: symbols of a hypothesis, 0 for 2 * source length + 8."""

    table: ClassVar[str] = "search"

    beams: _Count = 4
    length_penalty: _Penalty = 0.0
    coverage_penalty: _Penalty = 0.0
    max_length: _Natural = 0


@dataclass(frozen=True)
class Config(_Table):
    """A whole run. ``seed``: of the split, the parameters and the batches."""

    table: ClassVar[str] = ""

    seed: _Seed = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.decoder == "plain":
            self.search._unused(("coverage_penalty",), 'model.decoder = "plain"')


def load_config(path: str | os.PathLike[str], settings: Iterable[str] = ()) -> Config:
    """The configuration of a TOML file. Errors begin with the path: no such file, not UTF-8, a syntax error with its line, a wrong key.

    ``settings`` go before what the file says: ``"training.steps=100"``, each a line of TOML; a value that is none, like
    ``model.cell=lstm``, is a string.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
        mapping = _parsed(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start + 1} ({error.reason})") from None
    except _TomlError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise ConfigError(f"{path}:{line[1] if line else text.count(chr(10)) + 1}: not TOML: {error}") from None
    for setting in settings:
        given = _parsed_setting(setting)
        for key, value in given.items():
            below = mapping.get(key)
            mapping[key] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    try:
        return config_from_dict(mapping, os.path.dirname(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _parsed_setting(setting: str) -> dict[str, Any]:
    key, equals, value = setting.partition("=")
    for text in (setting, f"{key} = {_toml(value.strip())}"):
        try:
            if equals and value.strip() and "\n" not in setting:
                return _parsed(text)
        except _TomlError:
            continue
    raise ConfigError(f"a setting is a key, = and a value, like training.steps=100; got {setting!r}")


class _TomlError(ValueError):
    """What a parser of TOML says."""


def _parsed(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]
        except ModuleNotFoundError:
            raise ConfigError("Python 3.10 reads TOML with a package that is not installed: `pip install tomli`") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _TomlError(str(error)) from None


def config_from_dict(mapping: Mapping[str, Any], folder: str | os.PathLike[str]) -> Config:
    """The configuration of nested mappings, as TOML gives them. Paths are relative to ``folder``; in the result they are absolute."""
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        kind = _kinds(Config).get(key)
        if kind is None:
            raise ConfigError(_unknown("", key, isinstance(value, Mapping)))
        if key == "seed":
            values[key] = value
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} must be a table, [{key}]; got {_described(value)}")
        for name in value:
            if name not in _kinds(kind):
                raise ConfigError(_unknown(key, name, False))
        paths = {name: value[name] for name in ("train", "validation", "test") if key == "data" and value.get(name)}
        absolute = {name: os.path.abspath(os.path.join(folder, path)) for name, path in paths.items() if isinstance(path, str)}
        values[key] = kind(**{**value, **absolute})
    return Config(**values)


def config_to_dict(config: Config) -> dict[str, Any]:
    """All keys as nested dicts of plain values, for TOML or JSON; ``config_from_dict`` makes the same configuration of them."""
    return dataclasses.asdict(config)


def differences(a: Config, b: Config) -> list[str]:
    """Where ``b``, a configuration, cannot go on with the run of ``a``, a checkpoint: a line per key, none if it can.

    The table ``search`` and ``training.threads`` may differ: neither changes the weights.
    """
    ours, theirs = _flat(a), _flat(b)
    return [
        f"{key}: {_toml(value)} in the checkpoint, {_toml(theirs[key])} in the configuration"
        for key, value in ours.items()
        if value != theirs[key] and not key.startswith("search.") and key != "training.threads"
    ]


def _flat(config: Config) -> dict[str, Any]:
    tables = {table: values if isinstance(values, dict) else {"": values} for table, values in config_to_dict(config).items()}
    return {f"{table}.{key}".rstrip("."): value for table, values in tables.items() for key, value in values.items()}


def _kinds(cls: Any) -> dict[str, Any]:
    """The declared type of every key."""
    hints = get_type_hints(cls, include_extras=True)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(cls)}


def _checked(name: str, value: object, kind: Any) -> object:
    """The value, if it is one of the kind."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if isinstance(value, str) and value in choices:
            return value
        match = get_close_matches(value, choices, 1) if isinstance(value, str) else []
        hint = f"; did you mean {_toml(match[0])}?" if match else ""
        raise ConfigError(f"{name} must be one of {', '.join(map(_toml, choices))}; got {_described(value)}{hint}")
    of, *ranges = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    fits = isinstance(value, (int, float) if of is float else of) and (of is bool or not isinstance(value, bool))
    if not fits:
        raise ConfigError(f"{name} must be {_NAMES.get(of, of.__name__)}; got {_described(value)}")
    for limits in ranges:
        if not limits.holds(value):
            raise ConfigError(f"{name} must be {limits.text}; got {_toml(value)}")
    return float(value) if of is float else value  # type: ignore[arg-type]


_NAMES = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", dict: "a table", list: "an array"}


def _described(value: object) -> str:
    return f"{_toml(value)}, {_NAMES.get(type(value), f'a {type(value).__name__}')}"


def _toml(value: object) -> str:
    """A value as it stands in a TOML file."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _dotted(table: str, key: str) -> str:
    return f"{table}.{key}" if table else key


def _unknown(table: str, key: str, is_table: bool) -> str:
    """The message for a key that nothing reads: what it may have been, in its table or in another one, and what there is."""
    known = {"": ["seed", *_TABLES]} | {name: list(_kinds(cls)) for name, cls in _TABLES.items()}
    elsewhere = {name: where for where, names in known.items() for name in names}
    if match := get_close_matches(key, known[table], 1):
        hint = f"[{match[0]}]" if match[0] in _TABLES else _dotted(table, match[0])
    elif match := get_close_matches(key, elsewhere, 1, 0.8):
        hint = _dotted(elsewhere[match[0]], match[0])
    else:
        hint = ""
    what = f"table [{key}]" if is_table else f"key {_dotted(table, key)}"
    place = f"[{table}]" if table else "the file"
    return f"unknown {what}{f'; did you mean {hint}?' if hint else ''}; known in {place} are {', '.join(known[table])}"


_TABLES = {"data": DataConfig, "model": ModelConfig, "training": TrainingConfig, "search": SearchConfig}
