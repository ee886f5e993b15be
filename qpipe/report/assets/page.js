"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const INK = "#111111"; // the colour of dense and of text, see palette.py
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const drawn = new Set();

  function draw(element) {
    const ink = getComputedStyle(root).getPropertyValue("--ink").trim();
    const spec = JSON.parse(JSON.stringify(figures[Number(element.dataset.figure)]).replaceAll(INK, ink));
    const paper = getComputedStyle(root).getPropertyValue("--paper").trim();
    spec.layout.hoverlabel = { bgcolor: paper, font: { color: ink }, align: "left" };
    if (element.clientWidth < 760) {
      spec.layout.legend = { ...spec.layout.legend, orientation: "h", y: -0.22 };
    }
    const options = { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtonsToRemove: ["select2d", "lasso2d"] };
    options.toImageButtonOptions = { filename: spec.layout.meta.name, format: "svg" };
    drawn.add(element);
    return Plotly.react(element, spec.data, spec.layout, options);
  }

  const plots = [...document.querySelectorAll(".plot")];
  if ("IntersectionObserver" in window) {
    // Drawing when a figure comes near keeps long pages quick to open.
    const near = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
      }
    }, { rootMargin: "600px" });
    plots.forEach((element) => near.observe(element));
  } else {
    plots.forEach(draw);
  }

  const button = document.getElementById("theme");
  const rename = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  const repaint = () => { rename(); drawn.forEach(draw); };
  button.hidden = false;
  rename();
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; repaint(); });
  dark.addEventListener("change", repaint);

  function compare(a, b, numeric) {
    if (a === undefined || b === undefined) { return (a === undefined) - (b === undefined); }
    return numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true });
  }
  for (const heading of document.querySelectorAll("th")) {
    heading.querySelector("button")?.addEventListener("click", () => {
      const table = heading.closest("table");
      const down = heading.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const numeric = heading.classList.contains("number");
      const key = (row) => row.cells[heading.cellIndex].dataset.sort;
      const rows = [...table.tBodies[0].rows];
      rows.sort((one, two) => {
        const order = compare(key(one), key(two), numeric);
        const empty = key(one) === undefined || key(two) === undefined;
        return down && !empty ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  }

  for (const field of document.querySelectorAll("[data-filter]")) {
    const holder = document.getElementById(field.dataset.filter);
    const output = field.closest(".filter").querySelector("output");
    field.closest(".filter").hidden = false;
    field.addEventListener("input", () => {
      const wanted = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      for (const row of holder.querySelectorAll("tbody tr")) {
        const text = row.textContent.toLowerCase();
        row.hidden = !wanted.every((word) => text.includes(word));
        count += !row.hidden;
      }
      output.textContent = wanted.length ? `${count} shown` : "";
    });
  }

  // Everything is printed, also what is folded away on the screen.
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("details:not(#runs-table)").forEach((element) => { element.open = true; });
  });
})();
