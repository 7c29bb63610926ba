"""Images in chats: what they change, what they share, and what they do not disturb."""

import base64
import ctypes
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from engine_driver import GREEDY, Collected, collect, drain, load_command
from llamaherd.pool.child import llama_backend, llama_library, mtmd, projector
from llamaherd.pool.child.context import Context
from llamaherd.pool.child.engine import EngineError, RequestError
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.pool.child.model import Model
from llamaherd.transport.messages import Generate, Load, Sampling
from pictures import BLUE, RED, image_part, png, wave
from tiny_gguf import tiny_model, write_mmproj

GREEN = png((0, 255, 0))


#: Images of any size; the bound spares the tiny model a large one when it is loaded.
WIDE = "qwen2vl-eye"


def load_with(eye: str = "mmproj", **options: Any) -> Load:
    model = "qwen2vl" if eye == WIDE else "random"
    return msgspec.structs.replace(load_command(model, **options), mmproj=str(tiny_model(eye)))


@contextmanager
def seeing(eye: str = "mmproj", **options: Any) -> Generator[LlamaEngine]:
    engine = LlamaEngine()
    engine.load(load_with(eye, **options), lambda _fraction: True)
    try:
        yield engine
    finally:
        engine.unload()


def show(*images: bytes, text: str = "what is this?") -> tuple[dict[str, Any], ...]:
    return ({"role": "user", "content": [*map(image_part, images), {"type": "text", "text": text}]},)


def request(number: int, messages: Sequence[dict[str, Any]], *, length: int = 12, **fields: Any) -> Generate:
    return Generate(
        request=number,
        messages=tuple(messages),
        max_tokens=length,
        ignore_eos=True,
        sampling=fields.pop("sampling", GREEDY),
        **fields,
    )


def run(engine: LlamaEngine, messages: Sequence[dict[str, Any]], **fields: Any) -> Collected:
    engine.submit(request(1, messages, **fields))
    return drain(engine)[1]


def alone(engine: LlamaEngine, messages: Sequence[dict[str, Any]], **fields: Any) -> list[int]:
    return run(engine, messages, cache_prompt=False, **fields).tokens


def usage(got: Collected) -> tuple[int, int]:
    assert got.done is not None
    return got.done.usage.prompt_tokens, got.done.usage.cached_tokens


SAY: tuple[dict[str, Any], ...] = ({"role": "user", "content": "what is this?"},)


def test_an_image_changes_the_answer_and_the_same_one_does_not() -> None:
    with seeing() as engine:
        red, blue, again = (alone(engine, show(image)) for image in (RED, BLUE, RED))
        without = alone(engine, SAY)
    assert red == again
    assert len({tuple(one) for one in (red, blue, without)}) == 3


def test_an_image_takes_the_tokens_that_its_projector_says() -> None:
    with seeing() as engine:
        with_image, text = usage(run(engine, show(RED))), usage(run(engine, SAY))
    assert with_image[0] == text[0] + 16 + 1, "and the newline between parts"


def test_the_order_of_images_matters() -> None:
    with seeing() as engine:
        one, other = alone(engine, show(RED, BLUE)), alone(engine, show(BLUE, RED))
    assert one != other


@pytest.mark.parametrize("options", [{}, {"n_batch": 8, "n_ubatch": 8}, {"n_parallel": 1}])
def test_images_and_texts_side_by_side_get_what_each_gets_alone(options: dict[str, Any]) -> None:
    chats = (show(RED), SAY, show(BLUE, GREEN), show(RED, text="and this?"), SAY)
    with seeing(**options) as engine:
        expected = [alone(engine, chat, length=20) for chat in chats]
        for number, chat in enumerate(chats):
            engine.submit(request(number, chat, length=20))
        got = drain(engine)
    assert [got[number].tokens for number in range(len(chats))] == expected


