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

from pydantic import BaseModel, Field, ValidationError, create_model

from srft.config import Config
from srft.methods import DEFAULT, find_method, method_names

_EFFECT = "With no argument: the demo. --dry-run: what a run would need."


def load_config(arguments: list[str]) -> Config:
    """Read TOML files, then apply ``section.key=value`` overrides, in the order given.

    Args:
        arguments: Paths ending in .toml and dotted overrides, as on the command line.

    Returns:
        The validated configuration.

    Raises:
        ValueError: For an unknown key (with the nearest match), a wrong type or range, or a file that is not TOML.
    """
    layers = _read_layers(arguments)
    root = _root_of(_method_name(_merged(layers, Config)))
    return _checked(_merged(layers, root), root)


def load_config_text(text: str) -> Config:
    """Read a configuration written by ``to_toml``.

    Args:
        text: TOML.

    Raises:
        ValueError: As ``load_config``, such as for an option that another version had.
    """
    tree = tomllib.loads(text)
    return _checked(tree, _root_of(_method_name(tree)))


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


def help_text(
    program: str = "srft.train", effect: str = _EFFECT, method: str = DEFAULT
) -> str:
    """Return every option with its type, default and meaning, one paragraph a section.

    Args:
        program: Module of the command.
        effect: A sentence on what it does.
        method: The method whose options are listed.

    Raises:
        ValueError: When there is no such method.
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
            value = field.get_default(call_default_factory=True)
            default = "unset" if value is None else "…" if field.is_required() else _toml_value(_jsonable(value))
            lines.append(f"  {dotted}={default}  ({_type_name(field.annotation)})")
            lines.append(f"      {' '.join((field.description or '').split())}")
        for annotation, dotted in subsections:
            lines.extend(["", f"[{dotted}] {' '.join((annotation.__doc__ or '').split())}"])
            describe(annotation, dotted + ".")

    describe(_root_of(method), "")
    return "\n".join(lines)


def _read_layers(arguments: list[str]) -> list[dict[str, Any] | tuple[list[str], str]]:
    """What each argument says: the tree of a file, or the keys and the text of an override."""
    layers: list[dict[str, Any] | tuple[list[str], str]] = []
    for argument in arguments:
        if not argument.isascii() and argument != argument.encode(errors="replace").decode():
            raise ValueError(f"{argument!a} is not text in UTF-8; rename the file or folder it names")
        if "=" in argument:
            dotted, text = argument.split("=", 1)
            layers.append((dotted.strip().removeprefix("--").split("."), text))
        elif argument.endswith(".toml"):
            layers.append(_read_toml(Path(argument)))
        else:
            raise ValueError(f"expected a .toml file or section.key=value, got {argument!r}; see --help")
    return layers


def _merged(layers: list[dict[str, Any] | tuple[list[str], str]], root: type[BaseModel]) -> dict[str, Any]:
    """One tree of all layers, each value read as the type of its option."""
    tree: dict[str, Any] = {}
    for layer in layers:
        if isinstance(layer, tuple):
            keys, text = layer
            value: Any = _parse_value(text, _type_of(keys, root))
            for key in reversed(keys):
                value = {key: value}
            _merge(tree, value)
        else:
            _merge(tree, layer)
    return tree


def _method_name(tree: dict[str, Any]) -> str:
    section = tree.get("method")
    return str(section.get("name", DEFAULT)) if isinstance(section, dict) else DEFAULT


def _root_of(method: str) -> type[BaseModel]:
    """``Config`` with the options of a method, to look up names and types in."""
    cls = find_method(method)
    names: Any = Literal[(*method_names(), "path/to/file.py")]
    field = Field(method, description=cls.model_fields["name"].description)
    section = create_model("Method", __base__=cls, __doc__=cls.__doc__, name=(names, field))
    return create_model("Config", __base__=Config, method=(section, Field()))


def _checked(tree: dict[str, Any], root: type[BaseModel]) -> Config:
    _reject_unknown_keys(root, tree)
    _spell_out(tree, root)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        # every member of a union reports its own failure: one line an option is enough
        by_option = {error["loc"][:2]: error for error in reversed(error.errors())}
        raise ValueError("\n".join(_explain(e, root) for e in by_option.values())) from None


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no such configuration file: {path}")
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None


def _type_of(keys: list[str], root: type[BaseModel]) -> Any:
    """The type of the option at a dotted name, of a table's entry where the name reaches into one; None of none."""
    kind: Any = root
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


def _spell_out(tree: dict[str, Any], root: type[BaseModel], path: tuple[str, ...] = ()) -> None:
    """Turn what a file wrote without quotes for an option that holds text into that text, in place.

    Raises:
        ValueError: For a number with a point or an exponent, whose spelling is lost.
    """
    for key, value in tree.items():
        keys = [*path, key]
        if isinstance(value, dict):
            _spell_out(value, root, tuple(keys))
        elif not _is_text(_type_of(keys, root)):
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


def _reject_unknown_keys(root: type[BaseModel], tree: dict[str, Any], path: tuple[str, ...] = ()) -> None:
    section = _type_of(list(path), root)
    for key, value in tree.items():
        dotted = ".".join([*path, key])
        field = section.model_fields.get(key)
        if field is None:
            dotted = next(iter(_flatten({dotted: value} if value != {} else {dotted: None})))
            if path == ("method",) and (others := [n for n in method_names() if key in find_method(n).model_fields]):
                raise ValueError(
                    f"unknown option {dotted}: it belongs to method.name={' or '.join(others)}, but method.name is "
                    f"{section.model_fields['name'].default}"
                )
            every = _all_keys(root)
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
            _reject_unknown_keys(root, value, (*path, key))


def _explain(error: Any, root: type[BaseModel]) -> str:
    known = {part for key in _all_keys(root) for part in key.split(".")}
    dotted = ".".join(str(part) for part in error["loc"] if part in known)
    # of a list too short pydantic says "missing" as well
    if error["type"] == "missing" and error["loc"][-1] in known:
        return f"{dotted} has no default; set {dotted}=…"
    message = error["msg"].removeprefix("Value error, ")
    return f"{dotted}: {message}, got {error['input']!r}" if dotted else message


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
    arguments: list[str], program: str = "srft.train", effect: str = _EFFECT
) -> None:
    """Print the options, of the method that is named beside, and leave when they are asked for.

    Args:
        arguments: The command line's words.
        program: Module of the command.
        effect: A sentence on what it does.
    """
    if {"-h", "--help"} & set(arguments):
        others = [argument for argument in arguments if argument not in ("-h", "--help")]
        try:
            print(help_text(program, effect, _method_name(_merged(_read_layers(others), Config))))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        sys.exit(0)
