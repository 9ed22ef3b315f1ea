"""HTTP itself: methods, paths, and pages of other origins."""

from __future__ import annotations

import json

import httpx
import pytest

from dpn_rt.errors import ConfigError
from dpn_rt.serve import parser, server_config
from dpn_rt.server.cors import CorsPolicy
from tests.server.conftest import MODEL, Ask, RunningServer, StartServer

GOOD = Ask()
ORIGIN = "https://app.example.com"


@pytest.mark.parametrize(
    "path", ["/health", "/metrics", "/version", "/", "/docs", "/openapi.json", "/v1/models", f"/v1/models/{MODEL}"]
)
def test_head_is_get_without_a_body(server: RunningServer, path: str) -> None:
    get, head = server.client.get(path), server.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":  # which the requests themselves change
        assert head.headers["content-length"] == get.headers["content-length"]
    assert server.client.get("/health").json() == {"status": "ok"}, "the connection is still in step"


def test_head_of_what_is_not_there(server: RunningServer) -> None:
    assert (server.client.head("/v1/nothing").status_code, server.client.head("/v1/nothing").content) == (404, b"")
    assert server.client.head("/v1/models/other").status_code == 404


def test_head_asks_for_the_key_as_get_does(start_server: StartServer) -> None:
    server = start_server(api_key="secret")
    assert server.client.head("/health").status_code == server.client.get("/health/").status_code == 200
    assert server.client.head("/v1/models").status_code == server.client.get("/v1/models/").status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("HEAD", "/v1/completions", "POST"),
        ("PUT", "/v1/completions/", "POST"),
        ("OPTIONS", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", f"/v1/models/{MODEL}", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
        ("PATCH", "/docs", "GET, HEAD"),
        ("GET", "/tokenize", "POST"),
        ("PUT", "/detokenize", "POST"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(server: RunningServer, method: str, path: str, allowed: str) -> None:
    reply = server.client.request(method, path)
    assert (reply.status_code, reply.headers["allow"]) == (405, allowed)
    if method != "HEAD":
        error = reply.json()["error"]
        assert f"expected the method {allowed.replace(', ', ' or ')}" in error["message"]
        assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/v1/models", "/health", f"/v1/models/{MODEL}", "/version"])
@pytest.mark.parametrize("slashes", ["/", "//"])
def test_a_slash_at_the_end_changes_nothing(server: RunningServer, path: str, slashes: str) -> None:
    with_slash, without = (server.client.get(p, follow_redirects=False) for p in (path + slashes, path))
    assert (with_slash.status_code, with_slash.json()) == (200, without.json())


def test_a_slash_at_the_end_of_a_post(server: RunningServer) -> None:
    reply = server.post(GOOD.body(), "/v1/chat/completions/")
    assert reply.status_code == 200
    assert reply.json()["choices"][0] == server.post(GOOD.body()).json()["choices"][0]
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
    assert server.post(body, "/v1/completions/").status_code == 200


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("/v1/responses", "use /v1/chat/completions"),
        ("/v1/responses/resp_1", "use /v1/chat/completions"),
        ("/v1/messages", "use /v1/chat/completions"),
        ("/v1/embeddings", "not embeddings"),
        ("/generate", "/v1/completions"),
        ("/chat/completions", "expected one of /v1/chat/completions, /v1/completions"),
        ("/v1/chat/completion", "expected one of /v1/chat/completions, /v1/completions"),
    ],
)
def test_an_unknown_path_is_told_what_to_use(server: RunningServer, path: str, advice: str) -> None:
    for reply in (server.post({"model": MODEL, "input": "Hello"}, path), server.client.get(path)):
        error = reply.json()["error"]
        assert reply.status_code == 404 and error["type"] == "not_found_error"
        assert repr(path) in error["message"] and advice in error["message"]


def preflight(server: RunningServer, origin: str = ORIGIN) -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    return server.client.options("/v1/chat/completions", headers=headers)


def test_pages_of_other_origins_are_off_by_default(server: RunningServer) -> None:
    assert preflight(server).status_code == 405
    reply = server.client.get("/v1/models", headers={"Origin": ORIGIN})
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_pages_of_allowed_origins(start_server: StartServer) -> None:
    server = start_server(cors=CorsPolicy((ORIGIN,)), api_key="secret")
    allowed = preflight(server)  # which browsers send without a key
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in allowed.headers
    refused = preflight(server, "https://other.example.com")
    assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
    for key, status in (("wrong", 401), ("secret", 200)):  # an error can be read too
        headers = {"Origin": ORIGIN, "Authorization": f"Bearer {key}"}
        reply = server.post(GOOD.body(), headers=headers)
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (status, ORIGIN)


def test_pages_of_all_origins_with_credentials(start_server: StartServer) -> None:
    server = start_server(cors=CorsPolicy(("*",), ("POST",), ("content-type",), allow_credentials=True))
    assert preflight(server).status_code == 400, "authorization is no allowed header"
    reply = server.client.get("/health", headers={"Origin": ORIGIN})
    assert reply.headers["access-control-allow-credentials"] == "true"


@pytest.mark.parametrize(
    ("words", "origins"),
    [
        ([ORIGIN, "http://localhost:3000"], (ORIGIN, "http://localhost:3000")),
        ([json.dumps([ORIGIN, "*"])], (ORIGIN, "*")),  # vLLM's form
        (["*"], ("*",)),
    ],
)
def test_origins_of_the_command_line(words: list[str], origins: tuple[str, ...]) -> None:
    arguments = ["--engine", "engine", "--allowed-origins", *words, "--allowed-headers", '["x-a"]', "x-b"]
    policy = server_config(parser().parse_args(arguments)).cors
    assert policy == CorsPolicy(origins, ("*",), ("x-a", "x-b"))
    assert server_config(parser().parse_args(["--engine", "engine"])).cors == CorsPolicy()


@pytest.mark.parametrize("word", ["[", "[1]", '{"a": 1}]'])
def test_a_list_of_origins_that_is_none(word: str) -> None:
    with pytest.raises((SystemExit, ConfigError)):
        server_config(parser().parse_args(["--engine", "engine", "--allowed-origins", word]))


@pytest.mark.parametrize("origin", ["app.example.com", f"{ORIGIN}/", f"{ORIGIN}/page", "", "https://*.example.com/"])
def test_origins_that_match_no_page(origin: str) -> None:
    with pytest.raises(ConfigError, match="would match no page"):
        CorsPolicy((origin,))


@pytest.mark.parametrize(
    "settings", [{"allow_credentials": True}, {"allowed_methods": ("GET",)}, {"allowed_headers": ()}]
)
def test_settings_without_effect(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(settings))}: no effect without allowed origins"):
        CorsPolicy(**settings)  # type: ignore[arg-type]
