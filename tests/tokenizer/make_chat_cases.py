#!/usr/bin/env python3
"""Renders chat templates and small pieces of Jinja with transformers and writes what they give.

    tests/tokenizer/make_chat_cases.py [--assets DIR] > tests/golden/chat/cases.json

Needs transformers 5 and jinja2 3.1. The templates are those beside cases.json; --assets adds real ones from a folder with
vectors/chat_templates and tokenizers/*/tokenizer_config.json, which the tests then want in VESPER_ASSETS. The date is
fixed. An expected text of null means that transformers raises an error.
"""

import argparse
import datetime
import json
import pathlib

import jinja2
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).resolve().parent.parent / "golden" / "chat"
NOW = datetime.datetime(2026, 3, 7, 14, 5, 9)

CONVERSATIONS = {
    "user": [("user", "Hello, who are you?")],
    "system": [("system", "You are a pirate.\n"), ("user", "  Where is the gold?  ")],
    "turns": [
        ("system", "Be brief."),
        ("user", "Caf\u00e9 \u2014 \u4f60\u597d \U0001f319?\n"),
        ("assistant", "<think>\nhm\n</think>\n\n Yes \"indeed\" & <b>\\o/</b>. "),
        ("user", "And\ttabs?"),
    ],
    "answered": [("user", "One"), ("assistant", "Two"), ("user", "Three"), ("assistant", " Four\n")],
    "spelled": [("user", "<|eot_id|></s> [INST] {{ 7 }} {% if %}")],
    "two users": [("user", "One"), ("user", "Two")],
    "empty": [("user", "")],
}

