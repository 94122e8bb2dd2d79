"""The stages as functions, for programs and notebooks: what `helio ingest`, `pretrain`, `export` and `run` do, and what
`helio evaluate`, `predict --data` and `runs` tell.

    with create_run(load_recipe("quickstart")) as run:
        print(pretrain(run).knn_accuracy)

A stage goes up to itself on a run that is open, on which Ray stays up for the next one, or on a new run of a recipe.
All of them raise HelioError for what the user can mend.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import HelioError
from cluster.output import Output
from cluster.profile import Profile, load_profile
from cluster.recipe import Recipe, make_recipe
from cluster.run import Run
from jobs.evaluation.config import EvaluateConfig
from jobs.outcomes import Evaluated, Exported, Ingested, Predicted, Pretrained, Results
from jobs.pipeline import reach

if TYPE_CHECKING:
    import pandas as pd


def ingest(run: Run | Recipe, profile: Profile | None = None) -> Ingested:
    """Read the recipe's source into a data set, or find the one that it was read into before."""
    return Ingested.of(reach(run, profile, "ingest"))


def pretrain(run: Run | Recipe, profile: Profile | None = None) -> Pretrained:
    """Go on to pre-training. Interrupted, the next call with the same run goes on from the last checkpoint."""
    return Pretrained.of(reach(run, profile, "pretrain"))


def export(run: Run | Recipe, profile: Profile | None = None) -> Exported:
    """Go on to the exported, registered bundle."""
    return Exported.of(reach(run, profile, "export"))


def run(run: Run | Recipe, profile: Profile | None = None) -> Results:
    """Go the whole way, up to an endpoint that has answered held-out images; it is there until the run is closed."""
    return Results.of(reach(run, profile, "deploy"))


def evaluate(run: Run, config: EvaluateConfig | None = None) -> Evaluated:
    """Say with how many labels the pre-trained backbone of a run pays, by its recipe's settings or by `config`.

    Raises HelioError where the run has no pre-trained backbone, or its data set no labels.
    """
    from jobs.evaluation.evaluate import evaluate_run

    # The run that is given keeps its Ray, and its recipe.
    asked = run if config is None else replace(run, recipe=run.recipe.with_sections(config))
    document = evaluate_run(asked, Output())
    return Evaluated(run.name, document, document["verdict"]["verdict"])


def predict(
    source: str | Path,
    output: str | Path,
    *,
    recipe: Recipe | None = None,
    bundle: str | Path | None = None,
    split: str | None = None,
    profile: Profile | None = None,
) -> Predicted:
    """Label a whole image source, or an ingested data set or one `split` of it, into Parquet files at `output`.

    Either with `bundle`, or with the champion of `recipe`. What is done is not done again. Raises HelioError.
    """
    from jobs.prediction import label_source

    if (recipe is None) == (bundle is None):
        raise HelioError("predict takes recipe, whose champion labels the images, or bundle: give one of them")
    summary = label_source(
        recipe or make_recipe("predict"),
        profile or load_profile("local"),
        str(source),
        str(output),
        None if bundle is None else str(bundle),
        split,
        Output(),
    )
    names = ("output", "read", "predicted", "failed", "images_per_second")
    return Predicted(*(summary[name] for name in names))


def list_runs(profile: Profile | None = None) -> "pd.DataFrame":
    """The runs of a workspace, the newest first: state, cost, result; `error` says why one cannot be read."""
    import pandas as pd

    from jobs.runs.records import read_runs

    runs, faults = read_runs((profile or load_profile("local")).storage_path)
    unreadable = [{"run": name, "error": reason} for name, reason in faults.items()]
    return pd.DataFrame([*(run.summary() for run in runs), *unreadable])


def compare_runs(*names: str, profile: Profile | None = None) -> "pd.DataFrame":
    """What differs between runs, a column each: settings, code, data, versions, results and cost."""
    import pandas as pd

    from jobs.runs.comparing import comparison
    from jobs.runs.records import find_run
    from jobs.runs.showing import code_text

    storage = (profile or load_profile("local")).storage_path
    found = comparison([find_run(name, storage) for name in names])
    parts = {kind: found[kind] for kind in ("recipe", "profile", "data", "versions")}
    codes = [code_text(code) for code in found["code"]]
    parts["code"] = {"code": codes} if len(set(codes)) > 1 else {}
    parts["results"] = {name: row["values"] for name, row in found["results"].items()}
    rows = {(kind, name): values for kind, part in parts.items() for name, values in part.items()}
    index = pd.MultiIndex.from_tuples(rows, names=["of", "name"])
    return pd.DataFrame(list(rows.values()), index=index, columns=found["runs"])
