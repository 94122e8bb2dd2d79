"""The page at `/`: give it an image and see the answer, say when it is wrong, watch the roll-out and the replicas.

Plain HTML, CSS and JavaScript modules, served as they are. Nothing comes from another host, and the policy below
makes the browser hold it to that.
"""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

SECURITY_HEADERS = {
    # An image that a user gives is shown from a blob, the icon is a data: URL. Trusted types make the browser refuse
    # any markup that is made from a string, so that a class name stays text.
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "object-src 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def page_routes() -> list[BaseRoute]:
    """Routes of the page: `/`, and `/page/<file>` for what it loads. They ask for no API key.

    Raises OSError when a file of this package is missing.
    """
    files = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in MEDIA_TYPES)
    return [
        Route("/" if path.suffix == ".html" else f"/page/{path.name}", _endpoint(path.read_bytes(), path.suffix))
        for path in files
    ]


def _endpoint(content: bytes, suffix: str) -> Callable[[Request], Awaitable[Response]]:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    # A browser keeps the files and asks each time whether they are still right: what it runs is then always one
    # version of the page, also in the minute after the endpoint was changed.
    headers = {**SECURITY_HEADERS, "cache-control": "no-cache", "etag": etag}

    async def serve(request: Request) -> Response:
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=MEDIA_TYPES[suffix], headers=headers)

    return serve
