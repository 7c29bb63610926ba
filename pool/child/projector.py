"""A projector: turns images and sounds into embeddings that a model reads in the place of tokens.

In a prompt, each position of such a *chunk* has a negative id in the place of a token. The id stands for the file and
for the chunk's place in it, so equal prompts have equal ids, and nothing but the same file has the same ones. Ids are
made up as files come, and mean nothing outside of this process.
"""

import secrets
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from llamaherd.pool.child import llama_context, llama_log, mtmd
from llamaherd.pool.child.devices import on_device
from llamaherd.pool.child.engine import EngineError, RequestError
from llamaherd.pool.child.media import Media
from llamaherd.pool.child.model import Model, check_file
from llamaherd.pool.child.refusal import refusal
from llamaherd.transport.messages import EngineOptions

__all__ = ["Chunk", "MediaPrompt", "Projector"]

Rows = npt.NDArray[np.float32]

_FLASH_ATTENTION: Final = {"auto": -1, "off": 0, "on": 1}
#: Files whose ids are remembered. A forgotten one gets another id, and is computed anew.
_MOST_FILES: Final = 4096
#: Bytes of embeddings that are kept for a file that comes again.
_KEPT_BYTES: Final = 128 * 1024 * 1024
#: The shortest sound is this part of a second.
_SHORTEST: Final = 10


class Chunk:
    """A stretch of a prompt that is not of tokens.

    Attributes:
        start, end: Its positions in the prompt.
        id: What stands there instead of tokens.
        whole: Its parts see each other, so it must be computed at once.
        folded: How many fewer positions than tokens it takes in the model's eyes.
        rows: Its embeddings, from when they are computed until the model has read them.
    """

    def __init__(self, handle: int, start: int, number: int, *, whole: bool, mrope: bool) -> None:
        length = mtmd.chunk_n_tokens(handle)
        self.handle: Final = handle
        self.start: Final = start
        self.end: Final = start + length
        self.id: Final = number
        self.whole: Final = whole
        self.folded: Final = length - mtmd.chunk_n_positions(handle)
        self.rows: Rows | None = None
        self._mrope: Final = mrope

    def __repr__(self) -> str:
        return f"<Chunk {self.id} at {self.start}..{self.end}>"

    def positions(self, first: int) -> npt.NDArray[np.int32]:
        """Return where its tokens stand if the chunk begins at position ``first``: one row, or four with M-RoPE."""
        line = np.arange(first, first + self.end - self.start, dtype=np.int32)
        if not self._mrope:
            return line[np.newaxis]
        places = mtmd.chunk_positions(self.handle, first)
        return np.tile(line, (4, 1)) if places is None else np.array(places, np.int32).T


class MediaPrompt:
    """A prompt with chunks in it. Free it when nothing of it is computed any more."""

    def __init__(self, handle: int, tokens: list[int], chunks: tuple[Chunk, ...]) -> None:
        self.tokens: Final = tokens
        self.chunks: Final = chunks
        self._handle = handle

    def free(self) -> None:
        """Release the prepared files. Idempotent."""
        if self._handle:
            mtmd.chunks_free(self._handle)
            self._handle = 0


