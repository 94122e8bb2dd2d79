"""Augmentation: draws that nothing but (seed, epoch, id, view) decides, and changes that do what they are called."""

import hashlib

import cv2
import numpy as np
import pytest
import simplejpeg
from scipy import stats

from jobs.data.augment import DRAWS, Draws, augment_batch, augment_encoded, augment_image, draw, plan_views
from jobs.data.config import AugmentConfig
from jobs.data.decode import Pixels, decode_image
from jobs.data.mix import Mixing, mix, mix_share, partner

PLAIN = {"crop_min_area": 1.0, "horizontal_flip": 0.0, "color_jitter": 0.0, "grayscale": 0.0}


def ids(count: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(count)]


def _image(pixels: Pixels, size: int, config: AugmentConfig, draws: Draws) -> Pixels:
    return augment_image(pixels, plan_views(size, config, draws[None])[0])


def _encoded(data: bytes, size: int, config: AugmentConfig, draws: Draws) -> Pixels:
    return augment_encoded(data, plan_views(size, config, draws[None])[0])


def scene(height: int, width: int) -> Pixels:
    """Blurred noise with a bright disc, and no symmetry."""
    noise = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    pixels = cv2.GaussianBlur(noise, (0, 0), max(1.0, min(height, width) / 15))
    pixels = cv2.normalize(pixels, None, 0, 255, cv2.NORM_MINMAX)
    return np.asarray(cv2.circle(pixels, (width // 3, height // 4), min(height, width) // 6, (250, 60, 20), -1))


def test_draws_follow_seed_epoch_id_and_view_and_not_their_batch() -> None:
    names = ids(50)
    whole = draw(3, np.arange(50), names, 1)
    assert whole.shape == (50, DRAWS)
    assert (draw(3, np.arange(20, 30), names[20:30], 1) == whole[20:30]).all()
    assert (draw(3, 7, names[7:8], 1) == whole[7:8]).all()
    others = [draw(4, 7, names, 1), draw(3, 8, names, 1), draw(3, 7, names, 0), draw(-1, 7, names, 1)]
    for other in others:
        assert not (other[7] == whole[7]).any()


def test_draws_are_uniform_and_independent() -> None:
    count = 4000
    first, epoch, seed, view = (
        draw(*args)
        for args in ((0, 0, ids(count), 0), (0, 1, ids(count), 0), (1, 0, ids(count), 0), (0, 0, ids(count), 1))
    )
    assert first.min() >= 0
    assert first.max() < 1
    # Each column against the uniform law; the least of some forty p-values.
    assert min(stats.kstest(column, "uniform").pvalue for column in first.T) > 1e-4
    together = np.hstack([first, epoch, seed, view])
    correlation = np.corrcoef(together.T) - np.eye(together.shape[1])
    # The largest of 10,000 pairs: 5 standard errors.
    assert np.abs(correlation).max() < 5 / np.sqrt(count)
    # Neighbouring ids are no closer to one another than others.
    in_order = draw(0, 0, [f"{number:032x}" for number in range(count)], 0)
    assert abs(np.corrcoef(in_order[:-1, 0], in_order[1:, 0])[0, 1]) < 5 / np.sqrt(count)
    assert stats.kstest(in_order[:, 0], "uniform").pvalue > 1e-3


def test_no_strength_leaves_what_evaluation_sees() -> None:
    square = scene(64, 64)
    everything = AugmentConfig(
        strength=0.0, rotation_degrees=90, blur=1, solarize=1, policy="randaugment", mixup=1, cutmix=1
    )
    for row in draw(0, 0, ids(20), 0):
        assert (_image(square, 64, everything, row) == square).all()
        assert mix_share(everything, row).kind == "none"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rotation_degrees": 30, "blur": 0.5, "solarize": 0.5},
        {"policy": "randaugment"},
        {"policy": "trivialaugment"},
    ],
)
@pytest.mark.parametrize("strength", [0.3, 2.0])
def test_the_same_draws_give_the_same_view_and_others_another(settings: dict[str, object], strength: float) -> None:
    config = AugmentConfig.model_validate({**settings, "strength": strength})
    images = np.stack([scene(48, 48)] * 40)
    first = augment_batch(images, ids(40), 32, config, 5, 0)
    assert first.shape == (40, 32, 32, 3)
    assert (augment_batch(images, ids(40), 32, config, 5, 0) == first).all()
    assert len({view.tobytes() for view in first}) == 40
    assert not (augment_batch(images, ids(40), 32, config, 5, 1) == first).all(axis=(1, 2, 3)).any()


@pytest.mark.parametrize(("height", "width"), [(90, 120), (224, 224), (400, 533), (1, 50)])
def test_encoded_images_give_the_view_of_decoded_ones(height: int, width: int) -> None:
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(scene(height, width)), 95)
    config = AugmentConfig(color_jitter=0.2)
    for row in draw(0, 0, ids(20), 0):
        view = _encoded(data, 64, config, row)
        reference = _image(decode_image(data), 64, config, row)
        assert view.shape == (64, 64, 3)
        # At a smaller scale the crop is rounded to larger pixels; another crop or flip would be tens of levels away.
        assert np.abs(view.astype(int) - reference).mean() < 5


