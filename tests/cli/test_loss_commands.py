"""`openelm perplexity` and `openelm compare`: figures in Python and on the command line, the losses
that a conversion has, and one line for what cannot be read.
"""

from __future__ import annotations

import json

import pytest
from formats import again

from openelm_mlx import files
from openelm_mlx.cli import build_parser, compare, main
from openelm_mlx.cli import perplexity as perplexity_command
from openelm_mlx.evaluate import perplexity
from openelm_mlx.evaluate.perplexity import TextOptions, text_perplexity

TEXT = "Once upon a time there was a fox. " * 5


@pytest.fixture
def letter(tmp_path):
    path = tmp_path / "letter.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def told(capsys, *words):
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_perplexity_of_files_and_of_stdin(tiny, letter, stdin, capsys):
    stdin(b"\xe6\xb0\xb4\r\n")
    options = ["--context", "24", "--stride", "9", "--batch-tokens", "50"]
    found = told(capsys, "perplexity", "--text", letter, "--text", "-", *options)
    same = text_perplexity(tiny, [TEXT, "\u6c34\r\n"], TextOptions(24, 9, 50))
    assert found.pop("intervals_95") == {} and found.pop("dtype") == "float32"
    assert found.pop("model") == "openelm-tiny" and found.pop("texts") == [str(letter), "-"]
    assert (found.pop("context"), found.pop("stride")) == (24, 9)
    assert found == {name: getattr(same, name) for name in found}
    assert set(found) == {"tokens", "bytes", "windows", "nats_per_token", "perplexity"} | {
        "bits_per_byte"
    }
    assert main(["perplexity", "openelm-tiny", "--text", str(letter), *options]) == 0
    out, err = capsys.readouterr()
    first, second, *lines = out.splitlines()
    assert first == f"openelm-tiny on {letter}"
    assert second == "windows of 24 tokens, 9 apart, computed in float32"
    assert lines[0] == "tokens: 46" and lines[1] == f"bytes: {len(TEXT)}" and err == ""
    assert lines[4].startswith("perplexity: ") and len(lines) == 6


def test_a_stopped_perplexity_goes_on_and_leaves_nothing(letter, capsys, tmp_path, monkeypatch):
    words = ["perplexity", "--text", str(letter), "--context", "24", "--batch-tokens", "24"]
    whole = told(capsys, *words)
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "cache"))
    told_of = []

    class Stopping(perplexity_command.Progress):
        def __call__(self, answered, of, tokens, most):
            told_of.append((answered, of))
            super().__call__(answered, of, tokens, most)
            self.stop.asked = len(told_of) == 2  # as Ctrl-C after the first pass

    monkeypatch.setattr(perplexity_command, "Progress", Stopping)
    assert main(words) == 130
    said = f"stopped: openelm-tiny: {told_of[-1][0]} of {told_of[-1][1]} parts; the same command"
    assert capsys.readouterr().err.startswith(said) and len(told_of) == 3
    kept = tmp_path / "cache" / "answers"
    assert [*kept.glob("*.sqlite")]
    assert told(capsys, *words) == whole and told_of[3] == told_of[2]
    assert [*kept.iterdir()] == []


def test_a_comparison_has_the_losses_of_the_conversion(nano, letter, capsys, tmp_path):
    written = tmp_path / "m"
    again(nano, written, bits=3, verify_text=letter)
    losses = json.loads((written / "conversion.json").read_text())["verification"]
    losses["reference_perplexity"] = losses.pop("perplexity_of_source")
    found = told(capsys, "compare", nano, written, "--text", letter)
    assert found.pop("intervals_95") == losses.pop("intervals_95") == {}
    ratio = found["perplexity"] / found["reference_perplexity"]
    assert found["perplexity_ratio"] == pytest.approx(ratio) and abs(ratio - 1) > 1e-3
    assert found["mean_kl_divergence"] > 0.001
    assert {name: found.pop(name) for name in losses} == pytest.approx(losses, rel=1e-3, abs=1e-5)
    assert found == {
        "reference": str(nano),
        "model": str(written),
        "texts": [str(letter)],
        "context": 512,
        "dtype": "float32",
        "reference_dtype": "float32",
    }
    rounded = told(capsys, "compare", nano, nano, "--bits", "3", "--text", letter)
    assert rounded["mean_kl_divergence"] == pytest.approx(losses["mean_kl_divergence"], rel=1e-3)


