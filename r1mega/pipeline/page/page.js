"use strict";
// Without this the page says the same: boxes link to their rows of the table. With it, pointing at a box or tabbing to it
// lights up all that it was made of.
(function () {
  const svg = document.querySelector(".graph svg");
  const chosen = document.getElementById("chosen");
  if (!svg || !chosen) return;
  const hint = chosen.textContent;
  const boxes = [...svg.querySelectorAll(".box")];
  const edges = [...svg.querySelectorAll(".edge")];

  function show(box) {
    const up = new Set(box.dataset.up.split(" "));
    svg.classList.add("tracing");
    for (const one of boxes) {
      one.classList.toggle("up", up.has(one.dataset.box));
      one.classList.toggle("chosen", one === box);
    }
    for (const one of edges) one.classList.toggle("up", up.has(one.dataset.from) && up.has(one.dataset.to));
    const cells = [...document.querySelector(box.getAttribute("href")).cells].map((cell) => cell.textContent);
    const [name, kind, by, of, counts, path, sha256] = cells;
    chosen.textContent =
      `${name}: ${kind}, ${by === "given" ? "given to the pipeline" : "made by " + by}; made of ${of}; ` +
      `counts ${counts}; ${path}; sha256 ${sha256}`;
  }

  function clear() {
    svg.classList.remove("tracing");
    for (const one of boxes) one.classList.remove("up", "chosen");
    chosen.textContent = hint;
  }

  for (const box of boxes) {
    box.addEventListener("mouseenter", () => show(box));
    box.addEventListener("focus", () => show(box));
    box.addEventListener("mouseleave", clear);
    box.addEventListener("blur", clear);
    box.addEventListener("click", () => { document.getElementById("artifacts").open = true; });
  }
})();
