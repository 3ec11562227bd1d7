"""Access control, and the bounds on requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from support.server import Running, asked, data_url, running

from qvl.runtime.errors import InputError
from qvl.runtime.serve.options import ServeOptions

CHAT = "/v1/chat/completions"
http = httpx2.Client(timeout=60)  # the machine may be busy with other tests


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "media").mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "media" / "red.png")
    Image.new("RGB", (64, 64), "red").save(folder / "secret.png")
    (folder / "media" / "link.png").symlink_to(folder / "secret.png")
    return folder / "media"


@pytest.fixture(scope="module")
def guarded(media: Path) -> Iterator[Running]:
    with running(n_ctx=1024, parallel=1, api_key="sesame", cors=("https://app.example",),
                 media_path=media, max_body_bytes=1 << 20) as found:  # fmt: skip
        yield found


def post(server: Running, body: Any, **headers: str) -> httpx2.Response:
    return http.post(f"{server.url}{CHAT}", json=body, headers=headers)


def message(url: str) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}


def test_the_key_guards_all_but_the_page_and_health(guarded: Running) -> None:
    for path in ("/", "/health", "/page/app.js"):
        assert http.get(guarded.url + path).status_code == 200
    for path in ("/v1/models", "/metrics", "/docs", "/openapi.json"):
        assert http.get(guarded.url + path).status_code == 401
        assert http.get(guarded.url + path, headers={"Authorization": "Bearer sesame"}).status_code == 200
    answer = http.get(f"{guarded.url}/v1/models", headers={"Authorization": "Bearer other"})
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "evil.example:8080", "[::2]"])
def test_a_foreign_host_header_is_refused(guarded: Running, host: str) -> None:
    assert http.get(f"{guarded.url}/health", headers={"Host": host}).status_code in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "localhost:99", "127.0.0.1", "[::1]:8080"])
def test_names_of_this_machine_are_let_in(guarded: Running, host: str) -> None:
    assert http.get(f"{guarded.url}/health", headers={"Host": host}).status_code == 200


def test_only_named_origins_may_call(guarded: Running, server: Running) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in (("https://app.example", True), ("https://evil.example", False)):
        answer = http.options(guarded.url + CHAT, headers={"Origin": origin, **ask})
        assert (answer.headers.get("access-control-allow-origin") == origin) is allowed
    assert (
        "access-control-allow-origin"
        not in http.get(f"{server.url}/health", headers={"Origin": "https://a.example"}).headers
    )


def test_a_large_body_is_refused_with_and_without_its_length(guarded: Running) -> None:
    large = b" " * (2 << 20)
    key = {"Authorization": "Bearer sesame"}
    assert http.post(guarded.url + CHAT, content=large, headers=key).status_code == 413
    parts = iter([large[: 1 << 19]] * 4)
    assert http.post(guarded.url + CHAT, content=parts, headers=key).status_code == 413


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.png", "http://127.0.0.1/a.png", "ftp://a/b", "/etc/passwd", "red.png",
        "file:///etc/passwd", "file://evil.example/share/red.png", "file:///../secret.png",
        "file:///link.png", "file:///%2e%2e/secret.png", "file:///nul%00.png", "data:image/png;base64,####",
        "data:image/png;base64,ü", "data:", "data:image/png;base64,", "javascript:alert(1)",
    ],
)  # fmt: skip
def test_no_address_leaves_the_media_folder(guarded: Running, url: str) -> None:
    answer = post(guarded, message(url), Authorization="Bearer sesame")
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_files_of_the_media_folder_are_read(guarded: Running, media: Path) -> None:
    for url in ("file:///red.png", (media / "red.png").as_uri()):
        assert post(guarded, message(url), Authorization="Bearer sesame").status_code == 200


def test_without_a_media_folder_no_file_is_read(server: Running, media: Path) -> None:
    answer = post(server, message((media / "red.png").as_uri()))
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "unsupported_url"


@pytest.mark.parametrize(
    "body",
    [
        {}, [], {"messages": []}, {"messages": [{"role": "king", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}], "temperature": -1},
        {"messages": [{"role": "user", "content": "x"}], "n": 99},
        {"messages": [{"role": "user", "content": "x"}], "stop": [""]},
        {"messages": [{"role": "user", "content": "word " * 9000}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}},
        {"messages": [{"role": "user", "content": "x"}],
         "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
    ],
)  # fmt: skip
def test_broken_requests_get_openais_error(server: Running, body: Any) -> None:
    answer = post(server, body)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("part", "param", "said"),
    [
        ({"type": "image_url", "image_url": {"url": "data:", "detail": "huge"}}, "image_url.detail", "'low'"),
        ({"type": "input_audio", "input_audio": {"data": ""}}, "type", "'image_url'"),
        ({"type": "text", "text": 5}, "text", "string"),
    ],
)
def test_the_field_at_fault_is_named(server: Running, part: Any, param: str, said: str) -> None:
    answer = post(server, {"messages": [{"role": "user", "content": [part]}]})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == f"messages.0.content.0.{param}"
    assert said in error["message"]


def test_the_page_may_run_its_own_files_only(server: Running) -> None:
    answer = http.get(server.url)
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_damaged_picture_harms_nobody(server: Running) -> None:
    broken = data_url("one.png")[:200]
    answer = post(server, message(broken + "=" * (-len(broken.partition(",")[2]) % 4)))
    assert answer.status_code == 400
    fine = post(server, {"messages": [asked("Describe this image.", "one.png")], "temperature": 0})
    assert fine.json()["choices"][0]["message"]["content"] == "A small red star at the top."


@pytest.mark.parametrize(
    "options",
    [
        {"host": "0.0.0.0"},
        {"host": "192.168.1.5"},
        {"parallel": 0},
        {"media_path": Path("/nowhere")},
        {"cors": ("*",)},
    ],
)
def test_unsafe_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        ServeOptions(**options)
