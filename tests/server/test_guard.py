"""The guard lets requests through or answers them itself, over real connections."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from listening import JSON, Answer, ask, connect, head, listening, post, read_answer

from openelm_mlx.errors import OptionError
from openelm_mlx.server.guard import Guard, host_name, keys_of
from openelm_mlx.server.options import ServerOptions

KEYS = ("first-key", "second-key")


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with what came through: method, path, owner and body."""
    message = await receive()
    state = scope["state"]
    found = {"method": scope["method"], "path": scope["path"], "owner": state["owner"]}
    body = json.dumps(found | {"body": message["body"].decode(), "id": state["request_id"]})
    own = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": own})
    await send({"type": "http.response.body", "body": body.encode()})


class Guarded:
    """A server whose options a test may change."""

    def __init__(self) -> None:
        self.guard = Guard(echo, ServerOptions())
        self.port = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.guard(scope, receive, send)

    def ask(self, request: bytes, **options: Any) -> Answer:
        self.guard = Guard(echo, replace(ServerOptions(), **options))
        return ask(self.port, request)


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    app = Guarded()
    with listening(app) as app.port:
        yield app


def to(host: str) -> bytes:
    return f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def test_a_request_passes_with_its_body_and_every_answer_has_the_headers(guarded: Guarded):
    answer = guarded.ask(post(b"/v1/completions", b'{"prompt": "\xc3\xa9"}'))
    found = json.loads(answer.body)
    assert (found["method"], found["path"], found["owner"]) == ("POST", "/v1/completions", "")
    assert found["body"] == '{"prompt": "é"}' and answer.status == 200
    for one in (answer, guarded.ask(to("example.org"))):
        assert one.headers["x-content-type-options"] == "nosniff"
        assert one.headers["referrer-policy"] == "no-referrer"
        assert one.headers["cache-control"] == "no-store"
        assert not [name for name in one.headers if name.startswith("access-control")]
    assert answer.headers["x-request-id"] == found["id"]


def test_a_request_keeps_its_own_id_if_that_is_a_plain_word(guarded: Guarded):
    mine = guarded.ask(head(b"/v1/models", more=b"X-Request-Id: run-7\r\n"))
    assert mine.headers["x-request-id"] == "run-7"
    for wrong in (b"a b", b"\x1b[31m", b"x" * 65, b""):
        other = guarded.ask(head(b"/v1/models", more=b"X-Request-Id: " + wrong + b"\r\n"))
        assert other.status in (200, 400) and len(other.headers.get("x-request-id", "-" * 16)) == 16


