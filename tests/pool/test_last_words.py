"""What is made of the last lines of a worker that died."""

import signal

import pytest

from llamaherd.pool.last_words import explain_signal, last_words, tells_of_a_full_gpu

ASSERTION = "llama-vocab.cpp:2544: GGML_ASSERT(id_to_token.size() == token_to_id.size()) failed"

FULL_GPU = [
    "CUDA error: out of memory",
    "  current device: 0, in function alloc at /build/ggml-cuda/ggml-cuda.cu:603",
    "  cuMemCreate(&handle, reserve_size, &prop, 0)",
    "/build/ggml/src/ggml-cuda/ggml-cuda.cu:109: CUDA error",
]


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ([], ""),
        (["loading", "print_info: file size = 0.53 MiB"], ""),
        (["loading", f"/build/vendor/llama.cpp/src/{ASSERTION}"], ASSERTION),
        ([f"C:\\build\\src\\{ASSERTION}"], ASSERTION),
        ([ASSERTION, "a later line"], ASSERTION),
        (["/x/ggml.c:7: fatal error"], "ggml.c:7: fatal error"),
        (
            ["terminate called after throwing an instance of 'std::regex_error'", "  what():  Unmatched ( in regex."],
            "std::regex_error: Unmatched ( in regex.",
        ),
        (["terminate called after throwing an instance of 'int'"], "int"),
        (["terminate called without an active exception"], "terminate called without an active exception"),
        (["double free or corruption (out)"], "double free or corruption (out)"),
        (["*** stack smashing detected ***: terminated"], "*** stack smashing detected ***: terminated"),
        (FULL_GPU, "ggml-cuda.cu:109: CUDA error: out of memory"),
        (
            ["CUDA error: an illegal memory access was encountered", *["other lines"] * 9, FULL_GPU[-1]],
            "ggml-cuda.cu:109: CUDA error",
        ),
        (["/old/a.cpp:1: GGML_ASSERT(old)", "/new/b.cpp:2: GGML_ASSERT(new)"], "b.cpp:2: GGML_ASSERT(new)"),
    ],
)
def test_the_newest_words_that_say_why_are_found(log: list[str], words: str) -> None:
    assert last_words(log) == words


def test_only_an_abort_has_last_words() -> None:
    log = [f"/build/{ASSERTION}"]
    assert explain_signal(signal.SIGABRT, log) == ASSERTION
    assert explain_signal(signal.SIGKILL, log) == ""
    assert "--no-mmap" in explain_signal(signal.SIGBUS, log)
    assert "processor" in explain_signal(signal.SIGILL, [])


@pytest.mark.parametrize(
    ("log", "full"),
    [
        (FULL_GPU, True),
        (["ROCm error: out of memory", "ggml-cuda.cu:109: ROCm error"], True),
        (["CUDA error: the resource allocation failed", FULL_GPU[-1]], True),
        (["CUDA error: an illegal memory access was encountered", FULL_GPU[-1]], False),
        ([*FULL_GPU[:-1], f"/build/{ASSERTION}"], False),
        (
            [
                "terminate called after throwing an instance of 'vk::OutOfDeviceMemoryError'",
                "  what():  vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
            ],
            True,
        ),
        ([], False),
    ],
)
def test_a_gpu_without_memory_is_told_from_other_ends(log: list[str], full: bool) -> None:
    assert tells_of_a_full_gpu(log) == full
