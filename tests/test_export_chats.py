"""Chat templates and tokens that end a turn in GGUF files: what readers make of them is what transformers writes."""

from __future__ import annotations

from datetime import datetime

import pytest
from export_cases import bpe_tokenizer, write_random
from gguf_cases import written

from ppf.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("templates", ["{{ one }}", {"default": "{{ one }}", "tool_use": "{{ two }}"}])
def test_all_chat_templates_are_written(templates, tmp_path):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = templates
    fields = written(write_random(tmp_path / "in", tokenizer=tokenizer), tmp_path / "out").fields
    assert fields["tokenizer.chat_template"] == "{{ one }}"
    several = isinstance(templates, dict)
    assert ("tokenizer.chat_templates" in fields) == several
    assert not several or fields["tokenizer.chat_template.tool_use"] == "{{ two }}"


# The shapes that the families' published templates have: what they take from outside, tags, and white space.
CHATS = {
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama 3": (
        "{{- bos_token }}\n{%- set date = strftime_now('%Y') if strftime_now is defined else '' %}\n"
        "{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
        "message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    "
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}\n"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token}}{% endif %}"
        "{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' "
        "else message['role']) + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "smollm3": (
        "{% for message in messages %}\n  {% if message['role'] == 'assistant' %}\n    {% generation %}\n"
        "{{ message['content'] }}<|im_end|>\n    {%- endgeneration -%}\n  {% else %}\n{{ message['content'] }}\n"
        "  {% endif %}\n  \n{% endfor %}"
    ),
    "other tokens": "\n  {% if true %}{{ unk_token }}{{ bos_token }}{{ pad_token }}{% endif %}{{ messages[0].role }}",
}
TURNS = [
    {"role": "user", "content": "  Where is the river? "},
    {"role": "assistant", "content": "Past the «old» walls.\n"},
    {"role": "user", "content": "And then?"},
]


def chatting(name: str):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = CHATS[name]
    if name == "other tokens":
        tokenizer.add_special_tokens({"unk_token": '<"unk">'})
        tokenizer.bos_token = None
    return tokenizer


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_is_written_as_transformers_writes_it(name, tmp_path):
    """By the template in the file and what readers give it: begin and end token, and no block of transformers' own."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    tokenizer = chatting(name)
    fields = written(write_random(tmp_path / "in", tokenizer=tokenizer), tmp_path / "out").fields

    def refused(problem: str):
        raise ValueError(problem)

    tokens = fields["tokenizer.ggml.tokens"]
    begin, end = (tokens[fields[f"tokenizer.ggml.{which}_token_id"]] for which in ("bos", "eos"))
    reader = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    reader.globals |= {"raise_exception": refused, "strftime_now": lambda form: datetime.now().strftime(form)}
    template = reader.from_string(fields["tokenizer.chat_template"])
    for answer in (False, True):
        found = template.render(messages=TURNS, bos_token=begin, eos_token=end, add_generation_prompt=answer)
        assert found == tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=answer)


def test_a_template_that_is_not_jinja(tmp_path):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = "{% for message in %}"
    with pytest.raises(InputError, match="is not Jinja"):
        written(write_random(tmp_path / "in", tokenizer=tokenizer), tmp_path / "out")


def test_tokens_that_end_a_turn(tmp_path):
    """llama.cpp stops at <|im_end|> by itself, at a model's own token only if the file names it."""
    tokenizer = bpe_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>", "<|mine|>", "<|too|>"]})
    source = write_random(tmp_path / "in", tokenizer=tokenizer, eos_token_id=[1, 290, 291, 292])
    fields = written(source, tmp_path / "out").fields
    assert fields["tokenizer.ggml.eos_token_id"] == 1
    assert (fields["tokenizer.ggml.eot_token_id"], fields["tokenizer.ggml.eom_token_id"]) == (291, 292)
    plain = written(write_random(tmp_path / "plain"), tmp_path / "plain-out").fields
    assert "tokenizer.ggml.eot_token_id" not in plain
