"""A bundle: a TensorFlow SavedModel with its preprocessing inside, and a manifest that says where it came from.

    <bundle>/
        manifest.json   classes, image size, metrics, lineage, evaluation (is pre-training worth it?)
        model/          SavedModel with three signatures:
                          serving_default  images: encoded bytes [n]             (JPEG, PNG, BMP, GIF, WebP)
                          pixels           images: uint8 [n, size, size, 3] RGB  (from jobs.data.decode)
                        both give probabilities: float32 [n, classes], embedding: float32 [n, dimension]
                          heat_map         images: as for pixels; labels: int32 [n], the class to explain
                        gives heat_map: float32 [n, row, column] in 0..1, see jobs.model.heat_map; bundles of older
                        helios do not have it

The digest covers every file, so that an answer can name exactly what gave it.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import CheckpointError
from cluster.run import write_json
from cluster.storage import fetch, local, publish
from jobs.data.decode import ROUNDING_BIAS, Pixels, decode_to_size
from jobs.model.heat_map import heat_map, places_of

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

FORMAT = 1


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, its files checked against its digest."""

    directory: Path
    manifest: dict[str, Any]
    digest: str

    @classmethod
    def open(cls, directory: Path | str, digest: str | None = None) -> "Bundle":
        """Open a bundle, without TensorFlow. Raises CheckpointError when it is none, or is not `digest`."""
        directory = local(directory)
        fetch(directory)
        try:
            manifest = json.loads((directory / "manifest.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(f"{directory} is no bundle: it has no manifest.json") from None
        except ValueError as error:
            raise CheckpointError(f"{directory}: manifest.json cannot be read: {error}") from None
        if manifest.get("format") != FORMAT:
            raise CheckpointError(f"{directory}: bundle format {manifest.get('format')!r}, this helio reads {FORMAT}")
        found = _digest(directory)
        if digest is not None and found != digest:
            raise CheckpointError(
                f"{directory}: the bundle was changed or damaged: its digest is {found[:12]}…, registered was "
                f"{digest[:12]}…: export it again"
            )
        return cls(directory, manifest, found)

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the probabilities."""
        return list(self.manifest["classes"])

    @property
    def image_size(self) -> int:
        """Height and width of the images that the model sees, pixels."""
        return int(self.manifest["image_size"])

    def load(self) -> "LoadedBundle":
        """Load the SavedModel into this process."""
        return LoadedBundle(self)


class LoadedBundle:
    """A bundle whose model is in memory. Safe to call from several threads."""

    def __init__(self, bundle: Bundle) -> None:
        import tensorflow as tf

        self.bundle = bundle
        # It may have been opened on another node.
        fetch(bundle.directory)
        # The signatures live only as long as the object that was loaded.
        self._model = tf.saved_model.load(str(bundle.directory / "model"))
        self._signatures = self._model.signatures

    def predict_pixels(self, images: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Probabilities [n, classes] and embedding [n, dimension] of uint8 RGB [n, size, size, 3]."""
        import tensorflow as tf

        return self._answer(self._signatures["pixels"](images=tf.constant(images)))

    @property
    def has_heat_map(self) -> bool:
        """Whether it was written by a helio that gives bundles heat maps."""
        return "heat_map" in self._signatures

    def heat_map(self, images: Pixels, labels: Sequence[int]) -> NDArray[np.float32]:
        """What the model looked at, [n, row, column], top first: for each image the evidence for a class index.

        A map is as coarse as the features that it tells of (4 × 4 for the quickstart's 32 pixels); it is 1 at its
        strongest place, and all 0 where nothing speaks for the class. Raises CheckpointError unless `has_heat_map`.
        """
        import tensorflow as tf

        if not self.has_heat_map:
            raise CheckpointError("the bundle has no heat map, it was written by an older helio: export it again")
        outputs = self._signatures["heat_map"](images=tf.constant(images), labels=tf.constant(labels, tf.int32))
        found: NDArray[np.float32] = outputs["heat_map"].numpy()
        return found

    def predict(self, images: Sequence[bytes]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The same of encoded images, decoded by helio. Raises DecodeError."""
        size = self.bundle.image_size
        return self.predict_pixels(np.stack([decode_to_size(image, size) for image in images]))

    def predict_encoded(self, images: Sequence[bytes]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The same, decoded inside the SavedModel, as any other TensorFlow server would."""
        import tensorflow as tf

        return self._answer(self._signatures["serving_default"](images=tf.constant(list(images))))

    @staticmethod
    def _answer(outputs: "dict[str, tf.Tensor]") -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return outputs["probabilities"].numpy(), outputs["embedding"].numpy()


def write_bundle(
    directory: Path, backbone: "keras.Model", head: "keras.Model", image_size: int, manifest: dict[str, Any]
) -> Bundle:
    """Write a bundle of `head(backbone(image))`; `manifest` gives classes, metrics and lineage.

    The directory, new or empty, is filled at once or not at all; one that holds anything is never replaced.
    """
    import tensorflow as tf

    places = places_of(backbone)
    spec = tf.TensorSpec([None, image_size, image_size, 3], tf.uint8, name="images")

    # A function of its own, which the signatures share: it is traced, written and loaded once.
    @tf.function(input_signature=[spec])
    def features(images: "tf.Tensor") -> "tf.Tensor":
        return places.front(images, training=False)

    def answer(found: "tf.Tensor") -> "tuple[tf.Tensor, tf.Tensor]":
        embedding = tf.cast(places.rest(found, training=False), tf.float32)
        return tf.cast(head(embedding, training=False), tf.float32), embedding

    @tf.function(input_signature=[spec])
    def pixels(images: "tf.Tensor") -> "dict[str, tf.Tensor]":
        logits, embedding = answer(features(images))
        return {"probabilities": tf.nn.softmax(logits), "embedding": embedding}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="images")])
    def encoded(images: "tf.Tensor") -> "dict[str, tf.Tensor]":
        one = tf.TensorSpec([image_size, image_size, 3], tf.uint8)
        return pixels(tf.map_fn(lambda data: _decode_in_graph(data, image_size), images, fn_output_signature=one))

    @tf.function(input_signature=[spec, tf.TensorSpec([None], tf.int32, name="labels")])
    def explained(images: "tf.Tensor", labels: "tf.Tensor") -> "dict[str, tf.Tensor]":
        return {"heat_map": heat_map(places.evidence, lambda found: answer(found)[0], features(images), labels)}

    module = tf.Module()
    # The variables and not the models, which would have Keras write another forward pass and each layer's own record.
    module.held = [variable.value for variable in [*backbone.variables, *head.variables]]
    temporary = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    signatures = {"serving_default": encoded, "pixels": pixels, "heat_map": explained}
    tf.saved_model.save(module, str(temporary / "model"), signatures=signatures)
    write_json(temporary / "manifest.json", {"format": FORMAT, "image_size": image_size, **manifest})
    temporary.rename(directory)
    return Bundle.open(directory)


