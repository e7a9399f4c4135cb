"""The command line of the trainer: TOML files and dotted overrides in, a checked configuration or its help out."""

from __future__ import annotations

import difflib
import sys
import tomllib
import types
import typing
from datetime import date, time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ValidationError

from srft.config import Config


def load_config(arguments: list[str]) -> Config:
    """Read TOML files, then apply ``section.key=value`` overrides, in the order given.

    Args:
        arguments: Paths ending in .toml and dotted overrides, as on the command line.

    Returns:
        The validated configuration.

    Raises:
        ValueError: For an unknown key (with the nearest match), a wrong type or range, or a file that is not TOML.
    """
    tree: dict[str, Any] = {}
    for argument in arguments:
        if not argument.isascii() and argument != argument.encode(errors="replace").decode():
            raise ValueError(f"{argument!a} is not text in UTF-8; rename the file or folder it names")
        if "=" in argument:
            dotted, text = argument.split("=", 1)
            keys = dotted.strip().removeprefix("--").split(".")
            layer: Any = _parse_value(text, _type_of(keys))
            for key in reversed(keys):
                layer = {key: layer}
        elif argument.endswith(".toml"):
            layer = _read_toml(Path(argument))
        else:
            raise ValueError(f"expected a .toml file or section.key=value, got {argument!r}; see --help")
        _merge(tree, layer)
    _reject_unknown_keys(Config, tree, "")
    _spell_out(tree)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        # every member of a union reports its own failure: one line an option is enough
        by_option = {error["loc"][:2]: error for error in reversed(error.errors())}
        raise ValueError("\n".join(_explain(e) for e in by_option.values())) from None


def load_config_text(text: str) -> Config:
    """Read a configuration written by ``to_toml``.

    Args:
        text: TOML.
    """
    return Config.model_validate(tomllib.loads(text))


def to_toml(config: Config) -> str:
    """Write a configuration as TOML that ``load_config`` reads back to the same values.

    Args:
        config: The configuration; options that are unset are left out.
    """
    lines: list[str] = []

    def write(table: dict[str, Any], path: str) -> None:
        scalars = {k: v for k, v in table.items() if not isinstance(v, dict) and v is not None}
        if path and scalars:
            lines.append(f"\n[{path}]")
        lines.extend(f"{key} = {_toml_value(value)}" for key, value in scalars.items())
        for key, value in table.items():
            if isinstance(value, dict):
                write(value, f"{path}.{key}" if path else key)

    write(config.model_dump(mode="json"), "")
    return "\n".join(lines).lstrip() + "\n"


