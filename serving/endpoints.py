"""The endpoints of a storage and how they do, as `helio top` shows them. It loads neither Ray nor TensorFlow.

An endpoint leaves where it is in `<storage>/serving/<model>/endpoint-<port>.json` while it is up; one whose process was
killed leaves it behind, and does not answer.
"""

import json
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from cluster.addresses import is_loopback, keep_from_proxies
from cluster.errors import HelioError
from cluster.profile import Profile
from cluster.run import write_json
from cluster.storage import entries, fetch, is_mirrored, name_of, publish, remove
from serving.config import APPLICATION, PREDICTOR

WITHIN_S = 5.0
"""How long an endpoint may take to say how it is."""
ANSWERS = ("/v1/predict", "/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer")
"""Routes whose requests are counted."""

Endpoint = dict[str, Any]
"""What is known of one:

    url                 None where it is known of by Ray alone, and cannot be reached from here
    model, version      what answers, or None
    replicas            how many by state, as running
    target_replicas     how many there are to be, None where Ray is not asked
    requests            answered so far by all replicas
    queued, ongoing     images that wait for a batch, requests that are worked on
    p50_ms, p99_ms      of the champion
    rollout             of one under way: state, share (0 to 1), champion, candidate (versions); or None
    fault               why this is not all, or None
"""


@contextmanager
def announced(profile: Profile, model: str, url: str) -> Iterator[None]:
    """Leave in the storage where an endpoint is, for the length of the block."""
    path = profile.storage_path / "serving" / model / f"endpoint-{urlsplit(url).port}.json"
    write_json(path, {"url": url, "host": socket.gethostname(), "address": profile.address})
    publish(path)
    try:
        yield
    finally:
        remove(path)


def find_endpoints(profile: Profile, applications: Mapping[str, Any] | None) -> list[Endpoint]:
    """The endpoints of a profile that are up; `applications` is what Ray Serve's REST API says, where it is asked."""
    known = (applications or {}).get("applications", {}).get(APPLICATION)
    if applications is not None and known is None:
        return []
    asked = [found for url in _places(profile, applications) if (found := _ask(url, profile)) is not None]
    if known is None:
        return asked
    return [_with_replicas(asked[0] if asked else _unreached(), known)]


def _places(profile: Profile, applications: Mapping[str, Any] | None) -> list[str]:
    """Where endpoints may be."""
    here, found = socket.gethostname(), []
    nodes = [proxy["node_ip"] for proxy in (applications or {}).get("proxies", {}).values()]
    serving = profile.storage_path / "serving"
    models = [name for name, is_folder in entries(serving).items() if is_folder]
    for record in (record for model in models for record in _records(serving / model).values()):
        host = urlsplit(record["url"]).hostname or ""
        # A job knows the cluster that it runs on by no address.
        same = record["address"] == profile.address or host in nodes
        if same and (record["host"] == here or not is_loopback(host)):
            found.append(record["url"])
    if applications is not None and not found:
        # One that no command has started, as a RayService.
        options = applications.get("http_options") or {}
        if nodes and "port" in options and not is_loopback(options.get("host", "")):
            found.append(f"http://{nodes[0]}:{options['port']}")
    return found


def _records(directory: Path) -> dict[Path, dict[str, Any]]:
    """What the endpoints of a model have left of where they are."""
    found = {}
    for name in entries(directory):
        # One that ends meanwhile takes its own away.
        if fnmatch(name, "endpoint-*.json") and fetch(directory / name):
            with suppress(FileNotFoundError):
                found[directory / name] = json.loads((directory / name).read_text())
    return found


def check_machine(storage: Path, model: str) -> None:
    """Raise HelioError where the keys of a model are in use on another machine, and the storage is a bucket."""
    if not is_mirrored(storage):
        return
    for path, record in _records(storage / "serving" / model).items():
        if record["host"] != socket.gethostname():
            raise HelioError(
                f"the endpoint {record['url']} has the keys of {model} on {record['host']}, which writes them to the "
                f"bucket: call helio keys there; if it is up no more, delete {name_of(path)}"
            )


