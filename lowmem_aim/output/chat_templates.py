"""Chat templates that a recipe may name, written after the formats that the models' makers publish, in Jinja.

A template turns messages (`role`, `content`) into the text that a model of that kind was tuned on. `chatml` is of
OpenAI and Qwen, `alpaca` of Stanford Alpaca, `llama3` of Meta, `mistral` of Mistral AI, `exaone` of LG AI Research.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_ALPACA = """\
{{- bos_token if bos_token else '' -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- message['content'] + '\\n\\n' -}}
{%- elif message['role'] == 'user' -%}
{{- '### Instruction:\\n' + message['content'] + '\\n\\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- '### Response:\\n' + message['content'] + (eos_token if eos_token else '') + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '### Response:\\n' -}}
{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token if bos_token else '' -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

_MISTRAL = """\
{%- set ns = namespace(system='') -%}
{{- bos_token if bos_token else '' -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = message['content'] + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '[INST] ' + ns.system + message['content'] + ' [/INST]' -}}
{%- set ns.system = '' -%}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' + message['content'] | trim + (eos_token if eos_token else '') -}}
{%- endif -%}
{%- endfor -%}
"""

_EXAONE = """\
{%- if messages and messages[0]['role'] != 'system' -%}
{{- '[|system|][|endofturn|]\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '[|' + message['role'] + '|]' + message['content'] -}}
{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '[|assistant|]' -}}
{%- endif -%}
"""

TEMPLATES = {"alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL}


def most_frequent(templates: Iterable[str]) -> str:
    """The template that most models have, without outer spaces; of several, the first; empty if there is none."""
    found = Counter(template.strip() for template in templates if template.strip())
    return found.most_common(1)[0][0] if found else ""
