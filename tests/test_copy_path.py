"""DMA or gather: measured by doctor, kept per user and GPU, looked up by the cache."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from fake_cuda_library import fake_cuda_library

import moeinf
from moeinf import _core
from moeinf.cache import gather_tuning, measured
from moeinf.cli import doctor

LATENCY_NS = 2_000_000


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ctypes.CDLL]:
    """The fake driver, with a folder for the measured result."""
    monkeypatch.setenv("MOEINF_CUDA_DRIVER", str(fake_cuda_library()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake = ctypes.CDLL(str(fake_cuda_library()))
    yield fake
    fake.fake_cuda_reset(ctypes.c_uint64(1))


def set_latency(fake: ctypes.CDLL, nanoseconds: int) -> None:
    fake.fake_cuda_set_link(0, ctypes.c_double(2e9), ctypes.c_uint64(nanoseconds))


@pytest.fixture
def store(qwen3_folder: Path) -> moeinf.ExpertStore:
    return moeinf.ExpertStore.open(qwen3_folder)


def path_of(store: moeinf.ExpertStore, **options: Any) -> str:
    cache = moeinf.ExpertCache(store, device="cuda", slots=4, **options)
    found: str = cache.stats()["host"]["copy_path"]
    return found


def test_a_checkout_built_in_place_has_no_version_and_needs_none(
    store: moeinf.ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(measured, "version", none)
    assert "never measured here" in path_of(store)
    gather_tuning.store(_core.CudaDevice(0), {"gather_below": 300, "rows": []})
    assert "gather up to 300 bytes" in path_of(store)


def test_each_copy_has_its_latency_and_a_gather_has_one(driver: ctypes.CDLL) -> None:
    set_latency(driver, LATENCY_NS)
    device = _core.CudaDevice(0)
    seconds = [device.time_copies(4096, 8, gather, 3) for gather in (False, True)]
    assert seconds[0] >= 8 * LATENCY_NS / 1e9
    assert LATENCY_NS / 1e9 <= seconds[1] < seconds[0]
    with pytest.raises(ValueError, match="found 65 of 16"):
        device.time_copies(16, 65, False, 1)
    with pytest.raises(ValueError, match="found 1 of 15"):
        device.time_copies(15, 1, False, 1)


@pytest.mark.parametrize(
    ("gather", "expected"),
    [([2, 2, 2], 300), ([2, 2, 1], 200), ([1, 2, 2], 0), ([1.01, 1, 1], 0), ([None] * 3, 0)],
)
def test_the_threshold_ends_where_gathering_first_does_not_win(
    gather: list[float | None], expected: int
) -> None:
    rows = [{"nbytes": 100 * (i + 1), "dma": 1.0, "gather": rate} for i, rate in enumerate(gather)]
    assert gather_tuning.threshold(rows) == expected


def test_what_doctor_measures_the_cache_uses(
    driver: ctypes.CDLL,
    store: moeinf.ExpertStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert path_of(store) == "dma (never measured here: moeinf doctor)"
    set_latency(driver, LATENCY_NS)
    monkeypatch.setattr(doctor.machine, "describe", lambda _: {"cuda": {"devices": [{}]}})
    monkeypatch.setattr(doctor.machine, "missing", lambda _: [])
    monkeypatch.setattr(gather_tuning, "SIZES", (4096, 65536))
    doctor.command(tmp_path, json=True)
    copies = json.loads(capsys.readouterr().out)["cuda"]["devices"][0]["copies"]
    assert copies["gather_below"] == 65536
    assert [row["nbytes"] for row in copies["rows"]] == [4096, 65536]
    assert Path(copies["kept_in"]) == gather_tuning.KEPT.path()
    assert gather_tuning.KEPT.path().is_relative_to(tmp_path)
    assert path_of(store) == "gather up to 65536 bytes, dma above (measured by doctor)"
    assert path_of(store, gather_below=0) == "dma (as asked)"
    assert path_of(store, gather_below=512) == "gather up to 512 bytes, dma above (as asked)"


def test_it_counts_for_its_device_and_driver_alone(
    driver: ctypes.CDLL, store: moeinf.ExpertStore
) -> None:
    gather_tuning.store(_core.CudaDevice(0), {"rows": [], "gather_below": 4096})
    driver.fake_cuda_set_driver_version(12040)
    assert "never measured" in path_of(store)
    gather_tuning.store(_core.CudaDevice(0), {"rows": [], "gather_below": 8192})
    assert "8192" in path_of(store)
    driver.fake_cuda_set_driver_version(13000)
    assert "4096" in path_of(store)  # the other one's is still there


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": "someone-elses", "devices": {}}',
        '{"format": "moeinf-gather-1", "devices": []}',
        "\udcff",
    ],
)
def test_a_damaged_or_foreign_file_is_said_and_passed_over(
    content: str, store: moeinf.ExpertStore
) -> None:
    gather_tuning.KEPT.path().parent.mkdir(parents=True)
    gather_tuning.KEPT.path().write_bytes(content.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=r"gather\.json.*copied by DMA.*doctor"):
        assert "dma" in path_of(store)
    with pytest.warns(UserWarning, match=r"gather\.json"):  # and mended by the next measurement
        gather_tuning.store(_core.CudaDevice(0), {"rows": [], "gather_below": 4096})
    assert "4096" in path_of(store)


@pytest.mark.parametrize("value", [-1, "many", None, 1.5, True])
def test_a_threshold_that_is_none(value: object, store: moeinf.ExpertStore) -> None:
    gather_tuning.store(_core.CudaDevice(0), {"rows": [], "gather_below": value})
    with pytest.warns(UserWarning, match="expected bytes"):
        assert "dma" in path_of(store)
