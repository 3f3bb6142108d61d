// Which token wrote which text. The API sends an answer's text (reasoning, content) as deltas and its tokens apart from
// them: text may be held back, and markup (</think>, the XML of a call), stop strings and end tokens never become text.
// Knows nothing of the page.

// Lays tokens along text, in any order of arrival: `addText` and `addTokens` as they come, `take` what is certain.
export class Alignment {
  #segments = []; // {kind, text}: text that has no token yet; a call has none, only markup
  #tokens = []; // tokens that have no place yet, with their text
  #origins = "";
  #finished = false;
  #utf8 = new TextDecoder("utf-8", { ignoreBOM: true });

  // `kind` is "reasoning", "content" or "call".
  addText(kind, text) {
    const last = this.#segments.at(-1);
    if (last?.kind === kind) last.text += text;
    else if (text || kind === "call") this.#segments.push({ kind, text });
  }

  // `tokens` have bytes; `origins` has one letter for each: d accepted draft, t target, p prefill.
  addTokens(tokens, origins) {
    for (const token of tokens) {
      this.#tokens.push({ ...token, text: this.#utf8.decode(new Uint8Array(token.bytes), { stream: true }) });
    }
    this.#origins += origins;
  }

  // No more will come.
  finish() {
    this.#finished = true;
  }

  // The next pieces {kind, text, token}. A token without text has an empty one; text without a token comes at the end.
  take() {
    const pieces = [];
    while (this.#tokens.length) {
      const piece = this.#lay(this.#tokens[0].text);
      if (piece === null) break;
      const token = { ...this.#tokens.shift(), origin: this.#origins[0] ?? "" };
      this.#origins = this.#origins.slice(1);
      pieces.push({ ...piece, token });
    }
    if (!this.#finished) return pieces;
    const rest = this.rest();
    this.#segments = [];
    return [...pieces, ...rest.map((segment) => ({ ...segment, token: null }))];
  }

  // Text that is there already and waits for its tokens.
  rest() {
    return this.#segments.filter((segment) => segment.text);
  }

  // The place {kind, text} of the next token; null while more text must come to know it.
  #lay(text) {
    const hidden = { kind: "", text: "" };
    for (;;) {
      const [head, next] = this.#segments;
      if (head?.kind === "call") {
        if (!next || !begins(next.text, text)) return { kind: "call", text: "" };
        this.#segments.shift();
      } else if (head?.text) {
        const shown = this.#shownPart(head, text, this.#finished || Boolean(next));
        if (shown === null) return null;
        head.text = head.text.slice(shown.length);
        return shown ? { kind: head.kind, text: shown } : hidden;
      } else if (next) {
        this.#segments.shift();
      } else {
        return this.#finished ? hidden : null;
      }
    }
  }

  // What of a token's text stands at the head's start. Leading newlines after markup, and all from a stop string on,
  // are cut off by the server.
  #shownPart(head, text, isWhole) {
    const parts = [text, text.trimStart()].filter(Boolean);
    const whole = parts.find((part) => head.text.startsWith(part));
    if (whole) return whole;
    if (parts.some((part) => part.startsWith(head.text))) return isWhole ? head.text : null;
    const ends = Array.from({ length: text.length }, (_, i) => text.slice(i + 1));
    return ends.find((part) => head.text.startsWith(part)) ?? "";
  }
}

// The tokens {bytes, logprob, top} of a chunk's `logprobs`, in the form of either endpoint.
export function readTokens(logprobs) {
  if (logprobs?.content) {
    return logprobs.content.map(({ bytes, logprob, top_logprobs: top = [] }) => ({
      bytes,
      logprob,
      top: top.map((other) => [other.token, other.logprob]),
    }));
  }
  return (logprobs?.tokens ?? []).map((name, i) => ({
    bytes: bytesOfName(name),
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs?.[i] ?? {}).sort((a, b) => b[1] - a[1]),
  }));
}

// /v1/completions writes `bytes:\xe4` for a part of a character and `token_id:7` for an id without a token.
function bytesOfName(name) {
  if (name.startsWith("bytes:\\x")) return name.match(/[0-9a-f]{2}(?=\\|$)/g).map((hex) => parseInt(hex, 16));
  return name.startsWith("token_id:") ? [] : new TextEncoder().encode(name);
}

function begins(text, token) {
  const shown = token.trimStart();
  return shown !== "" && (text.startsWith(shown) || shown.startsWith(text));
}
