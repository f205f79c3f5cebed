"""Bfloat16 on a CPU is decided by a measurement, where the CPU has it at all."""

import time

import pytest
import torch

from trl_drcd import precision
from trl_drcd.evaluation.arguments import EvaluateArguments


@pytest.fixture
def cpu_with_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    precision.has_fast_bfloat16.cache_clear()
    yield
    precision.has_fast_bfloat16.cache_clear()


@pytest.mark.parametrize(("bfloat16", "fast"), [(0.5, True), (0.85, True), (0.95, False), (1.4, False)])
def test_the_measured_seconds_decide_once(cpu_with_bfloat16, monkeypatch, bfloat16, fast):
    measured = []

    def seconds():
        measured.append(True)
        return {torch.float32: 1.0, torch.bfloat16: bfloat16}

    monkeypatch.setattr(precision, "training_seconds", seconds)
    assert [precision.has_fast_bfloat16() for _ in range(2)] == [fast, fast]
    assert len(measured) == 1


def test_a_cpu_without_it_is_not_measured(cpu_with_bfloat16, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(precision, "training_seconds", None)
    assert precision.has_fast_bfloat16() is False


def test_it_measures_both_and_leaves_the_random_state():
    state = torch.get_rng_state()
    start = time.perf_counter()
    seconds = precision.training_seconds(width=32, tokens=64, rounds=2)
    assert set(seconds) == {torch.float32, torch.bfloat16}
    assert min(seconds.values()) > 0 and sum(seconds.values()) < time.perf_counter() - start
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_an_evaluation_takes_bfloat16_where_it_is_native(cpu_with_bfloat16, monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert EvaluateArguments("model", "data", [{"name": "base"}], dtype="auto").dtype == dtype
    assert EvaluateArguments("model", "data", [{"name": "base"}]).dtype == "float32"
