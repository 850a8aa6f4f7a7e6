import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import CHAT_TEMPLATE, write_tiny_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from engine.errors import CheckpointError, ConfigError, RequestError
from engine.text.chat_template import ChatMLTemplate, JinjaTemplate, load_chat_template
from engine.text.tokenizer import load_tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>Grüße</b> & 你好"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "more"},
]
# What templates on the hub use: JSON, dates, loop controls, blocks for training, whitespace.
INVOLVED_TEMPLATE = """\
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- generation %}
{{ ns.count }}: {{ message | tojson }}
    {%- endgeneration %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
{%- endfor %}
{% if tools %}no{% endif %}
  {{ strftime_now('%Y') }} {{ bos_token }}{{ eos_token }}
{{ messages | tojson(indent=2) }}
"""


def render(template: JinjaTemplate | ChatMLTemplate, **kwargs: object) -> str:
    return template.render(CONVERSATION, add_generation_prompt=True, kwargs=kwargs)


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, INVOLVED_TEMPLATE])
def test_templates_render_as_transformers_renders_them(source: str) -> None:
    variables: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    [expected], _ = render_jinja_template(
        [CONVERSATION], chat_template=source, add_generation_prompt=True, **variables
    )
    assert render(JinjaTemplate(source, variables)) == expected


def test_template_kwargs_reach_the_template() -> None:
    template = JinjaTemplate(CHAT_TEMPLATE, {})
    assert render(template).endswith("<|im_start|>assistant\n")
    assert render(template, enable_thinking=False).endswith("<think>\n\n</think>\n\n")


def test_template_kwargs_cannot_replace_the_messages() -> None:
    with pytest.raises(RequestError, match="may not set messages"):
        JinjaTemplate(CHAT_TEMPLATE, {}).render(
            CONVERSATION, add_generation_prompt=True, kwargs={"messages": []}
        )


def test_a_template_may_refuse_a_conversation() -> None:
    with pytest.raises(RequestError, match=r"An assistant cannot begin\."):
        JinjaTemplate(CHAT_TEMPLATE, {}).render(
            [{"role": "assistant", "content": "hi"}], add_generation_prompt=True, kwargs={}
        )


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[99].content.upper() }}",
        "{{ 1 // 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_whatever_a_template_does_wrong_is_a_request_error(source: str) -> None:
    with pytest.raises(RequestError, match="chat template"):
        render(JinjaTemplate(source, {}))


def test_a_template_that_is_not_jinja_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="--chat-template"):
        JinjaTemplate("{% for message in %}", {})


def test_chatml_opens_with_the_model_cards_system_prompt() -> None:
    prompt = ChatMLTemplate().render(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, kwargs={}
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chatml_keeps_the_clients_system_prompt() -> None:
    assert render(ChatMLTemplate()).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_chatml_refuses_template_kwargs() -> None:
    with pytest.raises(RequestError, match="enable_thinking"):
        render(ChatMLTemplate(), enable_thinking=True)


def test_the_users_file_comes_first_then_the_jinja_file_then_the_config(tmp_path: Path) -> None:
    directory = write_tiny_tokenizer(tmp_path, chat_template="from the config")
    tokenizer = load_tokenizer(directory)

    def chosen(template_file: Path | None = None) -> str:
        template = load_chat_template(directory, tokenizer, template_file=template_file)
        assert isinstance(template, JinjaTemplate)
        return render(template)

    assert chosen() == "from the config"
    (directory / "chat_template.jinja").write_text("from the jinja file")
    assert chosen() == "from the jinja file"
    own = tmp_path / "own.jinja"
    own.write_text("from the user")
    assert chosen(own) == "from the user"


def test_the_default_of_several_named_templates_is_taken(tmp_path: Path) -> None:
    directory = write_tiny_tokenizer(tmp_path)
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = load_chat_template(directory, load_tokenizer(directory))
    assert isinstance(template, JinjaTemplate)
    assert render(template) == "yes"


def test_a_checkpoint_without_template_but_with_chatml_tokens_gets_chatml(tmp_path: Path) -> None:
    directory = write_tiny_tokenizer(tmp_path, chat_template=None)
    template = load_chat_template(directory, load_tokenizer(directory))
    assert isinstance(template, ChatMLTemplate)
    assert template.stop_tokens == ("<|im_end|>", "<|endoftext|>")


def test_a_missing_template_file_is_named(tmp_path: Path) -> None:
    directory = write_tiny_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="--chat-template="):
        load_chat_template(
            directory, load_tokenizer(directory), template_file=tmp_path / "absent.jinja"
        )


def test_a_template_of_a_wrong_type_is_refused(tmp_path: Path) -> None:
    directory = write_tiny_tokenizer(tmp_path)
    (directory / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(CheckpointError, match="chat_template"):
        load_chat_template(directory, load_tokenizer(directory))
