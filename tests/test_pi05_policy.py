"""What a policy does around the network: images to the last bit, prompts to the letter, and company nobody notices."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from pi05_small import PROMPTS, STATISTICS, conv_config, noises, observations, random_model, siglip_config

from qlibero.errors import UserError
from qlibero.frames import FrameFormat, resize_area, resize_pil, resize_torch
from qlibero.policies.base import Observation
from qlibero.policies.pi05.images import as_floats, to_network
from qlibero.policies.pi05.normalize import from_lerobot, from_openpi
from qlibero.policies.pi05.policy import Pi05Policy
from qlibero.policies.pi05.profiles import PROFILES
from qlibero.policies.pi05.tokenizer import WordTokenizer, split_words


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def policy(batch_size: int = 1) -> Pi05Policy:
    words = WordTokenizer(sorted({w for p in PROMPTS for w in split_words(p)}))
    statistics = {name: from_openpi(entry, "quantile", "test") for name, entry in STATISTICS.items()}
    return Pi05Policy(
        "small",
        random_model(conv_config()),
        PROFILES["qlibero"],
        statistics,
        words,
        batch_size=batch_size,
        flow_steps=10,
        identity={"sha256": "0" * 64},
    )


@pytest.mark.parametrize("source,target", [(256, 224), (360, 224), (128, 224), (256, 200)])
def test_openpis_resize_to_the_last_bit(source, target):
    image = np.random.default_rng(source).integers(0, 256, (source, source, 3), dtype=np.uint8)
    """PIL's resampling as its source has it: 22 bits of fraction, one rounding to uint8 after each direction."""
    scale = source / target
    reach = max(scale, 1.0)
    weights = np.zeros((target, source), np.int64)
    for i in range(target):
        centre = (i + 0.5) * scale
        first, last = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), source)
        share = np.maximum(0.0, 1.0 - np.abs((np.arange(first, last) - centre + 0.5) / reach))
        weights[i, first:last] = np.floor(share / share.sum() * 2**22 + 0.5)

    def one_direction(lines: np.ndarray) -> np.ndarray:  # along the second axis
        total = np.einsum("ts,ascx->atcx", weights, lines[..., None].astype(np.int64))[..., 0] + 2**21
        return (total >> 22).clip(0, 255)

    expected = one_direction(one_direction(image).transpose(1, 0, 2)).transpose(1, 0, 2)
    assert np.array_equal(resize_pil(image, target), expected)


def test_area_mean_is_exact():
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    expected = image.reshape(128, 2, 128, 2, 3).astype(np.float64).mean((1, 3))
    assert np.array_equal(resize_area(image, 128), expected)
    assert to_network(image, FrameFormat(128, "area")).shape == (3, 128, 128)


@pytest.mark.parametrize("source,target", [(224, 128), (320, 128), (96, 128), (250, 100)])
def test_area_mean_of_sizes_that_do_not_divide(source, target):
    """openpi's clients send 224 px: each target pixel is the mean of the area it covers."""
    image = np.random.default_rng(source).integers(0, 256, (source, source, 3), dtype=np.uint8)
    common = math.gcd(source, target)
    finer, block = target // common, source // common  # pixels cut so that each belongs to one target pixel
    whole = image[:, :, 0].astype(np.float64).repeat(finer, 0).repeat(finer, 1)
    expected = whole.reshape(target, block, target, block).mean((1, 3))
    found = resize_area(image, target)
    assert found.shape == (target, target, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found[..., 0], expected, rtol=1e-6)
    assert np.array_equal(resize_area(np.full_like(image, 77), target), np.full_like(found, 77))


@pytest.mark.parametrize("source,target", [(256, 224), (64, 28), (100, 224)])
def test_lerobots_resize_is_plain_bilinear(source, target):
    """No antialias: a target pixel is between the four around its centre, edges repeated; floats in [-1, 1]."""
    image = np.random.default_rng(source).integers(0, 256, (source, source, 3), dtype=np.uint8)
    at = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    low = np.floor(at).astype(int)
    high, share = np.minimum(low + 1, source - 1), (at - low)[:, None, None]
    rows = image[low] * (1 - share) + image[high] * share
    share = share[None, :, 0]
    expected = (rows[:, low] * (1 - share) + rows[:, high] * share) / 127.5 - 1
    np.testing.assert_allclose(resize_torch(image, target), expected, atol=1e-4)
    assert np.array_equal(resize_torch(image, source), image.astype(np.float32) / np.float32(255) * 2 - 1)


def test_a_pixel_is_the_same_number_on_every_device():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(1, 16, 16, 3)
    expected = (np.arange(256, dtype=np.float32) / np.float32(255) * np.float32(2) - np.float32(1)).reshape(16, 16)
    found = as_floats(pixels)
    assert found.shape == (1, 3, 16, 16) and all(np.array_equal(found[0, c].numpy(), expected) for c in range(3))


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("profile", ["openpi", "openpi-state", "lerobot-0.6", "qlibero"])
def test_frames_prepared_by_a_simulator_give_the_same_actions(profile, batch_size):
    """Whoever resizes: the simulator, the policy, or some rows of a batch here and some there."""
    config = conv_config() if profile == "qlibero" else siglip_config()
    statistics = {name: from_openpi(entry, "quantile", "test") for name, entry in STATISTICS.items()}
    words = WordTokenizer(sorted({w for p in PROMPTS for w in split_words(p)}))
    tokenizer = words if profile == "qlibero" else DigitTokenizer()
    p = Pi05Policy(
        "small",
        random_model(config),
        PROFILES[profile],
        statistics,
        tokenizer,
        batch_size=batch_size,
        flow_steps=2,
        identity={},
    )
    resize = {"openpi": "pil", "openpi-state": "pil", "lerobot-0.6": "torch", "qlibero": "area"}[profile]
    assert p.frame_format == FrameFormat(config.vision.image_size, resize)
    seen, z = observations(3), noises(3, p.noise_shape)
    expected = p.infer(seen, z).actions
    ready = [replace(o, image=p.frame_format.of(o.image), wrist_image=p.frame_format.of(o.wrist_image)) for o in seen]
    assert ready[0].image.shape[0] == config.vision.image_size and ready[0].image.dtype == p.frame_format.dtype
    assert np.array_equal(p.infer(ready, z).actions, expected)
    assert np.array_equal(p.infer([ready[0], seen[1], ready[2]], z).actions, expected)
    assert torch.equal(p.sample_eagerly(ready[1], z[1]), p.sample_eagerly(seen[1], z[1]))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_company_and_place_change_nothing(batch_size):
    """Equality, not tolerance: every order, every group size, alone or together."""
    p = policy(batch_size)
    seen, z = observations(5), noises(5, p.noise_shape)
    together = p.infer(seen, z).actions
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        shuffled = p.infer([seen[i] for i in order], z[order]).actions
        assert np.array_equal(shuffled, together[order])
    for i in range(5):
        assert np.array_equal(p.infer([seen[i]], z[i : i + 1]).actions[0], together[i])
    assert not np.array_equal(together[0], together[1])


def test_batch_sizes_agree_to_rounding():
    seen, z = observations(3), noises(3, (10, 7))
    np.testing.assert_allclose(policy(1).infer(seen, z).actions, policy(4).infer(seen, z).actions, atol=5e-6)


def test_chunk_is_in_environment_units_and_timed():
    p = policy()
    chunk = p.infer(observations(2), noises(2, p.noise_shape))
    assert chunk.actions.shape == (2, 10, 7) and chunk.actions.dtype == np.float32
    assert {"preprocess", "vision", "prefix", "flow"} <= set(chunk.phases_ms)
    assert json.dumps(p.provenance())
    with pytest.raises(ValueError, match="noise has shape"):
        p.infer(observations(2), noises(1, p.noise_shape))


def test_everything_observed_matters():
    """A policy that ignores an image, the state or the words is a bug in the wiring here."""
    p = policy()
    (seen,), z = observations(1), noises(1, p.noise_shape)
    base = p.infer([seen], z).actions
    changes = [
        {"image": 255 - seen.image},
        {"wrist_image": 255 - seen.wrist_image},
        {"state": seen.state + 0.5},
        {"prompt": PROMPTS[1]},
    ]
    for change in changes:
        other = type(seen)(**{**seen.__dict__, **change})
        assert np.abs(p.infer([other], z).actions - base).max() > 1e-4, change.keys()


