"""From a recipe to settings: defaults, then YAML, then ``section.name=value`` of the command line.

    settings = load("configs/tiny.yaml", ["train.epochs=8", "target.layers=1,7,12"])

A value must have the type that its dataclass field declares: ``true`` is no number, ``1e-3`` is one although YAML
calls it a text, ``null`` is for fields that may be None, and a field may know words beside its type (``auto``). On the command line a text needs no quotes, a list no
brackets.
"""

from __future__ import annotations

import ast
import difflib
import math
import os
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from . import settings as declarations
from .errors import UserError
from .limits import check
from .settings import Settings

RECIPES = Path(__file__).parent
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


class Kind(NamedTuple):
    """What a field's type allows: ``type``, None where ``nullable``, and ``words``."""

    type: Any
    nullable: bool
    words: tuple[str, ...]


class SettingHelp(NamedTuple):
    """What ``--help`` says about one setting."""

    name: str
    type: str
    default: str
    text: str


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """The settings of ``recipe``, a file or the name of a recipe that ships, with ``overrides`` applied.

    Raises:
        UserError: no such recipe, malformed YAML, an unknown setting, or a value of the wrong type or out of range.
    """
    values: dict[str, dict[str, Any]] = {section: {} for section in _sections()}
    for section, given in _read(_find(str(recipe))).items():
        for key, value in given.items():
            values[section][key] = _convert(f"{section}.{key}", value, _type(section, key))
    for override in overrides:
        name, equals, text = (part.strip() for part in override.partition("="))
        if not equals:
            raise UserError("override", override, "it has no value", "write section.name=value")
        section, _, key = name.partition(".")
        values[section][key] = _from_text(name, text, _type(section, key))
    settings = Settings(**{section: declared(**values[section]) for section, declared in _sections().items()})
    check(settings)
    return settings


def save(settings: Settings, path: Path) -> None:
    """Write every setting, so that :func:`load` gives the same again."""
    write_recipe(dump(settings).encode(), path)


def write_recipe(content: bytes, path: Path) -> None:
    """Write a recipe; readers, and a disk that is full, have the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def dump(settings: Settings) -> str:
    """Every setting as YAML."""
    sections = {
        section: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        for section, values in asdict(settings).items()
    }
    return yaml.dump(sections, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def recipes() -> list[str]:
    """Names of the recipes that ship."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


@cache
def describe() -> dict[str, list[SettingHelp]]:
    """Every setting by section, explained by the text under its field."""
    tree = ast.parse(Path(declarations.__file__).read_text(encoding="utf-8"))
    texts = {node.name: dict(_field_texts(node)) for node in tree.body if isinstance(node, ast.ClassDef)}
    return {
        section: [
            SettingHelp(
                f"{section}.{found.name}", str(found.type), _show(found.default), texts[declared.__name__][found.name]
            )
            for found in fields(declared)
        ]
        for section, declared in _sections().items()
    }


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, and not a way to lose the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML with lists in one line."""


def _in_one_line(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_Dumper.add_representer(list, _in_one_line)


def _field_texts(declared: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """The fields of a dataclass with the texts that follow them."""
    for statement, following in zip(declared.body, declared.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())


@cache
def _sections() -> dict[str, Any]:
    return get_type_hints(Settings)


def _type(section: str, key: str) -> Any:
    """The declared type of a setting; raises for one that does not exist."""
    types = {name: get_type_hints(declared) for name, declared in _sections().items()}
    if key in types.get(section, {}):
        return types[section][key]
    name, known = (f"{section}.{key}", list(types[section])) if section in types else (section, list(types))
    guesses = [f"{other}.{same}" for other in types for same in types[other] if same == (key or section)]
    if not guesses:
        close = difflib.get_close_matches(key if section in types else section, known, n=2)
        guesses = [f"{section}.{guess}" if section in types else guess for guess in close]
    remedy = f"did you mean {' or '.join(guesses)}?" if guesses else f"choose one of {', '.join(known)}"
    raise UserError("setting", name, f"there is no such {'setting' if section in types else 'section'}", remedy)


def _find(recipe: str) -> Path:
    path = Path(recipe)
    if path.is_file():
        return path
    if recipe in recipes():
        return RECIPES / f"{recipe}.yaml"
    remedy = f"give a YAML file, or a recipe that ships: {', '.join(recipes())}"
    if path.is_dir():
        remedy = f"give {path / 'config.yaml'}" if (path / "config.yaml").is_file() else remedy
        raise UserError("recipe", recipe, "it is a folder", remedy)
    problem = "overrides come after the recipe" if "=" in recipe else "there is no such file"
    raise UserError("recipe", recipe, problem, remedy)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a YAML file, each a mapping."""
    try:
        values = yaml.load(path.read_bytes(), _Loader)
    except OSError as error:
        raise UserError("recipe", path, f"it cannot be read ({error.strerror})", "check its permissions") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError("recipe", f"{path}, line {line}", f"not YAML: {error.problem}", "correct the line") from None
    except yaml.YAMLError as error:
        raise UserError("recipe", path, f"not YAML: {error}", "give a YAML file in UTF-8") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError("recipe", path, "it has no sections", f"write sections of settings: {', '.join(_sections())}")
    read = {}
    for section, given in values.items():
        outer, _, key = str(section).partition(".")
        if key or outer not in _sections():
            _type(outer, key)
            raise UserError("recipe", section, "YAML nests settings", f"write {key} indented under {outer}")
        if not isinstance(given, dict | None):
            raise UserError(outer, _show(given), "a section holds settings", "write them indented under its name")
        read[section] = {str(key): value for key, value in (given or {}).items()}
    return read


