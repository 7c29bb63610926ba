"""Chat templates of the families of models, in the forms that their makers publish and in words of our own.

Each renders messages, tools, calls and results the way its family was taught, and opens the assistant's turn. They are
short: what only decorates a prompt is left out.
"""

from typing import Final

__all__ = [
    "ALWAYS_THINKS",
    "COMMAND_R",
    "DEEPSEEK",
    "GEMMA4",
    "GEMMA_PLAIN",
    "HARMONY",
    "HERMES",
    "LLAMA3",
    "MISTRAL",
    "MISTRAL_NEW",
    "QWEN3",
    "QWEN_CODER",
    "TEMPLATES",
]

_OPEN: Final = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_SYSTEM: Final = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "Functions:\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
)

#: NousResearch Hermes, Qwen 2.5: JSON between ``<tool_call>`` tags.
HERMES: Final = (
    _SYSTEM
    + 'Write <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n{% endif %}'
    + "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    + "</tool_response><|im_end|>\n{% elif not (tools and loop.first and m.role == 'system') %}"
    + "<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    + '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    + "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    + _OPEN
)

#: Qwen3: as Hermes, with reasoning that ``enable_thinking: false`` closes before it begins.
QWEN3: Final = (
    _SYSTEM
    + "Write <tool_call> tags.<|im_end|>\n{% endif %}"
    + "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}"
    + "\n</think>\n\n{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>\n"
    + '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    + "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

#: Models that always think: the template opens the tag.
ALWAYS_THINKS: Final = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)

#: Qwen3-Coder: tags for the function and for each parameter.
QWEN_CODER: Final = (
    _SYSTEM
    + "Write <tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
    + "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    + "{% for call in m.tool_calls or [] %}<tool_call>\n<function={{ call.function.name }}>\n"
    + "{% for key, value in call.function.arguments | items %}<parameter={{ key }}>\n{{ value }}\n</parameter>\n"
    + "{% endfor %}</function>\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    + _OPEN
)

#: Llama 3.1 to 3.3: a bare object of ``name`` and ``parameters``.
LLAMA3: Final = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}"
    "<|end_header_id|>\n\n{% if tools and loop.index0 == 0 %}Functions, to be called with "
    '{"name": ..., "parameters": ...}:\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}'
    "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

_MISTRAL: Final = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
    "{{ raise_exception('ids of tool calls have nine characters') }}{% endif %}"
    "[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% elif m.tool_calls %}"
)
_MISTRAL_END: Final = "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
#: Mistral Nemo and its time: a list of objects with ids of nine characters.
MISTRAL: Final = (
    _MISTRAL
    + '[TOOL_CALLS][{% for call in m.tool_calls %}{"name": "{{ call.function.name }}", "arguments": '
    + '{{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]'
    + "{{ eos_token }}"
    + _MISTRAL_END
)
#: Mistral Small 3.2, Devstral, Magistral: the name and then the arguments.
MISTRAL_NEW: Final = (
    _MISTRAL
    + "{% for call in m.tool_calls %}[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}"
    + "{% endfor %}{{ eos_token }}"
    + _MISTRAL_END
)

#: Gemma 1 to 3: knows neither tools nor a system message, and wants the roles to alternate.
GEMMA_PLAIN: Final = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

#: Gemma 4: objects with bare keys and texts between tokens of their own.
GEMMA4: Final = (
    "{{ bos_token }}{% if tools %}<|turn>system\n{% for tool in tools %}<|tool>declaration:{{ tool.function.name }}"
    "{{ tool.function.parameters | tojson }}<tool|>{% endfor %}<turn|>\n{% endif %}"
    "{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<|tool_call>call:' + call.function.name + '{' }}"
    "{% for key, value in call.function.arguments | items %}{{ key }}:"
    '{{ "<|\\"|>" + value + "<|\\"|>" if value is string else value | tojson }}{% if not loop.last %},{% endif %}'
    "{% endfor %}}<tool_call|>{% endfor %}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}{# <|channel>thought <channel|> #}"
)

#: Command R7B: a list of actions, and reasoning between tokens.
COMMAND_R: Final = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for m in messages %}"
    "<|START_OF_TURN_TOKEN|>{{ m.role }}{% if m.tool_calls %}<|START_THINKING|>{{ m.reasoning_content }}"
    "<|END_THINKING|>"
    "<|START_ACTION|>[{% for call in m.tool_calls %}"
    '{"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ call.function.name }}", "parameters": '
    "{{ call.function.arguments | tojson }}}{% endfor %}]<|END_ACTION|>{% else %}{{ m.content }}{% endif %}"
    "<|END_OF_TURN_TOKEN|>{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|>assistant\n{% endif %}"
)

#: DeepSeek V3.1: the name and the arguments between tokens, all calls between two more.
DEEPSEEK: Final = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for m in messages %}"
    "{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for call in m.tool_calls %}<｜tool▁call▁begin｜>"
    "{{ call.function.name }}<｜tool▁sep｜>{{ call.function.arguments }}<｜tool▁call▁end｜>{% endfor %}"
    "<｜tool▁calls▁end｜>{% else %}<{{ m.role }}>{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n</think>{% endif %}"
)

#: gpt-oss: a channel for each part of an answer, the recipient of a call in its header.
HARMONY: Final = (
    "{% if tools %}<|start|>developer<|message|>{% for tool in tools %}type {{ tool.function.name }} = "
    "{{ tool.function.parameters | tojson }}\n{% endfor %}<|end|>{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}"
    "<|end|>{% endif %}{% if m.tool_calls %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}"
    "<|channel|>commentary json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

#: By the name of the dialect that must be found in each.
TEMPLATES: Final = (
    ("hermes", HERMES),
    ("hermes", QWEN3),
    ("hermes", QWEN_CODER),
    ("llama", LLAMA3),
    ("mistral", MISTRAL),
    ("mistral", MISTRAL_NEW),
    ("generic", GEMMA_PLAIN),
    ("gemma4", GEMMA4),
    ("command-r", COMMAND_R),
    ("deepseek", DEEPSEEK),
)
