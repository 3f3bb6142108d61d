"""The playground's route: what is served, with which headers, and that nothing else is."""

import re
from pathlib import Path

import pytest

from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_requests import check_error

FOLDER = Path(__file__).resolve().parents[3] / "server" / "api" / "playground"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def address(path: Path) -> str:
    return "/" if path.name == "index.html" else f"/playground/{path.name}"


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_every_file_is_served_with_its_type_and_may_load_only_its_own_server(serving: Serving, path: Path) -> None:
    answer = serving.http.get(address(path))
    assert answer.status_code == 200
    assert answer.content == path.read_bytes()
    assert answer.headers["content-type"].partition(";")[0] == MEDIA_TYPES[path.suffix]
    policy = dict(part.split(maxsplit=1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'" and not policy.keys() & {"script-src", "style-src", "connect-src"}
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_an_unchanged_file_is_not_sent_again(serving: Serving) -> None:
    first = serving.http.get("/")
    assert first.headers["cache-control"] == "no-cache"
    again = serving.http.get("/", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert serving.http.get("/", headers={"if-none-match": '"other"'}).status_code == 200
    assert serving.http.get("/playground/page.js").headers["etag"] != first.headers["etag"]


def test_head_answers_like_get_without_a_body(serving: Serving) -> None:
    whole, head = serving.http.get("/"), serving.http.head("/")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.content))
    check_error(serving.http.post("/"), 405, None, "POST /")


@pytest.mark.parametrize(
    "path",
    [
        "/playground",
        "/playground/",
        "/playground/index.html",
        "/playground/other.js",
        "/playground/PAGE.JS",
        "/playground/page.js/",
        "/playground/..%2fplayground_page.py",
        "/playground/%2e%2e/playground_page.py",
        "/playground/..%2f..%2f..%2fpyproject.toml",
        "/playground/%2fetc%2fpasswd",
        "/playground/page.js%00.html",
        "/%2e%2e/%2e%2e/etc/passwd",
    ],
)
def test_a_name_that_is_not_in_the_table_has_no_route(serving: Serving, path: str) -> None:
    check_error(serving.http.get(path), 404, None, "there is no route")


def test_the_page_names_nothing_outside_and_has_nothing_inline() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    for name, text in texts.items():
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", text)) - {"http://www.w3.org/2000/svg"}
        assert not addresses, name
        assert not re.search(r"(inner|outer|Adjacent)HTML|document\.write|\beval\b|new Function", text), name
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|javascript:", texts["index.html"])


def test_the_page_is_small() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FOLDER.iterdir()) < 1200
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 60_000
