"""The licence that a source names reaches its conversion, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from formats import again, random_folder

HUB_CARD = """---
license: apple-amlr
license_name: 'apple-sample-code-license'
license_link: LICENSE
tags:
- text
---
license: mit
"""
APPLE = {
    "license": "apple-amlr",
    "license_name": "apple-sample-code-license",
    "license_link": "LICENSE",
}
CORENET_LINK = "https://github.com/apple/corenet/blob/main/LICENSE"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return random_folder(tmp_path / "source")


def checked_terms(folder: Path) -> dict[str, str]:
    """The entries of the card that name a licence; the record says the same."""
    import yaml

    front, card = (folder / "README.md").read_text().split("---\n")[1:3]
    entries = yaml.safe_load(front)
    assert (
        entries["library_name"] == "mlx"
        and entries["tags"] == ["mlx", "openelm"]
        and "# OpenELM" in card
    )
    found = {key: value for key, value in entries.items() if key.startswith("license")}
    assert json.loads((folder / "conversion.json").read_text()).get("license", {}) == found
    return found


def test_licence_and_card_of_a_folder_go_along_twice(tmp_path, source):
    (source / "README.md").write_text(HUB_CARD)
    (source / "LICENSE").write_text("Apple's text")
    (source / "LICENSE.weights").write_bytes(b"\xff\r\n")
    first = again(source, tmp_path / "first")
    second = again(first, tmp_path / "second", bits=4, group_size=32)
    for folder in (first, second):
        assert checked_terms(folder) == APPLE
        assert (folder / "LICENSE").read_text() == "Apple's text"
        assert (folder / "LICENSE.weights").read_bytes() == b"\xff\r\n"


def test_a_link_to_a_file_that_is_not_there_is_left_out(tmp_path, source):
    (source / "README.md").write_text(HUB_CARD)
    found = checked_terms(again(source, tmp_path / "m"))
    assert found == {key: APPLE[key] for key in ("license", "license_name")}
    assert not list((tmp_path / "m").glob("LICENSE*"))


@pytest.mark.parametrize(
    ("name", "license_", "link"),
    [
        ("270m", "apple-amlr", "https://huggingface.co/apple/OpenELM-270M/blob/main/LICENSE"),
        (
            "apple/OpenELM-3B",
            "apple-amlr",
            "https://huggingface.co/apple/OpenELM-3B/blob/main/LICENSE",
        ),
        ("corenet:270m@100k", "other", CORENET_LINK),
        ("corenet-mlx:450m-4bit", "other", CORENET_LINK),
    ],
)
def test_a_source_without_a_card_is_known_by_apples_names(tmp_path, source, name, license_, link):
    found = checked_terms(again(source, tmp_path / "m", source_name=name))
    assert found == APPLE | {"license": license_, "license_link": link}


@pytest.mark.parametrize("name", ["someone/OpenELM-270M", None])
def test_of_other_sources_nothing_is_made_up(tmp_path, source, name):
    assert checked_terms(again(source, tmp_path / "m", source_name=name)) == {}


@pytest.mark.parametrize(
    "card",
    [
        "",
        "---\nlicense: mit",
        "license: mit\n",
        "---\nlicense:\n- a\nlicense_name: #\n---\n",
        "\xff",
    ],
)
def test_a_card_that_names_no_licence(tmp_path, source, card):
    (source / "README.md").write_text(card, encoding="latin-1")
    assert checked_terms(again(source, tmp_path / "m")) == {}


def test_licences_in_gguf_metadata(tmp_path, source):
    import gguf

    (source / "README.md").write_text(
        HUB_CARD.replace(": LICENSE", ": https://example.org/LICENSE")
    )
    again(source, tmp_path / "x.gguf", target_format="gguf")
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    keys = gguf.Keys.General
    names = {
        "license": keys.LICENSE,
        "license_name": keys.LICENSE_NAME,
        "license_link": keys.LICENSE_LINK,
    }
    found = {name: fields[key].contents() for name, key in names.items()}
    assert found == APPLE | {"license_link": "https://example.org/LICENSE"}
    assert checked_terms(again(tmp_path / "x.gguf", tmp_path / "m")) == found
    (source / "README.md").write_text(HUB_CARD)
    (source / "LICENSE").write_text("Apple's text")
    again(source, tmp_path / "y.gguf", target_format="gguf")
    assert (
        keys.LICENSE_LINK not in gguf.GGUFReader(tmp_path / "y.gguf").fields
    )  # a file's name means nothing there


def test_the_bundled_models_licence_is_the_projects(tmp_path):
    from openelm_mlx.engine.hub import BUNDLED

    assert checked_terms(again(BUNDLED, tmp_path / "m")) == {"license": "mit"}
