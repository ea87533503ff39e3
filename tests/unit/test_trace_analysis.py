"""The classification of a profile's events, and the sweep over their spans, on literal examples."""

import random
import time
from unittest.mock import Mock

import pytest
from torch.autograd import DeviceType

from recipes.monitor.trace_analysis import PARTS, Event, classify, read_events, time_per_part

WINDOW = Event("recorded steps", 0, 100, thread=1, number=1)


def times(spans, start_ns=0, stop_ns=10):
    swept = time_per_part(spans, start_ns, stop_ns)
    assert tuple(swept) == PARTS
    assert sum(swept.values()) == stop_ns - start_ns
    return {part: time_ns for part, time_ns in swept.items() if time_ns}


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], {"idle": 10}),
        ([(2, 5, "gemm")], {"gemm": 3, "idle": 7}),
        ([(-5, 3, "gemm"), (8, 20, "merge"), (30, 40, "other")], {"gemm": 3, "merge": 2, "idle": 5}),
        # compute hides communication, whichever started first
        ([(0, 10, "exchange"), (2, 5, "attention")], {"exchange": 7, "attention": 3}),
        ([(0, 6, "attention"), (3, 9, "exchange")], {"attention": 6, "exchange": 3, "idle": 1}),
        ([(0, 8, "data"), (2, 4, "exchange"), (3, 6, "merge")], {"data": 4, "exchange": 1, "merge": 3, "idle": 2}),
        # of two computations the first to start counts, even if it started before the window
        ([(0, 6, "gemm"), (2, 8, "attention")], {"gemm": 6, "attention": 2, "idle": 2}),
        ([(1, 9, "attention"), (2, 3, "gemm"), (4, 12, "merge")], {"attention": 8, "merge": 1, "idle": 1}),
        ([(-1, 4, "gemm"), (-2, 6, "merge")], {"merge": 6, "idle": 4}),
        # overlapping spans count once; an empty span counts nothing
        ([(1, 4, "exchange")] * 5 + [(6, 6, "gemm")], {"exchange": 3, "idle": 7}),
    ],
)
def test_every_instant_belongs_to_one_part(spans, expected):
    assert times(spans) == expected


def test_the_window_need_not_start_at_zero():
    assert times([(0, 103, "gemm"), (104, 105, "data")], 100, 110) == {"gemm": 3, "data": 1, "idle": 6}


def test_a_hundred_thousand_spans_take_seconds():
    generator = random.Random(0)
    parts = [part for part in PARTS if part != "idle"]
    starts = [generator.randrange(10**9) for _ in range(100_000)]
    spans = [(start, start + generator.randrange(10**5), generator.choice(parts)) for start in starts]
    started = time.perf_counter()
    assert sum(time_per_part(spans, 0, 10**9).values()) == 10**9
    assert time.perf_counter() - started < 5  # 0.5 s here


def classified(*events: Event) -> set[tuple[int, int, str]]:
    spans, start_ns, stop_ns = classify([WINDOW, *events])
    assert (start_ns, stop_ns) == (0, 100)
    assert len(set(spans)) == len(spans)
    return set(spans)


def test_on_the_host_an_outermost_operator_belongs_to_its_innermost_range():
    assert classified(
        Event("RingFunction", 0, 60, 1, 2),  # encloses all ranges of Python, but is no operator
        Event("attention kernel", 1, 20, 1, 3),
        Event("aten::matmul", 2, 10, 1, 4),
        Event("aten::bmm", 3, 9, 1, 5),
        Event("merge", 30, 40, 1, 6),
        Event("aten::lerp_", 31, 39, 1, 7),
        Event("aten::copy_", 50, 60, 1, 8),
        Event("aten::linear", 60, 70, 1, 9),
        Event("aten::addmm", 61, 69, 1, 10),
        Event("aten::scaled_dot_product_attention", 70, 75, 1, 11),
        Event("Optimizer.step#AdamW.step", 80, 90, 1, 12),
        Event("aten::mm", 81, 89, 1, 13),
    ) == {
        (2, 10, "attention"),
        (31, 39, "merge"),
        (50, 60, "other"),
        (60, 70, "gemm"),
        (70, 75, "attention"),
        (81, 89, "optimizer"),
    }


