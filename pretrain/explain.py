"""What settings mean, in the words of the docstrings under their fields; and in what two configurations differ."""

import ast
import inspect
import io
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf

from pretrain.config import Config, ConfigError, all_keys, read_yaml, suggestion, to_yaml

WIDTH = 100
_NAME = "NAME"
_ABSENT = object()


@cache
def field_docs(cls: type) -> dict[str, str]:
    """Field of a dataclass -> the docstring under it, on one line; fields without one are left out."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    if not isinstance(definition, ast.ClassDef):
        raise TypeError(f"{cls} is no class")
    docs = {name: doc for base in cls.__bases__ if base is not object for name, doc in field_docs(base).items()}
    for statement, below in zip(definition.body, definition.body[1:], strict=False):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                docs[name] = " ".join(doc.split())
    return docs


class Setting(NamedTuple):
    """A key of the configuration, a section or a leaf.

    Attributes:
        key: dotted.
        hint: its type.
        default: a plain value; None also where there is none, for names of the user's choice.
        doc: its docstring.
    """

    key: str
    hint: Any
    default: Any
    doc: str

    @property
    def section(self) -> Any:
        """The dataclass whose fields stand below this key, or below the names that do; None for a leaf."""
        return next((part for part in (self.hint, *get_args(self.hint)) if is_dataclass(part)), None)

    @property
    def named(self) -> bool:
        """Whether names of the user's choice stand below this key."""
        return get_origin(self.hint) is dict

    def child(self, name: str) -> "Setting | None":
        """The setting ``name`` below this one, if there can be one."""
        key = f"{self.key}.{name}" if self.key else name
        if self.named:
            element = get_args(self.hint)[1]
            return Setting(key, element, _defaults(element), _class_doc(element) or self.doc) if name else None
        if self.section is None or name not in {field.name for field in fields(self.section)}:
            return None
        # A section that is null has the defaults of its class once it is not.
        default = (_defaults(self.section) if self.default is None else self.default)[name]
        return Setting(key, get_type_hints(self.section)[name], default, field_docs(self.section)[name])

    def children(self) -> "list[Setting]":
        """All settings one level down; NAME stands for a name of the user's choice."""
        names = [_NAME] if self.named else [field.name for field in fields(self.section)] if self.section else []
        return [child for name in names if (child := self.child(name)) is not None]


def commented_yaml(config: Config) -> str:
    """The whole configuration as a recipe that gives the same run, each setting with its docstring as a comment."""
    text = to_yaml(config)
    lines = text.splitlines(keepends=True)
    # Only comments are added, so that all values stand as `to_yaml` writes them; from the end, so that numbers hold.
    for first, last, doc in reversed(list(_places(yaml.compose(text, yaml.SafeLoader), _root()))):
        line = lines[first].rstrip("\n")
        if first == last and len(line) + len(f"  # {doc}") <= WIDTH:
            lines[first] = f"{line}  # {doc}\n"
        else:
            indent = line[: len(line) - len(line.lstrip())]
            lines.insert(first, _wrap(doc, f"{indent}# ", f"{indent}# ") + "\n")
    return "".join(lines)


def explain(key: str = "") -> str:
    """A setting's type, default and docstring; for a section its keys, with a sentence about each.

    Args:
        key: dotted, such as ``train.steps``, ``data.views`` or ``data.train.NAME.weight``, where any name will do;
            empty for the whole configuration.

    Raises:
        ConfigError: there is no such key; suggests another.
    """
    setting = _find(key)
    default = "" if setting.section is not None else default_of(setting)
    parts = [f"{key or 'settings'}: {kind_of(setting.hint)}{default and f', default {default}'}"]
    parts.append(_wrap(setting.doc, "    ", "    "))
    below = setting.children()
    if setting.named:
        below = [each for name in below for each in name.children()]
    if below:
        parts.append("")
    width = max((len(each.key) for each in below), default=0)
    for each in below:
        sentence = each.doc.partition(". ")[0].removesuffix(".") + "."
        if each.section is None and (default := default_of(each)):
            sentence += f" Default: {default}"
        parts.append(_wrap(sentence, f"{each.key:{width}}  ", " " * (width + 2)))
    return "\n".join(parts) + "\n"


def differences(before: Config | str, now: Config) -> list[str]:
    """What has changed: a line for each setting, such as ``train.steps: 100 then, 200 now``.

    A setting that one of the two lacks, since another version of the program wrote it, counts as being at its default.

    Args:
        before: a configuration, or the text of a saved config.yaml.
        now: what it is compared with.

    Raises:
        ConfigError: ``before`` is no YAML of a mapping.
    """
    texts = [before if isinstance(before, str) else to_yaml(before), to_yaml(now)]
    given = [read_yaml(io.StringIO(text), "the earlier configuration") for text in texts]
    then, later = (OmegaConf.to_container(each, resolve=False) for each in given)
    return list(_differences(then, later, _root()))


def flow(value: Any) -> str:
    """A plain value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1_000_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _root() -> Setting:
    return Setting("", Config, _defaults(Config), _class_doc(Config))


def _find(key: str) -> Setting:
    found = _root()
    for name in key.split(".") if key else ():
        child = found.child(name)
        if child is None:
            known = list(all_keys(OmegaConf.structured(Config)))
            raise ConfigError(f"unknown key {key!r}{suggestion(key, known)}")
        found = child
    return found


def _defaults(cls: Any) -> Any:
    """The defaults of a dataclass as plain values; None for other types."""
    return OmegaConf.to_container(OmegaConf.structured(cls)) if is_dataclass(cls) else None


def _class_doc(cls: Any) -> str:
    return " ".join((inspect.getdoc(cls) or "").split()) if is_dataclass(cls) else ""


def default_of(setting: Setting) -> str:
    """As YAML; empty if there is none."""
    none = setting.default is None and NoneType not in get_args(setting.hint)
    return "" if none else flow(setting.default)


def kind_of(hint: Any) -> str:
    """A type in words."""
    parts = get_args(hint)
    if get_origin(hint) is dict:
        return f"{kind_of(parts[1])} for each name of your choice"
    if get_origin(hint) is list:
        return f"list of {kind_of(parts[0])}"
    if parts:
        return " or ".join(kind_of(part) for part in parts)
    if hint is NoneType:
        return "null"
    return "section" if is_dataclass(hint) else str(hint.__name__)


def _places(node: Any, setting: Setting) -> Iterator[tuple[int, int, str]]:
    """First and last line of each setting in a YAML mapping, numbered from 0, and its docstring; in order."""
    for name, value in node.value:
        child = setting.child(name.value)
        if child is None:
            continue
        nested = isinstance(value, yaml.MappingNode) and bool(value.value)
        if not setting.named:  # a name of the user's choice explains itself
            first = name.start_mark.line
            yield first, first if nested else value.end_mark.line, child.doc
        if nested:
            yield from _places(value, child)


def _differences(then: Any, now: Any, setting: Setting) -> Iterator[str]:
    """Lines about two mappings of what stands below ``setting``."""
    for name in [*now, *(name for name in then if name not in now)]:
        child = setting.child(str(name))
        default = _ABSENT if child is None or setting.named else child.default
        old, new = then.get(name, default), now.get(name, default)
        if child is not None and isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(then.get(name, {}), now.get(name, {}), child)
        elif old != new:
            key = f"{setting.key}.{name}" if setting.key else name
            yield f"{key}: {_shown(name, then)} then, {_shown(name, now)} now"


def _shown(name: Any, given: Any) -> str:
    return flow(given[name]) if name in given else "not there"


def _wrap(text: str, first: str, others: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )
