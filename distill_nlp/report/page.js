"use strict";
// Lists, search and filters of the explorer. Without JavaScript all rows of all lists show.
(() => {
  const root = document.getElementById("explorer");
  if (!root) return;
  const $ = (name) => root.querySelector(`[name=${name}]`);
  const examples = [...root.querySelectorAll(".example")].map((node) => ({
    node,
    text: node.querySelector(".text").textContent.toLowerCase(),
    classes: JSON.parse(node.dataset.classes),
  }));
  let current = root.querySelector("button[data-list]").dataset.list;

  function show() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    // Rows without lengths have no filters by them.
    const label = $("class").value, bucket = $("bucket")?.value, cut = $("cut")?.value;
    const counts = {};
    for (const { node, text, classes } of examples) {
      const fits =
        (!label || classes.includes(Number(label))) &&
        (!bucket || node.dataset.bucket === bucket) &&
        (!cut || node.dataset.cut === cut) &&
        words.every((word) => text.includes(word));
      node.hidden = !fits;
      const list = node.parentElement.dataset.list;
      counts[list] = (counts[list] || 0) + (fits ? 1 : 0);
    }
    for (const section of root.querySelectorAll("section[data-list]")) {
      section.hidden = section.dataset.list !== current;
      section.querySelector(".shown").textContent = counts[section.dataset.list] || 0;
    }
    for (const button of root.querySelectorAll("button[data-list]")) {
      button.setAttribute("aria-pressed", String(button.dataset.list === current));
    }
  }

  root.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-list]");
    if (button) { current = button.dataset.list; show(); }
    const text = event.target.closest(".text");
    if (text && !String(window.getSelection())) text.classList.toggle("open");
  });
  root.querySelector(".tools.filters").addEventListener("input", show);
  root.querySelectorAll(".tools").forEach((tools) => { tools.hidden = false; });
  show();
})();
