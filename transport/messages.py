"""Every message that crosses the process boundary, and the one codec for all transports.

A message is a *kind* (a short ASCII word) and a JSON body. ``state`` and ``exit`` are llama.cpp's own (its router and
its children speak them over stdio); the rest is ours. Each transport frames the pair in its own way; none of them
changes the JSON.

The module is imported by the worker before anything heavy, so it imports msgspec and nothing else.
"""

from typing import Any, Final, Literal, TypeAlias, cast

import msgspec

__all__ = [
    "CHILD_KINDS",
    "MAX_MESSAGE_BYTES",
    "POOL_KINDS",
    "Adapter",
    "CallDelta",
    "CacheType",
    "Cancel",
    "ChatOptions",
    "ChildMessage",
    "Delta",
    "Detokenize",
    "Done",
    "Download",
    "Embed",
    "EngineLoad",
    "EngineOptions",
    "Exit",
    "Failed",
    "Fault",
    "FinishReason",
    "Generate",
    "Infill",
    "InfillFile",
    "GrammarTrigger",
    "Load",
    "Lora",
    "Message",
    "PoolMessage",
    "Pooling",
    "Prefetch",
    "Prompt",
    "Rerank",
    "PromptProgress",
    "Result",
    "Sampling",
    "Sequence",
    "Sleep",
    "SlotFile",
    "SlotState",
    "Slots",
    "State",
    "StateName",
    "Stats",
    "Template",
    "Threads",
    "Timings",
    "TokenProb",
    "TokenProbs",
    "Tokenize",
    "Tokens",
    "TypedDelta",
    "Unknown",
    "Unload",
    "Usage",
    "Vector",
    "Vectors",
    "Wake",
    "decode",
    "encode",
    "kind_of",
]

#: Largest encoded body that any transport carries, in bytes. Images and long prompts fit; a runaway peer does not.
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "cancelled"]
StateName: TypeAlias = Literal["loading", "ready", "sleeping", "downloading", "prefetched", "unloaded"]
Fault: TypeAlias = Literal["caller", "model", "worker"]
CacheType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
#: How the embeddings of an input's tokens become one; ``rank`` gives a score instead, and the empty word is the model's
#: own.
Pooling: TypeAlias = Literal["", "none", "mean", "cls", "last", "rank"]
#: A text; or token ids that are taken as they are, with texts between them.
Prompt: TypeAlias = str | tuple[int | str, ...]