def test_the_others_get_a_token_between_any_two_steps_of_an_image() -> None:
    with seeing(n_parallel=2) as engine:
        collected: dict[int, Collected] = {}
        engine.submit(request(0, SAY, length=200))
        collect(engine.step(), collected)
        engine.submit(request(1, show(RED, BLUE, GREEN), length=4))
        silent = 0
        while engine.busy and 1 not in collected:
            before = len(collected[0].tokens)
            collect(engine.step(), collected)
            silent = silent + 1 if len(collected[0].tokens) == before else 0
            assert silent <= 1
        drain(engine, collected)
    assert len(collected[0].tokens) == 200


# --- what is shared ---


def test_an_image_that_comes_again_is_not_computed_again() -> None:
    with seeing() as engine:
        expected = alone(engine, show(RED, text="and now?"))
        first, again, other_text = (
            run(engine, show(RED)),
            run(engine, show(RED)),
            run(engine, show(RED, text="and now?")),
        )
    total = usage(first)[0]
    assert usage(first)[1] == 0
    assert usage(again)[1] == total - 1
    assert usage(other_text)[1] > 16
    assert again.tokens == first.tokens
    assert other_text.tokens == expected


def test_different_images_never_share_their_cells() -> None:
    with seeing() as engine:
        expected = alone(engine, show(BLUE))
        run(engine, show(RED))
        blue = run(engine, show(BLUE))
        head = usage(run(engine, show(GREEN)))[1]
    assert blue.tokens == expected
    assert usage(blue)[1] == head, "what stands before the image, and nothing of it"
    assert 0 < head < 32


def test_requests_that_show_the_same_image_at_once_share_it() -> None:
    with seeing() as engine:
        expected = alone(engine, show(RED, BLUE))
        for number in range(3):
            engine.submit(request(number, show(RED, BLUE)))
        got = drain(engine)
    assert [got[number].tokens for number in range(3)] == [expected] * 3
    assert [usage(got[number])[1] for number in range(3)] == [0, usage(got[0])[0] - 1, usage(got[0])[0] - 1]


def test_an_image_that_was_half_computed_is_not_half_taken_over() -> None:
    with seeing(n_batch=8, n_ubatch=8, n_parallel=1) as engine:
        for steps in range(12):
            chat = show(png((steps, 0, 200)))
            expected = alone(engine, chat)
            engine.submit(request(7, chat))
            for _ in range(steps):
                engine.step()
            engine.cancel(7)
            drain(engine)
            assert run(engine, chat).tokens == expected


def test_a_conversation_goes_on_after_its_image() -> None:
    with seeing() as engine:
        first = run(engine, show(RED))
        more = (*show(RED), {"role": "assistant", "content": "a"}, {"role": "user", "content": "sure?"})
        expected = alone(engine, more)
        second = run(engine, more)
    assert second.tokens == expected
    assert usage(second)[1] >= usage(first)[0] - 12


@pytest.mark.parametrize("cache_ram", [0, 64])
def test_images_that_must_leave_the_cache_come_back(cache_ram: int) -> None:
    chats = (show(RED, text="a" * 60), show(BLUE, text="b" * 60), show(GREEN, text="c" * 60))
    with seeing(n_ctx=256, n_parallel=3, cache_ram=cache_ram) as engine:
        expected = [alone(engine, chat, length=80) for chat in chats]
        for number, chat in enumerate(chats):
            engine.submit(request(number, chat, length=80))
        got = drain(engine)
        again = [run(engine, chat, length=80).tokens for chat in chats]
    assert [got[number].tokens for number in range(3)] == expected
    assert again == expected


def test_samplers_that_look_back_see_tokens_only() -> None:
    sampling = Sampling(temperature=0, repeat_penalty=1.3, repeat_last_n=-1, dry_multiplier=1.0)
    with seeing() as engine:
        assert len(run(engine, show(RED), sampling=sampling).tokens) == 12


# --- against llama.cpp's own way ---