def test_models_are_compared_in_float32_unless_a_type_is_asked_for(nano, letter, capsys):
    words = ["compare", "a", "b"]
    assert build_parser().parse_args(words).dtype == "float32"
    same = told(capsys, "compare", nano, nano, "--text", letter, "--dtype", "bfloat16")
    assert same["dtype"] == same["reference_dtype"] == "bfloat16"
    assert same["mean_kl_divergence"] == 0 and same["top_1_agreement"] == 1


def test_the_text_of_the_package_is_read_where_none_is_given(nano, letter, capsys, monkeypatch):
    monkeypatch.setattr(perplexity, "TEXT", letter)
    assert main(["compare", str(nano), str(nano), "--context", "16"]) == 0
    first, second, *lines = capsys.readouterr().out.splitlines()
    text = "eight paragraphs of Darwin's Origin of Species (1859)"
    assert first == f"{nano} against {nano} on {text}"
    assert second == "windows of 16 tokens, computed in float32"
    assert lines[:4] == [
        "tokens: 46",
        "mean KL divergence: 0",
        "99th percentile of KL divergence: 0",
        "agreement of the likeliest token: 1",
    ]
    assert lines[6:] == ["perplexity ratio: 1", "max logit difference: 0"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot be read: No such file or directory; give a text file"),
        (b"", "is empty; give a text of one character or more"),
        (b"caf\xe9", "cannot be read as UTF-8 text: byte 3 is not UTF-8; convert it, for example"),
        (b"\0" * 9, "is not text; give a file of text"),
        ("folder", "cannot be read: Is a directory; give a text file"),
    ],
)
@pytest.mark.parametrize("words", [["perplexity", "no-model"], ["compare", "no-model", "no-model"]])
def test_what_is_no_text_is_one_line_before_a_model_is_sought(
    words, content, text, tmp_path, capsys
):
    path = tmp_path / "text"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert main([*words, "--text", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"openelm: --text {path} {text}")


def test_a_text_without_an_end_is_read_in_part(stdin, letter, capsys, monkeypatch):
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 1 << 20)
    for name in ("-", "/dev/zero"):
        stdin(b"a" * ((1 << 20) + 9))
        assert main(["perplexity", "no-model", "--text", name]) == 2
        said = f"openelm: --text {name} has more than 1 MiB; give a part of it\n"
        assert capsys.readouterr().err == said


def test_both_models_are_found_before_one_is_loaded(letter, capsys, monkeypatch):
    monkeypatch.setattr(compare, "load_beside", lambda name, args: pytest.fail(name))
    assert main(["compare", "openelm-tiny", "no-model", "--text", str(letter)]) == 2
    assert capsys.readouterr().err.startswith("openelm: unknown model 'no-model'")


def test_other_mistakes_are_one_line(stdin, letter, capsys):
    stdin(b"caf\xe9")
    for words, text in (
        (["--text", "-"], "the text is not valid UTF-8: character 4"),
        (["--text", letter, "--text", letter], f"--text {letter} is given twice; give it once"),
        (["--text", letter, "--context", "2000"], "context is 2000, but openelm-tiny has a context "
         "of 1024 tokens; allowed is a whole number from 2 to 1024"),
        (["--text", ""], "--text is empty; give the name of a file, or - for stdin"),
        (["--context", "1"], "context is 1; allowed is a whole number from 2 up, or None"),
    ):  # fmt: skip
        assert main(["perplexity", *map(str, words)]) == 2
        err = capsys.readouterr().err
        assert text in err and err.count("\n") == 1


def test_a_conversion_says_on_which_text_it_was_verified(nano, letter, capsys, tmp_path):
    words = ["convert", nano, "-o", tmp_path / "m", "--bits", "3", "--verify-text", letter]
    assert main([*map(str, words), "--verify"]) == 0
    out = capsys.readouterr().out
    assert f"\nagainst the source on {letter}:\ntokens: " in out
    assert "\nmean KL divergence: " in out and "\nperplexity of the source: " in out
