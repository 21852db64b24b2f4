"""The risk: a kernel that is wrong, or that skips the arithmetic it claims, and a validation that does not notice."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qlibero.cache import cache_directory
from qlibero.errors import GuardRefusal, UserError
from qlibero.kernels import load, names, passes, validation
from qlibero.kernels.contract import GemmShape, epilogue, quantize_activations, quantize_weights
from qlibero.kernels.exactness import try_kernel, try_layer
from qlibero.kernels.fake import Fake
from qlibero.kernels.known_errors import diagnose, diagnose_shape, explain
from qlibero.kernels.shapes import Layer, compact_layers, pi05_layers

SHAPE = GemmShape(48, 64)
TOKENS = (1, 10, 33)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class Liar(Fake):
    """A kernel that claims to be real and is right, until a subclass says otherwise."""

    name = "liar"
    real = True


class ColumnZeroEverywhere(Liar):
    """What the first int4 kernel of this project's user did."""

    def accumulate(self, codes_x, packed):
        return super().accumulate(codes_x, packed)[..., :1].expand(codes_x.shape[0], packed.n)

    def matmul(self, codes_x, s_x, packed, s_w, bias=None, out_dtype=torch.float32):
        return epilogue(self.accumulate(codes_x, packed), s_x, s_w, bias).to(out_dtype)


class RightFromSixteenTokens(Liar):
    """Drops the last row of weights' K tail when there are few tokens, as a tile without a mask would."""

    def matmul(self, codes_x, s_x, packed, s_w, bias=None, out_dtype=torch.float32):
        if codes_x.shape[0] < 16:
            codes_x = codes_x.clone()
            codes_x[:, -1] = 0
        return super().matmul(codes_x, s_x, packed, s_w, bias, out_dtype)


class SilentlyW4A16(Liar):
    """Never multiplies integers: turns the codes back into bf16 activations and weights."""

    def matmul(self, codes_x, s_x, packed, s_w, bias=None, out_dtype=torch.float32):
        x = (codes_x * s_x.unsqueeze(1)).bfloat16()
        y = x.float() @ (packed.codes * s_w.unsqueeze(1)).bfloat16().float().t()
        return (y if bias is None else y + bias).to(out_dtype)


class WrongEpilogueOrder(Liar):
    def matmul(self, codes_x, s_x, packed, s_w, bias=None, out_dtype=torch.float32):
        y = self.accumulate(codes_x, packed) * s_w * s_x.unsqueeze(1)
        return (y if bias is None else y + bias).to(out_dtype)


class SwapsNibbles(Liar):
    def pack(self, codes, weight_bits=4, group_size=None):
        half = codes.shape[1] // 2
        return super().pack(torch.cat([codes[:, half:], codes[:, :half]], dim=1), weight_bits, group_size)


class LeavesOutputUnwritten(Liar):
    def matmul(self, codes_x, s_x, packed, s_w, bias=None, out_dtype=torch.float32):
        y = super().matmul(codes_x, s_x, packed, s_w, bias, out_dtype)
        y[-1, -1] = float("nan")
        return y


class RoundsTheAccumulator(Liar):
    """Accumulates in fp32 and hands the sum on in bf16, as a code matmul with bf16 output would."""

    def accumulate(self, codes_x, packed):
        return super().accumulate(codes_x, packed).bfloat16().float()


class Dies(Liar):
    def matmul(self, *args, **kwargs):
        try:
            raise RuntimeError("error: identifier CU_TENSOR_MAP_SWIZZLE_128B is undefined")
        except RuntimeError as cause:
            raise AttributeError("'Matmul' object has no attribute 'torch_func'") from cause


LIES = (
    ColumnZeroEverywhere,
    RightFromSixteenTokens,
    SilentlyW4A16,
    WrongEpilogueOrder,
    SwapsNibbles,
    LeavesOutputUnwritten,
    RoundsTheAccumulator,
    Dies,
)


def test_the_honest_kernel_passes():
    finding = try_kernel(Liar(), SHAPE, TOKENS)
    assert finding.ok, finding.reason


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_every_lie_is_caught(lie):
    finding = try_kernel(lie(), SHAPE, TOKENS)
    assert not finding.ok


def test_a_kernel_right_only_for_many_tokens_is_caught_exactly_where_it_is_used_with_few():
    assert not try_kernel(RightFromSixteenTokens(), SHAPE, (10,)).ok
    # the read-back uses many tokens, so the reason must name the few
    assert "M=10" in try_kernel(RightFromSixteenTokens(), SHAPE, (10,)).reason
    assert try_kernel(RightFromSixteenTokens(), SHAPE, (16, 968)).ok


