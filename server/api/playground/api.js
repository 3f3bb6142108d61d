// What the page says to the server: requests made of settings and turns, and event streams read as they arrive.

// The JSON of one event after the other. Throws ApiError for an answer or an event that is an error.
export async function* streamEvents(path, body, key, signal, onLine) {
  const response = await fetch(path, { method: "POST", headers: headers(key), body: JSON.stringify(body), signal });
  if (!response.ok) {
    const text = await response.text();
    onLine(text);
    throw new ApiError(errorMessage(text, response.status), response.status);
  }
  for await (const line of lines(response.body)) {
    if (line) onLine(line);
    if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
    const event = JSON.parse(line.slice("data: ".length));
    if (event.error) throw new ApiError(event.error.message, event.error.code);
    yield event;
  }
}

// What the API says went wrong, in its own words.
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

// The served model's card.
export async function fetchModel(key) {
  const response = await fetch("v1/models", { headers: headers(key) });
  if (!response.ok) throw new ApiError(errorMessage(await response.text(), response.status), response.status);
  return (await response.json()).data[0];
}

// The body of a chat or a completions request. `settings` are texts of the form, empty where the server's default counts.
export function buildRequest(settings, messages) {
  const numTop = settings.alternatives ? 5 : 0;
  const stop = settings.stop.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
  const shared = {
    ...numbers(settings),
    ...(stop.length && { stop }),
    ...(settings.max_draft !== "" && { speculative: { max_draft: Number(settings.max_draft) } }),
    stream: true,
    stream_options: { include_usage: true },
    return_spec: true,
  };
  if (settings.mode === "completion") return { prompt: messages.at(-1).content, ...shared, logprobs: numTop };
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  return {
    messages: [...system, ...messages],
    ...shared,
    logprobs: true,
    top_logprobs: numTop,
    ...(settings.thinking && { chat_template_kwargs: { enable_thinking: settings.thinking === "on" } }),
    ...(settings.tools.trim() && { tools: JSON.parse(settings.tools), tool_choice: settings.tool_choice }),
  };
}

// The request as a command. A key stays out of it.
export function curlCommand(url, body, hasKey) {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const key = hasKey ? ` \\\n  -H "Authorization: Bearer $API_KEY"` : "";
  return `curl -N ${quote(url)} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d ${quote(JSON.stringify(body, null, 2))}`;
}

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"];
NUMBERS.push("repetition_penalty", "seed", "max_tokens");

function numbers(settings) {
  const given = NUMBERS.filter((name) => settings[name] !== "");
  return Object.fromEntries(given.map((name) => [name, Number(settings[name])]));
}

function headers(key) {
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function errorMessage(text, status) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The server answered with status ${status}`;
  }
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts;
  }
}
