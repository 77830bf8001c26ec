"""The chat page's files over HTTP, and the policy under which a browser runs nothing else.

The page is `page/index.html` with its own scripts and style beside it. `page/vendored/` has other people's libraries as
they were published, each with its licence; `files.json` there names their sources and hashes.
"""

import gzip
import hashlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from starlette.datastructures import Headers
from starlette.responses import Response

from core.files import read_text
from serving.plan import Served

FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".woff2": "font/woff2",
}
# The page's scripts make elements and text nodes. HTML is parsed by DOMPurify alone, under its Trusted Types policy.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
}
EXAMPLES = "example_prompts.txt"  # beside a checkpoint's weights: questions to show, one a line
MAX_EXAMPLES, MAX_EXAMPLE_LENGTH = 3, 500


class PageFile(NamedTuple):
    """A file as it is served."""

    kind: str
    plain: bytes
    zipped: bytes  # gzip
    tag: str  # HTTP's ETag
    cached: str  # Cache-Control


@cache
def page_files() -> dict[str, PageFile]:
    """By path below `page/`: only these are served, whatever a path says."""
    files = {}
    for path in sorted(FOLDER.rglob("*")):
        if path.suffix in TYPES:
            name, plain = path.relative_to(FOLDER).as_posix(), path.read_bytes()
            zipped = plain if path.suffix == ".woff2" else gzip.compress(plain, mtime=0)
            # a vendored file's path names its version
            cached = "private, max-age=31536000, immutable" if name.startswith("vendored/") else "no-cache"
            tag = f'"{hashlib.sha256(plain).hexdigest()[:32]}"'
            files[name] = PageFile(TYPES[path.suffix], plain, zipped, tag, cached)
    return files


def page_response(name: str, asked: Headers) -> Response | None:
    """The file of that name, for a request with these headers; None where there is none."""
    file = page_files().get(name)
    if file is None:
        return None
    headers = HEADERS | {"ETag": file.tag, "Cache-Control": file.cached}
    if asked.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    zipped = "gzip" in asked.get("accept-encoding", "") and file.zipped is not file.plain
    if zipped:
        headers["Content-Encoding"] = "gzip"
    return Response(file.zipped if zipped else file.plain, media_type=file.kind, headers=headers)


def page_settings(served: Served) -> dict[str, Any]:
    """What the page has to know of the model. `examples` is empty where its directory has no example_prompts.txt."""
    defaults = served.defaults
    return {
        "model": served.names[0],
        "context": served.context,
        "temperature": defaults.temperature,
        "thinking_switch": served.tokenizer.has_thinking_switch,
        "tools": served.tool_style is not None and served.tokenizer.knows_tools,
        "drafts": served.marks_drafts,
        "examples": example_prompts(served.tokenizer.path.parent),
    }


def example_prompts(folder: Path) -> list[str]:
    """The first lines of the file EXAMPLES, none where there is no such file or it is no text."""
    try:
        lines = read_text(folder / EXAMPLES).splitlines()
    except (OSError, ValueError):
        return []
    return [line.strip() for line in lines if 0 < len(line.strip()) <= MAX_EXAMPLE_LENGTH][:MAX_EXAMPLES]
