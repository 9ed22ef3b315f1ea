
// The image

let pendingImage = Promise.resolve(null); // of {name, url, element} of the chosen image, or null
let imageProblem = ""; // with what was chosen; nothing is asked until it is removed

async function choose(files) {
  const chosen = files.length > 1 ? tooMany(files) : files.length ? read(files[0]) : Promise.resolve(null);
  pendingImage = chosen;
  imageProblem = "";
  byId("file").value = ""; // so that choosing the same file again is a change
  const image = await chosen.catch((error) => {
    if (pendingImage === chosen) imageProblem = error.message;
    return null;
  });
  if (pendingImage !== chosen) return;
  showImage(image, files.length > 1 ? `${files.length} files` : files[0]?.name);
  complain("image", imageProblem);
}

/** The image that the page shows, once it has been read. Raises its problem if there is one. */
async function shownImage() {
  for (;;) {
    const current = pendingImage;
    const image = await current.catch(() => null);
    if (current === pendingImage) return image;
  }
}

async function tooMany(files) {
  throw new Error(`These are ${files.length} files: expected one image.`);
}

async function read(file) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read. Is it a file, and still there?`));
    reader.readAsDataURL(file);
  });
  const image = new Image();
  image.src = url;
  await image.decode().catch(() => {
    throw new Error(`${file.name} is not an image that this browser can show. Remove it, or choose another one.`);
  });
  return { name: file.name, url, element: image };
}

function showImage(image, name = "") {
  const preview = byId("preview");
  if (image) preview.src = image.url;
  else preview.removeAttribute("src");
  preview.hidden = !image;
  byId("chosen").hidden = !name;
  byId("invitation").hidden = Boolean(image);
  preview.alt = image ? `Chosen image ${image.name}, choose another` : "";
  byId("file-name").textContent = name;
}

// Examples

/** Asks an example's question about its picture. */
async function tryExample(picture, question) {
  if (running) return;
  const bytes = Uint8Array.from(atob(picture.src.split(",")[1]), (character) => character.charCodeAt(0));
  const chosen = choose([new File([bytes], picture.dataset.name, { type: "image/png" })]);
  byId("question").value = question;
  await chosen;
  ask();
}
