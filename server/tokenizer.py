"""Text to token ids and back, for the api process and for `LLM`.

Reads tokenizer.json, tokenizer_config.json and the chat template of a checkpoint with `tokenizers` and jinja2. Serves
byte-level BPE, the kind of every Qwen3.5 checkpoint: each token is a fixed run of bytes, so text can be built token by
token (`Detokenizer`: never half a character, cut at stop strings). Knows neither HTTP nor the engine. No torch.
"""

import codecs
import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox
import tokenizers

from server.errors import CheckpointError, ConfigError, InvalidRequest
from server.messages import SamplingParams

# What rendering a template with a client's values can raise; every other exception is our own mistake.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
# Template variables that are fields of a request: one that set them twice would say two things.
_RESERVED_VARIABLES = ("messages", "add_generation_prompt", "tools")
# Stands where the last message's content ends while a template renders it; a template that trims content takes the
# space.
_END_OF_CONTENT = "[[end of content]] "
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# What tells a template from the name of a file.
_TEMPLATE_CHARS = frozenset("{}\n")


class Tokenizer:
    """The tokenizer and chat template of one checkpoint directory. Raises CheckpointError where they cannot be read.

    `template` is a chat template to take instead of the checkpoint's.
    """

    def __init__(self, directory: str | Path, template: str | None = None):
        path = Path(directory)
        self._tokenizer = _load_tokenizer(path / "tokenizer.json")
        config = _load_json(path / "tokenizer_config.json")
        self._named_tokens = {name: _token_text(path, name, config[name]) for name in _NAMED_TOKENS if config.get(name)}
        template = _find_template(path, config) if template is None else template
        self._template = _compile_template(template)
        # What others need to do the same.
        self.description = {
            "tokenizer_class": config.get("tokenizer_class", "PreTrainedTokenizerFast"),
            **{name: self._named_tokens.get(name) for name in _NAMED_TOKENS},
            "add_bos_token": config.get("add_bos_token", False),
            "chat_template": template,
        }
        self._byte_of_char = _byte_of_char()
        self._bytes_of_token: dict[int, bytes] = {}
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocab:
            raise CheckpointError(f"{path / 'tokenizer.json'} has no tokens")
        self.vocab_size = len(vocab)
        # Characters of text that one token can stand for, at most (a token's bytes are never fewer).
        self.longest_token_len = max(map(len, vocab))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it become their ids."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of every text. Releases the GIL, unlike tokenizers' own `encode`."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of all tokens; bytes that are not UTF-8 become U+FFFD. Ids without a token give nothing."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes(i) for i in token_ids if i not in skipped).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; empty for an id without a token (padding of the embedding)."""
        found = self._bytes_of_token.get(token_id)
        if found is None:
            found = self._bytes_of_token[token_id] = self._compute_bytes(token_id)
        return found

    def token_id(self, token: str) -> int | None:
        """The id of the token with exactly this text, None when there is none."""
        return self._tokenizer.token_to_id(token)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] = MappingProxyType({}),
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
    ) -> str:
        """The prompt text of a conversation. Raises InvalidRequest.

        `variables` are further ones for the template, `template` one to take instead of the checkpoint's.
        """
        compiled = self._template if template is None else _compile_request_template(template)
        if compiled is None:
            raise InvalidRequest("this checkpoint has no chat template; use /v1/completions", param="messages")
        reserved = next((name for name in _RESERVED_VARIABLES if name in variables), None)
        if reserved is not None:
            raise InvalidRequest(
                f"chat_template_kwargs sets {reserved}, which is a field of the request itself; set that",
                "chat_template_kwargs",
            )
        own = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": tools}
        try:
            return compiled.render({"documents": None, **self._named_tokens, **variables, **own})
        except _RENDER_ERRORS as error:
            raise InvalidRequest(f"the chat template refused the messages: {str(error)[:200]}", "messages") from error

    def continue_final_message(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] = MappingProxyType({}),
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
    ) -> str:
        """The prompt text of a conversation up to the end of its last message's content, for the model to go on there.

        As `apply_chat_template` otherwise.
        """
        last = {**messages[-1], "content": messages[-1]["content"] + _END_OF_CONTENT}
        text = self.apply_chat_template([*messages[:-1], last], False, variables, tools, template)
        before, mark, after = text.rpartition(_END_OF_CONTENT.rstrip())
        if not mark:
            raise InvalidRequest(
                "continue_final_message is true, but the chat template leaves out the last message's content",
                "messages",
            )
        return before if after.startswith(" ") else before.rstrip()

    def _compute_bytes(self, token_id: int) -> bytes:
        text = self._tokenizer.id_to_token(token_id)
        if text is None:
            return b""
        values = [self._byte_of_char.get(char) for char in text]
        # Added tokens are plain text: one with a character outside the byte alphabet stands for itself.
        return text.encode() if None in values else bytes(values)  # type: ignore[arg-type]


