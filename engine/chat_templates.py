"""Chat templates by name, in the Jinja that transformers and llama.cpp read."""

# What Llama-2-Chat was trained on. BOS opens each turn of the user, EOS closes each answer.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('after one system message at most, user and assistant must take turns') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token }}{{ '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)

# The form of Anthropic's HH data, for tools that read models which were trained on it. Training and chat.py write this
# form themselves, as plain text in which no special token counts (engine/formats.py). BOS goes before it where the
# tokenizer puts that before any text.
BOS = "{{ bos_token }}"
HH = (
    "{% for message in messages if message['role'] == 'system' %}{{ message['content'] }}{% endfor %}"
    "{% for message in messages if message['role'] != 'system' %}"
    "{{ '\\n\\nHuman: ' if message['role'] == 'user' else '\\n\\nAssistant: ' }}{{ message['content'] }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)

JINJA = {"hh": HH, "llama2": LLAMA2}
