"""Names of models, without a network."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from forks import forks
from formats import TINY, again, random_folder, tokenizer_file
from golden_set import GOLDEN
from hub_server import Hub
from huggingface_hub import constants

from openelm_mlx.cli import main
from openelm_mlx.convert.tokenizers import assemble
from openelm_mlx.device import mx
from openelm_mlx.engine.hub import BUNDLED, MIRRORS, SHORT_NAMES, resolve_model
from openelm_mlx.errors import HubError
from openelm_mlx.model.config import expected_tensors


def test_names_and_suggestions(nano: Path) -> None:
    assert SHORT_NAMES["1.1b-instruct"] == "apple/OpenELM-1_1B-Instruct" and len(SHORT_NAMES) == 8
    assert resolve_model("openelm-tiny").folder == BUNDLED
    assert resolve_model(str(nano)).folder == nano
    with pytest.raises(HubError, match="did you mean .*270m"):
        resolve_model("270n")
    with pytest.raises(HubError, match="^unknown model 'wizard'; a model is a folder, "):
        resolve_model("wizard")


def test_a_name_that_cannot_be_one_is_told_without_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("270m").symlink_to("gone")
    with pytest.raises(
        HubError, match="there is no file or folder 270m behind this link; a model is"
    ):
        resolve_model("270m")
    for name in ("apple/OpenELM.", "apple/OpenELM.git", "a" * 97 + "/b"):
        with pytest.raises(
            HubError,
            match=rf"{re.escape(name)} is not an id of the hub \(owner/name\): Repo.id .*; check",
        ):
            resolve_model(name)


SHA = hashlib.sha256(b"the tokenizer").hexdigest()
MODEL = {
    "config.json": b'{"model_type": "openelm"}',
    "model.safetensors": b"w" * 3_000_000,
    "modeling_openelm.py": b"x",
}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    modules = "huggingface_hub._snapshot_download", "openelm_mlx.convert.pipeline"
    with forks(tmp_path_factory.mktemp("forks"), *modules) as found:
        yield found


@pytest.fixture
def hub():
    served = Hub({"apple/OpenELM-270M": MODEL, MIRRORS[0]: {"tokenizer.model": b"the tokenizer"}})
    yield served
    served.server.shutdown()
    served.server.server_close()


def resolve(processes, url, home, name="270m", sha=SHA, **environ):
    """In a process of its own: huggingface_hub reads its addresses when it is imported."""
    code = (
        f"from openelm_mlx.engine import hub\nhub.TOKENIZER_SHA256 = {sha!r}\n"
        f"try:\n    r = hub.resolve_model({name!r})\n"
        "    print(sorted(p.name for p in r.folder.iterdir()), r.tokenizer.read_bytes(), "
        "(r.folder / 'model.safetensors').stat().st_size)\n"
        "except hub.HubError as e:\n    print('HubError:', e)\n"
    )
    settings = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    result = processes.run(code, (), os.environ | settings | environ)
    return result.stdout.strip().splitlines()[-1] if result.stdout.strip() else result.stderr


EXPECTED = "['config.json', 'model.safetensors'] b'the tokenizer' 3000000"


def test_download_then_offline(processes, hub, tmp_path):
    assert resolve(processes, hub.url, tmp_path) == EXPECTED  # and no code from the repository
    assert resolve(processes, hub.url, tmp_path, HF_HUB_OFFLINE="1") == EXPECTED
    assert "HubError" in resolve(processes, hub.url, tmp_path / "empty", HF_HUB_OFFLINE="1")


def test_a_cut_download_goes_on_where_it_stopped(processes, hub, tmp_path):
    hub.files["apple/OpenELM-270M"] = MODEL | {
        "model.safetensors": b"w" * 30_000_000
    }  # the hub's client writes 10 MB at once
    hub.cut.add("model.safetensors")
    expected = EXPECTED.replace("3000000", "30000000")
    first = resolve(processes, hub.url, tmp_path)
    assert first == expected or "HubError" in first
    assert resolve(processes, hub.url, tmp_path) == expected
    assert any(path.endswith("model.safetensors") and begin for _, path, begin in hub.log)


def test_a_wrong_tokenizer_is_refused(processes, hub, tmp_path):
    assert (
        "HubError" in (said := resolve(processes, hub.url, tmp_path, sha="0" * 64))
        and "tokenizer" in said
    )


REFUSALS = {  # repo -> HTTP status, the hub's code, what is said of it
    "x/gated": (
        403,
        "GatedRepo",
        r"x/gated is gated \(HTTP 403\): accept its terms at http://127.*/x/gated, then log in",
    ),
    "x/private": (
        401,
        "RepoNotFound",
        r"x/private is private, gated or does not exist \(HTTP 401\); check the id or log in",
    ),
    "x/missing": (
        404,
        "RepoNotFound",
        r"x/missing was not found on the hub \(HTTP 404\); check the spelling",
    ),
    "x/limited": (
        429,
        "",
        r"the hub limits how often it may be asked \(HTTP 429\); wait some minutes, or log in",
    ),
    "x/broken": (500, "", r"http://127.* answered with HTTP 500 for x/broken; try again later"),
    "apple/OpenELM-270M#last": (
        404,
        "",
        r"apple/OpenELM-270M has no revision 'last' on the hub \(HTTP 404\)",
    ),
}


def messages(processes, url, home, *names, sha=SHA, largest_file=-1, **environ):
    """What is said of each name, which may end with #REVISION, by one process; the last line is the
    seconds it took.
    """
    code = (
        f"import sys, time, resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest_file}, {largest_file}))\n"
        f"from openelm_mlx.engine import hub\nhub.TOKENIZER_SHA256 = {sha!r}\n"
        "from openelm_mlx.engine.hub import resolve_model\n"
        "from openelm_mlx.errors import OpenELMError\n"
        "import huggingface_hub\nstart = time.monotonic()\n"
        "for name in sys.argv[1:]:\n    name, _, revision = name.partition('#')\n"
        "    try:\n        print(resolve_model(name, revision or None).folder)\n"
        "    except OpenELMError as error:\n        print(error)\nprint(time.monotonic() - start)"
    )
    settings = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "OPENELM_CACHE": str(home / "ours"),
    }
    ran = processes.run(code, names, os.environ | settings | environ)
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout.splitlines()
    assert len(said) == len(names) + 1 and "Error" not in ran.stdout
    return said


def test_refusals_name_their_cause(processes, hub, tmp_path):
    hub.status.update({repo: (status, code) for repo, (status, code, _) in REFUSALS.items()})
    hub.files["x/no-weights"] = {"config.json": b"{}"}
    said = messages(processes, hub.url, tmp_path, *REFUSALS, "x/no-weights")
    for line, (_, _, wanted) in zip(said, REFUSALS.values(), strict=False):
        assert re.match(wanted, line), line
    assert said[-2].startswith("x/no-weights has no weights on the hub (safetensors, .gguf, .pt or")


def test_a_hub_that_cannot_be_reached_is_told_at_once(processes, hub, tmp_path):
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))  # and does not listen
    url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    here, tokenizer, seconds = messages(processes, url, tmp_path, "x/y", "corenet:270m")
    assert re.match(
        rf"x/y is not on this disk and {url} \(HF_ENDPOINT\) cannot be reached \(.*refused\);",
        here,
    )
    assert tokenizer.startswith(
        f"no mirror gave the tokenizer ({MIRRORS[0]} is not on this disk and {url} "
    )
    assert tokenizer.endswith("; give one with --tokenizer")
    assert MIRRORS[1] not in tokenizer and float(seconds) < 10
    assert (
        "not on this disk, and HF_HUB_OFFLINE is set; unset it"
        in messages(processes, hub.url, tmp_path, "x/y", HF_HUB_OFFLINE="1")[0]
    )
    assert hub.log == []


def test_a_disk_that_is_full_and_a_cache_that_cannot_be_written(processes, hub, tmp_path):
    """A limit on the size of files stands in for a full disk."""
    hub.files["x/y"] = MODEL
    said = messages(processes, hub.url, tmp_path / "a", "x/y", largest_file=1_000_000)[0]
    assert (
        said == "the disk is full while fetching x/y; "
        "free some space and run the same command, it resumes"
    )
    (tmp_path / "file").write_text("")
    said = messages(processes, hub.url, tmp_path / "file", "x/y")[0]
    assert said.endswith(
        "cannot be written, so x/y cannot be fetched; set HF_HUB_CACHE to another folder"
    )


def test_a_checkpoint_with_llamas_vocabulary_gets_llamas_tokenizer(
    processes, hub, tmp_path, capsys, monkeypatch
):
    """As a model and for convert; the offline switch is told where it is in the way."""
    folder, pieces = tmp_path / "m", ["<unk>", "<s>", "</s>", *(f"piece{n}" for n in range(31997))]
    tokenizer = assemble(folder, pieces, [0.0] * 32000, [2, 3, 3] + [1] * 31997).data
    hub.files[MIRRORS[0]] = {"tokenizer.model": tokenizer}
    random_folder(folder)
    config = replace(TINY, vocab_size=32000)
    arrays = {name: mx.zeros(shape) for name, shape in expected_tensors(config).items()}
    mx.save_safetensors(str(folder / "weights.safetensors"), arrays)
    (folder / "config.json").write_text(json.dumps(config.to_hf_dict()))
    for name in ("tokenizer.model", "model.safetensors"):
        (folder / name).unlink()
    sha = hashlib.sha256(tokenizer).hexdigest()
    assert "HF_HUB_OFFLINE is set" in (
        said := messages(processes, hub.url, tmp_path, str(folder), HF_HUB_OFFLINE="1", sha=sha)[0]
    )
    assert said.startswith(
        f"there is no tokenizer beside {folder}, and no mirror gave the tokenizer ("
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["convert", str(folder), "-o", str(tmp_path / "x")]) == 2
    assert said.split(" (")[0] in capsys.readouterr().err
    made = Path(messages(processes, hub.url, tmp_path, str(folder), sha=sha)[0])
    assert (
        made.parent == tmp_path / "ours" / "converted"
        and (made / "tokenizer.model").read_bytes() == tokenizer
    )
    assert messages(processes, hub.url, tmp_path, str(folder), HF_HUB_OFFLINE="1", sha=sha)[
        0
    ] == str(made)


def test_a_repository_without_safetensors(processes, hub, tmp_path):
    """A GGUF file or a checkpoint is converted; of several GGUF files none is fetched."""
    small, gguf = GOLDEN / "tied-gqa4", tmp_path / "m.gguf"
    tokenizer = tokenizer_file(tmp_path).read_bytes()
    again(small / "checkpoint.pt", gguf, tokenizer=tmp_path / "tokenizer.model")
    torch = {"tokenizer.model": tokenizer, "c.yaml": (small / "config.yaml").read_bytes()}
    hub.files = {
        "x/gguf": {"m.gguf": gguf.read_bytes(), "old/m.pt": b"x"},
        "x/torch": {"m.bin": (small / "checkpoint.pt").read_bytes()} | torch,
        "x/several": {"a.gguf": b"GGUF", "b.gguf": b"GGUF"},
        "x/both": MODEL | {"b.gguf": b"GGUF", "original/model.safetensors": b"w"},
    }
    said = messages(processes, hub.url, tmp_path, *hub.files)
    for line in said[:2]:
        assert Path(line).parent == tmp_path / "ours" / "converted"
    assert said[2] == (
        "x/several has 2 .gguf files on the hub (a.gguf, b.gguf); fetch one with `hf download "
        "x/several FILE`, and give its path"
    )
    assert sorted(path.name for path in Path(said[3]).iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    fetched = {path for method, path, _ in hub.log if method == "GET" and "resolve" in path}
    assert not any(path.endswith(("a.gguf", "b.gguf", "m.pt")) for path in fetched)
    assert messages(processes, hub.url, tmp_path, "x/gguf", HF_HUB_OFFLINE="1")[0] == said[0]


def test_a_certificate_that_nobody_trusts(processes, tmp_path):
    served = Hub({}, tls=True)
    try:
        said = messages(processes, served.url, tmp_path, "x/y")[0]
    finally:
        served.server.shutdown()
        served.server.server_close()
    assert said.startswith(
        f"the certificate of {served.url} cannot be verified, so x/y was not fetched; behind a "
        "proxy"
    )
    assert "SSL_CERT_FILE" in said


def test_a_model_that_is_here_in_part(processes, hub, tmp_path):
    """The largest file is lost, as when a download was ended; what is missing for nobody's use does
    no harm.
    """
    files = hub.files["x/y"] = MODEL | {"tokenizer.model": b"the tokenizer", "LICENSE": b"free"}
    folder = Path(messages(processes, hub.url, tmp_path, "x/y")[0])
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        files.keys() - {"modeling_openelm.py"}
    )
    (folder / "LICENSE").unlink()
    assert messages(processes, hub.url, tmp_path, "x/y", HF_HUB_OFFLINE="1")[0] == str(folder)
    (folder / "model.safetensors").unlink()
    said = messages(processes, hub.url, tmp_path, "x/y", HF_HUB_OFFLINE="1")[0]
    assert re.match(
        r"x/y is on this disk in part only, and HF_HUB_OFFLINE is set; run the same command with",
        said,
    )
    assert said.endswith("or `openelm models remove x/y`")
    assert (
        messages(processes, hub.url, tmp_path, "x/y")[0] == str(folder)
        and (folder / "model.safetensors").is_file()
    )


def test_names_are_checked_before_anything_is_fetched(processes, hub, tmp_path, capsys):
    names = ("corenet:270mm", "270m@last", "owner/na me", "a/..b")
    assert all("x/" not in line for line in messages(processes, hub.url, tmp_path, *names))
    assert hub.log == []
    assert main(["convert", "corenet:270mm", "-o", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "did you mean corenet:270m," in said
        and "`openelm models` lists all names" in said
    )


def test_a_folder_of_that_name_is_hinted_at(processes, hub, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert messages(processes, hub.url, tmp_path, "models/270m")[0].endswith(
        "; there is no folder models/270m here either"
    )