def _from_text(name: str, typed: str, kind: Any) -> Any:
    """A value from the command line: a text as it stands, all else as YAML would read it."""
    required, nullable, words = _kind(kind)
    if nullable and typed in ("null", "none", "None"):
        return None
    if required is str or typed in words:
        return typed
    text = f"[{typed.strip('[]()')}]" if get_origin(required) is tuple else typed
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        value = typed
    return _convert(name, value, kind, typed)


def _convert(name: str, value: Any, kind: Any, typed: str = "") -> Any:
    """``value`` as ``kind``, a field's type; raises :class:`UserError` if it is something else, showing what was typed."""
    kind, nullable, words = _kind(kind)
    if (value is None and nullable) or (isinstance(value, str) and value in words):
        return value
    if get_origin(kind) is tuple:
        return _convert_list(name, value, get_args(kind), typed)
    if kind is float and isinstance(value, str):
        value = _number(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        remedy = f"give {WORDS[kind]}" + (", in quotes" if kind is str else "") + "".join(f", or {w}" for w in words)
        raise UserError(name, typed or _show(value), f"it is {_called(value)}", remedy)
    return value


def _convert_list(name: str, value: Any, kinds: tuple[Any, ...], typed: str) -> tuple[Any, ...]:
    inner = kinds[0]
    if not isinstance(value, list):
        raise UserError(name, _show(value), f"it is {_called(value)}", f"give a list, such as [{_example(kinds)}]")
    if kinds[-1] is not Ellipsis and len(value) != len(kinds):
        raise UserError(name, typed or _show(value), f"it has {len(value)} values", f"give {len(kinds)}")
    return tuple(_convert(name, item, inner, typed or _show(value)) for item in value)


def _kind(declared: Any) -> Kind:
    """A field's type, taken apart."""
    options = get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)
    words = tuple(word for option in options if get_origin(option) is Literal for word in get_args(option))
    required = next(option for option in options if option is not NoneType and get_origin(option) is not Literal)
    return Kind(required, NoneType in options, words)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _called(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "not finite"
    return WORDS.get(type(value), "a list" if isinstance(value, list) else "something else")


def _example(kinds: tuple[Any, ...]) -> str:
    return ", ".join("1" if kind is int else "0.5" for kind in kinds if kind is not Ellipsis)


def _show(value: Any) -> str:
    """A value as a recipe would say it."""
    if value is MISSING:
        return "(none)"
    return yaml.dump(list(value) if isinstance(value, tuple) else value, Dumper=_Dumper, width=1 << 20).split("\n")[0]