def by_hand(eye: str, images: Sequence[bytes], text: str, length: int) -> list[int]:
    """Return the greedy answer that llama.cpp's helper for whole prompts comes to."""
    low = llama_library.import_lowlevel("mtmd_cpp")
    command = load_with(eye)
    llama_backend.init_backend()
    model = Model(command.path, command.options, lambda _: True)
    context = Context(model, command.options, (1, 1), llama_backend.AbortFlag())
    settings = mtmd.ProjectorSettings(
        marker=b"<media>", use_gpu=False, n_threads=1, flash_attn_type=0, image_min_tokens=-1, image_max_tokens=-1
    )
    projector = mtmd.projector_load(command.mmproj.encode(), model.handle, settings)
    assert projector is not None
    shown = "".join("<media>\n" for _ in images)
    prompt = f"<|im_start|>user\n{shown}{text}<|im_end|>\n<|im_start|>assistant\n"
    bitmaps = [mtmd.bitmap_load(projector, image) or 0 for image in images]
    chunks = mtmd.tokenize(projector, prompt.encode(), bitmaps)
    assert chunks is not None
    place = ctypes.c_int32()
    code = low.mtmd_helper_eval_chunks(projector, context.handle, chunks, 0, 0, 512, True, ctypes.byref(place))
    assert code == 0
    tokens: list[int] = []
    while True:
        tokens.append(int(context.logits(1)[0].argmax()))
        if len(tokens) == length:
            break
        context.batch.clear()
        context.batch.add(0, place.value + len(tokens) - 1, tokens[-1])
        assert context.batch.decode(context.handle) == 0
    mtmd.chunks_free(chunks)
    for bitmap in bitmaps:
        mtmd.bitmap_free(bitmap)
    context.free()
    mtmd.projector_free(projector)
    model.free()
    return tokens


@pytest.mark.parametrize("eye", ["mmproj", "gemma3-eye", WIDE])
@pytest.mark.parametrize("images", [[RED], [RED, BLUE], [png((9, 200, 9), 90, 30), RED]])
def test_the_answer_is_what_llama_cpp_comes_to(eye: str, images: list[bytes]) -> None:
    expected = by_hand(eye, images, "what is this?", 16)
    with seeing(eye) as engine:
        assert alone(engine, show(*images), length=16) == expected
        assert run(engine, show(*images), length=16).tokens == expected
        assert run(engine, show(*images), length=16).tokens == expected, "from the cache"


# --- two-dimensional positions ---


def test_an_image_may_have_fewer_positions_than_tokens() -> None:
    with seeing(WIDE) as engine:
        wide, tall = (run(engine, show(png((1, 2, 3), *size))) for size in ((96, 32), (32, 96)))
    assert usage(wide)[0] == usage(tall)[0]
    assert wide.tokens != tall.tokens


@pytest.mark.parametrize(
    "options", [{}, {"n_batch": 8, "n_ubatch": 8}, {"n_ctx": 256, "n_parallel": 3, "cache_ram": 0}]
)
def test_with_such_positions_too_all_get_what_each_gets_alone(options: dict[str, Any]) -> None:
    chats = (show(png((200, 0, 0), 96, 32)), SAY, show(BLUE, png((0, 99, 0), 32, 64)), show(RED, text="and this?"))
    with seeing(WIDE, **options) as engine:
        expected = [alone(engine, chat, length=60) for chat in chats]
        for number, chat in enumerate(chats):
            engine.submit(request(number, chat, length=60))
        got = drain(engine)
        again = [run(engine, chat, length=60).tokens for chat in chats]
    assert [got[number].tokens for number in range(len(chats))] == expected
    assert again == expected


def test_with_such_positions_too_a_prefix_is_shared_and_cut_where_it_may_be() -> None:
    first = png((200, 0, 0), 96, 32)
    more = (*show(first), {"role": "assistant", "content": "a"}, {"role": "user", "content": "sure?"})
    with seeing(WIDE) as engine:
        expected = [alone(engine, chat) for chat in (more, show(first, BLUE), show(first, text="else?"))]
        total = usage(run(engine, show(first)))[0]
        got = [run(engine, chat) for chat in (more, show(first, BLUE), show(first, text="else?"))]
    assert [one.tokens for one in got] == expected
    assert usage(got[0])[1] >= total - 12
    assert all(12 < usage(one)[1] < total for one in got[1:])