def _ask(url: str, profile: Profile) -> Endpoint | None:
    """None where nobody answers."""
    own = None if profile.tls is None else profile.tls.certificate_path
    certificate = str(own) if own is not None and own.exists() else None
    try:
        status = _get(url, "/v1/status", certificate)
        if status.status_code != 200:
            return {**_unreached(_refused(status)), "url": url}
        text = _get(url, "/metrics", certificate).text
        document = status.json()
        return {
            "url": url,
            "model": document["model"]["name"],
            "version": document["model"]["version"],
            "replicas": document["replicas"],
            "target_replicas": None,
            **_counted(text),
            **{name: document["arms"]["champion"][name] for name in ("p50_ms", "p99_ms")},
            "rollout": _under_way(document["rollout"]),
            "fault": None,
        }
    except (ValueError, KeyError, TypeError):
        # Its process was killed, and another has its port.
        return {**_unreached("what answers there is no endpoint of helio"), "url": url}
    except requests.exceptions.SSLError:
        return {**_unreached("its certificate is not trusted: set REQUESTS_CA_BUNDLE"), "url": url}
    except requests.RequestException:
        return None


def _get(url: str, path: str, certificate: str | None) -> requests.Response:
    keep_from_proxies()
    place = urlsplit(url)
    is_unheard = place.scheme == "https" or is_loopback(place.hostname or "")
    key = os.environ.get("HELIO_API_KEY") if is_unheard else None

    def signed(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if key:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    # As `auth`: a header would give way to what ~/.netrc has for the host. A redirect would take the key elsewhere.
    return requests.get(f"{url}{path}", auth=signed, timeout=WITHIN_S, allow_redirects=False, verify=certificate)


def _refused(answer: requests.Response) -> str:
    if answer.status_code in (401, 403):
        return "it wants a key with the scope status: set HELIO_API_KEY, which goes over https alone"
    return f"it answers with {answer.status_code}"


def _unreached(fault: str = "it cannot be reached from here") -> Endpoint:
    figures = ("url", "model", "version", "target_replicas", "requests", "queued", "ongoing", "p50_ms", "p99_ms")
    return {**dict.fromkeys(figures), "replicas": {}, "rollout": None, "fault": fault}


def _counted(text: str) -> dict[str, int]:
    """From the endpoint's metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    counts = dict.fromkeys(("requests", "queued", "ongoing"), 0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "helio_requests_total":
                own = sample.labels["route"] in ANSWERS and sample.labels["arm"] != "shadow"
                counts["requests"] += int(sample.value) if own else 0
            elif sample.name in ("helio_queue_length", "helio_ongoing_requests"):
                counts["queued" if sample.name == "helio_queue_length" else "ongoing"] += int(sample.value)
    return counts


def _under_way(rollout: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if rollout is None or rollout["state"] in ("promoted", "rolled_back", "aborted"):
        return None
    versions = {arm: rollout[arm]["version"] for arm in ("champion", "candidate")}
    return {"state": rollout["state"], "share": rollout["share"], **versions}


def _with_replicas(endpoint: Endpoint, application: Mapping[str, Any]) -> Endpoint:
    """Ray knows of replicas that start or end, too."""
    # Those that decode for them are not counted.
    deployment = application["deployments"].get(PREDICTOR, {"target_num_replicas": 0, "replicas": []})
    states = dict(Counter(replica["state"].lower() for replica in deployment["replicas"]))
    message = application["message"].strip().splitlines()
    wrong = application["status"] in ("UNHEALTHY", "DEPLOY_FAILED") and message
    return {**endpoint, "replicas": states, "target_replicas": deployment["target_num_replicas"]} | (
        {"fault": message[-1]} if wrong else {}
    )
