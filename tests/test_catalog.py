from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from formats import GOLDEN, NANO
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.catalog import CATALOG, ROOT, cache_folder, fetch_published, is_published
from openelm_mlx.convert.download import ATTEMPTS, fetch

from openelm_mlx.errors import HubError

BODY = os.urandom(700_000)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves bytes with ranges and an ETag; `server.behave` may do anything else first (returns whether it did)."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        self.close_connection = True
        if server.behave(self, len(server.requests)):
            return
        body = server.files.get(self.path)
        if body is None:
            self.send_error(404)
        else:
            self.answer(body)

    def answer(self, body, sent=None, length=None, tag=None, cut_headers=False):
        tag = tag or '"' + hashlib.sha256(body).hexdigest()[:8] + '"'
        begin = 0
        if (wanted := self.headers.get("Range")) and self.headers.get("If-Range") == tag:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if begin and begin >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(length if length is not None else len(body) - begin))
        if not cut_headers:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(body[begin:] if sent is None else body[begin : begin + sent])

    def log_message(self, *args):
        pass


@contextmanager
def serving(files, behave=lambda handler, number: False):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.behave, server.requests, server.daemon_threads = files, behave, [], True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def get(server, tmp_path, **fields):
    return fetch(server.url + "/f", tmp_path / "f", wait=lambda seconds: None, timeout=5, **fields)


def only_the_file(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir()) == ["f", "f.record.json"]


def test_a_plain_download_is_recorded_and_not_repeated(tmp_path):
    seen = []
    with serving({"/f": BODY}) as server:
        assert get(server, tmp_path, progress=lambda *step: seen.append(step)).read_bytes() == BODY
        assert get(server, tmp_path).read_bytes() == BODY
        assert len(server.requests) == 1
    assert seen[-1] == (len(BODY), len(BODY), "f") and only_the_file(tmp_path)
    record = json.loads((tmp_path / "f.record.json").read_text())
    assert (record["size"], record["sha256"]) == (len(BODY), hashlib.sha256(BODY).hexdigest())


def test_a_cut_connection_goes_on_where_it_broke(tmp_path):
    def cut(handler, number):
        if number > 3:
            return False
        handler.answer(BODY, sent=100_000)
        return True

    with serving({"/f": BODY}, cut) as server:
        assert get(server, tmp_path).read_bytes() == BODY
        assert [wanted for _, wanted in server.requests] == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]
    assert only_the_file(tmp_path)


def test_a_stalled_connection_is_left_and_resumed(tmp_path):
    released = threading.Event()

    def stall(handler, number):
        if number > 1:
            return False
        handler.answer(BODY, sent=50_000)
        handler.wfile.flush()
        released.wait(10)
        return True

    with serving({"/f": BODY}, stall) as server:
        started = time.monotonic()
        fetch(server.url + "/f", tmp_path / "f", timeout=0.2, wait=lambda seconds: None)
        assert time.monotonic() - started < 5
        released.set()
        assert server.requests[1][1] == "bytes=50000-"
    assert (tmp_path / "f").read_bytes() == BODY


def test_a_killed_download_goes_on_in_the_next_run(tmp_path):
    def cut(handler, number):
        handler.answer(BODY, sent=100_000 if number == 1 else 0)
        return True

    with serving({"/f": BODY}, cut) as server:
        with pytest.raises(HubError, match="ended after 100000 of 700000 bytes; 100000 bytes are kept, and the same command"):
            get(server, tmp_path)
        assert len(server.requests) == 1 + ATTEMPTS
        server.behave, server.requests = lambda handler, number: False, []
        assert get(server, tmp_path).read_bytes() == BODY
        assert server.requests == [("/f", "bytes=100000-")]


def test_a_file_that_changed_meanwhile_starts_over(tmp_path):
    other = os.urandom(len(BODY))

    def replace(handler, number):
        if number > 1:
            return False
        handler.answer(BODY, sent=100_000)
        return True

    with serving({"/f": other}, replace) as server:
        assert get(server, tmp_path).read_bytes() == other


def test_a_server_without_ranges_or_tags_starts_over(tmp_path):
    def plain(handler, number):
        handler.answer(BODY, sent=100_000 if number == 1 else None, cut_headers=True)
        return True

    with serving({"/f": BODY}, plain) as server:
        assert get(server, tmp_path).read_bytes() == BODY
        assert [wanted for _, wanted in server.requests] == [None, None]


def test_a_length_that_is_too_long(tmp_path):
    def lie(handler, number):
        handler.answer(BODY, length=len(BODY) + 5 - (len(BODY) if handler.headers.get("Range") else 0), sent=len(BODY))
        return True

    with serving({"/f": BODY}, lie) as server, pytest.raises(HubError, match="ended after 700000 of 700005 bytes"):
        get(server, tmp_path)
    assert not (tmp_path / "f").exists()


