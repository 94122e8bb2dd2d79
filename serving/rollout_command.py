"""`helio rollout`: roll a version out step by step, at an endpoint that runs. It starts no Ray.

helio rollout start --version 7 --why "trained on the new labels"
helio rollout status --endpoint https://gpu-box:8000 --key-file key.txt
helio rollout abort --why "the labels were wrong"
"""

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.errors import HelioError
from cluster.tables import duration_text, shares_text
from serving.client import Client, endpoint_url
from serving.client.answers import not_ours
from serving.client.command import read_key
from serving.config import ServeConfig

if TYPE_CHECKING:
    from cluster.output import Output

LINES = 10
"""Entries of the audit log that a terminal has room for."""
TITLES = {"error": "failed", "slow": "slow", "disagreement": "disagrees", "wrong": "wrong"}


def change_command(
    action: str,
    version: str | None,
    why: str | None,
    endpoint: str | None,
    key_file: str | None,
    as_json: bool,
    output: "Output",
) -> int:
    """`helio rollout start|pause|resume|promote|abort`: what the roll-out is after it."""
    if not (why or "").strip():
        raise HelioError(f'--why must say why, for the audit log, as in helio rollout {action} --why "new labels"')
    if action == "start":
        version = version or "candidate"
    with _client(endpoint, key_file) as client:
        document = _checked(client, client.order(action, str(why), version))
    if as_json:
        print(json.dumps(document, indent=2), file=output.results)
    else:
        print(_headline(document["rollout"]), file=output.results)
    return 0


def status_command(endpoint: str | None, key_file: str | None, as_json: bool, output: "Output") -> int:
    """`helio rollout status`: where the roll-out stands, what both arms have shown, and the last of the audit log."""
    with _client(endpoint, key_file) as client:
        document = _checked(client, client.rollout())
    if as_json:
        print(json.dumps(document, indent=2), file=output.results)
        return 0
    rollout, audit = document["rollout"], document["audit"]
    if rollout is None:
        print(
            f"no version was rolled out {'since the endpoint was started' if audit else 'yet'}: `helio rollout start "
            "--why WHY` begins with the candidate",
            file=output.results,
        )
    else:
        print(_headline(rollout), file=output.results)
        print(f"stage {rollout['stage']} since {_moment(rollout['since'])}: {_needs(rollout)}", file=output.results)
        console = Console(file=output.results, highlight=False)
        console.print(_arms(rollout))
    for entry in audit[-LINES:]:
        print(f"{_moment(entry['at'])}  {entry['who']}  {entry['action']}: {entry['why']}", file=output.results)
    if document.get("audit_fault"):
        print(f"helio: {document['audit_fault']}", file=output.messages)
    return 0


def _client(endpoint: str | None, key_file: str | None) -> Client:
    key = read_key(Path(key_file)) if key_file else None
    return Client(endpoint or endpoint_url(ServeConfig()), key=key)


def _checked(client: Client, document: dict[str, Any]) -> dict[str, Any]:
    if "rollout" not in document:
        raise not_ours(client.url)
    return document


def _headline(rollout: Mapping[str, Any]) -> str:
    state = rollout["state"].replace("_", " ")
    versions = rollout["candidate"]["version"], rollout["champion"]["version"]
    line = f"{state}: {shares_text(*versions, rollout['share'])}"
    return f"{line} ({rollout['reason']})" if rollout["reason"] else line


def _needs(rollout: Mapping[str, Any]) -> str:
    """What the next step waits for."""
    if rollout["state"] not in ("shadow", "sharing", "paused"):
        return "it takes no more steps" if rollout["state"] != "loading" else "replicas load the candidate"
    missing = rollout["min_requests"] - rollout["arms"]["candidate"]["requests"]
    waits = [f"{missing} requests more"] if missing > 0 else []
    open_tests = [TITLES[fault] for fault, test in rollout["tests"].items() if test["needed"] and test["safe"] < 1]
    if open_tests:
        waits.append(f"more evidence on {', '.join(open_tests)}")
    left_s = rollout["since"] + rollout["min_stage_s"] - time.time()
    if left_s > 0:
        waits.append(f"{duration_text(left_s)} more")
    told = f"the next step wants {' and '.join(waits)}" if waits else "the next step is earned"
    return f"{told}, and a resume" if rollout["state"] == "paused" else told


def _arms(rollout: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("in this stage")
    for arm in ("champion", "candidate"):
        table.add_column(escape(f"{arm} {rollout[arm]['version']}"), justify="right")
    for title in ("allowed", "harm", "for a step"):
        table.add_column(title, justify="right")
    arms = [rollout["arms"][arm]["requests"] for arm in ("champion", "candidate")]
    table.add_row("requests", *(f"{count:,}" for count in arms), "", "", "")
    for fault, test in rollout["tests"].items():
        champion = "-" if fault == "disagreement" else _rate(test["champion"])
        allowed = f"{'' if fault == 'disagreement' else '+'}{100 * test['tolerance']:g} %"
        step = _percent(test["safe"]) if test["needed"] else "-"
        table.add_row(TITLES[fault], champion, _rate(test["candidate"]), allowed, _percent(test["harm"]), step)
    table.caption = "rates with bounds that hold whenever you look; harm at 100 % rolls back, a step wants 100 %"
    table.caption_justify = "left"
    return table


def _rate(rate: Mapping[str, Any]) -> str:
    if not rate["n"]:
        return "-"
    return f"{rate['k']:,}: {100 * rate['rate']:.1f} % ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.0f} %"


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
