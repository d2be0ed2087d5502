"""A Griffe extension for the Python API page: help texts of options, and examples as code."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from typing import Any

from griffe import Attribute, Class, Docstring, Extension, Object

EXAMPLE = re.compile(r"(?m)(^(?:>>>|\.\.\.)(?: .*)?\n?)+")


class ApiDocs(Extension):
    """Describes option fields with their help text, and fences examples that start with `>>>`."""

    def on_class(self, *, cls: Class, **kwargs: Any) -> None:
        """Give each field that is an option its help text, and its default as value."""
        if not cls.name.endswith("Options"):
            return
        options = getattr(import_module(cls.module.path), cls.name)
        for item in fields(options) if is_dataclass(options) else ():
            attribute = cls.members.get(item.name)
            if "help" in item.metadata and isinstance(attribute, Attribute):
                attribute.docstring = Docstring(item.metadata["help"], parent=attribute)
                attribute.value = None if item.default is MISSING else repr(item.default)
                attribute.labels.clear()

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Turn each example of a docstring into a block of Python."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)


def fenced(match: re.Match[str]) -> str:
    lines = [re.sub(r"^(>>>|\.\.\.) ?", "", line) for line in match[0].splitlines()]
    return "\n".join(["```python", *lines, "```", ""])