class Detokenizer:
    """The text of one request so far; its total cost is linear in the output, whatever the stop strings.

    The deltas of `push` and `finish` add up to `Tokenizer.decode` of all pushed tokens, cut at the first stop string.
    After a match `stop_match` names the stop string and every later call gives nothing. `num_used` counts the tokens
    up to and including the one that completed the match (all pushed tokens while nothing has matched).
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if sampling.skip_special_tokens else frozenset()
        self._min_tokens = sampling.min_tokens
        self._keeps_stop_text = sampling.include_stop_str_in_output
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._matcher = StopMatcher(sampling.stop) if sampling.stop else None
        self.stop_match: str | None = None
        self.num_used = 0

    def push(self, token_ids: Sequence[int], ends_with_stop_token: bool = False) -> str:
        """New text that is certain, given the next tokens.

        A stop token (eos or one of stop_token_ids) ends the request and gives no text of its own, unless
        include_stop_str_in_output asks for it.
        """
        num_silent = 1 if token_ids and ends_with_stop_token and not self._keeps_stop_text else 0
        num_spoken = len(token_ids) - num_silent
        text = self._push_spoken(token_ids[:num_spoken])
        if self.stop_match is None:
            self.num_used += num_silent
        return text

    def finish(self) -> str:
        """The text held back, once no more tokens come: a possible stop-string prefix and an unfinished character."""
        if self.stop_match is not None:
            return ""
        rest = self._utf8.decode(b"", final=True)
        if self._matcher is None:
            return rest
        text = self._match(rest)
        return text if self.stop_match is not None else text + self._matcher.take_held()

    def _push_spoken(self, token_ids: Sequence[int]) -> str:
        if self._matcher is None:
            self.num_used += len(token_ids)
            return self._utf8.decode(b"".join(map(self._bytes, token_ids)))
        parts = []
        for token_id in token_ids:
            if self.stop_match is not None:
                break
            self.num_used += 1
            parts.append(self._match(self._utf8.decode(self._bytes(token_id))))
        return "".join(parts)

    def _bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._skipped else self._tokenizer.token_bytes(token_id)

    def _match(self, text: str) -> str:
        assert self._matcher is not None
        certain, match = self._matcher.push(text, counts=self.num_used > self._min_tokens)
        if match is not None:
            self.stop_match = match
            certain += match if self._keeps_stop_text else ""
        return certain


class StopMatcher:
    """Finds the first of several strings in a text that arrives in pieces (Knuth-Morris-Pratt, one state per string).

    The match that ends first wins, and of those that end together the longest: the result does not depend on how the
    text is cut into pieces. The text held back is a prefix of the string that has matched furthest, so it is never
    stored. `strings` are not empty.
    """

    def __init__(self, strings: Sequence[str]):
        self._strings = strings
        self._borders = [_borders(string) for string in strings]
        self._matched = [0] * len(strings)

    def push(self, text: str, counts: bool = True) -> tuple[str, str | None]:
        """(text that is certain, the string found or None). A find is passed over while `counts` is false."""
        source, num_held = self._furthest()
        for i, char in enumerate(text):
            found = self._advance(char)
            if found is not None and counts:
                end = num_held + i + 1 - len(found)
                return self._cut(source, num_held, text, end), found
        num_certain = num_held + len(text) - self._furthest()[1]
        return self._cut(source, num_held, text, num_certain), None

    def take_held(self) -> str:
        """The text held back, which is then no longer held."""
        source, num_held = self._furthest()
        self._matched = [0] * len(self._strings)
        return source[:num_held]

    def _furthest(self) -> tuple[str, int]:
        index = max(range(len(self._strings)), key=self._matched.__getitem__)
        return self._strings[index], self._matched[index]

    def _advance(self, char: str) -> str | None:
        found = ""
        for i, string in enumerate(self._strings):
            matched = self._matched[i]
            while matched and string[matched] != char:
                matched = self._borders[i][matched - 1]
            matched += string[matched] == char
            if matched == len(string):
                found = max(found, string, key=len)
                matched = self._borders[i][-1]
            self._matched[i] = matched
        return found or None

    @staticmethod
    def _cut(source: str, num_held: int, text: str, length: int) -> str:
        """The first `length` characters of the held text (a prefix of `source`) followed by `text`."""
        if length <= num_held:
            return source[:length]
        return source[:num_held] + text[: length - num_held]


def _byte_of_char() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for (GPT-2's table, inverted).

    Printable Latin-1 bytes stand for themselves; the others are numbered from U+0100 in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    text = _read_text(path)
    if text is None:
        raise CheckpointError(f"{path} does not exist; a served checkpoint directory holds its tokenizer.json")
    content = _parse_object(path, text)
    for part, kind in (("model", "BPE"), ("decoder", "ByteLevel")):
        found = content.get(part)
        name = found.get("type") if isinstance(found, dict) else found
        if name != kind:
            raise CheckpointError(f"{path} has a {part} of type {name}; only {kind} is served (Qwen3.5's kind)")
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for everything it cannot read
        raise CheckpointError(f"{path} cannot be read by tokenizers: {error}") from error


def _load_json(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    return {} if text is None else _parse_object(path, text)


def _parse_object(path: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, it must be a JSON object")
    return content


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _token_text(path: Path, name: str, entry: Any) -> str:
    """A token's text: the entry itself, or its `content`."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise CheckpointError(
            f"{path / 'tokenizer_config.json'} has the {name} {str(entry)[:60]}, it must be a text or have a content"
        )
    return text