def complete_manifest(directory: Path, entries: dict[str, Any]) -> Bundle:
    """Add to the manifest of a bundle what became known after it was written, and before anyone knows its digest."""
    fetch(directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    write_json(directory / "manifest.json", {**manifest, **entries})
    publish(directory)
    return Bundle.open(directory)


def _decode_in_graph(data: "tf.Tensor", size: int) -> "tf.Tensor":
    """`jobs.data.decode.decode_to_size` in TensorFlow's operations: the same pixels, for any TensorFlow server."""
    import tensorflow as tf

    def jpeg() -> "tf.Tensor":
        image = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
        return _upright(image, _exif_orientation(data))

    image = tf.cond(tf.io.is_jpeg(data), jpeg, lambda: tf.io.decode_image(data, channels=3, expand_animations=False))
    shape = tf.shape(image)
    side = tf.minimum(shape[0], shape[1])
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    square = tf.cast(image[top : top + side, left : left + side], tf.float32)[None]
    resized = tf.cond(
        side > size,
        lambda: tf.image.resize(square, (size, size), method="area"),
        lambda: tf.image.resize(square, (size, size), method="bilinear"),
    )
    return tf.ensure_shape(tf.cast(resized[0] + (0.5 - ROUNDING_BIAS), tf.uint8), [size, size, 3])


def _exif_orientation(data: "tf.Tensor") -> "tf.Tensor":
    """EXIF tag 0x0112 of a JPEG, 1 to 8; 1 where there is none. `data` is the encoded image, a scalar string."""
    import tensorflow as tf

    head = tf.cast(tf.io.decode_raw(tf.strings.substr(data, 0, 4096), tf.uint8), tf.int32)
    # Tag, type SHORT, count 1 in Motorola and in Intel byte order, and where the value's low byte follows.
    found = [
        _value_after(head, [0x01, 0x12, 0, 3, 0, 0, 0, 1], 9),
        _value_after(head, [0x12, 0x01, 3, 0, 1, 0, 0, 0], 8),
        tf.constant(1),
    ]
    valid = [tf.logical_and(value >= 1, value <= 8) for value in found]
    return tf.where(valid[0], found[0], tf.where(valid[1], found[1], found[2]))


def _value_after(values: "tf.Tensor", pattern: list[int], offset: int) -> "tf.Tensor":
    """The value `offset` behind the first place where `pattern` stands, or 0."""
    import tensorflow as tf

    padded = tf.pad(values, [[0, 16]])
    count = tf.shape(values)[0]
    matches = tf.ones([count], tf.bool)
    for position, expected in enumerate(pattern):
        matches = tf.logical_and(matches, padded[position : position + count] == expected)
    places = tf.where(matches)[:, 0]
    return tf.cond(tf.size(places) > 0, lambda: padded[tf.cast(places[0], tf.int32) + offset], lambda: tf.constant(0))


def _upright(image: "tf.Tensor", orientation: "tf.Tensor") -> "tf.Tensor":
    import tensorflow as tf

    turned = [
        lambda: image,
        lambda: tf.image.flip_left_right(image),
        lambda: tf.image.rot90(image, 2),
        lambda: tf.image.flip_up_down(image),
        lambda: tf.transpose(image, [1, 0, 2]),
        lambda: tf.image.rot90(image, 3),
        lambda: tf.image.rot90(tf.transpose(image, [1, 0, 2]), 2),
        lambda: tf.image.rot90(image, 1),
    ]
    return tf.switch_case(orientation - 1, turned)


def _digest(directory: Path) -> str:
    """SHA-256 over the relative path and content of every file, hexadecimal."""
    total = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(directory).as_posix()}\0{content}\n".encode())
    return total.hexdigest()
