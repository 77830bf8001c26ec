"""The chat page's files: what is served and under which policy, and that other people's are as they were published."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from engine.engine import Engine
from serving import page_files
from serving.page_files import FOLDER, example_prompts, page_response
from support.http_server import serving

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
VENDORED = FOLDER / "vendored"
OURS = [path for path in sorted(FOLDER.rglob("*")) if path.is_file() and VENDORED not in path.parents]


def test_vendored_files_are_as_they_were_published() -> None:
    listed = json.loads((VENDORED / "files.json").read_text())
    there = {path.relative_to(VENDORED).as_posix(): path for path in VENDORED.rglob("*") if path.is_file()}
    assert {entry["file"] for entry in listed} == there.keys() - {"files.json"}
    for entry in listed:
        assert hashlib.sha256(there[entry["file"]].read_bytes()).hexdigest() == entry["sha256"], entry["file"]
        name, version = entry["package"].rsplit("@", 1)
        assert entry["file"].split("/")[0].endswith(version) and entry["path"] and entry["licence"], name
        assert f"{entry['file'].split('/')[0]}/LICENSE" in there
    assert sum(path.stat().st_size for path in there.values()) < 900_000


def test_own_files_load_nothing_from_elsewhere() -> None:
    assert len(OURS) > 10 and {path.suffix for path in OURS} == {".html", ".css", ".js"}
    for path in OURS:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"\b(?:https?|wss?):?//\w|//[\w-]+\.\w+/", text), path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|createContextualFragment", text), path.name
        assert not re.search(r"<script>|<style|\bon\w+=\"|\bstyle=\"", text), path.name
        for name in re.findall(r"""(?:["'(])(?:\./|/page/)([\w./-]+\.(?:js|css))""", text):
            assert (FOLDER / name).exists(), f"{path.name} names {name}"
        if path.suffix == ".js":
            assert len(text.splitlines()) <= 330, path.name


def test_only_these_files_are_served(tmp_path: Path) -> None:
    for name in ("index.html", "main.js", "style.css", "vendored/katex-0.19.1/fonts/KaTeX_Main-Regular.woff2"):
        plain, zipped = page_response(name, Headers()), page_response(name, Headers({"accept-encoding": "gzip, br"}))
        assert plain is not None and zipped is not None and plain.body == (FOLDER / name).read_bytes()
        policy = dict(part.split(" ", 1) for part in plain.headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == policy["font-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'" and policy["img-src"] == "data:" and policy["connect-src"] == "'self'"
        assert "unsafe" not in str(policy) and plain.headers["X-Content-Type-Options"] == "nosniff"
        assert ("content-encoding" in zipped.headers) != name.endswith("woff2")
        if "content-encoding" in zipped.headers:
            assert gzip.decompress(zipped.body) == plain.body
        again = page_response(name, Headers({"if-none-match": plain.headers["ETag"]}))
        assert again is not None and (again.status_code, again.body) == (304, b"")
        assert ("immutable" in plain.headers["Cache-Control"]) == name.startswith("vendored/")
    for name in ("", "nothing.js", "../app.py", "vendored/files.json", "vendored/../index.html", "/etc/passwd", "vendored/katex-0.19.1/LICENSE"):
        assert page_response(name, Headers()) is None


def test_example_prompts(tmp_path: Path) -> None:
    assert example_prompts(tmp_path) == []
    (tmp_path / page_files.EXAMPLES).write_text("\n one \n" + "x" * 501 + "\ntwo\nthree\nfour\n")
    assert example_prompts(tmp_path) == ["one", "two", "three"]
    (tmp_path / page_files.EXAMPLES).write_bytes(b"\xff")
    assert example_prompts(tmp_path) == []


@pytest.mark.parametrize("key", [None, "secret-key"])
def test_routes(key: str | None) -> None:
    engine = Engine.from_pretrained(DEMO, dtype="float32", max_model_len=256, n_pages=8)
    with serving(engine, key=key) as running:
        status, headers, settings = running.send("GET", "/page/settings.json")
        assert status == 200 and headers["cache-control"] == "no-store"
        assert settings == {"model": "model", "context": 256, "temperature": 0.6, "thinking_switch": False, "tools": False,
                            "drafts": False, "examples": (DEMO / "example_prompts.txt").read_text().splitlines()}  # fmt: skip
        for path, kind in [("/", "text/html"), ("/page/main.js", "text/javascript"), ("/page/style.css", "text/css")]:
            status, headers, _ = running.send("GET", path)
            assert status == 200 and headers["content-type"].startswith(kind) and "content-security-policy" in headers
        for path in ("/page/", "/page/none.js", "/page/../app.py", "/page/%2e%2e/app.py", "/page/vendored/files.json"):
            assert running.send("GET", path)[0] == 404
        if key:
            running.key = None
            for path, challenge in [("/page/main.js", "Basic"), ("/page/settings.json", "Bearer")]:
                status, headers, _ = running.send("GET", path)
                assert status == 401 and headers["www-authenticate"].startswith(challenge)  # the page itself asks for its key
