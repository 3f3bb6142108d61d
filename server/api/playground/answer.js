// One answer of the model as the page shows it: its thinking, its text token by token, and its calls as cards.
// Everything that a model or a user wrote goes through textContent.

import { Alignment, readTokens } from "./tokens.js";

// The token {bytes, logprob, top, origin, text} that a span stands for.
export const tokenOf = new WeakMap();

// A copy of the template's one element.
export function fromTemplate(id) {
  return document.getElementById(id).content.firstElementChild.cloneNode(true);
}

export class Answer {
  element = fromTemplate("answer-turn");
  reasoning = "";
  content = "";
  calls = [];
  finishReason = null;
  #alignment = new Alignment();
  #cards = [];
  #tails = {};
  #place = "";
  #wasFolded = false;

  // One entry of a chunk's `choices`, of either endpoint.
  push(choice) {
    const delta = choice.delta ?? { content: choice.text };
    this.#addText("reasoning", delta.reasoning_content ?? delta.reasoning);
    this.#addText("content", delta.content);
    for (const call of delta.tool_calls ?? []) this.#addCall(call);
    this.#alignment.addTokens(readTokens(choice.logprobs), choice.spec?.origins ?? "");
    this.finishReason = choice.finish_reason ?? this.finishReason;
  }

  // Shows what has come since the last call.
  render() {
    for (const piece of this.#alignment.take()) this.#addPiece(piece);
    for (const kind of ["reasoning", "content"]) {
      const waiting = this.#alignment.rest().find((segment) => segment.kind === kind);
      this.#tail(kind).textContent = waiting?.text ?? "";
    }
    this.calls.forEach(({ name, args }, i) => {
      this.#cards[i].querySelector("h3").textContent = name;
      this.#cards[i].querySelector(".arguments").textContent = args;
    });
    this.#fold();
  }

  // The last of it has come; `problem` says what went wrong.
  finish(note, problem = "") {
    this.#alignment.finish();
    this.render();
    this.element.ariaBusy = "false";
    for (const card of this.#cards) for (const field of card.elements) field.disabled = false;
    this.element.querySelector(".figures").textContent = note;
    const box = this.element.querySelector(".problem");
    box.textContent = problem;
    box.hidden = !problem;
  }

  // What the conversation keeps of it, for the next request: the message and the answers to its calls; nothing of an
  // answer that failed at once.
  messages() {
    if (!this.content && !this.reasoning && !this.calls.length) return [];
    const answers = this.calls.filter((call) => call.result !== undefined);
    const calls = this.calls.map(({ id, name, args }) => ({ id, type: "function", function: { name, arguments: args } }));
    return [
      {
        role: "assistant",
        content: this.content,
        ...(this.reasoning && { reasoning_content: this.reasoning }),
        ...(calls.length && { tool_calls: calls }),
      },
      ...answers.map(({ id, result }) => ({ role: "tool", tool_call_id: id, content: result })),
    ];
  }

  #addText(kind, text) {
    if (!text) return;
    this[kind] += text;
    this.#alignment.addText(kind, text);
  }

  #addCall({ index, id, function: { name, arguments: args } = {} }) {
    this.#alignment.addText("call", "");
    const call = (this.calls[index] ??= { id, name: "", args: "" });
    call.name += name ?? "";
    call.args += args ?? "";
    if (this.#cards[index]) return;
    const card = (this.#cards[index] = fromTemplate("call-card"));
    card.addEventListener("submit", (event) => this.#answerCall(event, call, card));
    this.element.querySelector(".calls").append(card);
  }

  #answerCall(event, call, card) {
    event.preventDefault();
    const box = card.querySelector("textarea");
    call.result = box.value;
    box.readOnly = true;
    card.querySelector("button").hidden = true;
    if (this.calls.every(({ result }) => result !== undefined)) this.element.dispatchEvent(new Event("answered"));
  }

  #addPiece({ kind, text, token }) {
    this.#place = kind || this.#place || (this.reasoning ? "reasoning" : "content");
    const span = document.createElement("span");
    span.textContent = text;
    if (token) {
      span.className = `tok ${token.origin} ${text.trim() || text === " " ? "" : text ? "blank" : "hidden"}`;
      tokenOf.set(span, token);
    }
    const tail = this.#tail(this.#place);
    tail.before(span);
    // Blocks that are done are not laid out again: a frame takes the same time however long the text is.
    const block = tail.parentNode;
    if (text.endsWith("\n") && block.childElementCount > 100) newBlock(block.parentNode).append(tail);
  }

  // What stands behind the last token of a body: text whose token is still to come.
  #tail(kind) {
    if (kind === "call") return this.#cards.at(-1).querySelector(".markup").lastChild;
    this.#tails[kind] ??= newBlock(this.element.querySelector(`.${kind}`)).appendChild(document.createElement("span"));
    return this.#tails[kind];
  }

  // Thinking is open while it lasts, then folds once; after that it is the reader's.
  #fold() {
    const box = this.element.querySelector("details");
    const isOver = Boolean(this.content || this.calls.length || this.finishReason);
    if (this.reasoning && box.hidden) {
      box.hidden = false;
      box.open = true;
      box.querySelector("summary").addEventListener("click", () => (this.#wasFolded = true));
    }
    if (isOver && !this.#wasFolded) {
      this.#wasFolded = true;
      box.open = false;
    }
  }
}

function newBlock(body) {
  return body.appendChild(document.createElement("div"));
}
