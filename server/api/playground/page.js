// The playground: a conversation, its settings, and what the last request did.

import { Answer, fromTemplate, tokenOf } from "./answer.js";
import { ApiError, buildRequest, curlCommand, fetchModel, streamEvents } from "./api.js";
import { Meter, drawLine, drawSteps } from "./live.js";

const byId = (id) => document.getElementById(id);
const controls = byId("controls");
const log = byId("log");
const prompt = byId("prompt");

const turns = []; // {element, messages()}: the conversation, oldest first
let running = null; // {controller, done} while an answer streams
let responseLines = [];

const EXAMPLE_FUNCTION = {
  name: "get_weather",
  description: "Get the current weather in a given location",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
};
const EXAMPLE_TOOLS = [{ type: "function", function: EXAMPLE_FUNCTION }];
const SUGGESTIONS = [
  { text: "Tom has 3 boxes with 4 apples each. How many apples does he have?" },
  { text: "Ann has 12 pens and buys 7 more. How many pens does she have?", thinking: "on" },
  { text: "What is the weather in Paris?", tools: EXAMPLE_TOOLS },
];
const ORIGINS = { d: "accepted draft", t: "target's own token", p: "first token, from prefill" };

// --- the conversation

function send(text) {
  addTurn(userTurn(text));
  return run();
}

function userTurn(text) {
  const element = fromTemplate("user-turn");
  const turn = { element, text, messages: () => [{ role: "user", content: turn.text }] };
  element.querySelector(".text").textContent = text;
  element.querySelector(".edit").addEventListener("click", () => edit(turn));
  return turn;
}

function addTurn(turn) {
  turns.push(turn);
  log.append(turn.element);
  byId("welcome").hidden = true;
  scrollDown();
}

// Everything behind the first `count` turns goes.
function cutTurns(count) {
  for (const turn of turns.splice(count)) turn.element.remove();
}

function edit(turn) {
  const shown = turn.element.querySelector(".text");
  if (shown.hidden) return;
  const form = fromTemplate("edit-form");
  const box = form.querySelector("textarea");
  const close = () => {
    form.remove();
    shown.hidden = false;
    prompt.focus();
  };
  box.value = turn.text;
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    shown.textContent = turn.text = box.value;
    close();
    rerun(turn, 1);
  });
  form.querySelector(".cancel").addEventListener("click", close);
  shown.hidden = true;
  shown.after(form);
  box.focus();
}

function answerTurn() {
  const answer = new Answer();
  answer.element.querySelector(".copy").addEventListener("click", (event) => copy(answer.content, event.target));
  answer.element.querySelector(".regenerate").addEventListener("click", () => rerun(answer, 0));
  answer.element.addEventListener("answered", () => rerun(answer, 1));
  return answer;
}

// Answer again after the first turns, up to `turn`: with it or without it.
async function rerun(turn, numKept) {
  await halt();
  cutTurns(turns.indexOf(turn) + numKept);
  run();
}

// --- one request

async function run() {
  if (!toolsAreValid()) return;
  await halt();
  const settings = readSettings();
  const body = buildRequest(settings, turns.flatMap((turn) => turn.messages()));
  const path = settings.mode === "completion" ? "v1/completions" : "v1/chat/completions";
  const answer = answerTurn();
  addTurn(answer);
  showRequest(path, body, settings.key);
  const controller = new AbortController();
  setRunning({ controller, done: receive(answer, path, body, settings.key, controller.signal) });
  try {
    await running.done;
  } finally {
    setRunning(null);
  }
}

async function receive(answer, path, body, key, signal) {
  const meter = new Meter(performance.now());
  let frame = requestAnimationFrame(function draw() {
    show(answer, meter);
    frame = requestAnimationFrame(draw);
  });
  let [note, problem] = ["", ""];
  try {
    for await (const event of streamEvents(path, body, key, signal, (line) => responseLines.push(line))) {
      meter.usage = event.usage ?? meter.usage;
      for (const choice of event.choices) {
        answer.push(choice);
        if (choice.spec) meter.count(performance.now(), choice.spec);
      }
    }
    if (answer.finishReason === "length") note = " · cut at max_tokens";
  } catch (error) {
    if (signal.aborted) note = " · stopped";
    else problem = error instanceof ApiError ? error.message : `The connection failed: ${error.message}`;
  }
  cancelAnimationFrame(frame);
  meter.endedAt = performance.now();
  answer.finish(summary(meter) + note, problem);
  show(answer, meter);
}

// Ends the running answer, if any; what has come of it stays.
async function halt() {
  running?.controller.abort();
  await running?.done;
}

function show(answer, meter) {
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  answer.render();
  if (isAtEnd) scrollDown();
  showLive(meter);
  showResponse();
}

