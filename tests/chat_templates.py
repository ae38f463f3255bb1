"""Chat templates with the traits of those that models come with; each is written for these tests."""

ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"

# A thought, or an empty one, stands before the last reply only; thoughts before it are dropped.
# What a tool answered is a user's turn, by how its text begins and ends.
THINKS = """\
{%- set at = namespace(last=0) -%}
{%- for m in messages -%}
{%- if m.role == 'user' and not (m.content.startswith('<out>') and m.content.endswith('</out>')) -%}
{%- set at.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
<|{{ m.role }}|>
{%- if m.role == 'assistant' -%}
{%- set said = m.content.split('</think>')[-1].lstrip('\\n') -%}
{%- set thought = m.reasoning_content or '' -%}
{%- if '</think>' in m.content -%}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- endif -%}
{%- if loop.index0 > at.last and (loop.last or thought) -%}
{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}
{%- endif -%}
{{ said }}
{%- for call in m.tool_calls or [] -%}
{{ '\\n<call>' + (call.function | tojson) + '</call>' }}
{%- endfor -%}
{%- else -%}
{{ m.content }}
{%- endif -%}
{{ '<|end|>\\n' }}
{%- endfor -%}
""" + ASK

# The prompt opens a thought.
OPENS_A_THOUGHT = THINKS.replace(ASK, ASK.replace("<|assistant|>", "<|assistant|><think>\n"))

# The prompt opens a thought that no reply is ever written with.
NEVER_CLOSES_IT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{% if m.role == "
    "'assistant' %}<|eos|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n"
    "{% endif %}"
)

# Every text that asks for no reply ends in the end token.
ENDS_UNLESS_ASKED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)

# The same with plain words, which begin alike.
ENDS_PLAIN = (
    "{% for m in messages %}{{ '### ' + m.role | title + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% else %}{{ eos_token }}{% endif %}"
)

# The system text and the tools stand in the last user turn, found by comparing; turns alternate.
IN_THE_LAST_TURN = """\
{%- if messages[0].role == 'system' -%}{%- set system, turns = messages[0].content, messages[1:] -%}
{%- else -%}{%- set system, turns = none, messages -%}{%- endif -%}
{%- set users = turns | selectattr('role', 'equalto', 'user') | list -%}
{{- bos_token -}}
{%- set at = namespace(user=true) -%}
{%- for m in turns -%}
{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) -%}
{%- if (m.role == 'user') != at.user -%}{{ raise_exception('turns must alternate') }}{%- endif -%}
{%- set at.user = not at.user -%}
{%- endif -%}
{%- if m.role == 'user' -%}
{%- if tools and m == users[-1] -%}[TOOLS] {{ tools | tojson }} [/TOOLS]{%- endif -%}
[INST] {{ system + '\\n\\n' if system and m == users[-1] else '' }}{{ m.content }}[/INST]
{%- elif m.role == 'tool' -%}
[OUT] {"content": {{ m.content | tojson }}}[/OUT]
{%- elif m.tool_calls -%}
[CALLS] [
{%- for call in m.tool_calls -%}
{%- if call.id | length != 9 -%}{{ raise_exception('ids have 9 letters') }}{%- endif -%}
{{ call.function | tojson }}{{ ', ' if not loop.last else '' }}
{%- endfor -%}
]{{ eos_token }}
{%- elif m.role == 'assistant' -%}
{{ ' ' + m.content + eos_token }}
{%- endif -%}
{%- endfor -%}
"""

# The system text and the tools stand in a user turn that is the last of all: never above a reply.
IN_AN_UNANSWERED_TURN = IN_THE_LAST_TURN.replace("m == users[-1]", "loop.last")

# No system role; another name for the assistant; contents trimmed.
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<turn>{{ 'model' if m['role'] == "
    "'assistant' else m['role'] }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)

# Contents trimmed, parts taken.
TRIMS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n\n{% if m.content is string %}"
    "{{ m.content | trim }}{% else %}{% for part in m.content %}{{ part.text | trim }}{% endfor %}"
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)

# Says itself what is generated: the thought and the calls in blocks of their own.
MARKS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}{% generation %}({{ m.reasoning_content }}){% endgeneration %}"
    "{% endif %}{{ '\n' }}{% generation %}{{ m.content }}{{ (m.tool_calls | tojson) if m.tool_calls else '' }}"
    "<|end|>{% endgeneration %}\n{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}" + ASK
)
# What ends a reply is a block of its own.
MARKS_THE_END = MARKS.replace(
    "<|end|>{% endgeneration %}\n", "{% endgeneration %}{{ '\n' }}{% generation %}<|end|>{% endgeneration %}\n"
)
# The block of a reply with calls was forgotten.
MARKS_SOME = MARKS.replace(
    "{% generation %}{{ m.content }}{{ (m.tool_calls | tojson) if m.tool_calls else '' }}<|end|>"
    "{% endgeneration %}",
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}<|end|>{% else %}{% generation %}{{ m.content }}"
    "<|end|>{% endgeneration %}{% endif %}",
)
# In a macro a block does not know how much of it stands before.
MARKS_IN_A_MACRO = (
    "{% macro say(m) %}<|assistant|>{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% endmacro %}{% for m in messages %}{% if m.role == 'assistant' %}{{ say(m) }}{% else %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}" + ASK
)

# The prompt ends in a space, which belongs to the reply's first token; there is no end token.
PLAIN = (
    "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)

# Drops replies that others follow.
FORGETS = (
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}<|{{ m.role }}|>"
    "{{ m.content }}<|end|>\n{% endif %}{% endfor %}" + ASK
)

# Ends turns that are followed in another way than the last one.
ENDS_TWICE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if loop.last and not "
    "add_generation_prompt %}<|eos|>{% else %}{{ '\n' }}{% endif %}{% endfor %}" + ASK
)
