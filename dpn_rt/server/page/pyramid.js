
// The pyramid

const SIDE = 672; // side of the image under the grids, in pixels and in units of their coordinates
const PADDING = "rgb(122 116 104)"; // LLaVA pads an image to a square with this colour

function drawPyramid(pyramid, image, route, side) {
  if (!pyramid.image_grid) return;
  const canvas = asTheEncoderSawIt(image, pyramid.image_fit);
  const background = canvas.toDataURL("image/jpeg", 0.92);
  const pixels = canvas.getContext("2d").getImageData(0, 0, SIDE, SIDE).data;
  const figures = pyramid.visual_tokens.map((count, stage) => {
    const figure = element("figure");
    figure.append(drawStage(background, pixels, pyramid, stage), caption(pyramid, stage, route));
    return figure;
  });
  byId(`stages${side}`).replaceChildren(...figures);
  byId("dropped").hidden = !byId("drawings").querySelector(".dropped");
  byId("pyramid").hidden = false;
}

/** Numbers of the visual tokens that a stage sees on its grid; null: all of them. */
function keptTokens({ steps, kept }, stage) {
  const last = steps.findLastIndex((step) => step.stage <= stage);
  return last < 0 ? null : kept[last];
}

function asTheEncoderSawIt(image, fit) {
  const { naturalWidth: width, naturalHeight: height } = image;
  const scale = SIDE / (fit === "crop" ? Math.min(width, height) : Math.max(width, height));
  const canvas = element("canvas", { width: SIDE, height: SIDE });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (fit === "stretch") {
    context.drawImage(image, 0, 0, SIDE, SIDE);
    return canvas;
  }
  context.fillStyle = PADDING;
  context.fillRect(0, 0, SIDE, SIDE);
  const [left, top] = [(SIDE - width * scale) / 2, (SIDE - height * scale) / 2];
  context.drawImage(image, left, top, width * scale, height * scale);
  return canvas;
}

function drawStage(background, pixels, pyramid, stage) {
  const tokenSize = pyramid.patches_per_token[stage]; // rows and columns of patches that one visual token stands for
  const grid = pyramid.image_grid.map((patches, axis) => Math.floor(patches / tokenSize[axis]));
  const [height, width] = pyramid.image_grid.map((patches, axis) => (tokenSize[axis] * SIDE) / patches);
  const boxes = Array.from({ length: grid[0] * grid[1] }, (_, token) => {
    return { x: (token % grid[1]) * width, y: Math.floor(token / grid[1]) * height, width, height };
  });
  const kept = keptTokens(pyramid, stage)?.filter((token) => token < boxes.length); // those of tiles are drawn nowhere
  const shape = `${grid[0]} rows and ${grid[1]} columns of rectangles`;
  const label = `The image under ${shape}${kept ? `, of which ${kept.length} are kept` : ""}`;
  const drawing = svg("svg", { viewBox: `0 0 ${SIDE} ${SIDE}`, role: "img", "aria-label": label });
  drawing.append(svg("image", { href: background, width: SIDE, height: SIDE }));
  const dropped = droppedParts(boxes, grid, kept);
  if (dropped) drawing.append(svg("path", { class: "dropped", d: dropped }));
  // Lines of one width would cover a picture that is cut into many rectangles.
  const line = Math.max(0.3, Math.min(1, 6 / Math.max(...grid)));
  const tokens = svg("g", { class: line < 0.6 ? "tokens fine" : "tokens", style: `--line: ${line.toFixed(2)}px` });
  for (const box of kept ? kept.map((token) => boxes[token]) : boxes) {
    tokens.append(svg("rect", { class: "token", ...box, style: `--average: ${average(pixels, box)}` }));
  }
  drawing.append(tokens);
  return drawing;
}

/** The path around what no visual token stands for any more; empty if there is nothing. */
function droppedParts(boxes, grid, kept) {
  const [bottom, right] = [grid[0] * boxes[0].height, grid[1] * boxes[0].width];
  const isWhole = bottom > SIDE - 0.01 && right > SIDE - 0.01;
  const edges = isWhole ? "" : `M0 0H${SIDE}V${SIDE}H0Z M0 0V${bottom}H${right}V0Z`;
  const isKept = new Set(kept);
  const gone = kept ? boxes.filter((_, token) => !isKept.has(token)) : [];
  return edges + gone.map(({ x, y, width, height }) => `M${x} ${y}h${width}v${height}h${-width}Z`).join("");
}

/** The average colour of a rectangle's pixels. */
function average(pixels, { x, y, width, height }) {
  const [left, top, right, bottom] = [x, y, x + width, y + height].map(Math.round);
  const sums = [0, 0, 0];
  for (let row = top; row < bottom; row++) {
    for (let column = left; column < right; column++) {
      const start = 4 * (row * SIDE + column);
      for (let channel = 0; channel < 3; channel++) sums[channel] += pixels[start + channel];
    }
  }
  const count = (right - left) * (bottom - top);
  return `rgb(${sums.map((sum) => Math.round(sum / count)).join(" ")})`;
}

function showAverages(isOn) {
  byId("drawings").classList.toggle("averages", isOn);
  byId("averages").setAttribute("aria-pressed", String(isOn));
}

function caption(pyramid, stage, route) {
  if (pyramid.reduction !== null) return captionOfSteps(pyramid, stage);
  const kernel = stage > 0 ? `, kernel ${kernelName(pyramid.kernels[stage - 1])}` : "";
  const text = `stage ${stage}: ${pyramid.visual_tokens[stage]} visual tokens${kernel}`;
  const result = element("figcaption", {}, text);
  const reason = stage > 0 ? whyThisKernel(pyramid, stage - 1, route) : "";
  if (reason) result.append(element("span", { class: "detail" }, reason));
  return result;
}

function captionOfSteps({ steps, visual_tokens }, stage) {
  const methods = steps.filter((step) => step.stage === stage).map((step) => `, ${step.spec.split(":")[0]}`);
  return element("figcaption", {}, `stage ${stage}${methods.join("")}: ${visual_tokens[stage]} visual tokens`);
}

function whyThisKernel(pyramid, boundary, route) {
  const probability = pyramid.probs?.[boundary]?.[pyramid.experts[boundary]];
  const share = probability === undefined ? "" : `${(100 * probability).toFixed(0)} %`;
  if ((route?.[boundary] ?? null) === null) return share && `the router chose this with ${share}`;
  return share ? `forced (the router would have given it ${share})` : "forced";
}

function element(name, attributes = {}, text = "") {
  return filled(document.createElement(name), attributes, text);
}

function svg(name, attributes) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, "");
}

function filled(node, attributes, text) {
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}
