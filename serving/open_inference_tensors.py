"""A classifier as the Open Inference Protocol v2 sees it: what HTTP and gRPC have in common.

    input    image          BYTES  [n] or [n, 1]        encoded images: JPEG, PNG, BMP, GIF, WebP
          or pixels         UINT8  [n, size, size, 3]   RGB
    output   probabilities  FP32   [n, classes]         or, by the classification extension, BYTES [n, k]:
                                                        "probability:index:label", the most probable first
             embedding      FP32   [n, dimension]
             label          BYTES  [n]                  of the most probable class

A tensor's data travels as values (in JSON, or in the typed fields of gRPC) or raw: little-endian, row-major, each
element of BYTES behind its length in four bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from math import prod
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from serving.upload import Refusal, shown

Pixels: TypeAlias = NDArray[np.uint8]

EXTENSIONS = ("binary_tensor_data", "classification")
PLATFORM = "tensorflow_savedmodel"
OUTPUTS = ("probabilities", "embedding", "label")


@dataclass(frozen=True)
class Answers:
    """What a model says of n images."""

    probabilities: NDArray[np.float32]
    """[n, classes]"""
    embedding: NDArray[np.float32]
    """[n, dimension]"""
    request_id: str


class Named(Protocol):
    """What answers a request, by its name."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...


class Model(Named, Protocol):
    """A model that answers one request."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names in the order of the probabilities."""

    @property
    def image_size(self) -> int:
        """Height and width of the images that the model sees, pixels."""

    @property
    def dimension(self) -> int:
        """Length of an embedding."""

    async def predict(self, images: Sequence[bytes] | Pixels) -> Answers:
        """Answers for encoded images or for uint8 [n, size, size, 3], which may not be written to.

        Raises Refusal for what is wrong with an image.
        """


@dataclass(frozen=True)
class Tensor:
    """An input as it came."""

    name: str
    datatype: str
    shape: Sequence[int]
    data: memoryview | Sequence[Any]
    """Raw, or the values: the elements of BYTES, or numbers, which may be nested lists."""


@dataclass(frozen=True)
class Asked:
    """An output that a request asks for."""

    name: str
    classification: int = 0
    """Labels for each image, in place of all the probabilities; 0: the tensor itself."""


@dataclass(frozen=True)
class Output:
    """An output that is answered."""

    name: str
    shape: Sequence[int]
    data: NDArray[np.float32] | list[str]
    """FP32, or the strings of a tensor of BYTES, in row-major order."""

    @property
    def datatype(self) -> str:
        return "BYTES" if isinstance(self.data, list) else "FP32"

    def values(self) -> list[Any]:
        """The elements in row-major order."""
        return self.data if isinstance(self.data, list) else self.data.ravel().tolist()

    def raw(self) -> bytes:
        """The same as binary data."""
        if isinstance(self.data, list):
            elements = [text.encode() for text in self.data]
            return b"".join(len(element).to_bytes(4, "little") + element for element in elements)
        return self.data.astype("<f4").tobytes()


def malformed(message: str) -> Refusal:
    """What a request is refused with that does not fit."""
    return Refusal(400, "bad_request", message)


def server_metadata() -> dict[str, Any]:
    """What a client may know about the server."""
    return {"name": "helio", "version": installed_version("helio"), "extensions": list(EXTENSIONS)}


def model_metadata(model: Model) -> dict[str, Any]:
    """What a client may know about a model. A request has one of the two inputs."""
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": PLATFORM,
        "inputs": [
            {"name": "image", "datatype": "BYTES", "shape": [-1]},
            {"name": "pixels", "datatype": "UINT8", "shape": [-1, model.image_size, model.image_size, 3]},
        ],
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(model.classes)]},
            {"name": "embedding", "datatype": "FP32", "shape": [-1, model.dimension]},
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
        ],
    }


def check_name(model: Named, name: str, version: str) -> None:
    """Raises Refusal where a request asks for another model, or another version of it; an empty one is any."""
    if name != model.name:
        raise Refusal(404, "not_found", f"there is no model {shown(name)} here: ask for {model.name}")
    if version not in ("", model.version):
        text = f"version {shown(version)} of {model.name} does not answer: ask for {model.version}, or for none"
        raise Refusal(404, "not_found", text)