@pytest.mark.parametrize("steps", range(1, 14, 2))
def test_with_such_positions_too_a_cancelled_image_does_no_harm(steps: int) -> None:
    chat = show(png((steps, 0, 200), 96, 64))
    with seeing(WIDE, n_batch=8, n_ubatch=8) as engine:
        expected = alone(engine, chat)
        engine.submit(request(7, chat))
        for _ in range(steps):
            engine.step()
        engine.cancel(7)
        drain(engine)
        assert run(engine, chat).tokens == expected


# --- sounds ---


def play(*sounds: bytes) -> tuple[dict[str, Any], ...]:
    parts = [{"type": "input_audio", "input_audio": {"data": base64.b64encode(one).decode()}} for one in sounds]
    return ({"role": "user", "content": [*parts, {"type": "text", "text": "what is this?"}]},)


LOW, HIGH = wave(tone=200), wave(tone=2000)


def test_a_sound_changes_the_answer_and_is_shared_like_an_image() -> None:
    with seeing("ear", n_parallel=3) as engine:
        chats = (play(LOW), play(HIGH), SAY)
        expected = [alone(engine, chat) for chat in chats]
        for number, chat in enumerate(chats):
            engine.submit(request(number, chat))
        got = drain(engine)
        again = run(engine, play(LOW))
    assert [got[number].tokens for number in range(3)] == expected
    assert len({tuple(one) for one in expected}) == 3
    assert usage(again)[1] == usage(again)[0] - 1
    assert again.tokens == expected[0]


def test_a_projector_takes_what_it_is_for() -> None:
    engine = LlamaEngine()
    assert engine.load(load_with("ear"), lambda _: True).modalities == ("text", "audio")
    assert "takes no images" in str(refusal(engine, show(RED)))
    engine.unload()
    with seeing() as other:
        assert "takes no sounds" in str(refusal(other, play(LOW)))


@pytest.mark.parametrize(
    ("sound", "reason"),
    [
        (wave(samples=0), "damaged"),
        (wave(samples=1), "shorter than 1/10"),
        (wave(samples=1599), "shorter than 1/10"),
        (wave()[:60], "shorter than 1/10"),
        (b"\xff\xfb\x90\x64" + bytes(500), "damaged|shorter"),
    ],
    ids=["empty", "one sample", "too short", "cut", "mp3 of nothing"],
)
def test_sounds_of_nothing_are_refused(sound: bytes, reason: str) -> None:
    with seeing("ear") as engine:
        error = refusal(engine, play(sound))
        assert error.code == "invalid_media"
        assert re.search(reason, str(error))
        assert alone(engine, SAY)


# --- parts that see each other ---


def test_an_image_whose_parts_see_each_other_is_computed_at_once() -> None:
    chats = (show(RED), SAY, show(BLUE, GREEN))
    with seeing("gemma3-eye", n_parallel=3) as engine:
        expected = [alone(engine, chat, length=20) for chat in chats]
        for number, chat in enumerate(chats):
            engine.submit(request(number, chat, length=20))
        got = drain(engine)
        assert usage(run(engine, show(RED)))[1] > 16
        assert alone(engine, chats[1], length=20) == expected[1], "tokens see only what is before them, as ever"
    assert [got[number].tokens for number in range(3)] == expected


def test_it_does_not_depend_on_what_else_a_batch_could_hold() -> None:
    outputs: list[list[int]] = []
    for size in (16, 64):
        with seeing("gemma3-eye", n_batch=size, n_ubatch=size) as engine:
            outputs.append(alone(engine, show(RED)))
    assert outputs[0] == outputs[1]


def test_one_that_is_too_large_for_a_physical_batch_is_refused() -> None:
    with seeing("gemma3-eye", n_batch=64, n_ubatch=15) as engine:
        error = refusal(engine, show(RED))
        assert error.code == "media_too_large"
        assert "n_ubatch to 16" in str(error)
        assert alone(engine, SAY)


# --- the projector ---


