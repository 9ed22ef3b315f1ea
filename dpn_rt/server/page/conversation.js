
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
  let side = SIDES[0];
  const drawings = []; // made last, since drawing would slow down a server on the same machine
  try {
    await loadCard(controller.signal);
    image = await shownImage();
    // What is shown may have changed since the check.
    if (!fieldsAreRight()) return showStatus("Not asked: see the marked field.");
    const sides = isComparing() ? SIDES : SIDES.slice(0, 1);
    const requests = sides.map((each) => [each, requestOf(image, specOf(each))]);
    announce(requests);
    const passes = sides.length > 1 ? [warmUp, answer] : [answer];
    let ending = "";
    for (const pass of passes) {
      for (const [each, request] of requests) {
        side = each;
        ending = await pass(controller.signal, request, side, (pyramid) => {
          if (image) drawings.push(() => drawPyramid(pyramid, image.element, request.route, each));
        });
      }
    }
    byId("fair").hidden = sides.length === 1;
    showStatus(ending);
  } catch (error) {
    if (controller.signal.aborted) showStatus("Stopped.");
    else tell(error, image, side);
  } finally {
    end();
    for (const draw of drawings) draw();
  }
}

/** Asks without showing the answer: the server keeps what it computes of a picture, and the first to ask would pay. */
async function warmUp(signal, request) {
  showStatus("Asking each once before …");
  const body = JSON.stringify({ ...request, max_tokens: 1, stream: false });
  await (await call("v1/chat/completions", { method: "POST", body, signal })).json();
}

async function answer(signal, request, side, draw) {
  showStatus("Answering …");
  putCursor(side);
  const reply = await call("v1/chat/completions", { method: "POST", body: JSON.stringify(request), signal });
  let ending = "Done.";
  for await (const event of events(reply.body)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices?.[0];
    if (choice?.delta?.content) show(choice.delta.content, side);
    if (choice?.finish_reason) ending = ENDINGS[choice.finish_reason] ?? `Done (${choice.finish_reason}).`;
    if (event.timings) showFigures(event.timings, event.pyramid, side);
    if (event.pyramid) draw(event.pyramid);
  }
  return ending;
}

/** Shows more of the answer, without the space with which models begin. */
function show(text, side) {
  const place = byId(`answer${side}`);
  const more = place.textContent ? text : text.trimStart();
  if (more) place.append(more);
}

/** Makes room for the answers, one or two, under the names of their reductions. */
function announce(requests) {
  const isPair = requests.length > 1;
  for (const id of ["second-reply", "second-drawing", "drawn"]) byId(id).hidden = !isPair;
  for (const id of ["answers", "drawings"]) byId(id).classList.toggle("two", isPair);
  for (const [side, { reduce }] of requests) {
    byId(`asked${side}`).textContent = byId(`drawn${side}`).textContent = reduce ?? "";
    byId(`asked${side}`).hidden = reduce === undefined;
  }
}

/** Shows where text is to come; null: nowhere. */
function putCursor(side) {
  for (const each of SIDES) byId(`answer${each}`).classList.toggle("coming", each === side);
}

function begin(controller) {
  running = controller;
  for (const side of SIDES) {
    byId(`answer${side}`).replaceChildren();
    byId(`stages${side}`).replaceChildren();
    byId(`figures${side}`).hidden = true;
  }
  announce([["", {}]]);
  byId("fair").hidden = true;
  putCursor(SIDES[0]);
  byId("answer").setAttribute("aria-busy", "true");
  byId("ask").setAttribute("aria-disabled", "true");
  byId("stop").hidden = false;
  byId("pyramid").hidden = byId("examples").hidden = true;
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
  putCursor(null);
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

function showFigures(timings, pyramid, side) {
  const figures = [
    ["Time to first token", time(timings.first_token)],
    ["Total time", time(timings.total)],
  ];
  if (pyramid) {
    figures.push(["Prefill FLOPs saved", `${(100 * pyramid.flops.saved).toFixed(1)} %`]);
    figures.push(
      pyramid.reduction === null
        ? ["Pooling kernels", pyramid.kernels.map(kernelName).join(", ") || "none"]
        : ["Visual tokens", pyramid.visual_tokens.join(", ")],
    );
  }
  byId(`figures${side}`).replaceChildren(
    ...figures.map(([name, value]) => {
      const item = element("div");
      item.append(element("dt", {}, name), element("dd", {}, value));
      return item;
    }),
  );
  byId(`figures${side}`).hidden = false;
}

function time(seconds) {
  if (seconds === null || seconds === undefined) return "unknown";
  return seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(2)} s`;
}