def test_a_length_that_is_too_short_shows_in_the_file(tmp_path):
    checkpoint = (NANO / "checkpoint.pt").read_bytes()

    def lie(handler, number):
        handler.answer(checkpoint, length=1_000_000, sent=1_000_000)
        return True

    with serving({}, lie) as server, pytest.raises(HubError, match="_average.pt sent is not kept: .* is truncated"):
        fetch_published("corenet:270m", cache=tmp_path, root=server.url + "/")
    assert not list(tmp_path.rglob("checkpoint.pt")) and not list(tmp_path.rglob("*.record.json"))


def test_more_than_was_promised(tmp_path):
    def lie(handler, number):
        if number == 1:
            handler.answer(BODY, sent=100_000)
            return True
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 100000-699999/{len(BODY)}")
        handler.end_headers()
        handler.wfile.write(BODY)
        return True

    with serving({}, lie) as server, pytest.raises(HubError, match="sends more than the 700000 bytes it promised; not taken"):
        get(server, tmp_path)


def test_more_than_any_file_has(tmp_path):
    def lie(handler, number):
        handler.answer(b"x", length=1 << 60)
        return True

    with serving({}, lie) as server, pytest.raises(HubError, match="claims 1152921504606846976 bytes; no published file"):
        get(server, tmp_path)


def test_more_than_the_disk_holds(tmp_path):
    def big(handler, number):
        handler.answer(b"x", length=1 << 38)
        return True

    with serving({}, big) as server, pytest.raises(HubError, match=r"has \d+ bytes free; .* needs 274877906944 more"):
        get(server, tmp_path)


@pytest.mark.parametrize(
    ("place", "message"), [("file:///etc/passwd", "HTTP 302"),
                           ("ftp://127.0.0.1/f", "not a safe address"), ("/f", "infinite loop|HTTP 30")]
)  # fmt: skip
def test_redirects_that_are_refused(tmp_path, place, message):
    def redirect(handler, number):
        handler.send_response(302)
        handler.send_header("Location", place)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    with serving({}, redirect) as server, pytest.raises(HubError, match=message):
        get(server, tmp_path)
    assert not (tmp_path / "f").exists()


def test_a_redirect_is_followed_with_its_range(tmp_path):
    def redirect(handler, number):
        if handler.path == "/f":
            handler.send_response(302)
            handler.send_header("Location", "/elsewhere")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return True
        handler.answer(BODY, sent=100_000 if number == 2 else None)
        return True

    with serving({}, redirect) as server:
        assert get(server, tmp_path).read_bytes() == BODY
        assert server.requests[-1] == ("/elsewhere", "bytes=100000-")


def test_never_from_https_to_http():
    from urllib.request import Request

    from openelm_mlx.convert.download import SameScheme

    with pytest.raises(HubError, match="redirects to http://x/f, which is not a safe address; not followed"):
        SameScheme().redirect_request(Request("https://x/f"), None, 302, "", None, "http://x/f")


@pytest.mark.parametrize(("code", "requests"), [(404, 1), (403, 1), (503, ATTEMPTS)])
def test_answers_that_are_errors(tmp_path, code, requests):
    def fail(handler, number):
        handler.send_error(code)
        return True

    with serving({}, fail) as server:
        with pytest.raises(HubError, match=f"cannot fetch {server.url}/f: HTTP {code}"):
            get(server, tmp_path)
        assert len(server.requests) == requests


def test_a_part_longer_than_the_file_starts_over(tmp_path):
    with serving({"/f": BODY}) as server:
        (tmp_path / "f.part").write_bytes(BODY + b"more")
        tag = '"' + hashlib.sha256(BODY).hexdigest()[:8] + '"'
        (tmp_path / "f.part.json").write_text(json.dumps({"size": len(BODY), "tag": tag}))
        assert get(server, tmp_path).read_bytes() == BODY


def test_nobody_listens(tmp_path):
    with serving({}) as server:
        pass
    with pytest.raises(HubError, match="cannot fetch .*Connection refused.*; check the network, try again"):
        get(server, tmp_path)


def test_a_file_damaged_or_replaced_later_is_noticed(tmp_path):
    with serving({"/f": BODY}) as server:
        get(server, tmp_path)
        for damaged in (BODY[:-1], BODY[:-1] + bytes([BODY[-1] ^ 1])):
            (tmp_path / "f").write_bytes(damaged)
            with pytest.raises(HubError, match="is not the file that was downloaded first .* delete it, and the same command"):
                get(server, tmp_path)
        (tmp_path / "f").unlink()
        server.files["/f"] = BODY[:-1]
        with pytest.raises(HubError, match=r"is not the file it was: 699999 bytes .* delete .*f.record.json"):
            get(server, tmp_path)
        assert not (tmp_path / "f").exists()


