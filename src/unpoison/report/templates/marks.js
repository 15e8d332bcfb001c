"use strict";
// Sort, filter and mark the example images; save the marks as a decisions file for `unpoison keep`.
for (const gallery of document.querySelectorAll("[data-gallery]")) {
  const samples = [...gallery.querySelectorAll(".sample")];
  const find = (name) => gallery.querySelector(`[data-${name}]`);
  const decisions = new Map();

  const sort = () => {
    const key = find("sort").value;
    const order = (a, b) =>
      key === "label"
        ? a.dataset.label.localeCompare(b.dataset.label)
        : Number(b.dataset[key]) - Number(a.dataset[key]);
    for (const list of gallery.querySelectorAll(".gallery")) {
      list.append(...[...list.children].sort(order));
    }
  };

  const filter = () => {
    const region = find("filter").value;
    const words = find("find").value.trim().toLowerCase();
    for (const sample of samples) {
      const text = `${sample.dataset.label} ${JSON.parse(sample.dataset.id)}`.toLowerCase();
      sample.hidden = Boolean(region && sample.dataset.region !== region) || !text.includes(words);
    }
  };

  const mark = (sample, button) => {
    const id = JSON.parse(sample.dataset.id);
    const wanted = button.getAttribute("aria-pressed") === "true" ? null : button.dataset.mark;
    for (const other of sample.querySelectorAll("[data-mark]")) {
      other.setAttribute("aria-pressed", String(other.dataset.mark === wanted));
    }
    sample.dataset.decision = wanted ?? "";
    wanted ? decisions.set(id, wanted) : decisions.delete(id);
    const dropped = [...decisions.values()].filter((value) => value === "drop").length;
    find("count").textContent = decisions.size
      ? `${decisions.size - dropped} to keep, ${dropped} to drop. Unmarked images follow the scan.`
      : "Nothing marked. Unmarked images follow the scan.";
  };

  const save = () => {
    const file = {
      schema: "unpoison/decisions",
      schema_version: 1,
      run: gallery.dataset.gallery,
      decisions: Object.fromEntries(decisions),
    };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(file, null, 2)], { type: "application/json" }));
    link.download = "decisions.json";
    link.click();
    URL.revokeObjectURL(link.href);
  };

  find("sort").addEventListener("change", sort);
  find("filter").addEventListener("change", filter);
  find("find").addEventListener("input", filter);
  find("export").addEventListener("click", save);
  for (const sample of samples) {
    for (const button of sample.querySelectorAll("[data-mark]")) {
      button.addEventListener("click", () => mark(sample, button));
    }
    sample.querySelector(".marks").hidden = false;
  }
  gallery.querySelector(".controls").hidden = false;
}
