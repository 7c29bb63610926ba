"""Every flag that llama-server knows: its spellings, its environment variable, and whether a value follows.

Facts of the llama-server that travels in llama-cpp-python 0.3.36; a new version of it means a new table. Two readers
use it: preset files, whose keys are these flags, and ``serve``, which takes llama-server's whole command line. What
this program has of them is said by its own options; the rest is known here so that it can be named in a warning.
"""

from typing import Final

import msgspec

__all__ = ["FLAGS", "Flag", "find_flag", "find_key"]


class Flag(msgspec.Struct, frozen=True):
    """One flag of llama-server.

    Attributes:
        names: With their dashes, in the reference's order; a preset writes them without.
        values: How many values follow: 0, 1 or 2.
        env: Its environment variable, empty if it has none.
        negated: The names that say the opposite; only of flags without a value.
    """

    names: tuple[str, ...]
    values: int = 0
    env: str = ""
    negated: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name for people: the last, which is the long one."""
        return self.names[-1]

    @property
    def envs(self) -> tuple[str, ...]:
        """All environment variables: a flag that can be negated has a second one, which says the opposite."""
        if not self.env or not self.negated:
            return (self.env,) if self.env else ()
        return (self.env, self.env.replace("LLAMA_ARG_", "LLAMA_ARG_NO_"))


def find_flag(name: str) -> Flag | None:
    """Return the flag of that spelling, dashes included. As in the reference, ``_`` passes for ``-`` in long names."""
    return _BY_NAME.get(name.replace("_", "-") if name.startswith("--") else name)


def find_key(key: str) -> Flag | None:
    """Return the flag that a preset's key means: a name without its dashes, or an environment variable."""
    return _BY_KEY.get(key)


def _flag(names: str, values: int, env: str, negated: str = "") -> Flag:
    return Flag(tuple(names.split()), values, env, tuple(negated.split()))


