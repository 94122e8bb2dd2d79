"""Files over HTTP: read from any place on, taken up again where a connection breaks."""

import io
import time
from collections.abc import Iterator
from typing import BinaryIO, NoReturn

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from cluster.location import Entry, Info, buffered

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
ATTEMPTS = 4
"""How often a request, or the rest of a broken one, is asked for before it is given up."""
READ_BYTES = 2**20
CONNECTIONS = 32


def with_retries(session: requests.Session) -> requests.Session:
    """The same session, which asks again when the server is busy, failing or not to be reached."""
    retry = Retry(
        total=ATTEMPTS - 1, backoff_factor=0.2, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=CONNECTIONS))
    return session


class Web:
    """One web server."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._session = with_retries(requests.Session())

    def info(self, path: str) -> Info | None:
        """None when the server says that there is nothing; the size is 0 where it does not tell. Raises OSError."""
        try:
            # Not HEAD: signed addresses and some servers allow GET alone. The body is left unread.
            with _ask(self._session, f"{self._store}/{path}", {}) as answer:
                headers = answer.headers
        except FileNotFoundError:
            return None
        return Info(False, int(headers.get("Content-Length", 0)), _version(answer))

    def entries(self, path: str) -> Iterator[Entry]:
        """Refused."""
        raise OSError("a folder cannot be listed over HTTP: name a manifest, one tar, TFRecord or Parquet file")

    def open_input(self, path: str) -> BinaryIO:
        """A stream that can be sought in."""
        return buffered(_WebFile(self._session, f"{self._store}/{path}"), READ_BYTES)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Refused."""
        raise OSError("nothing can be written over HTTP")


class _WebFile(io.RawIOBase):
    def __init__(self, session: requests.Session, url: str) -> None:
        super().__init__()
        self._session = session
        self._url = url
        self._position = 0
        self._answer: requests.Response | None = None
        self._version = ""
        self._size = 0
        self._connect()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + (0, self._position, self._size)[whence]
        if position != self._position:
            self._disconnect()
            self._position = position
        return position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        attempt = 0
        while True:
            try:
                if self._answer is None:
                    if self._position >= self._size > 0:
                        return 0
                    self._connect()
                data = self._answer.raw.read(len(buffer))  # type: ignore[union-attr]
                buffer[: len(data)] = data
                self._position += len(data)
                return len(data)
            except (HTTPError, requests.ConnectionError) as error:
                attempt += 1
                self._disconnect()
                if attempt == ATTEMPTS:
                    raise OSError(f"the connection broke at byte {self._position:,}: {_brief(error)}") from None
                time.sleep(0.2 * 2**attempt)

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _connect(self) -> None:
        headers = {"Range": f"bytes={self._position}-"} if self._position else {}
        answer = _ask(self._session, self._url, headers)
        if self._version and _version(answer) != self._version:
            answer.close()
            raise OSError("it changed while it was read")
        self._answer, self._version = answer, _version(answer)
        if answer.status_code != 206:
            self._size = int(answer.headers.get("Content-Length", 0))
            skip = self._position
            while skip and (data := answer.raw.read(min(skip, READ_BYTES))):
                skip -= len(data)

    def _disconnect(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None


def _ask(session: requests.Session, url: str, headers: dict[str, str]) -> requests.Response:
    """The answer to a GET with its body still to be read. Raises OSError."""
    # The bytes as they are stored: a range of a compressed body is worth nothing.
    headers = {"Accept-Encoding": "identity", **headers}
    try:
        answer = session.get(url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S))
    except requests.RequestException as error:
        raise OSError(f"the server cannot be reached: {_brief(error)}") from None
    if answer.status_code >= 400:
        answer.close()
        _refuse(answer.status_code, answer.reason)
    return answer


def _refuse(status: int, reason: str) -> NoReturn:
    if status in (404, 410):
        raise FileNotFoundError(f"the server answers {status} {reason}")
    raise OSError(f"the server answers {status} {reason}")


def _version(answer: requests.Response) -> str:
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""


def _brief(error: Exception) -> str:
    """The innermost cause, as `Connection refused`."""
    text = str(error)
    return text.rpartition(": ")[2].strip("'\")( ") or type(error).__name__
