"""What an evaluation says, what export's own comparison says, and whether a model may be promoted after them.

A verdict is a dictionary that a bundle's manifest holds:

    source            "helio evaluate", "export", or None where nothing was compared
    verdict           "better", "worse", "no difference shown" (what the 95 % interval leaves), or "not compared"
    difference        accuracy from the pre-trained start less that from scratch, on the test split, -1 to 1
    interval          its 95 % interval, see jobs.evaluation.statistics
    labels_fraction   share of the training images whose labels both starts used
    seeds, test_images, accuracy_pretrained, accuracy_scratch
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.run import Run
from jobs.evaluation.cells import Arm
from jobs.evaluation.statistics import Right, difference, estimate

FILE = "evaluation.json"
NEAR = 2.0
"""An evaluation speaks of a model that saw at most so many times as many labels, or so many times fewer."""


def compare(right: Mapping[Arm, Sequence[Right]]) -> dict[str, Any]:
    """Both arms and their difference, from what each seed of `pretrained` and of `scratch` has right."""
    rows = {arm: np.stack(seeds) for arm, seeds in right.items()}
    gain = difference(rows["pretrained"], rows["scratch"])
    arms: dict[str, Any] = {}
    for arm, values in rows.items():
        accuracy = estimate(values)
        arms[arm] = {
            "accuracy": accuracy.mean,
            # Near the ends the interval of a mean reaches past what a share can be.
            "interval": [max(0.0, accuracy.low), min(1.0, accuracy.high)],
            "by_seed": values.mean(axis=1).tolist(),
        }
    return {
        **arms,
        "difference": gain.mean,
        "interval": [gain.low, gain.high],
        "verdict": gain.verdict,
    }


def overall(fractions: Sequence[Mapping[str, Any]], wanted: float) -> dict[str, Any]:
    """The verdict of an evaluation: of fine-tuning with the share of labels that is nearest in ratio to `wanted`."""
    nearest = min(fractions, key=lambda entry: abs(math.log(entry["fraction"] / wanted)))
    return _verdict("helio evaluate", nearest["finetune"], nearest["fraction"])


def own_verdict(pretrained: Right, scratch: Right, fraction: float) -> dict[str, Any]:
    """Export's own comparison, of the two winners that were retrained once each: one seed."""
    return _verdict("export", compare({"pretrained": [pretrained], "scratch": [scratch]}), fraction)


def no_verdict(reason: str, fraction: float) -> dict[str, Any]:
    """Where nothing was compared; the model saw this share of the labels."""
    return {"source": None, "verdict": "not compared", "reason": reason, "labels_fraction": fraction}


def _verdict(source: str, compared: Mapping[str, Any], fraction: float) -> dict[str, Any]:
    return {
        "source": source,
        **{name: compared[name] for name in ("verdict", "difference", "interval")},
        "labels_fraction": fraction,
        "seeds": len(compared["pretrained"]["by_seed"]),
        "accuracy_pretrained": compared["pretrained"]["accuracy"],
        "accuracy_scratch": compared["scratch"]["accuracy"],
    }


def notes_on(method: str) -> list[str]:
    """What a share of the labels does not tell of a start that this method has pre-trained."""
    if method != "supervised":
        return []
    return [
        "pretrain.method is supervised: pre-training has seen the labels of the whole training split, so that a share "
        "of the labels is a share only for the start from scratch"
    ]


def read_evaluation(run: Run) -> dict[str, Any] | None:
    """The document that `helio evaluate` wrote for this run, or None."""
    path = run.directory / FILE
    return json.loads(path.read_text()) if path.exists() else None


def evaluation_of(run: Run, checkpoint: str) -> dict[str, Any] | None:
    """The same, where it is of this checkpoint."""
    document = read_evaluation(run)
    return document if document is not None and document["checkpoint"] == checkpoint else None


def lacks_gain(evaluation: Mapping[str, Any] | None, own: Mapping[str, Any]) -> str | None:
    """Why a model from a pre-trained start has not beaten scratch; None where it has, or where nothing was compared.

    An evaluation of several seeds, with about as many labels, that shows a difference decides. Where it shows none, and
    without one, the test figures of the very two models decide, by the point: an interval of one small test split would
    let no model pass.
    """
    decides = own
    if (
        evaluation is not None
        and abs(math.log(evaluation["labels_fraction"] / own["labels_fraction"])) <= math.log(NEAR)
        and (evaluation["verdict"] != "no difference shown" or own["source"] is None)
    ):
        decides = evaluation
    if decides["source"] is None or decides["difference"] > 0:
        return None
    return (
        f"{decides['source']} has {decides['accuracy_pretrained']:.1%} from the pre-trained start and "
        f"{decides['accuracy_scratch']:.1%} from scratch"
    )


def sentence(verdict: Mapping[str, Any]) -> str:
    """A verdict for a reader."""
    if verdict["source"] is None:
        return f"not compared with scratch: {verdict['reason']}"
    says = {
        "better": "the pre-trained start is better than scratch",
        "worse": "the pre-trained start is worse than scratch",
        "no difference shown": "no difference between the pre-trained start and scratch is shown",
    }[verdict["verdict"]]
    low, high = (100 * value for value in verdict["interval"])
    seeds = "1 seed" if verdict["seeds"] == 1 else f"{verdict['seeds']} seeds"
    gain = f"{100 * verdict['difference']:+.1f} points ({low:+.1f} to {high:+.1f}; {seeds})"
    return f"with {100 * verdict['labels_fraction']:.3g} % of the labels {says}: {gain}"