def test_prompts_to_the_letter():
    state = np.array([-1.0, -0.5, 0.0, 0.5, 0.999, 1.0, 1.5, -1.5], np.float32)
    task = " put_the bowl\non the plate "
    assert PROFILES["openpi"].text(task, state) == ("put the bowl on the plate", "\n")
    bins = "0 64 128 192 255 255 255 -1"
    assert PROFILES["lerobot-0.6"].text(task, state) == (f"Task: put the bowl on the plate, State: {bins};\nAction: ",)
    padded = f"{bins} {' '.join(['128'] * 24)}"
    assert PROFILES["lerobot-0.4"].text(task, state) == (
        f"Task: put the bowl on the plate, State: {padded};\nAction: ",
    )


def test_normalisation_in_both_modes_and_spellings():
    x = np.random.default_rng(0).normal(size=(4, 8))
    e = {k: np.array(v) for k, v in STATISTICS["state"].items()}
    quantile = (x - e["q01"]) / (e["q99"] - e["q01"] + 1e-6) * 2 - 1
    np.testing.assert_allclose(from_openpi(e, "quantile", "t").normalize(x), quantile, rtol=1e-6)
    np.testing.assert_allclose(
        from_openpi(e, "mean_std", "t").normalize(x),
        (x - e["mean"]) / (e["std"] + 1e-6),
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        from_lerobot(e, "quantile", "t").normalize(x),
        2 * (x - e["q01"]) / (e["q99"] - e["q01"]) - 1,
        rtol=1e-6,
    )
    for make in (from_openpi, from_lerobot):
        for mode in ("quantile", "mean_std"):
            statistics = make(e, mode, "t")
            np.testing.assert_allclose(statistics.denormalize(statistics.normalize(x)), x, atol=1e-5)
            beyond = statistics.denormalize(np.ones((2, 32), np.float32))
            assert np.array_equal(beyond[:, 8:], np.ones((2, 24)))
    with pytest.raises(UserError, match="q01, q99"):
        from_openpi({"mean": [0], "std": [1]}, "quantile", "norm_stats.json")


class DigitTokenizer:
    """As PaliGemma's: words are a token each, numbers a token for each digit and sign."""

    vocab_size, sha256 = 300, "7" * 64

    def encode(self, pieces):
        return [2, *(3 + ord(piece[0]) for piece in re.findall(r"[A-Za-z]+|\S", " ".join(pieces)))]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("profile", ["openpi", "openpi-state", "lerobot-0.4", "lerobot-0.6"])
def test_every_text_length_of_a_run_was_tried_and_warmed_up_before(profile, batch_size):
    """Where the state is part of the text, its digits decide how many tokens a kernel sees: all of it in any
    state must be among what validation is told, and among what the warm-up asks for."""
    p = Pi05Policy(
        "small",
        random_model(siglip_config()),
        PROFILES[profile],
        {name: from_openpi(entry, "quantile", "test") for name, entry in STATISTICS.items()},
        DigitTokenizer(),
        batch_size=batch_size,
        flow_steps=1,
        identity={},
    )
    prompts, random = PROMPTS[1:], np.random.default_rng(0)
    images = 2 * p.model.config.vision.tokens
    told = {count // batch_size - images for count in p.token_counts(prompts)["llm"]}

    def lengths(state: np.ndarray) -> set[int]:
        rows = [len(p.preprocess(Observation(frame, frame, state, prompt))[1]) for prompt in prompts]
        return {bucket or rows[0] for rows in zip(rows) for _, bucket in p._batches(list(rows))}

    frame = np.zeros((28, 28, 3), np.uint8)
    seen = set()
    for share in (0.0, 0.3, 0.7, 1.0):
        for _ in range(40):  # numbers of one, two and three digits in changing shares
            state = np.where(random.random(8) < share, random.uniform(-1, -0.9, 8), random.uniform(-2, 2, 8))
            seen |= lengths(p._statistics["state"].denormalize(state))
    assert seen <= told and (len(seen) > 1 or profile == "openpi")
    ran = set()
    plain = p._run
    p._run = lambda rows, length, z: ran.add(length or len(rows[0][1])) or plain(rows, length, z)
    for observation in p.warmup_observations(prompts):
        p.infer([observation], noises(1, p.noise_shape))
    assert ran == told


def test_unknown_words_are_refused_by_name():
    with pytest.raises(UserError, match="zebra"):
        WordTokenizer(["the"]).encode(("the zebra", "\n"))


def test_a_state_token_needs_its_profile():
    with pytest.raises(UserError, match="state token"):
        Pi05Policy(
            "x",
            random_model(siglip_config()),
            PROFILES["qlibero"],
            {},
            WordTokenizer([]),
            batch_size=1,
            flow_steps=10,
            identity={},
        )