TOKENS = {
    "llama2": {"bos_token": "<s>", "eos_token": "</s>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "chatml": {"eos_token": "<|im_end|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
    "deepseek": {"bos_token": "<|begin_of_sentence|>", "eos_token": "<|end_of_sentence|>"},
}

# Rendered with the conversation "turns".
SNIPPETS = [
    # whitespace control
    "a\n  {% if true %}\n  b\n  {% endif %}\nc\n",
    "a\n  {%+ if true %}b{% endif +%}\nc",
    "a  {%- if true -%}  b  {%- endif -%}  c",
    "a\n\n{{- 1 -}}\n\nb {{ 2 }}\nc",
    "a\n  {# note #}\n b {#- note -#} \n c\n{#+ note +#}\nd",
    "  {{ 1 }}\n  {% set x = 2 %}  {{ x }}\n\n",
    "a\r\nb\rc\n\n",
    "{%- for i in [1, 2] %}\n  {{ i }}\n{%- endfor %}\n",
    "x {% if true %} y\n{% endif %}   \n{% if true %}z{% endif %}",
    "\u3000{%- if true %} a{% endif %}\u00a0{{- 'b' }}",
    # literals and escapes
    r"""{{ 'a\n\t\\\'\"\x41\u00e9\U0001f319\101' }}{{ "it's" }}{{ 'q' "r" }}{{ '\d' }}""",
    "{{ 1 }} {{ 1.5 }} {{ 1e3 }} {{ 2.0 }} {{ 1e22 }} {{ 0.00001 }} {{ 1e16 }} {{ 123456.789 }} {{ true }} {{ None }}",
    "{{ [1, 'a', [2]][2][0] }}{{ {'a': 1, 'b': {'c': 2}}.b.c }}{{ (1, 2)[1] }}{{ (3,)[0] }}{{ {'a': 1,}['a'] }}",
    "{{ '}}' }}{% if '%}' %}{{ {'a': {'b': 1}}['a']['b'] }}{% endif %}",
    # operators
    "{{ 7 // 2 }} {{ -7 // 2 }} {{ 7 % 3 }} {{ -7 % 3 }} {{ 7 % -3 }} {{ 7 / 2 }} {{ 4 / 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }}",
    "{{ -7.5 // 2 }} {{ -7.5 % 2 }} {{ 1 + 2 * 3 - 4 }} {{ (1 + 2) * 3 }} {{ -2 ** 2 }} {{ - 3 + 1 }} {{ +4 }}",
    "{{ 'a' ~ 1 ~ none ~ true ~ 1.0 }} {{ 'a' + 'b' * 3 }} {{ 2 * 'xy' }} {{ ([1] + [2]) | length }} {{ true + 1 }}",
    "{{ 1 < 2 < 3 }} {{ 1 < 2 > 3 }} {{ 'a' < 'b' }} {{ 1 == 1.0 }} {{ true == 1 }} {{ [1, 2] == [1, 2] }} {{ 'a' != 'b' }}",
    "{{ 'a' in 'cat' }} {{ 3 in [1, 2] }} {{ 'k' in {'k': 1} }} {{ 'z' not in 'cat' }} {{ nothing in ['a'] }} {{ 'a' in nothing }}",
    "{{ 1 and 0 }} {{ 0 or 'x' }} {{ not 0 }} {{ not 1 == 2 }} {{ '' or none or 'z' }} {{ 1 if 0 else 2 }} {{ 1 if 0 }}|",
    "{{ 'a' if true else 'b' if false else 'c' }} {{ 1 if 1 if 0 else 3 }}",
    "{{ {'a': 1} == {'a': 1.0} }} {{ nothing == nowhere }} {{ none == false }} {{ 1 >= 1 }} {{ 2 <= 1 }}",
    "{{ 1 + none }}", "{{ 'a' + 1 }}", "{{ 'a' < 1 }}", "{{ 1 // 0 }}", "{{ nothing + 'a' }}", "{{ 1 in 2 }}",
    # subscripts and slices
    "{{ 'h\u00e9llo'[1] }}{{ 'h\u00e9llo'[-1] }}{{ 'h\u00e9llo'[1:3] }}{{ 'h\u00e9llo'[::-1] }}{{ 'hello'[::2] }}{{ 'hello'[-3:] }}",
    "{{ [1, 2, 3, 4][::-1] | join(',') }} {{ [1, 2, 3, 4][-2:] | join(',') }} {{ [1, 2, 3, 4][3:0:-2] | join(',') }}",
    "{{ [1, 2, 3][10:] | length }} {{ [1, 2, 3][:-1] | join }} {{ [1, 2, 3][-10:2] | join }} {{ 'abc'[5:] }}|",
    "{{ [1][5] }}|{{ {'a': 1}['b'] }}|{{ {'a': 1}.b }}|{{ 'a'.b }}|{{ none.x }}|{{ messages[0].nothing }}",
    "{{ messages[0].nothing.more }}", "{{ nothing.more }}", "{{ nothing['more'] }}", "{{ [1, 2][::0] }}",
    "{{ messages[-1]['content'] }} {{ messages[0]['role'] }} {{ messages[1:][0].role }}",
    # set, scopes, namespaces
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set (c, d) = [3, 4] %}{{ c }}{{ d }}{% set t = 1, %}{{ t[0] }}",
    "{% set x = 1 %}{% for i in [1, 2, 3] %}{% set x = x + i %}{{ x }},{% endfor %}{{ x }}",
    "{% set ns = namespace(x=1) %}{% for i in [1, 2, 3] %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}{{ ns.y }}|",
    "{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a }}{{ ns.b }}{{ ns['a'] }}",
    "{% if true %}{% set y = 1 %}{% endif %}{{ y }}{% for i in [1] %}{% set z = 1 %}{% endfor %}{{ z }}|",
    "{% set block %}a{{ 1 }}{% set inner = 2 %}b{% endset %}[{{ block }}]{{ inner }}|{{ block | length }}",
    "{% set a, b = [1] %}", "{% set x.y = 1 %}",
    # for
    "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }} {% endfor %}",
    "{% for m in messages %}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.previtem.role if loop.previtem is defined }}-{{ loop.nextitem.role if not loop.last }} {% endfor %}",
    "{% for i in [1, 2, 3, 4] if i % 2 == 0 %}{{ loop.index }}:{{ i }}/{{ loop.length }} {% else %}none{% endfor %}",
    "{% for i in [] %}x{% else %}none{% endfor %} {% for i in [1] if i > 1 %}x{% else %}none{% endfor %} {% for i in nothing %}x{% endfor %}",
    "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %}{% for k in {'a': 1} %}{{ k }}{% endfor %}",
    "{% for c in 'h\u00e9' %}{{ c }}.{% endfor %}{% for i in range(3) %}{{ i }}{% endfor %}{{ range(5, 0, -2) | join }}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }}{% else %}no{% endfor %}",
    "{% for a in [1, 2] %}{% for b in [3, 4] %}{{ loop.index }}{{ a }}{{ b }} {% if b == 3 %}{% continue %}{% endif %}{% endfor %}{{ loop.index }}{% endfor %}",
    "{% for a, b in [[1, 2], [3, 4]] %}{{ a + b }} {% endfor %}{% for (a, b) in [(5, 6)] %}{{ a * b }}{% endfor %}",
    "{% for i in 5 %}{% endfor %}", "{% for a, b in [[1]] %}{% endfor %}", "{% for i in none %}{% endfor %}",
    # if
    "{% if 0 %}a{% elif [] %}b{% elif {} %}c{% elif '' %}d{% elif 0.0 %}e{% elif none %}f{% elif 'x' %}g{% else %}h{% endif %}",
    # macros
    "{% macro m(a, b='x', c=none) %}[{{ a }}{{ b }}{{ c }}{{ top }}]{% endmacro %}{% set top = 1 %}{{ m(1) }}{{ m(1, c=3) }}{{ m(1, 2, 3) }}{{ m() }}",
    "{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{% for i in [3] %}{{ f(i) | upper }}{% endfor %}",
    "{% macro m(a) %}{% endmacro %}{{ m(1, 2) }}", "{% macro m(a) %}{% endmacro %}{{ m(b=2) }}",
    # generation
    "{% for m in messages %}{% generation %}{{ m.role }}{% set q = 1 %}{% endgeneration %}{{ q }};{% endfor %}",
    # filters
    "[{{ '  a b \n' | trim }}][{{ 'xxaxx' | trim('x') }}][{{ nothing | trim }}][{{ 5 | trim }}][{{ '\u3000a\u2003' | trim }}]",
    "{{ 'ab' | length }}{{ 'h\u00e9' | length }}{{ [1, 2] | count }}{{ {'a': 1} | length }}{{ nothing | length }}",
    "{{ 'aBc' | upper }}{{ 'aBc' | lower }}{{ 'aBC d' | capitalize }} {{ \"it's a-b (c) d\" | title }}",
    "{{ 'banana' | replace('an', '-') }} {{ 'banana' | replace('an', '-', 1) }} {{ 5 | replace(5, 'x') }}",
    "{{ nothing | default('d') }}{{ '' | default('d') }}|{{ '' | default('d', true) }}{{ none | d('x') }}{{ nothing | d }}|{{ 0 | default('z', boolean=true) }}",
    "{{ [1, 'a', none] | join('-') }} {{ 'abc' | join('.') }} {{ [] | join }}|{{ ['x'] | join(d=',') }}",
    "{% for k, v in {'a': 1} | items %}{{ k }}{{ v }}{% endfor %}{{ nothing | items | list | length }}",
    "{{ 'abc' | list | length }}{{ {'x': 1} | list | first }}{{ [1, 2] | first }}{{ [1, 2] | last }}{{ 'abc' | last }}{{ [] | first }}|",
    "{{ 1 | string ~ '|' }}{{ nothing | string }}|{{ 1.0 | string | length }}{{ 'x' | safe }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='role') | join(',') }}",
    "{{ messages | selectattr('role', '==', 'user') | map(attribute='content') | map('trim') | join('/') }}{{ messages | selectattr('nothing') | list | length }}",
    "{{ [1, none, 2] | select | join }}{{ [1, 2, 3] | select('odd') | join }}{{ [1, 2, 3] | reject('equalto', 2) | join }}{{ [1, 2, 3] | select('gt', 1) | join }}",
    "{{ [1, 2] | reverse | join }}{{ 'abc' | reverse }}{{ messages | selectattr('role', 'in', ['user', 'system']) | list | length }}",
    "{{ 'a' | upper | lower | length + 1 }} {{ -1 | string }} {{ 'a' ~ 'b' | upper }} {{ ('a' ~ 'b') | upper }}",
    "{{ 1 | trim(2, 3) }}", "{{ none | length }}", "{{ 5 | list }}", "{{ 'a' | replace('b') }}",
    # tojson
    "{{ {'a': [1, 2.5, true, none, 'x\"\\\\\\n\\t<b>&\\'\u00e9'], 'b': {}} | tojson }} {{ [] | tojson }} {{ 'x' | tojson }}",
    "{{ {'a': [1, {'b': []}], 'c': {}} | tojson(indent=2) }} {{ [1e30, 1.0, -0.5] | tojson(ensure_ascii=false) }}",
    "{{ messages | tojson }}{{ messages[2].content | tojson }}", "{{ nothing | tojson }}", "{{ '\x01\x1f\x7f' | tojson }}",
    # tests
    "{{ 1 is defined }}{{ x is defined }}{{ x is undefined }}{{ x is not defined }}{{ none is none }}{{ 1 is not none }}",
    "{{ 'a' is string }}{{ 1 is string }}{{ {} is mapping }}{{ [] is mapping }}{{ [] is iterable }}{{ 1 is iterable }}{{ 'a' is iterable }}{{ {} is sequence }}{{ none is sequence }}",
    "{{ 1 is number }}{{ true is number }}{{ 1.0 is float }}{{ 1 is integer }}{{ true is integer }}{{ true is boolean }}{{ true is true }}{{ 1 is true }}{{ false is false }}",
    "{{ 4 is even }}{{ 3 is odd }}{{ 1 is equalto 1 }}{{ 1 is eq(2) }}{{ 'a' is in ['a'] }}{{ 'a' is in('abc') }}{{ 2 is gt 1 }}{{ 1 is ne 1 }}{{ 1 is le 1 }}",
    "{{ not x is defined and 1 is number or false }}{{ 'y' if x is not defined else 'n' }}{{ raise_exception is defined }}{{ range is callable }}",
    # methods
    "[{{ ' a '.strip() }}][{{ 'xax'.strip('x') }}][{{ ' a '.lstrip() }}][{{ ' a '.rstrip() }}][{{ '\\n\\na\\n'.strip('\\n') }}][{{ ' a '.strip(none) }}]",
    "{{ 'a,b,,c'.split(',') | join('|') }} {{ ' a  b '.split() | join('|') }} {{ 'a,b,c'.split(',', 1) | join('|') }} {{ 'a b  c '.split(none, 1) | join('|') }} {{ ''.split(',') | length }}{{ ''.split() | length }}",
    "{{ 'abc'.startswith('a') }}{{ 'abc'.endswith('bc') }}{{ 'abc'.startswith(('x', 'a')) }}{{ 'abc'.endswith('x') }}",
    "{{ 'aBc'.upper() }}{{ 'aBc'.lower() }}{{ \"it's a-b\".title() }}{{ 'aBC d'.capitalize() }}{{ 'aXbX'.replace('X', '-') }}{{ 'aXbX'.replace('X', '-', 1) }}",
    "{{ 'h\u00e9llo'.find('l') }}{{ 'abc'.find('z') }}{{ '-'.join(['a', 'b']) }}{{ 'a</think>b'.split('</think>')[-1].lstrip('\\n') }}",
    "{{ {'a': 1}.get('a') }}{{ {'a': 1}.get('b') }}{{ {'a': 1}.get('b', 2) }}{{ {'a': 1}.keys() | list | join }}{{ {'a': 1}.values() | list | join }}{{ dict(a=1).a }}",
    "{{ 'abc'.nothing() }}", "{{ none.strip() }}", "{{ nothing() }}", "{{ ''.split('') }}", "{{ '-'.join([1]) }}", "{{ {}.get() }}",
    # functions
    "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d %H:%M:%S %A %j') }}{{ strftime_now('') }}|",
    "{{ raise_exception('no') }}", "{% if false %}{{ raise_exception('no') }}{% endif %}ok", "{{ range(200000) | length }}",
    # errors of syntax
    "{{ 1 + }}", "{% if %}{% endif %}", "{% for %}", "{{ 'a }}", "{{ (1 }}", "{% endif %}", "{% if true %}", "{# a", "{{ a b }}",
    "{{ [1, 2 }}", "{% unknown %}", "{{ 1 | unknown }}", "{{ 1 is unknown }}", "{% break %}", "{{ $ }}", "{{ } }}",
]


