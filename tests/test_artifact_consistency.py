"""Risk: an artifact whose hash is right and whose content is not: a checksum is no signature, and anybody renews it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from pi05_small import noises, observations
from quant_settings import quant_of
from safetensors import safe_open
from safetensors.torch import save_file
from test_fake_equals_kernel import small_policy

from qlibero.errors import GuardRefusal
from qlibero.quant.against_weights import require_of_weights
from qlibero.quant.apply import quantize_policy
from qlibero.quant.artifact import content_hash, load, save
from qlibero.quant.calibrate import calibrate

pytestmark = pytest.mark.slow

LAYER = "paligemma_with_expert.paligemma.model.language_model.layers.0.self_attn."


@pytest.fixture(scope="module")
def policy():
    return small_policy()


@pytest.fixture(scope="module")
def parts(policy, tmp_path_factory) -> dict[str, tuple[dict, dict]]:
    """(metadata, tensors) of an honest artifact of each kind."""
    found = {}
    for name, settings in {
        "duquant": {},
        "smoothquant": {"method": "smoothquant"},
        "hadamard": {"method": "hadamard"},
        "rtn": {"method": "rtn"},
        "weight_pca": {"method": "weight_pca", "row_rotation": True},
        "gptq": {"method": "rtn", "rounding": "gptq"},
    }.items():
        spec = quant_of(**{"method": "duquant", "layout": "llm", "block_size": 16, "rotation_steps": 4} | settings)
        made = calibrate(policy, observations(3), noises(3, policy.noise_shape), spec, {"data_sha256": "2" * 64})
        path = save(made, tmp_path_factory.mktemp(name) / "a.safetensors")
        load(path)  # the honest one is taken
        with safe_open(path, framework="pt") as file:
            found[name] = (
                json.loads(file.metadata()["qlibero"]),
                {key: file.get_tensor(key) for key in file.keys()},  # noqa: SIM118
            )
    return found


def signed(meta: dict, tensors: dict, path: Path) -> Path:
    """The file with a hash that fits."""
    digest = content_hash(meta, tensors, tensors.__getitem__)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"qlibero": json.dumps(meta, sort_keys=True), "sha256": digest})
    return path


def first(tensors: dict, suffix: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(f".{suffix}"))


@pytest.mark.parametrize(
    "method,suffix",
    [
        ("duquant", "first"),
        ("duquant", "order"),
        ("duquant", "second"),
        ("smoothquant", "scale"),
        ("hadamard", "first"),
        ("weight_pca", "order"),
        ("weight_pca", "output_rotation"),
        ("rtn", "codes"),
        ("rtn", "scales"),
    ],
)
@pytest.mark.parametrize(
    "change",
    [
        None,
        torch.zeros_like,
        lambda t: t[:-1],
        lambda t: torch.cat([t, t]),
        lambda t: t.double(),
        lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t.long(),
        lambda t: t * 1e30 if t.is_floating_point() else t.bool(),
    ],
    ids=["gone", "zeros", "short", "doubled", "float64", "nan", "huge"],
)
def test_a_tensor_that_quantize_cannot_have_written_is_refused(parts, tmp_path, method, suffix, change):
    meta, tensors = parts[method]
    name, tensors = first(tensors, suffix), dict(tensors)
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name])
    if suffix == "codes" and change is torch.zeros_like:
        return  # a row of zeros is a row of zeros: only the weights could tell
    with pytest.raises(GuardRefusal, match="qlibero quantize"):
        load(signed(meta, tensors, tmp_path / "a.safetensors"))


@pytest.mark.parametrize("method", ["duquant", "smoothquant", "hadamard", "rtn", "weight_pca", "gptq"])
@pytest.mark.parametrize(
    "suffix,change",
    [
        ("codes", torch.zeros_like),
        ("codes", lambda t: t + 17),
        ("codes", lambda t: t.roll(1, 0)),
        ("scales", lambda t: t * 2),
        ("scales", lambda t: torch.cat([t[:1] * 1.5, t[1:]])),
        ("scales", lambda t: torch.cat([t[:1], t[1:2] * 1.5, t[2:]])),
    ],
    ids=["zeros", "each plus one", "rolled", "doubled", "one row", "a row between"],
)
def test_codes_and_scales_are_those_of_the_weights(parts, policy, tmp_path, method, suffix, change):
    meta, tensors = parts[method]
    require_of_weights(policy.model, load(signed(meta, tensors, tmp_path / "a.safetensors")))
    name = first(tensors, suffix)
    changed = load(signed(meta, tensors | {name: change(tensors[name])}, tmp_path / "b.safetensors"))
    with pytest.raises(GuardRefusal, match=f"{name.removesuffix('.' + suffix)} is not made from this policy's weights"):
        require_of_weights(policy.model, changed)


@pytest.mark.parametrize("method", ["duquant", "hadamard", "rtn"])
@pytest.mark.parametrize("told", [0.0, float("inf"), float("nan"), 1.0, -1.0], ids=str)
def test_no_stored_importance_makes_any_scale_as_good_as_the_searched(parts, policy, tmp_path, method, told):
    """Scales three times as wide, with the codes that are nearest on them, lose half of what four bits hold."""
    meta, tensors = parts[method]
    name = first(tensors, "codes")
    packed = tensors[name]
    low, high = (((half ^ 8).float() - 8).div(3).round().to(torch.uint8) & 15 for half in (packed & 15, packed >> 4))
    scales = name.replace(".codes", ".scales")
    wrong = tensors | {name: low | high << 4, scales: tensors[scales] * 3}
    wrong |= {key: torch.full_like(t, told) for key, t in tensors.items() if key.endswith(".importance")}
    with pytest.raises(GuardRefusal, match="qlibero quantize"):
        require_of_weights(policy.model, load(signed(meta, wrong, tmp_path / "a.safetensors")))


@pytest.mark.parametrize(
    "settings",
    [
        {"group_size": 16},
        {"rounding": "nearest"},
        {"rounding": "gptq", "weight_clip": 0.8},
        {"weight_bits": 8},
        {"corrections": ("atm", "ohb")},
    ],
    ids=str,
)
def test_every_honest_artifact_is_taken(policy, settings):
    spec = quant_of(**{"method": "smoothquant", "layout": "llm+expert", "block_size": 16} | settings)
    made = calibrate(policy, observations(3), noises(3, policy.noise_shape), spec, {"data_sha256": "2" * 64})
    require_of_weights(policy.model, made)


def test_negative_scales_and_strange_tensors_are_refused(parts, tmp_path):
    meta, tensors = parts["rtn"]
    name = first(tensors, "scales")
    for changed in (tensors | {name: -tensors[name]}, tensors | {"extra.codes": torch.zeros(3)}):
        with pytest.raises(GuardRefusal, match="qlibero quantize"):
            load(signed(meta, changed, tmp_path / "a.safetensors"))


def put(meta: dict, path: tuple, value) -> dict:
    meta = copy.deepcopy(meta)
    inner = meta
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return meta


@pytest.mark.parametrize(
    "path,value",
    [
        (("format",), True),
        (("format",), "1"),
        (("spec_hash",), "0" * 64),
        (("spec", "alpha"), 0.25),
        (("spec", "method"), "rtn"),
        (("spec", "block_size"), 2**70),
        (("spec", "evil"), 1),
        (("checkpoint_sha256",), None),
        (("calibration",), []),
        (("calibration", "data_sha256"), 5),
        (("layers",), []),
        (("layers", 0, "out_features"), 0),
        (("layers", 0, "out_features"), True),
        (("layers", 0, "group"), "elsewhere"),
        (("layers", 0, "codes_bytes"), 3),
        (("layers", 0, "evil"), 1),
        (("corrections",), {"action_out_proj": [0.0]}),
        (("corrections",), {f"{LAYER}q_proj": [0.9]}),
        (("corrections",), "x"),
    ],
    ids=str,
)
def test_metadata_that_contradicts_itself_is_refused(parts, tmp_path, path, value):
    meta, tensors = parts["duquant"]
    with pytest.raises(GuardRefusal):
        load(signed(put(meta, path, value), tensors, tmp_path / "a.safetensors"))


@pytest.mark.parametrize("text", ["[]", "null", "5", "[" * 100_000, '{"a":' * 2_000 + "1" + "}" * 2_000, '"x"', "NaN"])
def test_metadata_that_is_no_object_is_refused(parts, tmp_path, text):
    _, tensors = parts["rtn"]
    save_file(tensors, tmp_path / "a.safetensors", metadata={"qlibero": text, "sha256": "0" * 64})
    with pytest.raises(GuardRefusal, match="qlibero quantize"):
        load(tmp_path / "a.safetensors")


def test_groups_and_execution_are_those_of_the_model(parts, policy, tmp_path):
    meta, tensors = parts["rtn"]
    for key, value in (("group", f"{LAYER}q_proj"), ("executed", not meta["layers"][0]["executed"])):
        artifact = load(signed(put(meta, ("layers", 0, key), value), tensors, tmp_path / "a.safetensors"))
        with pytest.raises(GuardRefusal, match=f"says {key} .* in this model it is"):
            quantize_policy(policy, artifact, "fake")