def test_two_downloads_of_one_file(tmp_path):
    import fcntl

    with open(tmp_path / "f.part", "ab") as file, serving({"/f": BODY}) as server:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(HubError, match="is being downloaded by another process"):
            get(server, tmp_path)


# the catalog


def test_every_published_file_has_its_name():
    """apple/corenet: README-pretraining.md, README-peft.md and mlx_examples/open_elm/README.md."""
    addresses = {ROOT + path for entry in CATALOG.values() for path, _ in entry.files}
    base = "https://docs-assets.developer.apple.com/ml-research/models/corenet/v0.1.0/openelm/"
    for path in ("pretrained/270M/checkpoint_average.pt", "pretrained/1.1B/checkpoint_epoch_0_iter_49999.pt",
                 "pretrained/3B/checkpoint_epoch_0_iter_334999.pt", "peft/openelm_lora_1.1B.pt", "peft/openelm_dora_3B.pt",
                 "mlx/450M-4bit/weights.safetensors", "mlx/270M/config.json"):  # fmt: skip
        assert base + path in addresses
    assert {"corenet:270m", "corenet:1.1b-lora", "corenet-mlx:3b-4bit", "corenet:450m@350k"} <= CATALOG.keys()
    assert len(CATALOG) == 4 * (1 + 11 + 2 + 2)
    assert is_published("CoreNet:270M") and not is_published("apple/OpenELM-270M")


def test_a_name_apple_did_not_publish(tmp_path):
    with pytest.raises(HubError, match="'corenet:270m-lore' is nothing Apple published; did you mean corenet:270m-lora"):
        fetch_published("corenet:270m-lore", cache=tmp_path)


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("OPENELM_CACHE", "/x/y")
    assert cache_folder() == Path("/x/y")
    monkeypatch.delenv("OPENELM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/z")
    assert cache_folder() == Path("/z/openelm-mlx")


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match="cannot be written: .*; set OPENELM_CACHE to another folder"):
        fetch_published("corenet:270m", cache=tmp_path / "file")


def test_a_name_becomes_a_model_folder(tmp_path):
    """The LoRA checkpoint of the catalog, served from here: its YAML comes with it, alpha / r = 32 / 32."""
    from openelm_mlx.convert.adapters import AdaptedCheckpoint, LoraOptions
    from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint

    path = GOLDEN / "lora" / "checkpoint.pt"
    with serving({"/peft/openelm_lora_1.1B.pt": path.read_bytes()}) as server:
        source = fetch_published("corenet:1.1b-lora", cache=tmp_path, root=server.url + "/")
    assert source == tmp_path / "corenet-1.1b-lora" / "checkpoint.pt" and source.read_bytes() == path.read_bytes()
    yaml = source.with_name("config.yaml").read_text().replace("r: 32, lora_alpha: 32", "r: 8, lora_alpha: 8")
    source.with_name("config.yaml").write_text(yaml)
    adapted = AdaptedCheckpoint(TorchCheckpoint(source), LoraOptions(yaml=source.with_name("config.yaml")))
    assert {adapter.scale for adapter in adapted.adapters.values()} == {1.0}


def test_convert_by_name_on_the_command_line(tmp_path):
    """`openelm convert corenet:270m` in a process of its own, with Apple's server stood in for."""
    code = (
        "import sys; from openelm_mlx.convert import catalog; catalog.ROOT = sys.argv.pop(1)\n"
        "from openelm_mlx.cli.main import main; sys.exit(main())"
    )
    (tmp_path / "y.yaml").write_text((NANO / "config.yaml").read_text())
    command = [sys.executable, "-c", code]
    arguments = ["convert", "corenet:270m", "-o", tmp_path / "m", "--tokenizer", NANO / "tokenizer.model",
                 "--config", tmp_path / "y.yaml"]  # fmt: skip
    environment = {**os.environ, "OPENELM_CACHE": str(tmp_path / "cache")}
    with serving({"/pretrained/270M/checkpoint_average.pt": (NANO / "checkpoint.pt").read_bytes()}) as server:
        run = subprocess.run([*command, server.url + "/", *arguments], capture_output=True, text=True, env=environment)
        again = subprocess.run([*command, server.url + "/", *arguments], capture_output=True, text=True, env=environment)
        assert len(server.requests) == 1
    assert run.returncode == 0, run.stderr
    assert again.returncode == 2 and "exists; choose another folder, or replace it with --force" in again.stderr
    record = json.loads((tmp_path / "m" / "conversion.json").read_text())
    assert record["source"] == "corenet:270m" and record["command"].startswith("openelm convert corenet:270m -o m")
    convert(ConvertOptions(source=NANO / "checkpoint.pt", target=tmp_path / "same"))
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (tmp_path / "same" / "model.safetensors").read_bytes()
