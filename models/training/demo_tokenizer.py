"""The demo checkpoint's tokenizer and chat template: small, in the form of Qwen3.5's.

Byte-level BPE over NFC text, every digit a token of its own, ChatML turns. Knows text and token ids, never models.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)
# Added, but not special: decoding keeps them.
MARKUP_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

_ADDED = re.compile("|".join(map(re.escape, SPECIAL_TOKENS + MARKUP_TOKENS)))
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content is none or content is undefined -%}
{%- else -%}
{%- for part in content -%}
{%- if part.type != 'text' -%}{{ raise_exception('Only text content is supported, not ' ~ part.type) }}{%- endif -%}
{{ part.text }}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro text_of_call(call) -%}
{%- set function = call.function if call.function is defined else call -%}
{{ '<tool_call>\\n<function=' ~ function.name ~ '>\\n' }}
{%- for key, value in function.arguments | items -%}
{{ '<parameter=' ~ key ~ '>\\n' ~ (value if value is string else value | tojson) ~ '\\n</parameter>\\n' }}
{%- endfor -%}
{{ '</function>\\n</tool_call>' }}
{%- endmacro -%}
{%- set newest = namespace(query=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set newest.query = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- set has_system = messages and messages[0].role == 'system' -%}
{%- if tools -%}
{{ '<|im_start|>system\\n# Tools\\n\\n<tools>\\n' }}
{%- for tool in tools -%}{{ tool | tojson ~ '\\n' }}{%- endfor -%}
{{ '</tools>\\n\\nCall one like this:\\n<tool_call>\\n<function=NAME>\\n<parameter=KEY>\\nVALUE\\n</parameter>\\n' -}}
{{ '</function>\\n</tool_call>' ~ ('\\n\\n' ~ text_of(messages[0].content) if has_system else '') ~ '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- set text = text_of(message.content) -%}
{%- if message.role == 'system' -%}
{%- if not loop.first -%}{{ raise_exception('System message must be at the beginning.') }}{%- endif -%}
{%- if not tools -%}{{ '<|im_start|>system\\n' ~ text ~ '<|im_end|>\\n' }}{%- endif -%}
{%- elif message.role == 'user' -%}
{{ '<|im_start|>user\\n' ~ text ~ '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' -%}
{%- set thought = (message.reasoning_content or '').strip('\\n') -%}
{%- if '</think>' in text -%}
{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{ '<|im_start|>assistant\\n' }}
{%- if loop.index0 > newest.query -%}{{ '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' }}{%- endif -%}
{{ text }}
{%- for call in message.tool_calls or [] -%}
{{ ('\\n' if text or not loop.first else '') ~ text_of_call(call) }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\\n<tool_response>\\n' ~ text ~ '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
{%- else -%}
{{ raise_exception('Unexpected message role: ' ~ message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n<think>\\n' }}
{%- if enable_thinking is not defined or enable_thinking is not true -%}
{{ '\\n</think>\\n\\n' }}
{%- endif -%}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens, added ones included and last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(MARKUP_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in _ADDED.split(text) if piece)
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "added_tokens_decoder": _describe_added_tokens(tokenizer),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def find_stop_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Give the ids of `<|im_end|>` and `<|endoftext|>`, which end a completion."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return vocabulary[END_OF_TURN], vocabulary[END_OF_TEXT]


def render_chat(messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True, **variables: object) -> str:
    """Render messages through the chat template; raises `jinja2.TemplateError` for a role it does not know."""
    return _TEMPLATE.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)


def _describe_added_tokens(tokenizer: Tokenizer) -> dict[str, dict[str, object]]:
    """Describe the added tokens by id, as tokenizer_config.json lists them."""
    return {
        str(token_id): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }


def _raise_exception(message: str) -> NoReturn:
    """Give templates a way to refuse a conversation."""
    raise jinja2.TemplateError(message)


def _to_json(value: object) -> str:
    """Give JSON as Hugging Face templates know it; jinja2's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=False)


def _compile_template() -> jinja2.Template:
    """Compile the chat template in a sandbox, as servers do."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _to_json
    return environment.from_string(CHAT_TEMPLATE)


_TEMPLATE = _compile_template()
