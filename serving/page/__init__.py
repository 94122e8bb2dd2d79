"""The page at `/`: give it an image and see the answer, say when it is wrong, watch the roll-out and the replicas.

Plain HTML, CSS and JavaScript modules, served as they are. Nothing comes from another host, and the policy below
makes the browser hold it to that.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.responses import Response

MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

HEADERS = {
    # An image that a user gives is shown from a blob, the icon is a data: URL. Trusted types make the browser refuse
    # any markup that is made from a string, so that a class name stays text.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src blob: data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # A browser keeps the files and asks each time whether they are still right: what it runs is then always one
    # version of the page, also in the minute after the endpoint was changed.
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page, in memory."""

    content: bytes
    media_type: str
    etag: str

    def respond(self, held: str) -> Response:
        """The file, or that it is what the browser holds; `held` is the header If-None-Match."""
        headers = {**HEADERS, "etag": self.etag}
        if self.etag in held:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def page_files() -> dict[str, PageFile]:
    """The files of the page by their URL's path: `/`, and `/page/…` for what it loads."""
    found = {}
    for path in Path(__file__).parent.iterdir():
        if media_type := MEDIA_TYPES.get(path.suffix):
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found["/" if media_type == "text/html" else f"/page/{path.name}"] = PageFile(content, media_type, etag)
    return found
