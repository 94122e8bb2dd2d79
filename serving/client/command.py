"""`helio predict FILE…`: image files to an endpoint.

helio predict photo.jpg scan.png
helio predict *.jpg --endpoint https://gpu-box:8000 --key-file key.txt --top-k 3 --heat-map looked-at --json
"""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import EndpointError, HelioError
from serving.client.answers import ImageError
from serving.client.clients import Client
from serving.client.heat_map import HeatMaps

if TYPE_CHECKING:
    from cluster.output import Output
    from cluster.recipe import Recipe
    from serving.config import ServeConfig


def endpoint_url(config: "ServeConfig", any_host: str = "127.0.0.1", scheme: str = "http") -> str:
    """The URL of the endpoint that `config` describes; `any_host` stands for one that is open to the network."""
    host = any_host if config.host in ("0.0.0.0", "::") else config.host
    return f"{scheme}://[{host}]:{config.port}" if ":" in host else f"{scheme}://{host}:{config.port}"


def predict_command(
    files: Sequence[str],
    recipe: "Recipe | None",
    endpoint: str | None,
    as_json: bool,
    output: "Output",
    top_k: int | None = None,
    heat_map: str | None = None,
    key_file: str | None = None,
    model: str | None = None,
) -> int:
    """`helio predict`: 0 when every file was answered, 2 when one was not; the others are answered all the same.

    A line has the best class, or the `top_k` best. `heat_map` is a directory for pictures of what the model looked at.
    `model` is another one than the endpoint's own.
    """
    key = read_key(Path(key_file)) if key_file else None
    pictures = HeatMaps(Path(heat_map)) if heat_map else None
    answers: list[dict[str, Any]] = []
    failed = False
    with (
        Client(endpoint or _default_url(recipe), key=key) as client,
        closing(
            client.predict_many(map(Path, files), top_k=top_k, heat_map=pictures is not None, model=model)
        ) as results,
    ):
        for file in files:
            try:
                prediction = next(results)
                if isinstance(prediction, ImageError):
                    raise prediction
                answer = {"file": file, **asdict(prediction), "heat_map": None}
                if pictures is not None:
                    answer["heat_map"] = str(pictures.draw(Path(file), prediction.heat_map))
            except EndpointError as error:
                # Without an endpoint the files that are left would only repeat the line.
                failed = True
                print(f"helio: {file}: {error}", file=output.messages)
                break
            except HelioError as error:
                failed = True
                print(f"helio: {file}: {error}", file=output.messages)
                continue
            answers.append(answer)
            if not as_json:
                best = [f"{p['label']}  {p['probability']:.4f}" for p in prediction.predictions[: top_k or 1]]
                print("  ".join([file, *best]), file=output.results, flush=True)
    if as_json:
        print(json.dumps({"predictions": answers}, indent=2), file=output.results)
    return 2 if failed else 0


def _default_url(recipe: "Recipe | None") -> str:
    from serving.config import ServeConfig

    return endpoint_url(recipe.section(ServeConfig) if recipe else ServeConfig())


def read_key(path: Path) -> str:
    """The API key in a file. Raises HelioError."""
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise HelioError(f"--key-file {path} cannot be read: {reason}") from None
    if not key:
        raise HelioError(f"--key-file {path} is empty: write the API key into it")
    return key
