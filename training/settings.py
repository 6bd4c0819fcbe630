"""Settings: a dataclass in each folder's config.py holds every default once; this turns it into a command line.

Order of precedence: flags, then `--config file.yaml`, then `--preset`, then the defaults of the dataclass.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def parse_settings(
    settings_class: type[Settings],
    argv: Sequence[str] | None,
    *,
    description: str,
    presets: dict[str, dict[str, Any]] | None = None,
    positional: dict[str, tuple[str, ...]] | None = None,
) -> Any:
    """Build `settings_class` from the command line.

    Args:
        settings_class: dataclass; the docstring under each field is its help text.
        argv: arguments, None for sys.argv.
        description: first line of --help.
        presets: name to the fields that the preset changes; the dataclass then has a field `preset`.
        positional: extra positional arguments with their choices, such as {"split": ("train", "test")}.

    Returns:
        The settings, or (settings, positional values…) when `positional` is given.
    """
    from docstring_parser import parse_from_object
    from jsonargparse import ActionYesNo, ArgumentParser

    parser = ArgumentParser(description=description)
    parser.add_argument("--config", action="config", help="yaml file with settings; flags override it")
    for name, choices in (positional or {}).items():
        parser.add_argument(name, choices=choices)
    types = typing.get_type_hints(settings_class)
    documented = [
        parse_from_object(parent)
        for parent in reversed(settings_class.__mro__)
        if dataclasses.is_dataclass(parent)
    ]
    helps = {item.arg_name: item.description for document in documented for item in document.params}
    for field in dataclasses.fields(settings_class):
        flag, text = "--" + field.name.replace("_", "-"), helps.get(field.name)
        if types[field.name] is bool:
            parser.add_argument(flag, action=ActionYesNo(no_prefix="no-"), default=field.default, help=text)
        else:
            kind, default, options = types[field.name], field.default, {}
            if typing.get_origin(kind) is tuple:  # --use clip_image qwen_text
                kind, default, options = typing.get_args(kind)[0], list(default), {"nargs": "*"}
            parser.add_argument(flag, type=kind, default=default, help=text, **options)
    if presets:
        chooser = argparse.ArgumentParser(add_help=False)
        chooser.add_argument("--preset", default=settings_class.preset)
        chosen = chooser.parse_known_args(argv)[0].preset
        if chosen not in presets:
            parser.error(f"--preset {chosen}: choose from {', '.join(presets)}")
        changed = {name: list(v) if isinstance(v, tuple) else v for name, v in presets[chosen].items()}
        parser.set_defaults({"preset": chosen, **changed})
    values = parser.parse_args(argv)
    fields = {field.name: values[field.name] for field in dataclasses.fields(settings_class)}
    settings = settings_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
    return (settings, *(values[name] for name in positional)) if positional else settings


def settings_as_dict(settings: Any) -> dict[str, Any]:
    """The settings as plain JSON values, as they are stored beside a checkpoint."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=_plain))


def _plain(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"setting of type {type(value).__name__} cannot be stored")
