"""A server answers to its own names, over HTTP/1.1, and to bodies that say that they are JSON."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from dpn_rt import serve
from dpn_rt.errors import ConfigError
from dpn_rt.server.config import ServerConfig
from dpn_rt.server.hosts import AllowedHosts
from tests.server.conftest import MODEL, Ask, RunningServer, StartServer
from tests.server.raw_http import error, exchange, status

END = b"Connection: close\r\n\r\n"


def get(*lines: bytes, version: bytes = b"HTTP/1.1") -> bytes:
    return b"".join([b"GET /v1/models " + version + b"\r\n", *(line + b"\r\n" for line in lines), END])


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (get(b"Host: localhost"), 200),
        (get(b"Host: LOCALHOST:8000"), 200),
        (get(b"Host: localhost."), 200),
        (get(b"Host: 127.0.0.1:1"), 200),
        (get(b"Host: [::1]:8000"), 200),
        (get(version=b"HTTP/1.0"), 200),
        (get(), 400),
        (get(b"Host: localhost", b"Host: localhost"), 400),
        (get(b"Host: localhost", b"Host: evil.example"), 400),
        (get(b"Host: "), 400),
        (get(b"Host: evil.example"), 400),
        (get(b"Host: localhost.evil.example"), 400),
        (get(b"Host: evil.example:80"), 400),
        (get(b"Host: localhost/evil"), 400),
        (get(b"Host: user@localhost"), 400),
        (get(b"Host: localhost, evil.example"), 400),
        (get(b"Host: [::1"), 400),
        (get(b"Host: 203.0.113.9"), 400),
        (get(b"Host: evil.example", version=b"HTTP/1.0"), 400),
        (b"GET /v1/models\r\n\r\n", 400),
    ],
)
def test_who_is_asked_must_be_this_server(server: RunningServer, sent: bytes, expected: int) -> None:
    answer = exchange(server, sent)
    assert status(answer) == expected, answer
    if expected == 400:
        assert "expected" in error(answer)["message"] or "--allowed-hosts" in error(answer)["message"]


def test_names_are_of_no_matter_where_there_is_a_key(start_server: StartServer) -> None:
    server = start_server(api_key="secret")
    key = {"Authorization": "Bearer secret"}
    assert server.client.get("/v1/models", headers={"Host": "dpn.example.com", **key}).status_code == 200
    server = start_server(api_key="secret", allowed_hosts=("dpn.example.com",))
    assert server.client.get("/v1/models", headers={"Host": "dpn.example.com:8000", **key}).status_code == 200
    assert server.client.get("/v1/models", headers={"Host": "localhost", **key}).status_code == 400


@pytest.mark.parametrize(
    ("host", "allowed", "refused"),
    [
        ("127.0.0.1", ["localhost", "127.0.0.1", "::1"], ["evil.example", "10.0.0.1"]),
        ("::1", ["localhost", "127.0.0.1", "::1"], ["evil.example"]),
        ("localhost", ["localhost"], ["evil.example"]),
        ("0.0.0.0", ["localhost", "10.0.0.1", "::1", socket.gethostname()], ["evil.example"]),
        ("::", ["10.0.0.1", "2001:db8::1"], ["evil.example"]),
        ("192.168.1.5", ["192.168.1.5", socket.gethostname()], ["192.168.1.6", "evil.example"]),
        ("dpn.lan", ["dpn.lan", "localhost"], ["evil.example"]),
    ],
)
def test_the_names_of_an_address(host: str, allowed: list[str], refused: list[str]) -> None:
    hosts = ServerConfig(model_name=MODEL, host=host).hosts
    assert all(hosts._allows(name.lower()) for name in allowed)
    assert not any(hosts._allows(name) for name in refused)


@pytest.mark.parametrize("name", ["http://dpn.example.com", "dpn.example.com:8000", "a b", "", "*.example.com", "a:b"])
def test_a_name_that_would_match_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="would match no request"):
        ServerConfig(model_name=MODEL, allowed_hosts=(name,))
    assert AllowedHosts.of(["Dpn.Example.com", "[::1]"]).names == {"dpn.example.com", "::1"}


BODY = json.dumps(Ask().body()).encode()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", "", None]
)
def test_what_a_page_may_post_anywhere_is_refused(server: RunningServer, path: str, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    reply = server.client.post(path, content=BODY, headers=headers)
    assert reply.status_code == 415
    assert reply.json()["error"]["message"].endswith("expected application/json")


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=utf-8", "application/json;charset=UTF-8"]
)
def test_json_by_any_spelling_is_read(server: RunningServer, kind: str) -> None:
    headers = {"Content-Type": kind}
    assert server.client.post("/v1/chat/completions", content=BODY, headers=headers).status_code == 200


@pytest.mark.parametrize("key", ["", " ", "\n", " secret", "secret\r\n", "se\ncret", "\t"])
def test_a_key_that_is_none_is_refused(
    key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Most of all an empty one: the operator meant a server with a key."""
    monkeypatch.delenv(serve.API_KEY_VARIABLE, raising=False)
    assert serve.main(["--engine", str(tmp_path), "--api-key", key]) == 1
    assert "error: --api-key " in (told := capsys.readouterr().err) and "expected a secret" in told
    monkeypatch.setenv(serve.API_KEY_VARIABLE, key)
    assert serve.main(["--engine", str(tmp_path)]) == 1
    assert f"error: {serve.API_KEY_VARIABLE} " in capsys.readouterr().err
    with pytest.raises(ConfigError, match="api_key"):
        ServerConfig(model_name=MODEL, api_key=key)


def test_an_option_comes_before_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(serve.API_KEY_VARIABLE, "from the variable")
    options = serve.parser().parse_args(["--engine", "x", "--api-key", "given"])
    assert serve._api_key(options) == "given"
    assert serve._api_key(serve.parser().parse_args(["--engine", "x"])) == "from the variable"
    monkeypatch.delenv(serve.API_KEY_VARIABLE)
    assert serve._api_key(serve.parser().parse_args(["--engine", "x"])) is None