def test_a_photograph_turned_by_exif_is_cropped_upright() -> None:
    from tests.jobs.hostile import app1, exif

    upright = scene(400, 300)
    lying = simplejpeg.encode_jpeg(np.ascontiguousarray(np.rot90(upright, 1)), 95)
    data = lying[:2] + app1(exif(6)) + lying[2:]
    config = AugmentConfig(color_jitter=0, grayscale=0)
    for row in draw(0, 0, ids(10), 0):
        view = _encoded(data, 64, config, row)
        assert np.abs(view.astype(int) - _image(upright, 64, config, row)).mean() < 5


def test_probabilities_are_kept() -> None:
    square = scene(32, 32)
    rows = draw(0, 0, ids(2000), 0)
    flipped = AugmentConfig.model_validate({**PLAIN, "horizontal_flip": 0.5})
    share = np.mean([(_image(square, 32, flipped, row) == square[:, ::-1]).all() for row in rows])
    assert abs(share - 0.5) < 0.05
    grey = AugmentConfig.model_validate({**PLAIN, "grayscale": 0.2})
    share = np.mean([np.ptp(_image(square, 32, grey, row), axis=2).max() <= 1 for row in rows])
    assert abs(share - 0.2) < 0.04


def test_grey_and_solarised_views_are_what_they_are_called() -> None:
    square = scene(32, 32)
    row = draw(0, 0, ids(1), 0)[0]
    grey = _image(square, 32, AugmentConfig.model_validate({**PLAIN, "grayscale": 1.0}), row)
    luma = cv2.cvtColor(square, cv2.COLOR_RGB2GRAY)
    assert np.abs(grey.astype(int) - luma[:, :, None]).max() <= 1
    solar = _image(square, 32, AugmentConfig.model_validate({**PLAIN, "solarize": 1.0}), row)
    assert (solar == np.where(square < 128, square, 255 - square)).all()


def test_switching_one_change_off_leaves_the_others_as_they_were() -> None:
    square = scene(32, 32)
    only_flip = AugmentConfig.model_validate({**PLAIN, "horizontal_flip": 0.5})
    with_blur = only_flip.model_copy(update={"blur": 1.0, "policy": "none"})
    for row in draw(0, 0, ids(20), 0):
        flipped = (_image(square, 32, only_flip, row) == square[:, ::-1]).all()
        blurred = _image(square, 32, with_blur, row).astype(int)
        near, far = (square[:, ::-1], square) if flipped else (square, square[:, ::-1])
        assert np.abs(blurred - near).mean() < np.abs(blurred - far).mean()


def test_every_operation_of_the_policies_changes_an_image_and_grows_with_its_magnitude() -> None:
    from jobs.data import policy

    square = scene(64, 64) // 2 + 40
    for ranges in (policy._RAND, policy._TRIVIAL):
        for name, operation in {**policy._SIGNED, **policy._UNSIGNED}.items():
            changes = [
                np.abs(operation(square, share, ranges).astype(int) - square).mean() for share in (0.0, 0.1, 0.6, 1.0)
            ]
            assert changes[0] == 0 or name == "solarize", name
            assert changes[1] <= changes[2] <= changes[3], name
            assert changes[3] > 0.5, name
        for share in (-1.0, 1.0):
            moved = policy._translate_x(square, share * 0.5, ranges)
            assert (moved[:, :3].max() == 0) == (share > 0)
    stretched = policy._autocontrast(square)
    assert (stretched.min(axis=(0, 1)) == 0).all()
    assert (stretched.max(axis=(0, 1)) == 255).all()
    flat = np.full((8, 8, 3), 70, np.uint8)
    assert (policy._autocontrast(flat) == flat).all()
    assert np.ptp(policy._equalize(square)) == 255


def test_mixup_and_cutmix_share_pixels_as_they_share_labels() -> None:
    black, white = np.zeros((50, 50, 3), np.uint8), np.full((50, 50, 3), 255, np.uint8)
    both = AugmentConfig(mixup=0.8, cutmix=1.0)
    kinds = []
    for row in draw(0, 0, ids(300), 0):
        mixing = mix_share(both, row)
        kinds.append(mixing.kind)
        mixed, share = mix(black, white, mixing)
        assert abs((1 - share) - mixed.mean() / 255) < 0.005
        values = set(np.unique(mixed).tolist())
        assert len(values) == 1 if mixing.kind == "mixup" else values <= {0, 255}
    assert 110 < kinds.count("mixup") < 190
    assert kinds.count("none") == 0
    assert mix(black, white, Mixing("none"))[0] is black


def test_shares_are_from_the_beta_law_and_partners_uniform() -> None:
    rows = draw(0, 0, ids(2000), 0)
    shares = [mix_share(AugmentConfig(mixup=0.4), row).share for row in rows]
    assert stats.kstest(shares, stats.beta(0.4, 0.4).cdf).pvalue > 1e-3
    chosen = np.bincount([partner(row, 10) for row in rows], minlength=10)
    assert stats.chisquare(chosen).pvalue > 1e-3
    strength = AugmentConfig(mixup=0.4, strength=0.25)
    assert abs(np.mean([mix_share(strength, row).kind == "none" for row in rows]) - 0.75) < 0.04