function scrollDown() {
  log.scrollTop = log.scrollHeight;
}

function setRunning(now) {
  running = now;
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
}

// --- the inspector

function showLive(meter) {
  const { usage, numTokens, firstAt, startedAt, endedAt, acceptLength, tokensPerSecond } = meter;
  const rates = meter.rates();
  const [accepted, proposed] = [sum(meter.accepted), sum(meter.proposed)];
  const figures = {
    rate: tokensPerSecond?.toFixed(0),
    "accept-length": acceptLength?.toFixed(2),
    ttft: firstAt && milliseconds(firstAt - startedAt),
    total: milliseconds((endedAt ?? performance.now()) - startedAt),
    "output-tokens": usage?.completion_tokens ?? numTokens,
    accepted: proposed ? `${accepted} of ${proposed}` : null,
    cached: usage && `${usage.prompt_tokens_details?.cached_tokens ?? 0} of ${usage.prompt_tokens}`,
  };
  for (const [id, text] of Object.entries(figures)) byId(id).textContent = text ?? "–";
  byId("peak").textContent = rates.length ? `peak ${Math.max(...rates.map(([, rate]) => rate)).toFixed(0)}` : "";
  drawLine(byId("rate-plot"), rates);
  drawSteps(byId("step-plot"), meter.steps, meter.proposed.length + 1);
  showPositions(meter);
}

function showPositions({ accepted, proposed }) {
  const body = byId("positions").tBodies[0];
  while (body.rows.length > proposed.length) body.deleteRow(-1);
  proposed.forEach((count, i) => {
    const row = body.rows[i] ?? newPosition(body, i);
    const share = (100 * accepted[i]) / count;
    row.querySelector(".bar").style.width = `${share}%`;
    row.cells[2].textContent = `${share.toFixed(0)} %`;
    row.cells[2].title = `${accepted[i]} of ${count}`;
  });
}

function newPosition(body, index) {
  const row = body.insertRow();
  row.append(document.createElement("th"));
  row.cells[0].scope = "row";
  row.cells[0].textContent = `draft ${index + 1}`;
  row.insertCell().appendChild(document.createElement("div")).className = "bar";
  row.insertCell();
  return row;
}

function summary({ acceptLength, tokensPerSecond, numTokens, firstAt, startedAt }) {
  const parts = [`${numTokens} tokens`];
  if (tokensPerSecond) parts.push(`${tokensPerSecond.toFixed(0)} per second`);
  if (acceptLength) parts.push(`accept length ${acceptLength.toFixed(2)}`);
  if (firstAt) parts.push(`first after ${milliseconds(firstAt - startedAt)}`);
  return numTokens ? parts.join(" · ") : "no tokens";
}

function showRequest(path, body, key) {
  responseLines = [];
  byId("raw-request").textContent = JSON.stringify(body, null, 2);
  const command = curlCommand(new URL(path, document.baseURI).href, body, Boolean(key));
  byId("copy-curl").onclick = (event) => copy(command, event.target);
}

// The newest lines: all of a long answer would be slow to lay out.
function showResponse() {
  if (!byId("raw").hidden) byId("raw-response").textContent = responseLines.slice(-300).join("\n");
}

function selectTab(tab) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    const isChosen = other === tab;
    other.ariaSelected = String(isChosen);
    other.tabIndex = isChosen ? 0 : -1;
    byId(other.getAttribute("aria-controls")).hidden = !isChosen;
  }
  showResponse();
}

// --- tokens under the pointer

