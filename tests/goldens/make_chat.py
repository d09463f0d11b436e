"""Makes chat_families.json beside this script: conversations as transformers' apply_chat_template renders them.

    python tests/goldens/make_chat.py

Needs transformers and jinja2, not torch. Last made with transformers 5.24.0 and jinja2 3.1.6.

The templates are written for these tests: each does what its family's own template does, with the same constructs of
Jinja, in fewer words. Per family the file has

templates  name -> Jinja source
cases      list of {"messages", "arguments", and "text" or "error"}; arguments are those of apply_chat_template
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """{% for message in messages %}
{% if loop.first and message.role != 'system' %}{{ '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not tools_in_user_message is defined %}{% set tools_in_user_message = true %}{% endif %}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}{% set system = messages[0]['content']|trim %}
    {%- else %}{% set system = messages[0]['content'][0]['text']|trim %}{% endif %}
    {%- set messages = messages[1:] %}
{%- else %}{% set system = "" %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{ "Environment: ipython\\n" }}{% endif %}
{%- if builtin_tools is defined %}{{ "Tools: " + builtin_tools | reject('equalto', 'code_interpreter') | join(", ") + "\\n\\n" }}{% endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {%- for t in tools %}{{ t | tojson(indent=4) }}{{ "\\n\\n" }}{% endfor %}
{%- endif %}
{{- system }}{{ "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length == 0 %}{{ raise_exception("There is no first user message to put the tools in") }}{% endif %}
    {%- set first = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nAnswer with a call of a function:\\n' }}
    {%- for t in tools %}{{ t | tojson(indent=4) }}{{ "\\n\\n" }}{% endfor %}
    {{- first + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{ raise_exception("One call at a time!") }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {%- if builtin_tools is defined and call.name in builtin_tools %}
            {{- "<|python_tag|>" + call.name + ".call(" }}
            {%- for name, value in call.arguments | items %}{{ name + '="' + value + '"' }}{% if not loop.last %}, {% endif %}{% endfor %}
            {{- ")<|eom_id|>" }}
        {%- else %}
            {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ "}<|eot_id|>" }}
        {%- endif %}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}{{ message.content | tojson }}
        {%- else %}{{ message.content }}{% endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{% endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string
            and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{% set content = message.content %}{% else %}{% set content = '' %}{% endif %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}{% set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{ '<|im_start|>' + message.role + '\\n' + content }}{% endif %}
        {%- if message.tool_calls %}
            {%- for call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{ '\\n' }}{% endif %}
                {%- if call.function %}{% set call = call.function %}{% endif %}
                {{- '<tool_call>\\n{"name": "' }}{{ call.name }}{{ '", "arguments": ' }}
                {%- if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' }}{{ content }}{{ '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}
    {%- set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{%- set users = turns | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in turns %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Conversation roles must alternate user and assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == users[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, value in tool.items() if key != "return" %}
                    {%- if value is string %}{{ '"' + key + '": "' + value + '"' }}
                    {%- else %}{{ '"' + key + '": ' + value|tojson }}{% endif %}
                    {%- if not loop.last %}{{ ", " }}{% endif %}
                {%- endfor %}
                {{- "}}" }}{% if not loop.last %}{{ ", " }}{% else %}{{ "]" }}{% endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system is defined %}{{ "[INST] " + system + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{ "[INST] " + message["content"] + "[/INST]" }}{% endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {%- set out = call.function|tojson %}
            {{- out[:-1] }}
            {%- if not call.id is defined or call.id|length != 9 %}{{ raise_exception("Ids of tool calls have 9 characters!") }}{% endif %}
            {{- ', "id": "' + call.id + '"}' }}{% if not loop.last %}{{ ", " }}{% else %}{{ "]" + eos_token }}{% endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{ " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception("Only user and assistant roles are supported, after a system message!") }}
    {%- endif %}
{%- endfor %}
"""

GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}{%- set prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
    {%- set turns = messages[1:] -%}
{%- else -%}{%- set prefix = "" -%}{%- set turns = messages -%}{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

PHI3 = """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}
{{- '<|system|>\\n' + message['content'] + '<|end|>\\n' }}
{%- elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}
{%- elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

PHI4 = """{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""

COMMAND_R = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{%- set turns = messages[1:] %}{% set system = messages[0]['content'] %}
{%- else %}{% set turns = messages %}{% set system = false %}{% endif %}
{%- if system != false %}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system + '<|END_OF_TURN_TOKEN|>' }}{% endif %}
{%- for message in turns %}{% set content = message['content'] %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}
{%- if message['role'] == 'user' %}{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- else %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'  + content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""

COMMAND_R_TOOLS = """{%- macro python_type(schema) %}
{%- set names = {"string": "str", "number": "float", "integer": "int", "boolean": "bool"} %}
{%- if names[schema.type] is defined %}{{ names[schema.type] }}
{%- elif schema.type == "array" %}{{ "List[" + python_type(schema["items"]) + "]" }}
{%- elif schema.type == "object" %}
    {%- if schema.additionalProperties is defined %}{{ "Dict[str, " + python_type(schema.additionalProperties) + ']' }}
    {%- else %}Dict{% endif %}
{%- elif schema.type is iterable %}Union[
    {%- for t in schema.type %}{{ python_type({"type": t}) }}{% if not loop.last %},{% endif %}{% endfor %}]
{%- endif %}
{%- endmacro %}
{%- macro signature(parameters) %}
{%- for name, field in parameters.properties.items() | sort %}
    {{- name }}: {% if name not in parameters.required %}Optional[{{ python_type(field) }}] = None
    {%- else %}{{ python_type(field) }}{% endif %}
    {%- if not loop.last %}, {% endif %}
{%- endfor %}
{%- endmacro %}
{{- bos_token }}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>## Tools
```python
{% for tool in tools %}{% if loop.index0 != 0 %}{{ '\\n\\n' }}{% endif %}
{%- if tool.function is defined %}{% set tool = tool.function %}{% endif -%}
def {{ tool.name }}({{ signature(tool.parameters) }}):
    \"\"\"{{ tool.description | wordwrap(40) | indent(4) }}\"\"\"
    pass{% endfor %}
```<|END_OF_TURN_TOKEN|>
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls is defined %}
        {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{{ message.content | default('', true) }}Action: ```json
[
{%- for call in message.tool_calls %}
    {{- {"tool_name": call.function.name, "parameters": call.function.arguments} | tojson(indent=4) }}{% if not loop.last %},{% endif %}
{%- endfor %}
]```<|END_OF_TURN_TOKEN|>
    {%- elif message.role == 'tool' %}
        {{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><results>\\n' }}{{ message.content }}{{ '</results><|END_OF_TURN_TOKEN|>' }}
    {%- else %}{{ '<|START_OF_TURN_TOKEN|><|' ~ message.role | upper ~ '_TOKEN|>' ~ message.content ~ '<|END_OF_TURN_TOKEN|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""

COMMAND_R_RAG = """{{ bos_token }}{% for document in documents %}{{ '\\nDocument: ' }}{{ loop.index0 }}
{% for key, value in document.items() %}{{ key | title }}: {{ value }}
{% endfor %}{% endfor %}{{ messages[-1].content.strip() }}"""

GRANITE3 = """{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}
{%- else %}
    {%- set system = "Today's Date: " + (today or strftime_now('%B %d, %Y')) + ".\\nYou are an assistant" %}
    {%- if tools and documents %}{% set system = system + " with tools and documents." %}
    {%- elif tools %}{% set system = system + " with tools." %}
    {%- elif documents %}{% set system = system + " with documents." %}
    {%- else %}{% set system = system + "." %}{% endif %}
    {%- if 'citations' in controls and documents %}{% set system = system + ' Cite them.' %}{% endif %}
    {%- set turns = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\\n' }}
{%- if tools %}{{ '<|start_of_role|>tools<|end_of_role|>' }}{{ tools | tojson(indent=4) }}{{ '<|end_of_text|>\\n' }}{% endif %}
{%- if documents %}
    {{- '<|start_of_role|>documents<|end_of_role|>' }}
    {%- for document in documents %}
        {{- 'Document ' + loop.index0 | string + '\\n' + document['text'] }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}
    {%- endfor %}
    {{- '<|end_of_text|>\\n' }}
{%- endif %}
{%- for message in turns %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant' }}{% if controls %}{{ ' ' + controls | tojson() }}{% endif %}{{ '<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}"""

SMOLLM3 = """{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}
{%- set mode = "/think" if enable_thinking else "/no_think" %}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content %}
    {%- if "/no_think" in system %}{% set mode = "/no_think" %}{% elif "/think" in system %}{% set mode = "/think" %}{% endif %}
    {%- set custom = system.replace("/no_think", "").replace("/think", "").rstrip() %}
{%- endif %}
{{- "<|im_start|>system\\nReasoning Mode: " ~ mode ~ "\\n\\n" }}
{%- if custom %}{{ custom ~ "\\n\\n" }}{% endif %}
{%- if xml_tools or python_tools or tools %}
    {%- set ns = namespace(listed="<tools>\\n") %}
    {%- for tool in (xml_tools or tools or []) %}
        {%- set ns.listed = ns.listed ~ (tool.function | string if tool.function else tool | string) ~ "\\n" %}
    {%- endfor %}
    {{- ns.listed + "</tools>\\n\\n" }}
{%- endif %}
{{- "<|im_end|>\\n" }}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else "" %}
    {%- if message.role == "user" %}{{ "<|im_start|>user\\n" + content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" %}
        {%- generation %}
        {%- set content = content.lstrip("\\n") %}
        {%- if mode == "/think" %}{{ "<|im_start|>assistant\\n" + content + "<|im_end|>\\n" }}
        {%- else %}{{ "<|im_start|>assistant\\n<think>\\n\\n</think>\\n" + content + "<|im_end|>\\n" }}{% endif %}
        {%- endgeneration %}
        {%- if content is string and content.startswith("\\n") %}{{ "(untouched)" }}{% endif %}
    {%- elif message.role == "tool" %}{{ "<|im_start|>user\\n" + content + "<|im_end|>\\n" }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}
{%- if mode == "/no_think" %}{{ "<think>\\n\\n</think>\\n" }}{% endif %}{% endif %}"""

OLMO2 = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + '\\n' }}
{%- elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '\\n' }}
{%- elif message['role'] == 'assistant' %}
{%- if not loop.last %}{{ '<|assistant|>\\n' + message['content'] + eos_token + '\\n' }}
{%- else %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% endif %}{% endif %}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""

DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(is_first=true, system='') %}
{%- for message in messages %}{% if message['role'] == 'system' %}
{%- set ns.system = (ns.system if ns.is_first else ns.system + '\\n\\n') + message['content'] %}
{%- set ns.is_first = false %}{% endif %}{% endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif %}
{%- if message['role'] == 'assistant' and message['content'] is not none %}
{%- set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""

EXAONE = """{% for message in messages %}
{%- if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}
{{- '[|' + message['role'] + '|]' + message['content'] }}
{%- if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '[|endofturn|]\\n' }}{% endif %}
{%- if loop.index > 6 %}{% break %}{% elif loop.index0 % 2 %}{% continue %}{% endif %}{{ '' }}{% endfor %}
{%- if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"""

USER = [{"role": "user", "content": " What's <b>2 & 2</b>? é😀 "}]
TALK = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": " 1 "},
    {"role": "assistant", "content": "\n<think>\nhm\n</think>\n\n {{ 2 }}"},
    {"role": "user", "content": "3"},
]
ANSWERED = [*USER, {"role": "assistant", "content": "It is 4 "}]
PARTS = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]},
]
PARTS_ANSWERED = [*PARTS, {"role": "assistant", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "and"}]}]
FIELDS = {
    "place": {"type": "string", "description": "Köln"},
    "days": {"type": "array", "items": {"type": "integer"}},
    "unit": {"type": ["string", "number"]},
    "more": {"type": "object", "additionalProperties": {"type": "boolean"}},
}
ABOUT = 'The weather at a place, with "quotes" & <signs>, é: a description long enough to be wrapped.'
SCHEMA = {"type": "object", "properties": FIELDS, "required": ["place"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": ABOUT, "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "Time", "parameters": {"type": "object", "properties": {}}}}
TOOLS = {"tools": [WEATHER, CLOCK]}
CALL = {"type": "function", "id": "call12345", "function": {"name": "weather", "arguments": {"place": "Köln <b>"}}}
CALLED = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "call12345", "content": '{"rain": true}'},
]
CALLED_JSON = [*CALLED[:1], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": {"rain": [1, None]}}]
BOTH = {"role": "assistant", "content": "Both.", "tool_calls": [CALL, {"function": {"name": "clock", "arguments": "{}"}}], "name": None}
CALLED_TWICE = [*CALLED[:1], BOTH, {"role": "tool", "content": "rain"}, {"role": "tool", "content": "noon"}]
REASONED = [*USER, {"role": "assistant", "content": "4", "reasoning": "\n2 and 2\n"}]
DOCUMENTS = {"documents": [{"title": "One", "text": "first é"}, {"title": "Two", "text": "second"}]}
PROMPT, OPEN = {"add_generation_prompt": True}, {"continue_final_message": True}
DATE, TODAY = {"date_string": "26 Jul 2024"}, {"today": "May 1, 2025"}

NO_THINKING = [{"role": "system", "content": "Hi /no_think"}, *TALK[1:]]

FAMILIES: dict[str, tuple[dict[str, str], list[tuple[list[dict[str, Any]], dict[str, Any]]]]] = {
    "chatml": ({"default": CHATML}, [(USER, PROMPT), (TALK, {}), (ANSWERED, OPEN), (PARTS, {})]),
    "llama3": (
        {"default": LLAMA3},
        [
            (USER, {**DATE, **PROMPT}),
            (TALK, DATE),
            (PARTS[:1] + USER, DATE),
            (CALLED, {**DATE, **TOOLS, **PROMPT}),
            (CALLED_JSON, {**DATE, **TOOLS, "tools_in_user_message": False}),
            (CALLED, {**DATE, "builtin_tools": ["weather", "code_interpreter"], "custom_tools": [CLOCK]}),
            (CALLED_TWICE, DATE),
            (TALK[:1], {**DATE, **TOOLS}),
            (ANSWERED, {**DATE, **OPEN}),
        ],
    ),
    "qwen3": (
        {"default": QWEN3},
        [
            (TALK, PROMPT),
            (USER, {**PROMPT, "enable_thinking": False}),
            (CALLED, {**TOOLS, **PROMPT}),
            (TALK[:1] + CALLED_TWICE, TOOLS),
            (REASONED, {}),
            (REASONED, OPEN),
            ([*USER, {"role": "assistant", "content": "", "thinking": "Two"}], {"continue_final_message": "thinking"}),
        ],
    ),
    "mistral": (
        {"default": MISTRAL},
        [
            (TALK, {}),
            (CALLED, TOOLS),
            ([*CALLED, *ANSWERED[1:], *USER], TOOLS),
            (CALLED_TWICE, TOOLS),
            (USER * 2, {}),
            (ANSWERED, OPEN),
            ([*USER, {"role": "x", "content": ""}, *USER], {}),
        ],
    ),
    "gemma3": ({"default": GEMMA3}, [(TALK, PROMPT), (PARTS, PROMPT), (USER * 2, {}), (PARTS_ANSWERED, OPEN), (TALK[:3], {})]),
    "phi3": ({"default": PHI3}, [(TALK, PROMPT), (USER, {})]),
    "phi4": ({"default": PHI4}, [(TALK, PROMPT), ([{**TALK[0], "tools": "[]"}, *USER], {}), ([{**TALK[0], "tools": None}, *USER], {})]),
    "command-r": (
        {"default": COMMAND_R, "tool_use": COMMAND_R_TOOLS, "rag": COMMAND_R_RAG},
        [
            (TALK, PROMPT),
            (USER, {**TOOLS, **PROMPT}),
            (CALLED, {**TOOLS, **PROMPT}),
            (USER, {"tools": []}),
            (USER, {**DOCUMENTS, "chat_template": "rag"}),
            (USER * 2, {}),
        ],
    ),
    "granite3": (
        {"default": GRANITE3},
        [
            (TALK, PROMPT),
            (USER, {**TODAY, **TOOLS, **DOCUMENTS, **PROMPT}),
            (USER, {**TODAY, **DOCUMENTS, **PROMPT, "controls": {"citations": True, "length": "é"}}),
        ],
    ),
    "smollm3": (
        {"default": SMOLLM3},
        [(TALK, PROMPT), (NO_THINKING, PROMPT), (USER, {**PROMPT, "enable_thinking": False, "xml_tools": [CLOCK]}), (CALLED, TOOLS)],
    ),
    "olmo2": ({"default": OLMO2}, [(TALK, PROMPT), (TALK[:3], {}), (TALK, {"bos_token": "<other>"})]),
    "deepseek": ({"default": DEEPSEEK}, [(TALK, PROMPT), (TALK[:1] * 2 + CALLED, {}), (ANSWERED, OPEN)]),
    "exaone": ({"default": EXAONE}, [(TALK, PROMPT), (ANSWERED * 5, {})]),
}


def transformers_tokenizer(templates: dict[str, str]) -> Any:
    """A tokenizer of transformers that knows nothing but its templates and special tokens."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    found = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), **SPECIAL)
    found.chat_template = templates["default"] if list(templates) == ["default"] else templates
    return found


def render(tokenizer: Any, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> dict[str, str]:
    """{"text"}, or {"error"}: the first words of what transformers raises."""
    import jinja2

    try:
        return {"text": tokenizer.apply_chat_template(messages, tokenize=False, **arguments)}
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        return {"error": str(error).split("!")[0][:60]}


def main() -> None:
    golden = {}
    for name, (templates, cases) in FAMILIES.items():
        tokenizer = transformers_tokenizer(templates)
        rows = [{"messages": m, "arguments": a, **render(tokenizer, m, a)} for m, a in cases]
        golden[name] = {"templates": templates, "cases": rows}
    text = json.dumps(golden, ensure_ascii=False, indent=1)
    Path(__file__).with_name("chat_families.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
