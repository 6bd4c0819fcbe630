"""Settings: a dataclass in each folder's config.py holds every default once; this turns it into a command line.

A preset changes some defaults, wherever it is named: on the command line or in the yaml file. Precedence, strongest
first: flags, `--config file.yaml`, preset, defaults of the dataclass.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

LARGEST_CONFIG = 100_000
"""Bytes of the largest file of settings."""
DEEPEST_CONFIG = 4
"""Lists and mappings inside each other; settings are one mapping, whose values may be lists."""


def parse_settings(
    settings_class: type,
    argv: Sequence[str] | None,
    *,
    description: str,
    presets: dict[str, dict[str, Any]] | None = None,
    positional: dict[str, tuple[str, ...] | None] | None = None,
) -> Any:
    """Build `settings_class` from the command line.

    Args:
        settings_class: dataclass; the docstring under each field is its help text.
        argv: arguments, None for sys.argv.
        description: first line of --help.
        presets: name to the fields that the preset changes; the dataclass then has a field `preset`.
        positional: extra positional arguments with their choices, such as {"split": ("train", "test")}; None admits
            any text.

    Returns:
        The settings, or (settings, positional values…) when `positional` is given.
    """
    parser = build_parser(settings_class, description=description, positional=positional or {})
    if problem := _problem_of_config(argv):
        parser.error(problem)
    values = parser.parse_args(argv)
    if presets:
        # the preset itself may come from the yaml file, so it is known only after a first pass
        if values["preset"] not in presets:
            parser.error(f"--preset {values['preset']}: choose from {', '.join(presets)}")
        changed = presets[values["preset"]]
        parser.set_defaults({name: _as_list(value) for name, value in changed.items()})
        values = parser.parse_args(argv)
    fields = {field.name: values[field.name] for field in dataclasses.fields(settings_class)}
    settings = settings_class(**{name: _as_tuple(value) for name, value in fields.items()})
    if not positional:
        return settings
    return settings, *(values[name] for name in positional)


def _problem_of_config(argv: Sequence[str] | None) -> str | None:
    """Why the file of --config may not be read, if so: it would cost more memory than it is worth, or is no yaml."""
    import yaml

    only_config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config", action="append", type=Path, default=[])
    for path in only_config.parse_known_args(argv)[0].config:
        if not path.is_file():
            continue  # the parser says so
        if path.stat().st_size > LARGEST_CONFIG:
            return (
                f"--config {path}: {path.stat().st_size} bytes are too many for settings; is it another file?"
            )
        try:
            depth = 0
            with open(path, encoding="utf-8") as file:
                # events are read one by one, so nothing has been built when one of them is refused
                for event in yaml.parse(file, yaml.SafeLoader):
                    depth += isinstance(event, yaml.CollectionStartEvent)
                    depth -= isinstance(event, yaml.CollectionEndEvent)
                    if isinstance(event, yaml.AliasEvent) or depth > DEEPEST_CONFIG:
                        return f"--config {path}: aliases (*name) and deep nesting are not read; see --help"
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            return f"--config {path}: not readable as yaml ({' '.join(str(error).split())})"
    return None


def build_parser(
    settings_class: type, *, description: str, positional: dict[str, tuple[str, ...] | None]
) -> ArgumentParser:
    """A jsonargparse parser with `--config`, the positional arguments and one flag for each field."""
    from jsonargparse import ActionYesNo, ArgumentParser

    parser = ArgumentParser(description=description)
    parser.add_argument("--config", action="config", help="yaml file with settings; flags override it")
    for name, choices in positional.items():
        if choices is None:
            parser.add_argument(name, type=str, help="name of a prepared table: train, test or a further one")
        else:
            parser.add_argument(name, choices=choices)
    types = typing.get_type_hints(settings_class)
    helps = _help_texts(settings_class)
    for field in dataclasses.fields(settings_class):
        flag = "--" + field.name.replace("_", "-")
        kind = types[field.name]
        text = helps.get(field.name)
        if kind is bool:
            parser.add_argument(flag, action=ActionYesNo(no_prefix="no-"), default=field.default, help=text)
        elif typing.get_origin(kind) is tuple:  # --use clip_image qwen_text
            item = typing.get_args(kind)[0]
            parser.add_argument(flag, type=item, nargs="*", default=_as_list(field.default), help=text)
        else:
            parser.add_argument(flag, type=kind, default=field.default, help=text)
    return parser


def _help_texts(settings_class: type) -> dict[str, str | None]:
    """The docstring under each field, those of parent dataclasses included."""
    from docstring_parser import parse_from_object

    helps: dict[str, str | None] = {}
    for parent in reversed(settings_class.__mro__):
        if dataclasses.is_dataclass(parent):
            helps |= {item.arg_name: item.description for item in parse_from_object(parent).params}
    return helps


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def settings_as_dict(settings: Any) -> dict[str, Any]:
    """The settings as plain JSON values, as they are stored beside a checkpoint."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=_plain))


def _plain(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"setting of type {type(value).__name__} cannot be stored")
