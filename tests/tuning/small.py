"""Fine-tuning that takes a moment: images whose classes differ in colour, hardly, and a small net."""

from typing import Any

import numpy as np

SIZE, CLASSES, EPOCHS = 16, 3, 3


def images(count: int, seed: int) -> Any:
    from jobs.training.finetune import LabelledImages

    generator = np.random.default_rng(seed)
    labels = (np.arange(count) % CLASSES).astype(np.int32)
    pixels = generator.integers(60, 200, (count, SIZE, SIZE, 3)).astype(np.float32)
    pixels[np.arange(count), :, :, labels] += 8
    return LabelledImages(pixels.astype(np.uint8), labels, [f"{seed:016x}{number:016x}" for number in range(count)])


def material(folds: int = 1, **model: Any) -> Any:
    from jobs.model.config import ModelConfig
    from jobs.training.finetune import Start
    from tuning.objective import Material

    start = Start(ModelConfig(**{"width": 8, "stages": 2, **model}), SIZE, CLASSES, 0, None)
    labelled, validation = images(60, 1), images(30, 2)
    return Material(start, labelled + validation, None) if folds > 1 else Material(start, labelled, validation)


def finetuning(shared: list[Any], **settings: Any) -> Any:
    """`tuning.objective.Finetuning`; `shared` holds a reference to the material."""
    from jobs.data.config import AugmentConfig
    from jobs.training.config import FinetuneConfig
    from tuning.objective import Finetuning

    given = {"metric": "log_loss", "patience": None, "folds": 1, "seeds": 1, "threads": 1, "gpus": 0, **settings}
    base = FinetuneConfig(
        epochs=given.pop("epochs", EPOCHS), global_batch_size=16, augment=AugmentConfig(rotation_degrees=5)
    )
    return Finetuning(shared, base, **given)


def objective(**settings: Any) -> Any:
    """In the process of a worker."""
    from jobs.training.device import set_up_tensorflow
    from tuning.objective import FinetuneObjective

    set_up_tensorflow(1, 0)
    return FinetuneObjective(material(settings.get("folds", 1)), finetuning([], **settings))
