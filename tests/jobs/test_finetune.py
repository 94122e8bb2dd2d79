"""Fine-tuning again and again in one process gives what a process of its own would give."""

from typing import Any

import numpy as np
import pytest
import ray


def _trainings() -> dict[str, Any]:
    """Probabilities after the same training: first, after another, gone on from its first epoch, and in a new model."""
    from jobs.model.config import ModelConfig
    from jobs.training.config import FinetuneConfig
    from jobs.training.device import set_up_tensorflow
    from jobs.training.finetune import Finetuner, LabelledImages, Progress, Start

    set_up_tensorflow(1, 0)
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 96).astype(np.int32)
    pixels = generator.integers(0, 155, (96, 16, 16, 3)) + 40 * labels[:, None, None, None]
    data = LabelledImages(pixels.astype(np.uint8), labels, [f"{row:032x}" for row in range(96)])
    start = Start(ModelConfig(width=8, stages=2), 16, 3, seed=0, weights=None)
    config = FinetuneConfig(epochs=3, global_batch_size=32, head_dropout=0.3, label_smoothing=0.1, layer_decay=0.8)
    # Frozen in part, in other batches, with other rates.
    other = FinetuneConfig(epochs=1, global_batch_size=48, learning_rate=1e-2, weight_decay=0.1, unfrozen_stages=1)
    kept: list[Progress] = []

    def trained(finetuner: Finetuner, config: FinetuneConfig, progress: Progress | None = None) -> Any:
        for _ in finetuner.train(data, config, progress=progress):
            kept.append(finetuner.progress())
        return finetuner.classifier.probabilities(data.images)

    finetuner = Finetuner(start)
    found = {"first": trained(finetuner, config)}
    untouched = kept[0]
    trained(finetuner, other)
    found["after another"] = trained(finetuner, config)
    trained(finetuner, other)
    found["gone on"] = trained(finetuner, config, untouched)
    found["in a new model"] = trained(Finetuner(start), config)
    for name, value in (("head_dropout", 0.0), ("layer_decay", 1.0), ("weight_decay", 1.0), ("label_smoothing", 0.0)):
        found[name] = trained(finetuner, config.model_copy(update={name: value}))
    return found


@pytest.fixture(scope="module")
def trainings(ray_cluster: None) -> dict[str, Any]:
    found: dict[str, Any] = ray.get(ray.remote(num_cpus=1)(_trainings).remote())
    return found


@pytest.mark.parametrize("name", ["after another", "gone on", "in a new model"])
def test_a_training_depends_on_nothing_that_the_process_did_before(trainings: dict[str, Any], name: str) -> None:
    np.testing.assert_array_equal(trainings["first"], trainings[name])


@pytest.mark.parametrize("name", ["head_dropout", "layer_decay", "weight_decay", "label_smoothing"])
def test_settings_that_are_not_compiled_in_still_count(trainings: dict[str, Any], name: str) -> None:
    assert np.abs(trainings["first"] - trainings[name]).max() > 1e-4
