
// The reduction of the image, and the one that it is compared with

const SIDES = ["", "-2"]; // of the ids of what there is twice
const AMOUNTS = { // keys of a SPEC that say how much is left -> their names, and what is wrong with a value
  ratio: ["share dropped", shareProblem],
  keep: ["share kept", shareProblem],
  ratios: ["shares kept", sharesProblem],
  kernel: ["kernel", kernelProblem],
};

/** The steps of a SPEC with all keys: [{method, values: [[key, value], ...]}, ...]. */
function stepsOf(spec) {
  return spec.split("+").map((step) => {
    const [method, values] = step.split(":");
    return { method, values: values ? values.split(",").map((item) => item.split("=")) : [] };
  });
}

/** Key and value of what says how much a step leaves; undefined where nothing does. */
const amountOf = (step) => step.values.find(([key]) => key in AMOUNTS);

/** A SPEC without its amounts, which stand in a field of their own. */
function shapeOf(spec) {
  return stepsOf(spec).map(({ method, values }) => {
    const rest = values.filter(([key]) => !(key in AMOUNTS)).map(([key, value]) => `${key} ${value}`);
    return [method, ...rest].join(", ");
  }).join(" + ");
}

function offerReductions(reductions) {
  byId("reductions").hidden = reductions.length === 0;
  const shapes = new Map([...reductions].reverse().map((spec) => [shapeOf(spec), spec])); // of equal ones the first
  const offered = [...new Set(reductions.map(shapeOf))].map((shape) => [shape, shapes.get(shape)]);
  for (const [index, side] of SIDES.entries()) {
    const select = byId(`reduction${side}`);
    const chosen = select.value;
    select.replaceChildren(...offered.map(([shape, spec]) => element("option", { value: spec }, shape)));
    const other = offered.find(([, spec]) => spec === "none" && spec !== reductions[0]) ?? offered[1];
    select.value = index ? other?.[1] : reductions[0];
    if (reductions.includes(chosen)) select.value = chosen;
    else showAmount(side);
  }
}

/** Fills the field of the amounts from the SPEC that is chosen. */
function showAmount(side) {
  const amounts = chosenSteps(side).map(amountOf).filter(Boolean);
  const label = amounts.map(([key]) => AMOUNTS[key][0]).join(" + ");
  byId(`amount${side}-label`).textContent = label.charAt(0).toUpperCase() + label.slice(1);
  byId(`amount${side}`).value = amounts.map(([, value]) => value).join(" + ");
  byId(`amount${side}-field`).hidden = amounts.length === 0;
  complain(`amount${side}`, "");
}

const chosenSteps = (side) => stepsOf(byId(`reduction${side}`).value);
const givenAmounts = (side) => byId(`amount${side}`).value.split("+").map((word) => word.trim());
const isComparing = () => isReducible() && byId("compare").checked;
const isReducible = () => Boolean(card?.reductions?.length);

/** The SPEC that is asked for; undefined where nothing can be chosen. */
function specOf(side) {
  if (!isReducible()) return undefined;
  const amounts = givenAmounts(side);
  return chosenSteps(side).map((step) => {
    const amount = amountOf(step);
    const values = step.values.map(([key, value]) => `${key}=${key === amount?.[0] ? amounts.shift() : value}`);
    return values.length ? `${step.method}:${values.join(",")}` : step.method;
  }).join("+");
}

function amountProblem(side) {
  if (!isReducible() || (side && !isComparing())) return "";
  const expected = chosenSteps(side).map(amountOf).filter(Boolean);
  if (!expected.length) return "";
  const given = givenAmounts(side);
  if (given.length !== expected.length) {
    const example = expected.map(([, value]) => value).join(" + ");
    return `Expected ${expected.length === 1 ? "one value" : `${expected.length} values`}, something like ${example}.`;
  }
  for (const [index, [key, example]] of expected.entries()) {
    const problem = AMOUNTS[key][1](given[index], example);
    if (problem) return problem;
  }
  return "";
}

const isShare = (word) => /^(\d+\.?\d*|\.\d+)$/.test(word) && Number(word) <= 1;

function shareProblem(word) {
  return isShare(word) ? "" : `${named(word)} is no share, expected a number from 0 to 1.`;
}

function sharesProblem(word, example) {
  const shares = word.split("-");
  const count = example.split("-").length;
  const wrong = shares.find((share) => !isShare(share));
  if (wrong !== undefined) return shareProblem(wrong);
  if (shares.length !== count) return `These are ${shares.length} shares, expected ${count}, something like ${example}.`;
  const rises = shares.some((share, index) => index > 0 && Number(share) > Number(shares[index - 1]));
  return rises ? "Expected no share above the one before: what was dropped does not come back." : "";
}

function kernelProblem(word) {
  const sides = /^(\d{1,4})x(\d{1,4})$/.exec(word)?.slice(1).map(Number) ?? [0];
  const isRight = sides.every((side) => side >= 1 && side <= 1024);
  return isRight ? "" : `${named(word)} is no kernel, expected height and width such as 2x2.`;
}

const named = (word) => (word ? `"${word}"` : "Nothing");