OWN = ["localhost", "LOCALHOST:8080", "localhost.", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:80"]
FOREIGN = ["example.org", "localhost.example.org", "localhost@example.org", "127.0.0.1.nip.io"]
FOREIGN += ["192.168.1.2", "[::1].example.org", "[::2]", "localhost:x", "", "\x80"]


@pytest.mark.parametrize("host", OWN)
def test_the_names_of_this_machine_are_known(guarded: Guarded, host: str):
    assert guarded.ask(to(host)).status == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_a_name_that_was_rebound_is_refused(guarded: Guarded, host: str):
    for path in ("/", "/health", "/v1/models"):
        request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1")
        answer = guarded.ask(request)
        assert answer.status == 421 and answer.error["code"] == "unknown_host"
    name = host if host in FOREIGN[:1] + FOREIGN[4:5] else "NAME"
    message = answer.error["message"]
    assert "this server is not known as" in message
    assert name not in ("example.org", "192.168.1.2") or message.endswith(f"--allowed-host {name}")


def test_more_names_are_known_if_they_were_given(guarded: Guarded):
    assert guarded.ask(to("Mac.local:8080"), allowed_host=("mac.LOCAL",)).status == 200
    assert guarded.ask(to("10.1.2.3"), host="10.1.2.3", api_key=KEYS).status == 401
    assert guarded.ask(to("10.1.2.4"), host="10.1.2.3", api_key=KEYS).status == 421
    for host, status in (("10.1.2.3", 401), ("[fd00::1]:80", 401), ("example.org", 421)):
        assert guarded.ask(to(host), host="0.0.0.0", api_key=KEYS).status == status


def test_a_request_has_one_host(guarded: Guarded):
    none = guarded.ask(b"GET / HTTP/1.1\r\n\r\n")
    assert none.error["message"] == "the request has 0 Host headers; send one"
    two = guarded.ask(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: example.org\r\n\r\n")
    assert two.status == 400 and "2 Host headers" in two.error["message"]
    assert guarded.ask(b"GET / HTTP/1.0\r\n\r\n").status == 200  # a balancer's check


def test_names_in_a_host_header():
    assert host_name("[::1]:8080") == "::1" and host_name("A.B.:1") == "a.b"
    assert host_name("[::1].a") == "[::1].a" and host_name("a:b:c") == "a:b:c"


def with_key(value: bytes) -> bytes:
    return head(b"/v1/models", more=b"Authorization: " + value + b"\r\n")


def test_a_key_is_asked_for_and_makes_the_owner(guarded: Guarded):
    owners = set()
    for key in (*KEYS, KEYS[0]):
        answer = guarded.ask(with_key(b"Bearer " + key.encode()), api_key=KEYS)
        owners.add(json.loads(answer.body)["owner"])
    assert len(owners) == 2 and all(len(owner) == 16 for owner in owners)
    for path in (b"/", b"/health"):
        assert guarded.ask(head(path), api_key=KEYS).status == 200
    lower = guarded.ask(with_key(b"bearer  first-key"), api_key=KEYS)
    assert lower.status == 200


@pytest.mark.parametrize("value", [b"Bearer", b"Bearer first-ke", b"first-key", b"Basic first-key"])
def test_a_wrong_key_is_refused_and_not_repeated(guarded: Guarded, value: bytes):
    answer = guarded.ask(with_key(value), api_key=KEYS)
    assert answer.status == 401 and answer.error["code"] == "invalid_api_key"
    assert answer.error["type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer" and b"first" not in answer.body


def test_a_key_sent_twice_or_not_at_all(guarded: Guarded):
    twice = head(b"/v1/models", more=b"Authorization: Bearer first-key\r\n" * 2)
    for request in (twice, head(b"/v1/models")):
        answer = guarded.ask(request, api_key=KEYS)
        assert answer.error["message"].startswith("there is no API key; send it in the header")


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch):
    from openelm_mlx.server import guard as module

    seen = []

    def compare(one: bytes, other: bytes) -> bool:
        seen.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(module, "compare_digest", compare)
    guard = Guard(echo, ServerOptions(api_key=("a", "b" * 100, "c")))
    guard.owner(module.Headers([(b"authorization", b"Bearer a")]))
    assert seen == [(32, 32)] * 3


def test_a_file_of_keys(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text("# of the team\none\n\n  two \n")
    path.chmod(0o600)
    assert keys_of(ServerOptions(api_key=("zero",), api_key_file=path)) == ["zero", "one", "two"]
    path.chmod(0o644)
    with pytest.raises(OptionError, match=r"other users of this machine; run chmod 600 .*keys$"):
        keys_of(ServerOptions(api_key_file=path))
    path.chmod(0o600)
    for text, why in (("# none\n", "has no key"), ("a b\n", "a blank"), ("é\n", "not ASCII")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(OptionError, match=why):
            keys_of(ServerOptions(api_key_file=path))
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        keys_of(ServerOptions(api_key_file=tmp_path / "missing"))


def preflight(origin: bytes, more: bytes = b"") -> bytes:
    asked = b"Origin: " + origin + b"\r\nAccess-Control-Request-Method: POST\r\n"
    return head(b"/v1/chat/completions", more=asked + more, method=b"OPTIONS")


PAGE = {"cors_origin": ("https://example.org", "http://localhost:3000")}


def test_pages_of_a_given_origin_may_ask(guarded: Guarded):
    names = b"Access-Control-Request-Headers: authorization, Content-Type,x-stainless-os,a(b\r\n"
    asked = preflight(b"https://example.org", names)
    answer = guarded.ask(asked, **PAGE, api_key=KEYS)
    assert answer.status == 204 and answer.body == b""
    assert answer.headers["access-control-allow-origin"] == "https://example.org"
    allowed = answer.headers["access-control-allow-headers"]
    assert allowed == "authorization, content-type, x-stainless-os"
    assert answer.headers["access-control-allow-methods"] == "GET, POST, DELETE"
    assert answer.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in answer.headers
    asked = head(b"/v1/models", more=b"Origin: http://localhost:3000\r\n")
    refused = guarded.ask(asked, **PAGE, api_key=KEYS)  # the page must be able to read why
    assert refused.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert refused.status == 401 and refused.headers["vary"] == "Origin"


@pytest.mark.parametrize("origin", [b"https://example.org:444", b"http://example.org", b"null"])
def test_pages_of_another_origin_may_not(guarded: Guarded, origin: bytes):
    for options in ({}, PAGE):
        answer = guarded.ask(preflight(origin), **options)
        assert answer.status == 403 and answer.error["code"] == "unknown_origin"
        assert "--cors-origin" in answer.error["message"]
        plain = guarded.ask(head(b"/v1/models", more=b"Origin: " + origin + b"\r\n"), **options)
        for one in (answer, plain):
            assert "access-control-allow-origin" not in one.headers


@pytest.mark.parametrize(
    "header,said",
    [
        (b"", "the body has no Content-Type; send the header Content-Type: application/json"),
        (
            b"Content-Type: text/plain\r\n",
            "the body is 'text/plain'; send the header Content-Type: application/json",
        ),
        (b"Content-Type: application/json; charset=latin-1\r\n", "'charset=latin-1'; send UTF-8"),
        (JSON + b"Content-Encoding: gzip\r\n", "compressed ('gzip'); send it as it is"),
    ],
)
def test_a_body_is_json_in_utf8(guarded: Guarded, header: bytes, said: str):
    answer = guarded.ask(post(b"/v1/completions", b"{}", header))
    assert answer.status == 415 and said in answer.error["message"]
    good = b"Content-Type: Application/JSON; charset=UTF-8\r\nContent-Encoding: identity\r\n"
    assert guarded.ask(post(b"/v1/completions", b"{}", good)).status == 200


def test_an_unknown_method_is_refused(guarded: Guarded):
    answer = guarded.ask(head(b"/v1/models", method=b"PATCH"))
    assert answer.status == 405 and "PATCH is not known" in answer.error["message"]
    assert answer.headers["allow"] == "GET, HEAD, POST, DELETE, OPTIONS"


def test_the_answer_to_head_has_no_body(guarded: Guarded):
    with connect(guarded.port) as connection:
        guarded.guard = Guard(echo, ServerOptions(api_key=KEYS))
        for _ in range(2):
            connection.sendall(head(b"/v1/models", method=b"HEAD"))
            assert read_answer(connection, b"HEAD").status == 401


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused_and_the_connection_goes_on(guarded: Guarded, chunked: bool):
    guarded.guard = Guard(echo, ServerOptions(max_body=1024))
    body = b" " * 1_000_000
    if chunked:
        start = head(
            b"/v1/completions", more=JSON + b"Transfer-Encoding: chunked\r\n", method=b"POST"
        )
        request = start + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    else:
        request = post(b"/v1/completions", body)
    with connect(guarded.port) as connection:
        for _ in range(2):
            connection.sendall(request)
            answer = read_answer(connection)
            assert answer.status == 413 and "more than 1,024 bytes" in answer.error["message"]
            assert "--max-body" in answer.error["message"]
        connection.sendall(post(b"/v1/completions", b" " * 1024))
        assert read_answer(connection).status == 200


def test_a_refused_client_that_waits_to_send_its_body_is_let_go(guarded: Guarded):
    more = JSON + b"Expect: 100-continue\r\nContent-Length: 9999\r\n"
    answer = guarded.ask(head(b"/v1/completions", more=more, method=b"POST"), max_body=1024)
    assert answer.status == 413 and answer.headers["connection"] == "close"


def test_a_slow_body_is_refused(guarded: Guarded):
    more = JSON + b"Content-Length: 10\r\n"
    slow = head(b"/v1/completions", more=more, method=b"POST") + b"{"
    answer = guarded.ask(slow, body_seconds=0.1)
    assert answer.status == 408 and answer.headers["connection"] == "close"
    assert answer.error["message"] == "the body did not arrive within 0.1 seconds"


def test_while_the_server_ends_every_request_is_told_so(guarded: Guarded):
    guarded.guard = Guard(echo, ServerOptions(api_key=KEYS))
    guarded.guard.closing = True
    for path in (b"/health", b"/v1/models"):
        answer = ask(guarded.port, head(path))
        assert answer.status == 503 and answer.error["code"] == "shutting_down"
        assert answer.headers["retry-after"] == "1" and answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    "options,said",
    [
        ({"host": "0.0.0.0"}, "which other machines can reach; give --api-key-file or --api-key"),
        ({"host": "mac.local"}, "host is 'mac.local', which other machines can reach"),
        ({"host": "", "api_key": "k"}, "host is ''; allowed is a name or an address"),
        ({"api_key": "a b"}, "an api_key has a blank or a character outside ASCII; take another"),
        ({"api_key": "ä"}, "an api_key has a blank or a character outside ASCII; take another"),
        ({"allowed_host": "http://a"}, "allowed_host is 'http://a'; allowed is a name as in a URL"),
        ({"allowed_host": "*"}, "without scheme and port"),
        ({"cors_origin": "*"}, "cors_origin is '*'; allowed is an exact origin in lower case"),
        ({"cors_origin": "null"}, "as in https://example.org or http://localhost:3000"),
        ({"cors_origin": "https://a.org/"}, "cors_origin is 'https://a.org/'"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], said: str):
    with pytest.raises(OptionError) as refused:
        ServerOptions(**options)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_addresses_of_this_machine_need_no_key():
    for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1"):
        assert not ServerOptions(host=host).keyed
    assert ServerOptions(host="::", api_key="k").keyed
