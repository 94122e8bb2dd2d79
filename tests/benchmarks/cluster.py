"""helio on four nodes with addresses of their own: results as at home, what a lost node costs, how far it goes.

    make bench-cluster
    python -m tests.benchmarks.cluster equality | losses | capacity

The nodes are network namespaces of this machine, with token authentication and HTTPS; jobs come from a fifth one. They
share its cores, so CPU time and bytes are what is measured. Making them needs root.

equality: a job whose client is killed, followed from another machine, and the same recipe at home.
losses: the same job, with a worker node killed in each stage and a new one in its place, beside the undisturbed one.
capacity: four workers on four nodes and one on one; from that a table of what up to 1,000 nodes would do.
"""

import sys
from pathlib import Path
from typing import Any

from tests.cluster import capacity, scaling
from tests.cluster.lab import lab
from tests.cluster.losses import Killer, ask_while_serving
from tests.cluster.namespaces import fault
from tests.cluster.small_run import PROFILE, STAGES, at_home, compare, results, submitted, subset
from tests.measure import run_benchmark

PER_CLASS = 100


def main() -> None:
    """Run the parts that are named, or all of them."""
    if (reason := fault()) is not None:
        raise SystemExit(f"this benchmark needs machines of its own: {reason}")
    parts = {part.__name__.strip("_"): part for part in (_equality, _losses, _capacity)}
    asked = sys.argv[1:] or list(parts)
    if unknown := set(asked) - set(parts):
        raise SystemExit(f"there is no part {', '.join(sorted(unknown))}: {', '.join(parts)}")
    run_benchmark(lambda scratch: {name: parts[name](scratch / name) for name in asked})


def _equality(scratch: Path) -> dict[str, Any]:
    source = subset(scratch, PER_CLASS)
    with lab(3, scratch / "lab", cpus=2, spares=1, **PROFILE) as nodes:
        run, watch = submitted(nodes, "four", source, lambda url: None)
        four = results(run)
        home, alone = at_home(nodes.spares[0], scratch / "home", source)
        one = results(home)
    equal = compare(one, four)
    for name, said in equal.items():
        print(f"  {name:20} {said}")
    cpu = {
        where: round(sum(one.between(f"{stage} begins", f"{stage} ends").cpu_s for stage in STAGES), 1)
        for where, one in (("four_nodes", watch), ("home", alone))
    }
    print(f"  CPU seconds of the five stages: {cpu['four_nodes']} on four nodes, {cpu['home']} at home")
    return {"equal": equal, "cpu_s": cpu}


def _losses(scratch: Path) -> dict[str, Any]:
    source = subset(scratch, PER_CLASS)
    image = next(source.rglob("*.jpg"))
    with lab(3, scratch / "lab", cpus=2, spares=4, **PROFILE) as nodes:
        ask, answers = ask_while_serving(nodes, image, None)
        calm_run, before = submitted(nodes, "undisturbed", source, ask)
        killer = Killer(nodes)
        ask, hurt_answers = ask_while_serving(nodes, image, killer)
        hurt_run, after = submitted(nodes, "losses", source, ask, killer.actions())
        killer.wait()
        calm, hurt = results(calm_run), results(hurt_run)
    found: dict[str, Any] = {"serving": {"undisturbed": answers, "with a loss": hurt_answers}}
    for stage in STAGES:
        a, b = (one.between(f"{stage} begins", f"{stage} ends") for one in (before, after))
        found[stage] = {
            "cpu_s": [round(a.cpu_s, 1), round(b.cpu_s, 1)],
            "seconds": [round(a.seconds), round(b.seconds)],
        }
        print(
            f"  {stage:9} CPU {a.cpu_s:7.1f} s undisturbed, {b.cpu_s:7.1f} s with a loss; {a.seconds:5.0f} and "
            f"{b.seconds:5.0f} s"
        )
    for name, said in found["serving"].items():
        print(f"  served, {name}: {said}")
    found["resumed_from_steps"] = hurt["resumed_from_steps"]
    found["failures"] = hurt["failures"]
    found["equal"] = compare(calm, hurt)
    for name, said in found["equal"].items():
        print(f"  {name:20} {said}")
    return found


def _capacity(scratch: Path) -> dict[str, Any]:
    four, one = (scaling.measure(scratch, nodes) for nodes in (4, 1))
    return capacity.report(one, four)


if __name__ == "__main__":
    main()