def test_identical_columns_are_named_as_such():
    class AfterReadBack(ColumnZeroEverywhere):
        calls = 0

        def matmul(self, *args, **kwargs):
            type(self).calls += 1
            kernel = Fake() if type(self).calls == 1 else super()
            return kernel.matmul(*args, **kwargs)

    assert "all output columns are alike" in try_kernel(AfterReadBack(), SHAPE, TOKENS).reason
    assert "all rows are alike" in try_kernel(ColumnZeroEverywhere(), SHAPE, TOKENS).reason


# -------------------------------------------------------------------------------- kernels with a rounded output only
class LikeHumming(Fake):
    """What humming 0.1.19 computes if K is not split: right integers, rounded to bf16 after each scale, fp32 bias."""

    name, real, rounds_to = "like_humming", True, torch.bfloat16

    def accumulate(self, codes_x, packed):
        raise NotImplementedError

    def product(self, codes_x, s_x, packed, s_w):
        acc = Fake.accumulate(self, codes_x, packed).float()
        return (acc * s_x.unsqueeze(1)).bfloat16() * s_w.bfloat16()

    def matmul(self, codes_x, s_x, packed, s_w, bias=None, out_dtype=torch.bfloat16):
        y = self.product(codes_x, s_x, packed, s_w)
        return (y if bias is None else y.float() + bias.float()).to(out_dtype)


