// How fast an answer comes: counts its steps, and draws them. A chunk has the tokens of one step, seldom of more.

// Counts one answer; times are in milliseconds.
export class Meter {
  numTokens = 0;
  steps = []; // [tokens, accepted drafts] of each verify step; the first token comes from the prompt's pass
  accepted = []; // drafts per position
  proposed = [];
  usage = null;
  firstAt = null;
  endedAt = null;
  #arrivals = []; // [milliseconds, tokens so far]

  constructor(startedAt) {
    this.startedAt = startedAt;
    this.lastAt = startedAt;
  }

  // The tokens of a chunk came, from `origins`: d accepted draft, t target, p prefill.
  count(now, { origins, proposed }) {
    if (!origins) return;
    this.firstAt ??= now;
    this.lastAt = now;
    this.numTokens += origins.length;
    this.#arrivals.push([now, this.numTokens]);
    const steps = origins.match(/d*t|d+$/g) ?? [];
    for (const step of steps) this.#countStep(step, proposed / steps.length);
  }

  get tokensPerSecond() {
    const [first] = this.#arrivals;
    return first ? rate(this.numTokens - first[1], this.lastAt - first[0]) : null;
  }

  get acceptLength() {
    return this.steps.length ? this.steps.reduce((sum, [len]) => sum + len, 0) / this.steps.length : null;
  }

  // [[seconds since the first token, tokens per second], ...]: averages over a fifth of the time, a second at most, but
  // over three steps at least.
  rates(numPoints = 80) {
    const elapsed = this.firstAt === null ? 0 : this.lastAt - this.firstAt;
    if (!elapsed) return [];
    const threeSteps = (3 * elapsed) / (this.#arrivals.length - 1);
    const width = Math.min(Math.max(Math.min(1000, elapsed / 5), threeSteps), 0.75 * elapsed);
    return Array.from({ length: numPoints }, (_, i) => {
      const end = this.lastAt - ((elapsed - width) * (numPoints - 1 - i)) / (numPoints - 1);
      return [(end - this.firstAt) / 1000, rate(this.#tokensAt(end) - this.#tokensAt(end - width), width)];
    });
  }

  #countStep(origins, numProposed) {
    const numAccepted = origins.lastIndexOf("d") + 1;
    this.steps.push([origins.length, numAccepted]);
    for (let i = 0; i < Math.max(numProposed, numAccepted); i++) {
      this.proposed[i] = (this.proposed[i] ?? 0) + 1;
      this.accepted[i] = (this.accepted[i] ?? 0) + (i < numAccepted);
    }
  }

  #tokensAt(time) {
    let [low, high] = [0, this.#arrivals.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#arrivals[middle][0] <= time) low = middle + 1;
      else high = middle;
    }
    return low ? this.#arrivals[low - 1][1] : 0;
  }
}

// A line through [x, y] points, which are in order of x, and the area down to zero.
export function drawLine(svg, points) {
  const { width, height } = svg.viewBox.baseVal;
  const [first, last] = [points[0]?.[0], points.at(-1)?.[0]];
  const top = Math.max(...points.map((point) => point[1])) || 1;
  const line = points.map(([x, y]) => [((x - first) / (last - first)) * width, height - (y / top) * (height - 4)]);
  const path = line.map((place) => place.map((number) => number.toFixed(1)).join()).join(" ");
  const area = path && `0,${height} ${path} ${width},${height}`;
  svg.replaceChildren(shape("polygon", { points: area }), shape("polyline", { points: path }));
}

// A column per step, the newest ones, as many as there is room for: accepted drafts on the target's own token.
export function drawSteps(svg, steps, maxLen) {
  const { width, height } = svg.viewBox.baseVal;
  const unit = height / Math.max(maxLen, 1);
  const columns = steps.slice(-Math.floor(width / 5)).flatMap(([len, numAccepted], i) => {
    const own = (len - numAccepted) * unit;
    const column = (className, top, size) =>
      shape("rect", { class: className, x: i * 5, y: height - top, width: 4, height: Math.max(size - 1, 0) });
    return [column("target", own, own), column("accepted", len * unit, numAccepted * unit)];
  });
  svg.replaceChildren(...columns);
}

function shape(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function rate(count, milliseconds) {
  return milliseconds > 0 ? (count / milliseconds) * 1000 : null;
}