def read_template(text: str) -> str:
    """The chat template that `--chat-template` gives: the file of this name, or the text itself where it has what no
    name has. Raises ConfigError."""
    if not _TEMPLATE_CHARS.isdisjoint(text):
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {text} cannot be read: {error}") from error


def _find_template(path: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's chat_template: a text, or a list with one named default."""
    own_file = _read_text(path / "chat_template.jinja")
    found = config.get("chat_template") if own_file is None else own_file
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = named[0].get("template", named[0]) if named else None
    if found is not None and not isinstance(found, str):
        raise CheckpointError(
            f"{path / 'tokenizer_config.json'} has the chat_template {str(found)[:60]}, it must be a text, or a list "
            "with a text as the `template` of the entry named `default`"
        )
    return found


@functools.lru_cache(maxsize=16)
def _compile_request_template(text: str) -> jinja2.Template:
    try:
        return _compile(text)
    except jinja2.TemplateSyntaxError as error:
        raise InvalidRequest(
            f"chat_template is broken at line {error.lineno}: {str(error.message)[:200]}", "chat_template"
        ) from error


def _compile_template(text: str | None) -> jinja2.Template | None:
    try:
        return None if text is None else _compile(text)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"the chat template is broken at line {error.lineno}: {error.message}") from error


def _compile(text: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(text)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter as Hugging Face templates know it; jinja2's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _borders(string: str) -> list[int]:
    """For every prefix of `string`: the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(string)
    for i in range(1, len(string)):
        length = borders[i - 1]
        while length and string[i] != string[length]:
            length = borders[length - 1]
        borders[i] = length + (string[i] == string[length])
    return borders