def test_on_the_host_messages_waits_and_blocking_calls_count_as_exchange():
    assert classified(
        Event("gloo:recv", 5, 50, 1, 2, is_async=True),
        Event("aten::mul", 10, 20, 1, 3),  # on the message's thread and in its time, but not part of it
        Event("exchange wait", 30, 50, 1, 4),
        Event("optimizer", 55, 90, 1, 5),
        Event("c10d::allreduce_", 60, 70, 1, 6),
        Event("gloo:all_reduce", 62, 75, 2, 7, is_async=True),
        Event("aten::copy_", 63, 64, 2, 8),  # made by gloo
        Event("data", 92, 99, 1, 9),
    ) == {
        (5, 50, "exchange"),
        (10, 20, "other"),
        (30, 50, "exchange"),
        (60, 70, "exchange"),
        (62, 75, "exchange"),
        (92, 99, "data"),
    }


def kernel(name: str, start_ns: int, stop_ns: int, launched_by: int = 0) -> Event:
    return Event(name, start_ns, stop_ns, 7, 99, launched_by, on_device=True)


def test_on_a_device_a_kernel_belongs_to_what_launched_it():
    backward = 2  # autograd's thread
    assert classified(
        Event("attention kernel", 1, 9, backward, 2),
        Event("aten::_flash_attention_backward", 2, 8, backward, 3),
        Event("aten::linear", 10, 12, 1, 4),
        Event("aten::addmm", 10, 11, 1, 5),
        Event("merge", 12, 13, 1, 6),
        Event("c10d::allreduce_", 14, 15, 1, 7),
        Event("data", 16, 19, 1, 8),
        Event("aten::copy_", 17, 18, 1, 9),
        Event("exchange wait", 20, 25, 1, 10),  # only the host waits
        Event("aten::mul", 26, 27, 1, 11),
        Event("exchange copy", 47, 49, 1, 12),
        Event("aten::copy_", 47, 48, 1, 13),
        kernel("flash_bwd_kernel", 20, 30, 3),
        kernel("a CuTe kernel, launched outside operators", 30, 31, 2),
        kernel("splitKreduce_kernel", 31, 32, 5),
        kernel("vectorized_elementwise_kernel", 32, 33, 6),
        kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage)", 20, 45, 6),
        kernel("Memcpy HtoD (Pinned -> Device)", 45, 46, 9),
        kernel("vectorized_elementwise_kernel", 46, 47, 11),
        kernel("Memcpy PtoP (Device -> Device)", 48, 60, 13),
    ) == {
        (16, 19, "data"),
        (17, 18, "data"),
        (20, 30, "attention"),
        (30, 31, "attention"),
        (31, 32, "gemm"),
        (32, 33, "merge"),
        (20, 45, "exchange"),
        (45, 46, "data"),
        (46, 47, "other"),
        (48, 60, "exchange"),
    }


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "gemm"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "exchange"),
        ("triton_poi_fused_mul_0", "other"),
    ],
)
def test_a_kernel_without_a_known_launch_is_classified_by_its_name(name: str, part: str):
    assert classified(kernel(name, 1, 2)) == {(1, 2, part)}


def record(name: str, number: int, launched_by: int = 0, device: DeviceType = DeviceType.CPU, annotation: bool = False):
    attributes = {
        "name": name,
        "start_ns": 1,
        "end_ns": 2,
        "start_thread_id": 1,
        "correlation_id": number,
        "linked_correlation_id": launched_by,
        "is_async": False,
        "device_type": device,
        "is_user_annotation": annotation,
    }
    return Mock(spec_set=list(attributes), **{f"{key}.return_value": value for key, value in attributes.items()})


def test_operators_ranges_and_kernels_are_read_from_a_profile():
    """Runtime calls have numbers of their own, which may equal an operator's."""
    records = [
        record("Optimizer.step#AdamW.step", 4, annotation=True),
        record("aten::mm", 5),
        record("cudaLaunchKernel", 5, launched_by=5),
        record("cudaDeviceSynchronize", 5),
        record("cuLaunchKernelEx", 4),
        record("Activity Buffer Request", 0),
        record("nvjet", 7, launched_by=5, device=DeviceType.CUDA),
        record("Optimizer.step#AdamW.step", 4, device=DeviceType.CUDA, annotation=True),
    ]
    assert list(read_events(records)) == [
        Event("Optimizer.step#AdamW.step", 1, 2, 1, 4),
        Event("aten::mm", 1, 2, 1, 5),
        Event("nvjet", 1, 2, 1, 7, launched_by=5, on_device=True),
    ]