class Projector:
    """The projector of a model. Free it before the model.

    Args:
        n_threads: Threads that it computes with; llama.cpp cannot change them later.

    Raises:
        EngineError: the file is missing, is no projector, fits another model, or is of a kind that is not served.
    """

    def __init__(self, path: str, model: Model, options: EngineOptions, n_threads: int) -> None:
        check_file(path)
        llama_log.forget_log()
        #: Stands in a rendered prompt for each file. Nobody can guess it, so nobody's text holds it.
        self.marker: Final = f"<__media_{secrets.token_hex(16)}__>"
        settings = mtmd.ProjectorSettings(
            marker=self.marker.encode(),
            use_gpu=options.mmproj_offload and on_device(options),
            n_threads=n_threads,
            flash_attn_type=_FLASH_ATTENTION[options.flash_attn],
            image_min_tokens=options.image_min_tokens,
            image_max_tokens=options.image_max_tokens,
        )
        handle = mtmd.projector_load(path.encode("utf-8", "surrogateescape"), model.handle, settings)
        if handle is None:
            why = refusal("projector_invalid")
            raise EngineError(f"projector {path} cannot be loaded: {why.reason}", code=why.code)
        self._handle = handle
        self._width: Final = model.n_embd
        self.vision: Final = mtmd.supports_vision(handle)
        self.audio: Final = mtmd.supports_audio(handle)
        self._ids: Final[OrderedDict[tuple[bytes, int, int], int]] = OrderedDict()
        self._next_id = -1
        self._kept: Final[OrderedDict[int, Rows]] = OrderedDict()
        self._kept_bytes = 0
        self._mrope: Final = mtmd.uses_mrope(handle)
        if self._mrope and model.window:
            self.free()
            raise EngineError(
                f"projector {path} gives images two-dimensional positions (M-RoPE), and the model has a sliding "
                "window; this engine cannot serve both together",
                code="projector_unsupported",
            )

    def read(self, text: str, media: Sequence[Media]) -> MediaPrompt:
        """Return the prompt of a rendered text, in which each marker stands for the next file.

        Raises:
            RequestError: the projector does not take such files, one is damaged, or the template lost one.
        """
        for one in media:
            if not (self.vision if one.kind == "image" else self.audio):
                sort = "images" if one.kind == "image" else "sounds"
                raise RequestError(f"this model takes no {sort}", code="unsupported_content")
        markers = text.count(self.marker)
        if markers != len(media):
            raise RequestError(
                f"the chat template made {markers} places for {len(media)} images and sounds", code="template_failed"
            )
        bitmaps: list[int] = []
        try:
            for one in media:
                bitmaps.append(self._decode(one))
            llama_log.forget_log()
            handle = mtmd.tokenize(self._handle, text.encode("utf-8", "replace"), bitmaps)
        finally:
            for bitmap in bitmaps:
                mtmd.bitmap_free(bitmap)
        if handle is None:
            reason = llama_log.error_lines() or "llama.cpp gave no reason"
            raise RequestError(f"an image or sound cannot be prepared: {reason}", code="invalid_media")
        try:
            return self._prompt(handle)
        except BaseException:
            mtmd.chunks_free(handle)
            raise

    def _decode(self, media: Media) -> int:
        bitmap = mtmd.bitmap_load(self._handle, media.data)
        if bitmap is None:
            raise RequestError(f"an {media.kind} file is damaged", code="invalid_media")
        # Of a single sample llama.cpp aborts the process.
        if media.kind == "audio" and mtmd.bitmap_n_x(bitmap) * _SHORTEST < mtmd.sample_rate(self._handle):
            mtmd.bitmap_free(bitmap)
            raise RequestError(f"a sound is shorter than 1/{_SHORTEST} of a second", code="invalid_media")
        return bitmap

    def _prompt(self, handle: int) -> MediaPrompt:
        tokens: list[int] = []
        chunks: list[Chunk] = []
        seen: Counter[bytes] = Counter()
        for chunk in mtmd.chunks(handle):
            if mtmd.chunk_is_text(chunk):
                tokens += mtmd.chunk_text_tokens(chunk)
                continue
            file, length = mtmd.chunk_file(chunk), mtmd.chunk_n_tokens(chunk)
            # A large image becomes several chunks.
            number = self._id((file, seen[file], length))
            seen[file] += 1
            whole = mtmd.non_causal(self._handle, chunk)
            chunks.append(Chunk(chunk, len(tokens), number, whole=whole, mrope=self._mrope))
            tokens += [number] * length
        return MediaPrompt(handle, tokens, tuple(chunks))

    def _id(self, key: tuple[bytes, int, int]) -> int:
        number = self._ids.pop(key, 0)
        if not number:
            number = self._next_id
            self._next_id -= 1
        self._ids[key] = number
        if len(self._ids) > _MOST_FILES:
            self._ids.popitem(last=False)
        return number

    # --- embeddings ---

    def encode(self, chunk: Chunk) -> bool:
        """Compute the rows of a chunk, or find them; False on failure. This may take seconds, and nothing ends it."""
        rows = self._kept.pop(chunk.id, None)
        if rows is None:
            rows = self._computed(chunk)
            if rows is None:
                return False
            self._kept_bytes += rows.nbytes
        self._kept[chunk.id] = chunk.rows = rows
        while self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return True

    def _computed(self, chunk: Chunk) -> Rows | None:
        llama_log.forget_log()
        if not mtmd.encode(self._handle, chunk.handle):
            return None
        address = mtmd.output(self._handle)
        if address is None:
            return None
        return llama_context.float_rows(address, chunk.end - chunk.start, self._width).copy()

    def free(self) -> None:
        """Release the memory. Idempotent."""
        if self._handle:
            mtmd.projector_free(self._handle)
            self._handle = 0
        self._kept.clear()