class _Struct(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Shared configuration: immutable, keyword-only; unknown fields of a newer peer are ignored."""


# --- shapes inside messages -------------------------------------------------------------------------------------------


class Adapter(_Struct, frozen=True, kw_only=True):
    """A LoRA adapter of a model: its GGUF file, and the factor that it is applied with where a request names none."""

    path: str
    scale: float = 1.0


class EngineOptions(_Struct, frozen=True, kw_only=True):
    """How an engine loads a model. Names and defaults follow llama-server; ``0`` or ``-1`` mean "decide from the
    model".

    Attributes:
        n_ctx: Context cells of all slots together, in tokens; 0 takes the model's training length.
        n_batch: Most tokens in one decode call.
        n_ubatch: Most tokens in one physical batch.
        n_parallel: Slots, that is sequences decoded together.
        n_cached: Finished sequences that may stay in the context for requests that begin alike; -1 means three per
            slot, or one per slot where each costs memory of its own (recurrent models), or without ``kv_unified``
            none but those in idle slots.
        n_threads: Threads for one-token steps; 0 means the cores available to the worker.
        n_threads_batch: Threads for prompt processing; 0 means ``n_threads``.
        n_gpu_layers: Layers offloaded to a GPU; -1 means all (no effect in a CPU build), 0 none.
        devices: The only GPUs that take layers, by llama.cpp's names such as ``CUDA0``, in their order; all for ``()``,
            none for ``("none",)``.
        split_mode: How a model is divided among several: ``layer`` gives each some layers, ``row`` each some rows of
            every matrix (CUDA's backend cannot, as of this version), ``none`` has it all on ``main_gpu``.
        main_gpu: The place in that order of the GPU that has it all with ``none``, and what is small with ``row``.
        tensor_split: What part each GPU gets, in proportions; ``()`` leaves it to their free memory.
        use_mmap: Map the file instead of reading it.
        flash_attn: ``auto``, ``on`` or ``off``.
        kv_unified: One cache of ``n_ctx`` cells, all of which any sequence may use, and which sequences that begin
            alike share. Off, each has its part of the cells for itself, and a common beginning is copied, unless it
            is a small part of what comes with it, or its end has left a sliding window; llama.cpp then goes over nobody
            else's cells for a token, which tells where many long sequences run at once.
        swa_full: Keep what has left the window of a sliding-window model: more memory, and any prefix can be reused,
            except of copies.
        cache_type_k, cache_type_v: Element types of the KV cache. Quantised values need flash attention.
        cache_ram: MiB of RAM for the states of sequences that had to leave the KV cache, which come back from there
            instead of being computed again; -1 sets no limit, 0 is off.
        context_shift: A generation whose context is full drops the older half of what follows its first ``n_keep``
            tokens and goes on; off, it ends. Not for models that llama.cpp cannot shift.
        n_keep: Tokens at the beginning of the prompt that a context shift keeps, for requests that do not say; -1 is
            the whole prompt.
        rope_scaling: ``none``, ``linear`` or ``yarn``; empty leaves it to the model. Of the ``rope_*`` and ``yarn_*``
            numbers 0, and -1 of the four factors, mean what the model says.
        embedding: Serve embeddings and scores only, and allocate no cache for generations.
        pooling: How the embeddings of tokens become one.
        embd_normalize: How embeddings are normalised for requests that do not say; see :class:`Embed`.
        spm_infill: Put what is after a gap ahead of what is before it, as some models want it.
        slot_save_path: Folder of the files that slots are saved to; empty means that they cannot be saved.
        chat_template: Jinja source that replaces the model's own; empty keeps the model's.
        template_kwargs: Variables for the template, of requests that do not set them themselves.
        reasoning_format: As in :class:`ChatOptions`, of requests that do not say.
        reasoning_budget, reasoning_budget_message: As in :class:`ChatOptions`, of requests that do not say.
        prefill_assistant: An assistant's message at the end of a conversation is continued, if a request does not say.
        adapters: LoRA adapters; their places here are their ids.
        mmproj_offload: Whether a projector's layers go to a GPU too.
        image_min_tokens, image_max_tokens: Bounds for an image, where the model takes images of any size; -1 is the
            model's own.
    """

    n_ctx: int = 4096
    n_batch: int = 2048
    n_ubatch: int = 512
    n_parallel: int = 4
    n_cached: int = -1
    n_threads: int = 0
    n_threads_batch: int = 0
    n_gpu_layers: int = -1
    devices: tuple[str, ...] = ()
    split_mode: Literal["none", "layer", "row"] = "layer"
    main_gpu: int = 0
    tensor_split: tuple[float, ...] = ()
    use_mmap: bool = True
    flash_attn: Literal["auto", "on", "off"] = "auto"
    kv_unified: bool = True
    swa_full: bool = True
    cache_type_k: CacheType = "f16"
    cache_type_v: CacheType = "f16"
    cache_ram: int = 1024
    context_shift: bool = False
    n_keep: int = 0
    rope_scaling: Literal["", "none", "linear", "yarn"] = ""
    rope_freq_base: float = 0.0
    rope_freq_scale: float = 0.0
    yarn_orig_ctx: int = 0
    yarn_ext_factor: float = -1.0
    yarn_attn_factor: float = -1.0
    yarn_beta_slow: float = -1.0
    yarn_beta_fast: float = -1.0
    embedding: bool = False
    pooling: Pooling = ""
    embd_normalize: int = 2
    spm_infill: bool = False
    slot_save_path: str = ""
    chat_template: str = ""
    template_kwargs: dict[str, Any] = {}
    reasoning_format: Literal["auto", "none", "deepseek"] = "auto"
    reasoning_budget: int = -1
    reasoning_budget_message: str = ""
    prefill_assistant: bool = True
    adapters: tuple[Adapter, ...] = ()
    mmproj_offload: bool = True
    image_min_tokens: int = -1
    image_max_tokens: int = -1


class Sampling(_Struct, frozen=True, kw_only=True):
    """How the next token is chosen. Names and defaults are llama-server's.

    Attributes:
        temperature: 0 or less is greedy.
        dynatemp_range: The temperature moves by so much up and down with the entropy; 0 is off.
        top_k: The most likely so many; 0 or less is off.
        top_p: The most likely with this much probability together; 1 is off.
        min_p: Those at least so likely relative to the most likely; 0 is off.
        typical_p: Locally typical sampling; 1 is off.
        top_n_sigma: Those within so many standard deviations of the best logit; 0 or less is off.
        xtc_probability, xtc_threshold: How often all but the least of those above the threshold are dropped; 0 is off.
        min_keep: Fewest tokens that the samplers leave.
        repeat_last_n: Tokens that the penalties look back on; 0 is off, -1 the whole context.
        repeat_penalty: 1 is off.
        presence_penalty, frequency_penalty: 0 is off.
        dry_multiplier: Penalty for what extends a repetition of more than ``dry_allowed_length`` tokens, times
            ``dry_base`` for each further one; 0 is off. ``dry_penalty_last_n`` as ``repeat_last_n``.
        dry_sequence_breakers: Texts that no repetition is followed across.
        mirostat: 1 or 2 replaces all ``samplers`` but the temperature; 0 is off.
        adaptive_target: For the sampler ``adaptive_p``: the probability to choose near; negative is off.
        samplers: Which are used, in which order.
        logit_bias: ``(token id or text, bias)``; a text means each of its tokens, a bias of None never to be chosen.
        n_probs: So many most likely tokens are told with each token, before any sampler; 0 tells nothing.
        post_sampling_probs: Tell them as the samplers have left them instead.
        seed: 0 to 2**32 - 1; 4294967295 draws a random seed.
    """

    temperature: float = 0.8
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    min_keep: int = 0
    repeat_last_n: int = 64
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    adaptive_target: float = -1.0
    adaptive_decay: float = 0.9
    samplers: tuple[str, ...] = (
        "penalties",
        "dry",
        "top_n_sigma",
        "top_k",
        "typ_p",
        "top_p",
        "min_p",
        "xtc",
        "temperature",
    )
    logit_bias: tuple[tuple[int | str, float | None], ...] = ()
    n_probs: int = 0
    post_sampling_probs: bool = False
    seed: int = 0xFFFFFFFF


class ChatOptions(_Struct, frozen=True, kw_only=True):
    """How a conversation is put to the model, and its answer is read.

    Attributes:
        tools: OpenAI's ``function`` tools.
        tool_choice: Whether the model may, must or must not call one.
        tool_names: The only functions that may be called; empty for all of them.
        parallel_tool_calls: Whether one answer may hold several calls; None does as the template can.
        reasoning_format: ``none`` leaves reasoning in the content, ``auto`` and ``deepseek`` tell it apart; empty does
            as the model's options say.
        reasoning_budget: Most tokens of reasoning, which is then ended for the model; 0 ends it at once, -1 does as the
            model's options say, and there sets no limit.
        reasoning_budget_message: What the reasoning ends with then; None does as the model's options say.
        add_generation_prompt: Open the assistant's turn at the end of the prompt.
        continuation: Which part of the last message, an assistant's, the answer continues; ``auto`` is its content,
            unless it has reasoning alone, and ``prefill`` the same, unless the model's options forbid it.
    """

    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: Literal["auto", "none", "required"] = "auto"
    tool_names: tuple[str, ...] = ()
    parallel_tool_calls: bool | None = None
    reasoning_format: Literal["", "auto", "none", "deepseek"] = ""
    reasoning_budget: int = -1
    reasoning_budget_message: str | None = None
    add_generation_prompt: bool = True
    continuation: Literal["", "prefill", "auto", "content", "reasoning"] = ""


class GrammarTrigger(_Struct, frozen=True, kw_only=True):
    """When a grammar begins to hold. Until then the model may say anything; the word itself must fit the grammar.

    Attributes:
        words: Texts that begin it wherever they come.
        leading: Texts that begin it only where nothing but space came before.
        after: Texts behind which it begins: they and space that follows are no part of it, like the end of reasoning.
    """

    words: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


class Usage(_Struct, frozen=True, kw_only=True):
    """Token counts of one finished request; ``cached_tokens`` of the prompt were not computed again."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Timings(_Struct, frozen=True, kw_only=True):
    """Where the time of one request went inside the worker, in milliseconds."""

    queue_ms: float = 0.0
    prompt_ms: float = 0.0
    predicted_ms: float = 0.0


class TokenProb(msgspec.Struct, frozen=True, array_like=True):
    """How likely one token was.

    Attributes:
        token: Its id.
        logprob: Natural logarithm of its probability; -9999 stands for anything less.
        piece: Its bytes, which alone need not be whole characters.
    """

    token: int
    logprob: float
    piece: bytes


class TokenProbs(msgspec.Struct, frozen=True, array_like=True):
    """The token that was chosen, and the most likely ones, best first; see :class:`Sampling` for what is told."""

    chosen: TokenProb
    top: tuple[TokenProb, ...] = ()


class SlotState(_Struct, frozen=True, kw_only=True):
    """One of the places where a model's requests run, and the request that runs there or did last.

    Attributes:
        n_ctx: Most tokens of one request.
        busy: Whether a request runs.
        request: Its number; None before the first one.
        n_tokens: Tokens in the cache: computed ones of a running request, those that were kept of a finished one.
        n_prompt: Tokens of its prompt; ``n_cached`` of them were found in the cache, ``n_processed`` computed so far.
        n_decoded: Tokens generated.
        n_remaining: Tokens that it may still generate; -1 sets no limit.
        new_line: Whether the answer has a line break.
        sampling, max_tokens, n_keep, n_discard, ignore_eos: What it asked for.
    """

    id: int
    n_ctx: int
    busy: bool = False
    request: int | None = None
    n_tokens: int = 0
    n_prompt: int = 0
    n_cached: int = 0
    n_processed: int = 0
    n_decoded: int = 0
    n_remaining: int = -1
    new_line: bool = False
    sampling: Sampling = Sampling()
    max_tokens: int = -1
    n_keep: int = 0
    n_discard: int = 0
    ignore_eos: bool = False


class SlotFile(_Struct, frozen=True, kw_only=True):
    """What came of saving, restoring or erasing a slot.

    Attributes:
        n_tokens: Tokens that were saved, restored or erased.
        n_bytes: Size of the file; 0 for an erasure.
        ms: How long it took.
    """

    slot: int
    name: str = ""
    n_tokens: int = 0
    n_bytes: int = 0
    ms: float = 0.0


class PromptProgress(msgspec.Struct, frozen=True, array_like=True):
    """How far the prompt of one request is.

    Attributes:
        request: The request's number.
        total: Tokens of the prompt.
        cache: Those of them that were found in the cache.
        processed: Those of them that are done, the found ones included.
        time_ms: Since the request got its slot.
    """

    request: int
    total: int
    cache: int
    processed: int
    time_ms: float


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What one sequence gained in one decode step.

    Attributes:
        request: The request's number.
        text: Complete UTF-8 characters only; may be empty while a character or a stop string is pending.
        tokens: Ids of the tokens sampled since the request's last delta.
        probs: One entry per token, if ``n_probs`` asked for them.
    """

    request: int
    text: str
    tokens: tuple[int, ...] = ()
    probs: tuple[TokenProbs, ...] = ()


class Vector(msgspec.Struct, frozen=True, array_like=True):
    """A part of what one input became: its embedding, the embeddings of some of its tokens, or its scores.

    Attributes:
        request: The request's number.
        input: The input's place in the request.
        row: The first of its tokens that this is about; 0 with pooling.
        rows: How many rows of equal length there are; 1 with pooling.
        data: 32-bit floats, little-endian, row by row. JSON has them as base64, which costs a tenth of numbers.
    """

    request: int
    input: int
    row: int
    rows: int
    data: bytes


class CallDelta(msgspec.Struct, frozen=True, array_like=True):
    """What a tool call gained.

    Attributes:
        index: The call's place among those of the answer, from 0.
        arguments: Further text of its arguments, which are JSON in the end.
        id, name: Only in the first delta of a call.
    """

    index: int
    arguments: str = ""
    id: str = ""
    name: str = ""


class TypedDelta(Delta, frozen=True, array_like=True):
    """A delta that brings more than text.

    Attributes:
        reasoning: Reasoning, which comes before the text.
        calls: Tool calls, which come after it.
        usage, timings: How many tokens and how much time it has taken so far, where that was asked for.
    """

    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    usage: Usage | None = None
    timings: Timings | None = None


class EngineLoad(_Struct, frozen=True, kw_only=True):
    """How busy a model is, and what it has done since it was loaded.

    Attributes:
        slots_busy: Slots with a running request.
        waiting: Requests that the worker has and that have no slot.
        cells_used, cells: Cells of the KV cache that are held, and all of them.
        cached: Finished sequences in the KV cache.
        stored, stored_bytes: Finished sequences in RAM, and the bytes of all states there.
        decodes: Decode calls.
        decoded: Tokens that they computed.
        slots_decoded: Sum over the decode calls of the slots that were busy in each.
        longest: Most tokens that one request ever had.
    """

    slots_busy: int = 0
    waiting: int = 0
    cells_used: int = 0
    cells: int = 0
    cached: int = 0
    stored: int = 0
    stored_bytes: int = 0
    decodes: int = 0
    decoded: int = 0
    slots_decoded: int = 0
    longest: int = 0


# --- child to pool ----------------------------------------------------------------------------------------------------


class State(_Struct, frozen=True, kw_only=True, omit_defaults=False):
    """``state``: what the worker is doing, in llama.cpp's words and two of ours (``prefetched``, ``unloaded``). An
    unknown ``state`` is for the receiver to ignore.

    Attributes:
        state: One of :data:`StateName`; a plain string here, because a newer peer may know more.
        payload: Progress while loading (``stages``, ``current``, ``value`` in 0..1), the model's facts when ready.
    """

    state: str
    payload: dict[str, Any] | None = None


class Tokens(_Struct, frozen=True, kw_only=True):
    """``tokens``: one decode step, with every sequence that moved in it.

    Attributes:
        deltas: Of sequences that gained text alone, or nothing yet.
        typed: Of the others. They are apart so that the many pay nothing for the few.
        progress: How far those prompts are that asked for it.
    """

    deltas: tuple[Delta, ...] = ()
    typed: tuple[TypedDelta, ...] = ()
    progress: tuple[PromptProgress, ...] = ()


class Vectors(_Struct, frozen=True, kw_only=True):
    """``vectors``: what one step computed for requests of embeddings and scores. A few MiB at most: a step that has
    more to tell says it in several.
    """

    vectors: tuple[Vector, ...]


class Done(_Struct, frozen=True, kw_only=True):
    """``done``: a generation ended in order; nothing more follows for this request.

    Attributes:
        truncated: The context was full: the answer ended there, or a context shift dropped a part of it.
        usage: Of a cancelled one the prompt's tokens are those that there are by then.
        slot: Where it ran; -1 if it never did.
    """

    request: int
    finish_reason: FinishReason
    usage: Usage = Usage()
    timings: Timings = Timings()
    stopping_word: str = ""
    truncated: bool = False
    slot: int = -1


class Result(_Struct, frozen=True, kw_only=True):
    """``result``: the answer to a request without a stream.

    One field is set: ``tokens`` for ``tokenize`` (and ``pieces`` if it asked for them), ``text`` for ``detokenize`` and
    ``template``, ``usage`` for ``embed`` and ``rerank``, whose vectors came before, ``slots`` for ``slots``, ``file``
    for ``sequence``.
    """

    request: int
    tokens: tuple[int, ...] | None = None
    text: str | None = None
    usage: Usage | None = None
    pieces: tuple[bytes, ...] | None = None
    slots: tuple[SlotState, ...] | None = None
    file: SlotFile | None = None


class Failed(_Struct, frozen=True, kw_only=True):
    """``failed``: a request, or with ``request`` None the load itself, came to nothing.

    Attributes:
        fault: Whose fault: the ``caller`` asked for something impossible, the ``model`` file or its settings are bad,
            or the ``worker`` could not.
        retry: Whether the same request may succeed later or elsewhere.
        code: A short stable word for programs, such as ``context_length_exceeded``.
        details: Figures that belong to the code, such as ``n_prompt_tokens`` and ``n_ctx``.
    """

    message: str
    fault: Fault = "worker"
    retry: bool = False
    code: str = ""
    request: int | None = None
    details: dict[str, int] = {}


class Stats(_Struct, frozen=True, kw_only=True):
    """``stats``: what the worker takes and does. Sent ahead of each ``ready``, and while it works when something has
    changed, at most once a second.

    Attributes:
        rss_bytes: Resident memory, mapped file pages included; 0 where unknown.
        load: What the engine does; None where it was not asked.
        gpu: Whether the process has any of a GPU, sent with ``rss_bytes``.
    """

    rss_bytes: int = 0
    load: EngineLoad | None = None
    gpu: bool = True


# --- pool to child ----------------------------------------------------------------------------------------------------


class Exit(_Struct, frozen=True, kw_only=True):
    """``exit``: leave now, in order. Carries no body."""


class Load(_Struct, frozen=True, kw_only=True):
    """``load``: the first command of a worker's life, and the one that may follow ``unload``; workers are spawned
    without a model.

    Attributes:
        mmproj: The projector for images and sounds; empty without one.
        engine: ``llama`` or ``fake``.
        script: The fake engine's script, as its module documents; ignored by others.
        cache_bytes: What the cache is expected to take; 0 where that is not known. A hint, and no limit.
    """

    model: str
    path: str = ""
    mmproj: str = ""
    engine: str = "llama"
    options: EngineOptions = EngineOptions()
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    script: dict[str, Any] = {}
    cache_bytes: int = 0


class Prefetch(_Struct, frozen=True, kw_only=True):
    """``prefetch``: load this model and say nothing of it, for a ``load`` that may follow. Of a worker without a model.

    Answered by the state ``prefetched``, whose payload has an ``error`` if it came to nothing; the worker is then as it
    was before. A ``load`` of the same is done at once; one of another model frees this one first.
    """

    load: Load


class Download(_Struct, frozen=True, kw_only=True):
    """``download``: the only command of a worker in download mode, which holds no model and answers with ``state``
    messages alone, as llama.cpp's children do.

    While it works: ``{"state": "downloading", "payload": {"url", "downloaded", "total"}}``, bytes of one file, at most
    every 100 ms for each. At the end the payload is ``{"result": "download_finished"}`` or ``{"result":
    "download_failed", "reason", "code", "retry", "retry_after"}``, where the latter four are ours. Before the first
    byte, ours too: ``{"plan": {url: total}}``.

    The token is no part of it: the worker finds it in its environment (``HF_TOKEN``), as the hub's own client does.

    Attributes:
        model: The name that the pool knows the download by.
        registry: Of Docker or OCI, such as ``docker.io``; empty for the Hugging Face hub.
        repo: ``user/repo``, or the path in the registry.
        tag: The quant; empty for the default one. Of a registry the tag, or the digest of a manifest.
        file: A file of the repository, instead of a quant.
        cache: The cache's folder.
        endpoint: The hub's address; empty for the environment's (``HF_ENDPOINT``). A registry always has one.
        offline: Look into the cache and nowhere else.
        mmproj: Whether a projector that goes with the model is fetched too.
        url: The address of a file to fetch instead of a repository's; ``repo`` and ``cache`` are empty then.
        target: Where that file goes. If it is a part of a split model, all parts go into its folder.
    """

    model: str
    repo: str
    cache: str
    tag: str = ""
    file: str = ""
    endpoint: str = ""
    offline: bool = False
    mmproj: bool = True
    registry: str = ""
    url: str = ""
    target: str = ""


class Sleep(_Struct, frozen=True, kw_only=True):
    """``sleep``: free model and context, keep the process. Refused (logged) while a request runs."""


class Wake(_Struct, frozen=True, kw_only=True):
    """``wake``: load again what ``load`` named."""


class Unload(_Struct, frozen=True, kw_only=True):
    """``unload``: free model and context, and be as before the first ``load``, for another that may follow at once.
    What runs comes first. Answered by the state ``unloaded``, also where nothing was loaded.
    """


class InfillFile(_Struct, frozen=True, kw_only=True):
    """Another file of the project in which there is something to fill in."""

    filename: str
    text: str


class Infill(_Struct, frozen=True, kw_only=True):
    """A text with a gap.

    Attributes:
        prefix, suffix: What is before and after it.
        prompt: The beginning of what is to fill it.
        extra: Further files, for context.
    """

    prefix: str
    suffix: str
    prompt: str = ""
    extra: tuple[InfillFile, ...] = ()


class Generate(_Struct, frozen=True, kw_only=True):
    """``generate``: start one generation. Exactly one of ``prompt``, ``messages`` and ``infill`` is set.

    Attributes:
        request: A number unique within the worker's life; every answer carries it.
        prompt: Text, or token ids taken as they are, with texts between them.
        messages: OpenAI chat messages, rendered with the model's template inside the worker.
        infill: A text with a gap, put together with the model's own tokens for that.
        template_kwargs: Extra variables for the template.
        chat: Tools, reasoning and the like; for ``messages`` alone.
        insisted: Fields of ``sampling`` that were asked for, though they are as usual: what the model's file recommends
            takes the place of the others that are as usual.
        max_tokens: Most tokens to generate; -1 means until the context is full.
        stop: Texts that end the generation and are not part of its output.
        cache_prompt: Whether computed prefixes may be reused.
        ignore_eos: Never choose an end-of-generation token.
        lora: ``(adapter's id, scale)``; adapters that are not named are off. Empty takes the defaults.
        n_keep: Tokens that a context shift keeps at the beginning; -1 is the whole prompt, None the model's option.
        n_discard: Tokens that a context shift drops; 0 is half of what is not kept.
        grammar: GBNF that the output must follow, beginning at ``root``; empty for none.
        json_schema: JSON Schema, as JSON text, that the output must follow instead; empty for none.
        trigger: What the grammar or schema waits for; None: it holds from the first token on.
        slot: The slot to run in, for which it waits; -1 is any.
        progress: Whether to tell how far the prompt is.
        timed: Whether to tell counts and times with every token.
        n_indent: Blanks that every line but the first must begin with, or the answer ends before it; 0 is off.
        t_max_predict_ms: A line break ends the answer when so many milliseconds have passed since its first token; 0
            and less is off.
        whole: Nobody reads the answer before its end: after the first delta, further ones may come late, as one.
    """

    request: int
    prompt: Prompt | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    infill: Infill | None = None
    template_kwargs: dict[str, Any] = {}
    chat: ChatOptions | None = None
    sampling: Sampling = Sampling()
    insisted: tuple[str, ...] = ()
    max_tokens: int = -1
    stop: tuple[str, ...] = ()
    cache_prompt: bool = True
    ignore_eos: bool = False
    lora: tuple[tuple[int, float], ...] = ()
    n_keep: int | None = None
    n_discard: int = 0
    grammar: str = ""
    json_schema: str = ""
    trigger: GrammarTrigger | None = None
    slot: int = -1
    progress: bool = False
    timed: bool = False
    n_indent: int = 0
    t_max_predict_ms: int = 0
    whole: bool = False


class Embed(_Struct, frozen=True, kw_only=True):
    """``embed``: turn inputs into vectors; answered by ``vectors``, and ``result`` at the end.

    Attributes:
        normalize: -1 leaves vectors as they are, 0 scales their largest component to 32760, and any other p makes
            their p-norm 1; None is the model's option. Embeddings of single tokens (pooling ``none``) stay as they are.
        dimensions: Keep only so many components, and normalise those; 0 keeps all.
        pooled: Refuse a model whose pooling gives several vectors per input.
    """

    request: int
    inputs: tuple[Prompt, ...]
    normalize: int | None = None
    dimensions: int = 0
    pooled: bool = False


class Rerank(_Struct, frozen=True, kw_only=True):
    """``rerank``: score how well each document answers a query; answered as ``embed``, one float per document."""

    request: int
    query: str
    documents: tuple[str, ...]


class Tokenize(_Struct, frozen=True, kw_only=True):
    """``tokenize``: text to ids; answered by ``result``. ``add_special`` adds BOS/EOS, ``parse_special`` reads control
    tokens, ``pieces`` asks for the bytes of each token too.
    """

    request: int
    text: Prompt
    add_special: bool = False
    parse_special: bool = True
    pieces: bool = False


class Detokenize(_Struct, frozen=True, kw_only=True):
    """``detokenize``: ids to text; answered by ``result``."""

    request: int
    tokens: tuple[int, ...]


class Template(_Struct, frozen=True, kw_only=True):
    """``template``: render chat messages to the prompt text; answered by ``result``."""

    request: int
    messages: tuple[dict[str, Any], ...]
    template_kwargs: dict[str, Any] = {}
    chat: ChatOptions | None = None


class Slots(_Struct, frozen=True, kw_only=True):
    """``slots``: what runs where; answered by ``result``, between two steps."""

    request: int


class Sequence(_Struct, frozen=True, kw_only=True):
    """``sequence``: save what a slot has in the cache to a file, restore it from there, or erase it; answered by
    ``result`` once the slot has nothing to do.

    Attributes:
        name: Of the file, in the folder that the model's options name.
    """

    request: int
    action: Literal["save", "restore", "erase"]
    slot: int
    name: str = ""


class Cancel(_Struct, frozen=True, kw_only=True):
    """``cancel``: stop a request, or a ``sequence`` that waits. Answered by ``done`` with ``cancelled``, unless it had
    ended before.
    """

    request: int


class Threads(_Struct, frozen=True, kw_only=True):
    """``threads``: use so many threads from the next step on; ``batch`` 0 means the same for prompts."""

    n: int
    batch: int = 0


class Lora(_Struct, frozen=True, kw_only=True):
    """``lora``: the adapters' default scales from the next request on, one for each, by their ids."""

    scales: tuple[float, ...]


class Unknown(msgspec.Struct, frozen=True):
    """A record that arrived whole but means nothing here: an unknown kind, or a body that is not what its kind says.

    Receivers log it. What nobody waits for they ignore; a request that somebody waits for is refused by its worker, and
    ended by the pool if it is its answer that cannot be read. ``reason`` says what was wrong; ``body`` is cut to 200
    bytes; ``request`` is the number of the request that a body of a known kind speaks of, None where it says none.
    """

    kind: str
    reason: str
    body: bytes = b""
    request: int | None = None


ChildMessage: TypeAlias = State | Tokens | Vectors | Done | Result | Failed | Stats | Unknown
PoolMessage: TypeAlias = (
    Exit
    | Load
    | Prefetch
    | Sleep
    | Unload
    | Wake
    | Generate
    | Embed
    | Rerank
    | Download
    | Tokenize
    | Detokenize
    | Template
    | Slots
    | Sequence
    | Cancel
    | Threads
    | Lora
    | Unknown
)
Message: TypeAlias = (
    State
    | Tokens
    | Vectors
    | Done
    | Result
    | Failed
    | Stats
    | Exit
    | Load
    | Prefetch
    | Download
    | Sleep
    | Unload
    | Wake
    | Generate
    | Embed
    | Rerank
    | Tokenize
    | Detokenize
    | Template
    | Slots
    | Sequence
    | Cancel
    | Threads
    | Lora
    | Unknown
)

# --- codec ------------------------------------------------------------------------------------------------------------

_CHILD_TYPES: Final[dict[str, type[msgspec.Struct]]] = {
    "state": State,
    "tokens": Tokens,
    "vectors": Vectors,
    "done": Done,
    "result": Result,
    "failed": Failed,
    "stats": Stats,
}
_POOL_TYPES: Final[dict[str, type[msgspec.Struct]]] = {
    "exit": Exit,
    "load": Load,
    "prefetch": Prefetch,
    "download": Download,
    "sleep": Sleep,
    "unload": Unload,
    "wake": Wake,
    "generate": Generate,
    "embed": Embed,
    "rerank": Rerank,
    "tokenize": Tokenize,
    "detokenize": Detokenize,
    "template": Template,
    "slots": Slots,
    "sequence": Sequence,
    "cancel": Cancel,
    "threads": Threads,
    "lora": Lora,
}
#: Kinds that a worker sends.
CHILD_KINDS: Final = frozenset(_CHILD_TYPES)
#: Kinds that a pool sends.
POOL_KINDS: Final = frozenset(_POOL_TYPES)

_KINDS: Final[dict[type, str]] = {cls: kind for kind, cls in (_CHILD_TYPES | _POOL_TYPES).items()}
_BODILESS: Final = frozenset({"exit", "sleep", "wake"})
_decoders: Final = {kind: msgspec.json.Decoder(cls) for kind, cls in (_CHILD_TYPES | _POOL_TYPES).items()}
_encode: Final = msgspec.json.Encoder().encode
_EXCERPT: Final = 200


def kind_of(message: Message) -> str:
    """Return the kind word of a message. Raises TypeError for :class:`Unknown`, which is never sent."""
    try:
        return _KINDS[type(message)]
    except KeyError:
        raise TypeError(f"{type(message).__name__} is not a message that can be sent") from None


def encode(message: Message) -> tuple[str, bytes]:
    """Encode a message as ``(kind, body)``.

    The body is compact JSON without a newline, or empty for the kinds that carry none. Raises TypeError for what is no
    message or holds what JSON cannot say.
    """
    kind = _KINDS.get(type(message)) or kind_of(message)
    return kind, b"" if kind in _BODILESS else _encode(message)


def decode(kind: str, body: bytes | bytearray | memoryview) -> Message:
    """Decode one record. Never raises on what a peer may send: the unintelligible comes back as :class:`Unknown`."""
    decoder = _decoders.get(kind)
    if decoder is None:
        return Unknown(kind[:64], "unknown kind", bytes(body[:_EXCERPT]))
    try:
        return cast(Message, decoder.decode(body or b"{}"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Unknown(kind, str(error), bytes(body[:_EXCERPT]), _request_in(body))


class _Numbered(msgspec.Struct, frozen=True):
    """The one field that matters of a body which is not what its kind says."""

    request: int


_numbered: Final = msgspec.json.Decoder(_Numbered)
_FIRST_FIELD: Final = b'{"request":'


def _request_in(body: bytes | bytearray | memoryview) -> int | None:
    """Return the number of the request that a body speaks of, as far as it can be told."""
    try:
        return _numbered.decode(body).request
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # no JSON as a whole; its beginning may do
    head = bytes(body[:_EXCERPT])
    number = head.removeprefix(_FIRST_FIELD).partition(b",")[0]
    return int(number) if head.startswith(_FIRST_FIELD) and number.isdigit() else None
