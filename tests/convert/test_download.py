"""A download goes on where it broke, is checked and recorded, and takes nothing a server should not
send.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading

import pytest
from hub_server import Hub
from range_server import serving

from openelm_mlx.convert.fetch.download import ATTEMPTS, fetch
from openelm_mlx.errors import HubError

BODY = os.urandom(700_000)


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
        assert [wanted for _, wanted in server.requests] == [
            None,
            "bytes=100000-",
            "bytes=200000-",
            "bytes=300000-",
        ]
    assert only_the_file(tmp_path)


def test_a_stalled_connection_is_left_and_resumed(tmp_path):
    released, given_up = threading.Event(), []

    def stall(handler, number):
        if number > 1:
            return False
        handler.answer(BODY, sent=50_000)
        handler.wfile.flush()
        if not released.wait(10):
            given_up.append(number)
        return True

    with serving({"/f": BODY}, stall) as server:
        fetch(server.url + "/f", tmp_path / "f", timeout=0.2, wait=lambda seconds: None)
        assert given_up == []  # it was the client that left
        released.set()
        assert server.requests[1][1] == "bytes=50000-"
    assert (tmp_path / "f").read_bytes() == BODY


def test_a_killed_download_goes_on_in_the_next_run(tmp_path):
    def cut(handler, number):
        handler.answer(BODY, sent=100_000 if number == 1 else 0)
        return True

    with serving({"/f": BODY}, cut) as server:
        with pytest.raises(
            HubError,
            match="ended after 100000 of 700000 bytes; 100000 bytes are kept, and the same command",
        ):
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


@pytest.mark.parametrize("fields", [{"cut_headers": True}, {"tag": 'W/"same"'}], ids=str)
def test_without_a_tag_that_promises_the_same_bytes_it_starts_over(tmp_path, fields):
    def answer(handler, number):
        handler.answer(BODY, sent=100_000 if number == 1 else None, **fields)
        return True

    with serving({"/f": BODY}, answer) as server:
        assert get(server, tmp_path).read_bytes() == BODY
        assert [wanted for _, wanted in server.requests] == [None, None]


def test_a_length_that_is_too_long(tmp_path):
    def lie(handler, number):
        handler.answer(
            BODY,
            length=len(BODY) + 5 - (len(BODY) if handler.headers.get("Range") else 0),
            sent=len(BODY),
        )
        return True

    with (
        serving({"/f": BODY}, lie) as server,
        pytest.raises(HubError, match="ended after 700000 of 700005 bytes"),
    ):
        get(server, tmp_path)
    assert not (tmp_path / "f").exists()


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

    with (
        serving({}, lie) as server,
        pytest.raises(HubError, match="sends more than the 700000 bytes it promised; not taken"),
    ):
        get(server, tmp_path)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (1 << 60, "claims 1152921504606846976 bytes; no published file"),
        (1 << 38, r"has \d+ bytes free; .* needs 274877906944 more"),
    ],
)
def test_more_than_any_file_has_or_the_disk_holds(tmp_path, length, message):
    def claim(handler, number):
        handler.answer(b"x", length=length)
        return True

    with serving({}, claim) as server, pytest.raises(HubError, match=message):
        get(server, tmp_path)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file:///etc/passwd", "HTTP 302"),
        ("ftp://127.0.0.1/f", "not a safe address"),
        ("/f", "infinite loop|HTTP 30"),
    ],
)
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

    from openelm_mlx.convert.fetch.download import SameScheme

    with pytest.raises(
        HubError, match="redirects to http://x/f, which is not a safe address; not followed"
    ):
        SameScheme().redirect_request(Request("https://x/f"), None, 302, "", None, "http://x/f")


@pytest.mark.parametrize(
    ("code", "requests", "remedy"),
    [
        (404, 1, ""),
        (403, 1, ""),
        (429, ATTEMPTS, "; the server limits how often it may be asked; try again in some minutes"),
        (503, ATTEMPTS, "; the server cannot give the file now; try again later"),
    ],
)
def test_answers_that_are_errors(tmp_path, code, requests, remedy):
    def fail(handler, number):
        handler.send_error(code)
        return True

    with serving({}, fail) as server:
        with pytest.raises(HubError, match=f"cannot fetch {server.url}/f: HTTP {code}{remedy}$"):
            get(server, tmp_path)
        assert len(server.requests) == requests


def test_a_part_longer_than_the_file_starts_over(tmp_path):
    with serving({"/f": BODY}) as server:
        (tmp_path / "f.part").write_bytes(BODY + b"more")
        tag = '"' + hashlib.sha256(BODY).hexdigest()[:8] + '"'
        (tmp_path / "f.part.json").write_text(json.dumps({"size": len(BODY), "tag": tag}))
        assert get(server, tmp_path).read_bytes() == BODY


def test_nobody_listens(tmp_path, capsys):
    """That is told at once: it would be so at the sixth attempt, too."""
    with serving({}) as server:
        pass
    waited = []
    with pytest.raises(
        HubError, match=r"/f: \[Errno \d+\] Connection refused; check the network, try again"
    ):
        fetch(server.url + "/f", tmp_path / "f", wait=waited.append)
    assert waited == [] and capsys.readouterr().err == ""


def test_a_certificate_that_nobody_trusts(tmp_path):
    hub = Hub({}, tls=True)
    try:
        with pytest.raises(
            HubError,
            match="its certificate cannot be verified; behind a proxy that reads TLS set SSL_CERT",
        ):
            fetch(hub.url + "/f", tmp_path / "f", wait=lambda seconds: pytest.fail("tried again"))
    finally:
        hub.server.shutdown()
        hub.server.server_close()


def test_waiting_is_told(tmp_path, capsys):
    def fail_once(handler, number):
        if number == 1:
            handler.send_error(503)
        return number == 1

    with serving({"/f": BODY}, fail_once) as server:
        assert get(server, tmp_path).read_bytes() == BODY
    assert (
        capsys.readouterr().err
        == f"openelm: {server.url}/f: HTTP 503; attempt 2 of {ATTEMPTS} in 2 s\n"
    )


def test_a_file_damaged_or_replaced_later_is_noticed(tmp_path):
    with serving({"/f": BODY}) as server:
        get(server, tmp_path)
        for damaged in (BODY[:-1], BODY[:-1] + bytes([BODY[-1] ^ 1])):
            (tmp_path / "f").write_bytes(damaged)
            with pytest.raises(
                HubError,
                match="is not the file that was downloaded first .* delete it, and the same comm",
            ):
                get(server, tmp_path)
        (tmp_path / "f").unlink()
        server.files["/f"] = BODY[:-1]
        with pytest.raises(
            HubError, match=r"is not the file it was: 699999 bytes .* delete .*f.record.json"
        ):
            get(server, tmp_path)
        assert not (tmp_path / "f").exists()


def test_two_downloads_of_one_file(tmp_path):
    import fcntl

    with open(tmp_path / "f.part", "ab") as file, serving({"/f": BODY}) as server:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(HubError, match="is being downloaded by another process"):
            get(server, tmp_path)
