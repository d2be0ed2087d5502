"""Names of models, without a network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub

from openelm_mlx.errors import HubError
from openelm_mlx.hub import BUNDLED, MIRRORS, SHORT_NAMES, resolve_model


def test_names_and_suggestions(nano: Path) -> None:
    assert SHORT_NAMES["1.1b-instruct"] == "apple/OpenELM-1_1B-Instruct" and len(SHORT_NAMES) == 8
    assert resolve_model("openelm-tiny").folder == BUNDLED
    assert resolve_model(str(nano)).folder == nano
    with pytest.raises(HubError, match="did you mean .*270m"):
        resolve_model("270n")


SHA = hashlib.sha256(b"the tokenizer").hexdigest()
MODEL = {"config.json": b'{"model_type": "openelm"}', "model.safetensors": b"w" * 3_000_000, "modeling_openelm.py": b"x"}


@pytest.fixture
def hub():
    served = Hub({"apple/OpenELM-270M": MODEL, MIRRORS[0]: {"tokenizer.model": b"the tokenizer"}})
    yield served
    served.server.shutdown()
    served.server.server_close()


def resolve(url, home, name="270m", sha=SHA, **environ):
    """In a process of its own: huggingface_hub reads its addresses when it is imported."""
    code = (f"from openelm_mlx import hub\nhub.TOKENIZER_SHA256 = {sha!r}\ntry:\n    r = hub.resolve_model({name!r})\n"
            "    print(sorted(p.name for p in r.folder.iterdir()), r.tokenizer.read_bytes(), "
            "(r.folder / 'model.safetensors').stat().st_size)\n"
            "except hub.HubError as e:\n    print('HubError:', e)\n")  # fmt: skip
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | settings | environ, capture_output=True, text=True,
                            timeout=60)  # fmt: skip
    return result.stdout.strip().splitlines()[-1] if result.stdout.strip() else result.stderr


EXPECTED = "['config.json', 'model.safetensors'] b'the tokenizer' 3000000"


def test_download_then_offline(hub, tmp_path):
    assert resolve(hub.url, tmp_path) == EXPECTED  # and no code from the repository
    assert resolve(hub.url, tmp_path, HF_HUB_OFFLINE="1") == EXPECTED
    assert "HubError" in resolve(hub.url, tmp_path / "empty", HF_HUB_OFFLINE="1")


def test_a_cut_download_goes_on_where_it_stopped(hub, tmp_path):
    hub.files["apple/OpenELM-270M"] = MODEL | {"model.safetensors": b"w" * 30_000_000}  # the hub's client writes 10 MB at once
    hub.cut.add("model.safetensors")
    expected = EXPECTED.replace("3000000", "30000000")
    first = resolve(hub.url, tmp_path)
    assert first == expected or "HubError" in first
    assert resolve(hub.url, tmp_path) == expected
    assert any(path.endswith("model.safetensors") and begin for _, path, begin in hub.log)


def test_a_wrong_tokenizer_is_refused(hub, tmp_path):
    assert "HubError" in (said := resolve(hub.url, tmp_path, sha="0" * 64)) and "tokenizer" in said


@pytest.mark.parametrize(("status", "word"), [((401, "GatedRepo"), "log in"), ((404, "RepoNotFound"), "check the spelling")])
def test_refusals_say_what_to_do(hub, tmp_path, status, word):
    hub.status["apple/OpenELM-270M"] = status
    assert "HubError" in (said := resolve(hub.url, tmp_path)) and word in said.lower()
