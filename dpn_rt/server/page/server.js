const byId = (id) => document.getElementById(id);
let card = null; // of the model, from /v1/models

// The server

class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(path, options = {}) {
  const headers = options.body ? { "Content-Type": "application/json" } : {};
  const key = byId("key").value.trim();
  if (key) headers.Authorization = `Bearer ${key}`;
  const reply = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached. Is it still running?");
  });
  if (reply.ok) return reply;
  const status = `${reply.status} ${reply.statusText}`.trim();
  const content = await reply.json().catch(() => null);
  throw new Refusal(reply.status, content?.error?.message ?? `The server answered ${status}.`);
}

async function loadCard(signal) {
  card = (await (await call("v1/models", { signal })).json()).data[0];
  byId("model").textContent = card.id;
  byId("serving").hidden = false;
  const kernels = card.pooling_kernels;
  byId("steering").hidden = kernels?.length === 0;
  if (kernels?.length) byId("kernel-numbers").textContent = ` Here ${kernelNumbers(kernels)}.`;
  offerReductions(card.reductions ?? []);
  complain("key", "");
}

function kernelNumbers(kernels) {
  const list = (each) => each.map((kernel, number) => `${number} is ${kernelName(kernel)}`).join(", ");
  const [first, ...others] = kernels.map(list);
  if (others.every((other) => other === first)) return `${first}, at each of ${kernels.length} boundaries`;
  return [first, ...others].map((text, boundary) => `${text} at boundary ${boundary}`).join("; ");
}

const kernelName = (kernel) => (kernel ? kernel.join("x") : "skipped");

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection ended before the answer was complete.");
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function requestOf(image, spec) {
  const question = byId("question").value.trim();
  const text = { type: "text", text: question };
  const content = image ? [{ type: "image_url", image_url: { url: image.url } }, text] : question;
  const request = { model: card.id, stream: true, messages: [{ role: "user", content }] };
  const numbers = { max_tokens: "max-tokens", temperature: "temperature", router_bias: "bias" };
  for (const [field, id] of Object.entries(numbers)) {
    if (byId(id).value !== "") request[field] = byId(id).valueAsNumber;
  }
  const route = forcedRoute();
  if (route) request.route = route;
  if (spec !== undefined) request.reduce = spec;
  return request;
}

function forcedRoute() {
  const route = byId("route").value.trim();
  return route ? route.split(",").map((word) => (word.trim() === "" ? null : Number(word))) : null;
}
