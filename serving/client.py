"""The client of an endpoint, and `helio predict`.

    helio predict photo.jpg scan.png
    helio predict photo.jpg --endpoint http://gpu-box:8000 --json

It needs neither Ray nor TensorFlow.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ReadTimeoutError
from urllib3.util import Retry

from cluster.errors import EndpointError, HelioError
from serving.config import ServeConfig

if TYPE_CHECKING:
    from cluster.output import Output
    from cluster.recipe import Recipe

RETRIES = 5
BACKOFF_S = 0.1
"""The second try again waits twice this long, each further one twice as long as the one before."""


class ImageError(HelioError):
    """An image that cannot be read or that the endpoint refuses."""


@dataclass(frozen=True)
class Prediction:
    """An endpoint's answer for one image."""

    request_id: str
    label: str
    probability: float
    predictions: list[dict[str, Any]]
    """The most probable classes, best first: `label`, `probability`."""
    model: dict[str, str]
    """What answered: `name`, `version`, `digest`."""
    probabilities: dict[str, float] | None
    """Of every class, where asked for."""


class Client:
    """Talks to one endpoint over one connection; give each thread its own."""

    def __init__(self, url: str, timeout_s: float = 30.0) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._timeout_s = timeout_s
        self._session = self._open_session()
        # A prediction changes nothing, so a connection that was lost on the way may be tried again; once, because the
        # request may have been what broke it. A refused connection and an overloaded endpoint have not begun the work.
        retry = Retry(
            total=RETRIES,
            read=1,
            other=0,
            status_forcelist=[503],
            allowed_methods=None,
            backoff_factor=BACKOFF_S,
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retry))

    def _open_session(self) -> requests.Session:
        session = requests.Session()
        try:
            host = urlsplit(self.url).hostname
        except ValueError as error:
            raise EndpointError(
                f"the endpoint must be a URL as http://127.0.0.1:8000, got {self.url}: {error}"
            ) from None
        # A proxy that the environment names cannot reach this machine's own loopback.
        session.trust_env = host not in ("127.0.0.1", "localhost", "::1")
        return session

    def predict(self, image: bytes | Path, probabilities: bool = False) -> Prediction:
        """Classify one image, given as encoded bytes or as a file.

        Raises ImageError when the file cannot be read or is refused, EndpointError when there is no answer.
        """
        try:
            data = image.read_bytes() if isinstance(image, Path) else image
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror}") from None
        answer = self._call(
            "POST",
            "/v1/predict",
            params={"probabilities": "true"} if probabilities else None,
            data=data,
            headers={"Content-Type": "application/octet-stream"},
        )
        try:
            best = answer["predictions"][0]
            return Prediction(
                answer["request_id"],
                best["label"],
                best["probability"],
                answer["predictions"],
                answer["model"],
                answer.get("probabilities"),
            )
        except (KeyError, IndexError, TypeError):
            raise EndpointError(
                f"{self.url} answers something else than predictions: is it helio's endpoint?"
            ) from None

    def model(self) -> dict[str, Any]:
        """What the endpoint serves: name, version, digest, classes, image_size. Raises EndpointError."""
        return self._call("GET", "/v1/model")

    def ready(self) -> bool:
        """Whether the endpoint answers now, asked once."""
        with self._open_session() as session:
            try:
                return session.get(f"{self.url}/readyz", timeout=self._timeout_s).status_code == 200
            except requests.RequestException:
                return False

    def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            response = self._session.request(method, self.url + path, timeout=self._timeout_s, **arguments)
            answer = response.json() if "json" in response.headers.get("content-type", "") else None
        except (requests.RequestException, ValueError) as error:
            if _timed_out(error):
                raise EndpointError(f"{self.url} did not answer within {self._timeout_s:g} s") from None
            raise EndpointError(
                f"no endpoint answers at {self.url}: start one with `helio deploy RECIPE`, or give --endpoint URL"
            ) from None
        if response.status_code == 200 and isinstance(answer, dict):
            return answer
        refusal = answer.get("error") if isinstance(answer, dict) else None
        if not isinstance(refusal, dict):
            raise EndpointError(
                f"{self.url} answered {response.status_code}: it has no replica, or is not helio's endpoint"
            )
        message = str(refusal.get("message"))
        if response.status_code in (400, 413, 415):
            raise ImageError(message)
        raise EndpointError(f"{self.url} answered {response.status_code}: {message}")


def _timed_out(error: Exception) -> bool:
    """Whether the endpoint was silent, also where that is the reason behind tries that came to their end."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(error, requests.Timeout) or isinstance(reason, ReadTimeoutError)


def endpoint_url(config: ServeConfig, any_host: str = "127.0.0.1") -> str:
    """The URL of the endpoint that `config` describes; `any_host` stands for one that is open to the network."""
    host = any_host if config.host in ("0.0.0.0", "::") else config.host
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def predict_command(
    files: Sequence[str], recipe: "Recipe | None", endpoint: str | None, as_json: bool, output: "Output"
) -> int:
    """`helio predict`: 0 when every file was answered, 2 when one was not; the others are answered all the same."""
    config = recipe.section(ServeConfig) if recipe else ServeConfig()
    client = Client(endpoint or endpoint_url(config))
    answers: list[dict[str, Any]] = []
    failed = False
    for file in files:
        try:
            prediction = client.predict(Path(file))
        except ImageError as error:
            failed = True
            print(f"helio: {file}: {error}", file=output.messages)
            continue
        except EndpointError as error:
            # Without an endpoint the files that are left would only repeat the line.
            failed = True
            print(f"helio: {file}: {error}", file=output.messages)
            break
        answers.append({"file": file, **asdict(prediction)})
        if not as_json:
            print(f"{file}  {prediction.label}  {prediction.probability:.4f}", file=output.results, flush=True)
    if as_json:
        print(json.dumps({"predictions": answers}, indent=2), file=output.results)
    return 2 if failed else 0
