"""The JSON of requests and answers, as JSON schemas with an example each, and what each error status says.

Objects are closed: a field that an answer has and its schema has not fails a test.
"""

from collections.abc import Sequence
from typing import Any

from serving.metrics.families import CODES
from serving.open_inference_tensors import EXTENSIONS, OUTPUTS
from serving.rollout.director import ACTIONS, LONGEST

Json = dict[str, Any]
STATES = ("loading", "shadow", "sharing", "paused", "promoted", "rolled_back", "aborted")

PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP43+AAAARBAcAM0e2RAAAAAElFTkSuQmCC"
"""One pixel as PNG, in base64: examples can be sent as they are."""
REQUEST_ID = "01a2152f-814c-79a0-9a4f-dc9de543f86c"
DIGEST = "9d57571138a66308c5ce8e61ca77f474b0b26aaf24ec93f3de872fde0d2ca041"

TEXT: Json = {"type": "string"}
NUMBER: Json = {"type": "number"}
PROBABILITY: Json = {"type": "number", "minimum": 0, "maximum": 1}
COUNT: Json = {"type": "integer", "minimum": 0}


def named(name: str) -> Json:
    """A schema of `schemas`, by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def record(required: Json, optional: Json | None = None, **more: Any) -> Json:
    """An object of these fields and no other."""
    fields = {**required, **(optional or {})}
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
        **more,
    }


def listed(item: Json, **more: Any) -> Json:
    """A list."""
    return {"type": "array", "items": item, **more}


def schemas(classes: Sequence[str], image_size: int, max_images: int, several: bool = False) -> Json:
    """Everything that requests and answers are made of, by name.

    With `several` models, others have classes and an image size of their own.
    """
    side = {"type": "integer", "minimum": 1} if several else {"const": image_size}
    shape = [{"type": "integer", "minimum": 1}, side, side, {"const": 3}]
    probabilities = {
        "type": "object",
        "description": "Of all classes",
        "propertyNames": named("Label"),
        "additionalProperties": PROBABILITY,
    }
    about = {"request_id": named("RequestId"), "model": named("Model")}
    predicted = {"predictions": listed(named("Prediction"), minItems=1)}
    asked_for = {
        "probabilities": probabilities,
        "embedding": listed(NUMBER),
        "heat_map": listed(listed(PROBABILITY), description="Rows, the top first, over the image's centred square"),
    }
    failed = record({"error": named("ErrorText")})
    base64 = {"type": "string", "minLength": 1, "contentEncoding": "base64", "description": "An encoded image"}
    tensor = {"name": TEXT, "datatype": TEXT, "shape": listed({"type": "integer"})}
    return {
        "Label": TEXT if several else {"type": "string", "enum": list(classes)},
        "RequestId": {"type": "string", "description": "The same as in the header `x-request-id`"},
        "Model": record(
            {"name": TEXT, "version": TEXT, "digest": {"type": "string", "description": "SHA-256 of the bundle"}}
        ),
        "Prediction": record({"label": named("Label"), "probability": PROBABILITY}),
        "OneImage": record({"image": base64}),
        "ManyImages": record({"images": listed(base64, minItems=1, maxItems=max_images)}),
        "Form": {
            "type": "object",
            "properties": {
                "file": listed({"type": "string", "format": "binary"}, minItems=1, maxItems=max_images),
            },
            "required": ["file"],
            "description": "One field `file` for each image",
        },
        "Answer": record({**about, **predicted}, asked_for),
        "Answers": record({**about, "results": listed({"anyOf": [record(predicted, asked_for), failed]})}),
        "Line": {
            "anyOf": [
                record({**about, "image": COUNT, **predicted}, asked_for),
                record({**about, "image": COUNT, "error": named("ErrorText")}),
            ]
        },
        "Correction": record(
            {
                "request_id": {"type": "string", "minLength": 1, "maxLength": 200},
                "label": named("Label"),
            },
            {
                "image": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1, "description": "Its place, from 0"},
                "comment": {"type": "string", "maxLength": 2000},
            },
        ),
        "Stored": record({"stored": {"const": True}, "request_id": TEXT}),
        "ServedModel": record(
            {
                "name": TEXT,
                "version": TEXT,
                "digest": TEXT,
                "classes": listed(named("Label")),
                "image_size": {"type": "integer", "description": "Height and width that the model sees, pixels"},
            }
        ),
        "Arm": record({"requests": COUNT, "errors": COUNT, **{n: {"type": ["number", "null"]} for n in QUANTILES}}),
        "Status": record(
            {
                "model": named("Model"),
                "replicas": record({"running": COUNT}),
                "rollout": {"anyOf": [{"type": "null"}, named("RollOutState")]},
                "arms": {"type": "object", "additionalProperties": named("Arm")},
            }
        ),
        "Version": record({"version": TEXT, "digest": TEXT}),
        "Rate": record({"n": COUNT, "k": COUNT, "rate": {"type": ["number", "null"]}, "low": NUMBER, "high": NUMBER}),
        "RollOutState": record(
            {
                "id": TEXT,
                "state": {"enum": list(STATES)},
                "stage": {"type": "string", "description": "loading, shadow, or the share of users, as 5%"},
                "share": PROBABILITY,
                "champion": named("Version"),
                "candidate": named("Version"),
                "started": NUMBER,
                "since": NUMBER,
                "reason": {"type": ["string", "null"]},
                "slow_s": {
                    "type": "object",
                    "additionalProperties": NUMBER,
                    "description": "How many seconds a batch may take that is not slow, by its size",
                },
                "min_requests": COUNT,
                "min_stage_s": NUMBER,
                "arms": {"type": "object", "additionalProperties": {"type": "object", "additionalProperties": COUNT}},
                "tests": {
                    "type": "object",
                    "additionalProperties": record(
                        {
                            "tolerance": NUMBER,
                            "needed": {"type": "boolean"},
                            "harm": {"type": "number", "description": "1 rolls back"},
                            "safe": {"type": "number", "description": "1 is enough for a step"},
                            "champion": named("Rate"),
                            "candidate": named("Rate"),
                        }
                    ),
                },
            }
        ),
        "Order": record(
            {
                "action": {"enum": list(ACTIONS)},
                "why": {"type": "string", "pattern": r"\S", "maxLength": LONGEST},
            },
            {
                "version": {
                    "type": "string",
                    "pattern": r"\S",
                    "maxLength": LONGEST,
                    "description": "To start with: a number or an alias of the registry; `candidate` unless told",
                }
            },
        ),
        "RollOut": record(
            {
                "rollout": {"anyOf": [{"type": "null"}, named("RollOutState")]},
                "audit": listed(
                    record(
                        {
                            "rollout": TEXT,
                            "at": NUMBER,
                            "who": TEXT,
                            "action": TEXT,
                            "why": TEXT,
                            "figures": named("RollOutState"),
                        }
                    ),
                    description="The oldest first",
                ),
            },
            {"audit_fault": {"type": "string", "description": "How the log was tampered with"}},
        ),
        "Alive": record({"status": {"const": "ok"}}),
        "Ready": record({"status": {"const": "ready"}, "model": named("Model")}),
        "ErrorText": record({"code": {"type": "string", "enum": sorted(CODES)}, "message": TEXT}),
        "Error": record({"error": named("ErrorText")}),
        "V2Error": record({"error": TEXT}),
        "V2Server": record({"name": TEXT, "version": TEXT, "extensions": listed({"enum": list(EXTENSIONS)})}),
        "V2Live": record({"live": {"const": True}}),
        "V2Ready": record({"ready": {"const": True}}),
        "V2ModelReady": record({"name": TEXT, "ready": {"const": True}}),
        "V2Model": record(
            {
                "name": TEXT,
                "versions": listed(TEXT),
                "platform": TEXT,
                "inputs": listed(record(tensor)),
                "outputs": listed(record(tensor)),
            }
        ),
        "V2Request": {
            "type": "object",
            "properties": {
                "id": TEXT,
                "inputs": listed({"anyOf": [named("V2Images"), named("V2Pixels")]}, minItems=1, maxItems=1),
                "outputs": listed(named("V2Asked")),
                "parameters": {"type": "object", "properties": {"binary_data_output": {"type": "boolean"}}},
            },
            "required": ["inputs"],
        },
        "V2Images": {
            "type": "object",
            "properties": {
                "name": {"const": "image"},
                "datatype": {"const": "BYTES"},
                "shape": listed({"type": "integer", "minimum": 1, "maximum": max_images}, minItems=1, maxItems=1),
                "data": listed(base64, minItems=1, maxItems=max_images),
            },
            "required": ["name", "datatype", "shape", "data"],
        },
        "V2Pixels": {
            "type": "object",
            "properties": {
                "name": {"const": "pixels"},
                "datatype": {"const": "UINT8"},
                "shape": {
                    "type": "array",
                    "prefixItems": shape,
                    "minItems": 4,
                    "maxItems": 4,
                },
                "data": {"type": "array", "description": "0 to 255, flat or nested"},
            },
            "required": ["name", "datatype", "shape", "data"],
        },
        "V2Asked": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "enum": list(OUTPUTS)},
                "parameters": {
                    "type": "object",
                    "properties": {"classification": COUNT, "binary_data": {"type": "boolean"}},
                },
            },
            "required": ["name"],
        },
        "V2Answer": record(
            {
                "model_name": TEXT,
                "model_version": TEXT,
                "parameters": record({"request_id": TEXT}),
                "outputs": listed(
                    {"anyOf": [record({**tensor, "data": listed({"type": ["number", "string"]})}), record(tensor)]}
                ),
            },
            {"id": TEXT},
        ),
    }


QUANTILES = ("p50_ms", "p99_ms")


def examples(name: str, version: str, classes: Sequence[str], image_size: int) -> Json:
    """One value of each schema that stands for itself."""
    model = {"name": name, "version": version, "digest": DIGEST}
    about = {"request_id": REQUEST_ID, "model": model}
    predictions = [{"label": classes[0], "probability": 0.9}]
    refused = {"code": "not_an_image", "message": "the image cannot be decoded (the file is empty): send a whole one"}
    tensors = [
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(classes)]},
        {"name": "embedding", "datatype": "FP32", "shape": [-1, 512]},
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
    ]
    pixels = [-1, image_size, image_size, 3]
    return {
        "OneImage": {"image": PICTURE},
        "ManyImages": {"images": [PICTURE, PICTURE]},
        "Answer": {**about, "predictions": predictions},
        "Answers": {**about, "results": [{"predictions": predictions}, {"error": refused}]},
        "Line": {**about, "image": 0, "predictions": predictions},
        "Correction": {"request_id": REQUEST_ID, "label": classes[-1], "comment": "seen from behind"},
        "Stored": {"stored": True, "request_id": REQUEST_ID},
        "ServedModel": {**model, "classes": list(classes), "image_size": image_size},
        "Status": {
            "model": model,
            "replicas": {"running": 2},
            "rollout": None,
            "arms": {"champion": {"requests": 9000, "errors": 0, "p50_ms": 4.1, "p99_ms": 9.7}},
        },
        "Order": {"action": "start", "version": "8", "why": "trained on the new labels"},
        "RollOut": {"rollout": None, "audit": []},
        "Alive": {"status": "ok"},
        "Ready": {"status": "ready", "model": model},
        "V2Server": {"name": "helio", "version": "0.1.0", "extensions": list(EXTENSIONS)},
        "V2Live": {"live": True},
        "V2Ready": {"ready": True},
        "V2ModelReady": {"name": name, "ready": True},
        "V2Model": {
            "name": name,
            "versions": [version],
            "platform": "tensorflow_savedmodel",
            "inputs": [
                {"name": "image", "datatype": "BYTES", "shape": [-1]},
                {"name": "pixels", "datatype": "UINT8", "shape": pixels},
            ],
            "outputs": tensors,
        },
        "V2Request": {
            "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [PICTURE]}],
            "outputs": [{"name": "label"}],
        },
        "V2Answer": {
            "model_name": name,
            "model_version": version,
            "parameters": {"request_id": REQUEST_ID},
            "outputs": [{"name": "label", "datatype": "BYTES", "shape": [1], "data": [classes[0]]}],
        },
    }
