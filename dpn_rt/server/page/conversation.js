
// A question and its answer

let running = null; // AbortController of the question that is being answered
const ENDINGS = {
  stop: "Done.",
  length: "Done: cut off at the largest number of tokens.",
  abort: "The server ended the answer early.",
};

async function ask() {
  if (running) return;
  if (!fieldsAreRight()) {
    showStatus("Not asked: see the marked field.");
    return;
  }
  const controller = new AbortController();
  begin(controller);
  let image = null;
  try {
    await loadCard(controller.signal);
    image = await shownImage();
    // What is shown may have changed since the check.
    if (!fieldsAreRight()) showStatus("Not asked: see the marked field.");
    else showStatus(await answer(controller.signal, image));
  } catch (error) {
    if (controller.signal.aborted) showStatus("Stopped.");
    else tell(error, image);
  } finally {
    end();
  }
}

async function answer(signal, image) {
  const request = requestOf(image);
  const reply = await call("v1/chat/completions", { method: "POST", body: JSON.stringify(request), signal });
  let ending = "Done.";
  for await (const event of events(reply.body)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices?.[0];
    if (choice?.delta?.content) show(choice.delta.content);
    if (choice?.finish_reason) ending = ENDINGS[choice.finish_reason] ?? `Done (${choice.finish_reason}).`;
    if (event.timings) showFigures(event.timings, event.pyramid);
    if (event.pyramid && image) drawPyramid(event.pyramid, image.element, request.route);
  }
  return ending;
}

/** Shows more of the answer, without the space with which models begin. */
function show(text) {
  const place = byId("answer");
  const more = place.textContent ? text : text.trimStart();
  if (more) place.append(more);
}

function begin(controller) {
  running = controller;
  byId("answer").replaceChildren();
  byId("answer").setAttribute("aria-busy", "true");
  byId("ask").setAttribute("aria-disabled", "true");
  byId("stop").hidden = false;
  byId("figures").hidden = byId("pyramid").hidden = byId("examples").hidden = true;
  showStatus("Answering …");
  scrollToAnswer();
}

/** In one column the answer is below the form, out of sight. */
function scrollToAnswer() {
  byId("output").classList.add("asked");
  if (matchMedia("(min-width: 56rem)").matches) return;
  const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "instant" : "smooth";
  byId("answer-title").scrollIntoView({ behavior, block: "start" });
}

function end() {
  running.abort(); // closes a reply that was not read to its end
  running = null;
  byId("answer").setAttribute("aria-busy", "false");
  byId("ask").removeAttribute("aria-disabled");
  if (document.activeElement === byId("stop")) byId("question").focus();
  byId("stop").hidden = true;
}

function showStatus(text) {
  byId("status").textContent = text;
  byId("error").hidden = true;
}

function showError(message) {
  byId("status").textContent = "";
  byId("error").textContent = message;
  byId("error").hidden = false;
}

// What the answer cost

function showFigures(timings, pyramid) {
  const figures = [
    ["Time to first token", time(timings.first_token)],
    ["Total time", time(timings.total)],
  ];
  if (pyramid) {
    figures.push(["Prefill FLOPs saved", `${(100 * pyramid.flops.saved).toFixed(1)} %`]);
    figures.push(["Pooling kernels", pyramid.kernels.map(kernelName).join(", ") || "none"]);
  }
  byId("figures").replaceChildren(
    ...figures.map(([name, value]) => {
      const item = element("div");
      item.append(element("dt", {}, name), element("dd", {}, value));
      return item;
    }),
  );
  byId("figures").hidden = false;
}

function time(seconds) {
  if (seconds === null || seconds === undefined) return "unknown";
  return seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(2)} s`;
}