def test_embeddings_are_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projector, "_KEPT_BYTES", 3 * 16 * 64 * 4)
    monkeypatch.setattr(projector, "_MOST_FILES", 2)
    images = [png((shade, 0, 0)) for shade in range(0, 250, 25)]
    with seeing() as engine:
        expected = [alone(engine, show(image)) for image in images]
        assert [alone(engine, show(image)) for image in reversed(images)] == expected[::-1]
        assert [run(engine, show(image)).tokens for image in images] == expected


def test_what_a_model_takes_in_is_reported() -> None:
    engine = LlamaEngine()
    assert engine.load(load_with(), lambda _: True).modalities == ("text", "image")
    engine.unload()
    assert engine.load(load_command("random"), lambda _: True).modalities == ("text",)
    engine.unload()


@pytest.mark.parametrize("other", ["random", "lora", "bert"])
def test_a_file_that_is_no_projector_fails_the_load(other: str) -> None:
    engine = LlamaEngine()
    with pytest.raises(EngineError, match="cannot be loaded") as caught:
        engine.load(load_with(other), lambda _: True)
    assert caught.value.code == "projector_invalid"
    engine.load(load_with(), lambda _: True)
    engine.unload()


def test_a_projector_of_another_model_or_a_damaged_one_fails_the_load(tmp_path: Any) -> None:
    wrong, cut = tmp_path / "wrong.gguf", tmp_path / "cut.gguf"
    write_mmproj(wrong, output=32)
    cut.write_bytes(tiny_model("mmproj").read_bytes()[:-5000])
    for path, reason in ((wrong, "mismatch"), (cut, "cannot be loaded"), (tmp_path / "gone", "does not exist")):
        command = msgspec.structs.replace(load_command("random"), mmproj=str(path))
        with pytest.raises(EngineError, match=reason):
            LlamaEngine().load(command, lambda _: True)


def test_loading_and_unloading_leaves_nothing_behind() -> None:
    outputs: list[list[int]] = []
    engine = LlamaEngine()
    for _ in range(3):
        engine.load(load_with(), lambda _: True)
        outputs.append(alone(engine, show(RED)))
        engine.unload()
    assert outputs[0] == outputs[1] == outputs[2]


# --- what is refused ---


def refusal(engine: LlamaEngine, messages: Sequence[dict[str, Any]], **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        engine.submit(request(1, messages, **fields))
    assert not engine.busy
    return caught.value


def test_a_model_without_a_projector_says_so() -> None:
    engine = LlamaEngine()
    engine.load(load_command("random"), lambda _: True)
    error = refusal(engine, show(RED))
    engine.unload()
    assert error.code == "unsupported_content"
    assert "mmproj" in str(error)


def test_what_cannot_be_shown_is_its_callers_error() -> None:
    with seeing() as engine:
        expected = alone(engine, show(RED))
        assert "damaged" in str(refusal(engine, show(RED[:60])))
        assert "no format" in str(refusal(engine, show(b"not a picture")))
        sound = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
        assert "format" in str(refusal(engine, [{"role": "user", "content": [sound]}]))
        assert refusal(engine, show(*[RED] * 33)).code == "invalid_media"
        assert refusal(engine, show(RED, text="x" * 5000)).code == "context_length_exceeded"
        assert alone(engine, show(RED)) == expected


def test_a_text_cannot_pass_for_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(count: int) -> str:
        return "0" * 2 * count

    monkeypatch.setattr("secrets.token_hex", zeros)
    marker = f"<__media_{'0' * 32}__>"
    with seeing() as engine:
        for text in ("<__media__>", "<image>"):
            assert usage(run(engine, show(RED, text=text)))[0] > 16
        assert refusal(engine, show(RED, text=f"look: {marker}")).code == "template_failed"
        words = usage(run(engine, ({"role": "user", "content": f"look: {marker}"},)))[0]
        assert words > len(marker), "the marker was spelled"


def test_images_rule_out_context_shifts() -> None:
    with seeing(n_ctx=256, context_shift=True, n_parallel=1) as engine:
        got = run(engine, show(RED), length=-1)
    assert got.reason == "length"
    assert usage(got)[0] + len(got.tokens) == 256
