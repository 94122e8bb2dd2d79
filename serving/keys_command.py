"""`helio keys`: make, list and revoke the keys of a model's endpoint, whether it runs or not. It starts no Ray.

helio keys create quickstart --name "web shop" --rate 5/s --quota 1000/day
helio keys create quickstart --name "a visitor" --trial
helio keys list quickstart
helio keys revoke quickstart 3f1c0a9be512 --why "the secret was in a log"
"""

import json
import math
import os
import re
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import HelioError
from cluster.recipe import load_recipe, shipped_recipes
from cluster.schema import nearest
from cluster.storage import entries
from cluster.tables import table_text
from serving.admission import DAY_S, PERIODS, Key, Quota, Rate, moment
from serving.client.calls import user_name
from serving.endpoints import check_machine
from serving.keys import KeyStore, control_db, publish_control

if TYPE_CHECKING:
    from cluster.output import Output

TRIAL_EXPIRES, TRIAL_RATE, TRIAL_BURST, TRIAL_QUOTA = "14d", "1/s", 5, "200/total"
"""A trial key: two weeks to look at a model by hand. The burst lets a page send an image and ask for its status."""


def create_command(
    reference: str,
    storage: Path,
    name: str,
    scopes: Sequence[str] | None,
    expires: str | None,
    rate: str | None,
    burst: int | None,
    quota: str | None,
    trial: bool,
    as_json: bool,
    output: "Output",
) -> int:
    """`helio keys create`: the secret alone on standard output, what it is good for beside it."""
    if trial:
        given = {"--expires": expires, "--rate": rate, "--burst": burst, "--quota": quota}
        for option, value in given.items():
            if value is not None:
                raise HelioError(f"--trial sets {', '.join(given)}: leave {option} out, or --trial")
        expires, rate, burst, quota = TRIAL_EXPIRES, TRIAL_RATE, TRIAL_BURST, TRIAL_QUOTA
    model = find_model(reference, storage)
    check_machine(storage, model)
    options: dict[str, Any] = {"scopes": scopes} if scopes else {}
    options["expires"] = parse_expiry("never" if expires is None else expires, time.time())
    options["rate"], options["quota"] = parse_rate(rate, burst), parse_quota(quota)
    with closing(KeyStore(control_db(storage, model))) as store:
        key, secret = store.create(name, user_name(), **options)
    publish_control(storage, model)
    if as_json:
        _print_json({"model": model, "key": _document(key), "secret": secret}, output)
        return 0
    print(secret, file=output.results)
    print(f"helio: {key} of {model}: {_described(key)}", file=output.messages)
    print("helio: its secret is shown this once; send it as `Authorization: Bearer helio_…`", file=output.messages)
    return 0


def list_command(reference: str, storage: Path, as_json: bool, output: "Output") -> int:
    """`helio keys list`: one line for each key."""
    model = find_model(reference, storage)
    keys: list[Key] = []
    if control_db(storage, model).exists():
        with closing(KeyStore(control_db(storage, model))) as store:
            keys = store.keys()
    if as_json:
        _print_json({"model": model, "keys": [_document(key) for key in keys]}, output)
    elif keys:
        head = ("key", "name", "state", "scopes", "expires", "rate", "quota", "used")
        now = time.time()
        rows = [
            (
                key.id,
                key.name,
                key.state(now),
                " ".join(key.scopes),
                _expiry(key),
                str(key.rate or "any"),
                str(key.quota or "any"),
                f"{key.used:,}",
            )
            for key in keys
        ]
        print(table_text([head, *rows], numeric=(7,)), file=output.results)
    else:
        print(f"{model} has no key: `helio keys create {reference} --name NAME` makes one", file=output.messages)
    return 0


def revoke_command(reference: str, storage: Path, key_id: str, why: str, as_json: bool, output: "Output") -> int:
    """`helio keys revoke`: the endpoint refuses the key from its next request on."""
    if not why.strip():
        raise HelioError('--why must say why the key is revoked, as in --why "the secret was in a log"')
    model = find_model(reference, storage)
    check_machine(storage, model)
    if not control_db(storage, model).exists():
        raise HelioError(f"no key has the id {key_id!r}: {model} has no key yet")
    with closing(KeyStore(control_db(storage, model))) as store:
        key = store.revoke(key_id, user_name(), why)
    publish_control(storage, model)
    if as_json:
        _print_json({"model": model, "key": _document(key)}, output)
    else:
        when = moment(key.revoked or 0)
        print(f"{key} is revoked since {when} by {key.revoked_by}: {key.revoked_why}", file=output.results)
    return 0


def find_model(reference: str, storage: Path) -> str:
    """The model of a recipe (a file or a shipped one), or one that has an endpoint in `storage`. Raises HelioError."""
    if reference in shipped_recipes() or os.path.isfile(reference):
        return load_recipe(reference).name
    deployed = {name for name, is_folder in entries(storage / "serving").items() if is_folder}
    if reference not in deployed:
        close = nearest(reference, deployed | set(shipped_recipes()), "there are")
        raise HelioError(f"no recipe, and no model that was deployed, is named {reference!r}{close}")
    return reference


def parse_expiry(text: str, now: float) -> float | None:
    """`never`, a time from now (`30d`, `12h`), or a date with or without a time (UTC). Raises HelioError."""
    if text == "never":
        return None
    found = re.fullmatch(r"(\d{1,6})([dh])", text, re.ASCII)
    if found:
        return math.floor(now) + int(found[1]) * (DAY_S if found[2] == "d" else 3600)
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise HelioError(f"--expires must be as 30d, 12h, 2026-12-31 (00:00 UTC) or never, got {text!r}") from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def parse_rate(text: str | None, burst: int | None) -> Rate | None:
    """`5/s` and how many at once, by default what comes in a second, at least one. Raises HelioError."""
    if text is None:
        if burst is not None:
            raise HelioError("--burst says how many requests of a --rate may come at once: give --rate, too")
        return None
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)/s", text, re.ASCII)
    if not found:
        raise HelioError(f"--rate must be requests a second as 5/s or 0.5/s, got {text!r}")
    per_s = float(found[1])
    return Rate(per_s, math.ceil(max(per_s, 1)) if burst is None else burst)


def parse_quota(text: str | None) -> Quota | None:
    """`1000/day`, `1000/month` or `1000/total`. Raises HelioError."""
    if text is None:
        return None
    found = re.fullmatch(rf"(\d{{1,15}})/({'|'.join(PERIODS)})", text, re.ASCII)
    if not found:
        raise HelioError(f"--quota must be images in a period as 1000/day, 1000/month or 1000/total, got {text!r}")
    return Quota(int(found[1]), found[2])


def _described(key: Key) -> str:
    limits = [str(limit) for limit in (key.rate, key.quota) if limit]
    return "; ".join([", ".join(key.scopes), f"expires {_expiry(key)}", *limits])


def _expiry(key: Key) -> str:
    return "never" if key.expires is None else moment(key.expires)


def _document(key: Key) -> dict[str, Any]:
    return {**asdict(key), "state": key.state(time.time())}


def _print_json(document: object, output: "Output") -> None:
    print(json.dumps(document, indent=2), file=output.results)
