"""The dashboard of a Ray cluster: where jobs are submitted and followed, also from another machine."""

import logging
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.addresses import is_loopback, keep_from_proxies
from cluster.errors import HelioError
from cluster.profile import Profile

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

WITHIN_S = 10.0
"""How long a dashboard may take to answer a question."""
TOKEN_FILE = "~/.ray/auth_token"
REASONS = {
    "mismatch": "its certificate is for another host",
    "certificate has expired": "its certificate has expired",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not trusted: name its CA's file in REQUESTS_CA_BUNDLE",
    "WRONG_VERSION_NUMBER": "it does not speak HTTPS there",
    "timed out": f"no answer within {WITHIN_S:g} s",
    "refused": "connection refused",
    "resolve": "no such host",
    "unreachable": "no way there",
}
"""What an exception's text says, in fewer words."""
NODES = "/api/v0/nodes?detail=true&limit=10000&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"


@dataclass(frozen=True)
class Node:
    """A machine of the cluster that is up."""

    name: str
    is_head: bool
    cpus: float
    gpus: float


class Dashboard:
    """Reaches the cluster of a profile. What it raises is HelioError, one line with the mend."""

    def __init__(self, profile: Profile) -> None:
        """Ask the cluster for its version, which must be this helio's."""
        self._name = profile.name
        if profile.dashboard is None:
            raise HelioError(
                f"profile {profile.name} has no dashboard, where jobs are submitted: set dashboard: https://HOST:8265, "
                "or use `helio run` on this machine"
            )
        self.address = profile.dashboard.rstrip("/")
        keep_from_proxies()
        self._trusted = trusted(profile) if self.address.startswith("https://") else True
        self._headers = {} if profile.auth_mode == "disabled" else {"Authorization": f"Bearer {self._token()}"}
        self._check_version(self.get("/api/version")["ray_version"])

    def get(self, path: str) -> Any:
        """What the dashboard answers, from JSON."""
        import requests

        try:
            answer = requests.get(
                f"{self.address}{path}", headers=self._headers, timeout=WITHIN_S, verify=self._trusted
            )
        except requests.RequestException as error:
            raise self._unreachable(error) from None
        if answer.status_code in (401, 403):
            raise self._refused(answer.status_code)
        try:
            answer.raise_for_status()
            return answer.json()
        except requests.RequestException:
            raise HelioError(
                f"profile {self._name}: {self.address} is no Ray dashboard (it answers {path} with "
                f"{answer.status_code}): see where `ray start` says that it is"
            ) from None

    @cached_property
    def jobs(self) -> "JobSubmissionClient":
        """Ray's own client of it."""
        # By default its WebSockets would trust other certificates than its requests do.
        return _quiet_client(self.address, headers=dict(self._headers), verify=self._trusted)

    def nodes(self) -> list[Node]:
        """Those that are up."""
        return [
            Node(
                node["node_name"],
                node["is_head_node"],
                node["resources_total"].get("CPU", 0.0),
                node["resources_total"].get("GPU", 0.0),
            )
            for node in self.get(NODES)["data"]["result"]["result"]
        ]

    def _token(self) -> str:
        check_unheard(self._name, self.address)
        return read_token(self._name)

    def _refused(self, status: int) -> HelioError:
        if not self._headers:
            return HelioError(
                f"profile {self._name}: the cluster at {self.address} wants a token: set auth_mode: token and put the "
                f"cluster's token into {TOKEN_FILE}"
            )
        return HelioError(
            f"profile {self._name}: the cluster at {self.address} refuses the token ({status}): get the one that it "
            "was started with (`ray get-auth-token` on its head node)"
        )

    def _unreachable(self, error: Exception) -> HelioError:
        reason = next((short for words, short in REASONS.items() if words in str(error)), str(error))
        return HelioError(
            f"profile {self._name}: no cluster can be reached at {self.address} ({reason}): start it, or mend dashboard"
        )

    def _check_version(self, theirs: str) -> None:
        from importlib.metadata import version

        ours = version("ray")
        if theirs != ours:
            raise HelioError(
                f"profile {self._name}: the cluster runs Ray {theirs}, this helio Ray {ours}: install the same on both "
                "(constraints.txt has the version)"
            )


class OwnDashboard:
    """The dashboard of the cluster that this process is a part of."""

    address = "this cluster"

    @cached_property
    def jobs(self) -> "JobSubmissionClient":
        """Ray's own client of it, which has address and token from the environment of a job."""
        return _quiet_client(None)


def _quiet_client(address: str | None, **options: Any) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    # What is uploaded is told by helio, in its own words; how a WebSocket was closed concerns nobody.
    for module in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    return JobSubmissionClient(address, **options)


def check_room(profile: Profile, kinds: list[str], nodes: list[Node]) -> None:
    """Raise CapacityError when a stage of `kinds` could never be placed on these nodes.

    What a described cluster may grow to has room: its profile says so (cluster.nodes).
    """
    if profile.nodes is not None:
        return
    from cluster.session import check_capacity, check_nodes

    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    check_capacity(profile, kinds, cpus, gpus, f"the cluster of {len(nodes)} nodes")
    check_nodes(profile, kinds, [{"CPU": node.cpus, "GPU": node.gpus} for node in nodes])


def check_unheard(name: str, address: str) -> None:
    """Raise HelioError where the token that a dashboard wants of profile `name` could be read on the way there."""
    place = urlsplit(address)
    if place.scheme == "http" and not is_loopback(place.hostname or ""):
        raise HelioError(
            f"profile {name}: the token would go to {address} for everybody on the way to read: use https://, or a "
            f"tunnel (`ssh -L 8265:localhost:{place.port or 80} {place.hostname}`) and dashboard: http://127.0.0.1:8265"
        )


def read_token(profile: str) -> str:
    """As Ray finds it: in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, in TOKEN_FILE.

    Raises HelioError where the profile of this name wants one and there is none.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = token_path()
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise HelioError(
            f"profile {profile} wants a token (auth_mode: token) and {path} cannot be read ({error.strerror}): put the "
            "cluster's token there, or name its file in RAY_AUTH_TOKEN_PATH"
        ) from None
    if not token:
        raise HelioError(f"profile {profile} wants a token (auth_mode: token) and {path} is empty: put it there")
    return token


def token_path() -> Path:
    """The file where Ray looks for its token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or TOKEN_FILE).expanduser()


def own_certificate(profile: Profile) -> Path:
    """The file of the certificate that `helio cluster up` makes for the dashboard, and of its copies."""
    return Path("~/.helio/dashboards").expanduser() / profile.name / "certificate.pem"


def trusted(profile: Profile) -> str:
    """The file, or directory, of the certificates that may vouch for the dashboard's. Raises HelioError."""
    from requests.utils import DEFAULT_CA_BUNDLE_PATH

    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if named := os.environ.get(variable):
            if not Path(named).exists():
                raise HelioError(f"{variable} names {named}, which is not there: give the file of a CA, or unset it")
            return named
    own = own_certificate(profile)
    return str(own) if profile.dashboard_tls is None and own.exists() else DEFAULT_CA_BUNDLE_PATH
