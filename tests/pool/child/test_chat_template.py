"""Chat templates: what ordinary ones expect, and what hostile ones get."""

from typing import Any

import pytest

from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.sandbox import BoundedEnvironment, Bounds, OverBounds
from llamaherd.pool.child.template import ChatTemplate

HELLO: tuple[dict[str, Any], ...] = ({"role": "user", "content": "Hello"},)


def render(source: str, messages: tuple[dict[str, Any], ...] = HELLO, **variables: Any) -> str:
    return ChatTemplate(source, bos="<s>", eos="</s>").render(messages, variables)


def refusal(source: str, messages: tuple[dict[str, Any], ...] = HELLO, **variables: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        render(source, messages, **variables)
    return caught.value


def test_a_model_without_a_template_gets_chatml() -> None:
    assert render("") == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_blocks_take_their_lines_with_them() -> None:
    source = "{% for m in messages %}\n    {% if m.role %}\n{{ m.role }}:\n    {% endif %}\n{% endfor %}"
    assert render(source) == "user:\n"


def test_special_tokens_and_the_generation_flag_are_there() -> None:
    assert render("{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}") == "<s></s>True"


def test_variables_reach_the_template_and_may_override_the_flag() -> None:
    assert (
        render("{{ enable_thinking }}{{ add_generation_prompt }}", enable_thinking=3, add_generation_prompt=0) == "30"
    )


def test_variables_cannot_replace_the_messages() -> None:
    assert render("{{ messages[0].content }}", messages_=1) == "Hello"


def test_loop_controls_and_the_generation_tag_work() -> None:
    source = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(source + "{% generation %}!{% endgeneration %}") == "01!"


def test_tojson_keeps_characters_as_they_are() -> None:
    assert render("{{ messages[0] | tojson }}", ({"role": "user", "content": "<é>"},)) == (
        '{"role": "user", "content": "<é>"}'
    )
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'


def test_what_filters_make_is_a_list_for_tojson() -> None:
    assert render("{{ messages | map(attribute='role') | tojson }}") == '["user"]'
    assert "is not JSON" in str(refusal("{{ namespace(a=1) | tojson }}"))


def test_the_date_can_be_asked_for() -> None:
    assert render("{{ strftime_now('%Y') }}").startswith("20")


def test_concatenation_joins_as_jinja_does() -> None:
    assert render("{{ 'a' ~ 1 ~ none ~ messages[0].role }}") == "a1Noneuser"


def test_a_begin_token_that_tokenising_adds_is_cut_off() -> None:
    template = ChatTemplate("{{ bos_token }}x{{ eos_token }}", bos="<s>", eos="</s>", adds_bos=True, adds_eos=True)
    assert template.render(HELLO, {}) == "x"


def test_the_templates_own_complaint_is_the_callers_answer() -> None:
    error = refusal("{{ raise_exception('roles must alternate') }}")
    assert (error.code, str(error)) == ("template_failed", "the chat template refused: roles must alternate")


def test_a_template_that_does_not_compile_says_where() -> None:
    error = refusal("ok\n{% for %}")
    assert error.code == "template_invalid"
    assert "line 2" in str(error)


def test_text_parts_are_joined_for_a_template_that_expects_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render("{{ messages[0].content }}", ({"role": "user", "content": parts},)) == "one\ntwo"


def test_text_parts_stay_for_a_template_that_reads_them() -> None:
    source = "{% for p in messages[0].content %}[{{ p.text }}]{% endfor %}"
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render(source, ({"role": "user", "content": parts},)) == "[one][two]"


def test_an_image_for_a_text_model_is_refused() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    assert refusal("{{ messages[0].content }}", ({"role": "user", "content": parts},)).code == "unsupported_content"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_way_out_of_the_sandbox_leads_nowhere(source: str) -> None:
    messages = ({"role": "user", "content": "Hello"},)
    try:
        shown = render(source, messages)
    except RequestError as error:
        assert error.code == "template_failed"
    else:
        assert shown == ""
    assert messages == HELLO


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**12 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ [0] * 10**10 }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ range(10**10) }}",
        "{% set ns = namespace(s='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s=2) %}{% for i in range(60) %}{% set ns.s = ns.s * ns.s %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(100000) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' * 10 }}{% endfor %}",
    ],
)
def test_a_template_cannot_use_the_machine_up(source: str) -> None:
    assert refusal(source).code == "template_failed"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for a in r %}{% for b in r %}{% for c in r %}{{ '' }}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% for a in r recursive %}{{ loop(r) }}{% endfor %}",
    ],
)
def test_a_template_that_never_ends_is_ended(source: str) -> None:
    environment = BoundedEnvironment()
    template = environment.from_string("{% set r = range(2000) | list %}" + source)
    with pytest.raises((OverBounds, RecursionError)), environment.bounded(Bounds(seconds=0.05)) as bounds:
        bounds.collect(template.generate())


def test_a_deeply_nested_template_fails_like_any_other() -> None:
    assert refusal("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}").code == "template_invalid"


def test_a_huge_template_is_not_even_parsed() -> None:
    assert refusal("x" * 1_000_001).code == "template_invalid"


def test_after_a_failure_the_template_renders_again() -> None:
    template = ChatTemplate("{{ raise_exception('no') if messages[0].content == 'bad' else 'fine' }}")
    with pytest.raises(RequestError):
        template.render(({"role": "user", "content": "bad"},), {})
    assert template.render(HELLO, {}) == "fine"


def test_half_of_a_surrogate_pair_in_a_calls_arguments_becomes_text_that_a_message_can_hold() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    messages = ({"role": "assistant", "content": "", "tool_calls": [call]}, *HELLO)
    assert '"a": "\ufffd"' in render("", messages)
    assert str(refusal("{{ raise_exception(no) }}", no="\ud800")).endswith("\ufffd")


def test_a_template_is_compiled_ahead_and_what_is_wrong_with_it_is_told_later() -> None:
    sound, broken = ChatTemplate("{{ messages[0].content }}"), ChatTemplate("{% if %}")
    sound.prepare()
    broken.prepare()
    assert sound.render(HELLO, {}) == "Hello"
    with pytest.raises(RequestError) as caught:
        broken.render(HELLO, {})
    assert caught.value.code == "template_invalid"