def check_counts(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Raises Refusal for more than there can be: a request may hold millions, each of which would be read."""
    if len(inputs) != 1:
        raise malformed(f"the request has {len(inputs)} inputs: send either image or pixels")
    if len(outputs) > len(OUTPUTS):
        raise malformed(f"the request has {len(outputs)} outputs: ask for each of {', '.join(OUTPUTS)} once at most")


def images_of(tensor: Tensor, model: Model, most: int) -> Sequence[bytes] | Pixels:
    """What a model is to look at. Raises Refusal for what does not fit it, and for more than `most` images."""
    size = model.image_size
    datatypes = {"image": "BYTES", "pixels": "UINT8"}
    if tensor.name not in datatypes:
        raise malformed(f"there is no input {shown(tensor.name)}: send either image or pixels")
    if tensor.datatype != datatypes[tensor.name]:
        raise malformed(f"input {tensor.name} must be {datatypes[tensor.name]}, got {shown(tensor.datatype)}")
    shape = tuple(tensor.shape)
    if tensor.name == "image":
        fits, wanted = len(shape) == 1 or (len(shape) == 2 and shape[1] == 1), "[n] or [n, 1]"
    else:
        fits, wanted = len(shape) == 4 and shape[1:] == (size, size, 3), f"[n, {size}, {size}, 3]"
    if not fits or shape[0] < 1:
        raise malformed(
            f"input {tensor.name} must have the shape {wanted} with n of 1 or more, got {shown(list(shape))}"
        )
    if shape[0] > most:
        raise Refusal(413, "too_many_images", f"the request has more than the {most} images that are read: send fewer")
    return _encoded_images(tensor) if tensor.name == "image" else _pixels(tensor, shape)


def checked(asked: Sequence[Asked]) -> Sequence[Asked]:
    """The outputs that a request asks for, which are all of them where it names none. Raises Refusal."""
    names = [output.name for output in asked]
    for output in asked:
        if output.name not in OUTPUTS or names.count(output.name) > 1:
            raise malformed(f"output {shown(output.name)}: ask for each of {', '.join(OUTPUTS)} once at most")
        if output.classification and output.name != "probabilities":
            raise malformed(f"output {output.name} has no classification: ask it of probabilities")
        if output.classification < 0:
            raise malformed(f"classification must be a number of classes, got {shown(output.classification)}")
    return asked or [Asked(name) for name in OUTPUTS]


def outputs_of(asked: Sequence[Asked], model: Model, answers: Answers) -> list[Output]:
    """What is answered, in the order of what is asked."""
    return [_output(output, model, answers) for output in asked]


def _encoded_images(tensor: Tensor) -> list[bytes]:
    count = tensor.shape[0]
    images = _elements(tensor.data, count) if isinstance(tensor.data, memoryview) else list(tensor.data)
    if len(images) != count:
        raise malformed(
            f"input image has {len(images)} elements of data: its shape must say so, got {list(tensor.shape)}"
        )
    return images


def _elements(raw: memoryview, most: int) -> list[bytes]:
    """The elements of a tensor of BYTES, and no more than one too many."""
    elements: list[bytes] = []
    place = 0
    while place < len(raw) and len(elements) <= most:
        end = place + 4 + int.from_bytes(raw[place : place + 4], "little")
        if end > len(raw):
            raise malformed("input image: its data ends within an element: put each one's length before it, four bytes")
        elements.append(bytes(raw[place + 4 : end]))
        place = end
    return elements


def _pixels(tensor: Tensor, shape: tuple[int, ...]) -> Pixels:
    if isinstance(tensor.data, memoryview):
        pixels = np.frombuffer(tensor.data, np.uint8)
    else:
        try:
            # Straight to uint8, a fraction would be cut off without a word.
            numbers = np.array(tensor.data, np.float64)
        except (ValueError, TypeError, OverflowError):
            raise malformed("input pixels: its data must be whole numbers from 0 to 255") from None
        with np.errstate(invalid="ignore"):
            pixels = numbers.astype(np.uint8)
        if not np.array_equal(pixels, numbers):
            raise malformed("input pixels: its data must be whole numbers from 0 to 255")
    if pixels.size != prod(shape):
        raise malformed(f"input pixels has {pixels.size} elements of data: its shape must say so, got {list(shape)}")
    return pixels.reshape(shape)


def _output(asked: Asked, model: Model, answers: Answers) -> Output:
    probabilities = answers.probabilities
    count = len(probabilities)
    if asked.name == "embedding":
        return Output(asked.name, answers.embedding.shape, answers.embedding)
    if asked.name == "probabilities" and not asked.classification:
        return Output(asked.name, probabilities.shape, probabilities)
    if asked.name == "label":
        return Output(asked.name, [count], [model.classes[place] for place in probabilities.argmax(axis=1)])
    kept = min(asked.classification, len(model.classes))
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :kept]
    told = [
        f"{row[place]:f}:{place}:{model.classes[place]}"
        for row, places in zip(probabilities, best, strict=True)
        for place in places
    ]
    return Output(asked.name, [count, kept], told)
