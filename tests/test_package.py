"""What `import openelm_mlx` gives, and what it does not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import openelm_mlx
from openelm_mlx.engine import conversation, prompts
from openelm_mlx.model import config


def test_every_public_name_is_there_and_listed_everywhere():
    for name in openelm_mlx.__all__:
        value = getattr(openelm_mlx, name)
        assert value.__module__ == f"openelm_mlx.{openelm_mlx._HOME[name]}"
    tree = ast.parse(Path(openelm_mlx.__file__).read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("openelm_mlx.")
        for alias in node.names
    }
    assert typed == {name: f"openelm_mlx.{home}" for name, home in openelm_mlx._HOME.items()}
    assert sorted(openelm_mlx.__all__) == sorted(openelm_mlx._HOME)
    assert {*openelm_mlx.__all__, "chat", "config", "convert", "errors"} <= set(dir(openelm_mlx))


def test_chat_is_a_module_of_its_own():
    from openelm_mlx.chat import encode_messages

    assert openelm_mlx.chat.encode_messages is encode_messages is prompts.encode_messages
    assert openelm_mlx.chat.Conversation is conversation.Conversation


def test_modules_are_attributes():
    code = "import openelm_mlx as o; "
    code += "print(o.config.OpenELMConfig, o.errors, o.chat, o.convert.convert)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "openelm_mlx.model.config.OpenELMConfig" in run.stdout
    assert openelm_mlx.config is config
    with pytest.raises(AttributeError, match="'openelm_mlx' has no attribute 'nothing'"):
        _ = openelm_mlx.nothing


HEAVY = ("mlx", "numpy", "mlx_lm", "huggingface_hub", "llguidance", "pydantic", "matplotlib")
HEAVY += ("tempfile", "difflib", "rich", "multiprocessing", "asyncio", "lm_eval", "sqlite3")


@pytest.mark.parametrize("module", ["openelm_mlx", "openelm_mlx.cli"])
def test_the_command_line_starts_without_what_takes_long_to_import(module: str):
    code = f"import sys, {module} as m; getattr(m, 'build_parser', int)(); "
    code += f"print(*(set({HEAVY}) & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_a_model_loads_without_what_only_doctor_needs():
    code = "import openelm_mlx.engine.loading, sys; print('importlib.metadata' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