def changed_keys(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return the dotted options that differ between two configurations, with both values.

    Args:
        old: One configuration.
        new: The other.
    """
    flat_old, flat_new = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    keys = sorted(flat_old.keys() | flat_new.keys())
    return {k: (flat_old.get(k), flat_new.get(k)) for k in keys if flat_old.get(k) != flat_new.get(k)}


def help_text(program: str = "srft.train", effect: str = "With no argument: the demo.") -> str:
    """Return every option with its type, default and meaning, one paragraph a section.

    Args:
        program: Module of the command.
        effect: A sentence on what it does.
    """
    lines = [
        f"usage: python -m {program} [run.toml ...] [section.key=value ...]",
        "",
        f"{effect} Later files and overrides win. Options and defaults:",
    ]

    def describe(section: type[BaseModel], path: str) -> None:
        subsections = []
        for name, field in section.model_fields.items():
            dotted = f"{path}{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                subsections.append((field.annotation, dotted))
                continue
            default = "unset" if field.default is None else _toml_value(_jsonable(field.default))
            lines.append(f"  {dotted}={default}  ({_type_name(field.annotation)})")
            lines.append(f"      {' '.join((field.description or '').split())}")
        for annotation, dotted in subsections:
            lines.extend(["", f"[{dotted}] {(annotation.__doc__ or '').strip()}"])
            describe(annotation, dotted + ".")

    describe(Config, "")
    return "\n".join(lines)


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no such configuration file: {path}")
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None


def _type_of(keys: list[str]) -> Any:
    """The type of the option at a dotted name, of a table's entry where the name reaches into one; None of none."""
    kind: Any = Config
    for key in keys:
        if _is_section(kind):
            if key not in kind.model_fields:
                return None
            kind = kind.model_fields[key].annotation
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        else:
            return None
    return kind


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _is_text(kind: Any) -> bool:
    """Whether a type holds text and nothing else: a string, a path, words to choose from, or one of them or unset."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return all(isinstance(word, str) for word in arguments)
    if origin in (typing.Union, types.UnionType):
        return all(member is type(None) or _is_text(member) for member in arguments)
    return _is_text(arguments[0]) if origin is Annotated else kind in (str, Path)


def _parse_value(text: str, kind: Any) -> Any:
    """Read an override's value: text as it stands, in quotes or not, where the option holds text; else as TOML
    (numbers, booleans, lists, tables) where it is TOML, and as plain text where it is not.
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"]
    if len(parsed) > 1 or isinstance(value, (date, time)):
        return text
    # a comment after the closing quote would be TOML too
    if isinstance(value, str) and text.strip()[-1] in "\"'":
        return value
    several = typing.get_origin(kind) is list and _is_text(typing.get_args(kind)[0])
    return text if _is_text(kind) or (several and not isinstance(value, list)) else value


def _spell_out(tree: dict[str, Any], path: tuple[str, ...] = ()) -> None:
    """Turn what a file wrote without quotes for an option that holds text into that text, in place.

    Raises:
        ValueError: For a number with a point or an exponent, whose spelling is lost.
    """
    for key, value in tree.items():
        keys = [*path, key]
        if isinstance(value, dict):
            _spell_out(value, tuple(keys))
        elif not _is_text(_type_of(keys)):
            continue
        elif isinstance(value, bool):
            tree[key] = str(value).lower()
        elif isinstance(value, (date, time)):
            tree[key] = value.isoformat()
        elif isinstance(value, float):
            raise ValueError(f"{'.'.join(keys)} holds text, got the number {value!r}; put it in quotes")


def _merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _flatten(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{path}{key}."))
        else:
            flat[path + key] = value
    return flat


def _all_keys(section: type[BaseModel], path: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _all_keys(field.annotation, f"{path}{name}.")
        else:
            keys.append(path + name)
    return keys


def _reject_unknown_keys(section: type[BaseModel], tree: dict[str, Any], path: str) -> None:
    for key, value in tree.items():
        dotted = path + key
        field = section.model_fields.get(key)
        if field is None:
            dotted = next(iter(_flatten({dotted: value} if value != {} else {dotted: None})))
            every = _all_keys(Config)
            by_last_name = [k for k in every if k.split(".")[-1] == key.split(".")[-1]]
            near = by_last_name or difflib.get_close_matches(dotted, every, n=1, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; see python -m srft.train --help"
            raise ValueError(f"unknown option {dotted}{hint}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            if not isinstance(value, dict):
                raise ValueError(
                    f"{dotted} is a section; set one of its options, such as "
                    f"{_all_keys(field.annotation, dotted + '.')[0]}=…"
                )
            _reject_unknown_keys(field.annotation, value, dotted + ".")


def _explain(error: Any) -> str:
    dotted = ".".join(str(part) for part in error["loc"] if part in _known_names())
    message = error["msg"].removeprefix("Value error, ")
    return f"{dotted}: {message}, got {error['input']!r}" if dotted else message


def _known_names() -> set[str]:
    return {part for key in _all_keys(Config) for part in key.split(".")}


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r", "\x7f": "\\u007f"}
        return '"' + "".join(escapes.get(c, c if c >= " " else f"\\u{ord(c):04x}") for c in value) + '"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml_value(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(a) for a in arguments if a is not type(None))
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_name(a) for a in arguments)}]"
    return "path" if annotation is Path else getattr(annotation, "__name__", str(annotation))


def exit_on_help(
    arguments: list[str], program: str = "srft.train", effect: str = "With no argument: the demo."
) -> None:
    """Print the options and leave when they are asked for.

    Args:
        arguments: The command line's words.
        program: Module of the command.
        effect: A sentence on what it does.
    """
    if {"-h", "--help"} & set(arguments):
        print(help_text(program, effect))
        sys.exit(0)