class FixedDate(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


def rendered(template, messages, generation_prompt, tokens):
    conversation = [{"role": role, "content": content} for role, content in messages]
    try:
        texts, _ = chat_template_utils.render_jinja_template(
            conversations=[conversation], chat_template=template, add_generation_prompt=generation_prompt, **tokens
        )
        return texts[0]
    except (jinja2.TemplateError, TypeError, ValueError, ZeroDivisionError, AttributeError, OverflowError, SyntaxError):
        return None


def cases_of(name, template, tokens, **where):
    for conversation, messages in CONVERSATIONS.items():
        for generation_prompt in (False, True):
            yield {
                "name": f"{name}, {conversation}" + (", prompt" if generation_prompt else ""),
                **where,
                "tokens": tokens,
                "conversation": conversation,
                "add_generation_prompt": generation_prompt,
                "expected": rendered(template, messages, generation_prompt, tokens),
            }


def content_of(token):
    return token["content"] if isinstance(token, dict) else token


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=pathlib.Path)
    assets = parser.parse_args().assets
    chat_template_utils.datetime = FixedDate

    cases = []
    for name, tokens in TOKENS.items():
        cases += cases_of(name, (HERE / f"{name}.jinja").read_text(), tokens, file=f"{name}.jinja")
    if assets:
        for path in sorted(assets.glob("vectors/chat_templates/*.jinja")):
            tokens = TOKENS["chatml" if "Qwen" in path.name else "llama3"]
            cases += cases_of(path.stem, path.read_text(), tokens, asset=str(path.relative_to(assets)))
        for path in sorted(assets.glob("tokenizers/*/tokenizer_config.json")):
            config = json.loads(path.read_text())
            if "chat_template" not in config:
                continue
            folder = str(path.parent.relative_to(assets))
            tokens = {key: content_of(config[key]) for key in ("bos_token", "eos_token") if config.get(key)}
            cases += cases_of(folder, config["chat_template"], tokens, asset_folder=folder)

    snippets = [
        {"template": text, "expected": rendered(text, CONVERSATIONS["turns"], False, TOKENS["llama2"])}
        for text in SNIPPETS
    ]
    document = {
        "now": NOW.isoformat(),
        "conversations": {
            name: [{"role": role, "content": content} for role, content in messages]
            for name, messages in CONVERSATIONS.items()
        },
        "cases": cases,
        "snippets": snippets,
    }
    print(json.dumps(document, ensure_ascii=True, indent=1))


if __name__ == "__main__":
    main()