FLAGS: Final = (
    _flag("-h --help --usage", 0, ""),
    _flag("--version", 0, ""),
    _flag("-cl --cache-list", 0, ""),
    _flag("--completion-bash", 0, ""),
    _flag("-t --threads", 1, "LLAMA_ARG_THREADS"),
    _flag("-tb --threads-batch", 1, ""),
    _flag("-C --cpu-mask", 1, ""),
    _flag("-Cr --cpu-range", 1, ""),
    _flag("--cpu-strict", 1, ""),
    _flag("--prio", 1, ""),
    _flag("--poll", 1, ""),
    _flag("-Cb --cpu-mask-batch", 1, ""),
    _flag("-Crb --cpu-range-batch", 1, ""),
    _flag("--cpu-strict-batch", 1, ""),
    _flag("--prio-batch", 1, ""),
    _flag("--poll-batch", 1, ""),
    _flag("-c --ctx-size", 1, "LLAMA_ARG_CTX_SIZE"),
    _flag("-n --predict --n-predict", 1, "LLAMA_ARG_N_PREDICT"),
    _flag("-b --batch-size", 1, "LLAMA_ARG_BATCH"),
    _flag("-ub --ubatch-size", 1, "LLAMA_ARG_UBATCH"),
    _flag("--keep", 1, ""),
    _flag("--swa-full", 0, "LLAMA_ARG_SWA_FULL"),
    _flag("-fa --flash-attn", 1, "LLAMA_ARG_FLASH_ATTN"),
    _flag("--perf", 0, "LLAMA_ARG_PERF", "--no-perf"),
    _flag("-e --escape", 0, "", "--no-escape"),
    _flag("--rope-scaling", 1, "LLAMA_ARG_ROPE_SCALING_TYPE"),
    _flag("--rope-scale", 1, "LLAMA_ARG_ROPE_SCALE"),
    _flag("--rope-freq-base", 1, "LLAMA_ARG_ROPE_FREQ_BASE"),
    _flag("--rope-freq-scale", 1, "LLAMA_ARG_ROPE_FREQ_SCALE"),
    _flag("--yarn-orig-ctx", 1, "LLAMA_ARG_YARN_ORIG_CTX"),
    _flag("--yarn-ext-factor", 1, "LLAMA_ARG_YARN_EXT_FACTOR"),
    _flag("--yarn-attn-factor", 1, "LLAMA_ARG_YARN_ATTN_FACTOR"),
    _flag("--yarn-beta-slow", 1, "LLAMA_ARG_YARN_BETA_SLOW"),
    _flag("--yarn-beta-fast", 1, "LLAMA_ARG_YARN_BETA_FAST"),
    _flag("-kvo --kv-offload", 0, "LLAMA_ARG_KV_OFFLOAD", "-nkvo --no-kv-offload"),
    _flag("--repack", 0, "LLAMA_ARG_REPACK", "-nr --no-repack"),
    _flag("--no-host", 0, "LLAMA_ARG_NO_HOST"),
    _flag("-ctk --cache-type-k", 1, "LLAMA_ARG_CACHE_TYPE_K"),
    _flag("-ctv --cache-type-v", 1, "LLAMA_ARG_CACHE_TYPE_V"),
    _flag("-dt --defrag-thold", 1, "LLAMA_ARG_DEFRAG_THOLD"),
    _flag("--rpc", 1, "LLAMA_ARG_RPC"),
    _flag("-lm --load-mode", 1, "LLAMA_ARG_LOAD_MODE"),
    _flag("-lzm --lazy-mode", 1, "LLAMA_ARG_LAZY_MODE"),
    _flag("--numa", 1, "LLAMA_ARG_NUMA"),
    _flag("-dev --device", 1, "LLAMA_ARG_DEVICE"),
    _flag("--list-devices", 0, ""),
    _flag("-ot --override-tensor", 1, "LLAMA_ARG_OVERRIDE_TENSOR"),
    _flag("-cmoe --cpu-moe", 0, "LLAMA_ARG_CPU_MOE"),
    _flag("-ncmoe --n-cpu-moe", 1, "LLAMA_ARG_N_CPU_MOE"),
    _flag("-ncffn --n-cpu-ffn", 1, "LLAMA_ARG_N_CPU_FFN"),
    _flag("-ngl --gpu-layers --n-gpu-layers", 1, "LLAMA_ARG_N_GPU_LAYERS"),
    _flag("-sm --split-mode", 1, "LLAMA_ARG_SPLIT_MODE"),
    _flag("-ts --tensor-split", 1, "LLAMA_ARG_TENSOR_SPLIT"),
    _flag("-mg --main-gpu", 1, "LLAMA_ARG_MAIN_GPU"),
    _flag("-fit --fit", 1, "LLAMA_ARG_FIT"),
    _flag("-fitt --fit-target", 1, "LLAMA_ARG_FIT_TARGET"),
    _flag("-fitc --fit-ctx", 1, "LLAMA_ARG_FIT_CTX"),
    _flag("--check-tensors", 0, ""),
    _flag("--override-kv", 1, ""),
    _flag("--op-offload", 0, "", "--no-op-offload"),
    _flag("--lora", 1, ""),
    _flag("--lora-scaled", 1, ""),
    _flag("--control-vector", 1, ""),
    _flag("--control-vector-scaled", 1, ""),
    _flag("--control-vector-layer-range", 2, ""),
    _flag("-m --model", 1, "LLAMA_ARG_MODEL"),
    _flag("-mu --model-url", 1, "LLAMA_ARG_MODEL_URL"),
    _flag("-dr --docker-repo", 1, "LLAMA_ARG_DOCKER_REPO"),
    _flag("-hf -hfr --hf-repo", 1, "LLAMA_ARG_HF_REPO"),
    _flag("-hff --hf-file", 1, "LLAMA_ARG_HF_FILE"),
    _flag("-hft --hf-token", 1, "HF_TOKEN"),
    _flag("--log-disable", 0, ""),
    _flag("--log-file", 1, "LLAMA_ARG_LOG_FILE"),
    _flag("--log-jsonl", 0, "LLAMA_ARG_LOG_JSONL", "--no-log-jsonl"),
    _flag("--log-colors", 1, "LLAMA_ARG_LOG_COLORS"),
    _flag("-v --verbose --log-verbose", 0, ""),
    _flag("--offline", 0, "LLAMA_ARG_OFFLINE"),
    _flag("-lv --verbosity --log-verbosity", 1, "LLAMA_ARG_LOG_VERBOSITY"),
    _flag("--log-prefix", 0, "LLAMA_ARG_LOG_PREFIX", "--no-log-prefix"),
    _flag("--log-timestamps", 0, "LLAMA_ARG_LOG_TIMESTAMPS", "--no-log-timestamps"),
    _flag("--spec-draft-type-k -ctkd --cache-type-k-draft", 1, "LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_K"),
    _flag("--spec-draft-type-v -ctvd --cache-type-v-draft", 1, "LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_V"),
    _flag("--samplers", 1, ""),
    _flag("-s --seed", 1, ""),
    _flag("--sampler-seq --sampling-seq", 1, ""),
    _flag("--ignore-eos", 0, ""),
    _flag("--temp --temperature", 1, "LLAMA_ARG_TEMPERATURE"),
    _flag("--top-k", 1, "LLAMA_ARG_TOP_K"),
    _flag("--top-p", 1, "LLAMA_ARG_TOP_P"),
    _flag("--min-p", 1, "LLAMA_ARG_MIN_P"),
    _flag("--top-nsigma --top-n-sigma", 1, ""),
    _flag("--xtc-probability", 1, ""),
    _flag("--xtc-threshold", 1, ""),
    _flag("--typical --typical-p", 1, ""),
    _flag("--repeat-last-n", 1, ""),
    _flag("--repeat-penalty", 1, "LLAMA_ARG_REPEAT_PENALTY"),
    _flag("--presence-penalty", 1, "LLAMA_ARG_PRESENCE_PENALTY"),
    _flag("--frequency-penalty", 1, "LLAMA_ARG_FREQUENCY_PENALTY"),
    _flag("--dry-multiplier", 1, ""),
    _flag("--dry-base", 1, ""),
    _flag("--dry-allowed-length", 1, ""),
    _flag("--dry-penalty-last-n", 1, ""),
    _flag("--dry-sequence-breaker", 1, ""),
    _flag("--adaptive-target", 1, ""),
    _flag("--adaptive-decay", 1, ""),
    _flag("--dynatemp-range", 1, ""),
    _flag("--dynatemp-exp", 1, ""),
    _flag("--mirostat", 1, ""),
    _flag("--mirostat-lr", 1, ""),
    _flag("--mirostat-ent", 1, ""),
    _flag("-l --logit-bias", 1, ""),
    _flag("--grammar", 1, ""),
    _flag("--grammar-file", 1, ""),
    _flag("-j --json-schema", 1, ""),
    _flag("-jf --json-schema-file", 1, ""),
    _flag("-bs --backend-sampling", 0, "LLAMA_ARG_BACKEND_SAMPLING"),
    _flag("-lcs --lookup-cache-static", 1, ""),
    _flag("-lcd --lookup-cache-dynamic", 1, ""),
    _flag("--kv-unified-per-slot", 1, "LLAMA_ARG_KV_UNIFIED_PER_SLOT"),
    _flag("-ctxcp --ctx-checkpoints --swa-checkpoints", 1, "LLAMA_ARG_CTX_CHECKPOINTS"),
    _flag("-cms --checkpoint-min-step", 1, "LLAMA_ARG_CHECKPOINT_MIN_SPACING_NT"),
    _flag("-cram --cache-ram", 1, "LLAMA_ARG_CACHE_RAM"),
    _flag("-kvu --kv-unified", 0, "LLAMA_ARG_KV_UNIFIED", "-no-kvu --no-kv-unified"),
    _flag("--cache-idle-slots", 0, "LLAMA_ARG_CACHE_IDLE_SLOTS", "--no-cache-idle-slots"),
    _flag("--context-shift", 0, "LLAMA_ARG_CONTEXT_SHIFT", "--no-context-shift"),
    _flag("-r --reverse-prompt", 1, ""),
    _flag("-sp --special", 0, ""),
    _flag("--warmup", 0, "", "--no-warmup"),
    _flag("--spm-infill", 0, ""),
    _flag("--pooling", 1, "LLAMA_ARG_POOLING"),
    _flag("-np --parallel", 1, "LLAMA_ARG_N_PARALLEL"),
    _flag("-cb --cont-batching", 0, "LLAMA_ARG_CONT_BATCHING", "-nocb --no-cont-batching"),
    _flag("-mm --mmproj", 1, "LLAMA_ARG_MMPROJ"),
    _flag("-mmu --mmproj-url", 1, "LLAMA_ARG_MMPROJ_URL"),
    _flag("--mmproj-auto", 0, "LLAMA_ARG_MMPROJ_AUTO", "--no-mmproj --no-mmproj-auto"),
    _flag("--mmproj-offload", 0, "LLAMA_ARG_MMPROJ_OFFLOAD", "--no-mmproj-offload"),
    _flag("-mmdev --mmproj-device", 1, "MTMD_BACKEND_DEVICE"),
    _flag("--image-min-tokens", 1, "LLAMA_ARG_IMAGE_MIN_TOKENS"),
    _flag("--image-max-tokens", 1, "LLAMA_ARG_IMAGE_MAX_TOKENS"),
    _flag("--mtmd-batch-max-tokens", 1, "LLAMA_ARG_MTMD_BATCH_MAX_TOKENS"),
    _flag("--video-fps", 1, "LLAMA_ARG_VIDEO_FPS"),
    _flag("--video-timestamp-interval", 1, "LLAMA_ARG_VIDEO_TIMESTAMP_INTERVAL"),
    _flag("--video-ffmpeg-dir", 1, "LLAMA_ARG_VIDEO_FFMPEG_DIR"),
    _flag("-a --alias", 1, "LLAMA_ARG_ALIAS"),
    _flag("--tags", 1, "LLAMA_ARG_TAGS"),
    _flag("--embd-normalize", 1, ""),
    _flag("--host", 1, "LLAMA_ARG_HOST"),
    _flag("--port", 1, "LLAMA_ARG_PORT"),
    _flag("--reuse-port", 0, "LLAMA_ARG_REUSE_PORT"),
    _flag("--path", 1, "LLAMA_ARG_STATIC_PATH"),
    _flag("--cors-origins", 1, "LLAMA_ARG_CORS_ORIGINS"),
    _flag("--cors-methods", 1, "LLAMA_ARG_CORS_METHODS"),
    _flag("--cors-headers", 1, "LLAMA_ARG_CORS_HEADERS"),
    _flag("--cors-credentials", 0, "LLAMA_ARG_CORS_CREDENTIALS", "--no-cors-credentials"),
    _flag("--api-prefix", 1, "LLAMA_ARG_API_PREFIX"),
    _flag("--ui-config --webui-config", 1, "LLAMA_ARG_UI_CONFIG"),
    _flag("--ui-config-file --webui-config-file", 1, "LLAMA_ARG_UI_CONFIG_FILE"),
    _flag("--ui-mcp-proxy --webui-mcp-proxy", 0, "LLAMA_ARG_UI_MCP_PROXY", "--no-ui-mcp-proxy --no-webui-mcp-proxy"),
    _flag("--tools", 1, "LLAMA_ARG_TOOLS"),
    _flag("--tools-runtime", 1, "LLAMA_ARG_TOOLS_RUNTIME"),
    _flag("--mcp-servers-config", 1, "LLAMA_ARG_MCP_SERVERS_CONFIG"),
    _flag("--mcp-servers-json", 1, "LLAMA_ARG_MCP_SERVERS_JSON"),
    _flag("-ag --agent", 0, "LLAMA_ARG_AGENT", "-no-ag --no-agent"),
    _flag("--ui --webui", 0, "LLAMA_ARG_UI", "--no-ui --no-webui"),
    _flag("--embedding --embeddings", 0, "LLAMA_ARG_EMBEDDINGS"),
    _flag("--rerank --reranking", 0, "LLAMA_ARG_RERANKING"),
    _flag("--api-key", 1, "LLAMA_API_KEY"),
    _flag("--api-key-file", 1, "LLAMA_ARG_API_KEY_FILE"),
    _flag("--ssl-key-file", 1, "LLAMA_ARG_SSL_KEY_FILE"),
    _flag("--ssl-cert-file", 1, "LLAMA_ARG_SSL_CERT_FILE"),
    _flag("--chat-template-kwargs", 1, "LLAMA_ARG_CHAT_TEMPLATE_KWARGS"),
    _flag("-to --timeout", 1, "LLAMA_ARG_TIMEOUT"),
    _flag("--sse-ping-interval", 1, "LLAMA_ARG_SSE_PING_INTERVAL"),
    _flag("--threads-http", 1, "LLAMA_ARG_THREADS_HTTP"),
    _flag("--cache-prompt", 0, "LLAMA_ARG_CACHE_PROMPT", "--no-cache-prompt"),
    _flag("--cache-reuse", 1, "LLAMA_ARG_CACHE_REUSE"),
    _flag("--metrics", 0, "LLAMA_ARG_ENDPOINT_METRICS"),
    _flag("--props", 0, "LLAMA_ARG_ENDPOINT_PROPS"),
    _flag("--slots", 0, "LLAMA_ARG_ENDPOINT_SLOTS", "--no-slots"),
    _flag("--slot-save-path", 1, ""),
    _flag("--media-path", 1, ""),
    _flag("--models-dir", 1, "LLAMA_ARG_MODELS_DIR"),
    _flag("--models-preset", 1, "LLAMA_ARG_MODELS_PRESET"),
    _flag("--models-max", 1, "LLAMA_ARG_MODELS_MAX"),
    _flag("--models-autoload", 0, "LLAMA_ARG_MODELS_AUTOLOAD", "--no-models-autoload"),
    _flag("--jinja", 0, "LLAMA_ARG_JINJA", "--no-jinja"),
    _flag("--reasoning-format", 1, "LLAMA_ARG_THINK"),
    _flag("-rea --reasoning", 1, "LLAMA_ARG_REASONING"),
    _flag("--reasoning-effort", 1, "LLAMA_ARG_REASONING_EFFORT"),
    _flag("--reasoning-budget", 1, "LLAMA_ARG_THINK_BUDGET"),
    _flag("--reasoning-budget-message", 1, "LLAMA_ARG_THINK_BUDGET_MESSAGE"),
    _flag("--reasoning-preserve", 0, "LLAMA_ARG_REASONING_PRESERVE", "--no-reasoning-preserve"),
    _flag("--chat-template", 1, "LLAMA_ARG_CHAT_TEMPLATE"),
    _flag("--chat-template-file", 1, "LLAMA_ARG_CHAT_TEMPLATE_FILE"),
    _flag("--skip-chat-parsing", 0, "LLAMA_ARG_SKIP_CHAT_PARSING", "--no-skip-chat-parsing"),
    _flag("--prefill-assistant", 0, "LLAMA_ARG_PREFILL_ASSISTANT", "--no-prefill-assistant"),
    _flag("-sps --slot-prompt-similarity", 1, ""),
    _flag("--lora-init-without-apply", 0, ""),
    _flag("--sleep-idle-seconds", 1, ""),
    _flag("--log-prompts-dir", 1, ""),
    _flag("--spec-draft-hf -hfd -hfrd --hf-repo-draft", 1, "LLAMA_ARG_SPEC_DRAFT_HF_REPO"),
    _flag("--spec-draft-threads -td --threads-draft", 1, ""),
    _flag("--spec-draft-threads-batch -tbd --threads-batch-draft", 1, ""),
    _flag("--spec-draft-cpu-mask -Cd --cpu-mask-draft", 1, ""),
    _flag("--spec-draft-cpu-range -Crd --cpu-range-draft", 1, ""),
    _flag("--spec-draft-cpu-strict --cpu-strict-draft", 1, ""),
    _flag("--spec-draft-prio --prio-draft", 1, ""),
    _flag("--spec-draft-poll --poll-draft", 1, ""),
    _flag("--spec-draft-cpu-mask-batch -Cbd --cpu-mask-batch-draft", 1, ""),
    _flag("--spec-draft-cpu-strict-batch --cpu-strict-batch-draft", 1, ""),
    _flag("--spec-draft-prio-batch --prio-batch-draft", 1, ""),
    _flag("--spec-draft-poll-batch --poll-batch-draft", 1, ""),
    _flag("--spec-draft-override-tensor -otd --override-tensor-draft", 1, ""),
    _flag("--spec-draft-cpu-moe -cmoed --cpu-moe-draft", 0, "LLAMA_ARG_SPEC_DRAFT_CPU_MOE"),
    _flag("--spec-draft-n-cpu-moe --spec-draft-ncmoe -ncmoed --n-cpu-moe-draft", 1, "LLAMA_ARG_SPEC_DRAFT_N_CPU_MOE"),
    _flag("--spec-draft-n-max", 1, "LLAMA_ARG_SPEC_DRAFT_N_MAX"),
    _flag("--spec-draft-n-min", 1, "LLAMA_ARG_SPEC_DRAFT_N_MIN"),
    _flag("--spec-synth-len", 1, "LLAMA_ARG_SPEC_SYNTH_LEN"),
    _flag("--spec-synth-rates", 1, "LLAMA_ARG_SPEC_SYNTH_RATES"),
    _flag("--spec-draft-p-split --draft-p-split", 1, "LLAMA_ARG_SPEC_DRAFT_P_SPLIT"),
    _flag("--spec-draft-p-min --draft-p-min", 1, "LLAMA_ARG_SPEC_DRAFT_P_MIN"),
    _flag(
        "--spec-draft-backend-sampling", 0, "LLAMA_ARG_SPEC_DRAFT_BACKEND_SAMPLING", "--no-spec-draft-backend-sampling"
    ),
    _flag("--spec-draft-device -devd --device-draft", 1, ""),
    _flag("--spec-draft-ngl -ngld --gpu-layers-draft --n-gpu-layers-draft", 1, "LLAMA_ARG_N_GPU_LAYERS_DRAFT"),
    _flag("--spec-draft-model -md --model-draft", 1, "LLAMA_ARG_SPEC_DRAFT_MODEL"),
    _flag("--spec-type", 1, "LLAMA_ARG_SPEC_TYPE"),
    _flag("--spec-ngram-mod-n-min", 1, ""),
    _flag("--spec-ngram-mod-n-max", 1, ""),
    _flag("--spec-ngram-mod-n-match", 1, ""),
    _flag("--spec-ngram-simple-size-n", 1, ""),
    _flag("--spec-ngram-simple-size-m", 1, ""),
    _flag("--spec-ngram-simple-min-hits", 1, ""),
    _flag("--spec-ngram-map-k-size-n", 1, ""),
    _flag("--spec-ngram-map-k-size-m", 1, ""),
    _flag("--spec-ngram-map-k-min-hits", 1, ""),
    _flag("--spec-ngram-map-k4v-size-n", 1, ""),
    _flag("--spec-ngram-map-k4v-size-m", 1, ""),
    _flag("--spec-ngram-map-k4v-min-hits", 1, ""),
    _flag("--draft --draft-n --draft-max", 1, "LLAMA_ARG_DRAFT_MAX"),
    _flag("--draft-min --draft-n-min", 1, "LLAMA_ARG_DRAFT_MIN"),
    _flag("--spec-ngram-size-n", 1, ""),
    _flag("--spec-ngram-size-m", 1, ""),
    _flag("--spec-ngram-min-hits", 1, ""),
    _flag("--embd-gemma-default", 0, ""),
    _flag("--fim-qwen-1.5b-default", 0, ""),
    _flag("--fim-qwen-3b-default", 0, ""),
    _flag("--fim-qwen-7b-default", 0, ""),
    _flag("--fim-qwen-7b-spec", 0, ""),
    _flag("--fim-qwen-14b-spec", 0, ""),
    _flag("--fim-qwen-30b-default", 0, ""),
    _flag("--gpt-oss-20b-default", 0, ""),
    _flag("--gpt-oss-120b-default", 0, ""),
    _flag("--vision-gemma-4b-default", 0, ""),
    _flag("--vision-gemma-12b-default", 0, ""),
    _flag("--spec-default", 0, ""),
)

_BY_NAME: Final = {name: flag for flag in FLAGS for name in (*flag.names, *flag.negated)}
_BY_KEY: Final = {name.lstrip("-"): flag for name, flag in _BY_NAME.items()} | {
    env: flag for flag in FLAGS for env in flag.envs
}