function showTip(event) {
  const tip = byId("tip");
  const token = tokenOf.get(event.target);
  tip.hidden = !token;
  if (!token) return;
  const likely = [line("p", `${JSON.stringify(token.text)} ${percent(token.logprob)}`), ...token.top.map(alternative)];
  tip.replaceChildren(...likely, line("p", ORIGINS[token.origin] ?? "", "origin"));
  const at = event.target.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${at.bottom + tip.offsetHeight + 8 < innerHeight ? at.bottom + 6 : at.top - tip.offsetHeight - 6}px`;
}

function alternative([text, logprob]) {
  const row = line("div", `${JSON.stringify(text)} ${percent(logprob)}`, "alternative");
  row.style.setProperty("--share", Math.exp(logprob));
  return row;
}

function line(name, text, className = "") {
  const element = document.createElement(name);
  element.textContent = text;
  element.className = className;
  return element;
}

// --- settings

function readSettings() {
  return Object.fromEntries(new FormData(controls));
}

function toolsAreValid() {
  const box = byId("tools-problem");
  try {
    const tools = JSON.parse(controls.elements.tools.value.trim() || "[]");
    box.textContent = Array.isArray(tools) ? "" : "It must be a list, in [ ].";
  } catch (error) {
    box.textContent = `It is not JSON: ${error.message}`;
  }
  box.hidden = !box.textContent;
  if (box.textContent) showPanel("settings", true);
  return box.hidden;
}

function setTools(tools) {
  controls.elements.tools.value = JSON.stringify(tools, null, 2);
  toolsAreValid();
}

async function showModel() {
  const key = controls.elements.key.value;
  try {
    const { id, max_model_len: length } = await fetchModel(key);
    byId("model").textContent = `${id} · ${length.toLocaleString("en")} tokens of context`;
  } catch (error) {
    byId("model").textContent = error instanceof ApiError ? error.message : "the server cannot be reached";
    if (error.status === 401) showPanel("settings", true);
  }
}

function suggest({ text, tools, thinking = "" }) {
  const button = line("button", text);
  button.addEventListener("click", () => {
    if (tools) setTools(tools);
    controls.elements.thinking.value = thinking;
    send(text);
    prompt.focus();
  });
  return button;
}

// --- the frame

const isNarrow = matchMedia("(max-width: 760px)");

function showPanel(name, isOpen) {
  document.body.dataset[name] = isOpen ? "open" : "closed";
  byId(`toggle-${name}`).ariaExpanded = String(isOpen);
  const other = name === "settings" ? "inspector" : "settings";
  if (isOpen && isNarrow.matches) showPanel(other, false);
}

function toggleTheme() {
  const { dataset } = document.documentElement;
  const now = dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  dataset.theme = now === "dark" ? "light" : "dark";
  localStorage.setItem("theme", dataset.theme);
}

async function copy(text, button) {
  // Only pages from https or from this machine may write to the clipboard.
  if (!navigator.clipboard) return window.prompt("Copy this:", text);
  const label = button.textContent;
  await navigator.clipboard.writeText(text);
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = label), 1200);
}

function submitOnEnter(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  event.target.form.requestSubmit();
}

function onKey(event) {
  const isTyping = event.target.matches("input, textarea, select");
  if (event.key === "Escape") {
    halt();
    if (isNarrow.matches) for (const name of ["settings", "inspector"]) showPanel(name, false);
  } else if (event.key === "/" && !isTyping) {
    event.preventDefault();
    prompt.focus();
  } else if (event.key === "ArrowUp" && event.target === prompt && !prompt.value) {
    event.preventDefault();
    turns.findLast((turn) => turn.text !== undefined)?.element.querySelector(".edit").click();
  } else if (["ArrowLeft", "ArrowRight"].includes(event.key) && event.target.role === "tab") {
    const other = event.target.nextElementSibling ?? event.target.previousElementSibling;
    selectTab(other);
    other.focus();
  }
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;
const milliseconds = (time) => (time < 10_000 ? `${time.toFixed(0)} ms` : `${(time / 1000).toFixed(1)} s`);
const sum = (counts) => counts.reduce((total, count) => total + count, 0);

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (!text || running || !toolsAreValid()) return;
  prompt.value = "";
  send(text);
});
prompt.addEventListener("keydown", submitOnEnter);
document.addEventListener("keydown", onKey);
log.addEventListener("keydown", (event) => event.target.matches("textarea") && submitOnEnter(event));
log.addEventListener("pointerover", showTip);
log.addEventListener("pointerleave", showTip);
log.addEventListener("scroll", () => (byId("tip").hidden = true), { passive: true });
byId("stop").addEventListener("click", halt);
byId("clear").addEventListener("click", async () => {
  await halt();
  cutTurns(0);
  byId("welcome").hidden = false;
  prompt.focus();
});
byId("theme").addEventListener("click", toggleTheme);
byId("highlight").addEventListener("change", (event) => log.classList.toggle("plain", !event.target.checked));
byId("example").addEventListener("click", () => setTools(EXAMPLE_TOOLS));
byId("copy-response").addEventListener("click", (event) => copy(responseLines.join("\n"), event.target));
byId("suggestions").append(...SUGGESTIONS.map(suggest));
controls.addEventListener("submit", (event) => event.preventDefault());
controls.elements.tools.addEventListener("change", toolsAreValid);
controls.elements.key.value = sessionStorage.getItem("apiKey") ?? "";
controls.elements.key.addEventListener("change", (event) => {
  sessionStorage.setItem("apiKey", event.target.value);
  showModel();
});
for (const tab of document.querySelectorAll("[role=tab]")) tab.addEventListener("click", () => selectTab(tab));
for (const [name, room] of [["settings", "(min-width: 761px)"], ["inspector", "(min-width: 1100px)"]]) {
  showPanel(name, matchMedia(room).matches);
  byId(`toggle-${name}`).addEventListener("click", () => showPanel(name, document.body.dataset[name] !== "open"));
}
document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "";
showModel();