class SplitsKInBf16(LikeHumming):
    """What it computes by default: the parts of K are rounded, and added as rounded numbers."""

    def product(self, codes_x, s_x, packed, s_w):
        half, rest = codes_x.clone(), codes_x.clone()
        half[:, codes_x.shape[1] // 2 :] = 0
        rest[:, : codes_x.shape[1] // 2] = 0
        return super().product(half, s_x, packed, s_w) + super().product(rest, s_x, packed, s_w)


class RoundsTokenScales(LikeHumming):
    def product(self, codes_x, s_x, packed, s_w):
        return super().product(codes_x, s_x.bfloat16().float(), packed, s_w)


class DropsTheBias(LikeHumming):
    def matmul(self, codes_x, s_x, packed, s_w, bias=None, out_dtype=torch.bfloat16):
        return super().matmul(codes_x, s_x, packed, s_w, None, out_dtype)


@pytest.mark.parametrize("k", sorted({layer.shape.k for layer in pi05_layers() + compact_layers()}))
def test_a_kernel_that_only_rounds_its_output_passes_at_every_depth(k):
    """Two roundings, and a bias that cancels the product or dwarfs it, are no error."""
    finding = try_kernel(LikeHumming(), GemmShape(64, k), (1, 10, 33))
    assert finding.ok, finding.reason


@pytest.mark.parametrize("lie", [SplitsKInBf16, RoundsTokenScales, DropsTheBias], ids=lambda lie: lie.__name__)
def test_what_a_rounded_output_could_hide_is_caught(lie):
    finding = try_kernel(lie(), GemmShape(64, 256), TOKENS)
    assert not finding.ok and "results wrong" in finding.reason


class _Linear(nn.Module):
    """A quantized linear as quant builds it, which may skip the quantization of its input."""

    output_rotation = None
    start, stop = 0, SHAPE.n

    def __init__(self, kernel, skips_activation_quantization=False):
        super().__init__()
        self.codes, scales = quantize_weights(torch.randn(SHAPE.n, SHAPE.k))
        self.product = SimpleNamespace(
            kernel=kernel, packed=kernel.pack(self.codes), scales=scales, bias=torch.randn(SHAPE.n)
        )
        self._float = (self.codes * scales.unsqueeze(1)) if skips_activation_quantization else None

    def prepare(self, x):
        codes, scales = quantize_activations(x.reshape(-1, x.shape[-1]))
        return SimpleNamespace(codes=codes, scales=scales)

    def forward(self, x):
        p, q = self.product, self.prepare(x)
        if self._float is not None:
            return x @ self._float.t() + p.bias
        return p.kernel.matmul(q.codes, q.scales, p.packed, p.scales, p.bias).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("kernel", [load("fake"), load("cpu_int4"), LikeHumming()], ids=lambda kernel: kernel.name)
def test_a_layer_that_skips_activation_quantization_is_caught(kernel):
    x = torch.randn(2, 5, SHAPE.k)
    honest, skipping = _Linear(kernel), _Linear(kernel, skips_activation_quantization=True)
    assert try_layer(honest, x, honest.codes).ok
    finding = try_layer(skipping, x, skipping.codes)
    assert not finding.ok and "int8 activations" in finding.reason


# ------------------------------------------------------------------------------------------------------- verdicts
LAYERS = [Layer("a", SHAPE, (10,)), Layer("b", SHAPE, (10,)), Layer("c", GemmShape(16, 128), (1, 7))]


@pytest.fixture
def lying(monkeypatch):
    monkeypatch.setattr(validation, "names", lambda: (*names(), "liar"))
    monkeypatch.setattr(validation, "load", lambda name: ColumnZeroEverywhere() if name == "liar" else load(name))


def test_refuse_is_the_default_and_names_layers_reason_and_cure(lying):
    verdicts = validation.check(LAYERS, "liar")
    assert [v.verdict for v in verdicts] == ["refuse"] * 3 and all(v.executed is None for v in verdicts)
    with pytest.raises(GuardRefusal, match="refused in 3 of 3 layers") as refusal:
        validation.enforce(verdicts)
    assert "do not read back" in str(refusal.value) and "on_failure: fallback" in str(refusal.value)


def test_a_fallback_says_to_what_and_why(lying):
    verdicts = validation.check(LAYERS, "liar", on_failure="fallback")
    validation.enforce(verdicts)
    assert {v.verdict for v in verdicts} == {"fall back to cpu_int4"} and {v.executed for v in verdicts} == {"cpu_int4"}
    assert all("read back" in v.reason and v.requested == "liar" for v in verdicts)
    json.dumps([v.to_json() for v in verdicts])


def test_auto_takes_a_real_kernel_that_passes_and_never_one_that_lies(lying):
    verdicts = validation.check(LAYERS, "auto")
    assert {v.executed for v in verdicts} <= {"cpu_int4", "w8a8"} and "auto: fastest" in verdicts[0].reason
    assert {v.requested for v in verdicts} == {"auto"}  # what the user wrote; `executed` is what was chosen


def test_auto_refuses_when_nothing_real_passes(monkeypatch):
    monkeypatch.setattr(validation, "names", lambda: ("fake", "liar"))
    monkeypatch.setattr(validation, "load", lambda name: ColumnZeroEverywhere() if name == "liar" else load(name))
    with pytest.raises(GuardRefusal, match="no real kernel passes"):
        validation.check(LAYERS, "auto")


def test_passes_are_remembered_until_anything_they_depend_on_changes(monkeypatch):
    assert not validation.check(LAYERS, "cpu_int4")[0].cached
    assert validation.check(LAYERS, "cpu_int4")[0].cached
    assert passes.validation_status("cpu_int4").startswith("passed 2 shapes on")
    monkeypatch.setattr(passes, "_source_hash", lambda: "another source")
    assert passes.validation_status("cpu_int4") == "unproven"  # the kernel that passed is not the one that would run
    assert not validation.check(LAYERS, "cpu_int4")[0].cached
    monkeypatch.setattr(validation.torch, "__version__", "9.9")
    assert passes.validation_status("cpu_int4") == "unproven"
    assert not validation.check(LAYERS, "cpu_int4")[0].cached


def test_what_others_left_in_the_cache_is_passed_over():
    validation.check(LAYERS, "cpu_int4")
    proven = passes.validation_status("cpu_int4")
    ours = list(cache_directory("kernels").glob("cpu_int4-*.json"))
    known = json.loads(ours[0].read_text())
    old = {key: value for key, value in known["facts"].items() if key != "processor"}
    foreign = [
        {**known, "facts": old},
        {**known, "facts": {**known["facts"], "processor": None}},
        {**known, "facts": None},
        {key: value for key, value in known.items() if key != "shape"},
        {"reason": "old"},
        [1],
        None,
    ]
    for i, entry in enumerate(foreign):
        ours[0].with_name(f"cpu_int4-{i}.json").write_text(json.dumps(entry))
    ours[0].with_name("cpu_int4-torn.json").write_bytes(b"\xff{")
    assert passes.validation_status("cpu_int4") == proven
    for path in ours:
        path.write_text("null")
    assert (
        passes.validation_status("cpu_int4") == "unproven" and validation.check(LAYERS, "cpu_int4")[0].verdict == "pass"
    )


def test_a_pass_under_the_interpreter_says_nothing_about_this_machine(monkeypatch):
    with monkeypatch.context() as interpreted:
        interpreted.setenv("TRITON_INTERPRET", "1")
        for _ in range(2):
            assert (
                validation.check(LAYERS, "cpu_int4")[0].verdict == "pass"
                and not validation.check(LAYERS, "cpu_int4")[0].cached
            )
    assert passes.validation_status("cpu_int4") == "unproven"
    assert not validation.check(LAYERS, "cpu_int4")[0].cached


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_nothing_claims_a_gpu_that_is_not_there():
    from qlibero.cli import catalogue

    assert {row["backend"] for row in catalogue.backends() if "cuda" in row["runs_on"]} == set()


# ------------------------------------------------------------------------------------------------ 16-bit activations
WEIGHT_ONLY = [Layer("d", GemmShape(48, 64, 4, 16), (10,))]


def test_16_bit_activations_are_never_credited_to_a_kernel():
    for backend in ("fake", "auto"):
        (verdict,) = validation.check(WEIGHT_ONLY, backend)
        assert (verdict.executed, verdict.verdict) == ("dequantized", "pass") and "no memory is saved" in verdict.reason
    for backend in ("cpu_int4", "triton_w4a8", "humming", "int_ref"):
        with pytest.raises(GuardRefusal, match=f"{backend} has nothing to do; write fake"):
            validation.enforce(validation.check(WEIGHT_ONLY, backend))
        (verdict,) = validation.check(WEIGHT_ONLY, backend, on_failure="fallback")
        assert (verdict.executed, verdict.verdict) == ("dequantized", "fall back to dequantized")


def test_failures_are_not_remembered(lying):
    validation.check(LAYERS, "liar")
    assert validation.check(LAYERS, "liar")[0].cached is False and passes.validation_status("humming") == "unproven"


def test_what_a_machine_lacks_is_a_verdict_not_a_crash():
    for backend in ("triton_w4a8", "humming", "bitblas"):
        for verdict in validation.check(pi05_layers()[:1], backend):
            assert verdict.verdict == "refuse" and verdict.reason


def test_unknown_names_are_the_users_error():
    with pytest.raises(UserError, match="there is no kernel 'int5'"):
        validation.check(LAYERS, "int5")
    with pytest.raises(UserError, match="there is no kernel 'int5'"):
        validation.check(WEIGHT_ONLY, "int5")
    with pytest.raises(UserError, match="refuse or fallback"):
        validation.check(LAYERS, "fake", on_failure="ignore")
    with pytest.raises(UserError, match="nothing for a kernel to do"):
        validation.check([], "fake")
    with pytest.raises(UserError, match="group_size 7 does not divide"):
        pi05_layers(group_size=7)


def test_every_compact_shape_passes_on_this_machine():
    for backend in ("fake", "cpu_int4"):
        verdicts = validation.check(
            [layer for layer in compact_layers() if layer.name.startswith(("XS", "M"))], backend
        )
        assert {v.verdict for v in verdicts} == {"pass"}, validation.table(verdicts)


# ------------------------------------------------------------------------------------------------------ diagnoses
def test_the_header_mismatch_is_explained_even_behind_the_error_that_hides_it():
    assert "CUDA headers of two versions" in diagnose("error: identifier CU_TENSOR_MAP_SWIZZLE_128B is undefined")
    finding = try_kernel(Dies(), SHAPE, TOKENS)
    assert "torch_func" in finding.reason and "swallowed a failed build" in finding.reason
    assert "one CUDA toolkit of 12 or newer" in explain(RuntimeError("CU_TENSOR_MAP_SWIZZLE_128B is undefined"))
    assert diagnose("something else") is None


def test_a_k_that_is_not_a_multiple_of_eight_is_explained_where_it_does_harm():
    assert diagnose_shape(64, 64) is None
    assert "every output column is identical" in diagnose_shape(64, 4) and "multiple of 8" in diagnose_shape(64, 100)
    finding = try_kernel(ColumnZeroEverywhere(), GemmShape(64, 4), (4,))
    assert not finding.ok and "K = 4 is not a multiple of 8" in finding.reason
    assert try_kernel(load("cpu_int4"), GemmShape(64, 100), (4,)).ok  # whoever is right there is not refused for it
    assert "two codes share a byte" in try_kernel(load("cpu_int4"), GemmShape(64, 99), (4,)).reason


def test_a_compiler_that_failed_behind_bitblas_is_explained():
    assert "nvcc had failed" in diagnose(AttributeError("/usr/bin/python3: undefined symbol: init"))
    assert "CUDA toolkit" in diagnose(FileNotFoundError(2, "No such file or directory", "nvcc"))
