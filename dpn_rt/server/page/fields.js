
// What is wrong with a field is said beside it

const CHECKS = {
  image: () => imageProblem,
  question: () => (byId("question").value.trim() ? "" : "Write a question first."),
  "max-tokens": () => numberProblem("max-tokens", "a whole number from 1 on"),
  temperature: () => numberProblem("temperature", "a number from 0 on"),
  route: routeProblem,
  amount: () => amountProblem(""),
  "amount-2": () => amountProblem("-2"),
};
const OF_THE_SERVER = [ // how its messages begin -> the field that they are about
  [/^image (?:\d+|'[^']*'): /, "image"],
  [/^the body has /, "image"],
  [/^max_(?:completion_)?tokens\b[^:]*: /, "max-tokens"],
  [/^temperature\b[^:]*: /, "temperature"],
  [/^router_bias\b[^:]*: /, "bias"],
  [/^route\b[^:]*: /, "route"],
  [/^reduce='[^']*': /, "amount"],
  [/^prompt (?=has|of)/, "question"],
];
const BY_STATUS = {
  429: "The server has too much to do. Try again in a moment.",
  503: "The server is shutting down.",
};

function numberProblem(id, expected) {
  const { badInput, rangeUnderflow, stepMismatch } = byId(id).validity;
  const isOff = badInput || rangeUnderflow || (stepMismatch && id === "max-tokens");
  return isOff ? `Expected ${expected}, or nothing.` : "";
}

function routeProblem() {
  const words = byId("route").value.trim() ? byId("route").value.split(",").map((word) => word.trim()) : [];
  const kernels = card?.pooling_kernels;
  if (words.length && kernels && words.length !== kernels.length) {
    return `The model has ${kernels.length} boundaries, and these are ${words.length}: expected one number for each.`;
  }
  for (const [boundary, word] of words.entries()) {
    if (word && !/^\d+$/.test(word)) return `"${word}" is not the number of a kernel, expected something like 2,2,2.`;
    const count = kernels?.[boundary].length ?? Infinity;
    if (Number(word) >= count) return `There is no kernel ${word}: expected 0 to ${count - 1}.`;
  }
  return "";
}

function complain(field, message) {
  const control = byId(field === "image" ? "file" : field);
  const place = byId(`${field}-problem`);
  place.textContent = message;
  place.hidden = !message;
  if (message) control.setAttribute("aria-invalid", "true");
  else control.removeAttribute("aria-invalid");
  if (message && byId("options").contains(control)) byId("options").open = true;
  return control;
}

/** Whether all fields can be sent as they are shown. Else each problem stands beside its field, and the first field has the focus. */
function fieldsAreRight() {
  let first = null;
  for (const [field, check] of Object.entries(CHECKS)) {
    const message = check();
    const control = complain(field, message);
    if (message) first ??= control;
  }
  complain("bias", "");
  first?.focus();
  return !first;
}

/**
 * Says an error of the server where it belongs: beside a field, or under the answer.
 * `side` is that of the reduction that was asked for.
 */
function tell(error, image = null, side = "") {
  if (error.status === 401) {
    const given = byId("key").value.trim();
    complain("key", given ? "The server does not accept this API key." : "This server asks for an API key.").focus();
    showStatus("Not asked: the server needs an API key.");
    return;
  }
  const [start, about] = OF_THE_SERVER.find(([pattern]) => pattern.test(error.message)) ?? [];
  const field = about === "amount" ? about + side : about;
  const isShown = about !== "amount" || !byId(`${field}-field`).hidden;
  if (!(error instanceof Refusal) || !field || !isShown || (field === "image" && !image)) {
    showError(BY_STATUS[error.status] ?? error.message);
    return;
  }
  const rest = error.message.replace(start, "");
  if (field !== "image") complain(field, `The server refuses this value: ${rest}`).focus();
  else if (error.status === 413) complain(field, `${image.name} is too large for this server: ${rest}`).focus();
  else complain(field, `The server cannot use ${image.name}: ${rest}`).focus();
  showStatus("Not answered: see the marked field.");
}
