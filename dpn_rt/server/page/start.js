
// Events

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("averages").addEventListener("click", () => showAverages(!byId("drawings").classList.contains("averages")));
byId("bias").addEventListener("input", () => (byId("bias-value").textContent = byId("bias").value));
byId("key").addEventListener("change", () => loadCard().catch((error) => tell(error)));
for (const side of SIDES) byId(`reduction${side}`).addEventListener("change", () => showAmount(side));
byId("compare").addEventListener("change", () => (byId("second").hidden = !byId("compare").checked));
for (const field of ["amount", "amount-2", "question", "max-tokens", "temperature", "bias", "route", "key"]) {
  byId(field).addEventListener("input", () => complain(field, ""));
}
for (const button of document.querySelectorAll("#examples button")) {
  const picture = button.closest(".example").querySelector("img");
  button.addEventListener("click", () => tryExample(picture, button.textContent));
}
byId("file").addEventListener("change", () => choose([...byId("file").files]));
byId("remove").addEventListener("click", () => {
  choose([]);
  byId("file").focus();
});
// On the whole page, since a file dropped beside the zone would otherwise replace the page.
window.addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
window.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("drop").classList.remove("over");
});
window.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  if (event.dataTransfer.files.length) choose([...event.dataTransfer.files]);
});
window.addEventListener("paste", (event) => {
  const { files, types } = event.clipboardData;
  if (files.length && !types.includes("text/plain")) choose([...files]);
});

loadCard().catch((error) => tell(error));
