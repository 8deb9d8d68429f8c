"""Compares what `eval --show` makes of data files with what transformers makes of them: token ids, and which are learned.

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install transformers jinja2
    cargo build --release
    /tmp/venv/bin/python tests/interop/tokens_of_transformers.py target/release/neuroada-ckpt MODEL FILE...

MODEL is a folder with a tokenizer, such as SmolLM2-135M; its weights are not looked at. Each FILE holds instruction rows. Its rows
are compared as they are, and as conversations through the chat templates below. Exit code 1 where one token differs.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)

# Each uses what templates of well-known models use. None marks what is learned but the one that says so.
TEMPLATES = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "marked": """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message.content | trim }}<|im_end|>
{% endgeneration %}
    {%- else %}
<|im_start|>{{ message.role }}
{{ message.content.strip() }}<|im_end|>
    {%- endif %}
{%- endfor %}
""",
    "dated": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|im_start|>system\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|im_end|>" }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n\\n'+ message['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n\\n' }}
{%- endif %}
""",
    "tools": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
        {{- tool.function | tojson(indent=2) }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + reasoning + content.upper() }}
        {%- if message.tool_calls %}
            {%- for call in message.tool_calls %}
                {{- '\\n<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) ~ '}' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role in ['user', 'system', 'tool'] %}
        {%- for key, value in message.items() if key != 'role' %}
            {{- key }}={{ value }};
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
}


def rows_of(path):
    text = Path(path).read_text()
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]


def shown(binary, model, data, *more):
    line = [binary, "eval", model, "--data", data, "--show", "100000000", "--max-length", "100000", "--json", *more]
    out = json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout)
    return out["data"], [(example["tokens"], [tuple(span) for span in example["learned"]]) for example in out["examples"]]


def prompt_and_response(tokenizer, prompt, response):
    """What trainers for transformers do: both together, the tokens of the prompt are not learned."""
    alone, both = tokenizer(prompt)["input_ids"], tokenizer(prompt + response)["input_ids"]
    whole = both[: len(alone)] == alone
    if not whole:
        both = alone + tokenizer(response, add_special_tokens=False)["input_ids"]
    if both[-1] != tokenizer.eos_token_id:
        both.append(tokenizer.eos_token_id)
    return (both, [(max(len(alone), 1), len(both))]), whole


def compare(name, found, expected):
    different = [i for i, (a, b) in enumerate(zip(found, expected)) if a != b]
    tokens = sum(len(tokens) for tokens, _ in expected)
    good = not different and len(found) == len(expected)
    print(f"{'same' if good else 'DIFFERENT':9} {name}: {len(expected)} examples, {tokens} tokens; {len(different)} differ")
    if different:
        i = different[0]
        print("  first:", i, "\n  found   ", found[i], "\n  expected", expected[i])
    return good


def conversation(row, i, tools):
    messages = [{"role": "system", "content": "Be brief. "}] if i % 3 == 0 else []
    messages += [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": " " + row["output"] + "\n"}]
    if i % 2:
        messages += [{"role": "user", "content": "Why?\n"}, {"role": "assistant", "content": f"<think>\nä{i}\n</think>\n\nSo <it> is."}]
    if tools:
        messages[-1]["tool_calls"] = [{"function": {"name": "f", "arguments": {"x": [1, 2.5, None], "é": "<&'>"}}}]
        messages.append({"role": "tool", "content": "5", "id": i})
        messages.append({"role": "assistant", "content": "Fünf."})
    return messages


def main(binary, model, *files):
    tokenizer = AutoTokenizer.from_pretrained(model)
    good = True
    for file in files:
        rows = rows_of(file)
        report, found = shown(binary, model, file)
        expected, n_apart = [], 0
        for row in rows:
            if report["form"] == "commonsense":
                prompt, response = row["instruction"] + "\n", "the correct answer is " + row["answer"]
            else:
                prompt, response = ALPACA.format(row["instruction"]), row["output"]
            if response.strip():
                example, whole = prompt_and_response(tokenizer, prompt, response)
                expected.append(example)
                n_apart += not whole
        good &= compare(f"{file} as {report['form']}", found, expected)
        good &= n_apart == report["n_apart"]
        print(f"          {report['n_apart']} encoded in two parts (transformers: {n_apart}), {report['n_empty']} left out as empty")

        for name, template in TEMPLATES.items():
            with tempfile.TemporaryDirectory() as folder:
                base = Path(folder, "model")
                base.mkdir()
                for side in Path(model).glob("*.json"):
                    shutil.copy(side, base / side.name)
                base.joinpath("chat_template.jinja").write_text(template)
                local = AutoTokenizer.from_pretrained(base)
                tools = [{"type": "function", "function": {"name": "f", "description": "Ünï <b>", "parameters": {"n": 1.0}}}]
                some = [
                    {"messages": conversation(row, i, name == "tools"), "tools": tools if name == "tools" else None}
                    for i, row in enumerate(rows[:1000])
                ]
                data = Path(folder, "talks.jsonl")
                data.write_text("".join(json.dumps(row) + "\n" for row in some))
                # `dated` asks for today; both have the same day but at midnight.
                more = [] if name in ("chatml", "marked", "dated") else ["--loss", "all"]
                _, found = shown(binary, str(base), str(data), *more)
                expected = []
                for row in some:
                    arguments = {"tools": row["tools"], "tokenize": True, "return_dict": True}
                    whole = local.apply_chat_template(row["messages"], return_assistant_tokens_mask=name == "marked", **arguments)
                    ids = whole["input_ids"]
                    if more:
                        spans = [(1, len(ids))]
                    elif name == "marked":
                        spans = runs(whole["assistant_masks"])
                    else:
                        spans = turns(local, row, arguments)
                    expected.append((ids, spans))
                good &= compare(f"{file} as messages, template {name}", found, expected)
    return 0 if good else 1


def runs(mask):
    spans = []
    for i, learned in enumerate(mask):
        if learned and spans and spans[-1][1] == i:
            spans[-1] = (spans[-1][0], i + 1)
        elif learned:
            spans.append((i, i + 1))
    return spans


def turns(tokenizer, row, arguments):
    """Tokens that begin within what an assistant's turn adds to the text."""
    arguments = arguments | {"tokenize": False}
    text = tokenizer.apply_chat_template(row["messages"], **arguments)
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    spans = []
    for i, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            before = len(tokenizer.apply_chat_template(row["messages"][:i], add_generation_prompt=True, **arguments))
            after = len(tokenizer.apply_chat_template(row["messages"][: i + 1], **arguments))
            inside = [at for at, (begin, _) in enumerate(places) if before <= begin < after]
            spans.append((inside[0], inside[-1] + 1))
    return spans


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    os.environ.pop("SOURCE_DATE_EPOCH", None)
    sys.exit(main(*sys.argv[1:]))
