"""Conversations are rendered as transformers renders them, and templates cannot reach out."""

from __future__ import annotations

import functools
import json
import time

import pytest
from transformers import PreTrainedTokenizerFast

from fourfold.errors import CheckpointError, RequestError
from fourfold.gateway.chat_template import ChatTemplate
from tests.cpu.gateway.made_tokenizers import byte_level
from tests.cpu.models import default_model

Messages = list[dict[str, str]]

SPECIALS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
SYSTEM = {"role": "system", "content": "Answer <briefly> & \"kindly\", it's 5 o'clock.\n"}
USER = {"role": "user", "content": " What is\nthe capital of France? 漢字 😀"}
REPLY = {"role": "assistant", "content": "Paris.\n\n"}
CONVERSATIONS: list[Messages] = [
    [USER],
    [SYSTEM, USER],
    [USER, REPLY, USER],
    [SYSTEM, USER, REPLY, USER],
    [USER, REPLY],
]

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = """{%- set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
        + message['content'] | trim + '<|eot_id|>' %}
    {%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
MIXTRAL = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\n\n' + message['content'] + ' [/INST]' }}
        {%- else %}{{- ' [INST] ' + message['content'] + ' [/INST]' }}{%- endif %}
    {%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}
{%- endfor %}"""
QWEN3 = """{%- if tools %}{{- 'tools' }}{%- endif %}
{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.seen and message.role == "user" and message.content is string %}
        {%- set ns.seen = true %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set reasoning = '' %}
    {%- if message.reasoning_content is string %}{%- set reasoning = 'x' %}{%- endif %}
    {%- if '</think>' in message.content %}
        {%- set reasoning = message.content.split('</think>')[0].split('<think>')[-1] %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content.lstrip('\n') + '<|im_end|>' + '\n' }}
    {%- if loop.index0 > ns.last or loop.last %}{{- reasoning }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- 'no' }}{%- endif %}
{%- endif %}"""
TRIMMED = """
  {% for message in messages %}
    {# a comment #}
    {{ message.role }}
  {% endfor %}
end
"""
MACRO = """{%- macro show(message, mark='>') -%}
{{ mark }}{{ message.content | upper }}{%- endmacro -%}
{%- for message in messages if message.role != 'system' -%}{{ show(message) }}{%- endfor -%}
{{- messages | map(attribute='role') | join(',') }}{{ messages | selectattr('role', 'eq', 'user')
| list | length }}{{ documents is none }}{{ unheard_of }}{{ unk_token }}"""

SHAPES = {
    "chatml": CHATML,
    "llama 3": LLAMA3,
    "mixtral": MIXTRAL,
    "qwen 3": QWEN3,
    "blocks on lines of their own": TRIMMED,
    "macros and filters": MACRO,
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "tojson ensure_ascii": "{{ messages | tojson(ensure_ascii=True) }}",
    "tojson separators": "{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}",
    "strftime_now": "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}",
    "break": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}"
    "{% endfor %}",
    "continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}",
}


@functools.cache
def theirs() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), **SPECIALS)


def expected(template: str, messages: Messages) -> str:
    text = theirs().apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("shape", SHAPES)
def test_rendered_as_transformers_does(shape: str) -> None:
    template = ChatTemplate(SHAPES[shape], SPECIALS)
    for messages in CONVERSATIONS:
        assert template.render(messages) == expected(SHAPES[shape], messages)


def test_the_default_models_template() -> None:
    tokenizer = default_model.tokenizer()
    assert tokenizer.chat_template is not None
    template = ChatTemplate(tokenizer.chat_template, tokenizer.specials)
    for messages in CONVERSATIONS:
        assert template.render(messages) == expected(tokenizer.chat_template, messages)


def test_a_refusal_is_told_to_the_caller() -> None:
    template = ChatTemplate(MIXTRAL, SPECIALS)
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        template.render([USER, USER])
    assert caught.value.param == "messages"


def test_messages_are_not_changed() -> None:
    messages = [dict(USER)]
    template = ChatTemplate("{{ messages[0].update({'content': 'x'}) }}", {})
    with pytest.raises(RequestError):
        template.render(messages)
    assert messages == [USER]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (messages | attr('__class__')).__name__ }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self._TemplateReference__context.environment.globals }}",
        "{% include '/etc/passwd' %}",
        "{{ nothing.of.the.kind }}",
        "{{ 1 + 'a' }}",
        "{{ 1 / 0 }}",
        "{{ '{0} {1}'.format('a') }}",
        "{{ {}['missing'].deeper }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 'é'.encode('ascii') }}",
    ],
)
def test_what_a_template_may_not_or_cannot_do_is_a_refused_request(template: str) -> None:
    with pytest.raises(RequestError, match="chat template"):
        ChatTemplate(template, SPECIALS).render([USER])


def test_a_template_that_cannot_be_compiled_is_the_checkpoints_fault() -> None:
    with pytest.raises(CheckpointError, match="template"):
        ChatTemplate("{% for m in messages %}{{ m }", SPECIALS)


def test_dates_are_of_this_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")  # 14 hours before UTC
    time.tzset()
    template = "{{ strftime_now('%Y-%m-%d %H') }}"
    try:
        told = {ChatTemplate(template, {}).render([USER]) for _ in range(2)}
        assert expected(template, [USER]) in told
    finally:
        monkeypatch.undo()
        time.tzset()


def test_json_keeps_markup_and_letters() -> None:
    told = ChatTemplate("{{ messages | tojson }}", {}).render([SYSTEM])
    assert told == json.dumps([SYSTEM], ensure_ascii=False)
