"""Chat templates: what transformers offers one is there, and a hostile one is an error in bounded time and memory."""

import time

import pytest

from llm_common.errors import UserError
from llm_common.text.chat_template import render_chat

transformers = pytest.importorskip("transformers")
from transformers.utils.chat_template_utils import render_jinja_template  # noqa: E402

MESSAGES = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Say é🙂", "name": None},
    {"role": "assistant", "content": "ok", "reasoning": "hm"},
    {"role": "user", "content": ""},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
HONEST = [
    "{{ strftime_now('%Y') }}",
    "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% if loop.last %}{% break "
    "%}{% endif %}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% set x = 1 %}{% endgeneration %}{{ x is defined }}{% "
    "endfor %}",
    "{{ messages | tojson }}",
    "{{ messages | tojson(indent=2) }}",
    "{{ messages | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}",
    "{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}",
    "{{ unk_token is defined }} {{ unk_token }} {{ bos_token }}",
    "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ dict(a=1) }} {{ dict.fromkeys(['a']) }} {{ range(3) | list }} {{ cycler is defined }} {{ joiner is defined }}",
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') }}{% macro g() %}{{ caller() }}{% endmacro %}{% call g() %}b{% "
    "endcall %}",
    "{{ messages[0]['content'] | trim | upper | replace('BE', 'be') | length }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ messages | map(attribute='role') | "
    "join(',') }}",
    "{{ messages[2].reasoning_content }} {{ messages[2].thinking }} {{ 'name' in messages[1] }}",
    "{{ messages[1].content is string }} {{ messages is iterable }} {{ (1, 2) is sequence }}",
    "  {%- if true %}\n  a\n  {% endif %}\n b",
    "{{ '%d %s' % (1, 'a') }} {{ '{} {}'.format(1, 2) }} {{ 'a,b'.split(',')[-1] }} {{ messages[::-1][0].role }}",
]


@pytest.mark.parametrize("template", HONEST)
def test_what_transformers_renders(template):
    for start in (False, True):
        clean = [{k: v for k, v in m.items() if v is not None} for m in MESSAGES]
        (expected,), _ = render_jinja_template([clean], None, None, template, add_generation_prompt=start, **SPECIAL)
        assert render_chat(template, MESSAGES, start, SPECIAL) == expected


HOSTILE = {
    "{{ raise_exception('no system role') }}": "no system role",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ none.x.y }}": "has no attribute",
    "{{ messages[9].role }}": "no element 9|has no element",
    "{{ [1, 2] | map(attribute='a.b') | list | first | nope }}": "No filter named 'nope'",
    "{% if %}": r"line 1",
    "\n\n{% for x in %}": r"line 3",
    "{% endfor %}": "endfor",
    "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe|undefined|has no",
    "{{ messages.append(1) }}": "unsafe",
    "{% set ns = namespace(_x=1) %}": "underscore",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}": "underscore",
    "{% include 'x' %}": "no loader|Template|TypeError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "calls itself without end",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "nested too deeply|too",
    "{{ 'a' * 10 ** 10 }}": "memory",
    "{% set x = ['a'] * 10 ** 9 %}": "memory",
    "{{ range(10 ** 9) | list }}": "too big|OverflowError",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "did not end within",
    "{{ (10 ** 7) ** (10 ** 7) }}": "did not end within|memory",
    "{{ messages | tojson(indent=10 ** 10) }}": "memory|OverflowError|did not end",
    "{{ '\\ud800' }}x{{ 1 + 'a' }}": "TypeError",
    "{{ strftime_now(1) }}": "TypeError",
    "{{ lipsum(n=10 ** 7) }}": "did not end within|memory",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_whatever_goes_wrong_is_one_line_in_bounded_time(template):
    render_chat("", [], False, {})  # the process is there
    start = time.monotonic()
    with pytest.raises(UserError, match=f"the chat template failed: .*({HOSTILE[template]})") as caught:
        render_chat(template, MESSAGES, True, SPECIAL)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10  # far above the second and a half that a template has
    assert render_chat("{{ messages | length }}", MESSAGES, True, SPECIAL) == "4"  # and the next one works
